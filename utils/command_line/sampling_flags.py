"""Flags of sampling, shared by `inference.py` and its generator; no torch."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from resample_with_dp_histogram.selection import largest_remainders
from utils.cli import UsageError
from utils.command_line.parser import flag, natural_int, positive_int
from utils.command_line.training_flags import JobSettings
from utils.models.adapter_info import read_adapter_info
from utils.texts.prompts import TOPIC, UNCONDITIONAL, Instruction, read_instruction_file
from utils.texts.topic_histogram import read_topic_histogram

ENGINE_NAMES = ("continuous", "static", "vllm")
LOWEST_TEMPERATURE = 1e-4  # below it, logits would overflow
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


_decoding = partial(flag, group="decoding")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(JobSettings):
    """Every flag of `inference.py`."""

    instruction_file: str | None = flag(
        "blocks of a line `### BOI ### COUNT`, a text, a line `### EOI ###`; with "
        f"{UNCONDITIONAL} the text is the number of samples",
    )
    topic_histogram: str | None = flag(
        f"in place of --instruction_file, with {TOPIC}: what topics.histogram wrote; its shares "
        "say how many of --num_samples each topic gets",
        metavar="FILE",
    )
    perdevice_bs: int | None = flag(
        "sequences of max_seq_len tokens on a device at once; left out: what a GPU's memory holds; "
        "an eighth of a CPU's memory, at most 64",
        type=positive_int,
    )
    seed: int = flag(
        "what is drawn; a sample's text depends on this and its id", 0, type=natural_int
    )
    adapter_path: str | None = flag("folder of a LoRA adapter; the base model alone if left out")
    no_merge: bool = flag(
        "keep the adapter apart from the base's weights: slower, exact in bfloat16", False
    )
    output_dir: str = flag("samples are written to its JOB_SESS", "inference_outputs")
    engine: str = flag(
        "continuous: a finished text makes room for the next one at once; static: a batch waits "
        "for its longest text; vllm: needs an environment of its own, see docs/reference.md",
        "continuous",
        choices=ENGINE_NAMES,
    )

    no_sample: bool = _decoding("always take the likeliest token", False)
    top_k: int = _decoding("draw among the k likeliest tokens; 0: among all", 0, type=natural_int)
    top_p: float = _decoding(
        "draw among the fewest tokens that together have this probability", 1.0, type=float
    )
    temperature: float = _decoding("divides the logits", 1.0, type=float)
    repetition_penalty: float = _decoding(
        "divides the positive logits of tokens in the text so far, multiplies the negative",
        1.0,
        type=float,
    )
    max_new_tokens: int | None = _decoding(
        "longest text in tokens; what the prompt leaves of max_seq_len if left out",
        type=positive_int,
    )
    num_samples: int | None = _decoding(
        f"overrides the number in the instruction file of {UNCONDITIONAL}; with "
        "--topic_histogram: texts in all",
        type=positive_int,
    )

    @property
    def source(self) -> str:
        """The file that says what to sample."""
        return self.topic_histogram or self.instruction_file or ""


Settings = TypeVar("Settings", bound=SamplingSettings)


def check_sampling_settings(settings: Settings) -> tuple[Settings, list[str]]:
    """Refuse values that no run can mean, before anything is read.

    Returns:
        The settings, with the engine that can do what they ask for, and warnings, one line each.

    Raises:
        UsageError: see its message.
    """
    if not 0 < settings.top_p <= 1:
        raise UsageError(f"--top_p {settings.top_p}: must be above 0 and at most 1 (1: off)")
    if not (math.isfinite(settings.temperature) and settings.temperature >= LOWEST_TEMPERATURE):
        raise UsageError(
            f"--temperature {settings.temperature}: must be a number of {LOWEST_TEMPERATURE} or "
            "more; use --no_sample for the likeliest token"
        )
    if not (math.isfinite(settings.repetition_penalty) and settings.repetition_penalty > 0):
        raise UsageError(
            f"--repetition_penalty {settings.repetition_penalty}: must be above 0 (1: off)"
        )
    _check_source(settings)
    if settings.no_merge and settings.adapter_path is None:
        raise UsageError("--no_merge needs --adapter_path: without one nothing can be kept apart")
    warnings = []
    if settings.no_sample:
        without_effect = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
        for name, default in without_effect.items():
            if getattr(settings, name) != default:
                warnings.append(f"--no_sample: --{name} {getattr(settings, name)} has no effect")
    if settings.engine == "continuous" and settings.repetition_penalty != 1:
        settings = replace(settings, engine="static")
        warnings.append("--repetition_penalty: the continuous engine has none; --engine static")
    return settings, warnings


def _check_source(settings: SamplingSettings) -> None:
    """Refuse flags that do not say what to sample, or say it twice."""
    histogram, style = settings.topic_histogram, settings.prompt_style
    if (histogram is None) == (settings.instruction_file is None):
        raise UsageError(
            "--instruction_file or --topic_histogram says what to sample: give one of them, "
            f"found {'neither' if histogram is None else 'both'}"
        )
    if histogram is None:
        if settings.num_samples is not None and style != UNCONDITIONAL:
            raise UsageError(
                f"--num_samples {settings.num_samples} goes with --prompt_style {UNCONDITIONAL} or "
                f"with --topic_histogram; with {style} the instruction file's COUNT says how many"
            )
    elif style != TOPIC:
        raise UsageError(
            f"--topic_histogram {histogram} goes with --prompt_style {TOPIC}, found {style}; an "
            "adapter samples by topics if it was trained with them"
        )
    elif settings.num_samples is None:
        raise UsageError(
            f"--topic_histogram {histogram} needs --num_samples: how many texts in all"
        )


def check_adapter(adapter_path: str | None, prompt_style: str) -> list[str]:
    """Refuse an adapter that is missing, or was trained with another prompt style.

    Returns:
        Warnings, one line each.

    Raises:
        UsageError: see its message.
    """
    if adapter_path is None:
        return []
    info = read_adapter_info(adapter_path)
    adapter_weights(adapter_path)
    style = info.get("prompt_style")
    if style is None:
        return [f"{adapter_path} does not say which prompt style it was trained with"]
    if style != prompt_style:
        raise UsageError(
            f"--prompt_style {prompt_style}, but the adapter {adapter_path!r} was "
            f"trained with {style}; use --prompt_style {style}"
        )
    return []


def adapter_weights(folder: str) -> Path:
    """The file with an adapter's weights.

    Raises:
        UsageError: there is none.
    """
    for name in ADAPTER_WEIGHTS:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UsageError(f"the adapter {folder!r} has no weights: {ADAPTER_WEIGHTS[0]} is missing")


def read_instructions(settings: SamplingSettings) -> list[Instruction]:
    """What to sample: texts, each with its number of samples.

    Raises:
        UsageError: the file is missing or does not fit the prompt style.
    """
    if settings.topic_histogram is not None:
        topics = read_topic_histogram(settings.topic_histogram)
        counts = np.array([topic.count for topic in topics])
        numbers = largest_remainders(counts / counts.sum(), settings.num_samples or 0).tolist()
        return [
            Instruction(topic.keywords, number, topic.number)
            for topic, number in zip(topics, numbers)
            if number
        ]
    blocks = read_instruction_file(settings.source)
    if settings.prompt_style != UNCONDITIONAL:
        return blocks
    number = settings.num_samples
    if number is None:
        text = blocks[0].text.strip()
        if len(blocks) > 1 or not (text.isascii() and text.isdigit() and int(text) > 0):
            raise UsageError(
                f"{settings.source}: with --prompt_style {UNCONDITIONAL} its one block "
                f"holds the number of samples, found {text[:40]!r}; add --num_samples, or use the "
                "prompt style of these instructions"
            )
        number = int(text) * blocks[0].count
    if settings.no_sample and number > 1:
        raise UsageError(
            f"--no_sample draws {number:,} times the same text from an empty prompt; leave it "
            "out, or add --num_samples 1"
        )
    return [Instruction("", number)]


def describe_decoding(settings: SamplingSettings) -> str:
    """The decoding flags in words."""
    if settings.no_sample:
        parts = ["the likeliest token"]
    else:
        parts = [f"temperature {settings.temperature:g}"]
        parts += [f"top-k {settings.top_k}"] * (settings.top_k > 0)
        parts += [f"top-p {settings.top_p:g}"] * (settings.top_p < 1)
    parts += [f"repetition penalty {settings.repetition_penalty:g}"] * (
        settings.repetition_penalty != 1
    )
    return ", ".join(parts)
