"""Sampling: engines behind one interface, and the folder that a stopped run goes on with."""

import fcntl
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
)

from utils.cli import UsageError
from utils.decoding import (
    PROMPT_TOO_LONG,
    Completion,
    Decoding,
    Drawer,
    Request,
    completion_of,
    uniform_bits,
)
from utils.files import read_jsonl
from utils.ragged_attention import NAME as RAGGED_SDPA
from utils.ragged_attention import ragged_attention
from utils.vllm_engine import ModelFolder, vllm_engine

MANIFEST_FILE = "manifest.json"
MAX_BATCH_SIZE_ON_CPU, MAX_BATCH_SIZE = 64, 128
# Most texts are far shorter than max_seq_len, so that more of them share the same memory.
REQUESTS_PER_SEQUENCE_ON_GPU = 4

Model = PreTrainedModel | ModelFolder
Engine = Callable[
    [Model, Iterable[Request], Decoding, int, Callable[[], bool]], Iterator[Completion]
]


def complete(
    engine: str,
    model: Model,
    requests: Iterable[Request],
    decoding: Decoding,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Completion]:
    """Draw a text for every request, in whatever order they are finished.

    Args:
        engine: a name in `ENGINES`.
        model: a `ModelFolder` for vllm, which loads it itself.
        batch_size: sequences of `max_seq_len` tokens whose keys and values fit on the device.
        should_stop: asked often; once it is true, unfinished texts are dropped and this ends.

    Yields:
        One completion a request. A prompt without room for a token gets an empty one.

    Raises:
        UsageError: the model's logits are no numbers, or it does not fit in memory.
    """
    too_long = deque()

    def fitting() -> Iterator[Request]:
        for request in requests:
            if decoding.limit(request.prompt) > 0:
                yield request
            else:
                too_long.append(Completion(request.id, [], PROMPT_TOO_LONG))

    drawn = ENGINES[engine](model, fitting(), decoding, batch_size, should_stop)
    with closing(drawn):
        for completion in drawn:
            yield completion
            while too_long:
                yield too_long.popleft()
    yield from too_long


def fitting_batch_size(model: PreTrainedModel, max_seq_len: int) -> int:
    """How many sequences of `max_seq_len` tokens a share of the device's memory holds."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        # Logits, their sorted copies and activations take their share of the rest.
        share, most = 0.6, MAX_BATCH_SIZE
    else:
        # Of all memory: what is free just now depends on what the system keeps of files.
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        share, most = 0.125, MAX_BATCH_SIZE_ON_CPU
    return max(1, min(most, int(share * free) // cache_bytes(model, max_seq_len)))


def cache_bytes(model: PreTrainedModel, max_seq_len: int) -> int:
    """Size of the keys and values of one sequence."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * max_seq_len


# ---------------------------------------------------------------------- static batches


class StaticDraw(LogitsProcessor):
    """The draw for the rows of a left-padded batch."""

    def __init__(self, batch: list[Request], width: int, seed: int, drawer: Drawer):
        self._rows = [(str(request.id), width - len(request.prompt)) for request in batch]
        self._seed = seed
        self._drawer = drawer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        bits = [uniform_bits(self._seed, id, length - padding) for id, padding in self._rows]
        return self._drawer(scores, torch.tensor(bits, device=scores.device))


class RowLimits(StoppingCriteria):
    """Ends a row at its own length, and all of them at a request to stop."""

    def __init__(self, lengths: torch.Tensor, should_stop: Callable[[], bool]):
        self._lengths = lengths
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        return (input_ids.shape[1] >= self._lengths) | self._should_stop()


def static_engine(
    model: PreTrainedModel,
    requests: Iterable[Request],
    decoding: Decoding,
    batch_size: int,
    should_stop: Callable[[], bool],
    batches_sorted_together: int = 64,
) -> Iterator[Completion]:
    """`generate` on left-padded batches of prompts of similar length."""
    # What a model brings along (its own temperature, top-p, length) decides nothing here.
    model.generation_config = GenerationConfig()
    drawer = Drawer(decoding, model.device)
    requests = iter(requests)
    while pool := list(islice(requests, batch_size * batches_sorted_together)):
        pool.sort(key=lambda request: len(request.prompt))
        for start in range(0, len(pool), batch_size):
            batch = pool[start : start + batch_size]
            width = len(batch[-1].prompt)
            padded = [[0] * (width - len(r.prompt)) + r.prompt for r in batch]
            mask = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch]
            limits = [decoding.limit(request.prompt) for request in batch]
            draw_tokens = StaticDraw(batch, width, decoding.seed, drawer)
            lengths = torch.tensor([width + limit for limit in limits], device=model.device)
            output = model.generate(
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(limits),
                    repetition_penalty=decoding.repetition_penalty,
                    eos_token_id=sorted(decoding.stop_ids),
                    pad_token_id=0,
                ),
                logits_processor=LogitsProcessorList([draw_tokens]),
                stopping_criteria=[RowLimits(lengths, should_stop)],
            )
            if should_stop():
                return
            drawer.check()
            for request, limit, tokens in zip(batch, limits, output[:, width:].tolist()):
                yield completion_of(request.id, tokens[:limit], decoding.stop_ids)


# ---------------------------------------------------------------------- continuous batching


def continuous_draw(seed: int, drawer: Drawer):
    """The draw for whatever requests share a forward pass, as continuous batching takes it."""
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
    )

    class ContinuousDraw(ContinuousBatchingLogitsProcessor):
        supported_kwargs: dict[str, type] = {}
        ignored_kwargs: tuple[str, ...] = ()

        def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list) -> torch.Tensor:
            states = [request.state for request in requests_with_new_token]
            # `position_offset` counts the tokens in the cache after this pass: the new one's
            # position.
            bits = [uniform_bits(seed, s.request_id, s.position_offset) for s in states]
            return torch.tensor(bits, dtype=torch.int32)

        def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
            return drawer(scores, tensor_arg[: len(scores)])

    return ContinuousDraw()


def continuous_engine(
    model: PreTrainedModel,
    requests: Iterable[Request],
    decoding: Decoding,
    batch_size: int,
    should_stop: Callable[[], bool],
) -> Iterator[Completion]:
    """Continuous batching: a finished text makes room for the next one at once.

    The one place that knows transformers' continuous batching, whose arguments and attributes
    move between minor versions.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessorList,
    )

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model.generation_config = GenerationConfig()
    if model.device.type == "cuda":
        # Flash attention's decoding kernel takes pages of 256.
        page_size, max_requests = 256, REQUESTS_PER_SEQUENCE_ON_GPU * batch_size
    else:
        page_size, max_requests = 32, batch_size
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=batch_size * math.ceil(decoding.max_seq_len / page_size),
        max_batch_tokens=max(512, max_requests),
        max_requests_per_batch=max_requests,
        allow_block_sharing=False,
    )
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False), continuous_batching_config=config
    )
    drawer = Drawer(decoding, model.device)
    processors = LogitsProcessorList([continuous_draw(decoding.seed, drawer)])
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(processors)
    # Its one row of arguments; the list counts those of processors that it converts itself.
    manager.logit_processor.tensors_required = 1
    attention = model.config._attn_implementation
    if attention == "sdpa" and model.device.type == "cpu":
        AttentionInterface.register(RAGGED_SDPA, ragged_attention)
        model.set_attn_implementation(RAGGED_SDPA)
    try:
        manager.warmup()
    except MemoryError as error:
        raise UsageError(
            f"--perdevice_bs {batch_size} sequences of --max_seq_len {decoding.max_seq_len} do not "
            f"fit in memory; lower one of them ({error})"
        ) from None

    requests = iter(requests)
    under_way = 0
    manager.start()
    try:
        while not should_stop():
            drawer.check()
            # A short queue keeps the engine full, and its scheduler's walk through it short.
            for request in islice(requests, 2 * max_requests - under_way):
                manager.add_request(
                    request.prompt,
                    request_id=str(request.id),
                    max_new_tokens=decoding.limit(request.prompt),
                    eos_token_id=sorted(decoding.stop_ids),
                )
                under_way += 1
            if not under_way:
                return
            result = manager.get_result(timeout=0.1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching ended before its requests")
                continue
            if result.error:
                raise RuntimeError(f"{result.error}; --engine static may do without")
            under_way -= 1
            yield completion_of(int(result.request_id), result.generated_tokens, decoding.stop_ids)
    finally:
        manager.stop(hard_stop=True)
        model.set_attn_implementation(attention)


ENGINES: dict[str, Engine] = {
    "continuous": continuous_engine,
    "static": static_engine,
    "vllm": vllm_engine,
}


# ---------------------------------------------------------------------- the folder of samples


def lock_folder(folder: Path, *, shared: bool) -> TextIO:
    """Keep other runs out of `folder` until what is returned is closed, or the process ends.

    The first process of a run takes the lock for itself, and shares it with the others once the
    folder is in order. A run's lock lasts as long as any of its processes.

    Raises:
        UsageError: another run has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")  # noqa: SIM115 (the caller holds it)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UsageError(
            f"another run is sampling into {folder}; wait for its end, stop it, or use another "
            "--job_sess"
        ) from None
    return lock


def wait_for_other_processes(lock: TextIO) -> None:
    """Return when no other process of this run shares the lock any more."""
    fcntl.flock(lock, fcntl.LOCK_EX)


def check_manifest(folder: Path, settings: dict) -> None:
    """Refuse to add samples to others that were drawn with other settings.

    Args:
        settings: what this run is to share with the samples in `folder`.

    Raises:
        UsageError: names the setting, the value of the samples there, and this run's.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        if any(folder.glob("shard-*.jsonl")):
            raise UsageError(f"{folder} holds samples without {MANIFEST_FILE}; use another "
                             "--job_sess")  # fmt: skip
        return
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise UsageError(f"{path} is damaged; use another --job_sess")
    for name, value in settings.items():
        if name in there and there[name] != value:
            raise UsageError(
                f"{folder} holds samples with {name} {there[name]}, not {value}; use that one, or "
                "another --job_sess"
            )


def finish_reasons(folder: Path) -> dict[int, str]:
    """Why each sample in `folder` ended, by its id; what is not in here is still to be drawn.

    Raises:
        UsageError: a line is no sample, or a sample is there twice.
    """
    reasons = {}
    for shard in sorted(folder.glob("shard-*.jsonl")):
        for number, record in enumerate(read_jsonl(shard), start=1):
            id, reason = record.get("id"), record.get("finish_reason")
            if not (type(id) is int and isinstance(reason, str)):
                raise UsageError(f"{shard}, line {number} is no sample: it lacks id or "
                                 "finish_reason; remove it, or use another --job_sess")  # fmt: skip
            if id in reasons:
                raise UsageError(f"{shard}, line {number}: sample {id} is there a second time; "
                                 "remove one of them, or use another --job_sess")  # fmt: skip
            reasons[id] = reason
    return reasons
