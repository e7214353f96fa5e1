"""Sample texts from a causal language model, with or without a LoRA adapter.

    accelerate launch inference.py --instruction_file utils/syn_instruct.txt \\
        --model_name data/quickstart_model --adapter_path outputs/mine/adapter --job_sess mine \\
        --max_seq_len 128 --top_p 0.95 --prompt_style uncond_generation --num_samples 1000

`generate_inference_command.py` prints this line. Samples are appended to
inference_outputs/JOB_SESS/shard-RANK.jsonl as they are finished, one object a line: id (the
sample's number, which later stages call sample_id), prompt, topic (its number, with
--topic_histogram), text, num_tokens (an end-of-sequence token included), finish_reason (stop,
length, or prompt_too_long for a prompt that leaves no room).
The same command again draws what is missing, and the texts do not depend on how often it was
stopped.
"""

from utils.command_line.parser import answer_early, read_flags
from utils.command_line.sampling_flags import (
    SamplingSettings,
    adapter_weights,
    check_adapter,
    check_sampling_settings,
    describe_decoding,
    read_instructions,
)

answer_early(__name__, SamplingSettings, __doc__)

import json
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache, partial
from importlib.metadata import packages_distributions, version
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, run_cli, say
from utils.files import JsonlAppender, sha256_of, write_json
from utils.folders import tidied
from utils.models.adapter_info import read_adapter_info
from utils.models.footprint import GIB
from utils.models.loading import (
    load_base_model,
    load_skeleton,
    load_tokenizer,
    model_fingerprint,
    quiet_libraries,
    resolve_dtype,
    share_cores,
)
from utils.models.lora import attach_saved, load_adapted
from utils.models.memory import PeakMemory
from utils.progress import Progress
from utils.runs.distributed import on_main_process
from utils.runs.preflight import (
    check_positions,
    embedding_rows,
    require_gpus,
    require_room,
    require_vocabulary,
)
from utils.runs.stopping import StopRequest, launched_by_accelerate
from utils.sampling.decoding import LENGTH, STOP, Completion, Decoding, Request
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
from utils.texts.prompts import (
    INSTRUCTION_STYLES,
    UNCONDITIONAL,
    Instruction,
    check_style,
    fix_date,
    is_dated,
    prompt_ids,
)

SAVE_SECONDS = 1.0
# Flags that decide what the texts are; samples that were drawn with other values do not mix.
SHARED = (
    "prompt_style", "max_seq_len", "max_new_tokens", "no_sample", "top_k", "top_p", "temperature",
    "repetition_penalty", "seed", "engine", "no_merge",
)  # fmt: skip
VERSIONED = ("torch", "transformers", "peft", "accelerate")
# Of each text of a rehearsal; and of a token on the disk, about.
REHEARSED_TOKENS, BYTES_OF_A_TOKEN = 32, 6
MERGED_MODEL = ".merged_model"  # in the run's folder while vLLM uses it


class Wanted:
    """The samples that a folder is to hold; copies of an instruction have consecutive numbers."""

    def __init__(self, instructions: list[Instruction]):
        self._instructions = instructions
        self._ends = list(accumulate(instruction.count for instruction in instructions))
        self.num_samples = self._ends[-1]

    def instruction(self, sample_id: int) -> Instruction:
        """The instruction, or topic, of a sample."""
        return self._instructions[bisect_right(self._ends, sample_id)]


@dataclass(frozen=True)
class Sampler:
    """What draws: a model, loaded or for an engine to load, its tokenizer, and how to decode."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    batch_size: int
    embedding_rows: int


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
    require_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
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
        held.enter_context(tidied(folder, folder.parent))

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
        tokenizer, dated = preflight(settings)
        if settings.check:
            if is_main:
                say("--check: nothing was found that would stop this run")
            return EXIT_OK
        shared |= dated
        sampler = prepare(settings, tokenizer, dtype, shared, wanted.num_samples, state)
        # From here on the processes need each other no more; each holds the folder until it ends.
        if not is_main:
            held.enter_context(rank_locked(folder, rank))
        state.wait_for_everyone()
        state.destroy_process_group()
        if settings.dry_run:
            rehearse(settings, sampler, wanted, missing, state)
            return EXIT_OK

        # -------------------------------------------------------------- sample
        if is_main:
            say_start(settings, wanted.num_samples, len(done), sampler.batch_size, state)
        stop = StopRequest()
        with (
            JsonlAppender(folder / f"shard-{rank}.jsonl") as shard,
            Progress(None, "sample", unit="sample", total=len(missing), hidden=not is_main) as bar,
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
        for name in ("instruction_file", "topic_histogram"):
            path = getattr(settings, name)
            shared[f"{name}_sha256"] = path and sha256_of(path)
    if settings.topic_histogram:
        # Which topic a sample has follows from it.
        shared["num_samples"] = settings.num_samples
    return shared


def preflight(settings: SamplingSettings) -> tuple[PreTrainedTokenizerBase, dict]:
    """Refuse what model, tokenizer or adapter would not bear, before weights are loaded.

    Returns:
        The tokenizer; and what else the samples share: the day that their prompts hold, if any.

    Raises:
        UsageError: see `utils.runs.preflight`.
    """
    quiet_libraries()
    tokenizer, skeleton = load_tokenizer(settings.model_name), load_skeleton(settings.model_name)
    day = None
    if is_dated(tokenizer, settings.prompt_style):
        day = on_main_process(partial(date_of_prompts, settings))
        fix_date(tokenizer, day)
    notices = check_style(tokenizer, settings.prompt_style)
    notices += check_positions(skeleton, settings.max_seq_len)
    require_vocabulary(embedding_rows(skeleton), tokenizer, 0)
    if settings.adapter_path:
        attach_saved(
            skeleton, settings.model_name, settings.adapter_path, merge=not settings.no_merge
        )
    if PartialState().is_main_process:
        require_room(settings.folder, 0)
        for notice in notices:
            say(f"warning: {notice}")
    return tokenizer, {"prompt_date": day} if day else {}


def date_of_prompts(settings: SamplingSettings) -> str:
    """The day of the adapter's training, or of the samples that are there, or this day."""
    manifest, info = settings.folder / MANIFEST_FILE, {}
    if settings.adapter_path:
        info = read_adapter_info(settings.adapter_path)
    if "prompt_date" not in info and manifest.exists():
        info = json.loads(manifest.read_text())
    return info.get("prompt_date") or date.today().isoformat()


def prepare(
    settings: SamplingSettings,
    tokenizer: PreTrainedTokenizerBase,
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
    if state.is_main_process and not settings.is_rehearsal:
        write_manifest(folder, settings, shared, num_samples)
    rows = embedding_rows(model)
    if settings.engine == "vllm":
        found, batch_size = model_folder(settings, model, tokenizer, folder / MERGED_MODEL, state)
        return Sampler(found, tokenizer, decoding, batch_size, rows)
    model = model.to(state.device).eval()
    batch_size = settings.perdevice_bs or fitting_batch_size(model, settings.max_seq_len)
    return Sampler(model, tokenizer, decoding, batch_size, rows)


def draw(
    settings: SamplingSettings,
    sampler: Sampler,
    wanted: Wanted,
    missing: list[int],
    shard: JsonlAppender,
    bar: Progress,
    stop: StopRequest,
) -> Drawn:
    """Draw the `missing` samples, or until `stop`, and append them to `shard` now and then."""
    tokenizer = sampler.tokenizer
    began = saved_at = time.monotonic()

    @lru_cache(maxsize=1024)
    def prompt_of(instruction: str) -> list[int]:
        ids = prompt_ids(tokenizer, settings.prompt_style, instruction)
        require_vocabulary(sampler.embedding_rows, tokenizer, max(ids))
        return ids

    def requests() -> Iterator[Request]:
        nonlocal began
        began = time.monotonic()  # an engine that compiles first has taken none yet
        for sample_id in missing:
            yield Request(sample_id, prompt_of(wanted.instruction(sample_id).text))

    def record(completion: Completion) -> dict:
        tokens = completion.tokens
        text = tokenizer.decode(
            tokens[:-1] if completion.finish_reason == STOP else tokens,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        asked = wanted.instruction(completion.sample_id)
        return {
            "id": completion.sample_id,
            "prompt": asked.text,
            **({} if asked.topic is None else {"topic": asked.topic}),
            # What parts an answer from its prompt belongs to neither.
            "text": text if settings.prompt_style in INSTRUCTION_STYLES else text.strip(),
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


def rehearse(
    settings: SamplingSettings,
    sampler: Sampler,
    wanted: Wanted,
    missing: list[int],
    state: PartialState,
) -> None:
    """Draw a batch of short texts, which go nowhere, and say what the run would take at most."""
    decoding = replace(sampler.decoding, max_new_tokens=REHEARSED_TOKENS, stop_ids=frozenset())
    most = settings.max_new_tokens or settings.max_seq_len
    prompt = prompt_ids(sampler.tokenizer, settings.prompt_style, wanted.instruction(0).text)
    count = max(1, min(sampler.batch_size, len(missing)))
    requests = [Request(number, prompt) for number in range(count)]
    with PeakMemory(state.device) as memory:
        began = time.monotonic()
        drawn = complete(
            settings.engine, sampler.model, iter(requests), decoding, sampler.batch_size,
            lambda: False,
        )  # fmt: skip
        tokens = sum(len(completion.tokens) for completion in drawn)
        seconds = time.monotonic() - began
    if state.is_main_process:
        shutil.rmtree(settings.folder / MERGED_MODEL, ignore_errors=True)
        needed = len(missing) * min(most, settings.max_seq_len)
        say(
            f"--dry_run: {tokens / seconds:.0f} tokens/s a process, "
            f"{needed / max(1, tokens) * seconds / 3600:.3g} h at most for "
            f"{len(missing) * state.num_processes:,} texts, if every one is as long as it may be; "
            f"{memory.peak / GIB:.3g} GiB of memory, "
            f"{needed * state.num_processes * BYTES_OF_A_TOKEN / 1e6:,.1f} MB of disk"
        )


def write_manifest(
    folder: Path, settings: SamplingSettings, shared: dict, num_samples: int
) -> None:
    """Write what the samples in `folder` share, before the first of them is written."""
    path = folder / MANIFEST_FILE
    seconds = json.loads(path.read_text()).get("seconds", 0.0) if path.exists() else 0.0
    names = {
        name: getattr(settings, name)
        for name in ("model_name", "adapter_path", "instruction_file", "topic_histogram")
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
    reasons = set(done.values())
    if not reasons & {STOP, LENGTH}:
        say(f"no text in {folder} can be used: no prompt left room; use a greater --max_seq_len")
        return EXIT_FAILED
    if STOP not in reasons:
        say(
            f"warning: every text in {folder} was cut at its greatest length, and later stages "
            "take whole ones; use a greater --max_seq_len, or an adapter that has learnt to end"
        )
    say(f"all {num_samples:,} samples are in {folder}")
    return EXIT_OK


if __name__ == "__main__":
    run_cli(main)
