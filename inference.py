"""Sample texts from a causal language model, with or without a LoRA adapter.

    accelerate launch inference.py --instruction_file utils/syn_instruct.txt \\
        --model_name data/quickstart_model --adapter_path outputs/mine/adapter --job_sess mine \\
        --max_seq_len 128 --top_p 0.95 --prompt_style uncond_generation --num_samples 1000

`generate_inference_command.py` prints this line. Samples are appended to
inference_outputs/JOB_SESS/shard-RANK.jsonl as they are finished, one object a line: id, prompt,
text, num_tokens (an end-of-sequence token included), finish_reason (stop, length, or
prompt_too_long for a prompt that leaves no room). The same command again draws what is missing,
and the texts do not depend on how often it was stopped.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from importlib.metadata import packages_distributions, version
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UsageError, run_cli, say
from utils.command_line.parser import make_parser, run_folder
from utils.command_line.sampling_flags import (
    adapter_weights,
    add_sampling_arguments,
    check_adapter,
    check_sampling_arguments,
    describe_decoding,
    read_instructions,
)
from utils.files import JsonlAppender, write_json
from utils.folders import lock_folder
from utils.models.loading import (
    load_base_model,
    load_tokenizer,
    model_fingerprint,
    quiet_libraries,
    resolve_dtype,
    share_cores,
)
from utils.models.lora import load_adapted
from utils.runs.stopping import StopRequest, launched_by_accelerate
from utils.sampling.decoding import STOP, Completion, Decoding, Request
from utils.sampling.engines import cache_bytes, complete, fitting_batch_size
from utils.sampling.shards import (
    MANIFEST_FILE,
    check_manifest,
    finish_reasons,
    wait_for_other_processes,
)
from utils.sampling.vllm_engine import MAX_SEQUENCES_ON_GPU, ModelFolder, check_vllm
from utils.texts.prompts import UNCONDITIONAL, prompt_ids

SAVE_SECONDS = 1.0
# Flags that decide what the texts are; samples that were drawn with other values do not mix.
SETTINGS = (
    "prompt_style", "max_seq_len", "max_new_tokens", "no_sample", "top_k", "top_p", "temperature",
    "repetition_penalty", "seed", "engine", "no_merge",
)  # fmt: skip
VERSIONED = ("torch", "transformers", "peft", "accelerate")
MERGED_MODEL = ".merged_model"  # in the run's folder while vLLM uses it


def build_parser() -> argparse.ArgumentParser:
    """The command line of sampling."""
    parser = make_parser(__doc__)
    add_sampling_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    # ------------------------------------------------------------------ what is asked for
    args = build_parser().parse_args(argv)
    notices = check_sampling_arguments(args) + check_adapter(args.adapter_path, args.prompt_style)
    if args.engine == "vllm":
        check_vllm()
    instructions = read_instructions(args)
    ends = list(accumulate(instruction.count for instruction in instructions))
    folder = run_folder(args)
    state = PartialState(cpu=not torch.cuda.is_available())
    rank, num_ranks, is_main = state.process_index, state.num_processes, state.is_main_process
    if state.device.type == "cpu" and launched_by_accelerate():
        share_cores(num_ranks)
    dtype = resolve_dtype(args.dtype, state.device)
    settings = settings_of(args, dtype)
    if is_main:
        for notice in notices:
            say(f"warning: {notice}")

    # ------------------------------------------------------------------ the folder
    lock, refusal = None, None
    if is_main:
        try:
            lock = lock_folder(folder, shared=False)
            check_manifest(folder, settings)
        except UsageError as error:
            refusal = str(error)
    (refusal,) = broadcast_object_list([refusal])
    if refusal:
        raise UsageError(refusal)
    done = finish_reasons(folder)
    if all(id in done for id in range(ends[-1])):
        return say_end(folder, done, ends[-1])
    missing = [id for id in range(rank, ends[-1], num_ranks) if id not in done]

    # ------------------------------------------------------------------ model
    quiet_libraries()
    tokenizer = load_tokenizer(args.model_name)
    model, fingerprint = load_model(args, dtype)
    settings["model_fingerprint"] = fingerprint
    check_manifest(folder, settings)
    stop_ids = stop_ids_of(model, tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if is_main:
        if positions and args.max_seq_len > positions:
            say(
                f"warning: --max_seq_len {args.max_seq_len} goes beyond the {positions} positions "
                f"that {args.model_name} was trained with"
            )
        write_manifest(folder, args, settings, ends[-1])
    if args.engine == "vllm":
        model, batch_size = model_folder(args, model, tokenizer, folder / MERGED_MODEL, state)
    else:
        model = model.to(state.device).eval()
        batch_size = args.perdevice_bs or fitting_batch_size(model, args.max_seq_len)

    # From here on the processes need each other no more; each holds the folder until it ends.
    if is_main:
        lock.close()
        lock = lock_folder(folder, shared=True)
    state.wait_for_everyone()
    if not is_main:
        lock = lock_folder(folder, shared=True)
    state.destroy_process_group()

    # ------------------------------------------------------------------ sample
    decoding = Decoding(
        max_seq_len=args.max_seq_len,
        max_new_tokens=args.max_new_tokens,
        no_sample=args.no_sample,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop_ids=stop_ids,
    )

    began = time.monotonic()

    @lru_cache(maxsize=1024)
    def prompt_of(index: int) -> list[int]:
        return prompt_ids(tokenizer, args.prompt_style, instructions[index].text)

    def requests() -> Iterator[Request]:
        nonlocal began
        began = time.monotonic()  # an engine that compiles first has taken none yet
        for id in missing:
            yield Request(id, prompt_of(bisect_right(ends, id)))

    def record(completion: Completion) -> dict:
        tokens = completion.tokens
        text = tokenizer.decode(
            tokens[:-1] if completion.finish_reason == STOP else tokens,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return {
            "id": completion.id,
            "prompt": instructions[bisect_right(ends, completion.id)].text,
            # What parts an answer from its prompt belongs to neither.
            "text": text if args.prompt_style == UNCONDITIONAL else text.strip(),
            "num_tokens": len(tokens),
            "finish_reason": completion.finish_reason,
        }

    if is_main:
        say_start(args, ends[-1], len(done), batch_size, state.device, num_ranks)
    stop = StopRequest()
    saved_at = time.monotonic()
    num_tokens, finished = 0, []
    drawn = complete(args.engine, model, requests(), decoding, batch_size, lambda: stop.requested)
    with (
        closing(drawn),
        JsonlAppender(folder / f"shard-{rank}.jsonl") as shard,
        tqdm(total=len(missing), desc="sample", unit="sample", disable=not is_main) as progress,
    ):
        for completion in drawn:
            finished.append(record(completion))
            num_tokens += len(completion.tokens)
            progress.update()
            now = time.monotonic()
            if now - saved_at >= SAVE_SECONDS:
                shard.append(finished)
                finished, saved_at = [], now
                progress.set_postfix_str(f"{num_tokens / (now - began):.0f} tokens/s")
        shard.append(finished)

    # ------------------------------------------------------------------ the end
    seconds = time.monotonic() - began
    if is_main:
        say(
            f"{progress.n:,} samples in {seconds:.1f} s on this process: "
            f"{progress.n / seconds:.2f} samples/s, {num_tokens / seconds:.0f} tokens/s"
        )
        wait_for_other_processes(lock)
        add_seconds(folder, seconds)
        shutil.rmtree(folder / MERGED_MODEL, ignore_errors=True)
    if stop.requested:
        if is_main:
            say(f"stopped; the same command again goes on with what {folder} lacks")
        return EXIT_INTERRUPTED
    return say_end(folder, finish_reasons(folder), ends[-1]) if is_main else EXIT_OK


def settings_of(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """What all samples in a folder share, as far as it is known before the model is loaded."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["adapter_sha256"] = None
    if args.adapter_path:
        settings["adapter_sha256"] = sha256(adapter_weights(args.adapter_path))
    if args.prompt_style != UNCONDITIONAL:
        settings["instruction_file_sha256"] = sha256(args.instruction_file)
    return settings


def sha256(path: str | os.PathLike) -> str:
    """The hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path, args: argparse.Namespace, settings: dict, num_samples: int
) -> None:
    """Write what the samples in `folder` share, before the first of them is written."""
    path = folder / MANIFEST_FILE
    seconds = json.loads(path.read_text()).get("seconds", 0.0) if path.exists() else 0.0
    names = {
        name: getattr(args, name) for name in ("model_name", "adapter_path", "instruction_file")
    }
    versions = {name: version(name) for name in VERSIONED}
    if args.engine == "vllm":  # its CPU build has a distribution of another name
        versions["vllm"] = version(packages_distributions()["vllm"][0])
    manifest = {**settings, "num_samples": num_samples, **names, "versions": versions}
    write_json(path, manifest | {"seconds": seconds})


def add_seconds(folder: Path, seconds: float) -> None:
    """Count the time of a run that has ended to the manifest's, for reports."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    write_json(path, manifest | {"seconds": round(manifest["seconds"] + seconds, 3)})


def load_model(args: argparse.Namespace, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """The model to sample from, and its fingerprint."""
    if args.adapter_path is None:
        model = load_base_model(args.model_name, dtype)
        return model, model_fingerprint(model)
    model = load_adapted(args.model_name, args.adapter_path, dtype, merge=not args.no_merge)
    return model, model_fingerprint(model)


def model_folder(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    merged: Path,
    state: PartialState,
) -> tuple[ModelFolder, int]:
    """What vLLM loads in place of `model`, and how many sequences it may take at once.

    Args:
        merged: where the first process writes the model with its adapter, for all of them.
    """
    on_gpu = state.device.type == "cuda"
    batch_size = args.perdevice_bs
    if batch_size is None and on_gpu:
        batch_size = MAX_SEQUENCES_ON_GPU
    elif batch_size is None:
        batch_size = fitting_batch_size(model, args.max_seq_len)
    path, adapter = args.model_name, args.adapter_path if args.no_merge else None
    if args.adapter_path and not args.no_merge:
        path = str(merged)
        if state.is_main_process:
            shutil.rmtree(merged, ignore_errors=True)  # of a run that was killed
            model.generation_config = GenerationConfig()  # an odd one refuses to be saved
            model.save_pretrained(merged)
            tokenizer.save_pretrained(merged)
    found = ModelFolder(
        path=path,
        dtype=str(model.dtype).removeprefix("torch."),
        adapter=adapter,
        gpu=state.local_process_index if on_gpu else None,
        # Whole pages, so rounded up.
        cache_bytes=batch_size * cache_bytes(model, args.max_seq_len + 128),
    )
    return found, batch_size


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those that the model brings along."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return frozenset([tokenizer.eos_token_id, *own])


def say_start(
    args: argparse.Namespace,
    num_samples: int,
    num_done: int,
    batch_size: int,
    device: torch.device,
    num_ranks: int,
) -> None:
    """Tell what will be done."""
    say(f"{num_samples:,} samples, {num_done:,} of them there; {describe_decoding(args)}")
    say(
        f"{args.engine} engine, {num_ranks} x {device.type}, {batch_size} sequences of "
        f"{args.max_seq_len} tokens at once"
    )


def say_end(folder: Path, done: dict[int, str], num_samples: int) -> int:
    """Tell how the samples ended and where they are; the exit code says whether all are there."""
    for reason, count in Counter(done.values()).most_common():
        say(f"  {reason:<20} {count:,}")
    missing = sum(id not in done for id in range(num_samples))
    if missing:
        say(f"{folder} lacks {missing:,} of {num_samples:,} samples: a process failed")
        return EXIT_FAILED
    say(f"all {num_samples:,} samples are in {folder}")
    return EXIT_OK


if __name__ == "__main__":
    run_cli(main)
