"""How a launched script learns that it must stop."""

import os
import signal


def launched_by_accelerate() -> bool:
    """Whether this process was started by `accelerate launch`."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


class StopRequest:
    """Turns SIGTERM, Ctrl-C and the death of the launcher into a request to save and end.

    A second Ctrl-C raises KeyboardInterrupt: what was saved until then stands.
    """

    def __init__(self):
        self.signal_name = ""
        self._launcher = os.getppid() if launched_by_accelerate() else None
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, _frame) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        if self._launcher not in (None, os.getppid()):
            self.signal_name = self.signal_name or "end of accelerate launch"
        return bool(self.signal_name)
