"""The cap on rows of a unit: one noisy number, in the ledger before its noise is drawn."""

import json

import numpy as np
import pytest

from resample_with_dp_histogram import rows_per_unit
from resample_with_dp_histogram.histogram import noisy_histogram
from resample_with_dp_histogram.rows_per_unit import CAPS, bins_of_units, smallest_cap
from tests.json_lines import jsonl
from utils.cli import UsageError
from utils.privacy.ledger import read_histograms, read_ledger
from utils.secure_random import SecureRandom


def counts(units):
    return noisy_histogram(bins_of_units(units), len(CAPS), 0.0, SecureRandom())


@pytest.fixture
def flags(tmp_path):
    """1,000 persons with one row, 3,000 with four and 50 with 20."""
    sizes = [1] * 1000 + [4] * 3000 + [20] * 50
    rows = [
        {"instruction": "say it", "person": f"secret {person}"}
        for person, size in enumerate(sizes)
        for _ in range(size)
    ]
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    return [
        f"--dataset_name={tmp_path / 'rows.jsonl'}", "--unit_column=person",
        f"--ledger={tmp_path / 'ledger.jsonl'}",
    ]  # fmt: skip


def test_units_are_counted_by_their_number_of_rows():
    sizes = [1, 2, 3, 4, 5, 8, 512, 513, 1024, 1025, 4000]
    units = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    assert counts(units).tolist() == [1, 1, 2, 2, 0, 0, 0, 0, 0, 1, 4]


def test_a_unit_that_leaves_moves_one_count_by_1():
    units = np.random.default_rng(1).geometric(0.01, 5000)
    for unit in np.unique(units)[:40]:
        moved = counts(units) - counts(units[units != unit])
        assert sorted(moved) == [0] * 10 + [1]


@pytest.mark.parametrize(
    ("share", "cap"), [(0.2, 1), (0.25, 1), (0.251, 4), (0.9, 4), (0.99, 16), (1.0, 1024)]
)
def test_the_lowest_cap_that_keeps_the_share_is_taken(share, cap):
    histogram = np.zeros(11)
    histogram[[0, 2, 4, 10]] = [25, 65, 9, 1]
    assert smallest_cap(histogram, share) == cap
    assert smallest_cap(np.full(11, 0.1), 1.0) == 1024


def test_one_number_is_printed_and_the_histogram_is_on_record(flags, tmp_path, capsys):
    rows_per_unit.main(flags)
    out, err = capsys.readouterr()
    assert out == "4\n"
    assert "95% of the units keep all their rows with --max_rows_per_unit 4" in err
    assert "secret" not in err
    (event,) = read_histograms(tmp_path / "ledger.jsonl", 4050, "person")
    facts = {"num_bins": 11, "noise_multiplier": 10.0, "sensitivity": 1, "insecure": False}
    assert {name: event[name] for name in facts} == facts
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.jsonl", "ledger.jsonl", "ledger.jsonl.head.json",
    }  # fmt: skip


def test_the_histogram_is_on_record_before_its_noise_is_drawn(flags, tmp_path, monkeypatch):
    drawn = []

    def stopped(bins, num_bins, sigma, random):
        drawn.append((num_bins, sigma, random.insecure))
        raise KeyboardInterrupt

    monkeypatch.setattr(rows_per_unit, "noisy_histogram", stopped)
    with pytest.raises(KeyboardInterrupt):
        rows_per_unit.main(flags)
    assert drawn == [(11, 10.0, False)]
    assert len(read_ledger(tmp_path / "ledger.jsonl")) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--share=1.5", "--share 1.5 is more than 1"),
        ("--histogram_sigma=0", "--histogram_sigma 0 gives no guarantee"),
        ("--unit_column=user", "--unit_column user: the train split has no such column"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_spent(flags, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        rows_per_unit.main([*flags, more])
    assert not (tmp_path / "ledger.jsonl").exists()


def test_another_n_than_the_ledgers_is_refused(flags, tmp_path):
    rows_per_unit.main(flags)
    with pytest.raises(UsageError, match="of 4,050 units of 'person', not of 9 units"):
        rows_per_unit.main([*flags, "--num_train_units=9"])
    assert json.loads((tmp_path / "ledger.jsonl.head.json").read_text())["lines"] == 1
