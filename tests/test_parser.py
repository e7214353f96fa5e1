"""Flags from files, and what every command answers before it imports what takes seconds."""

import argparse
import shlex
import signal
import subprocess
import sys

import pytest

import generate_inference_command
import generate_train_command
from tests import training
from tests.faults import ENVIRONMENT
from tests.paths import ROOT
from tests.test_structure import FILES, module_name
from utils.cli import EXIT_CODE_VARIABLE, UsageError
from utils.command_line.parser import port, probability, seed_int

COMMANDS = sorted(module_name(path) for path in FILES if "run_cli(main)" in path.read_text())
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
    assert {"train", "inference", "evaluation.report", "generate_train_command"} <= set(COMMANDS)
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
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
        (seed_int, ["0", "9223372036854775807"], ["-1", "9223372036854775808", "1.5"]),
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


TRAINING = """# A run on letters.
dataset_name: {data}
model_name: '{model}'
job_sess: 007            # no octal number
prompt_style: uncond_generation
output_dir: runs
eps: 8
delta: 1e-3              # a text to YAML 1.1
clip: 0.5
total_bs: 010
max_seq_len: 32
lora_dropout:            # left out
target_modules: [q_proj, v_proj]
no_eval_at_start: yes
"""


@pytest.fixture
def config(tmp_path, tiny_model_dir, monkeypatch):
    """A file of flags in the current folder."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "flags.yaml"
    data = training.save_dataset(tmp_path)
    file.write_text(TRAINING.format(data=data, model=tiny_model_dir))
    return file


def printed(capsys, *argv, main=generate_train_command.main) -> list[str]:
    assert main(list(argv)) == 0
    return shlex.split(capsys.readouterr().out)


def test_a_file_means_what_its_flags_mean(config, tiny_model_dir, capsys):
    flags = [
        "--dataset_name=letters", f"--dataset_name={config.parent / 'letters'}",
        f"--model_name={tiny_model_dir}", "--job_sess=007", "--prompt_style=uncond_generation",
        "--output_dir=runs", "--eps=8", "--delta=1e-3", "--clip=0.5", "--total_bs=10",
        "--max_seq_len=32", "--target_modules", "q_proj", "v_proj", "--no_eval_at_start",
    ]  # fmt: skip
    assert printed(capsys, f"--config={config}") == printed(capsys, *flags)


def test_flags_win_over_the_file(config, capsys):
    words = printed(
        capsys, "--config", str(config), "--max_seq_len", "16", "--target_modules", "k_proj"
    )
    assert words[words.index("--max_seq_len") + 1] == "16"
    modules = words.index("--target_modules")
    assert words[modules + 1] == "k_proj"
    assert words[modules + 2].startswith("--")


def test_the_resolved_file_gives_the_same_line_again(config, capsys):
    words = printed(capsys, "--config", str(config), "--lr=0.01")
    resolved = config.parent / "runs" / "007.yaml"
    text = resolved.read_text()
    assert "num_train_examples: 64" in text
    assert f"noise_multiplier: {words[words.index('--noise_multiplier') + 1]}" in text
    assert printed(capsys, f"--config={resolved}") == words


def test_without_a_file_nothing_is_written(config, capsys):
    config.with_name("empty.txt").write_text("### BOI ### 1\n5\n### EOI ###\n")
    printed(
        capsys, "--instruction_file=empty.txt", "--model_name=m", "--job_sess=a",
        "--prompt_style=uncond_generation", main=generate_inference_command.main,
    )  # fmt: skip
    assert not (config.parent / "inference_outputs").exists()


def test_sampling_takes_a_file(config, capsys):
    config.write_text(
        f"instruction_file: {ROOT / 'utils/syn_instruct.txt'}\nmodel_name: m\njob_sess: a\n"
        "prompt_style: uncond_generation\ntop_p: 0.9\nnum_samples: 3\n"
    )
    words = printed(capsys, f"--config={config}", main=generate_inference_command.main)
    assert words[words.index("--top_p") + 1] == "0.9"
    resolved = config.parent / "inference_outputs" / "a.yaml"
    again = printed(capsys, f"--config={resolved}", main=generate_inference_command.main)
    assert again == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epsilon: 8", "'epsilon' is not a flag"),
        ("--lr: 1", "'--lr' is not a flag"),
        ("config: other.yaml", "'config' is not a flag"),
        ("help: true", "'help' is not a flag"),
        ("eps: 3", "'eps' is there for the second time"),
        ("lr: fast", "lr: 'fast' is not a number above 0"),
        ("lr_scheduler: sine", "lr_scheduler: invalid choice: 'sine'"),
        ("lr: [1, 2]", "lr: it takes 1 of them, found 2"),
        ("rank_pattern: []", "rank_pattern: it takes one or more of them, found 0"),
        ("lr: {peak: 1}", "lr: it takes a value, or a list of them"),
        ("fsdp: 1", "fsdp: it takes true or false, found 1"),
        ("owner: no", "owner: it takes a value, which in quotes may be this word, found no"),
    ],
)
def test_an_error_names_file_line_and_flag(config, line, message):
    with config.open("a") as file:
        file.write(f"{line}\n")
    number = len(config.read_text().splitlines())
    with pytest.raises(UsageError) as raised:
        generate_train_command.main([f"--config={config}"])
    assert str(raised.value).startswith(f"--config {config}, line {number}: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("eps: [", "is not YAML: while parsing"),
        ("- eps", "holds no flags"),
        ("", "holds no flags"),
        ("eps: !!python/object/apply:os.system [exit]", "line 1: eps: invalid float value"),
    ],
)
def test_a_file_that_is_none_is_refused_in_a_line(config, content, message):
    config.write_text(content)
    with pytest.raises(UsageError, match=message) as raised:
        generate_train_command.main([f"--config={config}"])
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        generate_train_command.main([f"--config={tmp_path / 'none.yaml'}"])


def test_what_neither_file_nor_flags_give_is_asked_for(config, capsys):
    config.write_text("eps: 8\n")
    with pytest.raises(SystemExit):
        generate_train_command.main([f"--config={config}"])
    error = capsys.readouterr().err
    assert "the following arguments are required: --model_name" in error
    assert "--eps" not in error
