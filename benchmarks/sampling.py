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
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import transformers

from benchmarks.environments import ROOT, vllm_python
from privacy_checks.tiny_model import save_tiny_model
from utils.cli import UsageError, run_cli, say
from utils.command_line.parser import make_parser, positive_int
from utils.files import write_json
from utils.models.loading import load_base_model, load_tokenizer, resolve_dtype, share_cores
from utils.models.lora import load_adapted
from utils.sampling.decoding import Completion, Decoding, Request, completion_of
from utils.sampling.engines import cache_bytes, complete, fitting_batch_size
from utils.sampling.vllm_engine import ModelFolder
from utils.texts.prompts import UNCONDITIONAL, prompt_ids

ONE_BY_ONE = "one at a time"
ENGINES = (ONE_BY_ONE, "static", "continuous")
# Texts drawn one at a time for each one drawn in batches; a rate needs no more of them.
ONE_BY_ONE_SHARE = 16


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--model_name", default="data/quickstart_model", help="a hub id or folder")
    parser.add_argument("--adapter_path", default=None, help="LoRA adapter, merged into the model")
    parser.add_argument("--num_samples", type=positive_int, default=64, help="texts an engine "
                        f"draws; one at a time, 1 in {ONE_BY_ONE_SHARE} of them")  # fmt: skip
    parser.add_argument("--max_seq_len", type=positive_int, default=128, help="longest text")
    parser.add_argument("--perdevice_bs", type=positive_int, default=None, help="sequences at "
                        "once; what the engine would choose if left out")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="as in inference.py")  # fmt: skip
    parser.add_argument("--top_p", type=float, default=0.95, help="as in inference.py")
    parser.add_argument("--repeats", type=positive_int, default=3, help="measurements an engine")
    parser.add_argument("--vllm", action="store_true", help="also vLLM; its environment is made "
                        "from benchmarks/requirements-vllm.txt")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a random tiny model, a few texts: "
                        "shows that the benchmark runs, not how fast anything is")  # fmt: skip
    parser.add_argument("--json", default=None, help="also write the figures to this file")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            save_tiny_model(folder)
            argv = [*argv, "--model_name", folder, "--num_samples", "4", "--max_seq_len", "12",
                    "--repeats", "1"]  # fmt: skip
            args = build_parser().parse_args(argv)
        pythons = dict.fromkeys(ENGINES, sys.executable)
        if args.vllm:
            pythons["vllm"] = str(vllm_python())
        measured = {engine: [] for engine in pythons}
        for repeat in range(args.repeats):
            for engine, python in pythons.items():
                measured[engine].append(run(python, [*argv, "--measure", engine], engine))
                say(f"{repeat + 1}/{args.repeats} {engine}: {rate(measured[engine][-1]):.1f} "
                    "tokens/s")  # fmt: skip
    report = summarise(measured)
    say_table(report)
    if args.json:
        settings = {name: value for name, value in vars(args).items()
                    if name not in ("json", "measure")}  # fmt: skip
        write_json(args.json, {"settings": settings, "engines": report, "runs": measured})


def run(python: str, arguments: list[str], engine: str) -> dict:
    """Measure one engine once, in a process of its own.

    Raises:
        UsageError: it failed; its own last lines say why.
    """
    command = [python, "-m", "benchmarks.sampling", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{engine} failed: {' | '.join(done.stderr.splitlines()[-3:])}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Draw the texts with one engine: tokens, seconds, and what they were measured on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        share_cores(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = resolve_dtype(args.dtype, device)
    tokenizer = load_tokenizer(args.model_name)
    if args.adapter_path:
        model = load_adapted(args.model_name, args.adapter_path, dtype, merge=True)
    else:
        model = load_base_model(args.model_name, dtype)
    decoding = Decoding(
        max_seq_len=args.max_seq_len, max_new_tokens=None, no_sample=False, temperature=1.0,
        top_k=0, top_p=args.top_p, repetition_penalty=1.0, seed=0,
        stop_ids=frozenset([tokenizer.eos_token_id]),
    )  # fmt: skip
    prompt = prompt_ids(tokenizer, UNCONDITIONAL, "")
    began = None

    def requests() -> Iterator[Request]:
        nonlocal began
        began = time.perf_counter()
        for id in range(args.num_samples):
            yield Request(id, prompt)

    batch_size = args.perdevice_bs or fitting_batch_size(model.to(device), args.max_seq_len)
    with tempfile.TemporaryDirectory() as folder:
        if args.measure == ONE_BY_ONE:
            drawn = one_by_one(model, requests(), decoding)
        elif args.measure == "vllm":
            model.cpu().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            loaded = ModelFolder(
                folder, str(dtype).removeprefix("torch."),
                gpu=0 if device.type == "cuda" else None,
                cache_bytes=batch_size * cache_bytes(model, args.max_seq_len + 128),
            )  # fmt: skip
            drawn = complete("vllm", loaded, requests(), decoding, batch_size)
        else:
            drawn = complete(args.measure, model, requests(), decoding, batch_size)
        lengths, ended = [], 0.0
        for completion in drawn:
            lengths.append(len(completion.tokens))
            ended = time.perf_counter()
    return {
        "tokens": sum(lengths), "seconds": ended - began, "texts": len(lengths),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def one_by_one(
    model: transformers.PreTrainedModel, requests: Iterable[Request], decoding: Decoding
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


def say_table(report: dict[str, dict]) -> None:
    """Print the figures on stdout, an engine a line."""
    print(f"{'engine':<16}{'tokens/s':>10}{'lowest':>10}{'highest':>10}{'x one':>8}{'/ vLLM':>8}")
    for engine, row in report.items():
        share = f"{row['share_of_vllm']:.2f}" if "share_of_vllm" in row else ""
        print(
            f"{engine:<16}{row['tokens_per_second']:>10.1f}{row['lowest']:>10.1f}"
            f"{row['highest']:>10.1f}{row['times_one_at_a_time']:>8.1f}{share:>8}"
        )


if __name__ == "__main__":
    run_cli(main)
