"""Whose a row is: units from every form of data, and what names none."""

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from utils.cli import UsageError
from utils.texts.units import read_units, rows_to_keep


def table(owners) -> pyarrow.Table:
    return pyarrow.table({"instruction": ["a"] * len(owners), "who": owners})


def test_units_are_numbered_as_they_appear_in_every_form(tmp_path):
    owners = ["b", "a", "b", "c", "a"]
    rows = table(owners)
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    lines = [f'{{"instruction": "a", "who": "{owner}"}}\n' for owner in owners]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    saved = datasets.Dataset(rows)
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "saved")
    names = [str(tmp_path / name) for name in ("rows.parquet", "rows.jsonl", "saved")]
    for data in (rows, saved, *names):
        units = read_units(data, "who")
        assert units.dtype == np.int64
        assert units.tolist() == [0, 1, 0, 2, 1]


def test_numbers_are_owners_too():
    assert read_units(table([7, 5, 7]), "who").tolist() == [0, 1, 0]
    # Numbers with gaps are often stored as fractions.
    with_gap = table([7.0, float("nan"), 7.0])
    assert read_units(with_gap, "who", unowned_rows_are_units=True).tolist() == [0, 1, 0]


def test_rows_of_nobody_are_refused_or_units_of_their_own():
    rows = table(["a", None, None, "a"])
    with pytest.raises(UsageError, match="row 2 has no owner.*--unowned_rows_are_units"):
        read_units(rows, "who")
    assert read_units(rows, "who", unowned_rows_are_units=True).tolist() == [0, 1, 2, 0]


def test_rows_of_several_are_refused_or_one_owner_counts():
    rows = table([["a", "b"], ["b"], ["b", "c"]])
    with pytest.raises(UsageError, match="row 1 has a list of 2 owners.*--owner first or --owner"):
        read_units(rows, "who")
    assert read_units(rows, "who", owner="first").tolist() == [0, 1, 1]
    assert read_units(rows, "who", owner="last").tolist() == [0, 0, 1]
    with pytest.raises(UsageError, match="row 1 has no owner"):
        read_units(table([[], ["b"]]), "who", owner="first")


@pytest.mark.parametrize("value", ["1.5", "true", '{"id": 1}'])
def test_what_names_nobody_is_refused(tmp_path, value):
    (tmp_path / "rows.jsonl").write_text(f'{{"who": 1}}\n{{"who": {value}}}\n')
    with pytest.raises(UsageError, match="row 2 is of type .*, neither a text nor a whole number"):
        read_units(str(tmp_path / "rows.jsonl"), "who")


def test_one_owner_in_two_types_does_not_pass_for_two(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"who": 7}\n{"who": "7"}\n')
    with pytest.raises(UsageError, match="row 2 is of type str and rows before it of type int"):
        read_units(str(tmp_path / "rows.jsonl"), "who")


def test_a_missing_column_and_a_missing_data_set_are_named(tmp_path):
    pyarrow.parquet.write_table(table(["a"]), tmp_path / "rows.parquet")
    for data in (table(["a"]), str(tmp_path / "rows.parquet")):
        with pytest.raises(UsageError, match="--unit_column author.*only instruction, who"):
            read_units(data, "author")
    with pytest.raises(UsageError, match="no data set 'nowhere'"):
        read_units("nowhere", "who")


def test_the_first_rows_of_a_unit_stay():
    units = np.array([0, 1, 0, 0, 2, 1, 1])
    assert rows_to_keep(units, 1).tolist() == [0, 1, 4]
    assert rows_to_keep(units, 2).tolist() == [0, 1, 2, 4, 5]
    assert rows_to_keep(units, 9).tolist() == list(range(7))
