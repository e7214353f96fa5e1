"""The quick start, as a newcomer runs it: from a fresh clone, on the real model."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from privacy_checks.composition import composed_report
from tests.paths import ROOT
from utils.files import read_jsonl
from utils.privacy.accounting import ADD_REMOVE


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
        assert 6 < report["epsilon"]["upper"] <= 8
        records = read_jsonl(run / "private" / "metrics.jsonl")
        losses = [record["validation_loss"] for record in records if "validation_loss" in record]
        assert losses[-1] < losses[0] - 0.05
    for job, count in {"quickstart_instructions": 96, "quickstart_answers": 16}.items():
        samples = list(read_jsonl(clone / "inference_outputs" / job / "shard-0.jsonl"))
        assert sorted(sample["id"] for sample in samples) == list(range(count))
    selected = list(read_jsonl(clone / "resampling/quickstart/selected/selected.jsonl"))
    assert len({row["row"] for row in selected}) == 12
    composed = re.search(r"is \((\S+), 1e-05\)-differentially private", done.stdout)
    runs = [clone / "outputs" / job for job in ("quickstart_instructions", "quickstart_answers")]
    ledger = clone / "resampling/quickstart/private_data/histogram_ledger.jsonl"
    alone = [composed_report(run)["epsilon"][ADD_REMOVE]["upper"] for run in runs]
    with_histogram = composed_report(runs[0], [ledger])["epsilon"][ADD_REMOVE]["upper"]
    assert alone[0] < with_histogram <= 8
    assert max(alone) < float(composed[1]) < sum(alone) + 0.1
    assert 7.5 < float(composed[1]) <= 8
    assert "ABOVE TARGET" not in done.stdout + done.stderr
    for verdict in ("noise drowns", "too few logical steps"):
        assert verdict not in done.stderr
    assert done.stdout.count("\n  [") == 10 + 3
    *_, public, internal, stated = done.stdout.splitlines()
    statement = Path(stated.split(":", 1)[1].strip()).read_text()
    assert "Statement of privacy" in statement
    audit = json.loads((clone / "reports/quickstart/audit/audit_run.json").read_text())
    assert 0 <= audit["best"] <= audit["claimed_epsilon"] == alone[0]
    assert "a run without noise would show" in statement
    for line, has_private_figures in ((public, False), (internal, True)):
        page = Path(line.split(":", 1)[1].strip()).read_text()
        assert f"({composed[1]}, 1e-05)-differentially private" in page
        assert ("MAUVE" in page) == has_private_figures

    again = subprocess.run(["./quickstart.sh"], cwd=clone, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
