"""The README and the pages of docs/: every command, every name of a file, every figure of epsilon.

The commands of the README and of docs/reference.md run in the order in which they stand there. A
folder stands in for a fresh clone: the same scripts, and small data sets and a random two-layer
model under the names that the commands use. Sizes that fit only the real ones are changed. The
commands of other pages are parsed.
"""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
from pathlib import Path
from unittest import mock

import datasets
import pytest

from tests.annotation_server import Server, judge
from tests.paths import ROOT
from tests.resampling import save_tiny_encoder
from tests.training import in_process
from utils.privacy.accounting import SampledGaussian, compute_epsilon
from utils.privacy.banded import prefix_error
from utils.privacy.plan import make_plan, num_steps
from utils.texts.prompts import write_instruction_file

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
GENERATORS = ("generate_train_command.py", "generate_inference_command.py")
# This suite; what has tests of its own that take minutes; what only a shell does.
ELSEWHERE = {
    "./run_tests.sh", "./quickstart.sh", "python data/prepare_quickstart.py", "bash mine.sh",
    "source .venv/bin/activate", "mkdir -p outputs/hub_cache",
}  # fmt: skip
# The local annotator, which quickstart.sh --annotate starts in the same way.
INSTALL, SERVE = "python -m pip install ", "HF_HUB_CACHE=outputs/hub_cache "
LOCAL_URL = "http://127.0.0.1:8000/v1"
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
    # One step at the larger sampling rate costs more.
    "--noise_multiplier 0.48": "--noise_multiplier 0.7",
    "--noise_multiplier 0.41": "--noise_multiplier 0.7",
    "--noise_multiplier 0.6": "--noise_multiplier 0.7",
    "--num_samples 128 --job_sess topics": "--num_samples 8 --job_sess topics",
    "topic_generation --max_seq_len 128 --top_p": "topic_generation --max_seq_len 300 --top_p",
    "--num_samples 128": "--num_samples 80",
    # Noise of deviation 10 would hide more topics of so few rows.
    "--num_topics 8": "--num_topics 1",
    "--max_seq_len 128": "--max_seq_len 500",
    "--max_seq_len 1024": "--max_seq_len 500",
    "--max_seq_len 2048": "--max_seq_len 500",
    "utils/syn_instruct.txt --model_name": "utils/syn_instruct.txt --num_samples 3 --model_name",
    # All cases of the replay, and the audit at its size, are slow tests of their own.
    "privacy_checks.replay": "privacy_checks.replay --model data/quickstart_model",
    "privacy_checks.audit": "privacy_checks.audit --canaries 2000 --steps 4 --noise_multiplier 2",
}
INSTRUCTIONS = ["quickstart_instructions", "chatbot_arena_instructions_train180k"]
PAIRS = [
    "labelled_quickstart", "labelled_real_arena180k",
    "labelled_syn300k_13b_eps594_uncond_syn_clip05_13b_selected_sigma10_1000bins",
]  # fmt: skip


def commands(page: str) -> list[str]:
    """The commands of all `bash` blocks, continuation lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip()]


def is_elsewhere(command: str) -> bool:
    return command in ELSEWHERE or command.startswith((INSTALL, SERVE))


def made_small(command: str) -> str:
    for large, small in SMALLER.items():
        command = command.replace(large, small)
    return command


def mentioned(page: str) -> list[str]:
    """Commands in a page's text, `python -m ...`, and in its indented blocks."""
    text = page.replace("\\\n", " ")
    spans = re.findall(r"(?<!`)`(python [^`]+)`", text)
    blocks = re.findall(r"^ {4}(python .+)", text, re.MULTILINE)
    return [re.sub(r"\s+", " ", command).strip() for command in spans + blocks]


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """What `python SCRIPT ...`, `python -m MODULE ...` or a launch line runs: module, arguments."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = Path(words[position])
    script = script.relative_to(ROOT) if script.is_absolute() else script
    return ".".join(script.with_suffix("").parts), words[position + 1 :]


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
    persons = [f"user {row // 2}" for row in range(92)]
    datasets.Dataset.from_dict({"user_id": persons, "question": rows["instruction"]}).to_csv(
        data / "chats.csv"
    )
    for file in ("data/quickstart_questions.txt", "utils/alpaca_eval_instructions.txt"):
        write_instruction_file(folder / file, ["say hello", "say bye"])
    return folder


def run_script(words: list[str]) -> int:
    """Run a command in this process."""
    module, arguments = module_of(words)
    return in_process(importlib.import_module(module).main, arguments)


@pytest.fixture
def endpoint():
    """A server that answers chat completions."""
    with Server() as server:
        yield server


@pytest.mark.timeout(900)
def test_every_command_runs(clone, endpoint, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    adapters = {}
    found = commands(README) + commands(PAGES["reference.md"])
    assert len(found) >= 30
    for number, command in enumerate(found):
        if is_elsewhere(command):
            assert not command.startswith("./") or os.access(ROOT / command, os.X_OK)
            assert command != "bash mine.sh" or Path("mine.sh").read_text().startswith("#!")
            continue
        command = made_small(command)
        # The seven commands of the paper share one --job_sess; here each gets its own.
        command = command.replace("--job_sess debug", f"--job_sess debug{number}")
        style = "vicuna" if "vicuna" in command else "uncond"
        command = (
            command.format(adapter=adapters.get(style, "")) if "{adapter}" in command else command
        )
        command = command.replace(LOCAL_URL, endpoint.url)
        if ".judge " in command:
            assert run_script(shlex.split(command)) == 0, command
            endpoint.behave = judge(lambda first, second: "tie")
            command = command.replace("--dry_run", f"--base_url {endpoint.url}")
        command, _, target = command.partition(" > ")
        words = shlex.split(command)
        # What `--run` starts is what is printed without it, through a launcher that takes ten
        # seconds to come up; here it runs in this process, as the line does that is pasted.
        words = [word for word in words if word != "--run" or words[1] not in GENERATORS]
        assert run_script(words) == 0, command
        printed = capsys.readouterr().out
        if target:
            Path(target).write_text(printed)
        if "--advise" in words:
            assert printed.count(" <-") == 1, printed
            continue
        if words[1] in GENERATORS:
            assert printed.count("\n") == 1, command
            assert run_script(shlex.split(printed)) == 0, printed
        if words[1] == "generate_train_command.py":
            job = words[words.index("--job_sess") + 1]
            adapters[style] = f"outputs/{job}/adapter"
            assert Path(adapters[style], "adapter_model.safetensors").is_file()


def test_run_starts_the_line_that_is_printed_without_it(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    started = []
    monkeypatch.setattr(
        "utils.command_line.launch.subprocess.Popen",
        lambda command, **_: started.append(command) or mock.Mock(returncode=0),
    )
    for generator in GENERATORS:
        command = next(line for line in commands(README) if f"{generator} --run" in line)
        command = made_small(command).replace("--job_sess instructions", "--job_sess never")
        words = shlex.split(command.replace("--adapter_path outputs/instructions/adapter", ""))
        assert run_script(words) == 0
        assert capsys.readouterr().out == ""
        words.remove("--run")
        assert run_script(words) == 0
        assert started.pop()[3:] == shlex.split(capsys.readouterr().out)[1:]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_can_be_given(page, monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*given):
        parse(*given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for command in mentioned(PAGES[page]) + commands(PAGES[page]):
        if is_elsewhere(command) or command.startswith("python -m venv"):
            continue
        module, arguments = module_of(shlex.split(command.partition(" > ")[0]))
        assert importlib.util.find_spec(module), command
        if arguments:
            with pytest.raises(Parsed):
                importlib.import_module(module).main(arguments)


def test_the_local_annotator_is_started_as_by_the_quick_start():
    """Nothing on the page needs an account."""
    found = commands(README)
    (install,) = (command for command in found if command.startswith(INSTALL))
    (serve,) = (command for command in found if command.startswith(SERVE))
    quickstart = re.sub(r"\s+", " ", (ROOT / "quickstart.sh").read_text().replace("\\\n", " "))
    assert install.removeprefix(INSTALL) in quickstart
    served, flags = serve.removesuffix(" &").split(" --port 8000 ")
    assert served in quickstart
    assert flags in quickstart
    asking = [command for command in found if re.search(r"\.(annotate|judge) ", command)]
    assert len(asking) == 2
    local = f"--base_url {LOCAL_URL} --model data/quickstart_model"
    assert all(local in command or "--dry_run" in command for command in asking)


def test_a_line_in_a_substitution_is_taught_nowhere():
    """It exits 0 where the generator fails: the empty string is a program, too."""
    texts = [*PAGES.values(), *(path.read_text() for path in ROOT.glob("*.sh"))]
    assert len(texts) > 8
    assert not [text for text in texts if re.search(r"bash -c|eval .*\$\(python", text)]


def test_the_tree_names_what_is_there_and_nothing_else():
    tree = re.search(r"## The tree\n\n```text\n(.*?)```", README, re.DOTALL)[1]
    named, parents = set(), [""]
    for line in tree.splitlines():
        names, depth = re.match(r" *([^ ,]+(?:, [^ ,]+)*)", line)[1], line[:4].count(" ") // 2
        named |= {parents[depth] + name for name in names.split(", ")}
        parents[depth + 1 :] = [parents[depth] + names]
    # Scripts, what lies flat in utils/, pages, and every folder that holds code or launches.
    files = [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("docs/*.md")]
    folders = [path.parent for path in ROOT.glob("[a-z]*/**/*.py")] + [ROOT / "accelerate_configs"]
    here = {str(path.relative_to(ROOT)) for path in files} - {"utils/__init__.py"}
    here |= {f"{path.relative_to(ROOT)}/" for path in folders}
    assert {"train.py", "utils/privacy/", "evaluation/page/"} <= here
    assert here - named == set()
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_names_of_files_on_a_page_are_those_of_files(page):
    folder = ROOT if page in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    text = (folder / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (folder / link).exists()] == []
    folders = "utils|tests|evaluation|privacy_checks|benchmarks|data|docs"
    names = re.findall(rf"`((?:{folders})/[\w/.-]+)`", text)
    made = re.compile(r"data/(quickstart_|labelled_|chats|NAME)|utils/alpaca_eval")
    assert [n for n in names if not made.match(n) and not (ROOT / n).exists()] == []


def test_the_architecture_names_every_module_of_every_wing():
    rows = re.findall(r"^\| `(\w+)/` \| ([\w, ]+) \|", PAGES["architecture.md"], re.MULTILINE)
    named = {wing: set(modules.split(", ")) for wing, modules in rows}
    here: dict[str, set[str]] = {}
    for path in ROOT.glob("utils/*/*.py"):
        here.setdefault(path.parent.name, set()).add(path.stem)
    assert here.keys() == named.keys()
    for wing, modules in here.items():
        assert modules - {"__init__"} <= named[wing]


def test_epsilon_of_a_person_with_two_rows():
    table = re.findall(r"^\| (\d+) \| ([\d.]+) \| [\d.]+ \|$", PAGES["guarantee.md"], re.MULTILINE)
    epsilons = {int(rows): float(epsilon) for rows, epsilon in table}
    code = re.search(r"```python\n(.*?)```", PAGES["guarantee.md"], re.DOTALL)[1]
    results = []
    coarser = code.replace("1e-4", "2e-3").replace("print(", "results.append(")
    exec(coarser, {"results": results})
    assert results == [pytest.approx(epsilons[2], abs=0.03)]
    alone = compute_epsilon([SampledGaussian(4096 / 180_000, 1.125, 439)], 5e-7)
    assert epsilons[1] == pytest.approx(alone.upper, abs=0.01)


def test_the_audit_of_the_quick_start():
    """What its run of Type A claims, and which share of its canaries some step drew."""
    script = (ROOT / "quickstart.sh").read_text().replace("\\\n", " ")
    (line,) = (line for line in script.splitlines() if "--bands" in line)
    flags = dict(re.findall(r"--(\w+) ([\d.]+)", line))
    rows = 4576 + int(re.search(r"--audit_canaries (\d+)", script)[1])
    steps = num_steps(float(flags["num_epochs"]), rows, int(flags["total_bs"]))
    assert int(flags["bands"]) == steps  # so that each row is drawn from once
    drawn = steps * int(flags["total_bs"]) / rows
    claimed = compute_epsilon([SampledGaussian(drawn, float(flags["noise_multiplier"]), 1)], 1e-5)
    audit = re.sub(r"\s+", " ", PAGES["audit.md"])
    assert f"drawn with probability {drawn:.2f}: a claim of {claimed.upper:.2f}" in audit
    (shown,) = re.findall(r"a run without noise would show ([\d.]+) at 99% and", audit)
    readme = re.sub(r"\s+", " ", README)
    assert f"and {claimed.upper:.2f} is claimed" in readme
    assert round(1 / drawn) == 4
    assert "drew a quarter" in readme
    assert f"a run without noise would have shown {shown} (" in readme


@pytest.mark.slow
def test_noise_of_the_bands_that_auto_takes():
    """The second column of the table; each of the others takes as long."""
    found = re.findall(
        r"^\| N ([\d,]+), batch ([\d,]+), (\d+) steps, delta (\S+) \| [^|]* \| ([^|]*) \|",
        PAGES["guarantee.md"], re.MULTILINE,
    )  # fmt: skip
    assert len(found) == 2
    for *numbers, delta, cell in found:
        rows, batch, steps = (int(number.replace(",", "")) for number in numbers)
        white, banded = (
            make_plan(
                rows, expected_batch_size=batch, num_epochs=(steps + 0.01) * batch / rows,
                clip_norm=0.5, clip_function="flat", loss_normalization="tokens",
                target_epsilon=5.94, delta=float(delta), bands=bands,
            )[0]
            for bands in (1, "auto")
        )  # fmt: skip
        noise, of_white = (
            plan.noise_multiplier * prefix_error(plan.coefficients, steps)
            for plan in (banded, white)
        )
        assert cell.replace(" bands", "") == f"{noise / of_white:.2f} ({banded.bands})"


def test_noise_of_persons():
    """Sigma of the table is the least that meets epsilon, to the third decimal."""
    page, persons, rows = PAGES["unit_of_privacy.md"], 60_000, 180_000
    sigmas = [
        [float(sigma) for sigma in re.findall(r"([\d.]+) \(\d\.\de-\d\)", line)]
        for line in page.splitlines()
        if re.match(r"\| `(units|rows)` \|", line)
    ]
    runs = {
        (0, 0): (persons, 4096, 146, 1), (1, 0): (persons, 1365, 439, 1),
        (2, 0): (persons, 4096, 146, 1), (2, 1): (rows, 4096, 439, 4),
        (2, 2): (rows, 4096, 439, 16),
    }  # fmt: skip
    assert [len(set(line)) for line in sigmas] == [1, 1, 3]
    for (line, column), (n, batch, steps, most) in runs.items():
        sigma = sigmas[line][column]
        assert f"{sigma} ({float(f'{sigma / batch:.1e}'):.1e}".replace("e-0", "e-") in page
        found = [
            compute_epsilon([SampledGaussian(batch / n, noise, steps, most)], 5e-7).upper
            for noise in (sigma, sigma - 0.001)
        ]
        assert found[0] <= 5.94 < found[1]
