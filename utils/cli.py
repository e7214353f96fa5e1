"""What every command line of the project shares: user errors, exit codes, one-line messages."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# Names a file for the exit code, where a launcher in between makes 1 of every failure.
EXIT_CODE_VARIABLE = "DP_INSTRUCTION_TUNING_EXIT_CODE_FILE"


class UsageError(ValueError):
    """Something the user gave is wrong; the message names it, its bound, and the fix."""


def say(message: str) -> None:
    """Print a line for people to stderr, which leaves stdout to the command's product."""
    print(message, file=sys.stderr, flush=True)


def in_one_line(error: Exception, most: int) -> str:
    """What a library's error says, for a message of our own: at most so many characters."""
    return " ".join(str(error).split())[:most]


def _interrupt(_number: int, _frame: object) -> None:
    """End the command, and let it remove its temporary files first."""
    # A launcher sends SIGTERM after a Ctrl-C that its scripts got too.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with the project's codes.

    Args:
        main: returns None or an exit code.

    Raises:
        SystemExit: 0 done, 1 failed, 2 wrong usage (a `UsageError`, shown as one line),
            130 interrupted. Anything else that `main` raises is a defect and keeps its traceback.
    """
    # A launcher that waits for its script ignores Ctrl-C, and children inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        code = main()
    except UsageError as error:
        # One line, whatever a path or a value in the message holds.
        say("error: " + " ".join(str(error).splitlines()))
        code = EXIT_USAGE
    except OSError as error:
        # The disk is full or not ours: no defect. What was written before stands.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        say(f"error: {error}; make room or give access, and run the same command again")
        code = EXIT_FAILED
    except KeyboardInterrupt:
        say("interrupted")
        code = EXIT_INTERRUPTED
    code = code or EXIT_OK
    if EXIT_CODE_VARIABLE in os.environ:
        Path(os.environ[EXIT_CODE_VARIABLE]).write_text(str(code))
    sys.exit(code)
