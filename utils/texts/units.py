"""Whose a row is: the units of privacy, read from a column of the data. No torch.

A unit is whatever the column tells apart: a person, a conversation, an organisation. What is added
or removed in the guarantee is then all rows of one value.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from utils.cli import UsageError
from utils.texts.data_sets import find_dataset, train_files
from utils.texts.rows import MissingColumn, listed, names_of, names_of_table, raw_rows

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

# Which of several owners of a row counts.
OWNERS = ("first", "last")
# Names of columns that are likely to say whose a row is, in small letters, without - and _.
OWNER_COLUMNS = {
    "user", "userid", "username", "uid", "person", "personid", "author", "authorid", "account",
    "accountid", "customer", "customerid", "client", "clientid", "member", "memberid", "owner",
    "ownerid", "employeeid", "patientid", "hashedip",
}  # fmt: skip


def read_units(
    data: "str | Dataset | pyarrow.Table",
    column: str,
    *,
    owner: str | None = None,
    unowned_rows_are_units: bool = False,
) -> np.ndarray:
    """The unit of every row of a train split.

    Args:
        data: the name of a data set that is here (of its files, the column alone is read where
            their form allows it), or rows in memory.
        column: holds texts or whole numbers, of one kind throughout; equal ones are one unit.
        owner: `first` or `last`: which one counts where the column holds lists; None refuses them.
        unowned_rows_are_units: a row without an owner is a unit of its own; else it is refused.

    Returns:
        int64 [rows], units numbered from 0 in the order in which they appear.

    Raises:
        UsageError: no such data set or column, or a value that names no unit; names the row.
    """
    numbers: dict[object, int] = {}
    units, kind = [], None
    for row, value in enumerate(_owners(data, column), start=1):
        unit: object = owner_of(value, owner, f"--unit_column {column}: row {row}")
        if unit is None:
            if not unowned_rows_are_units:
                raise UsageError(
                    f"--unit_column {column}: row {row} has no owner; leave such rows out of the "
                    "data, or give --unowned_rows_are_units to take each as a unit of its own"
                )
            unit = (row,)
        elif kind not in (None, type(unit)):
            raise UsageError(
                f"--unit_column {column}: row {row} is of type {type(unit).__name__} and rows "
                f"before it of type {kind.__name__}, so one owner may pass for two; use one type"
            )
        else:
            kind = type(unit)
        units.append(numbers.setdefault(unit, len(numbers)))
    return np.array(units, dtype=np.int64)


def require_column(column: str | None, owner: str | None, unowned_rows_are_units: bool) -> None:
    """Refuse flags of a unit that have nothing to say.

    Raises:
        UsageError: one is set, and there is no column.
    """
    flags = {"owner": owner, "unowned_rows_are_units": unowned_rows_are_units}
    for name, value in flags.items():
        if value and column is None:
            raise UsageError(f"--{name} needs --unit_column: without it every row is a unit")


def owner_of(value: object, owner: str | None, place: str) -> str | int | None:
    """Whom a value of a column of units names; None for nobody.

    Args:
        value, owner: see `read_units`.
        place: of the value, for an error message.

    Raises:
        UsageError: it is a list and `owner` is None, or no value that names a unit.
    """
    if isinstance(value, list) and value:
        if owner is None:
            raise UsageError(
                f"{place} has a list of {len(value)} owners; say which of them counts with "
                "--owner first or --owner last"
            )
        value = value[0 if owner == "first" else -1]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables of numbers with gaps
    if value is None or value in ([], "") or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(
            f"{place} is of type {type(value).__name__}, neither a text nor a whole number"
        )
    return value


def is_owner_column(name: str) -> bool:
    """Whether a column of this name is likely to say whose a row is."""
    return name.lower().replace("_", "").replace("-", "") in OWNER_COLUMNS


def rows_to_keep(units: np.ndarray, max_rows_per_unit: int) -> np.ndarray:
    """The first rows of every unit, as many as it may have at most.

    A unit's own rows alone decide which of them stay.

    Args:
        units: int64 [rows], of `read_units`.

    Returns:
        int64 indices of rows, ascending.
    """
    order = np.argsort(units, kind="stable")
    sorted_units = units[order]
    firsts = np.searchsorted(sorted_units, sorted_units, side="left")
    return np.sort(order[np.arange(len(units)) - firsts < max_rows_per_unit])


def largest_units(dataset_name: str) -> dict[str, int]:
    """How many rows the largest unit has, for every column that is likely to say whose a row is.

    Returns:
        Nothing for a data set that is not here. The numbers are computed from private data without
        noise: for `private/` alone.
    """
    if find_dataset(dataset_name) is None:
        return {}
    found = {}
    for name in names_of(train_files(dataset_name)[0]):
        if is_owner_column(name):
            try:
                units = read_units(dataset_name, name, owner="first", unowned_rows_are_units=True)
            except UsageError:
                continue  # holds something else
            found[name] = int(np.bincount(units).max())
    return found


def _owners(data: "str | Dataset | pyarrow.Table", column: str) -> Iterator[object]:
    """Yield what the column holds."""
    if not isinstance(data, str):
        if column not in data.column_names:
            raise _lacks(column, data.column_names)
        values: Iterable[object] = data[column]
        for value in values:
            yield value.as_py() if hasattr(value, "as_py") else value
        return
    for file in train_files(data):
        for row in raw_rows(file, [column]):
            if not isinstance(row, dict) or column not in row:
                names = names_of_table(file) or (list(row) if isinstance(row, dict) else [])
                raise _lacks(column, names)
            yield row[column]


def _lacks(column: str, names: list[str]) -> MissingColumn:
    return MissingColumn(
        f"--unit_column {column}: the train split has no such column, only {listed(names)}",
        column,
        names,
    )
