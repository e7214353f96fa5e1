"""Every command of the README, run in the order in which it stands there.

A folder stands in for a fresh clone: the same scripts, and small data sets and a random two-layer
model under the names that the commands use. Sizes that fit only the real ones are changed.
"""

import importlib
import os
import re
import shlex
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState

from privacy_checks.observed_run import signal_handlers_restored
from tests.annotation_server import Server, judge
from tests.resampling import save_tiny_encoder
from tests.training import ROOT
from utils.texts.prompts import write_instruction_file

README = (ROOT / "README.md").read_text()
# This suite; what has tests of its own that take minutes; what only a shell does.
ELSEWHERE = {
    "./run_tests.sh", "./quickstart.sh", "python data/prepare_quickstart.py",
    "source .venv/bin/activate",
}  # fmt: skip
SMALLER = {
    "yahma/llama-13b-hf": "data/quickstart_model",
    "yahma/llama-7b-hf": "data/quickstart_model",
    "ADAPTER": "{adapter}",
    "--total_bs 4096 --num_epochs 10": "--total_bs 8 --num_epochs 0.2",
    "--total_bs 128 --num_epochs 0.25": "--total_bs 8 --num_epochs 0.2",
    "--total_bs 64 --num_epochs 0.075": "--total_bs 8 --num_epochs 0.2",
    "--total_bs 32 --num_epochs 3": "--total_bs 8 --num_epochs 0.2",
    # A third of the random model's texts end by themselves, and those alone are annotated.
    "uncond_generation --max_seq_len 128 --top_p": "uncond_generation --max_seq_len 100 --top_p",
    "--num_samples 128": "--num_samples 80",
    "--max_seq_len 128": "--max_seq_len 500",
    "--max_seq_len 1024": "--max_seq_len 500",
    "--max_seq_len 2048": "--max_seq_len 500",
    "utils/syn_instruct.txt --model_name": "utils/syn_instruct.txt --num_samples 3 --model_name",
}
INSTRUCTIONS = ["quickstart_instructions", "chatbot_arena_instructions_train180k"]
PAIRS = [
    "labelled_quickstart", "labelled_real_arena180k",
    "labelled_syn300k_13b_eps594_uncond_syn_clip05_13b_selected_sigma10_1000bins",
]  # fmt: skip


def commands() -> list[str]:
    """The commands of all `bash` blocks, continuation lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model_dir):
    """A folder with the scripts, and small data under the README's names."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("utils/syn_instruct.txt", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    data = folder / "data"
    data.mkdir()
    (data / "quickstart_model").symlink_to(tiny_model_dir)
    encoder = save_tiny_encoder(tmp_path_factory.mktemp("encoder"))
    (data / "quickstart_embedder").symlink_to(encoder)
    rows = {"instruction": [f"say hello {n}" for n in range(92)], "answer": ["hello"] * 92}
    for name in INSTRUCTIONS + PAIRS:
        columns = rows if name in PAIRS else {"instruction": rows["instruction"]}
        split = datasets.Dataset.from_dict(columns)
        parts = {"train": range(64), "val": range(64, 68), "test": range(68, 92)}
        datasets.DatasetDict({part: split.select(those) for part, those in parts.items()}
                             ).save_to_disk(data / name)  # fmt: skip
    for file in ("data/quickstart_questions.txt", "utils/alpaca_eval_instructions.txt"):
        write_instruction_file(folder / file, ["say hello", "say bye"])
    return folder


def run_script(words: list[str]) -> int:
    """Run `python SCRIPT ...`, `python -m MODULE ...` or a launch line in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if words[:2] == ["python", "-m"]:
        module, arguments = words[2], words[3:]
    else:
        position = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script = Path(words[position])
        script = script.relative_to(ROOT) if script.is_absolute() else script
        module, arguments = ".".join(script.with_suffix("").parts), words[position + 1 :]
    with signal_handlers_restored():
        return importlib.import_module(module).main(arguments) or 0


@pytest.fixture
def endpoint():
    """A server that answers chat completions."""
    with Server() as server:
        yield server


def test_every_command_of_the_readme_runs(clone, endpoint, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    adapters = {}
    found = commands()
    assert len(found) >= 15
    for number, command in enumerate(found):
        if command in ELSEWHERE:
            assert "-m" in command or "source" in command or (ROOT / command.split()[-1]).exists()
            assert not command.startswith("./") or os.access(ROOT / command, os.X_OK)
            continue
        for large, small in SMALLER.items():
            command = command.replace(large, small)
        # The seven commands of the paper share one --job_sess; here each gets its own.
        command = command.replace("--job_sess debug", f"--job_sess debug{number}")
        style = "vicuna" if "vicuna" in command else "uncond"
        command = (
            command.format(adapter=adapters.get(style, "")) if "{adapter}" in command else command
        )
        if ".annotate " in command or ".judge " in command:
            command += f" --base_url {endpoint.url}"
        if ".judge " in command:
            endpoint.behave = judge(lambda first, second: "tie")
        inner = re.fullmatch(r'bash -c "\$\((.*)\)"', command)
        words = shlex.split(inner[1] if inner else command)
        assert run_script(words) == 0, command
        printed = capsys.readouterr().out
        if words[1] in ("generate_train_command.py", "generate_inference_command.py"):
            assert printed.count("\n") == 1, command
            assert run_script(shlex.split(printed)) == 0, printed
        if words[1] == "generate_train_command.py":
            job = words[words.index("--job_sess") + 1]
            adapters[style] = f"outputs/{job}/adapter"
            assert Path(adapters[style], "adapter_model.safetensors").is_file()


def test_the_tree_names_what_is_there_and_nothing_else():
    tree = re.search(r"## The tree\n\n```text\n(.*?)```", README, re.DOTALL)[1]
    named = set(re.findall(r"[\w/]+\.(?:py|sh|md)", tree))
    here = {str(p.relative_to(ROOT)) for p in ROOT.glob("*.py")}
    utils = {p.name for p in (ROOT / "utils").glob("*.py")} - {"__init__.py"}
    assert here | utils <= named
    for name in named:
        assert any(
            (ROOT / folder / name).exists() for folder in ("", "utils", "tests", "evaluation")
        ), name
