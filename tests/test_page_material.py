"""What is read for a page: damage is named, and defects are not hidden."""

from pathlib import Path

import pytest

from evaluation.page.material import (
    Samples,
    damage_named,
    read_topics,
    require_topics,
    with_known_prompts,
)
from utils.cli import UsageError
from utils.files import sha256_of, write_json
from utils.privacy.ledger import record_histogram


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), TypeError("x"), OSError("x")])
def test_damage_is_named_and_defects_are_not_hidden(error):
    with (
        pytest.raises(UsageError, match="^file is missing or not what train.py writes"),
        damage_named(Path("file"), "train.py"),
    ):
        raise error
    with pytest.raises(ZeroDivisionError), damage_named(Path("file"), "train.py"):
        raise ZeroDivisionError


@pytest.fixture
def topics(tmp_path):
    """A histogram of topics in a folder, with a ledger in the folder above it."""
    ledger = tmp_path / "ledger.jsonl"
    head = record_histogram(ledger, num_examples=64, noise_multiplier=10.0, num_bins=2)
    report = {
        "topics": [{"topic": 0, "keywords": "river, boat", "count": 40.0}],
        "left_out": [{"topic": 1, "keywords": "bread", "count": -3.0}],
        "noise_multiplier": 10.0, "least_count": 20.0, "ledger": {"path": str(ledger), **head},
    }  # fmt: skip
    write_json(tmp_path / "topics" / "topic_histogram.json", report)
    return tmp_path / "topics"


def drawn(**manifest) -> Samples:
    sample = {"prompt": "what patient zero said", "text": "x", "topic": 0}
    return Samples(Path("drawn"), {"prompt_style": "topic_generation"} | manifest, [sample])


def test_a_histogram_of_topics_has_to_be_in_a_ledger_of_the_composition(topics):
    ledger = topics.parent / "ledger.jsonl"
    found = read_topics(topics, [ledger])
    assert found.sha256 == sha256_of(topics / "topic_histogram.json")
    assert [each["topic"] for each in found.kept + found.lost] == [0, 1]
    with pytest.raises(
        UsageError, match=f"--topics {topics}: .*left out; add --histogram {ledger}"
    ):
        read_topics(topics, [])
    write_json(topics / "topic_histogram.json", {"topics": []})
    with pytest.raises(UsageError, match="is missing or not what topics.histogram writes"):
        read_topics(topics, [ledger])


def test_samples_of_a_histogram_that_is_not_named_are_refused(topics):
    named = read_topics(topics, [topics.parent / "ledger.jsonl"])
    require_topics(drawn(topic_histogram_sha256=named.sha256), named)
    require_topics(drawn(), None)
    for other in (None, named):
        with pytest.raises(UsageError, match="drawn by a histogram of topics that is not named"):
            require_topics(drawn(topic_histogram_sha256="0" * 64), other)


def test_topics_that_no_histogram_names_may_be_private_and_are_hidden():
    assert with_known_prompts(drawn(), set()).hidden
    assert not with_known_prompts(drawn(topic_histogram_sha256="0" * 64), set()).hidden
