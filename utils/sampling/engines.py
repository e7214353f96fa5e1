"""Sampling engines behind one interface, and the batch size that fits a device."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from itertools import islice
from typing import TypeAlias

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
)

from utils.sampling.continuous import continuous_engine
from utils.sampling.decoding import (
    PROMPT_TOO_LONG,
    Completion,
    Decoding,
    Drawer,
    Request,
    completion_of,
    own_settings_aside,
    uniform_bits,
)
from utils.sampling.vllm_engine import ModelFolder, vllm_engine

MAX_BATCH_SIZE_ON_CPU, MAX_BATCH_SIZE = 64, 128

Model: TypeAlias = PreTrainedModel | ModelFolder
Engine = Callable[
    [Model, Iterable[Request], Decoding, int, Callable[[], bool]],
    Generator[Completion, None, None],
]


def complete(
    engine: str,
    model: Model,
    requests: Iterable[Request],
    decoding: Decoding,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[Completion, None, None]:
    """Draw a text for every request, in whatever order they are finished.

    Args:
        engine: a name in `ENGINES`.
        model: a `ModelFolder` for vllm, which loads it itself.
        batch_size: sequences of `max_seq_len` tokens whose keys and values fit on the device.
        should_stop: asked often; once it is true, unfinished texts are dropped and this ends.

    Yields:
        One completion a request. A prompt without room for a token gets an empty one.

    Raises:
        UsageError: the model's logits are not finite, or it does not fit in memory.
    """
    too_long: deque[Completion] = deque()

    def fitting() -> Iterator[Request]:
        for request in requests:
            if decoding.limit(request.prompt) > 0:
                yield request
            else:
                too_long.append(Completion(request.sample_id, [], PROMPT_TOO_LONG))

    loaded = isinstance(model, PreTrainedModel)
    drawn = ENGINES[engine](model, fitting(), decoding, batch_size, should_stop)
    with own_settings_aside(model) if loaded else nullcontext(), closing(drawn):
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
        self._rows = [(str(request.sample_id), width - len(request.prompt)) for request in batch]
        self._seed = seed
        self._drawer = drawer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        bits = [
            uniform_bits(self._seed, sample, length - padding) for sample, padding in self._rows
        ]
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
) -> Generator[Completion, None, None]:
    """`generate` on left-padded batches of prompts of similar length."""
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
                yield completion_of(request.sample_id, tokens[:limit], decoding.stop_ids)


ENGINES: dict[str, Engine] = {
    "continuous": continuous_engine,
    "static": static_engine,
    "vllm": vllm_engine,
}
