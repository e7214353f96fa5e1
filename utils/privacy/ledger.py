"""The ledger: what was done with a private data set, one durable line a step."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from utils.cli import UsageError
from utils.files import JsonlAppender, read_jsonl
from utils.folders import locked, sibling_lock
from utils.privacy.plan import PrivacyPlan

LEDGER_FILE = "privacy_ledger.jsonl"


HISTOGRAM = "gaussian_histogram"


# What kind of line may follow the first one of a ledger.
FOLLOWERS = {"plan": "step", HISTOGRAM: HISTOGRAM}


def _next_chain(previous: str, content: dict) -> str:
    text = previous + json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _append(file: JsonlAppender, previous: str, content: dict) -> str:
    """Append a line that continues the chain; returns its chain value."""
    chain = _next_chain(previous, content)
    file.append([{**content, "chain": chain}])
    return chain


def read_ledger(path: str | os.PathLike) -> list[dict]:
    """Read a ledger and check its chain; the file is left as it is.

    Returns:
        A plan and the steps of its run, or histograms (see `record_histogram`); a torn last line
        is passed over.

    Raises:
        UsageError: the file was edited.
    """
    records: list[dict] = []
    chain = ""
    for number, record in enumerate(read_jsonl(path), start=1):
        chain = _next_chain(chain, {k: value for k, value in record.items() if k != "chain"})
        kinds = ("plan", HISTOGRAM) if number == 1 else (FOLLOWERS[records[0]["kind"]],)
        if record.get("chain") != chain or record.get("kind") not in kinds:
            raise UsageError(
                f"{path}, line {number}: this ledger was edited or mixed with another run's; "
                "what was spent is no longer known"
            )
        records.append(record)
    return records


def require_head(path: str | os.PathLike, records: list[dict], head: dict) -> None:
    """Raise a UsageError unless `records` of the ledger `path` continue the one that had `head`."""
    lines = head["lines"]
    if len(records) < lines or records[lines - 1]["chain"] != head["chain"]:
        raise UsageError(
            f"{path} was truncated, or is another run's: {lines} lines were recorded, "
            f"{len(records)} are there"
        )


class Ledger:
    """Append-only record of the logical steps taken: one fsynced line a step, hash-chained.

    The first line holds the plan. Every line carries the SHA-256 of the line before it and its
    own content, so a line that was changed, moved, dropped from the middle or taken from another
    run breaks the chain. What is cut off the end shows against the count and chain value that
    checkpoints and reports keep (`head`, `require_head`).

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
            self._append({"kind": "plan", "run": os.urandom(16).hex(), "plan": asdict(plan)})

    def _append(self, content: dict) -> None:
        previous = self._records[-1]["chain"] if self._records else ""
        self._records.append({**content, "chain": _append(self._file, previous, content)})

    def record_step(self, step: int) -> None:
        """Record that logical step `step` (from 1) is taken; call it before its noise is used."""
        self._append({"kind": "step", "step": step})

    @property
    def steps_recorded(self) -> int:
        return len(self._records) - 1

    @property
    def head(self) -> dict:
        """Number of lines and last chain value, for checkpoints and reports to keep."""
        return {"lines": len(self._records), "chain": self._records[-1]["chain"]}

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


def read_histograms(path: str | os.PathLike, num_examples: int) -> list[dict]:
    """The lines of a ledger of histograms of a dataset of `num_examples`; none if there is none.

    Raises:
        UsageError: the file was edited, is not a ledger of histograms, or is another dataset's.
    """
    records = read_ledger(path) if Path(path).exists() else []
    if records and records[0]["kind"] != HISTOGRAM:
        raise UsageError(f"{path} is the ledger of a training run; use another file")
    if records and records[0]["num_examples"] != num_examples:
        raise UsageError(
            f"{path} is of a private dataset of {records[0]['num_examples']:,} examples, not of "
            f"{num_examples:,}; each dataset has a ledger of its own"
        )
    return records


def record_histogram(
    path: str | os.PathLike,
    *,
    num_examples: int,
    noise_multiplier: float,
    num_bins: int,
    insecure: bool = False,
) -> None:
    """Append a Gaussian histogram to a ledger of its own; call it before its noise is used.

    Its sensitivity is 1: adding or removing one example moves one bin by 1.

    Args:
        path: a file of histograms of one private dataset; made where there is none.
        num_examples: N of the private dataset, public.
        noise_multiplier: deviation of the noise of every bin.
        insecure: noise came from a known seed.

    Raises:
        UsageError: see `read_histograms`.
    """
    content = {
        "kind": HISTOGRAM,
        "run": os.urandom(16).hex(),
        "num_examples": num_examples,
        "noise_multiplier": noise_multiplier,
        "sensitivity": 1,
        "num_bins": num_bins,
        "insecure": insecure,
    }
    path = Path(path)
    # Two that read the same last line would both continue it, and break the chain.
    with locked(path, "use another --ledger", sibling_lock(path), wait=True):
        records = read_histograms(path, num_examples)
        with JsonlAppender(path) as file:
            _append(file, records[-1]["chain"] if records else "", content)


def read_plan(ledger_path: str | os.PathLike) -> PrivacyPlan:
    """The plan in a ledger's first line."""
    for record in read_jsonl(ledger_path):
        try:
            return PrivacyPlan(**record["plan"])
        except (KeyError, TypeError):
            break
    raise UsageError(f"{ledger_path} holds no privacy plan")
