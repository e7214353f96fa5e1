"""Values computed from private data: recorded under private/, and sent only where that is asked."""

import os
from pathlib import Path

from accelerate import Accelerator

from utils.cli import UsageError, in_one_line
from utils.files import JsonlAppender
from utils.folders import private_folder

# Trackers that write to this machine alone; the others have a server, or take one from their
# environment.
LOCAL_TRACKERS = ("none", "tensorboard")


def start_tracker(accelerator: Accelerator, tracker: str, job: str, folder: Path) -> None:
    """Start a tracker on the main process; what it keeps is under the run's private/.

    It gets what it is given: no lines of the console, which show losses, and no figures of the
    machine.

    Raises:
        UsageError: the tracker refuses to start.
    """
    if tracker == "none" or not accelerator.is_main_process:
        return
    private = private_folder(folder / "private")
    os.environ.setdefault("TRACKIO_DIR", str(private / "trackio"))
    quiet = {"console": "off", "x_disable_stats": True, "x_disable_meta": True}
    options = {"wandb": {"dir": str(private), "name": job, "settings": quiet}}
    try:
        accelerator.init_trackers(job, init_kwargs=options)
    except Exception as error:
        if not type(error).__module__.startswith(tracker):
            raise
        reason = in_one_line(error, 160)
        raise UsageError(f"--report_to {tracker}: {reason}") from None


class PrivateMetrics:
    """One line a record in `private/metrics.jsonl`; also to a tracker, if it may see them.

    Args:
        folder: the run's.
        tracked: whether the tracker gets the values: only one that stays on this machine, one that
            the user allows, or in a run that is not private anyway.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, tracked: bool):
        self._file = JsonlAppender(private_folder(folder / "private") / "metrics.jsonl")
        self._accelerator = accelerator
        self._tracked = tracked

    def record(self, step: int, values: dict) -> None:
        self._file.append([{"step": step, **values}])
        if self._tracked:
            self._accelerator.log(values, step=step)

    def close(self) -> None:
        self._file.close()
