"""Tokens per second of every way to sample, on the same model, prompts and decoding.

    python -m benchmarks.sampling --model_name data/quickstart_model --json sampling.json
    python -m benchmarks.sampling --model_name data/quickstart_model --vllm

One prompt at a time through `generate` is what is compared with; then static batches, continuous
batching and, with --vllm, vLLM in an environment of its own, which is made on the first call. Each
measurement is a process of its own; engines take turns, so that a machine that slows down slows
all of them. The clock starts when an engine takes its first prompt: loading and compiling are left
out.
"""

import argparse
from dataclasses import dataclass

from benchmarks import figures
from utils.command_line.parser import answer_early, flag, positive_int, read_flags

# Texts drawn one at a time for each one drawn in batches; a rate needs no more of them.
ONE_BY_ONE_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags; `measure` is for the process of one engine."""

    model_name: str = flag("a hub id or folder", "data/quickstart_model")
    adapter_path: str | None = flag("LoRA adapter, merged into the model")
    num_samples: int = flag(
        f"texts an engine draws; one at a time, 1 in {ONE_BY_ONE_SHARE} of them", 64
    )
    max_seq_len: int = flag("longest text", 128)
    perdevice_bs: int | None = flag(
        "sequences at once; what the engine would choose if left out", type=positive_int
    )
    dtype: str = flag("as in inference.py", "auto", choices=("auto", "float32", "bfloat16"))
    top_p: float = flag("as in inference.py", 0.95)
    repeats: int = flag("measurements an engine", 3)
    vllm: bool = flag(
        "also vLLM; its environment is made from benchmarks/requirements-vllm.txt", False
    )
    quick: bool = flag(
        "a random tiny model, a few texts: shows that the benchmark runs, not how fast anything is",
        False,
    )
    measure: str | None = flag(argparse.SUPPRESS)


answer_early(__name__, Settings, __doc__)

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.environments import vllm_python
from benchmarks.figures import aligned
from benchmarks.measuring import by_turns, device, output_of
from privacy_checks.tiny_model import save_tiny_model
from utils.cli import run_cli, say
from utils.models.loading import (
    load_base_model,
    load_tokenizer,
    quiet_libraries,
    resolve_dtype,
    share_cores,
)
from utils.models.lora import load_adapted
from utils.sampling.decoding import Completion, Decoding, Request, completion_of
from utils.sampling.engines import cache_bytes, complete, fitting_batch_size
from utils.sampling.vllm_engine import ModelFolder
from utils.texts.prompts import UNCONDITIONAL, prompt_ids

ONE_BY_ONE = "one at a time"
ENGINES = (ONE_BY_ONE, "static", "continuous")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    settings = read_flags(Settings, __doc__, argv)
    if settings.measure:
        print(json.dumps(measure(settings, settings.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if settings.quick:
            save_tiny_model(Path(folder))
            small = ["--num_samples", "4", "--max_seq_len", "12", "--repeats", "1"]
            argv = [*argv, *small, "--model_name", folder]
            settings = read_flags(Settings, __doc__, argv)
        engines = [*ENGINES, "vllm"] if settings.vllm else ENGINES
        measured = by_turns(engines, partial(run, argv), settings.repeats)
    report = summarise(measured)
    print(table(report))
    settings.write({"settings": settings.on_record(), "engines": report, "runs": measured})


def run(arguments: list[str], engine: str) -> dict:
    """Measure one engine once, in a process of its own."""
    python = str(vllm_python()) if engine == "vllm" else sys.executable
    command = [python, "-m", "benchmarks.sampling", *arguments, "--measure", engine]
    measured = json.loads(output_of(command, engine).splitlines()[-1])
    say(f"{engine}: {rate(measured):.1f} tokens/s")
    return measured


def measure(settings: Settings, engine: str) -> dict:
    """Draw the texts with one engine: tokens, seconds, and what they were measured on."""
    if device().type == "cpu":
        share_cores(1)
    quiet_libraries()
    dtype, length = resolve_dtype(settings.dtype, device()), settings.max_seq_len
    tokenizer = load_tokenizer(settings.model_name)
    if settings.adapter_path:
        model = load_adapted(settings.model_name, settings.adapter_path, dtype, merge=True)
    else:
        model = load_base_model(settings.model_name, dtype)
    batch_size = settings.perdevice_bs or fitting_batch_size(model.to(device()), length)
    decoding = Decoding(
        max_seq_len=length, max_new_tokens=None, no_sample=False, temperature=1.0, top_k=0,
        top_p=settings.top_p, repetition_penalty=1.0, seed=0,
        stop_ids=frozenset([tokenizer.eos_token_id]),
    )  # fmt: skip
    prompt = prompt_ids(tokenizer, UNCONDITIONAL, "")
    gpu = torch.cuda.get_device_name() if device().type == "cuda" else None
    dtype_name = str(dtype).removeprefix("torch.")
    began = ended = 0.0

    def requests() -> Iterator[Request]:
        nonlocal began
        began = time.perf_counter()
        for id in range(settings.num_samples):
            yield Request(id, prompt)

    with tempfile.TemporaryDirectory() as folder:
        loaded = model
        if engine == "vllm":
            cache = batch_size * cache_bytes(model, length + 128)
            model.cpu().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            loaded = ModelFolder(folder, dtype_name, gpu=0 if gpu else None, cache_bytes=cache)
        if engine == ONE_BY_ONE:
            drawn = one_by_one(model, requests(), decoding)
        else:
            drawn = complete(engine, loaded, requests(), decoding, batch_size)
        lengths = []
        for completion in drawn:
            lengths.append(len(completion.tokens))
            ended = time.perf_counter()
    return {
        "tokens": sum(lengths), "seconds": ended - began, "texts": len(lengths),
        "device": gpu or "cpu", "threads": torch.get_num_threads(), "dtype": dtype_name,
        "batch_size": batch_size, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def one_by_one(
    model: PreTrainedModel, requests: Iterable[Request], decoding: Decoding
) -> Iterator[Completion]:
    """`generate` as it is mostly called: one prompt, its own random numbers."""
    for request in islice(requests, None, None, ONE_BY_ONE_SHARE):
        output = model.generate(
            torch.tensor([request.prompt], device=model.device),
            do_sample=True,
            top_p=decoding.top_p,
            top_k=0,
            max_length=decoding.max_seq_len,
            eos_token_id=sorted(decoding.stop_ids),
            pad_token_id=0,
        )
        tokens = output[0, len(request.prompt) :].tolist()
        yield completion_of(request.sample_id, tokens, decoding.stop_ids)


def rate(run: dict) -> float:
    """Tokens per second."""
    return run["tokens"] / run["seconds"]


def summarise(measured: dict[str, list[dict]]) -> dict[str, dict]:
    """For each engine, tokens per second (median, lowest, highest) and ratios of medians."""
    medians = {engine: statistics.median(map(rate, runs)) for engine, runs in measured.items()}
    report = {}
    for engine, runs in measured.items():
        rates = sorted(map(rate, runs))
        report[engine] = {
            "tokens_per_second": medians[engine], "lowest": rates[0], "highest": rates[-1],
            "times_one_at_a_time": medians[engine] / medians[ONE_BY_ONE],
        }  # fmt: skip
        if "vllm" in medians:
            report[engine]["share_of_vllm"] = medians[engine] / medians["vllm"]
    return report


def table(report: dict[str, dict]) -> str:
    """The figures, an engine a line."""
    rows = [["engine", "tokens/s", "lowest", "highest", "x one", "/ vLLM"]]
    for engine, row in report.items():
        speeds = (row["tokens_per_second"], row["lowest"], row["highest"])
        share = f"{row['share_of_vllm']:.2f}" if "share_of_vllm" in row else ""
        times = f"{row['times_one_at_a_time']:.1f}"
        rows.append([engine, *(f"{speed:.1f}" for speed in speeds), times, share])
    return aligned(rows)


if __name__ == "__main__":
    run_cli(main)
