"""How a launched script learns that it must stop."""

import os
import signal
from types import FrameType

from utils.cli import handle_stops


def launched_by_accelerate() -> bool:
    """Whether this process was started by `accelerate launch`."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


class StopRequest:
    """Turns what asks to stop, and the death of the launcher, into a request to save and end.

    Whatever follows the first signal changes nothing: the work is saved all the same.
    """

    def __init__(self):
        self.signal_name = ""
        self._launcher = os.getppid() if launched_by_accelerate() else None
        handle_stops(self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    @property
    def requested(self) -> bool:
        if self._launcher not in (None, os.getppid()):
            self.signal_name = self.signal_name or "end of accelerate launch"
        return bool(self.signal_name)
