"""Flags of the training run as typed settings, shared by `train.py` and its generator; no torch."""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from utils.cli import UsageError
from utils.command_line.parser import (
    average_rule,
    batch_size,
    flag,
    job_name,
    natural_int,
    parser_of,
    positive_float,
    positive_int,
    probability,
)
from utils.models.footprint import FLOAT, Architecture, Training
from utils.privacy.accounting import MAX_DELTA, MAX_ROWS
from utils.privacy.banded import BANDED, WHITE
from utils.privacy.ledger import LEDGER_FILE, read_ledger, read_plan
from utils.privacy.plan import ROWS, UNITS, UNITS_AT_ONCE, PrivacyPlan, make_plan
from utils.texts.audit_canaries import KINDS, TOKENS, AuditCanaries
from utils.texts.canaries import Canaries
from utils.texts.data_sets import is_labelled
from utils.texts.prompts import INSTRUCTION_STYLES, PROMPT_STYLES
from utils.texts.units import OWNERS

Number = TypeVar("Number", int, float)
Settings = TypeVar("Settings", bound="TrainingSettings")

# Flags that are of no run.
REHEARSALS = ("check", "dry_run")
ADAMW, CORRECTED, SGD = "adamw", "adamw_corrected", "sgd"
MOMENTUM = 0.9
# Beyond these the float32 of gradients and noise ends.
LEAST_CLIP, MOST_CLIP = 1e-6, 1e6
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")


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


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Flags of everything that runs a model."""

    model_name: str = flag("base model: a hub id or a folder", required=True)
    prompt_style: str = flag(
        "how a text becomes a prompt; uncond_generation has an empty one, topic_generation the "
        "keywords of the instruction's topic",
        choices=PROMPT_STYLES,
        required=True,
    )
    max_seq_len: int = flag("longest sequence in tokens; longer ones are cut", 2048)
    dtype: str = flag(
        "dtype of the frozen base; auto: bfloat16 on GPUs that have it",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass(frozen=True, kw_only=True)
class JobSettings(ModelSettings):
    """Flags of training and of sampling, each of which says where its jobs are written."""

    job_sess: str = flag("name of this run", type=job_name, required=True)
    output_dir: str
    check: bool = flag(
        "look for all that would stop or spoil the run, and end; takes seconds and leaves nothing "
        "behind",
        False,
    )
    dry_run: bool = flag(
        "pass a microbatch of made-up tokens, say what the run would take in hours, memory and "
        "disk, and end; leaves nothing behind",
        False,
    )

    @property
    def is_rehearsal(self) -> bool:
        """Whether nothing is to be written."""
        return self.check or self.dry_run

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output_dir) / self.job_sess

    @property
    def config_file(self) -> Path:
        """Where a generator keeps the flags of a run that it read from a file."""
        return Path(self.output_dir) / f"{self.job_sess}.yaml"


_privacy = partial(flag, group="privacy")
_memorisation = partial(flag, group="memorisation")
_optimisation = partial(flag, group="optimisation")
_lora = partial(flag, group="LoRA")
_base = partial(flag, group="the frozen base")
_reporting = partial(flag, group="evaluation, checkpoints, reporting")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(JobSettings):
    """Every flag of `train.py`."""

    dataset_name: str = flag(
        "data/NAME, a path or a hub id; a name that starts with `labelled` trains (instruction, "
        "answer) pairs, any other the instruction itself",
        required=True,
    )
    perdevice_bs: int | str = flag(
        "sequences of max_seq_len that fit on a device at once; shorter ones are packed into the "
        "same number of padded tokens; auto finds out by trying",
        4,
        type=batch_size,
        metavar="{auto,1,2,...}",
    )
    seed: int = flag(
        "initialisation; without --eps also dropout and who is sampled, which are secret in a DP "
        "run",
        0,
        type=natural_int,
    )
    output_dir: str = flag("runs are written to its JOB_SESS", "outputs")

    eps: float = _privacy(
        "target epsilon, such as 6; -1 trains without privacy, which is never assumed",
        type=float, required=True,
    )  # fmt: skip
    delta: float | str = _privacy(
        "target delta, below 1/N; auto: 1/(10 N), rounded down to a power of ten",
        5e-7,
        type=probability,
        metavar="{auto,DELTA}",
    )
    clip: float = _privacy(
        "clip norm C: l2 bound of one example's gradient; needed with --eps", -1, type=float
    )
    clip_function: str = _privacy(
        "flat: min(1, C/norm); automatic: C/(norm + 0.01), needs no tuning",
        "flat",
        choices=("flat", "automatic"),
    )
    loss_normalization: str = _privacy(
        "an example's summed loss is divided by its own number of tokens, or by max_seq_len, which "
        "leaves short texts little gradient next to the noise",
        "tokens",
        choices=("max_seq_len", "tokens"),
    )
    noise_multiplier: float | None = _privacy(
        "sigma, noise deviation over C; calibrated from --eps if left out", type=float
    )
    noise: str = _privacy(
        "white: anew in every step; banded: correlated over steps (banded matrix factorisation), "
        "so that it partly cancels in their sum, which helps where total_bs / N is large or eps is",
        WHITE,
        choices=(WHITE, BANDED),
    )
    bands: int | str = _privacy(
        "b of --noise banded: a row takes part in every b-th step at most, and b - 1 past noises "
        "of the adapter's size, 8 bytes a number, are kept in the main process's memory; auto: the "
        "least computed noise, which takes some seconds",
        "auto",
        type=batch_size,
        metavar="{auto,1,2,...}",
    )
    num_train_examples: int | None = _privacy(
        "rows of the data set's train split, public (N is this and the rows of canaries), and with "
        "--unit_sampling rows those that the cap leaves; counted if left out",
        type=positive_int,
    )
    unit_column: str | None = _privacy(
        "column that says whose a row is, such as user_id: the guarantee is then for all rows of "
        "one person (or whatever the column tells apart); for one row if left out"
    )
    max_rows_per_unit: int | None = _privacy(
        "K, the rows of one unit that may take part, in a step or, with --unit_sampling rows, at "
        "all; public; needed with --unit_column",
        type=positive_int,
    )
    unit_sampling: str = _privacy(
        "units: a step draws units, and the mean gradient of up to K rows of each is clipped as "
        "one, so noise does not grow with K (N, --total_bs and epochs count units); rows: a step "
        "draws rows of a set in which a unit has at most K, for up to K times the noise",
        UNITS,
        choices=(UNITS, ROWS),
    )
    num_train_units: int | None = _privacy(
        "units of the data set's train split, public (N is this and the rows of canaries); counted "
        "if left out",
        type=positive_int,
    )
    owner: str | None = _privacy(
        "which owner counts where --unit_column holds lists, which are refused otherwise; the row "
        "does not count as the others', so it is not protected as theirs",
        choices=OWNERS,
    )
    unowned_rows_are_units: bool = _privacy(
        "rows without a value in --unit_column are units of their own; they are refused otherwise",
        False,
    )
    reserve_histogram_sigma: float | None = _privacy(
        "calibrate so that training and one Gaussian histogram of this sigma (sensitivity 1) "
        "together meet --eps",
        type=positive_float,
    )
    insecure_fixed_noise_seed: int | None = _privacy(
        "TESTS ONLY: noise and sampling from a known seed; no guarantee", type=int
    )

    num_canaries: int = _memorisation(
        "made-up rows with a random secret that are added to the train split, and count in N, for "
        "evaluation.memorisation to look for",
        0,
        type=natural_int,
    )
    canary_repeats: int = _memorisation("times that each canary is added", 1)
    audit_canaries: int = _memorisation(
        "made-up rows, each of which a secret coin puts in or leaves out, for "
        "privacy_checks.audit_run to find out which; all of them count in N",
        0,
        type=natural_int,
    )
    audit_canary_kind: str = _memorisation(
        "tokens: random ids of the vocabulary, which a model memorises best; natural: texts with "
        "an ending that nobody expects, which privacy_checks.audit_texts looks for",
        TOKENS,
        choices=KINDS,
    )

    total_bs: int = _optimisation("(expected) examples in a logical batch, over all devices", 32)
    num_epochs: float = _optimisation(
        "steps = floor(num_epochs * N / total_bs)", 3, type=positive_float
    )
    lr: float = _optimisation("peak learning rate", 3e-4)
    lr_scheduler: str = _optimisation("of the learning rate", "constant", choices=SCHEDULERS)
    warmup_steps: int = _optimisation(
        "steps below the peak, each above 0; `constant` has none", 30, type=natural_int
    )
    wd: float = _optimisation("weight decay", 0.0, type=float)
    optimizer: str = _optimisation(
        "adamw; adamw_corrected: without the noise's part of its second moment, so that it is not "
        "SGD in disguise where noise outweighs gradients (white noise alone); sgd: with a momentum "
        f"of {MOMENTUM}",
        ADAMW,
        choices=(ADAMW, CORRECTED, SGD),
    )
    average: str | None = _optimisation(
        "adapter/ is then an average over steps, which costs no epsilon: ema:B, exponential with "
        "decay B and without a pull to the start, or tail:F, the mean of the last share F of the "
        "steps; what the last step left is adapter_last/",
        type=average_rule,
        metavar="{ema:B,tail:F}",
    )

    lora_r: int = _lora("rank", 8)
    lora_alpha: float = _lora("scale is alpha / r", 16, type=positive_float)
    lora_dropout: float | None = _lora(
        "probability of dropout; 0 in a DP run and 0.05 in another if left out", type=float
    )
    target_modules: list[str] | None = _lora(
        "names of Linear layers, or all-linear; the attention projections if left out", nargs="+"
    )
    frozen_a: bool = _lora(
        "train B alone, with A as it was drawn: noise on half as many numbers", False
    )
    use_rslora: bool = _lora("rank-stabilised LoRA: scale is alpha / sqrt(r)", False)
    rank_pattern: list[str] | None = _lora(
        "ranks of layers that differ from --lora_r, such as q_proj=16",
        nargs="+",
        type=_rank_of_module,
        metavar="NAME=RANK",
    )
    alpha_pattern: list[str] | None = _lora(
        "alphas of layers that differ from --lora_alpha",
        nargs="+",
        type=_alpha_of_module,
        metavar="NAME=ALPHA",
    )

    load_in_4bit: bool = _base(
        "quantise its Linear layers to 4 bits (NF4); needs bitsandbytes", False
    )
    load_in_8bit: bool = _base("quantise its Linear layers to 8 bits; needs bitsandbytes", False)
    fsdp: bool = _base(
        "shard its layers over all processes (FSDP2), for bases that fit on no single device; "
        "changes nothing of what is learnt",
        False,
    )
    gradient_checkpointing: bool = _base(
        "recompute activations in the backward pass: less memory, slower", False
    )
    compile: bool = _base(
        "compile its frozen norms and MLPs, if examples stay as exact as without", False
    )

    no_eval_at_start: bool = _reporting("skip the validation loss before the first step", False)
    max_eval_examples: int = _reporting("validation examples used", 1000)
    save_steps: int = _reporting("logical steps between checkpoints", 20)
    keep_checkpoints: int = _reporting("checkpoints kept; at least 2 survive a damaged one", 2)
    resume: str = _reporting(
        "auto: continue the run in JOB_SESS from its last good checkpoint",
        "never",
        choices=("never", "auto"),
    )
    report_to: str = _reporting(
        "tracker; its package must be installed",
        "none",
        choices=("none", "tensorboard", "wandb", "trackio"),
    )
    report_private_metrics: bool = _reporting(
        "also send losses and clipping statistics, which no guarantee covers, to a tracker outside "
        "this machine (wandb, trackio)",
        False,
    )

    @property
    def canaries(self) -> Canaries:
        """The canaries that the train split gets."""
        return Canaries(self.num_canaries, self.canary_repeats, self.seed)

    @property
    def audited(self) -> AuditCanaries:
        """The canaries of an audit of this run."""
        return AuditCanaries(self.audit_canaries, self.audit_canary_kind, self.seed)

    @property
    def num_canary_rows(self) -> int:
        """Rows of N that are canaries."""
        return self.canaries.num_rows + self.audit_canaries

    @property
    def unit_flags(self) -> list[str]:
        """The flags of a unit that are given."""
        defaults = {"unit_column": None, "max_rows_per_unit": None, "unit_sampling": UNITS,
                    "num_train_units": None, "owner": None,
                    "unowned_rows_are_units": False}  # fmt: skip
        return [name for name, default in defaults.items() if getattr(self, name) != default]

    @property
    def draws_units(self) -> bool:
        """Whether a step draws units of several rows, and N counts them."""
        return self.unit_column is not None and self.unit_sampling == UNITS

    @property
    def tokens_of_a_draw(self) -> int:
        """What one draw of a step takes at most."""
        return self.max_seq_len * ((self.max_rows_per_unit or 1) if self.draws_units else 1)

    @property
    def size_flag(self) -> str:
        """The flag that states how much of the data set a step draws from."""
        return "num_train_units" if self.draws_units else "num_train_examples"

    @property
    def dropout(self) -> float:
        """The probability of LoRA's dropout."""
        default = 0.05 if self.eps == -1 else 0.0
        return default if self.lora_dropout is None else self.lora_dropout

    @property
    def quantised_bits(self) -> int | None:
        """Bits to which the base is quantised; None for a base as it is."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def copies(self) -> int:
        """Numbers kept of each trained one: itself, the optimizer's moments, and an average."""
        return 1 + (1 if self.optimizer == SGD else 2) + (self.average is not None)

    def disk(self, trained: int, frozen: int) -> int:
        """Bytes of the run's adapters and checkpoints, of which one more is there than is kept
        while it is written.

        Args:
            trained, frozen: numbers of the adapter that are trained, and that are not.
        """
        adapters = 1 if self.average is None else 2
        checkpoints = (self.keep_checkpoints + 1) * (trained * self.copies + frozen)
        return FLOAT * (adapters * (trained + frozen) + checkpoints)

    def footprint(self, architecture: Architecture, itemsize: int) -> Training:
        """What of this run decides its memory.

        Args:
            itemsize: bytes of a number of the base.
        """
        return Training(
            architecture=architecture,
            rank=max([self.lora_r, *module_settings(self.rank_pattern, int).values()]),
            max_seq_len=self.max_seq_len,
            frozen_a=self.frozen_a,
            target_modules=tuple(self.target_modules or ()),
            itemsize=itemsize,
            bits=self.quantised_bits,
            gradient_checkpointing=self.gradient_checkpointing,
            is_private=self.eps != -1,
            units_at_once=UNITS_AT_ONCE if self.draws_units else 0,
            copies=self.copies,
        )

    @property
    def run_settings(self) -> dict:
        """The flags of `train.py` by their names, as `run_config.json` keeps them."""
        given = {field.name: getattr(self, field.name) for field in fields(TrainingSettings)}
        for name in REHEARSALS:
            del given[name]
        return given | {"lora_dropout": self.dropout}


def default_settings() -> dict:
    """The flags of `run_settings` as they are where they are left out; None if they may not be."""
    names = {field.name for field in fields(TrainingSettings)} - {*REHEARSALS}
    parser = parser_of(TrainingSettings, "")
    return {name: parser.get_default(name) for name in names}


def check_training_settings(settings: TrainingSettings) -> list[str]:
    """Refuse combinations that no run can mean, before anything is loaded.

    Returns:
        Warnings, one line each.

    Raises:
        UsageError: see its message.
    """
    require_fitting_style(settings.dataset_name, settings.prompt_style)
    if not 0 <= settings.dropout < 1:
        raise UsageError(f"--lora_dropout {settings.dropout}: must be in [0, 1)")
    if not 0 <= settings.wd < math.inf:
        raise UsageError(f"--wd {settings.wd}: must be 0 or more")
    if settings.max_seq_len < 2:
        raise UsageError(
            f"--max_seq_len {settings.max_seq_len}: the first token of a text carries no loss; use "
            "2 or more"
        )
    if settings.canary_repeats > 1 and not settings.num_canaries:
        raise UsageError("--canary_repeats needs --num_canaries: there is nothing to repeat")
    if settings.audit_canary_kind != TOKENS and not settings.audit_canaries:
        raise UsageError("--audit_canary_kind needs --audit_canaries: there is none of any kind")
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
    if settings.fsdp and settings.compile:
        raise UsageError(
            "--compile does not go with --fsdp, whose layers gather their weights as they pass; "
            "leave one of the two out"
        )
    if settings.eps == -1:
        return _check_without_privacy(settings)
    if not (math.isfinite(settings.eps) and settings.eps > 0):
        raise UsageError(f"--eps {settings.eps}: must be above 0, or -1 to train without privacy")
    if not (settings.delta == "auto" or 0 < float(settings.delta) < 1):
        raise UsageError(f"--delta {settings.delta}: must be between 0 and 1, and below 1/N")
    if not LEAST_CLIP <= settings.clip <= MOST_CLIP:
        raise UsageError(
            f"--eps {settings.eps} needs a clip norm of {LEAST_CLIP:g} to {MOST_CLIP:g}, found "
            f"--clip {settings.clip:g}; use --clip 0.5"
        )
    _check_unit(settings)
    _check_noise(settings)
    if settings.insecure_fixed_noise_seed is not None:
        return ["--insecure_fixed_noise_seed: the noise is known, so this run has NO guarantee"]
    return []


def _check_unit(settings: TrainingSettings) -> None:
    """Refuse flags of a unit without one, and a unit without its cap."""
    if settings.unit_column is None:
        for name in settings.unit_flags:
            raise UsageError(
                f"--{name} needs --unit_column: without it every row is a unit of its own"
            )
    elif settings.max_rows_per_unit is None:
        raise UsageError(
            f"--unit_column {settings.unit_column} needs --max_rows_per_unit: the most rows of one "
            "unit that may take part, a public number such as 8"
        )
    elif settings.unit_sampling == ROWS and settings.max_rows_per_unit > MAX_ROWS:
        raise UsageError(
            f"--max_rows_per_unit {settings.max_rows_per_unit} with --unit_sampling {ROWS} is more "
            f"than {MAX_ROWS}, the most that is accounted for; use a smaller one, or {UNITS}, "
            "where a larger one costs no noise"
        )


def _check_noise(settings: TrainingSettings) -> None:
    """Refuse bands without correlated noise, and rows of a unit that are of several groups."""
    if settings.noise == WHITE and settings.bands != "auto":
        raise UsageError(f"--bands {settings.bands} needs --noise {BANDED}: white noise has none")
    draws_rows = settings.unit_column is not None and settings.unit_sampling == ROWS
    if settings.noise == BANDED and draws_rows and (settings.max_rows_per_unit or 1) > 1:
        raise UsageError(
            f"--noise {BANDED} with --unit_sampling {ROWS} and --max_rows_per_unit "
            f"{settings.max_rows_per_unit}: rows of a unit may be of several groups, which nothing "
            f"accounts for; use --unit_sampling {UNITS}, or --max_rows_per_unit 1"
        )
    if settings.noise == BANDED and settings.optimizer == CORRECTED:
        raise UsageError(
            f"--optimizer {CORRECTED} knows the variance of white noise alone, not of --noise "
            f"{BANDED}; leave one of the two out"
        )


def require_fitting_style(dataset_name: str, prompt_style: str) -> None:
    """Refuse a prompt style that needs answers where there are none, or has no room for them.

    Raises:
        UsageError: names both flags.
    """
    pairs = is_labelled(dataset_name)
    if pairs == (prompt_style in INSTRUCTION_STYLES):
        kind = "(instruction, answer) pairs" if pairs else "instructions"
        fix = "choose another style" if pairs else f"use {' or '.join(INSTRUCTION_STYLES)}"
        raise UsageError(
            f"--dataset_name {dataset_name} trains {kind}, which --prompt_style {prompt_style} "
            f"does not fit; {fix}"
        )


def _check_without_privacy(settings: TrainingSettings) -> list[str]:
    of_privacy = ("noise_multiplier", "reserve_histogram_sigma", "insecure_fixed_noise_seed")
    given = [name for name in of_privacy if getattr(settings, name) is not None]
    given += ["noise"] if settings.noise != WHITE else []
    given += ["bands"] if settings.bands != "auto" else []
    given += [f"optimizer {CORRECTED}"] if settings.optimizer == CORRECTED else []
    for name in given + settings.unit_flags:
        raise UsageError(f"--{name} needs --eps: without it the run has no privacy")
    if settings.clip > 0:
        return [f"--clip {settings.clip} without --eps: nothing is clipped and nothing is private"]
    return []


def settle_delta(settings: Settings, num_examples: int) -> Settings:
    """The settings with a number for --delta auto: a power of ten, at most 1/(10 N) and 0.01.

    Args:
        num_examples: see `plan_of`.
    """
    if settings.delta != "auto":
        return settings
    return replace(settings, delta=min(MAX_DELTA, float(f"1e-{len(str(10 * num_examples - 1))}")))


def plan_of(
    settings: TrainingSettings,
    num_examples: int,
    coefficients: tuple[float, ...] | None = None,
) -> tuple[PrivacyPlan | None, list[str]]:
    """The plan of a run on N examples.

    Args:
        num_examples: N, of what a step draws: units where `settings.draws_units`, else rows, and
            with --unit_sampling rows those that the cap leaves.
        coefficients: of the bands of a run that is continued; they are computed if None.

    Returns:
        The plan (None for a run without privacy) and warnings, one line each.

    Raises:
        UsageError: a value that gives no or a meaningless guarantee.
    """
    if settings.total_bs > num_examples:
        drawn = f"values of {settings.unit_column}" if settings.draws_units else "training examples"
        raise UsageError(
            f"--total_bs {settings.total_bs} exceeds the {num_examples} {drawn} of "
            f"{settings.dataset_name}; use {num_examples} or less"
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
        delta=float(settle_delta(settings, num_examples).delta),
        noise_multiplier=settings.noise_multiplier,
        reserved_histogram_sigma=settings.reserve_histogram_sigma,
        unit_column=settings.unit_column,
        max_rows_per_unit=settings.max_rows_per_unit,
        unit_sampling=settings.unit_sampling if settings.unit_column else None,
        owner=settings.owner,
        bands=1 if settings.noise == WHITE else settings.bands,
        coefficients=coefficients,
    )


def plan_to_follow(
    settings: TrainingSettings, num_examples: int
) -> tuple[PrivacyPlan | None, list[str]]:
    """The plan that the flags ask for, with warnings; for a run that is there, its own.

    Args:
        num_examples: see `plan_of`.

    Raises:
        UsageError: the run that is there follows another plan.
    """
    ledger = settings.folder / LEDGER_FILE
    # A kill in the middle of its first line leaves nothing that was recorded.
    begun = read_plan(ledger) if ledger.exists() and read_ledger(ledger) else None
    coefficients = None
    if begun and settings.noise_multiplier is None:
        # Another release of the accountant may calibrate another one for the same target.
        settings = replace(settings, noise_multiplier=begun.noise_multiplier)
    if begun and settings.noise == BANDED:
        if settings.bands not in ("auto", begun.bands):
            raise UsageError(
                f"{settings.folder} holds a run with --bands {begun.bands}, not {settings.bands}; "
                "use that value and --resume auto, or another --job_sess"
            )
        coefficients = begun.band_coefficients
    plan, warnings = plan_of(settings, num_examples, coefficients)
    if plan and begun:
        plan.require_same(begun, str(settings.folder))
    return plan, warnings


def module_settings(given: list[str] | None, number: Callable[[str], Number]) -> dict[str, Number]:
    """{NAME: NUMBER} of a flag that takes NAME=NUMBER words."""
    return {name: number(value) for name, value in (text.split("=") for text in given or [])}
