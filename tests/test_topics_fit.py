"""Topics of public texts: what they are made of, and that no private row is read for them."""

import json
import sys
from unittest import mock

import numpy as np
import pytest

from tests.resampling import save_tiny_encoder
from tests.topics import fitted, save_private, texts_of
from topics import fit
from topics.folder import read_topics
from utils.cli import UsageError
from utils.texts.text_inputs import read_instructions

OPENED: list[str] | None = None


def _note(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_private_rows_are_not_read_and_move_nothing(encoder, tmp_path, monkeypatch):
    """With a private data set in the working folder, and with another one in its place."""
    monkeypatch.chdir(tmp_path)
    found = []
    for seed in (2, 3):
        save_private(tmp_path / "data" / "mine", texts_of(40, seed))
        monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
        topics = fitted(tmp_path, encoder)
        assert any(name.endswith("public.jsonl") for name in OPENED)
        assert not [name for name in OPENED if "data/mine" in name]
        found.append(contents(topics))
        topics.rename(tmp_path / f"topics-{seed}")
    assert found[0] == found[1]


def test_topics_are_named_by_their_own_texts(encoder, tmp_path):
    topics = fitted(tmp_path, encoder)
    record = json.loads((topics / "topics.json").read_text())
    public = read_instructions(str(tmp_path / "public.jsonl"))
    sizes = [topic["num_texts"] for topic in record["topics"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == 80
    assert record["fitted_on"] == "public texts only"
    assert [topic["topic"] for topic in record["topics"]] == list(range(len(sizes)))
    for topic in record["topics"]:
        assert len(topic["examples"]) == min(3, topic["num_texts"])
        assert {*topic["examples"]} <= {*public}
    words = [word for topic in record["topics"] for word in topic["keywords"].split(", ")]
    assert len(words) == len(set(words))
    assert {"river", "bread", "piano", "goal"} <= {*words}
    assert read_topics(topics).clusters.weights.shape == (16, len(sizes))


def test_a_seed_decides(encoder, tmp_path):
    one = contents(fitted(tmp_path, encoder))
    (tmp_path / "topics").rename(tmp_path / "before")
    assert contents(fitted(tmp_path, encoder)) == one
    (tmp_path / "topics").rename(tmp_path / "again")
    assert contents(fitted(tmp_path, encoder, "--seed=5"))["clusters.npz"] != one["clusters.npz"]


def test_a_cluster_without_a_text_is_left_out_and_the_largest_comes_first():
    clusters = mock.Mock(weights=np.arange(8.0).reshape(2, 4), offsets=np.arange(4.0))
    with mock.patch.object(fit, "replace", lambda _, **changes: changes):
        kept, topics = fit.largest_first(clusters, np.array([3, 3, 1, 3, 0, 1]))
    np.testing.assert_array_equal(kept["offsets"], [3, 1, 0])
    np.testing.assert_array_equal(kept["weights"], [[3, 1, 0], [7, 5, 4]])
    np.testing.assert_array_equal(topics, [0, 0, 1, 0, 2, 1])


def test_the_texts_nearest_to_the_mean_are_shown():
    vectors = np.array([[1, 0], [0, 1], [0.8, 0.6], [0.6, 0.8], [0, -1]], dtype=np.float16)
    rows = fit.nearest_texts(vectors, np.array([True, True, True, True, False]))
    assert rows.tolist() == [2, 3, 0]


def test_a_kill_leaves_nothing_and_the_same_command_goes_on(encoder, tmp_path):
    with (
        mock.patch.object(fit, "write_json", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        fitted(tmp_path, encoder)
    assert not (tmp_path / "topics").exists()
    assert read_topics(fitted(tmp_path, encoder)).keywords


def test_wrong_use_is_refused(encoder, tmp_path):
    topics = fitted(tmp_path, encoder)
    with pytest.raises(UsageError, match="exists; name another"):
        fitted(tmp_path, encoder)
    public = f"--public={tmp_path / 'public.jsonl'}"
    with pytest.raises(UsageError, match="--num_topics 81: .* holds 80 texts"):
        fit.main([public, f"--model={encoder}", "--num_topics=81", f"--output={tmp_path / 'x'}"])
    for kinds in ([], [public, "--synthetic=texts.jsonl"]):
        with pytest.raises(SystemExit):
            fit.main([*kinds, f"--output={tmp_path / 'x'}"])
    (topics / "clusters.npz").write_bytes(b"else")
    with pytest.raises(UsageError, match=r"clusters\.npz is not what .* topics\.fit wrote"):
        read_topics(topics)
    with pytest.raises(UsageError, match=r"no .*topics\.json; make it with python -m topics\.fit"):
        read_topics(tmp_path / "nowhere")
