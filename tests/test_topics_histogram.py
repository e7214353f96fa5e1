"""The DP histogram of topics: what one row or person can move, what it spends, what it releases."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.stats

from privacy_checks.composition import composed_report
from privacy_checks.registry import left_out, with_left_out
from resample_with_dp_histogram import histogram as mechanism
from tests.resampling import save_tiny_encoder
from tests.test_report import PLAN, make_run
from tests.topics import NO_NOISE, assigned, counted, counts_of, fitted, save_private, texts_of
from topics import histogram
from topics.folder import read_assignment
from utils.cli import UsageError
from utils.files import write_json
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian, compute_epsilon
from utils.privacy.ledger import read_ledger
from utils.texts.data_sets import rows_fingerprint

TEXTS = texts_of(30, seed=2)
LEDGER = "ledger/histogram_ledger.jsonl"


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    encoder = save_tiny_encoder(tmp_path_factory.mktemp("encoder"))
    return fitted(tmp_path_factory.mktemp("topics"), encoder)


@pytest.fixture
def data(topics, tmp_path):
    return assigned(topics, save_private(tmp_path / "mine", TEXTS), tmp_path / "assigned")


def vector(found: dict) -> np.ndarray:
    """Counts by topic."""
    counts = counts_of(found)
    return np.array([counts[topic] for topic in range(len(counts))])


# ------------------------------------------------------------------ the guarantee


def test_a_row_that_leaves_moves_one_count_by_1_and_nothing_else(topics, tmp_path):
    public = ["--num_train_examples=30", *NO_NOISE]
    found = []
    for name, gone in (("whole", None), ("first", 0), ("middle", 17), ("last", 29)):
        texts = [text for row, text in enumerate(TEXTS) if row != gone]
        data = assigned(topics, save_private(tmp_path / name, texts), tmp_path / f"{name}-topics")
        found.append(counted(data, tmp_path / f"{name}-histogram", *public))
        moved = vector(found[0]) - vector(found[-1])
        assert sorted(moved) == [0] * (len(moved) - 1) + [gone is not None]
        volatile = ("topics", "left_out", "ledger", "commands")
        assert {k: v for k, v in found[-1].items() if k not in volatile} == {
            k: v for k, v in found[0].items() if k not in volatile
        }
    assert vector(found[0]).sum() == 30


def test_a_person_who_leaves_moves_all_counts_together_by_at_most_1(topics, tmp_path):
    """Of 12 rows, of 3, of one: by their own weights exactly."""
    persons = ["a"] * 12 + ["b"] * 3 + [f"c{number}" for number in range(15)]
    more = ["--num_train_examples=17", *NO_NOISE]
    found = []
    for gone in ("nobody", "a", "b", "c3"):
        kept = [row for row, person in enumerate(persons) if person != gone]
        private = save_private(
            tmp_path / gone, [TEXTS[row] for row in kept], [persons[row] for row in kept]
        )
        data = assigned(topics, private, tmp_path / f"{gone}-topics", "--unit_column=person")
        found.append(vector(counted(data, tmp_path / f"{gone}-histogram", *more)))
        if gone == "nobody":
            whole = read_assignment(data).topics
            assert found[0].sum() == pytest.approx(17, abs=1e-6)
            continue
        own = np.bincount(
            [whole[row] for row in range(30) if persons[row] == gone], minlength=len(found[0])
        )
        moved = found[0] - found[-1]
        np.testing.assert_allclose(moved, own / own.sum(), atol=1e-8)
        assert 0 < np.linalg.norm(moved) <= moved.sum() <= 1
    (event,) = read_ledger(tmp_path / "nobody-topics" / LEDGER)
    assert (event["num_examples"], event["unit_column"]) == (17, "person")


def test_all_that_is_released_follows_from_the_noisy_counts_and_the_topics(topics, tmp_path):
    released = np.array([40.5, -3.25, 21.0, 20.0, 19.9, 30.0])
    found = []
    for seed in (2, 3):
        private = save_private(tmp_path / "mine", texts_of(30, seed))
        data = assigned(topics, private, tmp_path / "assigned")
        with mock.patch.object(mechanism, "noisy_histogram", return_value=released):
            found.append(counted(data, tmp_path / "out"))
        for name in ("mine", "assigned", "out"):
            (tmp_path / name).rename(tmp_path / f"{name}-{seed}")
    # The chain of a ledger is random.
    assert found[0].pop("ledger") != found[1].pop("ledger")
    assert found[0] == found[1]
    assert [each["topic"] for each in found[0]["topics"]] == [0, 5, 2, 3]
    assert [each["topic"] for each in found[0]["left_out"]] == [4, 1]


def test_only_what_may_be_released_is_outside_private(data, tmp_path):
    found = counted(data, tmp_path / "out", "--num_train_examples=500")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        histogram.HISTOGRAM_FILE, "private",
    }  # fmt: skip
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o700
    text = (tmp_path / "out" / histogram.HISTOGRAM_FILE).read_text()
    assert rows_fingerprint(TEXTS) not in text
    assert not any(row in text for row in TEXTS)
    # N is public, the number of rows is not.
    assert found["num_examples"] == 500
    assert " 30," not in text


def test_the_noise_is_fresh_and_of_the_deviation_asked_for(data, tmp_path):
    whole = vector(counted(data, tmp_path / "exact", *NO_NOISE))
    noise = [
        vector(counted(data, tmp_path / f"{number}", "--histogram_sigma=3")) - whole
        for number in range(8)
    ]
    # On a grid of 1/128 some are equal in more than half of all runs, 8 of 48 in one of a million.
    assert len({float(value) for each in noise for value in each}) > 8 * len(whole) - 8
    # Their squares over 9 are a chi-square: in these bounds but for a chance of 1e-6.
    low, high = scipy.stats.chi2(8 * len(whole)).ppf([5e-7, 1 - 5e-7])
    assert low < np.sum(np.square(noise)) / 9 < high


def test_a_known_noise_is_for_tests_and_takes_the_guarantee(data, tmp_path, capsys):
    found = counted(data, tmp_path / "out", *NO_NOISE)
    assert found["guarantee"] is False
    assert found["covered"] == []
    assert "NO GUARANTEE" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--histogram_sigma 0 gives no guarantee"):
        counted(data, tmp_path / "other", "--histogram_sigma=0")


# ------------------------------------------------------------------ what it spends


def test_a_kill_after_the_record_is_paid_for_and_the_same_command_goes_on(data, tmp_path):
    with (
        mock.patch.object(mechanism, "noisy_histogram", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        counted(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(read_ledger(data / LEDGER)) == 1
    found = counted(data, tmp_path / "out")
    assert len(read_ledger(data / LEDGER)) == found["ledger"]["lines"] == 2


@pytest.mark.usefixtures("short_curves")
def test_it_composes_with_training_and_nobody_can_forget_it(topics, tmp_path, monkeypatch):
    """A run on the rows, a run on the rows with topics, and the histogram know each other."""
    monkeypatch.chdir(tmp_path)
    save_private(Path("data/mine"), TEXTS)
    data = assigned(topics, Path("mine"), Path("data/mine_topics"))
    ledger = data / LEDGER
    counted(data, Path("resampling/topic_histogram"))
    known = {"rows_fingerprint": rows_fingerprint(TEXTS)}
    plan = replace(PLAN, num_examples=30, expected_batch_size=3, target_epsilon=20.0)
    run = make_run(Path("outputs/conditioned"), plan=plan)
    write_json(run / "private" / "identity.json", known)
    training, count = SampledGaussian(3 / 30, 1.0, 20), SampledGaussian(1.0, 10.0, 1)
    composed = composed_report(run, [ledger])
    assert (
        composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon([training, count], 1e-5).upper
    )
    assert left_out([run], [ledger]) == ([], [])
    assert left_out([run], []) == ([], [ledger])
    # One that a kill left without an output is found in the data set's own folder.
    (Path("resampling/topic_histogram") / histogram.HISTOGRAM_FILE).unlink()
    assert left_out([run], []) == ([], [ledger])
    # And of one with a ledger elsewhere, its output says where.
    counted(data, Path("resampling/second"), "--ledger=kept.jsonl")
    assert left_out([run], [ledger]) == ([], [Path("kept.jsonl")])
    # A data set that is removed takes its ledger away, but not what was released by it.
    report = Path("resampling/second") / histogram.HISTOGRAM_FILE
    Path("kept.jsonl").unlink()
    assert left_out([run], [ledger]) == ([], [report])
    composed = with_left_out(composed_report(run, [ledger]), [run], [ledger], [ADD_REMOVE])
    assert composed["epsilon_with_left_out"] is None
    assert f"{report} is in no ledger that is here; restore it" in composed["not_covered"][-1]


def test_a_histogram_of_another_size_than_the_runs_does_not_compose(data, tmp_path):
    counted(data, tmp_path / "out")
    with pytest.raises(UsageError, match="of a private dataset of 30 examples"):
        composed_report(make_run(tmp_path / "run"), [data / LEDGER])


# ------------------------------------------------------------------ post-processing


def test_topics_below_the_noise_are_left_out_and_it_is_said(data, tmp_path, capsys):
    with mock.patch.object(
        mechanism, "noisy_histogram", return_value=np.array([40, 9, 30, 10, 3, -8.0])
    ):
        found = counted(data, tmp_path / "out", "--histogram_sigma=5")
    assert found["least_count"] == 10
    assert [(each["topic"], each["count"]) for each in found["topics"]] == [
        (0, 40), (2, 30), (3, 10),
    ]  # fmt: skip
    assert [each["topic"] for each in found["left_out"]] == [1, 4, 5]
    said = capsys.readouterr().err
    keywords = {each["topic"]: each["keywords"] for each in found["topics"] + found["left_out"]}
    assert (
        f"3 of 6 topics left out, since their noisy count is below 10: {keywords[1]} (9.0); "
        in said
    )


def test_a_histogram_without_a_topic_above_the_noise_is_written_all_the_same(
    data, tmp_path, capsys
):
    with mock.patch.object(mechanism, "noisy_histogram", return_value=np.full(6, -1.0)):
        found = counted(data, tmp_path / "out")
    assert found["topics"] == []
    assert "no topic is above the noise" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.jsonl", "private/topics.npz"])
def test_a_data_set_that_was_changed_is_refused_before_anything_is_spent(data, tmp_path, name):
    with open(data / name, "ab") as file:
        file.write(b"\n")
    with pytest.raises(UsageError, match="is not what .* says that topics.assign wrote"):
        counted(data, tmp_path / "out")
    assert not (data / LEDGER).exists()


def test_a_folder_that_is_no_data_set_of_assign_is_refused(tmp_path):
    with pytest.raises(UsageError, match="make it with python -m topics.assign"):
        counted(tmp_path, tmp_path / "out")
