"""The ledger: what was done with a private data set, one durable line a step."""

import hashlib
import json
import os
from pathlib import Path

from utils.cli import UsageError, say
from utils.files import JsonlAppender, read_jsonl, write_json
from utils.folders import locked, sibling_lock
from utils.privacy.plan import PrivacyPlan

LEDGER_FILE, HISTOGRAM_LEDGER_FILE = "privacy_ledger.jsonl", "histogram_ledger.jsonl"
HISTOGRAM, ADAPTER = "gaussian_histogram", "adapter"
# What kinds of line may follow one of a kind; "" is before the first line.
FOLLOWERS = {
    "": ("plan", HISTOGRAM),
    # A run without a step has an adapter all the same, as it began.
    "plan": ("step", ADAPTER),
    "step": ("step", ADAPTER),
    ADAPTER: (),
    HISTOGRAM: (HISTOGRAM,),
}


# One for all lines: making it takes longer than it takes to write a line.
_encoder = json.JSONEncoder(sort_keys=True)


def _next_chain(previous: str, content: dict) -> str:
    text = previous + _encoder.encode(content)
    return hashlib.sha256(text.encode()).hexdigest()


def _append(file: JsonlAppender, previous: str, content: dict) -> str:
    """Append a line that continues the chain; returns its chain value."""
    chain = _next_chain(previous, content)
    file.append([{**content, "chain": chain}])
    return chain


def _head(records: list[dict]) -> dict:
    """Number of lines and last chain value."""
    return {"lines": len(records), "chain": records[-1]["chain"] if records else ""}


def read_ledger(path: str | os.PathLike) -> list[dict]:
    """Read a ledger and check its chain; the file is left as it is.

    Returns:
        A plan, the steps of its run and the adapter that a finished one ends with, or histograms
        (see `record_histogram`); a torn last line is passed over.

    Raises:
        UsageError: the file was edited.
    """
    records: list[dict] = []
    chain = kind = ""
    for number, record in enumerate(read_jsonl(path), start=1):
        chain = _next_chain(chain, {k: value for k, value in record.items() if k != "chain"})
        if record.get("chain") != chain or record.get("kind") not in FOLLOWERS[kind]:
            raise UsageError(
                f"{path}, line {number}: this ledger was edited or mixed with another run's; "
                "what was spent is no longer known"
            )
        kind = record["kind"]
        records.append(record)
    return records


def steps_in(records: list[dict]) -> list[int]:
    """The steps among lines of a ledger, in their order; those that a crash lost are there too."""
    return [record["step"] for record in records if record["kind"] == "step"]


def adapter_in(records: list[dict]) -> str | None:
    """The hash of the adapter that a finished run's ledger ends with; older ones name none."""
    return records[-1].get("adapter_sha256") if records else None


def require_head(path: str | os.PathLike, records: list[dict], head: dict) -> None:
    """Raise a UsageError unless `records` of the ledger `path` continue the one that had `head`."""
    lines = head["lines"]
    if _head(records[:lines]) != {"lines": lines, "chain": head["chain"]}:
        raise UsageError(
            f"{path} was truncated, or is another run's: {lines} lines were recorded, "
            f"{len(records)} are there"
        )


class Ledger:
    """Append-only record of the logical steps taken: one fsynced line a step, hash-chained.

    The first line holds the plan, and the last one of a finished run its adapter. Every line
    carries the SHA-256 of the line before it and its own content, so a line that was changed,
    moved, dropped from the middle or taken from another run breaks the chain. What is cut off the
    end shows against the count and chain value that checkpoints and reports keep (`head`,
    `require_head`).

    Raises:
        UsageError: the file was edited, or belongs to another plan.
    """

    def __init__(self, path: str | os.PathLike, plan: PrivacyPlan):
        self.path = Path(path)
        self._records = read_ledger(self.path) if self.path.exists() else []
        self._file = JsonlAppender(self.path)
        if self._records:
            plan.require_same(read_plan(self.path), str(self.path.parent))
        else:
            # The random run id makes the chains of two runs of one plan differ.
            self._append({"kind": "plan", "run": os.urandom(16).hex(), "plan": plan.as_json()})

    def _append(self, content: dict) -> None:
        previous = self._records[-1]["chain"] if self._records else ""
        self._records.append({**content, "chain": _append(self._file, previous, content)})

    def record_step(self, step: int) -> None:
        """Record that logical step `step` (from 1) is taken; call it before its noise is used.

        Raises:
            UsageError: the run is finished.
        """
        if self.adapter:
            raise UsageError(
                f"{self.path} ends with an adapter, so step {step} cannot follow; restore the "
                "run's adapter/ and its last checkpoint, or use another --job_sess"
            )
        self._append({"kind": "step", "step": step})

    def record_adapter(self, sha256: str) -> None:
        """Record what the run came to; again for the same adapter changes nothing.

        Raises:
            UsageError: another adapter is on record.
        """
        if self.adapter not in (None, sha256):
            raise UsageError(
                f"{self.path} ends with the adapter {self.adapter}, not {sha256}; restore the "
                "run's own adapter/, or use another --job_sess"
            )
        if self.adapter is None:
            self._append({"kind": ADAPTER, "adapter_sha256": sha256})

    @property
    def adapter(self) -> str | None:
        """The hash of the adapter on record; None as long as the run is not finished."""
        return adapter_in(self._records)

    @property
    def steps(self) -> list[int]:
        """See `steps_in`."""
        return steps_in(self._records)

    @property
    def steps_recorded(self) -> int:
        return len(self.steps)

    @property
    def head(self) -> dict:
        """Number of lines and last chain value, for checkpoints and reports to keep."""
        return _head(self._records)

    def require_unchanged(self) -> None:
        """Raise a UsageError unless the file holds what this process recorded, and nothing more."""
        if read_ledger(self.path) != self._records:
            raise UsageError(
                f"{self.path} was changed while the run was going on, so what it spent is no "
                "longer known"
            )

    def require_head(self, head: dict) -> None:
        """Raise a UsageError unless this ledger continues the one that had `head`."""
        require_head(self.path, self._records, head)

    def close(self) -> None:
        self._file.close()


def head_file(path: str | os.PathLike) -> Path:
    """Where `record_histogram` keeps the head of a ledger: next to it."""
    path = Path(path).resolve()
    return path.with_name(f"{path.name}.head.json")


def _kept_head(path: str | os.PathLike) -> dict | None:
    file = head_file(path)
    try:
        head = json.loads(file.read_text())
        return {"lines": int(head["lines"]), "chain": str(head["chain"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UsageError(f"{file} is no head of a ledger; restore it from a backup") from None


def counted(num_examples: int, unit_column: str | None, owner: str | None = None) -> str:
    """N in words, with what is counted."""
    if unit_column is None:
        return f"{num_examples:,} examples"
    return f"{num_examples:,} units of {unit_column!r}" + (f" ({owner} owner)" if owner else "")


def read_histograms(
    path: str | os.PathLike,
    num_examples: int | None = None,
    unit_column: str | None = None,
    owner: str | None = None,
) -> list[dict]:
    """The lines of a ledger of histograms, checked against its head; none if there is none.

    The head may be one line behind, where a kill fell between the two writes of
    `record_histogram`. A ledger of an earlier version has none, which is said; the next histogram
    makes one.

    Args:
        num_examples: N of the dataset that it must be of; of any if None.
        unit_column, owner: what N counts, see `record_histogram`. One ledger has one: a histogram
            of rows says nothing for a unit, so their sum has no epsilon for it.

    Raises:
        UsageError: the file was edited or cut, lies without its head, is not a ledger of
            histograms, or is another dataset's.
    """
    while True:
        head = _kept_head(path)
        records = read_ledger(path) if Path(path).is_file() else []
        if _kept_head(path) == head:  # no writer came between
            break
    if records and records[0]["kind"] != HISTOGRAM:
        raise UsageError(
            f"{path} is the ledger of a training run and no ledger of histograms; use another file"
        )
    if head is not None:
        require_head(path, records, head)
        if len(records) > head["lines"] + 1:
            raise UsageError(
                f"{path} has {len(records)} lines and {head_file(path).name} knows of "
                f"{head['lines']}; restore both from one backup"
            )
    elif any("unit_column" in record for record in records):
        raise UsageError(
            f"{path} lies without its head, so that a cut would not be noticed; put "
            f"{head_file(path).name} next to it"
        )
    elif records:
        say(
            f"warning: {path} has no head, since an earlier version wrote it: lines cut off its "
            "end would not be noticed; the next histogram makes one"
        )
    for record in records:
        theirs = (record["num_examples"], record.get("unit_column"), record.get("owner"))
        if num_examples is not None and theirs != (num_examples, unit_column, owner):
            raise UsageError(
                f"{path} is of a private dataset of {counted(*theirs)}, not of "
                f"{counted(num_examples, unit_column, owner)}; each dataset has a ledger of its "
                "own for each unit"
            )
    return records


def record_histogram(
    path: str | os.PathLike,
    *,
    num_examples: int,
    noise_multiplier: float,
    num_bins: int,
    unit_column: str | None = None,
    owner: str | None = None,
    insecure: bool = False,
) -> dict:
    """Append a Gaussian histogram to a ledger of its own; call it before its noise is used.

    Its sensitivity is 1: adding or removing one example moves one bin by 1, or one unit all bins
    together by 1 in l2 norm.

    Args:
        path: a file of histograms of one private dataset; made where there is none.
        num_examples: N of the private dataset, public; of units where there is a `unit_column`.
        noise_multiplier: deviation of the noise of every bin.
        unit_column: the column that says whose a row is; None where the unit is a row.
        owner: which of several owners of a row counts; None where a row has one.
        insecure: noise came from a known seed.

    Returns:
        The ledger's head with this line, to keep with what is released of the histogram.

    Raises:
        UsageError: see `read_histograms`.
    """
    path = Path(path)
    # Two that read the same last line would both continue it, and break the chain.
    with locked(path, "use another --ledger", sibling_lock(path), wait=True):
        records = read_histograms(path, num_examples, unit_column, owner)
        content = {
            "kind": HISTOGRAM,
            "run": os.urandom(16).hex(),
            "num_examples": num_examples,
            # A line with this entry, None or not, is never without a head, which is there first.
            "unit_column": unit_column,
            "owner": owner,
            "noise_multiplier": noise_multiplier,
            "sensitivity": 1,
            "num_bins": num_bins,
            "insecure": insecure,
        }
        before = _head(records)
        # Again where a kill left it one line behind, or it would fall behind by two.
        write_json(head_file(path), before)
        with JsonlAppender(path) as file:
            chain = _append(file, before["chain"], content)
        head = {"lines": before["lines"] + 1, "chain": chain}
        write_json(head_file(path), head)
    return head


def read_plan(ledger_path: str | os.PathLike) -> PrivacyPlan:
    """The plan in a ledger's first line."""
    for record in read_jsonl(ledger_path):
        try:
            return PrivacyPlan(**record["plan"])
        except (KeyError, TypeError):
            break
    raise UsageError(f"{ledger_path} holds no privacy plan")
