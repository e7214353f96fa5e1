"""Embedding texts: right, private, resumable, on several devices, and clear about bad input."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from resample_with_dp_histogram import embed
from resample_with_dp_histogram.embeddings import open_embeddings
from tests.paths import ROOT
from tests.resampling import save_tiny_encoder
from tests.training import run_process
from utils.cli import UsageError, run_cli
from utils.texts.data_sets import rows_fingerprint

TEXTS = [("word " * (7 * i % 40 + 1)).strip() + str(i) for i in range(150)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Path of a small encoder with the layers of sentence-t5."""
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def arguments(encoder, tmp_path):
    """Flags that embed TEXTS into tmp_path/out, eight at once."""
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(TEXTS))
    return [
        f"--model={encoder}", f"--instructions={file}", f"--output={tmp_path / 'out'}",
        "--batch_size=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(encoder):
    """float64 [texts, dimensions]: each text embedded alone, at length 1."""
    model = embed.load_model(encoder)
    with torch.no_grad():
        vectors = np.stack([model.encode(text) for text in TEXTS]).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_are_in_the_order_of_the_texts_at_length_1(arguments, expected, tmp_path):
    embed.main(["--synthetic", *arguments])
    opened = open_embeddings(tmp_path / "out", private=False)
    assert opened.vectors.dtype == np.float16
    assert isinstance(opened.vectors, np.memmap)
    np.testing.assert_allclose(opened.vectors, expected, atol=1e-3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "embeddings.npy", "manifest.json",
    }  # fmt: skip


def test_private_embeddings_are_for_their_owner_alone_from_the_first_moment(
    arguments, tmp_path, private_modes
):
    embed.main(["--private", *arguments])
    assert private_modes == ["0o700"]
    (tmp_path / "out" / "private").chmod(0o755)  # as earlier versions made it
    embed.main(["--private", *arguments])
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o700


def test_a_disk_without_room_for_the_vectors_is_an_error_at_once(arguments, tmp_path, monkeypatch):
    def full(_descriptor, start, size):
        assert (start, size) == (0, (tmp_path / "out" / "embeddings.npy").stat().st_size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        embed.main(["--synthetic", *arguments])


def test_private_texts_leave_nothing_outside_private(arguments, tmp_path):
    embed.main(["--private", *arguments])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["private"]
    assert {path.name for path in (tmp_path / "out" / "private").iterdir()} == {
        "embeddings.npy", "manifest.json", "identity.json", "README.md",
    }  # fmt: skip
    assert "Do not share it" in (tmp_path / "out" / "private" / "README.md").read_text()
    with pytest.raises(UsageError, match="made as private ones"):
        open_embeddings(tmp_path / "out", private=False)
    with pytest.raises(UsageError, match="made as private ones"):
        embed.main(["--synthetic", *arguments])


def test_the_fingerprint_of_private_rows_is_their_owners_alone(arguments, tmp_path):
    private = tmp_path / "out" / "private"
    before = os.umask(0)
    try:
        embed.main(["--private", *arguments])
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o700
    identity = json.loads((private / "identity.json").read_text())
    assert identity == {"rows_fingerprint": rows_fingerprint(TEXTS)}
    # Embeddings of an earlier version get one, and a folder that is closed to others.
    (private / "identity.json").unlink()
    private.chmod(0o755)
    embed.main(["--private", *arguments])
    assert private.stat().st_mode & 0o777 == 0o700
    assert json.loads((private / "identity.json").read_text()) == identity


def with_column(path, values):
    rows = [{"instruction": text, "person": value} for text, value in zip(TEXTS, values)]
    path.write_text(json.dumps(rows))


PERSONS = [f"person {n % 40}" for n in range(len(TEXTS))]


def test_units_stay_with_private_embeddings(arguments, tmp_path):
    with_column(tmp_path / "texts.json", PERSONS)
    embed.main(["--private", "--unit_column=person", *arguments])
    opened = open_embeddings(tmp_path / "out", private=True)
    assert opened.units.dtype == np.int64
    np.testing.assert_array_equal(opened.units, np.arange(len(TEXTS)) % 40)
    assert opened.num_examples == 40
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["private"]
    assert not any(b"person 1" in path.read_bytes() for path in (tmp_path / "out").rglob("*.*"))
    before = opened.vectors.tobytes()
    # Forgotten, or of other persons: not the same embeddings.
    for flags, persons, fact in (
        ([], PERSONS, "unit_column"),
        (["--unit_column=person"], [f"{n % 30}" for n in range(len(TEXTS))], "units_sha256"),
    ):
        with_column(tmp_path / "texts.json", persons)
        with pytest.raises(UsageError, match=f"with another {fact}"):
            embed.main(["--private", *flags, *arguments])
    assert open_embeddings(tmp_path / "out", private=True).vectors.tobytes() == before


def test_rows_without_an_owner_or_with_several_need_a_word(arguments, tmp_path):
    values = [None, ["a", "b"], ["b"], *([["c"]] * (len(TEXTS) - 3))]
    with_column(tmp_path / "texts.json", values)
    private = ["--private", "--unit_column=person", *arguments]
    with pytest.raises(UsageError, match="row 1 has no owner"):
        embed.main(private)
    with pytest.raises(UsageError, match="row 2 has a list of 2 owners"):
        embed.main([*private, "--unowned_rows_are_units"])
    embed.main([*private, "--unowned_rows_are_units", "--owner=last"])
    units = open_embeddings(tmp_path / "out", private=True).units
    assert units.tolist() == [0, 1, 1] + [2] * (len(TEXTS) - 3)


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        (PERSONS, ["--synthetic", "--unit_column=person"], "needs --private: a synthetic text"),
        (PERSONS, ["--private", "--owner=first"], "--owner needs --unit_column"),
        (PERSONS, ["--private", "--unowned_rows_are_units"], "--unowned_rows_are_units needs"),
        (PERSONS, ["--private", "--unit_column=user"], "entry 1 has no column 'user'"),
        (["secret"] * 149 + [7], ["--private", "--unit_column=person"], "values of several types"),
        ([7] * 149 + [2**70], ["--private", "--unit_column=person"], "values of several types"),
    ],
)
def test_units_that_cannot_be_are_refused_before_anything_is_written(
    arguments, tmp_path, values, flags, message
):
    with_column(tmp_path / "texts.json", values)
    with pytest.raises(UsageError, match=message) as refused:
        embed.main([*flags, *arguments])
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_texts_of_similar_length_share_a_batch(arguments, monkeypatch):
    seen = []
    model = embed.load_model(arguments[0].removeprefix("--model="))
    encode = model.encode

    def watched(texts, **options):
        seen.append([len(text) for text in texts])
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode", watched)
    monkeypatch.setattr(embed, "load_model", lambda name: model)
    embed.main(["--synthetic", *arguments])
    lengths = [length for batch in seen for length in batch]
    assert len(seen) == 19
    assert lengths == sorted(map(len, TEXTS), reverse=True)


def test_a_killed_run_goes_on_where_it_was(arguments, expected, tmp_path):
    script = """
import os, signal, sys
from resample_with_dp_histogram import embed
unit_vectors, calls = embed.unit_vectors, []
def dying(*given):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit_vectors(*given)
embed.unit_vectors, embed.SAVE_SECONDS = dying, 0
embed.main(["--private", *sys.argv[1:]])
"""
    command = [sys.executable, "-c", script, *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    manifest = tmp_path / "out" / "private" / "manifest.json"
    assert json.loads(manifest.read_text())["num_embedded"] == 24
    with pytest.raises(UsageError, match="24 of 150 embeddings; the same embed command goes on"):
        open_embeddings(tmp_path / "out", private=True)
    # Another batch size, since what is done is counted in texts.
    embedded = []
    unit_vectors = embed.unit_vectors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            embed, "unit_vectors", lambda *given: embedded.append(given[1]) or unit_vectors(*given)
        )
        embed.main(["--private", *arguments, "--batch_size=3"])
    assert sum(map(len, embedded)) == 126
    vectors = open_embeddings(tmp_path / "out", private=True).vectors
    np.testing.assert_allclose(vectors, expected, atol=1e-3)


@pytest.mark.slow
def test_two_devices_give_what_one_gives(arguments, expected, tmp_path):
    command = ["-m", "resample_with_dp_histogram.embed", "--synthetic", *arguments]
    done = run_process(*command, "--batch_size=4", "--devices", "cpu", "cpu")
    assert done.returncode == 0, done.stderr
    vectors = open_embeddings(tmp_path / "out", private=False).vectors
    np.testing.assert_allclose(vectors, expected, atol=1e-3)


def test_other_texts_or_another_model_do_not_mix(arguments, tmp_path):
    embed.main(["--synthetic", *arguments])
    before = (tmp_path / "out" / "embeddings.npy").read_bytes()
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS[::-1]))
    with pytest.raises(UsageError, match="with another texts_sha256; use another --output"):
        embed.main(["--synthetic", *arguments])
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    other = save_tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="with another model_fingerprint; use another --output"):
        embed.main(["--synthetic", *arguments, f"--model={other}"])
    assert (tmp_path / "out" / "embeddings.npy").read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_text_without_a_direction_is_named(value):
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[1] = value
    with pytest.raises(UsageError, match=r"out, row 12 \(from 0\) is not a unit vector: NaN"):
        embed.unit_vectors(vectors, np.array([11, 12, 13]), "out")


def test_values_beyond_float16_are_no_matter():
    unit = embed.unit_vectors(np.array([[3e30, 4e30], [3e-30, 4e-30]]), np.arange(2), "out")
    np.testing.assert_allclose(unit, [[0.6, 0.8]] * 2, atol=1e-3)


def test_a_model_that_gives_nan_is_refused_and_what_is_done_stays(arguments, tmp_path, capsys):
    model = embed.load_model(arguments[0].removeprefix("--model="))
    encode, calls = model.encode, []

    def failing(texts, **options):
        calls.append(1)
        vectors = encode(texts, **options)
        return vectors * np.nan if len(calls) == 3 else vectors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "encode", failing)
        patch.setattr(embed, "load_model", lambda name: model)
        patch.setattr(embed, "SAVE_SECONDS", 0)
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: embed.main(["--private", *arguments]))
    assert ended.value.code == 2
    assert "is not a unit vector: NaN" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UsageError, match="16 of 150 embeddings"):
        open_embeddings(tmp_path / "out", private=True)


def test_foreign_folders_and_missing_models_are_explained(arguments, tmp_path):
    with pytest.raises(UsageError, match="is not a sentence-transformers folder"):
        embed.main(["--synthetic", *arguments, f"--model={tmp_path / 'nowhere'}"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("x")
    with pytest.raises(UsageError, match="holds something else than embeddings"):
        embed.main(["--synthetic", *arguments])
