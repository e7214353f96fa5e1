"""The quick start, as a newcomer runs it: from a fresh clone, on the real model."""

import json
import re
import subprocess

import pytest

from tests.training import ROOT
from utils.files import read_jsonl


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_start_runs_from_a_fresh_clone(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    done = subprocess.run(["./quickstart.sh"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)

    for job in ("quickstart_instructions", "quickstart_answers"):
        run = clone / "outputs" / job
        report = json.loads((run / "privacy_report.json").read_text())
        assert report["guarantee"] is True
        assert 7.5 < report["epsilon"]["upper"] <= 8
        records = read_jsonl(run / "private" / "metrics.jsonl")
        losses = [record["validation_loss"] for record in records if "validation_loss" in record]
        assert losses[-1] < losses[0] - 0.05
    for job, count in {"quickstart_instructions": 96, "quickstart_answers": 16}.items():
        samples = list(read_jsonl(clone / "inference_outputs" / job / "shard-0.jsonl"))
        assert sorted(sample["id"] for sample in samples) == list(range(count))
    selected = list(read_jsonl(clone / "resampling/quickstart/selected/selected.jsonl"))
    assert len({row["id"] for row in selected}) == 12
    composed = re.search(r"with 1 histogram\(s\) is \((\S+), 1e-05\)-differentially", done.stdout)
    report = clone / "outputs/quickstart_instructions/privacy_report.json"
    alone = json.loads(report.read_text())["epsilon"]["upper"]
    assert alone < float(composed[1]) <= 8
    assert done.stdout.count("\n  [") == 10 + 3

    again = subprocess.run(["./quickstart.sh"], cwd=clone, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
