"""Sample texts from a causal language model, with or without a LoRA adapter.

    accelerate launch inference.py --instruction_file utils/syn_instruct.txt \\
        --model_name data/quickstart_model --adapter_path outputs/mine/adapter --job_sess mine \\
        --max_seq_len 128 --top_p 0.95 --prompt_style uncond_generation --num_samples 1000

`generate_inference_command.py` prints this line. Samples are appended to
inference_outputs/JOB_SESS/shard-RANK.jsonl as they are finished, one object a line: id (the
sample's number, which later stages call sample_id), prompt, text, num_tokens (an end-of-sequence
token included), finish_reason (stop, length, or prompt_too_long for a prompt that leaves no room).
The same command again draws what is missing, and the texts do not depend on how often it was
stopped.
"""

import json
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import packages_distributions, version
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, run_cli, say
from utils.command_line.parser import read_flags
from utils.command_line.sampling_flags import (
    SamplingSettings,
    adapter_weights,
    check_adapter,
    check_sampling_settings,
    describe_decoding,
    read_instructions,
)
from utils.files import JsonlAppender, sha256_of, write_json
from utils.models.loading import (
    load_base_model,
    load_tokenizer,
    model_fingerprint,
    quiet_libraries,
    resolve_dtype,
    share_cores,
)
from utils.models.lora import load_adapted
from utils.runs.distributed import on_main_process
from utils.runs.stopping import StopRequest, launched_by_accelerate
from utils.sampling.decoding import STOP, Completion, Decoding, Request
from utils.sampling.engines import Model, cache_bytes, complete, fitting_batch_size
from utils.sampling.shards import (
    MANIFEST_FILE,
    check_manifest,
    finish_reasons,
    rank_locked,
    shards_of,
    wait_for_other_ranks,
)
from utils.sampling.vllm_engine import MAX_SEQUENCES_ON_GPU, ModelFolder, check_vllm
from utils.texts.prompts import UNCONDITIONAL, Instruction, prompt_ids

SAVE_SECONDS = 1.0
# Flags that decide what the texts are; samples that were drawn with other values do not mix.
SHARED = (
    "prompt_style", "max_seq_len", "max_new_tokens", "no_sample", "top_k", "top_p", "temperature",
    "repetition_penalty", "seed", "engine", "no_merge",
)  # fmt: skip
VERSIONED = ("torch", "transformers", "peft", "accelerate")
MERGED_MODEL = ".merged_model"  # in the run's folder while vLLM uses it


class Wanted:
    """The samples that a folder is to hold; copies of an instruction have consecutive numbers."""

    def __init__(self, instructions: list[Instruction]):
        self._instructions = instructions
        self._ends = list(accumulate(instruction.count for instruction in instructions))
        self.num_samples = self._ends[-1]

    def instruction(self, sample_id: int) -> str:
        """The instruction of a sample."""
        return self._instructions[bisect_right(self._ends, sample_id)].text


@dataclass(frozen=True)
class Sampler:
    """What draws: a model, loaded or for an engine to load, its tokenizer, and how to decode."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    batch_size: int


@dataclass(frozen=True)
class Drawn:
    """What one process drew."""

    num_samples: int
    num_tokens: int
    seconds: float


def main(argv: list[str] | None = None) -> int:
    # ------------------------------------------------------------------ what is asked for
    settings, notices = check_sampling_settings(read_flags(SamplingSettings, __doc__, argv))
    notices += check_adapter(settings.adapter_path, settings.prompt_style)
    if settings.engine == "vllm":
        check_vllm()
    wanted = Wanted(read_instructions(settings))
    folder = settings.folder
    state = PartialState(cpu=not torch.cuda.is_available())
    rank, num_ranks, is_main = state.process_index, state.num_processes, state.is_main_process
    if state.device.type == "cpu" and launched_by_accelerate():
        share_cores(num_ranks)
    dtype = resolve_dtype(settings.dtype, state.device)
    shared = shared_settings(settings, dtype)
    if is_main:
        for notice in notices:
            say(f"warning: {notice}")

    with ExitStack() as held:
        # -------------------------------------------------------------- the folder
        def claim() -> None:
            held.enter_context(rank_locked(folder, rank))
            check_manifest(folder, shared)

        on_main_process(claim)
        done = finish_reasons(folder)
        if all(sample_id in done for sample_id in range(wanted.num_samples)):
            if is_main:
                complete_manifest(folder, 0.0)
            return say_end(folder, done, wanted.num_samples)
        missing = [each for each in range(rank, wanted.num_samples, num_ranks) if each not in done]

        # -------------------------------------------------------------- the model
        sampler = prepare(settings, dtype, shared, wanted.num_samples, state)
        # From here on the processes need each other no more; each holds the folder until it ends.
        if not is_main:
            held.enter_context(rank_locked(folder, rank))
        state.wait_for_everyone()
        state.destroy_process_group()

        # -------------------------------------------------------------- sample
        if is_main:
            say_start(settings, wanted.num_samples, len(done), sampler.batch_size, state)
        stop = StopRequest()
        with (
            JsonlAppender(folder / f"shard-{rank}.jsonl") as shard,
            tqdm(total=len(missing), desc="sample", unit="sample", disable=not is_main) as bar,
        ):
            drawn = draw(settings, sampler, wanted, missing, shard, bar, stop)

        # -------------------------------------------------------------- the end
        if is_main:
            say(
                f"{drawn.num_samples:,} samples in {drawn.seconds:.1f} s on this process: "
                f"{drawn.num_samples / drawn.seconds:.2f} samples/s, "
                f"{drawn.num_tokens / drawn.seconds:.0f} tokens/s"
            )
            wait_for_other_ranks(folder, num_ranks)
            complete_manifest(folder, drawn.seconds)
            shutil.rmtree(folder / MERGED_MODEL, ignore_errors=True)
        if stop.requested:
            if is_main:
                say(f"stopped; the same command again goes on with what {folder} lacks")
            return EXIT_INTERRUPTED
        return say_end(folder, finish_reasons(folder), wanted.num_samples) if is_main else EXIT_OK


def shared_settings(settings: SamplingSettings, dtype: torch.dtype) -> dict:
    """What all samples in a folder share, as far as it is known before the model is loaded."""
    shared = {name: getattr(settings, name) for name in SHARED}
    shared["dtype"] = str(dtype).removeprefix("torch.")
    shared["adapter_sha256"] = None
    if settings.adapter_path:
        shared["adapter_sha256"] = sha256_of(adapter_weights(settings.adapter_path))
    if settings.prompt_style != UNCONDITIONAL:
        shared["instruction_file_sha256"] = sha256_of(settings.instruction_file)
    return shared


def prepare(
    settings: SamplingSettings,
    dtype: torch.dtype,
    shared: dict,
    num_samples: int,
    state: PartialState,
) -> Sampler:
    """Load the model, check it against the samples so far, and write their manifest.

    Args:
        shared: see `shared_settings`.

    Raises:
        UsageError: the folder holds samples of another model.
    """
    folder = settings.folder
    quiet_libraries()
    tokenizer = load_tokenizer(settings.model_name)
    if settings.adapter_path is None:
        model = load_base_model(settings.model_name, dtype)
    else:
        model = load_adapted(
            settings.model_name,
            settings.adapter_path,
            dtype,
            merge=not settings.no_merge,
            # vLLM fills the GPU by itself, with what is saved.
            device="cpu" if settings.engine == "vllm" else state.device,
        )
    shared = shared | {"model_fingerprint": model_fingerprint(model)}
    check_manifest(folder, shared)
    decoding = Decoding(
        max_seq_len=settings.max_seq_len,
        max_new_tokens=settings.max_new_tokens,
        no_sample=settings.no_sample,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        stop_ids=stop_ids_of(model, tokenizer),
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if state.is_main_process:
        if positions and settings.max_seq_len > positions:
            say(
                f"warning: --max_seq_len {settings.max_seq_len} goes beyond the {positions} "
                f"positions that {settings.model_name} was trained with"
            )
        write_manifest(folder, settings, shared, num_samples)
    if settings.engine == "vllm":
        found, batch_size = model_folder(settings, model, tokenizer, folder / MERGED_MODEL, state)
        return Sampler(found, tokenizer, decoding, batch_size)
    model = model.to(state.device).eval()
    batch_size = settings.perdevice_bs or fitting_batch_size(model, settings.max_seq_len)
    return Sampler(model, tokenizer, decoding, batch_size)


def draw(
    settings: SamplingSettings,
    sampler: Sampler,
    wanted: Wanted,
    missing: list[int],
    shard: JsonlAppender,
    bar: tqdm,
    stop: StopRequest,
) -> Drawn:
    """Draw the `missing` samples, or until `stop`, and append them to `shard` now and then."""
    tokenizer = sampler.tokenizer
    began = saved_at = time.monotonic()

    @lru_cache(maxsize=1024)
    def prompt_of(instruction: str) -> list[int]:
        return prompt_ids(tokenizer, settings.prompt_style, instruction)

    def requests() -> Iterator[Request]:
        nonlocal began
        began = time.monotonic()  # an engine that compiles first has taken none yet
        for sample_id in missing:
            yield Request(sample_id, prompt_of(wanted.instruction(sample_id)))

    def record(completion: Completion) -> dict:
        tokens = completion.tokens
        text = tokenizer.decode(
            tokens[:-1] if completion.finish_reason == STOP else tokens,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return {
            "id": completion.sample_id,
            "prompt": wanted.instruction(completion.sample_id),
            # What parts an answer from its prompt belongs to neither.
            "text": text if settings.prompt_style == UNCONDITIONAL else text.strip(),
            "num_tokens": len(tokens),
            "finish_reason": completion.finish_reason,
        }

    num_tokens, finished = 0, []
    completions = complete(
        settings.engine, sampler.model, requests(), sampler.decoding, sampler.batch_size,
        lambda: stop.requested,
    )  # fmt: skip
    with closing(completions):
        for completion in completions:
            finished.append(record(completion))
            num_tokens += len(completion.tokens)
            bar.update()
            now = time.monotonic()
            if now - saved_at >= SAVE_SECONDS:
                shard.append(finished)
                finished, saved_at = [], now
                bar.set_postfix_str(f"{num_tokens / (now - began):.0f} tokens/s")
        shard.append(finished)
    return Drawn(bar.n, num_tokens, time.monotonic() - began)


def write_manifest(
    folder: Path, settings: SamplingSettings, shared: dict, num_samples: int
) -> None:
    """Write what the samples in `folder` share, before the first of them is written."""
    path = folder / MANIFEST_FILE
    seconds = json.loads(path.read_text()).get("seconds", 0.0) if path.exists() else 0.0
    names = {
        name: getattr(settings, name) for name in ("model_name", "adapter_path", "instruction_file")
    }
    versions = {name: version(name) for name in VERSIONED}
    if settings.engine == "vllm":  # its CPU build has a distribution of another name
        versions["vllm"] = version(packages_distributions()["vllm"][0])
    manifest = {**shared, "num_samples": num_samples, **names, "versions": versions}
    write_json(path, manifest | {"seconds": seconds})


def complete_manifest(folder: Path, seconds: float) -> None:
    """Add what reports need of a run that has ended: its time, and the hashes of all shards."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["seconds"] = round(manifest.get("seconds", 0.0) + seconds, 3)
    hashes = {shard.name: sha256_of(shard) for shard in shards_of(folder)}
    write_json(path, manifest | {"outputs_sha256": hashes})


def model_folder(
    settings: SamplingSettings,
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
    batch_size = settings.perdevice_bs
    if batch_size is None and on_gpu:
        batch_size = MAX_SEQUENCES_ON_GPU
    elif batch_size is None:
        batch_size = fitting_batch_size(model, settings.max_seq_len)
    path, adapter = settings.model_name, settings.adapter_path if settings.no_merge else None
    if settings.adapter_path and not settings.no_merge:
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
        cache_bytes=batch_size * cache_bytes(model, settings.max_seq_len + 128),
    )
    return found, batch_size


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those that the model brings along."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return frozenset([tokenizer.eos_token_id, *own])


def say_start(
    settings: SamplingSettings,
    num_samples: int,
    num_done: int,
    batch_size: int,
    state: PartialState,
) -> None:
    """Tell what will be done."""
    say(
        f"{num_samples:,} samples, {num_done:,} of them drawn before; {describe_decoding(settings)}"
    )
    say(
        f"{settings.engine} engine, {state.num_processes} x {state.device.type}, {batch_size} "
        f"sequences of {settings.max_seq_len} tokens at once"
    )


def say_end(folder: Path, done: dict[int, str], num_samples: int) -> int:
    """Tell how the samples ended and where they are; the exit code says whether any is missing."""
    for reason, count in Counter(done.values()).most_common():
        say(f"  {reason:<20} {count:,}")
    missing = sum(sample_id not in done for sample_id in range(num_samples))
    if missing:
        say(f"{folder} lacks {missing:,} of {num_samples:,} samples: a process failed")
        return EXIT_FAILED
    say(f"all {num_samples:,} samples are in {folder}")
    return EXIT_OK


if __name__ == "__main__":
    run_cli(main)
