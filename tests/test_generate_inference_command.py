"""The printed command: one line, quoted, that `inference.py` understands and a shell can run."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import generate_inference_command
from privacy_checks.tiny_model import save_tiny_model
from tests.paths import ROOT
from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.command_line.sampling_flags import SamplingSettings
from utils.files import write_json
from utils.texts.prompts import write_instruction_file

SCRIPT = ROOT / "generate_inference_command.py"
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}  # fmt: skip
TYPE_B = (
    "--instruction_file utils/syn_instruct.txt --model_name yahma/llama-13b-hf "
    "--adapter_path ADAPTER --job_sess debug --max_seq_len 1024 --top_p 0.95 "
    "--prompt_style uncond_generation"
)
TYPE_D = TYPE_B.replace("syn_instruct", "alpaca_eval_instructions").replace(
    "uncond_generation", "vicuna"
)


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """A working folder with an adapter (of no model) and both instruction files."""
    monkeypatch.chdir(tmp_path)
    for name, style in (("ADAPTER", "uncond_generation"), ("ANSWERS", "vicuna")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.safetensors").write_bytes(b"")
        (folder / "training_style.json").write_text(json.dumps({"prompt_style": style}))
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "syn_instruct.txt").write_bytes(
        (ROOT / "utils" / "syn_instruct.txt").read_bytes()
    )
    write_instruction_file("utils/alpaca_eval_instructions.txt", ["What is a cat?", "Sing."])


def printed(capsys, argv):
    """The words of the printed command."""
    assert generate_inference_command.main(argv) == 0
    output = capsys.readouterr().out
    assert output.endswith("\n")
    assert output.count("\n") == 1
    return shlex.split(output)


def settings(argv):
    """The values of `inference.py`'s flags."""
    return vars(read_flags(SamplingSettings, None, argv))


def parsed(words):
    """What `inference.py` understands."""
    script = str(ROOT / "inference.py")
    assert words[:2] == ["accelerate", "launch"]
    return settings(words[words.index(script) + 1 :])


@pytest.mark.parametrize("command", [TYPE_B, TYPE_D.replace("ADAPTER", "ANSWERS")])
def test_published_commands(adapter, capsys, command):
    arguments = parsed(printed(capsys, command.split()))
    assert arguments == settings(command.split())
    assert arguments["top_p"] == 0.95


def test_summary(adapter, capsys):
    generate_inference_command.main(TYPE_B.split())
    err = capsys.readouterr().err
    for part in ("1,000,000", "top-p 0.95", "1,024", "inference_outputs/debug", "ADAPTER"):
        assert part in err
    generate_inference_command.main(TYPE_D.replace("ADAPTER", "ANSWERS").split())
    assert "2 for 2 instructions" in capsys.readouterr().err


def test_every_flag_survives(adapter, capsys):
    argv = [
        *TYPE_B.split(), "--no_sample", "--top_k", "5", "--temperature", "0.1",
        "--repetition_penalty", "1.2", "--max_new_tokens", "7", "--num_samples", "1",
        "--perdevice_bs", "3", "--seed", "9", "--dtype", "bfloat16", "--engine", "static",
        "--no_merge", "--output_dir", "else where", "--job_sess=-x $HOME 'q'",
    ]  # fmt: skip
    arguments = parsed(printed(capsys, argv))
    assert arguments == settings(argv)
    given = {name for name, value in arguments.items() if value is not None}
    defaults = settings(TYPE_B.split())
    unchanged = {name for name in given if arguments[name] == defaults[name]}
    assert unchanged == {
        "instruction_file", "model_name", "prompt_style", "max_seq_len", "adapter_path", "top_p",
        "check", "dry_run",  # of no printed line
    }  # fmt: skip


def test_processes(adapter, capsys):
    words = printed(capsys, [*TYPE_B.split(), "--gpus", "4"])
    assert words[words.index("--num_processes") + 1] == "4"
    assert "--multi_gpu" in words


TYPE_B_BY_TOPICS = (
    "--topic_histogram topics/topic_histogram.json --num_samples 9 --model_name yahma/llama-13b-hf "
    "--job_sess debug --max_seq_len 1024 --prompt_style topic_generation"
)


@pytest.fixture
def topics(adapter):
    """In the working folder: topics of which one has nothing."""
    counts = {"rivers": 4.5, "bread, salt": 0.0, "chess": 4.5}
    listed = [
        {"topic": number, "keywords": keywords, "count": count}
        for number, (keywords, count) in enumerate(counts.items())
    ]
    write_json("topics/topic_histogram.json", {"topics": listed})


def test_topics_take_the_place_of_instructions(topics, capsys):
    argv = TYPE_B_BY_TOPICS.split()
    assert parsed(printed(capsys, argv)) == settings(argv)
    generate_inference_command.main(argv)
    assert "9 for 2 topics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--instruction_file utils/syn_instruct.txt", "give one of them, found both"),
        ("--prompt_style uncond_generation", "goes with --prompt_style topic_generation, found un"),
        ("--topic_histogram none.json", "no topic histogram 'none.json'; make it with"),
        ("--adapter_path ADAPTER", "trained with uncond_generation"),
    ],
)
def test_topics_that_cannot_be_sampled_are_a_line(topics, extra, message):
    with pytest.raises(UsageError, match=message) as error:
        generate_inference_command.main(TYPE_B_BY_TOPICS.split() + extra.split())
    assert "\n" not in str(error.value)


def test_what_to_sample_and_how_many_must_be_said(topics, capsys):
    words = TYPE_B_BY_TOPICS.split()
    with pytest.raises(UsageError, match="needs --num_samples: how many texts in all"):
        generate_inference_command.main(words[:2] + words[4:])
    with pytest.raises(UsageError, match="give one of them, found neither"):
        generate_inference_command.main(words[4:])
    elsewhere = [*words[2:], "--topic_histogram", "there.json", "--elsewhere"]
    generate_inference_command.main(elsewhere)
    assert "warning: there.json is not here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--top_p 0", r"--top_p 0\.0: must be above 0 and at most 1"),
        ("--top_p 1.5", r"--top_p 1\.5: must be above 0 and at most 1"),
        ("--top_p nan", r"--top_p nan: must be above 0"),
        (
            "--temperature 0",
            r"--temperature 0\.0: must be a number of 0\.0001 or more; use --no_sample",
        ),
        ("--temperature -1", r"--temperature -1\.0: must be"),
        ("--temperature inf", r"--temperature inf: must be"),
        ("--repetition_penalty 0", r"--repetition_penalty 0\.0: must be above 0"),
        ("--no_sample", "draws 1,000,000 times the same text"),
        ("--prompt_style vicuna", "trained with uncond_generation"),
        ("--prompt_style vicuna --num_samples 5", "--num_samples 5 goes with --prompt_style"),
        ("--adapter_path nowhere", "no adapter at 'nowhere'"),
        ("--instruction_file none.txt", "no instruction file 'none.txt'"),
        ("--run --elsewhere", "--elsewhere and --run"),
    ],
)
def test_refusals_are_one_line(adapter, extra, message):
    with pytest.raises(UsageError, match=message) as error:
        generate_inference_command.main(TYPE_B.split() + extra.split())
    assert "\n" not in str(error.value)


def test_an_adapter_without_weights(adapter):
    Path("ADAPTER/adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="'ADAPTER' has no weights: adapter_model.safetensors"):
        generate_inference_command.main(TYPE_B.split())


def test_a_missing_alpaca_eval_names_its_script(adapter):
    Path("utils/alpaca_eval_instructions.txt").unlink()
    with pytest.raises(UsageError, match="python data/prepare_alpaca_eval.py"):
        generate_inference_command.main(TYPE_D.replace("ADAPTER", "ANSWERS").split())


def test_elsewhere_turns_missing_files_into_warnings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = printed(capsys, [*TYPE_D.split(), "--elsewhere"])
    assert parsed(words)["adapter_path"] == "ADAPTER"
    generate_inference_command.main([*TYPE_B.split(), "--elsewhere"])
    err = capsys.readouterr().err
    for name in ("ADAPTER", "utils/syn_instruct.txt"):
        assert f"warning: {name} is not here" in err


def test_elsewhere_still_checks_what_is_here(adapter):
    with pytest.raises(UsageError, match="trained with uncond_generation"):
        generate_inference_command.main([*TYPE_D.split(), "--elsewhere"])


def test_what_has_no_effect_is_said(adapter, capsys):
    argv = [*TYPE_D.replace("ADAPTER", "ANSWERS").split(), "--no_sample"]
    generate_inference_command.main(argv)
    assert "warning: --no_sample: --top_p 0.95 has no effect" in capsys.readouterr().err


def test_a_shell_runs_the_line_whatever_the_names(tmp_path):
    model = tmp_path / 'a "model" of $HOME\'s'
    save_tiny_model(model)
    job = "b 'c' $(d)"
    generator = [
        sys.executable, str(SCRIPT), "--model_name", str(model), "--job_sess", job,
        "--prompt_style", "uncond_generation", "--max_seq_len", "12", "--num_samples", "9",
        "--instruction_file", str(ROOT / "utils" / "syn_instruct.txt"), "--gpus", "2",
    ]  # fmt: skip
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True}
    line = subprocess.run(generator, check=True, **options).stdout
    done = subprocess.run(["bash", "-c", line], **options)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        shard = tmp_path / "inference_outputs" / job / f"shard-{rank}.jsonl"
        ids = [json.loads(line)["id"] for line in shard.read_text().splitlines()]
        assert sorted(ids) == list(range(rank, 9, 2))


def test_run_passes_a_failure_on(tmp_path):
    argv = [
        sys.executable, str(SCRIPT), "--run", "--model_name", "/nowhere", "--job_sess", "job",
        "--instruction_file", str(ROOT / "utils" / "syn_instruct.txt"),
        "--prompt_style", "uncond_generation", "--num_samples", "3",
    ]  # fmt: skip
    done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no model at '/nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
