"""What a run records of private data, and what a continued run makes of it."""

import pytest

from tests.faults import on_small_disk
from tests.json_lines import jsonl
from utils.files import read_jsonl
from utils.runs.metrics import METRICS_FILE, PrivateMetrics


def recorded(folder):
    return [record["step"] for record in read_jsonl(folder / "private" / METRICS_FILE)]


@pytest.mark.parametrize(
    ("first_step", "kept"), [(2, [0, 1, 2, 2]), (4, [0, 1, 2, 2, 3, 4]), (0, []), (9, None)]
)
def test_a_continued_run_records_each_step_once(tmp_path, first_step, kept):
    earlier = [0, 1, 2, 2, 3, 4]  # the second of a step is its validation loss
    (tmp_path / "private").mkdir()
    file = tmp_path / "private" / METRICS_FILE
    file.write_text(jsonl([{"step": step} for step in earlier]) + '{"step": 5, "tr')
    metrics = PrivateMetrics(tmp_path, first_step, accelerator=None, tracked=False)
    metrics.record(first_step + 1, {"train_loss": 1.0})
    metrics.close()
    assert recorded(tmp_path) == [*(earlier if kept is None else kept), first_step + 1]


RECORDING = """
import os
from pathlib import Path
from utils.runs.metrics import PrivateMetrics
metrics = PrivateMetrics(Path("run"), 0, accelerator=None, tracked=False)
with open("ballast", "wb") as file:
    file.write(bytes((1 << 20) - 5 * 4096))
for step in range(100):
    if step == 90:
        os.remove("ballast")
    metrics.record(step, {"text": "x" * 300})
metrics.close()
print((Path("run") / "private" / "metrics.jsonl").read_text().count("\\n"))
"""


def test_a_full_disk_costs_records_and_one_warning(tmp_path):
    finished = on_small_disk(tmp_path, "1m", "-c", RECORDING)
    assert finished.returncode == 0, finished.stderr
    assert 10 < int(finished.stdout) < 90
    assert finished.stderr.startswith("warning: no metrics from step ")
    assert finished.stderr.count("\n") == 1
