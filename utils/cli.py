"""What every command line of the project shares: user errors, exit codes, one-line messages."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from utils.printable import printable

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# Names a file for the exit code, where a launcher in between makes 1 of every failure.
EXIT_CODE_VARIABLE = "DP_INSTRUCTION_TUNING_EXIT_CODE_FILE"
# What asks a command to stop: Ctrl-C, kill, and a terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A disk that is full, not ours, or has no place of that name or size: no defect.
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.EIO, errno.ESTALE,
)  # fmt: skip
_READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)


class UsageError(ValueError):
    """Something the user gave is wrong; the message names it, its bound, and the fix."""


def say(message: str) -> None:
    """Print a line for people to stderr, which leaves stdout to the command's product."""
    print(printable(message), file=sys.stderr, flush=True)


def in_one_line(error: Exception, most: int) -> str:
    """What a library's error says, for a message of our own: at most so many characters."""
    return " ".join(printable(str(error)).split())[:most]


def disk_error(error: Exception) -> OSError | None:
    """What an error says of the disk, also one of a library in Rust: "... (os error 28)".

    Returns:
        None where it says nothing of it.
    """
    if isinstance(error, OSError):
        return error if error.errno in _DISK else None
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else 0
    return OSError(number, os.strerror(number)) if number in _DISK else None


def handle_stops(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Have `handler` called for `STOP_SIGNALS`; of SIGHUP not where `nohup` has it ignored."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def stop_handlers_restored() -> Iterator[None]:
    """Give back, at the end of the block, the handlers that were there before it."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: object) -> None:
    """End the command, and let it remove its temporary files first."""
    # A launcher sends SIGTERM after a Ctrl-C that its scripts got too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def end_on_stops() -> None:
    """Until `run_cli`, end at once and in one line on what asks to stop.

    For imports that take seconds: an exception in the middle of one may come out as another.
    """

    def end(_number: int, _frame: object) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        say("interrupted")
        _leave_code(EXIT_INTERRUPTED)
        os._exit(EXIT_INTERRUPTED)

    handle_stops(end)


def _leave_code(code: int) -> None:
    """Tell the generator that waits behind a launcher."""
    if EXIT_CODE_VARIABLE in os.environ:
        Path(os.environ[EXIT_CODE_VARIABLE]).write_text(str(code))


class _Lasting(io.TextIOWrapper):
    """A standard stream that outlives its reader: what nobody can read any more goes nowhere.

    Errors are met here and not below, in a class of the raw stream: an interrupt there would come
    between a write and its being noted, and the text would be written twice.

    Args:
        stream: a pipe's (such as to `head`), or a terminal's; its descriptor stays open.
        product: whether it carries what a command makes, of which a full disk must not keep a part.
    """

    def __init__(self, stream: TextIO, product: bool):
        super().__init__(
            io.BufferedWriter(io.FileIO(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=getattr(stream, "line_buffering", False),
            write_through=getattr(stream, "write_through", False),
        )
        self._product = product

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self._product and error.errno not in _READER_GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _lasting(stream: TextIO | None, *, product: bool) -> TextIO:
    """A standard stream whose reader may go."""
    if stream is None:  # closed before the command began
        return open(os.devnull, "w")
    try:
        lasting = _Lasting(stream, product)
    except (OSError, ValueError):  # no file, as in a test
        return stream
    stream.flush()
    return lasting


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with the project's codes.

    Args:
        main: returns None or an exit code.

    Raises:
        SystemExit: 0 done, 1 failed, 2 wrong usage (a `UsageError`, shown as one line),
            130 interrupted. Anything else that `main` raises is a defect and keeps its traceback.
    """
    # A launcher that waits for its script ignores Ctrl-C, and children inherit that.
    handle_stops(_interrupt)
    with (
        redirect_stdout(_lasting(sys.stdout, product=True)),
        redirect_stderr(_lasting(sys.stderr, product=False)),
    ):
        code = _outcome(main)
    _leave_code(code)
    sys.exit(code)


def _outcome(main: Callable[[], int | None]) -> int:
    """Run `main`, say in one line what went wrong, and return the exit code."""
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except UsageError as error:
        # One line, whatever a path or a value in the message holds.
        say("error: " + " ".join(str(error).splitlines()))
        code = EXIT_USAGE
    except KeyboardInterrupt:
        say("interrupted")
        code = EXIT_INTERRUPTED
    except Exception as error:
        disk = disk_error(error)
        if disk is None:
            raise
        # What was written before stands.
        say(
            f"error: {in_one_line(disk, 1000)}; make room, give access or name another place, and "
            "run the same command again"
        )
        code = EXIT_FAILED
    return code or EXIT_OK
