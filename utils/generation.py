"""Sampling: two engines that draw the same texts, and the folder that a stopped run goes on with.

Every token is drawn from one uniform number, a hash of (seed, id of the sample, position). So a
sample's text is decided by the seed, its id, its prompt and the model: whatever else is in the
batch, however many processes there are, and however often the run was stopped. (Floating-point
sums hang on the shape of a batch, so that a token whose number falls on the very border between
two may differ.) This is more than a convenience: a run that drew afresh after every stop would
keep the short texts, which are finished first, and redraw the long ones.
"""

import fcntl
import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from utils.cli import UsageError
from utils.files import read_jsonl

STOP, LENGTH, PROMPT_TOO_LONG = "stop", "length", "prompt_too_long"
MANIFEST_FILE = "manifest.json"
BATCH_SIZE_ON_CPU, MAX_BATCH_SIZE = 16, 128
# Most texts are far shorter than max_seq_len, so that more of them share the same memory. On a CPU
# more at once costs more: attention without a varlen kernel grows with the square.
REQUESTS_PER_SEQUENCE_ON_GPU = 4


@dataclass(frozen=True)
class Decoding:
    """How a text follows its prompt.

    Attributes:
        max_seq_len: longest prompt and text together, in tokens.
        max_new_tokens: longest text; None is what the prompt leaves of `max_seq_len`.
        stop_ids: tokens that end a text.
    """

    max_seq_len: int
    max_new_tokens: int | None
    no_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    stop_ids: frozenset[int]

    def limit(self, prompt: list[int]) -> int:
        """The most tokens that may follow `prompt`; 0 or less if it leaves no room."""
        room = self.max_seq_len - len(prompt)
        return room if self.max_new_tokens is None else min(room, self.max_new_tokens)

    def warpers(self) -> list[LogitsProcessor]:
        """What shapes the distribution that tokens are drawn from, in the order of `generate`."""
        found = []
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return found


@dataclass(frozen=True)
class Request:
    """A prompt, as token ids, and the id of the sample to draw for it."""

    id: int
    prompt: list[int]


@dataclass(frozen=True)
class Completion:
    """The tokens drawn for a request, a stop token included, and why there are no more."""

    id: int
    tokens: list[int]
    finish_reason: str


Engine = Callable[
    [PreTrainedModel, Iterable[Request], Decoding, int, Callable[[], bool]], Iterator[Completion]
]


def complete(
    engine: str,
    model: PreTrainedModel,
    requests: Iterable[Request],
    decoding: Decoding,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Completion]:
    """Draw a text for every request, in whatever order they are finished.

    Args:
        engine: a name in `ENGINES`.
        batch_size: sequences of `max_seq_len` tokens whose keys and values fit on the device.
        should_stop: asked often; once it is true, unfinished texts are dropped and this ends.

    Yields:
        One completion a request. A prompt without room for a token gets an empty one.
    """
    too_long = deque()

    def fitting() -> Iterator[Request]:
        for request in requests:
            if decoding.limit(request.prompt) > 0:
                yield request
            else:
                too_long.append(Completion(request.id, [], PROMPT_TOO_LONG))

    # What a model brings along (its own temperature, top-p, length) decides nothing here.
    model.generation_config = GenerationConfig()
    drawn = ENGINES[engine](model, fitting(), decoding, batch_size, should_stop)
    with closing(drawn):
        for completion in drawn:
            yield completion
            while too_long:
                yield too_long.popleft()
    yield from too_long


def fitting_batch_size(model: PreTrainedModel, max_seq_len: int) -> int:
    """How many sequences of `max_seq_len` a GPU's free memory holds; a fixed number on a CPU."""
    if model.device.type != "cuda":
        return BATCH_SIZE_ON_CPU
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(model.device)
    # Logits, their sorted copies and activations take their share of the rest.
    return max(1, min(MAX_BATCH_SIZE, int(0.6 * free) // (token_bytes * max_seq_len)))


# ---------------------------------------------------------------------- drawing a token


def uniform_bits(seed: int, sample: str, position: int) -> int:
    """32 bits, as a signed integer, for the token of `sample` at `position`."""
    digest = hashlib.blake2b(f"{seed} {sample} {position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def draw(scores: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Draw a token from each row's softmax by inverting its distribution function.

    Args:
        scores: processed logits [rows, vocabulary]; -inf is never drawn.
        bits: integers of 32 random bits [rows].

    Returns:
        Logits that are 0 at the drawn token and -inf elsewhere, for an engine that takes the
        likeliest token.
    """
    uniform = ((bits.long() & 0xFFFFFFFF).double() + 0.5) / 2**32
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    # Scaled by the last sum, which is not quite 1, so that the search always ends inside.
    targets = uniform.unsqueeze(-1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)
    return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)


# ---------------------------------------------------------------------- static batches


class StaticDraw(LogitsProcessor):
    """`draw` for the rows of a left-padded batch."""

    def __init__(self, batch: list[Request], width: int, seed: int):
        self._rows = [(str(request.id), width - len(request.prompt)) for request in batch]
        self._seed = seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        bits = [uniform_bits(self._seed, id, length - padding) for id, padding in self._rows]
        return draw(scores, torch.tensor(bits, device=scores.device))


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
    requests = iter(requests)
    while pool := list(islice(requests, batch_size * batches_sorted_together)):
        pool.sort(key=lambda request: len(request.prompt))
        for start in range(0, len(pool), batch_size):
            batch = pool[start : start + batch_size]
            width = len(batch[-1].prompt)
            padded = [[0] * (width - len(r.prompt)) + r.prompt for r in batch]
            mask = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch]
            limits = [decoding.limit(request.prompt) for request in batch]
            processors = LogitsProcessorList()
            if not decoding.no_sample:
                draw_tokens = StaticDraw(batch, width, decoding.seed)
                processors = LogitsProcessorList([*decoding.warpers(), draw_tokens])
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
                logits_processor=processors,
                stopping_criteria=[RowLimits(lengths, should_stop)],
            )
            if should_stop():
                return
            for request, limit, tokens in zip(batch, limits, output[:, width:].tolist()):
                yield _cut(request.id, tokens[:limit], decoding.stop_ids)


def _cut(id: int, tokens: list[int], stop_ids: frozenset[int]) -> Completion:
    """A completion that ends with the first stop token, or with the last token."""
    for number, token in enumerate(tokens, start=1):
        if token in stop_ids:
            return Completion(id, tokens[:number], STOP)
    return Completion(id, tokens, LENGTH)


# ---------------------------------------------------------------------- continuous batching


class ContinuousDraw(ContinuousBatchingLogitsProcessor):
    """`draw` for whatever requests share a forward pass."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, seed: int):
        self._seed = seed

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list) -> torch.Tensor:
        states = [request.state for request in requests_with_new_token]
        # `position_offset` counts the tokens in the cache after this pass: the new one's position.
        bits = [uniform_bits(self._seed, s.request_id, s.position_offset) for s in states]
        return torch.tensor(bits, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return draw(scores, tensor_arg[: len(scores)])


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
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
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
    if not decoding.no_sample:
        processors = LogitsProcessorList([*decoding.warpers(), ContinuousDraw(decoding.seed)])
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(processors)
        # Its one row of arguments; the list counts those of processors that it converts itself.
        manager.logit_processor.tensors_required = 1
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
            yield _cut(int(result.request_id), result.generated_tokens, decoding.stop_ids)
    finally:
        manager.stop(hard_stop=True)


ENGINES: dict[str, Engine] = {"continuous": continuous_engine, "static": static_engine}


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
    there = json.loads(path.read_text())
    for name, value in settings.items():
        if name in there and there[name] != value:
            raise UsageError(
                f"{folder} holds samples with {name} {there[name]}, not {value}; use that one, or "
                "another --job_sess"
            )


def finish_reasons(folder: Path) -> dict[int, str]:
    """Why each sample in `folder` ended, by its id; what is not in here is still to be drawn."""
    return {
        record["id"]: record["finish_reason"]
        for shard in sorted(folder.glob("shard-*.jsonl"))
        for record in read_jsonl(shard)
    }
