"""The histogram of topics that sampling reads: what it holds, and what is refused."""

import json

import pytest

from utils.cli import UsageError
from utils.texts.topic_histogram import Topic, read_topic_histogram


@pytest.fixture
def read(tmp_path):
    """Writes a list of topics and reads it."""

    def there_and_back(topics):
        (tmp_path / "topics.json").write_text(json.dumps({"topics": topics, "epsilon": 1.0}))
        return read_topic_histogram(str(tmp_path / "topics.json"))

    return there_and_back


def entry(**changed) -> dict:
    return {"topic": 3, "keywords": "rivers, lakes", "count": 12.5} | changed


def test_topics_come_in_the_order_of_the_file(read):
    found = read([entry(), entry(topic=0, keywords="c++, naïve", count=0)])
    assert found == [Topic(3, "rivers, lakes", 12.5), Topic(0, "c++, naïve", 0.0)]


@pytest.mark.parametrize(
    "keywords",
    [
        "a\nb", "a\x00", "a\x1b[31m", "a\u2028b", "a\u202eb", "<|im_start|>user", "[INST] x",
        "</s>", "### EOI ###", "### BOI ### 3", "{instruction}", "{{ x }}", "a\\b", "\ud800",
    ],
)  # fmt: skip
def test_hostile_keywords_are_refused_in_a_line_that_shows_them_escaped(read, keywords):
    with pytest.raises(UsageError, match="topic 1 has keywords with a control character") as error:
        read([entry(topic=0), entry(keywords=keywords)])
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"topic": "3"}, "topic 0 has no number"),
        ({"topic": True}, "topic 0 has no number"),
        ({"topic": -1}, "topic 0 has no number"),
        ({"keywords": " "}, "topic 0 has no `keywords`"),
        ({"keywords": "x" * 301}, "of 1 to 300 characters"),
        ({"keywords": None}, "topic 0 has no `keywords`"),
        ({"count": -1}, "topic 0 has no `count` of 0 or more, found '-1'"),
        ({"count": float("nan")}, "found 'nan'"),
        ({"count": 10**400}, "found .10{39}., or one beyond"),
        ({"count": 1e308}, "topic 0 has no `count`"),
        ({"count": "5"}, "topic 0 has no `count`"),
        ({"count": 0}, "no topic with a count above 0"),
    ],
)
def test_what_is_not_a_topic_is_named(read, changed, message):
    with pytest.raises(UsageError, match=message):
        read([entry(**changed)])


def test_other_files_are_refused(read, tmp_path):
    for topics, message in ((None, "no list of topics"), ([3], "topic 0 has no number"),
                            ([entry(), entry()], "a topic twice")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            read(topics)
    with pytest.raises(UsageError, match="no topic histogram .* python -m topics.histogram"):
        read_topic_histogram(str(tmp_path / "none.json"))
    (tmp_path / "torn.json").write_text('{"topics": [')
    with pytest.raises(UsageError, match="not a JSON object"):
        read_topic_histogram(str(tmp_path / "torn.json"))
