"""The topic of each private row: of its own text alone, and private like it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from resample_with_dp_histogram.clusters import Clusters
from resample_with_dp_histogram.embed import embed_in_memory, load_model
from tests.paths import ROOT
from tests.resampling import save_tiny_encoder
from tests.topics import (
    assigned,
    counted,
    fitted,
    save_private,
    stop_embedding,
    texts_of,
    write_rows,
)
from tests.training import run_process
from topics import assign
from topics.folder import read_assignment, read_topics
from utils.cli import UsageError
from utils.files import read_jsonl, write_json
from utils.texts.data_sets import load_splits, rows_fingerprint
from utils.texts.units import largest_units, read_units

TEXTS = texts_of(30, seed=2)
PERSONS = [f"person {number // 3}" for number in range(30)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def topics(encoder, tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("topics"), encoder)


def rows_of(folder, split="train"):
    return list(read_jsonl(folder / f"{split}.jsonl"))


def noted_forward(shapes):
    """The encoder's forward pass, which notes how many texts each call has."""
    forward = SentenceTransformer.forward

    def noted(self, features, **kwargs):
        shapes.append(features["input_ids"].shape[0])
        return forward(self, features, **kwargs)

    return noted


def test_every_split_has_its_rows_in_order_with_the_keywords_of_the_nearest_topic(
    topics, encoder, tmp_path
):
    data = assigned(topics, save_private(tmp_path / "mine", TEXTS), tmp_path / "out")
    found = read_topics(topics)
    model = load_model(encoder)
    vectors = np.concatenate([
        embed_in_memory([text], np.array([0]), model, "") for text in TEXTS
    ])  # fmt: skip
    numbers = found.clusters.assign(vectors, "")
    expected = [
        {"instruction": text, "topic": found.keywords[number]}
        for text, number in zip(TEXTS, numbers)
    ]
    assert rows_of(data) == expected
    assert rows_of(data, "val") == expected[:3]
    assert len({row["topic"] for row in expected}) > 2
    assert list(load_splits(str(data))["train"]["instruction"]) == TEXTS
    np.testing.assert_array_equal(read_assignment(data).topics, numbers)


def test_each_text_passes_through_the_encoder_by_itself(topics, tmp_path):
    """In company, padding and kernels would decide the last bits of its embedding."""
    shapes = []
    data = save_private(tmp_path / "mine", TEXTS)
    with mock.patch.object(SentenceTransformer, "forward", noted_forward(shapes)):
        assigned(topics, data, tmp_path / "out")
    assert shapes == [1] * (len(TEXTS) + 3)


def test_a_row_that_leaves_changes_no_other_embedding_in_a_bit(topics, tmp_path, monkeypatch):
    embedded, nearest = [], Clusters.assign

    def noted(self, vectors, where):
        embedded.append(np.array(vectors))
        return nearest(self, vectors, where)

    monkeypatch.setattr(Clusters, "assign", noted)
    rows = []
    longest = max(range(30), key=lambda row: len(TEXTS[row]))
    for name, left_out in (("whole", []), ("first", [0]), ("longest", [longest])):
        texts = [text for row, text in enumerate(TEXTS) if row not in left_out]
        data = save_private(tmp_path / name, texts)
        rows.append(rows_of(assigned(topics, data, tmp_path / f"{name}-topics")))
        np.testing.assert_array_equal(embedded[-2], np.delete(embedded[0], left_out, axis=0))
        assert rows[-1] == [row for place, row in enumerate(rows[0]) if place not in left_out]


def test_all_of_it_is_for_its_owner_alone_and_says_so(topics, tmp_path):
    before = os.umask(0)
    try:
        data = assigned(topics, save_private(tmp_path / "mine", TEXTS), tmp_path / "out")
    finally:
        os.umask(before)
    for folder in (data, data / "private"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert "Do not share it" in (data / "README.md").read_text()
    assert "private" in json.loads((data / "preparation.json").read_text())
    # By which a run on either data set, and histograms of them, are known to read the same rows.
    fingerprint = {"rows_fingerprint": rows_fingerprint(TEXTS)}
    assert json.loads((data / "private" / "identity.json").read_text()) == fingerprint
    read = load_splits(str(data))["train"]["instruction"]
    assert rows_fingerprint(read) == fingerprint["rows_fingerprint"]


def test_units_stay_whose_they_are(topics, tmp_path):
    private = save_private(tmp_path / "mine", TEXTS, PERSONS)
    data = assigned(topics, private, tmp_path / "out", "--unit_column=person")
    assert [row["person"] for row in rows_of(data)] == PERSONS
    assert [row.keys() for row in rows_of(data, "val")] == [
        {"instruction", "person", "topic"}
    ] * 3  # fmt: skip
    units = read_units(str(data), "person")
    np.testing.assert_array_equal(units, np.arange(30) // 3)
    found = read_assignment(data)
    np.testing.assert_array_equal(found.units, units)
    assert found.num_examples == 10
    assert found.record["unit_column"] == "person"


def test_whose_rows_are_stays_where_it_is_not_asked_for(topics, tmp_path, capsys):
    """A run on the rows with topics is to warn of persons as a run on the rows does."""
    private = save_private(tmp_path / "mine", TEXTS, PERSONS)
    write_rows(private / "val.jsonl", [{"instruction": "nobody's"}])
    data = assigned(topics, private, tmp_path / "it's mine")
    assert [row["person"] for row in rows_of(data)] == PERSONS
    assert [row.keys() for row in rows_of(data, "val")] == [{"instruction", "topic"}]
    assert largest_units(str(data)) == largest_units(str(private)) == {"person": 3}
    assert read_assignment(data).units is None
    said = capsys.readouterr().err.splitlines()[-1].removeprefix("next: ")
    assert str(data) in shlex.split(said)


KILLED = """
import os, signal, sys
from tests.topics import stop_embedding
from topics import assign
stop_embedding(setattr, lambda: os.kill(os.getpid(), signal.SIGKILL))
assign.main(sys.argv[1:])
"""


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_topics_and_leaves_nothing(
    topics, tmp_path, monkeypatch, kill
):
    data, out = save_private(tmp_path / "mine", TEXTS), tmp_path / "it's mine"
    flags = [f"--private={data}", f"--topics={topics}", f"--output={out}", "--devices", "cpu"]
    if kill:
        killed = subprocess.run([sys.executable, "-c", KILLED, *flags], cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            stop_embedding(patch.setattr, mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                assign.main(flags)
    assert not out.exists()
    work = tmp_path / ".it's mine.embeddings"
    assert work.stat().st_mode & 0o777 == 0o700
    shapes = []
    with mock.patch.object(SentenceTransformer, "forward", noted_forward(shapes)):
        assign.main(flags)
    assert shapes == [1] * (len(TEXTS) - 24 + 3)
    # Its claim may outlive a kill, held by nobody, until the next run ends.
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "it's mine"}
    whole = assigned(topics, data, tmp_path / "whole", "--devices", "cpu")
    for name in ("train.jsonl", "val.jsonl", "private/topics.npz"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_stop_while_it_writes_embeds_nothing_again(topics, tmp_path):
    private = save_private(tmp_path / "mine", TEXTS)
    with (
        mock.patch.object(assign, "write_arrays", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        assigned(topics, private, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".out.embeddings"}
    with mock.patch.object(SentenceTransformer, "forward", side_effect=AssertionError):
        assert len(rows_of(assigned(topics, private, tmp_path / "out"))) == 30
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}


def test_a_kill_before_the_embeddings_go_leaves_them_to_the_next_command(topics, tmp_path):
    private = save_private(tmp_path / "mine", TEXTS)
    with (
        mock.patch.object(
            assign, "shutil", mock.Mock(rmtree=mock.Mock(side_effect=KeyboardInterrupt))
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        assigned(topics, private, tmp_path / "out")
    assert (tmp_path / ".out.embeddings").exists()
    with pytest.raises(UsageError, match="exists; name another"):
        assigned(topics, private, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        ("rows", "texts_sha256"),
        ("topics", "topics_sha256"),
        ("threads", "kind_of_device"),
        ("flag", "unit_column, and another units_sha256"),
    ],
)
def test_other_data_topics_devices_or_flags_do_not_mix(
    topics, tmp_path, monkeypatch, changed, fact
):
    """On a CPU with other threads, how a row's topic is rounded would depend on its place."""
    private = save_private(tmp_path / "mine", TEXTS, PERSONS)
    with (
        mock.patch.object(assign, "write_arrays", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        assigned(topics, private, tmp_path / "out")
    flags = []
    if changed == "rows":
        save_private(tmp_path / "mine", TEXTS[::-1], PERSONS)
    elif changed == "topics":
        shutil.copytree(topics, tmp_path / "topics")
        topics = tmp_path / "topics"
        record = (topics / "topics.json").read_text()
        (topics / "topics.json").write_text(record.replace("river", "stream"))
    elif changed == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    else:
        flags = ["--unit_column=person"]
    with pytest.raises(
        UsageError, match=rf"with another {fact}; go on with .* or remove .*\.out\."
    ):
        assigned(topics, private, tmp_path / "out", *flags)


@pytest.mark.slow
@pytest.mark.timeout(900)  # each split starts two processes that import torch
def test_two_devices_give_the_topics_of_one(topics, tmp_path):
    data = save_private(tmp_path / "mine", TEXTS)
    (data / "val.jsonl").unlink()
    one = assigned(topics, data, tmp_path / "one", "--devices", "cpu")
    done = run_process(
        "-m", "topics.assign", f"--private={data}", f"--topics={topics}",
        f"--output={tmp_path / 'two'}", "--devices", "cpu", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "private/topics.npz"):
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("labelled_mine", [], "starts with 'labelled' is for pairs"),
        ("topics_there", [], "exists; name another"),
        ("out", ["--private=nowhere"], "no data set 'nowhere'"),
        ("out", ["--unit_column=user"], "--unit_column user: .*entry 1 has no such column"),
        ("out", ["--devices=nowhere"], "--devices nowhere: not here; .*'c"),
        ("out", ["--devices=cpu,cpu"], "--devices cpu,cpu: not here"),
        ("out", ["--devices", "cpu", "meta"], "of several kinds .cpu, meta."),
        ("out", ["--owner=first"], "--owner needs --unit_column"),
        ("out", ["--unowned_rows_are_units"], "--unowned_rows_are_units needs --unit_column"),
        ("out", ["--unit_column=topic"], "--unit_column topic: the output has another column"),
    ],
)
def test_wrong_use_is_refused_before_a_row_is_embedded(topics, tmp_path, name, more, message):
    private = save_private(tmp_path / "mine", TEXTS)
    (tmp_path / "topics_there").mkdir()
    with (
        mock.patch.object(assign, "load_model", side_effect=AssertionError),
        pytest.raises(UsageError, match=message),
    ):
        assigned(topics, private, tmp_path / name, *more)


def test_topics_of_the_private_rows_themselves_are_refused(topics, tmp_path):
    public = [text for topic in read_topics(topics).record["topics"] for text in topic["examples"]]
    most = len(public) // 2 + 1
    refused = f"{most} of the {len(public)} texts that it shows are private rows"
    with pytest.raises(UsageError, match=refused):
        assigned(topics, save_private(tmp_path / "mine", TEXTS + public[:most]), tmp_path / "out")
    # Those of another split are private, too; some that anybody writes are no sign.
    split = save_private(tmp_path / "split", TEXTS + public[: most - 1])
    assigned(topics, split, tmp_path / "few")
    shutil.copy(save_private(tmp_path / "rest", public[-1:]) / "train.jsonl", split / "val.jsonl")
    with pytest.raises(UsageError, match=refused):
        assigned(topics, split, tmp_path / "out")


def test_an_output_with_a_ledger_is_not_to_be_removed(topics, tmp_path):
    data = assigned(topics, save_private(tmp_path / "mine", TEXTS), tmp_path / "out")
    with pytest.raises(UsageError, match="exists; name another, or remove it"):
        assigned(topics, tmp_path / "mine", data)
    counted(data, tmp_path / "histogram")
    with pytest.raises(UsageError, match="has the ledger of its histograms, .*; name another$"):
        assigned(topics, tmp_path / "mine", data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"topics": [{"keywords": "river", "examples": []}]}, "1 topics for . centres"),
        ({"topics": "all"}, "has no 'topics' of topics.fit"),
        ({"model": None}, "has no 'model' of topics.fit"),
        ("<|im_end|>", "topic 0 has keywords with a control character or a mark of templates"),
        (None, "topic 0 has no `keywords`"),
        ("river", "topic 0 has no `examples`"),
    ],
)
def test_topics_that_were_edited_are_refused(topics, tmp_path, changed, message):
    """Keywords are prompts: a token of a template would be trained, and refused in sampling."""
    shutil.copytree(topics, tmp_path / "topics")
    record = read_topics(topics).record
    if isinstance(changed, dict):
        record |= changed
    else:
        record["topics"][0] = {"keywords": changed}
    write_json(tmp_path / "topics" / "topics.json", record)
    with pytest.raises(UsageError, match=message):
        assigned(tmp_path / "topics", tmp_path / "mine", tmp_path / "out")


def test_another_encoder_than_that_of_the_topics_is_refused(tmp_path):
    encoder = save_tiny_encoder(tmp_path / "encoder")
    topics = fitted(tmp_path, encoder)
    save_tiny_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(UsageError, match="was fitted with another model"):
        assigned(topics, save_private(tmp_path / "mine", TEXTS), tmp_path / "out")


def test_a_lone_file_is_a_train_split(topics, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": text} for text in TEXTS])
    data = assigned(topics, file, tmp_path / "out")
    assert [path.name for path in data.glob("*.jsonl")] == ["train.jsonl"]
