"""Flags of the training run as typed settings, shared by `train.py` and its generator; no torch."""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from utils.cli import UsageError
from utils.command_line.parser import (
    batch_size,
    job_name,
    natural_int,
    positive_float,
    positive_int,
)
from utils.privacy.plan import PrivacyPlan, make_plan
from utils.texts.canaries import Canaries
from utils.texts.data_sets import is_labelled
from utils.texts.prompts import PROMPT_STYLES, UNCONDITIONAL

Number = TypeVar("Number", int, float)

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Flags of everything that runs a model."""

    model_name: str
    prompt_style: str
    max_seq_len: int
    dtype: str
    job_sess: str
    output_dir: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output_dir) / self.job_sess


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ModelSettings):
    """Every flag of `train.py`; --help says what they mean."""

    dataset_name: str
    perdevice_bs: int | str
    eps: float
    delta: float
    clip: float
    clip_function: str
    loss_normalization: str
    noise_multiplier: float | None
    num_train_examples: int | None
    reserve_histogram_sigma: float | None
    insecure_fixed_noise_seed: int | None
    num_canaries: int
    canary_repeats: int
    total_bs: int
    num_epochs: float
    lr: float
    lr_scheduler: str
    warmup_steps: int
    wd: float
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | None
    use_rslora: bool
    rank_pattern: list[str] | None
    alpha_pattern: list[str] | None
    load_in_4bit: bool
    load_in_8bit: bool
    fsdp: bool
    gradient_checkpointing: bool
    no_eval_at_start: bool
    max_eval_examples: int
    save_steps: int
    keep_checkpoints: int
    resume: str
    report_to: str
    report_private_metrics: bool

    @property
    def canaries(self) -> Canaries:
        """The canaries that the train split gets."""
        return Canaries(self.num_canaries, self.canary_repeats, self.seed)

    @property
    def quantised_bits(self) -> int | None:
        """Bits to which the base is quantised; None for a base as it is."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def run_settings(self) -> dict:
        """The flags of `train.py` by their names, as `run_config.json` keeps them."""
        return {field.name: getattr(self, field.name) for field in fields(TrainingSettings)}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that runs a model."""
    parser.add_argument("--model_name", required=True, help="base model: a hub id or a folder")
    parser.add_argument(
        "--prompt_style",
        choices=PROMPT_STYLES,
        required=True,
        help="how a text becomes a prompt; uncond_generation has an empty one",
    )
    parser.add_argument(
        "--max_seq_len",
        type=positive_int,
        default=2048,
        help="longest sequence in tokens; longer ones are cut",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the frozen base; auto: bfloat16 on GPUs that have it",
    )


def add_job_argument(parser: argparse.ArgumentParser) -> None:
    """The name under which training and sampling write."""
    parser.add_argument("--job_sess", required=True, type=job_name, help="name of this run")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `train.py`."""
    parser.add_argument(
        "--dataset_name",
        required=True,
        help="data/NAME, a path or a hub id; a name that starts with `labelled` "
        "trains (instruction, answer) pairs, any other the instruction itself",
    )
    add_model_arguments(parser)
    add_job_argument(parser)
    parser.add_argument(
        "--perdevice_bs",
        type=batch_size,
        default=4,
        metavar="{auto,1,2,...}",
        help="sequences of max_seq_len that fit on a device at once; shorter ones "
        "are packed into the same number of padded tokens; auto finds out by trying",
    )
    parser.add_argument(
        "--seed",
        type=natural_int,
        default=0,
        help="initialisation; without --eps also dropout and who is sampled, which are secret "
        "in a DP run",
    )
    parser.add_argument("--output_dir", default="outputs", help="runs are written to its JOB_SESS")

    group = parser.add_argument_group("privacy")
    group.add_argument("--eps", type=float, default=-1, help="target epsilon; -1 trains without DP")
    group.add_argument("--delta", type=float, default=5e-7, help="target delta, below 1/N")
    group.add_argument(
        "--clip",
        type=float,
        default=-1,
        help="clip norm C: l2 bound of one example's gradient; needed with --eps",
    )
    group.add_argument(
        "--clip_function",
        choices=("flat", "automatic"),
        default="flat",
        help="flat: min(1, C/norm); automatic: C/(norm + 0.01), needs no tuning",
    )
    group.add_argument(
        "--loss_normalization",
        choices=("max_seq_len", "tokens"),
        default="max_seq_len",
        help="an example's summed loss is divided by "
        "max_seq_len, or by its own number of tokens (better for short texts)",
    )
    group.add_argument(
        "--noise_multiplier",
        type=float,
        default=None,
        help="sigma, noise deviation over C; calibrated from --eps if left out",
    )
    group.add_argument(
        "--num_train_examples",
        type=positive_int,
        default=None,
        help="rows of the data set's train split, public (N is this and the rows of canaries); "
        "counted if left out",
    )
    group.add_argument(
        "--reserve_histogram_sigma",
        type=positive_float,
        default=None,
        help="calibrate so that training and one Gaussian histogram of this sigma "
        "(sensitivity 1) together meet --eps",
    )
    group.add_argument(
        "--insecure_fixed_noise_seed",
        type=int,
        default=None,
        help="TESTS ONLY: noise and sampling from a known seed; no guarantee",
    )

    group = parser.add_argument_group("memorisation")
    group.add_argument(
        "--num_canaries",
        type=natural_int,
        default=0,
        help="made-up rows with a random secret that are added to the train split, and count in N, "
        "for evaluation.memorisation to look for",
    )
    group.add_argument(
        "--canary_repeats", type=positive_int, default=1, help="times that each canary is added"
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--total_bs",
        type=positive_int,
        default=32,
        help="(expected) examples in a logical batch, over all devices",
    )
    group.add_argument(
        "--num_epochs",
        type=positive_float,
        default=3,
        help="steps = floor(num_epochs * N / total_bs)",
    )
    group.add_argument("--lr", type=positive_float, default=3e-4, help="peak learning rate")
    group.add_argument("--lr_scheduler", choices=SCHEDULERS, default="constant")
    group.add_argument(
        "--warmup_steps", type=natural_int, default=30, help="steps; `constant` has none"
    )
    group.add_argument("--wd", type=float, default=0.0, help="AdamW's weight decay")

    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_r", type=positive_int, default=8, help="rank")
    group.add_argument("--lora_alpha", type=positive_float, default=16, help="scale is alpha / r")
    group.add_argument("--lora_dropout", type=float, default=0.05, help="probability")
    group.add_argument(
        "--target_modules",
        nargs="+",
        default=None,
        help="names of Linear layers, or all-linear; the attention projections if left out",
    )
    group.add_argument(
        "--use_rslora",
        action="store_true",
        help="rank-stabilised LoRA: scale is alpha / sqrt(r)",
    )
    group.add_argument(
        "--rank_pattern",
        nargs="+",
        type=_rank_of_module,
        metavar="NAME=RANK",
        default=None,
        help="ranks of layers that differ from --lora_r, such as q_proj=16",
    )
    group.add_argument(
        "--alpha_pattern",
        nargs="+",
        type=_alpha_of_module,
        metavar="NAME=ALPHA",
        default=None,
        help="alphas of layers that differ from --lora_alpha",
    )
    group = parser.add_argument_group("the frozen base")
    group.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="quantise its Linear layers to 4 bits (NF4); needs bitsandbytes",
    )
    group.add_argument(
        "--load_in_8bit",
        action="store_true",
        help="quantise its Linear layers to 8 bits; needs bitsandbytes",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="shard its layers over all processes (FSDP2), for bases that fit on no single device; "
        "changes nothing of what is learnt",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, slower",
    )

    group = parser.add_argument_group("evaluation, checkpoints, reporting")
    group.add_argument(
        "--no_eval_at_start",
        action="store_true",
        help="skip the validation loss before the first step",
    )
    group.add_argument(
        "--max_eval_examples", type=positive_int, default=1000, help="validation examples used"
    )
    group.add_argument(
        "--save_steps", type=positive_int, default=20, help="logical steps between checkpoints"
    )
    group.add_argument(
        "--keep_checkpoints",
        type=positive_int,
        default=2,
        help="checkpoints kept; at least 2 survive a damaged one",
    )
    group.add_argument(
        "--resume",
        choices=("never", "auto"),
        default="never",
        help="auto: continue the run in JOB_SESS from its last good checkpoint",
    )
    group.add_argument(
        "--report_to",
        choices=("none", "tensorboard", "wandb", "trackio"),
        default="none",
        help="tracker; its package must be installed",
    )
    group.add_argument(
        "--report_private_metrics",
        action="store_true",
        help="also send losses and clipping statistics, which no guarantee covers, "
        "to a tracker outside this machine (wandb)",
    )


def check_training_settings(settings: TrainingSettings) -> list[str]:
    """Refuse combinations that no run can mean, before anything is loaded.

    Returns:
        Warnings, one line each.

    Raises:
        UsageError: see its message.
    """
    require_fitting_style(settings.dataset_name, settings.prompt_style)
    if not 0 <= settings.lora_dropout < 1:
        raise UsageError(f"--lora_dropout {settings.lora_dropout}: must be in [0, 1)")
    if not 0 <= settings.wd < math.inf:
        raise UsageError(f"--wd {settings.wd}: must be 0 or more")
    if settings.canary_repeats > 1 and not settings.num_canaries:
        raise UsageError("--canary_repeats needs --num_canaries: there is nothing to repeat")
    if settings.load_in_4bit and settings.load_in_8bit:
        raise UsageError("--load_in_4bit and --load_in_8bit: choose one")
    if settings.fsdp and settings.perdevice_bs == "auto":
        raise UsageError(
            "--perdevice_bs auto does not go with --fsdp, whose processes must all make the same "
            "number of passes; give a number"
        )
    if settings.fsdp and settings.quantised_bits:
        raise UsageError(
            f"--fsdp cannot shard a base in {settings.quantised_bits} bits; leave one of the two "
            "out"
        )
    if settings.eps == -1:
        return _check_without_privacy(settings)
    if not (math.isfinite(settings.eps) and settings.eps > 0):
        raise UsageError(f"--eps {settings.eps}: must be above 0, or -1 to train without privacy")
    if not 0 < settings.delta < 1:
        raise UsageError(f"--delta {settings.delta}: must be between 0 and 1, and below 1/N")
    if not (math.isfinite(settings.clip) and settings.clip > 0):
        raise UsageError(
            f"--eps {settings.eps} needs a clip norm above 0, found --clip {settings.clip}; add "
            "--clip 0.5"
        )
    if settings.insecure_fixed_noise_seed is not None:
        return ["--insecure_fixed_noise_seed: the noise is known, so this run has NO guarantee"]
    return []


def require_fitting_style(dataset_name: str, prompt_style: str) -> None:
    """Refuse a prompt style that needs answers where there are none, or has no room for them.

    Raises:
        UsageError: names both flags.
    """
    pairs = is_labelled(dataset_name)
    if pairs == (prompt_style == UNCONDITIONAL):
        kind = "(instruction, answer) pairs" if pairs else "instructions"
        fix = "choose another style" if pairs else f"use {UNCONDITIONAL}"
        raise UsageError(
            f"--dataset_name {dataset_name} trains {kind}, which --prompt_style {prompt_style} "
            f"does not fit; {fix}"
        )


def _check_without_privacy(settings: TrainingSettings) -> list[str]:
    for flag in ("noise_multiplier", "reserve_histogram_sigma", "insecure_fixed_noise_seed"):
        if getattr(settings, flag) is not None:
            raise UsageError(f"--{flag} needs --eps: without it the run has no privacy")
    if settings.clip > 0:
        return [f"--clip {settings.clip} without --eps: nothing is clipped and nothing is private"]
    return []


def plan_of(settings: TrainingSettings, num_examples: int) -> tuple[PrivacyPlan | None, list[str]]:
    """The plan of a run on N examples.

    Returns:
        The plan (None for a run without privacy) and warnings, one line each.

    Raises:
        UsageError: a value that gives no or a meaningless guarantee.
    """
    if settings.total_bs > num_examples:
        raise UsageError(
            f"--total_bs {settings.total_bs} exceeds the {num_examples} training examples of "
            f"{settings.dataset_name}"
        )
    if settings.eps == -1:
        return None, []
    return make_plan(
        num_examples,
        expected_batch_size=settings.total_bs,
        num_epochs=settings.num_epochs,
        clip_norm=settings.clip,
        clip_function=settings.clip_function,
        loss_normalization=settings.loss_normalization,
        target_epsilon=settings.eps,
        delta=settings.delta,
        noise_multiplier=settings.noise_multiplier,
        reserved_histogram_sigma=settings.reserve_histogram_sigma,
    )


def _rank_of_module(text: str) -> str:
    return _module_setting(text, positive_int)


def _alpha_of_module(text: str) -> str:
    return _module_setting(text, positive_float)


def _module_setting(text: str, number: Callable[[str], float]) -> str:
    """NAME=NUMBER as it is, once it is known to be that."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[\w.]+", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, such as q_proj=16")
    number(value)
    return text


def module_settings(given: list[str] | None, number: Callable[[str], Number]) -> dict[str, Number]:
    """{NAME: NUMBER} of a flag that takes NAME=NUMBER words."""
    return {name: number(value) for name, value in (text.split("=") for text in given or [])}
