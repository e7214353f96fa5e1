"""How far a command is: a bar on a terminal; elsewhere, as in a log, a line now and then."""

import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from tqdm import tqdm

from utils.cli import say

LINE_SECONDS = 30.0


class Progress(tqdm):
    """Goes over items, or counts by `update(n)`, and shows how far it is on stderr.

    On a terminal it is tqdm's bar. Elsewhere it is a line every `LINE_SECONDS` at most, with the
    time (UTC), and one at the end, however that comes.

    Args:
        items: to go over; None where `update` counts.
        what: is being done.
        unit: of what is counted, in the singular.
        total: how many there are; `len(items)` where that is known.
        initial: how many were done before.
        hidden: nothing is shown, as on all processes of a job but one.
        leave: whether the bar stays when it is full.
    """

    def __init__(
        self,
        items: Iterable | None = None,
        what: str = "",
        *,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        hidden: bool = False,
        leave: bool = True,
    ):
        self._in_lines = not sys.stderr.isatty()
        self._shown_at = time.monotonic()
        # With miniters a change of speed could keep a line back for long.
        pace = {"mininterval": LINE_SECONDS, "miniters": 1} if self._in_lines else {}
        super().__init__(
            items,
            what,
            total,
            leave,
            sys.stderr,
            unit=unit,
            initial=initial,
            disable=hidden,
            **pace,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Redraw the bar, or say a line where it is time for one."""
        if not self._in_lines:
            return super().display(msg, pos)
        if time.monotonic() - self._shown_at >= LINE_SECONDS:
            self._say()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Make room for a text of others; lines need none."""
        if not self._in_lines:
            super().clear(nolock)

    def close(self) -> None:
        """End, with a last line, but where nothing was done: then an error says why."""
        if self._in_lines and not getattr(self, "disable", True):
            if self.n > self.initial:
                self._say()
            self.leave = False  # nor a blank one
        super().close()

    def _say(self) -> None:
        self._shown_at = time.monotonic()
        seconds = self.format_dict["elapsed"]
        rate = (self.n - self.initial) / max(seconds, 1e-9)
        pace = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        of = "" if self.total is None else f"/{self.total:,}"
        facts = [f"{self.n:,}{of}", f"{pace} {self.unit}/s"]
        if self.total is not None and self.n < self.total and rate:
            facts.append(f"{self.format_interval((self.total - self.n) / rate)} left")
        else:
            facts.append(f"{self.format_interval(seconds)} in all")
        facts += [self.postfix] if self.postfix else []
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        say(f"{now} {self.desc}: {', '.join(facts)}")
