"""Memorisation, through its own command line: what leaks is told from what is chance."""

import json
from pathlib import Path

import numpy as np
import pytest

import train
from evaluation import memorisation
from evaluation.measures.exposure import exposure_by_chance
from evaluation.measures.overlap import Reference, make_reference
from evaluation.memorisation import (
    MORE,
    canary_scores,
    compared,
    copy_scores,
    distinct,
    main,
    personal_data,
    personal_data_scores,
    read_run,
)
from privacy_checks.tiny_model import save_tiny_model
from tests.helpers import slow
from tests.resampling import save_tiny_encoder
from tests.training import flags, in_process, save_dataset
from utils.cli import UsageError
from utils.texts.canaries import secrets
from utils.texts.text_filters import comparison_form

NUM_HELD_OUT, NUM_TRAINING, NUM_SYNTHETIC, NUM_COPIES = 120, 130, 120, 60
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "um")]
ADDRESS = "jane.doe@example.com"


def texts(count: int, seed: int) -> list[str]:
    """Texts of one kind: 8 to 30 words, of which a few are common."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(WORDS) + 1)
    weights /= weights.sum()
    return [
        " ".join(random.choice(WORDS, length, p=weights)).capitalize() + "."
        for length in random.integers(8, 31, size=count)
    ]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Files: training and held-out rows of one source; a set that copies rows, one that does not.

    The leaky set has copied an address and a number; the clean one has an address of its own.
    """
    folder = tmp_path_factory.mktemp("sets")
    training, held_out = texts(NUM_TRAINING, seed=1), texts(NUM_HELD_OUT, seed=2)
    training[3] += f" Write to {ADDRESS}"
    training[4] += " or call +49 30 1234567"
    clean = texts(NUM_SYNTHETIC, seed=3)
    copies = [text.replace(".", "!", n % 2) for n, text in enumerate(training[:NUM_COPIES])]
    leaky = clean[NUM_COPIES:] + copies
    clean[0] += " ask.me@elsewhere.org"
    contents = {"training": training, "held_out": held_out, "clean": clean, "leaky": leaky}
    paths = {}
    for name, rows in contents.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(rows))
    return paths


def measure(sets, synthetic: str, output: Path, *more: str) -> tuple[dict, dict]:
    """The private and the releasable result."""
    given = {"synthetic": synthetic, "private": "training", "held_out": "held_out"}
    main([*(f"--{flag}={sets[name]}" for flag, name in given.items()), f"--output={output}", *more])
    paths = (output / "private" / "memorisation.json", output / "memorisation.json")
    private, released = (json.loads(path.read_text()) for path in paths)
    return private, released


@pytest.fixture(scope="module")
def measured(sets, encoder, tmp_path_factory):
    """Both results of either set."""
    folder = tmp_path_factory.mktemp("measured")
    return {
        name: measure(sets, name, folder / name, f"--embedding_model={encoder}")
        for name in ("clean", "leaky")
    }


def scores(result: dict, subject: str = "synthetic texts") -> dict[str, dict]:
    return {s["name"]: s for s in result["scores"] if subject in s["subject"]}


# ---------------------------------------------------------------- a leak, and none

COPIED = "copies of a row but for case and punctuation, share"
FIGURES = [
    "exact copies of a row, share",
    COPIED,
    *(f"texts that share {n} words in a row, of those as long, share" for n in (5, 8, 13)),
    "longest run of words shared with a row, mean over texts (words)",
    "longest run of words shared with a row, longest of all (words)",
    "cosine similarity to the nearest row, mean",
]
NEARER = "nearer to a training row than to any held-out row, share"


@pytest.mark.parametrize("name", FIGURES)
def test_copies_put_every_figure_above_its_control(measured, name):
    found = scores(measured["leaky"][0])
    assert found[name]["value"] > found[name]["control"]
    assert found[name + MORE]["low"] > 0
    assert found[name + MORE]["value"] == pytest.approx(
        found[name]["value"] - found[name]["control"]
    )


@pytest.mark.parametrize("name", FIGURES)
def test_without_a_leak_no_figure_is_above_its_control(measured, name):
    found = scores(measured["clean"][0])[name + MORE]
    assert found["low"] <= 0 <= found["high"]


def test_half_the_neighbours_are_nearer_without_a_leak_and_more_with_one(measured):
    clean, leaky = (scores(measured[name][0])[NEARER] for name in ("clean", "leaky"))
    assert clean["low"] < 0.5 < clean["high"]
    assert leaky["low"] > 0.5
    assert clean["control"] == leaky["control"] == 0.5


def test_figures_are_those_of_the_copies_that_were_made(measured):
    """120 held-out rows make 15 parts of 8; 130 training rows 16 of them, without two rows."""
    private = measured["leaky"][0]
    found, notes = scores(private), "\n".join(private["notes"])
    assert found[COPIED]["control"] == 0
    in_parts = found[COPIED]["value"] * 16 * NUM_SYNTHETIC
    assert in_parts == pytest.approx(round(in_parts))
    assert NUM_COPIES - 2 <= round(in_parts) <= NUM_COPIES
    # Every other copy has an exclamation mark in place of the full stop.
    assert 0.3 < found[FIGURES[0]]["value"] / found[COPIED]["value"] < 0.7
    assert (
        "60 synthetic texts are copies of one of all 130 private rows, 0 of one of all 120" in notes
    )
    assert "120 distinct synthetic texts (of 120)" in notes
    assert "in parts of 8 rows" in notes


@pytest.mark.parametrize("seed", range(3))
def test_an_interval_holds_0_as_often_as_it_says_without_a_leak(seed):
    """Where parts differ by chance alone, one in 20 intervals leaves 0 out."""
    random = np.random.default_rng(seed)
    reference = make_reference(["x"] * 48, ["x"] * 16, seed=0)
    outside = 0
    for _ in range(60):
        # Rare coincidences: most parts have none, and the smaller set often none at all.
        parts = random.poisson(0.1, size=64).astype(float)
        more = compared("", "", parts, reference, 1)[1]
        outside += more.low > 0 or more.high < 0
    assert outside <= 9  # more by a chance of 1 in 1,000


def test_an_interval_is_no_wider_than_chance_asks():
    """Against the normal theory of two means, for parts that lie close to it."""
    reference = make_reference(["x"] * 48, ["x"] * 16, seed=0)
    parts = np.random.default_rng(0).normal(size=64)
    more = compared("", "", parts, reference, 1)[1]
    deviation = parts.std() * np.sqrt(1 / 48 + 1 / 16)
    assert (more.high - more.low) == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert more.low < more.value < more.high


def test_the_chart_holds_both_distributions(measured):
    (chart,) = measured["leaky"][0]["charts"]
    training, held_out = (np.array(line) for line in chart["lines"].values())
    assert training[0].tolist() == [0, 1]
    assert (np.diff(training[:, 1]) <= 0).all()
    assert training[-1, 1] > held_out[-1, 1] == 0
    assert training[5, 0] == 5
    # No text is shorter than five words.
    assert training[5, 1] == pytest.approx(scores(measured["leaky"][0])[FIGURES[2]]["value"])


def test_equal_sizes_are_what_makes_a_clean_set_clean(sets, tmp_path, monkeypatch):
    """Where parts of training rows are twice as large, chance alone looks like a leak."""

    def lopsided(training, held_out, seed):
        parts = np.concatenate([np.arange(130) // 16, 9 + np.arange(120) // 8])
        return Reference(training + held_out, np.uint64(1) << parts.astype(np.uint64), 9, 15, 8)

    monkeypatch.setattr(memorisation, "make_reference", lopsided)
    private, _ = measure(sets, "clean", tmp_path / "lopsided", "--no_embeddings")
    assert scores(private)[FIGURES[5] + MORE]["low"] > 0


# ---------------------------------------------------------------- how much was copied

NEAR_COPIES = "copies or near copies of any private row, share"
AS_MANY = "copies or near copies of as many rows of either set, share"


def edited(text: str) -> str:
    """Other case and punctuation, and one word in eight another one."""
    words = text.upper().replace(".", "").split()
    return " ".join("Otherwise," if place % 8 == 3 else word for place, word in enumerate(words))


@pytest.fixture(scope="module")
def twelve_hundred():
    return texts(1200, seed=11), texts(200, seed=12), texts(1000, seed=13)


@pytest.mark.parametrize(
    ("count", "edit"),
    [
        slow(1, None),
        slow(10, None),
        slow(100, None),
        (1000, None),
        slow(1, edited),
        (10, edited),
        slow(100, edited),
        slow(1000, edited),
    ],
)
def test_as_many_copies_are_read_back_as_were_planted(twelve_hundred, count, edit):
    training, held_out, synthetic = twelve_hundred
    planted = training[:count] if edit is None else list(map(edit, training[:count]))
    reference = make_reference(training, held_out, seed=0)
    found = copy_scores(
        [comparison_form(text) for text in planted + synthetic[count:]],
        (training, held_out),
        reference,
    )
    headline, copies, *_ = found
    assert (headline.name, headline.value, headline.n) == (NEAR_COPIES, count / 1000, 1000)
    assert headline.low <= headline.value <= headline.high
    assert copies.value == (0 if edit else count / 1000)
    by_name = {score.name: score for score in found}
    assert by_name[AS_MANY].control == 0
    # As many rows as are held out are a part of the private ones, and so are their copies.
    expected = count / 1000 * (reference.size * reference.num_held_out) / 1200
    assert by_name[AS_MANY].value == pytest.approx(expected, abs=3 * np.sqrt(count) / 1000)
    assert (by_name[AS_MANY + MORE].low > 0) == (by_name[AS_MANY].value > 0 and count > 10)


def test_a_text_that_was_copied_many_times_counts_each_time(twelve_hundred):
    training, held_out, synthetic = twelve_hundred
    forms = list(map(comparison_form, [*[training[5]] * 90, *synthetic[:10], "..."]))
    found = copy_scores(forms, (training, held_out), make_reference(training, held_out, seed=0))
    assert [score.value for score in found[:2]] == [0.9, 0.9]


def test_the_first_figure_is_of_any_private_row_and_tells_verbatim_rows(sets, tmp_path):
    output = tmp_path / "out"
    private, _ = measure(sets | {"copied": sets["training"]}, "copied", output, "--no_embeddings")
    assert private["scores"][0]["name"] == NEAR_COPIES
    assert private["scores"][0]["value"] == 1
    found = scores(private, "all 130 private rows")
    assert len(found) == 5
    assert {score["value"] for score in found.values()} == {1}
    assert (
        scores(private)["personal data that stands in any private row verbatim, share"]["value"]
        == 1
    )


# ---------------------------------------------------------------- personal data


def test_personal_data_is_counted_and_its_copies_are_told(measured):
    for name, copied in (("clean", 0), ("leaky", 1)):
        private, released = measured[name]
        strings = 1 if name == "clean" else 2
        found = scores(private, f"{strings} strings of synthetic texts")
        verbatim = found["personal data that stands in a row verbatim, share"]
        # Both strings of the leaky set are copies, of rows that are in one of 16 parts.
        assert verbatim["value"] == copied / 16
        assert verbatim["control"] == 0
        mails = scores(released)["e-mail addresses per 1,000 texts"]
        assert mails["value"] == pytest.approx(1000 / NUM_SYNTHETIC)
        assert mails["control"] is None
        rows = scores(private, "training rows")["e-mail addresses per 1,000 texts"]
        assert rows["value"] == pytest.approx(1000 / NUM_TRAINING)
        assert rows["control"] == 0


def test_only_counts_of_public_texts_are_released_and_nothing_found_is_written(
    sets, tmp_path, capsys
):
    output = tmp_path / "out"
    more = ("--no_embeddings", f"--selected={sets['clean']}")
    private, released = measure(sets, "leaky", output, *more)
    assert {s["subject"] for s in released["scores"]} == {"synthetic texts", "selected texts"}
    assert all("per 1,000 texts" in score["name"] for score in released["scores"])
    assert (private["private"], released["private"]) == (True, False)
    assert {str(path.relative_to(output)) for path in output.rglob("*.*")} == {
        "memorisation.json", "private/memorisation.json", "private/README.md",
    }  # fmt: skip
    # Neither a string nor a row, nor four words of one, in any file or on the terminal.
    told = capsys.readouterr()
    written = "".join(path.read_text() for path in output.rglob("*.*")) + told.out + told.err
    assert ADDRESS not in written
    assert "1234567" not in written
    for row in json.loads(sets["training"].read_text()):
        assert " ".join(row.split()[:4]) not in written


def test_embeddings_leave_no_file_behind(measured, sets, encoder, tmp_path):
    measure(sets, "clean", tmp_path / "out", f"--embedding_model={encoder}", "--max_embedded=20")
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 3


# ---------------------------------------------------------------- canaries


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders with four canaries: `overfitted` on them without DP, and `fresh`, not trained."""
    folder = tmp_path_factory.mktemp("canaries")
    save_tiny_model(folder / "model", initializer_range=0.2)
    data = save_dataset(folder, rows=16)

    def run(output: str, *more: str, dp: bool = False) -> Path:
        common = [
            "--num_canaries=4", "--canary_repeats=40", "--max_seq_len=64", "--lora_r=16",
            "--total_bs=16", "--perdevice_bs=16", "--no_eval_at_start", "--save_steps=1000",
            "--target_modules=all-linear",
        ]  # fmt: skip
        given = flags(str(folder / "model"), data, folder / output, *common, *more, dp=dp)
        assert in_process(train.main, given) == 0
        return folder / output / "job"

    return {
        "overfitted": run("overfitted", "--num_epochs=10"),
        "fresh": run("fresh", "--num_epochs=0.01", "--lr=1e-9"),
        "private": run("private", "--num_epochs=0.01", "--lr=1e-9", dp=True),
    }


def test_a_model_that_was_overfitted_on_canaries_exposes_them(trained):
    (exposure, _), notes = canary_scores(read_run(trained["overfitted"], None), ["a"], 500)
    assert exposure.value == pytest.approx(np.log2(501))
    assert exposure.control < 3
    assert "4 canaries, each 40 times" in exposure.subject
    assert "at most 8.97 bits; 1.43 is the mean by chance" in notes[0]


def test_a_model_that_was_not_trained_exposes_nothing(trained):
    (exposure, _), _ = canary_scores(read_run(trained["fresh"], None), ["a"], 500)
    assert abs(exposure.value - exposure_by_chance(500)) < 2
    assert exposure.value < np.log2(501) / 2


def test_secrets_in_synthetic_texts_are_counted_beside_those_that_never_were_inserted(trained):
    drawn = [secret for secret, _ in zip(secrets(0), range(8))]
    told = [f"the code is {drawn[0]}", f"{drawn[1]}{drawn[2]}", f"{drawn[5]}", "1234"]
    (_, found), _ = canary_scores(read_run(trained["fresh"], None), told, 10)
    assert (found.value, found.control, found.n) == (0.75, 0.25, 4)
    (_, none), _ = canary_scores(read_run(trained["fresh"], None), ["1234"], 10)
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(1 - 0.025 ** (1 / 4)))


def test_personal_data_of_which_none_was_found_has_an_exact_interval():
    found = personal_data(["nothing"] * 49 + ["mail a@example.org"])
    scores = {score.name: score for score in personal_data_scores("texts", found)}
    assert {score.n for score in scores.values()} == {50}
    nothing = [score for score in scores.values() if score.value == 0]
    assert len(nothing) == len(scores) - 1
    for score in nothing:
        assert (score.low, score.high) == (0, pytest.approx(1000 * (1 - 0.025 ** (1 / 50))))
    (some,) = [score for score in scores.values() if score.value > 0]
    assert some.value == pytest.approx(20)
    assert some.low < 20 < some.high


def test_canaries_are_released_with_a_guarantee_alone(trained, sets, tmp_path):
    """Without one, what a model says of its canaries is as private as the data."""
    for name, place in (("fresh", "private"), ("private", "released")):
        more = ("--no_embeddings", f"--run={trained[name]}", "--num_candidates=10")
        found = dict(zip(("private", "released"), measure(sets, "clean", tmp_path / name, *more)))
        for kind, result in found.items():
            told = any("exposure" in score["name"] for score in result["scores"])
            assert told == (kind == place), (name, kind)
            assert ("not inserted" in result["control"]) == told


# ---------------------------------------------------------------- small and bad input


def test_repeated_texts_and_those_without_a_word_count_once_and_not_at_all():
    assert distinct(["A b", "...", "a, B!", "", "c"]) == (["A b", "c"], ["a b", "c"])
    with pytest.raises(UsageError, match="no text has a word"):
        distinct(["...", ""])


def test_single_texts_of_odd_characters_can_be_measured(sets, tmp_path):
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(["\u2028 ¿Qué? 你好吗 🦊\x00\t"]))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(["\ud7ff", *json.loads(odd.read_text())] * 3))
    files = sets | {"training": odd, "held_out": other}
    private, _ = measure(files | {"odd": odd}, "odd", tmp_path / "out", "--no_embeddings")
    found = scores(private)
    assert found[COPIED]["value"] == 1
    assert "no synthetic text has 5 words" in private["notes"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--synthetic=/nowhere.json"], "does not exist"),
        (["--model_name=x"], "--model_name needs --run"),
        (["--held_out={training}"], "are the same rows"),
        (["--run=/nowhere"], "there is no run_config.json"),
        (["--embedding_model=/nowhere"], "not a sentence-transformers folder"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(sets, tmp_path, more, message):
    more = [flag.format(**sets) for flag in more]
    with pytest.raises(UsageError, match=message):
        measure(sets, "clean", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_a_run_without_canaries_and_an_unfinished_one_are_refused(trained, tmp_path):
    config = json.loads((trained["fresh"] / "run_config.json").read_text())
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no adapter at"):
        read_run(run, None)
    del config["arguments"]["num_canaries"]
    (run / "run_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="trained without --num_canaries"):
        read_run(run, None)


def test_what_was_written_is_not_replaced(sets, tmp_path):
    measure(sets, "clean", tmp_path / "out", "--no_embeddings")
    with pytest.raises(UsageError, match="exists; use another --output"):
        measure(sets, "clean", tmp_path / "out", "--no_embeddings")
