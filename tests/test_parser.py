"""What every command answers before it imports what takes seconds."""

import argparse
import signal
import subprocess
import sys

import pytest

from tests.faults import ENVIRONMENT
from tests.paths import ROOT
from tests.test_structure import FILES, module_name
from utils.cli import EXIT_CODE_VARIABLE
from utils.command_line.parser import average_rule, natural_int, port, probability

COMMANDS = sorted(module_name(path) for path in FILES if "run_cli(main)" in path.read_text())
OFTEN = {
    "train", "inference", "generate_train_command", "generate_inference_command",
    "generate_pipeline_script", "evaluation.report", "evaluation.compare", "privacy_checks.audit",
    "resample_with_dp_histogram.embed", "query_gpt35_for_annotation.annotate",
}  # fmt: skip
HEAVY = ["accelerate", "datasets", "faiss", "matplotlib", "pandas", "peft", "pyarrow", "scipy",
         "sentence_transformers", "torch", "transformers"]  # fmt: skip
# What a command has imported when it has answered --help, of what takes long.
SEEN = f"""
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    print("ended", ended.code, *sorted(sys.modules.keys() & {HEAVY!r}))
"""


def test_all_commands_are_known():
    assert set(COMMANDS) >= OFTEN
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(
    "command",
    [
        command if command in OFTEN else pytest.param(command, marks=pytest.mark.slow)
        for command in COMMANDS
    ],
)
def test_help_is_answered_before_imports_that_take_seconds(command):
    answered = subprocess.run(
        [sys.executable, "-c", SEEN, command], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert answered.stdout.splitlines()[-1] in ("ended 0", "ended None")
    assert answered.stderr == ""


IMPORTING = """
import sys, time
from utils.command_line.parser import answer_early
from utils.command_line.training_flags import TrainingSettings
answer_early(__name__, TrainingSettings, None)
try:
    print("ready", flush=True)
    time.sleep(60)  # stands for an import
except BaseException as error:
    raise ImportError("made of whatever came") from error
"""
FLAGS = ["--dataset_name=d", "--model_name=m", "--job_sess=j", "--prompt_style=vicuna", "--eps=-1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_asks_to_stop_during_imports_is_obeyed_in_one_line(tmp_path, number):
    code = tmp_path / "code"
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING, *FLAGS], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=ENVIRONMENT | {EXIT_CODE_VARIABLE: str(code)},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err, code.read_text()) == (130, "interrupted\n", "130")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (probability, ["auto", "0.5"], ["x", ""]),
        (natural_int, ["0", "9223372036854775807"], ["-1", "9223372036854775808", "1.5"]),
        (port, ["1", "65535"], ["0", "65536", "http"]),
    ],
)
def test_types_of_flags(kind, good, bad):
    assert [str(kind(text)) for text in good] == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
            kind(text)


def test_a_wrong_flag_is_refused_before_imports():
    refused = subprocess.run(
        [sys.executable, "-c", IMPORTING, *FLAGS, "--lr=none"], cwd=ROOT, env=ENVIRONMENT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    assert "--lr" in refused.stderr


@pytest.mark.parametrize("text", ["ema:0.9", "ema:.5", "tail:0.5", "tail:1"])
def test_rules_of_averages_are_taken_as_they_are(text):
    assert average_rule(text) == text


@pytest.mark.parametrize(
    "text", ["ema", "ema:", "ema:1", "ema:0", "tail:0", "tail:1.5", "tail:-0.5", "last:0.5", "0.9",
             "ema:1e-1", "tail:nan", "ema:0.9 "],
)  # fmt: skip
def test_other_rules_of_averages_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither ema:B .* nor tail:F"):
        average_rule(text)
