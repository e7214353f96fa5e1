"""Continuous batching: a finished text makes room for the next one at once."""

import logging
import math
from collections.abc import Callable, Generator, Iterable
from itertools import islice

import torch
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)

from utils.cli import UsageError, say
from utils.sampling.decoding import (
    Completion,
    Decoding,
    Drawer,
    Request,
    completion_of,
    uniform_bits,
)
from utils.sampling.ragged_attention import NAME as RAGGED_SDPA
from utils.sampling.ragged_attention import ragged_attention

# Most texts are far shorter than max_seq_len, so that more of them share the same memory.
REQUESTS_PER_SEQUENCE_ON_GPU = 4


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


def can_take_flash(model: PreTrainedModel) -> bool:
    """Whether flash attention computes in this model's dtype, on its device."""
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
    )


def _choose_attention(model: PreTrainedModel) -> None:
    """Let each request see its own keys alone, or say what that takes."""
    attention = model.config._attn_implementation
    if attention == "sdpa" and model.device.type == "cpu":
        AttentionInterface.register(RAGGED_SDPA, ragged_attention)
        model.set_attn_implementation(RAGGED_SDPA)
    elif "flash" not in attention and model.device.type == "cuda":
        if can_take_flash(model):
            fix = "pip install flash-attn (or kernels, which fetches it from the hub)"
        else:
            fix = "it takes bfloat16 on a GPU of compute capability 8.0 or more"
        say(
            "warning: no flash attention for --engine continuous, so each token is compared with "
            f"the keys of all sequences; {fix}, or use --engine static"
        )


def continuous_engine(
    model: PreTrainedModel,
    requests: Iterable[Request],
    decoding: Decoding,
    batch_size: int,
    should_stop: Callable[[], bool],
) -> Generator[Completion, None, None]:
    """Continuous batching: a finished text makes room for the next one at once.

    The one place that knows transformers' continuous batching, whose arguments and attributes
    move between minor versions.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessorList,
    )

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
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
        auto_switch_to_flash=can_take_flash(model),
    )
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False), continuous_batching_config=config
    )
    drawer = Drawer(decoding, model.device)
    processors = LogitsProcessorList([continuous_draw(decoding.seed, drawer)])
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(processors)
    # Its one row of arguments; the list counts those of processors that it converts itself.
    manager.logit_processor.tensors_required = 1
    _choose_attention(model)
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
                    request_id=str(request.sample_id),
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
