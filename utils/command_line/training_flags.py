"""Flags of the training run, shared by `train.py` and its generator; no torch."""

import argparse
import math
import re
from collections.abc import Callable

from utils.cli import UsageError
from utils.command_line.parser import (
    batch_size,
    job_name,
    natural_int,
    positive_float,
    positive_int,
)
from utils.texts.data_sets import is_labelled
from utils.texts.prompts import PROMPT_STYLES, UNCONDITIONAL

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")


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


def check_training_arguments(args: argparse.Namespace) -> list[str]:
    """Refuse combinations that no run can mean, before anything is loaded.

    Returns:
        Warnings, one line each.

    Raises:
        UsageError: see its message.
    """
    require_fitting_style(args.dataset_name, args.prompt_style)
    if not 0 <= args.lora_dropout < 1:
        raise UsageError(f"--lora_dropout {args.lora_dropout}: must be in [0, 1)")
    if not 0 <= args.wd < math.inf:
        raise UsageError(f"--wd {args.wd}: must be 0 or more")
    if args.canary_repeats > 1 and not args.num_canaries:
        raise UsageError("--canary_repeats needs --num_canaries: there is nothing to repeat")
    if args.load_in_4bit and args.load_in_8bit:
        raise UsageError("--load_in_4bit and --load_in_8bit: choose one")
    if args.fsdp and args.perdevice_bs == "auto":
        raise UsageError(
            "--perdevice_bs auto does not go with --fsdp, whose processes must all make the same "
            "number of passes; give a number"
        )
    if args.fsdp and quantised_bits(args):
        raise UsageError(
            f"--fsdp cannot shard a base in {quantised_bits(args)} bits; leave one of the two out"
        )
    if args.eps == -1:
        return _check_without_privacy(args)
    if not (math.isfinite(args.eps) and args.eps > 0):
        raise UsageError(f"--eps {args.eps}: must be above 0, or -1 to train without privacy")
    if not 0 < args.delta < 1:
        raise UsageError(f"--delta {args.delta}: must be between 0 and 1, and below 1/N")
    if not (math.isfinite(args.clip) and args.clip > 0):
        raise UsageError(
            f"--eps {args.eps} needs a clip norm above 0, found --clip {args.clip}; add --clip 0.5"
        )
    if args.insecure_fixed_noise_seed is not None:
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


def _check_without_privacy(args: argparse.Namespace) -> list[str]:
    for flag in ("noise_multiplier", "reserve_histogram_sigma", "insecure_fixed_noise_seed"):
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} needs --eps: without it the run has no privacy")
    if args.clip > 0:
        return [f"--clip {args.clip} without --eps: nothing is clipped and nothing is private"]
    return []


def quantised_bits(args: argparse.Namespace) -> int | None:
    """Bits to which the base is quantised; None for a base as it is."""
    return 4 if args.load_in_4bit else 8 if args.load_in_8bit else None


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


def module_settings(given: list[str] | None, number: Callable[[str], float]) -> dict[str, float]:
    """{NAME: NUMBER} of a flag that takes NAME=NUMBER words."""
    return {name: number(value) for name, value in (text.split("=") for text in given or [])}
