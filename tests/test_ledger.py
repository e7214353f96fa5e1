"""Ledgers of histograms: what is cut off, killed, copied or written at once."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from privacy_checks.composition import composed_report
from tests.paths import ROOT
from utils.cli import UsageError
from utils.files import write_json
from utils.privacy.ledger import (
    HISTOGRAM,
    LEDGER_FILE,
    Ledger,
    head_file,
    read_histograms,
    read_ledger,
    record_histogram,
)
from utils.privacy.plan import PrivacyPlan

NUM_EXAMPLES = 9
PLAN = PrivacyPlan(
    num_examples=NUM_EXAMPLES, expected_batch_size=3, steps=2, clip_norm=1.0,
    clip_function="flat", loss_normalization="tokens", noise_multiplier=2.0, delta=1e-3,
    target_epsilon=8.0,
)  # fmt: skip


def record(path, **more):
    facts = {"num_examples": NUM_EXAMPLES, "noise_multiplier": 10.0, "num_bins": 4} | more
    return record_histogram(path, **facts)


@pytest.fixture
def ledger(tmp_path):
    """A ledger of three histograms."""
    path = tmp_path / "histograms.jsonl"
    for _ in range(3):
        record(path)
    return path


@pytest.fixture
def run(tmp_path):
    """The public part of a run's folder, of the same data set."""
    folder = tmp_path / "run"
    write_json(
        folder / "run_config.json",
        {"arguments": {"eps": 8.0, "insecure_fixed_noise_seed": None}},
    )
    steps = Ledger(folder / LEDGER_FILE, PLAN)
    for step in (1, 2):
        steps.record_step(step)
    steps.close()
    return folder


def cut(path, lines):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def require_refused(ledger, run, message):
    """All that read a ledger refuse it, and leave it as it is."""
    files = (ledger, head_file(ledger))
    before = [path.read_bytes() for path in files if path.exists()]
    for use in (
        lambda: read_histograms(ledger, NUM_EXAMPLES),
        lambda: record(ledger),
        lambda: composed_report(run, [ledger]),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            use()
        assert "\n" not in str(refused.value)
    assert [path.read_bytes() for path in files if path.exists()] == before


def test_a_head_lies_next_to_the_ledger_and_is_returned(ledger, run):
    records = read_histograms(ledger, NUM_EXAMPLES)
    head = {"lines": 3, "chain": records[-1]["chain"]}
    assert json.loads(head_file(ledger).read_text()) == head
    assert record(ledger) == json.loads(head_file(ledger).read_text())
    assert len(composed_report(run, [ledger])["mechanisms"]) == 1 + 4


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_cut_ledger_is_refused(ledger, run, lines):
    cut(ledger, lines)
    require_refused(ledger, run, f"was truncated, .*: 3 lines were recorded, {lines} are there")


def test_a_ledger_that_is_gone_is_not_begun_anew(ledger, run):
    ledger.unlink()
    require_refused(ledger, run, "3 lines were recorded, 0 are there|no ledger of histograms at")
    assert not ledger.exists()


def test_a_ledger_of_the_same_length_in_its_place_is_refused(ledger, run, tmp_path):
    for _ in range(3):
        record(tmp_path / "other.jsonl")
    shutil.copy(tmp_path / "other.jsonl", ledger)
    require_refused(ledger, run, "was truncated, or is another run's")


def test_a_ledger_without_its_head_or_with_a_damaged_one_is_refused(ledger, run):
    head_file(ledger).write_text('{"lines": 3}')
    require_refused(ledger, run, "histograms.jsonl.head.json is no head of a ledger")
    head_file(ledger).unlink()
    require_refused(ledger, run, "lies without its head, .* put .*head.json next to it")


def test_a_symbolic_link_leads_to_the_head(ledger, tmp_path):
    (tmp_path / "link").mkdir()
    link = tmp_path / "link" / "mine.jsonl"
    link.symlink_to(ledger)
    assert record(link)["lines"] == 4
    assert len(read_histograms(ledger)) == 4
    assert [path.name for path in (tmp_path / "link").iterdir()] == ["mine.jsonl"]


def test_a_ledger_of_an_earlier_version_is_accepted_until_the_next_line(tmp_path, run, capsys):
    ledger = tmp_path / "old.jsonl"
    content = {
        "kind": HISTOGRAM, "run": "ab", "num_examples": NUM_EXAMPLES, "noise_multiplier": 10.0,
        "sensitivity": 1, "num_bins": 4, "insecure": False,
    }  # fmt: skip
    chain = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    ledger.write_text(json.dumps({**content, "chain": chain}) + "\n")
    assert len(composed_report(run, [ledger])["mechanisms"]) == 2
    assert f"warning: {ledger} has no head" in capsys.readouterr().err
    assert record(ledger)["lines"] == 2
    capsys.readouterr()
    assert len(read_histograms(ledger, NUM_EXAMPLES)) == 2
    assert capsys.readouterr().err == ""
    cut(ledger, 1)
    require_refused(ledger, run, "2 lines were recorded, 1 are there")


KILLED = """
import os, signal, sys
from utils.privacy import ledger
calls = []
def dying(name):
    real = getattr(ledger, name)
    def called(*given):
        calls.append(name)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    setattr(ledger, name, called)
dying("write_json")
dying("_append")
ledger.record_histogram(sys.argv[1], num_examples=9, noise_multiplier=10.0, num_bins=4)
"""


@pytest.mark.parametrize(("call", "lines"), [(1, 0), (2, 0), (3, 1)])
def test_a_kill_between_two_writes_locks_nobody_out(tmp_path, run, call, lines):
    """Before the first head, before the line, and before the head that knows of the line."""
    ledger = tmp_path / "histograms.jsonl"
    command = [sys.executable, "-c", KILLED, str(ledger), str(call)]
    # Twice, since two lines that no head knows of would be refused.
    for times in (1, 2):
        assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
        assert len(read_histograms(ledger, NUM_EXAMPLES)) == times * lines
    assert record(ledger)["lines"] == 2 * lines + 1
    assert len(composed_report(run, [ledger])["mechanisms"]) == 2 + 2 * lines
    cut(ledger, 2 * lines)
    require_refused(ledger, run, "was truncated")


def test_a_head_that_is_two_lines_behind_is_not_this_ledgers(ledger, run):
    records = read_ledger(ledger)
    write_json(head_file(ledger), {"lines": 2, "chain": records[1]["chain"]})
    assert len(read_histograms(ledger, NUM_EXAMPLES)) == 3
    write_json(head_file(ledger), {"lines": 1, "chain": records[0]["chain"]})
    require_refused(ledger, run, "has 3 lines and .*head.json knows of 1; restore both")


def test_histograms_recorded_at_once_keep_one_chain(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    script = f"""
from utils.privacy.ledger import record_histogram
for _ in range(20):
    record_histogram({str(ledger)!r}, num_examples=9, noise_multiplier=10.0, num_bins=4)
"""
    writers = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(3)]
    # A reader takes no lock, and is never misled by a head and lines of different moments.
    while any(writer.poll() is None for writer in writers):
        read_histograms(ledger, NUM_EXAMPLES)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(read_ledger(ledger)) == 60
    assert {path.name for path in tmp_path.iterdir()} == {"ledger.jsonl", "ledger.jsonl.head.json"}
    assert json.loads(head_file(ledger).read_text())["lines"] == 60


def test_a_reader_that_two_writers_overtake_reads_again(ledger, monkeypatch):
    reads = []

    def overtaken(path):
        reads.append(path)
        if len(reads) == 1:
            record(path)
            record(path)
        return read_ledger(path)

    monkeypatch.setattr("utils.privacy.ledger.read_ledger", overtaken)
    assert len(read_histograms(ledger, NUM_EXAMPLES)) == 5


def test_rows_and_units_do_not_share_a_ledger(tmp_path):
    """Even of one size: a histogram of rows has no sensitivity of 1 for a unit."""
    record(tmp_path / "rows.jsonl")
    record(tmp_path / "units.jsonl", unit_column="person")
    (unit,) = read_histograms(tmp_path / "units.jsonl", NUM_EXAMPLES, "person")
    assert (unit["num_examples"], unit["unit_column"]) == (NUM_EXAMPLES, "person")
    with pytest.raises(UsageError, match="of 9 examples, not of 9 units of 'person'"):
        record(tmp_path / "rows.jsonl", unit_column="person")
    for other in (None, "chat"):
        with pytest.raises(UsageError, match="of 9 units of 'person', not of 9"):
            record(tmp_path / "units.jsonl", unit_column=other)
    with pytest.raises(UsageError, match="of 9 units of 'person', not of 9 .* .first owner."):
        record(tmp_path / "units.jsonl", unit_column="person", owner="first")
    assert len(read_ledger(tmp_path / "rows.jsonl")) == len(read_ledger(tmp_path / "units.jsonl"))


def test_a_ledger_of_100_000_steps_opens_in_about_a_second(tmp_path, monkeypatch):
    path = tmp_path / LEDGER_FILE
    with monkeypatch.context() as quick:
        quick.setattr("os.fsync", lambda _: None)
        ledger = Ledger(path, PLAN)
        for step in range(100_000):
            ledger.record_step(step + 1)
        ledger.close()
    began = time.process_time()
    ledger = Ledger(path, PLAN)
    seconds = time.process_time() - began
    assert ledger.steps_recorded == 100_000
    ledger.close()
    assert seconds < 1.5
