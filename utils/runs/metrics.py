"""Values computed from private data: recorded under private/, and sent only where that is asked."""

import os
from pathlib import Path

from accelerate import Accelerator

from utils.cli import UsageError, in_one_line, say
from utils.files import JsonlAppender, json_lines, read_jsonl, write_atomic
from utils.folders import private_folder

METRICS_FILE = "metrics.jsonl"
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

    A continued run takes steps again that its last checkpoint does not know of: what the file says
    of them goes. A disk that takes no more lines ends the record, and not the run.

    Args:
        folder: the run's.
        first_step: the steps that its checkpoint has taken, else 0; a run from there begins anew.
        tracked: whether the tracker gets the values: only one that stays on this machine, one that
            the user allows, or in a run that is not private anyway.
    """

    def __init__(self, folder: Path, first_step: int, accelerator: Accelerator, *, tracked: bool):
        path = private_folder(folder / "private") / METRICS_FILE
        if path.exists():
            records = list(read_jsonl(path))
            kept = [each for each in records if first_step and each["step"] <= first_step]
            if len(kept) < len(records):
                write_atomic(path, json_lines(kept))
        self._file = JsonlAppender(path)
        self._is_full = False
        self._accelerator = accelerator
        self._tracked = tracked

    def record(self, step: int, values: dict) -> None:
        try:
            self._file.append([{"step": step, **values}])
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                say(f"warning: no metrics from step {step} on: {error}; training goes on")
            self._is_full = True
        if self._tracked:
            self._accelerator.log(values, step=step)

    def close(self) -> None:
        self._file.close()
