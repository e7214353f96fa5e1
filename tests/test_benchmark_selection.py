"""The benchmark of selection: its parts, its skew, and that it sees selection work."""

import json

import numpy as np
import pytest

from benchmarks import selection
from tests.resampling import save_tiny_encoder, unit_vectors
from utils.cli import UsageError
from utils.command_line.parser import read_flags

WORDS = ["red", "green blue", "seven eleven", "north", "a long walk by the sea", "zzz"]


def settings_of(work_dir, *flags):
    """Settings of trials, whose texts are given to them."""
    flags = ["--texts=none", f"--work_dir={work_dir}", *flags]
    return read_flags(selection.Settings, "", flags)


@pytest.fixture
def texts(tmp_path):
    """A file of texts of six kinds."""
    path = tmp_path / "texts.json"
    rows = [f"{WORDS[i % 6]} {WORDS[i % 6]} number {i}" for i in range(600)] + ["zzz, number 5!"]
    path.write_text(json.dumps([{"instruction": row} for row in rows]))
    return str(path)


def test_it_prints_a_table_and_writes_every_trial(texts, tmp_path, capsys):
    encoder = save_tiny_encoder(tmp_path / "encoder")
    arguments = [
        f"--texts={texts}", f"--work_dir={tmp_path / 'work'}", f"--model={encoder}",
        "--num_private=2000", "--histogram_sigma=3", "--num_bins=8", "--num_seeds=2",
        f"--json={tmp_path / 'out.json'}",
    ]  # fmt: skip
    selection.main(arguments)
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results["trials"]) == 2
    assert results["settings"]["num_bins"] == 8
    assert str(tmp_path) not in json.dumps(results["settings"] | {"model": ""})
    for trial in results["trials"]:
        assert set(trial["scores"]) == {"pool", "histogram", "histogram_conditional", "private"}
    assert [line.split()[0] for line in shown.splitlines()[1:5]] == list(selection.SETS)
    values = [trial["scores"]["pool"]["mauve"] for trial in results["trials"]]
    assert f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}" in shown


def test_a_skewed_pool_is_further_away_and_selection_brings_it_back(tmp_path):
    vectors = unit_vectors(6000, seed=1, groups=30)
    flags = ["--num_private=6000", "--histogram_sigma=10", "--num_bins=30", "--skew=2"]
    settings = settings_of(tmp_path, *flags)
    scores = selection.trial([f"text {i}" for i in range(6000)], vectors, 0, settings)["scores"]
    for rule in ("histogram", "histogram_conditional"):
        closed = [
            (scores["pool"][score] - scores[rule][score])
            / (scores["pool"][score] - scores["private"][score])
            for score in selection.SCORES
        ]
        # Half of the way to private rows, as far as 600 rows tell; a random choice goes none.
        assert np.mean(closed) > 0.3, (rule, scores)


def test_the_parts_share_no_text_and_the_private_rows_are_as_many_as_asked_for(
    monkeypatch, tmp_path
):
    seen = {}

    def spy(texts, vectors, pool, private, rule, size, seed, settings):
        seen[rule] = (pool, private)
        return pool[:size]

    monkeypatch.setattr(selection, "selected", spy)
    compared = []
    monkeypatch.setattr(selection, "mauve", lambda one, other, seed: compared.append((one, other)))
    vectors = unit_vectors(500, seed=1)
    settings = settings_of(tmp_path, "--num_private=1000", "--skew=1")
    found = selection.trial(["x"] * 500, vectors, 3, settings)
    pool, private = seen["histogram"]
    assert len(private) == 1000
    assert len(set(private)) <= 200
    assert not set(pool) & set(private)
    reference = compared[0][1]
    assert found["sizes"]["compared"] == len(reference) == len(compared[0][0])
    held_out = {tuple(row) for row in reference}
    assert not held_out & {tuple(vectors[row]) for row in [*pool, *private]}


def test_skew_thins_topics_out_by_different_shares():
    vectors, random = unit_vectors(3000, seed=1), np.random.default_rng(0)
    kept = selection.skewed(vectors, np.arange(3000), 1.5, 0, random)
    assert 600 < len(kept) < 2900
    topics = selection.fit_clusters(vectors, selection.NUM_TOPICS, 2, "").assign(vectors, "")
    shares = np.bincount(topics[kept], minlength=30) / np.bincount(topics, minlength=30)
    assert shares.min() < 0.4
    assert shares.max() > 0.95


def test_too_few_texts_are_refused(tmp_path):
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="has 2 distinct texts; 100 are needed"):
        selection.main([f"--texts={tmp_path / 'few.txt'}", f"--work_dir={tmp_path}"])
