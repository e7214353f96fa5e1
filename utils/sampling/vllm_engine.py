"""vLLM as a sampling engine; imported only when it is asked for, since its pins are its own."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from utils.cli import UsageError, in_one_line
from utils.sampling.decoding import Completion, Decoding, Request, completion_of

HOW_TO_INSTALL = (
    "vLLM is not installed here, and its pins of torch and transformers differ from this "
    "environment's: make one of its own with `python -m venv .venv-vllm && .venv-vllm/bin/pip "
    "install -r benchmarks/requirements-vllm.txt`, and run its Python"
)
# What a launcher tells its processes of each other; vLLM would take it as meant for itself.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                      "MASTER_PORT")  # fmt: skip
MAX_SEQUENCES_ON_GPU = 256
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ModelFolder:
    """A model that an engine loads itself.

    Attributes:
        path: a folder or hub id.
        dtype: its name, such as "float32".
        adapter: a LoRA adapter's folder to keep apart from the weights.
        gpu: number of the GPU to use; None is the CPU.
        cache_bytes: memory for keys and values on a CPU.
    """

    path: str
    dtype: str
    adapter: str | None = None
    gpu: int | None = None
    cache_bytes: int | None = None


def check_vllm() -> None:
    """Refuse `--engine vllm` where vLLM is not.

    Raises:
        UsageError: says how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(f"--engine vllm: {HOW_TO_INSTALL}")


def sample_seed(seed: int, sample: int) -> int:
    """63 bits for vLLM's generator of one sample: equal seeds would give equal texts."""
    digest = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def vllm_engine(
    model: ModelFolder,
    requests: Iterable[Request],
    decoding: Decoding,
    batch_size: int,
    should_stop: Callable[[], bool],
) -> Generator[Completion, None, None]:
    """vLLM's continuous batching, each sample with a generator of its own seed."""
    check_vllm()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A fork would inherit locks of threads that it does not inherit.
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    if model.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(n) for n in range(model.gpu + 1)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[model.gpu]

    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"--engine vllm: it is installed but does not import: {error}; where torchvision is "
            "to blame, take it out: pip uninstall torchvision torchaudio torchcodec"
        ) from None

    options: dict[str, object] = {}
    adapter = None
    if model.adapter is not None:
        config = json.loads((Path(model.adapter) / "adapter_config.json").read_text())
        rank = max(config["r"], *config.get("rank_pattern", {}).values(), 1)
        allowed = next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)
        options |= {"enable_lora": True, "max_lora_rank": allowed}
        adapter = LoRARequest("adapter", 1, str(Path(model.adapter).resolve()))
    if model.gpu is None:
        options["kv_cache_memory_bytes"] = model.cache_bytes
    try:
        engine = LLM(
            model.path,
            dtype=model.dtype,
            max_model_len=decoding.max_seq_len,
            max_num_seqs=batch_size,
            generation_config="vllm",
            disable_log_stats=True,
            **options,
        ).llm_engine
    except (ValueError, RuntimeError) as error:
        reason = in_one_line(error, 300)
        raise UsageError(f"--engine vllm could not start: {reason}") from None

    def parameters(request: Request) -> SamplingParams:
        return SamplingParams(
            temperature=0 if decoding.no_sample else decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            repetition_penalty=decoding.repetition_penalty,
            seed=sample_seed(decoding.seed, request.sample_id),
            max_tokens=decoding.limit(request.prompt),
            stop_token_ids=sorted(decoding.stop_ids),
            detokenize=False,
        )

    requests = iter(requests)
    under_way = 0
    try:
        while not should_stop():
            for request in islice(requests, 2 * batch_size - under_way):
                engine.add_request(
                    str(request.sample_id), {"prompt_token_ids": request.prompt},
                    parameters(request), lora_request=adapter,
                )  # fmt: skip
                under_way += 1
            if not under_way:
                return
            for output in engine.step():
                if output.finished:
                    under_way -= 1
                    tokens = list(output.outputs[0].token_ids)
                    yield completion_of(int(output.request_id), tokens, decoding.stop_ids)
    except Exception as error:
        # Ctrl-C reaches vLLM's own processes too, which may end before this one asks.
        if not should_stop():
            reason = in_one_line(error, 300)
            raise UsageError(
                f"--engine vllm ended: {reason}; with VLLM_LOGGING_LEVEL=INFO in the environment "
                "the same command shows why"
            ) from None
    finally:
        engine.engine_core.shutdown()
