"""Flags from files: the same values, names and errors as on the command line."""

import shlex

import pytest

import generate_inference_command
import generate_train_command
from tests import training
from tests.paths import ROOT
from utils.cli import UsageError

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
