"""Fine-tune a causal language model with LoRA, with or without differential privacy.

    accelerate launch train.py --dataset_name quickstart_instructions \\
        --model_name data/quickstart_model --job_sess mine --prompt_style uncond_generation \\
        --eps 8 --delta 1e-5 --clip 1.0 --loss_normalization tokens --max_seq_len 128

`generate_train_command.py` prints this line with the noise multiplier filled in. The run is
written to outputs/JOB_SESS: adapter/, privacy_report.json and .md, checkpoints/, and private/ for
everything that the guarantee does not cover. A stopped run goes on with --resume auto.

`prepare` makes one record of all that a run is, and `learn` is the loop. What a step does to the
data is the mechanism's (utils/privacy/mechanism.py), of which the loop knows no kind.
"""

from utils.command_line.parser import answer_early, read_flags
from utils.command_line.training_flags import (
    CORRECTED,
    MOMENTUM,
    SGD,
    TrainingSettings,
    check_training_settings,
    default_settings,
    module_settings,
    plan_to_follow,
    settle_delta,
)

answer_early(__name__, TrainingSettings, __doc__)

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import utils  # noqa: F401 (silences a notice of what is imported below)

# isort: split
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, gather, reduce
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UsageError, in_one_line, run_cli, say
from utils.dp_utils import PerExampleGradients, assign_gradient
from utils.files import write_atomic, write_json
from utils.folders import portable, whole_folder
from utils.models.adapter_info import adapter_sha256, write_adapter_info
from utils.models.compiled import compile_parts, frozen_parts, undo
from utils.models.footprint import GIB, Architecture, RowMemory
from utils.models.independence import (
    require_independent_examples,
    require_known_quantisation,
    require_no_other_randomness,
    silence_dropout,
)
from utils.models.language_model import LanguageModel, require_coverage
from utils.models.loading import (
    load_base_model,
    load_quantised_model,
    load_skeleton,
    load_tokenizer,
    model_fingerprint,
    quiet_libraries,
    resolve_dtype,
)
from utils.models.lora import (
    attach_lora,
    default_target_modules,
    frozen_factors,
    use_row_dropout,
)
from utils.models.losses import normalise
from utils.models.memory import PeakMemory, fitting_sequences, use_expandable_segments
from utils.privacy.guarantee import rounded_up, write_report
from utils.privacy.mechanism import Mechanism, Plain, Private
from utils.privacy.plan import UNITS_AT_ONCE, PrivacyPlan, num_steps
from utils.privacy.unit_sums import Units
from utils.progress import Progress
from utils.row_dropout import RowMasks
from utils.runs.averaging import Average
from utils.runs.batching import (
    Cost,
    Halving,
    Microbatch,
    Shapes,
    cheapest_shapes,
    cost_on,
    cut_microbatches,
    deal_parts,
)
from utils.runs.checkpointing import Checkpoint, load_last_good, restore_adapter, save_checkpoint
from utils.runs.distributed import (
    is_loss_of_a_rank,
    make_accelerator,
    on_main_process,
    require_same_on_every_rank,
    require_same_tensors,
    shard_base,
    tensors_sha256,
)
from utils.runs.metrics import LOCAL_TRACKERS, PrivateMetrics, start_tracker
from utils.runs.optimizers import CorrectedAdamW, schedule
from utils.runs.preflight import (
    check_positions,
    embedding_rows,
    require_gpus,
    require_room,
    require_vocabulary,
)
from utils.runs.probe import HALVED, full_precision, probed
from utils.runs.run_folder import (
    ADAPTER_HASH,
    COINS,
    LAST_ADAPTER,
    begin,
    date_of,
    held,
    holds_run,
    is_finished,
    model_card,
    require_usable,
)
from utils.runs.stopping import StopRequest
from utils.secure_random import SecureRandom
from utils.texts.audit_canaries import COINS_FILE, as_trained, coins_fingerprint, read_coins
from utils.texts.data_sets import load_splits, rows_fingerprint
from utils.texts.prompts import check_style, fix_date, is_dated
from utils.texts.tokens import TokenisedExamples, tokenise_once
from utils.texts.units import largest_units, read_units, rows_to_keep

# Flags that may differ between the machines of a job; what they lead to is compared by itself.
DIFFERS_BY_MACHINE = {"dataset_name", "model_name", "output_dir", "report_to"}
# What the probe found at each start of a run.
NUMERICS = "numerics.json"
# Rows of the largest unit, for every column that seems to say whose a row is.
LARGEST_UNITS = "largest_units.json"
# Rows of each split, and how many of them were cut or carry no loss.
ROW_COUNTS = "row_counts.json"
# Padded tokens of a microbatch with a fixed number of rows, at least: fewer leave a device idle.
LEAST_TOKENS, LEAST_TOKENS_ON_A_CPU = 512, 128
LACK_OF_MEMORY = (
    "lack of memory on this device, with nothing left to halve: add --gradient_checkpointing, or "
    "begin anew with a lower --max_seq_len or with --dtype bfloat16"
)


@dataclass(frozen=True)
class Run:
    """All that a training run is before its first step.

    Attributes:
        steps: T, the logical steps to take in all.
        parameters: the trainable tensors by name.
        token_budget: padded tokens of a microbatch, at most.
        shapes: of the microbatches in which examples are to be computed each by itself.
        is_sharded: whether the base is spread over all processes, which then pass in step.
        base_fingerprint: of the base model as it is, quantised or not.
        prompt_date: the day that all prompts hold; None where they hold none.
        first_step: those that the checkpoint which it continues has taken, else 0.
        is_continued: whether there is such a checkpoint.
        metrics: on the main process alone.
        average: of the parameters over steps, where it is what is released.
    """

    settings: TrainingSettings
    accelerator: Accelerator
    data: dict[str, TokenisedExamples]
    pad_id: int
    model: PeftModel
    language_model: LanguageModel
    parameters: dict[str, nn.Parameter]
    mechanism: Mechanism
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int
    token_budget: int
    shapes: Shapes | None
    is_sharded: bool
    base_fingerprint: str
    prompt_date: str | None
    first_step: int = 0
    is_continued: bool = False
    metrics: PrivateMetrics | None = None
    average: Average | None = None

    @property
    def folder(self) -> Path:
        return self.settings.folder

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @cached_property
    def frozen(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors that are not trained, by name."""
        return frozen_factors(self.model)

    @cached_property
    def cost(self) -> Cost:
        """What a microbatch costs on this device."""
        return cost_of(self.language_model.model)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def record(self, step: int, values: dict) -> None:
        """Keep values computed from private data, under private/."""
        if self.metrics:
            self.metrics.record(step, values)


def main(
    argv: list[str] | None = None,
    private: type[Private] = Private,
    plain: type[Plain] = Plain,
) -> int:
    """The run. Returns the exit code.

    Args:
        private, plain: the mechanism of a run with or without privacy; what measures or attacks
            training hands in its own.
    """
    settings = read_flags(TrainingSettings, __doc__, argv)
    use_expandable_segments()
    # What saves the work, once there is some, if another process of the job is lost.
    rescue: list[Callable[[], object]] = []
    with held(settings.folder):
        try:
            run = prepare(settings, private, plain)
            return learn(run, rescue) if run else EXIT_OK
        except OSError:
            # The record of a step could not be written. What was learnt before may yet have room.
            for save in rescue:
                save()
            raise
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                what = f"stopped by {LACK_OF_MEMORY}"
            elif is_loss_of_a_rank(error):
                what = "another process of this job has ended, so this one ends too"
            else:
                raise
            for save in rescue:
                save()
            say(
                f"error: {what}; the same command with --resume auto continues "
                f"{settings.folder} ({in_one_line(error, 160)})"
            )
            return EXIT_FAILED


# ------------------------------------------------------------------------ before the first step


def prepare(settings: TrainingSettings, private: type[Private], plain: type[Plain]) -> Run | None:
    """Plan, data, model, mechanism, optimizer, checkpoint. None for a run that is finished."""
    # What is asked for.
    notices = check_training_settings(settings)
    folder = settings.folder
    splits, units = read_splits(settings)
    num_examples = len(splits["train"]) + settings.audit_canaries if units is None else len(units)
    settings = settle_delta(settings, num_examples)
    require_usable(folder, settings.run_settings, settings.resume, default_settings())
    plan, plan_notices = plan_to_follow(settings, num_examples)
    largest = largest_units(settings.dataset_name) if plan and not settings.unit_column else {}
    notices += plan_notices + [several_rows_notice(column) for column in largest]

    # The processes of the job.
    require_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
    tracker = None if settings.report_to == "none" else settings.report_to
    accelerator = make_accelerator(tracker, folder / "private")
    device, is_main = accelerator.device, accelerator.is_main_process
    if on_main_process(partial(is_finished, folder)):
        if is_main:
            say(f"{folder} is finished already: its adapter is in {folder / 'adapter'}")
        return None
    if not settings.is_rehearsal:
        start_tracker(accelerator, settings.report_to, settings.job_sess, folder)
    is_sharded = settings.fsdp and accelerator.num_processes > 1
    if settings.fsdp and not is_sharded:
        notices.append("--fsdp: a single process shards nothing")

    # Data and model.
    quiet_libraries()
    tokenizer = load_tokenizer(settings.model_name)
    prompt_date = fixed_date(settings, tokenizer)
    skeleton = load_skeleton(settings.model_name)
    notices += preflight(settings, skeleton, tokenizer)
    for notice in notices if is_main else []:
        say(f"warning: {notice}")
    data, coins = tokens_of(settings, splits, tokenizer)
    largest_id = max(int(split.ids.max()) for split in data.values())
    require_vocabulary(embedding_rows(skeleton), tokenizer, largest_id)
    eos_id = tokenizer.eos_token_id
    counts = {split: data[split].counts(eos_id, len(rows)) for split, rows in splits.items()}
    if is_main:
        say_counts(settings, counts)
    if settings.check:
        return None
    torch.manual_seed(settings.seed)
    dtype = resolve_dtype(settings.dtype, device)
    base = load_base_model(settings.model_name, dtype)
    fingerprint = model_fingerprint(base)
    require_one_job(settings, plan, fingerprint, data, units)
    if bits := settings.quantised_bits:
        base = load_quantised_model(settings.model_name, dtype, bits, device)
    if plan:
        full_precision()
        silence_dropout(base)
        require_independent_examples(base, settings.max_seq_len)
    model = adapt(base, settings)
    masks = row_masks(model, settings)
    if is_sharded:
        shard_base(model, device)
    model.to(device, non_blocking=True)
    language_model = LanguageModel(base)

    # Mechanism and optimizer.
    gradients = PerExampleGradients(model)
    parameters = gradients.parameters
    mechanism: Mechanism
    if plan:
        seed = settings.insecure_fixed_noise_seed
        keys = data["train"].keys() if plan.bands > 1 else None
        mechanism = private(
            plan, gradients, masks, units, is_main=is_main, row_keys=keys, known_seed=seed
        )
        require_separate_examples(gradients, masks, language_model)
    else:
        total_bs, normalization = settings.total_bs, settings.loss_normalization
        mechanism = plain(parameters, num_examples, total_bs, normalization, settings.seed)
    steps = num_steps(settings.num_epochs, num_examples, settings.total_bs)
    optimizer = make_optimizer(settings, parameters.values(), plan)
    scheduler = schedule(settings.lr_scheduler, optimizer, settings.warmup_steps, steps)
    memory = row_memory(base, parameters, settings, dtype) if plan else RowMemory()
    token_budget = tokens_at_once(mechanism, language_model, settings, memory)
    parts = compiled_parts(model, gradients, language_model) if settings.compile else []
    shapes = None
    if plan:
        to_try = shapes_to_try(settings, token_budget, cost_of(base), memory)
        shapes = probed_with(parts, mechanism, language_model, gradients, masks, *to_try)
    run = Run(
        settings=settings,
        accelerator=accelerator,
        data=data,
        pad_id=tokenizer.pad_token_id,
        model=model,
        language_model=language_model,
        parameters=parameters,
        mechanism=mechanism,
        optimizer=optimizer,
        scheduler=scheduler,
        steps=steps,
        token_budget=token_budget,
        shapes=shapes,
        is_sharded=is_sharded,
        base_fingerprint=fingerprint,
        prompt_date=prompt_date,
    )
    if settings.dry_run:
        rehearse(run)
        return None
    facts = {ROW_COUNTS: counts} | ({LARGEST_UNITS: largest} if largest else {}) | coins
    return begun(run, fingerprints(settings, splits["train"], data["train"], units), facts)


def preflight(
    settings: TrainingSettings, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Refuse what model, tokenizer or disk would not bear, before weights are loaded.

    Args:
        skeleton: of the base, without weights; changed.

    Returns:
        Warnings, one line each.

    Raises:
        UsageError: see `utils.runs.preflight`.
        OSError: the disk has no room for the checkpoints.
    """
    notices = check_style(tokenizer, settings.prompt_style)
    notices += check_positions(skeleton, settings.max_seq_len)
    require_vocabulary(embedding_rows(skeleton), tokenizer, 0)
    require_known_quantisation(skeleton)
    if settings.eps != -1:
        require_independent_examples(skeleton, settings.max_seq_len)
    adapted = adapt(skeleton, settings)
    if PartialState().is_main_process:
        trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
        frozen = sum(each.numel() for each in frozen_factors(adapted).values())
        require_room(settings.folder, settings.disk(trained, frozen))
    return notices


def fixed_date(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The day that all prompts of the run hold, that of its beginning; None where they hold none.

    The tokenizer's template holds it from here on.
    """
    if not is_dated(tokenizer, settings.prompt_style):
        return None
    day = on_main_process(partial(date_of, settings.folder)) or date.today().isoformat()
    fix_date(tokenizer, day)
    return day


def begun(run: Run, private_identity: dict, facts: dict[str, dict]) -> Run:
    """The run with its folder begun, or at the checkpoint where it goes on.

    Args:
        private_identity: see `begin`.
        facts: what is kept of the data under private/, by the name of its file.
    """
    settings = run.settings
    # Every process has drawn its own.
    drawn = tensors_sha256(run.parameters | run.frozen)
    require_same_on_every_rank({"adapter at the start": drawn})
    if COINS_FILE in facts:
        private_identity |= {COINS: coins_fingerprint(facts[COINS_FILE])}
    identity = {
        "base_model_fingerprint": run.base_fingerprint,
        "lora_target_modules": sorted(run.model.peft_config["default"].target_modules),
    } | ({"prompt_date": run.prompt_date} if run.prompt_date else {})
    # The other machines of a job may not see the folder.
    checkpoint = on_main_process(
        partial(begin_or_continue, settings, run.mechanism, run.steps, identity, private_identity)
    )
    metrics, first_step = None, checkpoint.state["step"] if checkpoint else 0
    average = settings.average and Average(settings.average, run.parameters, run.steps)
    if checkpoint:
        restore_adapter(run.parameters, checkpoint.adapter)
        restore_adapter(run.frozen, checkpoint.optimizer.get("frozen", {}))
        run.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
        run.scheduler.load_state_dict(checkpoint.optimizer["scheduler"])
        if average:
            average.load_state_dict(checkpoint.optimizer["average"])
    if run.is_main:
        for name, fact in facts.items():
            write_json(run.folder / "private" / name, fact)
        tracked = (
            settings.eps == -1
            or settings.report_to in LOCAL_TRACKERS
            or settings.report_private_metrics
        )
        metrics = PrivateMetrics(run.folder, first_step, run.accelerator, tracked=tracked)
    return replace(
        run,
        first_step=first_step,
        is_continued=checkpoint is not None,
        metrics=metrics,
        average=average or None,
    )


def read_splits(settings: TrainingSettings) -> tuple[dict[str, Dataset], Units | None]:
    """The train split, with canaries, the part of the validation split that is used, and units.

    Returns:
        The splits; and whose each row is, where a step draws units: a canary is nobody's, so it is
        a unit of its own.

    Raises:
        UsageError: the data set is not usable, or of another size than was stated.
    """
    splits = load_splits(settings.dataset_name, settings.prompt_style)
    units, most = None, settings.max_rows_per_unit
    if settings.unit_column is not None and most is not None:
        of_row = read_units(
            settings.dataset_name,
            settings.unit_column,
            owner=settings.owner,
            unowned_rows_are_units=settings.unowned_rows_are_units,
        )
        if settings.draws_units:
            canaries = of_row.max() + 1 + np.arange(settings.num_canary_rows)
            units = Units(np.concatenate([of_row, canaries]), most)
            require_size(settings, "num_train_units", int(of_row.max()) + 1)
        else:
            splits["train"] = splits["train"].select(rows_to_keep(of_row, most))
    if not settings.draws_units:
        require_size(settings, "num_train_examples", len(splits["train"]))
    splits["train"] = settings.canaries.added_to(
        splits["train"], settings.dataset_name, settings.prompt_style
    )
    if "val" in splits:
        used = min(len(splits["val"]), settings.max_eval_examples)
        splits["val"] = splits["val"].select(range(used))
    return splits, units


def audit_coins(settings: TrainingSettings) -> dict[str, dict]:
    """Which canaries of an audit are in: `COINS_FILE` as it is kept, or empty without an audit.

    Raises:
        UsageError: the run that is there was begun, and its coins are gone.
    """
    if not settings.audit_canaries:
        return {}

    def toss() -> dict:
        if holds_run(settings.folder):
            return read_coins(settings.folder, settings.audit_canaries)
        return {"inside": SecureRandom().bernoulli_indices(1, 2, settings.audit_canaries).tolist()}

    return {COINS_FILE: on_main_process(toss)}


def tokens_of(
    settings: TrainingSettings, splits: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, TokenisedExamples], dict[str, dict]]:
    """The splits, with the canaries of an audit at the end of the train split, and their coins."""
    style, max_seq_len = settings.prompt_style, settings.max_seq_len
    more: dict[str, TokenisedExamples] = {}
    if coins := audit_coins(settings):
        inside = settings.audited.inside(coins[COINS_FILE])
        every = settings.audited.examples(tokenizer, style, max_seq_len)
        more = {"train": as_trained(every, inside, tokenizer.eos_token_id)}
    data = tokenise_once(splits, tokenizer, style, max_seq_len, settings.folder, more)
    lengths = data["train"].lengths[: len(splits["train"])]
    settings.canaries.require_whole(lengths, max_seq_len)
    return data, coins


def require_size(settings: TrainingSettings, name: str, found: int) -> None:
    """Refuse data of another size than was stated: the guarantee was computed for another N."""
    stated = getattr(settings, name)
    if stated not in (None, found):
        what = "units" if name == "num_train_units" else "rows"
        raise UsageError(
            f"--{name} {stated}, but the train split of {settings.dataset_name} has {found} "
            f"{what}: the guarantee was computed for another N"
        )


def several_rows_notice(column: str) -> str:
    """For a run that protects rows, on data with a column that seems to say whose they are."""
    return (
        f"the data has a column {column!r}, and the guarantee is for one row, not for all rows of "
        f"one {column}: --unit_column {column} --max_rows_per_unit K makes it so (the most rows "
        f"that one has: private/{LARGEST_UNITS})"
    )


def require_one_job(
    settings: TrainingSettings,
    plan: PrivacyPlan | None,
    fingerprint: str,
    data: dict[str, TokenisedExamples],
    units: Units | None,
) -> None:
    """Refuse a job whose processes would not train the same model on the same data."""
    facts: dict[str, object] = {
        "base model": fingerprint,
        "training data": data["train"].fingerprint(),
        "validation data": data["val"].fingerprint() if "val" in data else None,
        "privacy plan": plan and plan.digest(),
        "unit of some row": units and units.fingerprint(),
    }
    flags = settings.run_settings
    facts |= {f"--{name}": flags[name] for name in flags.keys() - DIFFERS_BY_MACHINE}
    require_same_on_every_rank(facts)


def fingerprints(
    settings: TrainingSettings, rows: Dataset, tokens: TokenisedExamples, units: Units | None
) -> dict:
    """Of the training data as it is read, and as it was prepared: for `private/` alone."""
    prepared = len(rows) - settings.canaries.num_rows
    if settings.unit_column is not None and units is None:
        # Those that the cap left out are of the same data set.
        rows = load_splits(settings.dataset_name)["train"]
        prepared = len(rows)
    of_units = {} if units is None else {"units": units.fingerprint()}
    return of_units | {
        "training_data": tokens.fingerprint(),
        "rows_fingerprint": rows_fingerprint(islice(rows["instruction"], prepared)),
    }


def adapt(base: PreTrainedModel, settings: TrainingSettings) -> PeftModel:
    """The base with the adapters that the flags ask for."""
    targets = settings.target_modules or default_target_modules(base)
    return attach_lora(
        base,
        settings.lora_r,
        settings.lora_alpha,
        settings.dropout,
        "all-linear" if targets == ["all-linear"] else targets,
        settings.gradient_checkpointing,
        use_rslora=settings.use_rslora,
        rank_pattern=module_settings(settings.rank_pattern, int),
        alpha_pattern=module_settings(settings.alpha_pattern, float),
        frozen_a=settings.frozen_a,
    )


def make_optimizer(
    settings: TrainingSettings, parameters: Iterable[nn.Parameter], plan: PrivacyPlan | None
) -> torch.optim.Optimizer:
    """The optimizer that the flags ask for; what it knows of the noise is public."""
    lr, wd = settings.lr, settings.wd
    if settings.optimizer == SGD:
        return torch.optim.SGD(parameters, lr=lr, weight_decay=wd, momentum=MOMENTUM)
    if settings.optimizer == CORRECTED:
        assert plan is not None  # which the flags require
        deviation = plan.noise_multiplier * plan.clip_norm / plan.expected_batch_size
        return CorrectedAdamW(parameters, lr, wd, deviation)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=wd)


def row_masks(model: PeftModel, settings: TrainingSettings) -> RowMasks:
    """Masks by row in a DP run, under a key that the processes of the job share."""
    known_seed = settings.insecure_fixed_noise_seed
    key = b"" if known_seed is None else f"a known seed: {known_seed}".encode()
    masks = RowMasks(on_main_process(lambda: key or os.urandom(32)))
    if settings.eps != -1:
        use_row_dropout(model, masks)
    return masks


def require_separate_examples(
    gradients: PerExampleGradients, masks: RowMasks, language_model: LanguageModel
) -> None:
    """Refuse a model whose adapters do not see examples apart, or that is random by itself."""
    require_coverage(gradients, language_model)
    masks.rows = np.arange(2)
    require_no_other_randomness(
        language_model.model, lambda: language_model.example_losses(language_model.public_batch(2))
    )


def begin_or_continue(
    settings: TrainingSettings,
    mechanism: Mechanism,
    steps: int,
    identity: dict,
    private_identity: dict,
) -> Checkpoint | None:
    """Begin the run's folder and record, or find where to go on. On the main process alone.

    Raises:
        UsageError: what is there is of another run.
    """
    folder = settings.folder
    checkpoint = load_last_good(folder / "checkpoints") if holds_run(folder) else None
    begin(folder, settings.run_settings, identity, private_identity)
    mechanism.open(folder)
    mechanism.numerics = with_earlier(folder, mechanism.numerics)
    if checkpoint:
        mechanism.require_head(checkpoint.state["ledger"])
        if not 0 <= checkpoint.state["step"] <= steps:
            raise UsageError(
                f"{checkpoint.path} is of step {checkpoint.state['step']}, but the run has "
                f"{steps}; restore the run's own"
            )
    elif mechanism.steps_recorded:
        say(f"warning: {folder} has no whole checkpoint; starting again from step 0")
    return checkpoint


def row_memory(
    base: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    settings: TrainingSettings,
    dtype: torch.dtype,
) -> RowMemory:
    """What a row of a DP run takes, from shapes alone.

    Of a base whose configuration does not tell its shapes, per-example gradients alone.
    """
    architecture = Architecture.of_config(base.config.to_dict())
    row = settings.footprint(architecture, dtype.itemsize).row if architecture else RowMemory(0)
    shapes = Counter(tuple(tensor.shape) for tensor in parameters.values())
    matrices = tuple((count, d_in, d_out) for (d_out, d_in), count in shapes.items())
    return replace(row, matrices=matrices)


def tokens_at_once(
    mechanism: Mechanism,
    language_model: LanguageModel,
    settings: TrainingSettings,
    memory: RowMemory,
) -> int:
    """Those of --perdevice_bs sequences of the greatest length, or of as many as fit everywhere.

    Tried are microbatches of the lengths that take the most, short ones as well as the longest.
    """
    max_seq_len, device = settings.max_seq_len, PartialState().device
    if settings.perdevice_bs != "auto":
        return int(settings.perdevice_bs) * max_seq_len
    model = language_model.model.train()
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    # Next to the step's sum there will be the optimizer's moments, an average, and on the host past
    # noise.
    total, *_others = torch.ones(settings.copies, trained, device=device)
    _past = torch.ones(mechanism.bytes_of_past_noise, dtype=torch.uint8)

    def step(sequences: int) -> None:
        shapes = Shapes(max_seq_len, sequences * max_seq_len, None, memory)
        for tokens in dict.fromkeys(shapes.samples()):
            examples = np.zeros(shapes.most_rows(tokens), dtype=np.int64)
            batch = language_model.public_batch(len(examples), tokens)
            mechanism.expect(examples, 1)
            pass_microbatch(mechanism, language_model, max_seq_len, examples, batch)
            mechanism.add(total)

    count = torch.tensor([fitting_sequences(step, device)], device=device)
    sequences = int(gather(count).min())
    say_on_main(
        f"--perdevice_bs auto: {sequences} sequences of {max_seq_len} tokens fit on a device"
    )
    return sequences * max_seq_len


def cost_of(base: PreTrainedModel) -> Cost:
    """What a microbatch costs on this device."""
    num_layers = getattr(base.config.get_text_config(), "num_hidden_layers", 1)
    return cost_on(PartialState().device.type, base.dtype, num_layers, base.num_parameters())


def shapes_to_try(
    settings: TrainingSettings, token_budget: int, cost: Cost, memory: RowMemory
) -> tuple[Shapes, Shapes]:
    """Shapes with any number of rows and with a fixed one, from public constants.

    On a CPU, where a microbatch costs little besides its tokens, lengths are padded by an eighth at
    most, and the rows that fill up cost at most half of a microbatch for each padded length: 3% of
    the tokens of 4,096 instructions. On a GPU both follow from what a microbatch costs.

    Args:
        cost: of a microbatch, see `cost_on`.
    """
    together = settings.total_bs
    if settings.draws_units and settings.max_rows_per_unit:
        together = min(together, UNITS_AT_ONCE) * settings.max_rows_per_unit
    free = Shapes(settings.max_seq_len, token_budget, None, memory)
    if PartialState().device.type == "cpu":
        return free, replace(free, tokens=max(LEAST_TOKENS_ON_A_CPU, together // 4))
    fixed = replace(free, tokens=LEAST_TOKENS)
    return cheapest_shapes(free, together, cost), cheapest_shapes(fixed, together, cost)


def rehearse(run: Run) -> None:
    """Pass made-up tokens in the largest shape of a step, and say what the run would take.

    A step is one that might be drawn; that time follows the lengths of private rows. The rate that
    plans are made with is of a step whose rows are all of the greatest length.
    """
    settings, mechanism = run.settings, run.mechanism
    mechanism.begin(0, run.accelerator.process_index)
    indices = on_main_process(partial(mechanism.draw, 0))
    parts = mechanism.expect(indices, run.accelerator.num_processes)
    lengths = run.data["train"].lengths
    own = [each for each in own_microbatches(run, indices, lengths, run.shapes, parts) if each]
    nothing = Microbatch(np.zeros(1, dtype=np.int64), 1, settings.max_seq_len)
    largest = max(own, key=lambda each: each.rows * each.tokens, default=nothing)
    batch = tensors_of(run, "train", largest)
    made_up = run.language_model.public_batch(*batch["input_ids"].shape)["input_ids"]
    trained = sum(tensor.numel() for tensor in run.parameters.values())
    run.model.train()
    with PeakMemory(run.device) as memory:
        # Next to the step's sum there will be the optimizer's moments and an average.
        total, *_others = torch.ones(settings.copies, trained, device=run.device)
        for _ in range(2):  # the first one also pays for what is set up once
            began = time.monotonic()
            mechanism.expect(largest.examples, 1)
            pass_microbatch(
                mechanism, run.language_model, settings.max_seq_len, largest.examples,
                batch | {"input_ids": made_up},
            )  # fmt: skip
            mechanism.add(total)
            total.sum().item()  # waits for the device
            passing = time.monotonic() - began
        releasing = mechanism.rehearse_release(total)
    of_a_token = passing / (largest.rows * largest.tokens)
    seconds = largest_of_all(of_a_token * sum(each.rows * each.tokens for each in own) + releasing)
    longest = settings.total_bs * settings.tokens_of_a_draw
    rate = longest / largest_of_all(
        of_a_token * longest / run.accelerator.num_processes + releasing
    )
    gib = largest_of_all(memory.peak / GIB)
    disk = settings.disk(trained, sum(each.numel() for each in run.frozen.values()))
    apart = mechanism.bytes_of_past_noise / GIB if run.device.type == "cuda" else 0
    host = f" and {apart:.3g} GiB of host memory for past noise in one" if apart else ""
    if run.is_main:
        say(
            f"--dry_run: {seconds:.3g} s a step and {seconds * run.steps / 3600:.3g} h for "
            f"{run.steps:,} steps, without validation (private: as long as the rows are); "
            f"--tokens_per_second {rate:.3g} for --advise, were all rows of {settings.max_seq_len} "
            f"tokens; {gib:.3g} GiB of memory at most in a process{host}, "
            f"{disk / 1e6:,.1f} MB of disk"
        )


def compiled_parts(
    model: PeftModel, gradients: PerExampleGradients, language_model: LanguageModel
) -> list[nn.Module]:
    """Compile the frozen parts of a model, on all processes or, where one cannot, on none."""
    parts, reason = frozen_parts(model), ""
    compile_parts(parts)
    try:
        require_coverage(gradients, language_model)
    except UsageError as error:
        cause = error.__cause__
        reason = in_one_line(cause if isinstance(cause, Exception) else error, 200)
    if largest_of_all(bool(reason)):
        undo(parts)
        say_on_main(f"--compile: cannot, and goes on without: {reason or 'another process cannot'}")
        return []
    return parts


def probed_with(
    parts: list[nn.Module],
    mechanism: Mechanism,
    language_model: LanguageModel,
    gradients: PerExampleGradients,
    masks: RowMasks,
    free: Shapes,
    fixed: Shapes,
) -> Shapes:
    """The shapes that a probe finds, with compiled parts if these are exact, else without them."""
    probe = partial(probed, language_model, gradients, masks, free, fixed, largest_of_all)
    try:
        shapes, numerics = probe()
        reason = str(numerics) if numerics.difference else ""
    except UsageError as error:
        if not parts:
            raise
        reason = str(error)
    if parts and reason:
        undo(parts)
        say_on_main(f"--compile: goes on without, since compiled parts are not exact: {reason}")
        shapes, numerics = probe()
    mechanism.numerics = str(numerics)
    return shapes


def say_on_main(line: str) -> None:
    """Say something once for all processes."""
    if PartialState().is_main_process:
        say(line)


def largest_of_all(number: float) -> float:
    """The largest of a number over all processes."""
    own = torch.tensor([number], device=PartialState().device)
    return float(gather(own).max())


# ------------------------------------------------------------------------ the loop


def learn(run: Run, rescue: list[Callable[[], object]]) -> int:
    """T logical steps, and the end. Returns the exit code.

    Args:
        rescue: gets what saves the work if another process of the job is lost.
    """
    settings, mechanism, lengths = run.settings, run.mechanism, run.data["train"].lengths
    step = run.first_step
    # Tensors and `step` change together, between two messages to other processes.
    rescue.append(lambda: try_to_save(run, step, write_checkpoint))
    say_start(run)
    stop = StopRequest()
    progress = Progress(
        None, "train", unit="step", total=run.steps, initial=step, hidden=not run.is_main
    )
    if step == 0 and not settings.no_eval_at_start:
        evaluate(run, step, stop)
    saved_at = step if run.is_continued else -1
    has_moved = step > 0
    total = torch.zeros(sum(p.numel() for p in run.parameters.values()), device=run.device)
    halving, failed = Halving(run.shapes, may_halve=not run.is_sharded), False

    while step < run.steps:
        began = time.monotonic()
        run.model.train()
        mechanism.begin(step, run.accelerator.process_index)

        # Draw: once for the whole job, then split over ranks and microbatches.
        indices = on_main_process(partial(mechanism.draw, step))
        parts = mechanism.expect(indices, run.accelerator.num_processes)
        microbatches = own_microbatches(run, indices, lengths, run.shapes, parts)

        # Sum of clipped per-example gradients (of plain ones in a run without privacy).
        share = add_own_share(run, halving, microbatches, total, stop)

        # Reduce over ranks. What stops one of them abandons the step on all.
        stopped, failed = agree(run, share, halving, stop, len(indices))
        if stopped or failed:
            break
        total_of_all = reduce(total, "sum")

        # Release: with noise, once for the whole job, and on record before anybody can see it.
        released = broadcast(mechanism.release(total_of_all, step))

        # Divide by the public batch size, and step. Half a step is not to be saved.
        assign_gradient(run.parameters, released / mechanism.divisor)
        del total_of_all, released
        save_last = rescue.pop()
        before = None if has_moved else [p.detach().clone() for p in run.parameters.values()]
        learning_rate = run.optimizer.param_groups[0]["lr"]
        run.optimizer.step()
        run.scheduler.step()
        step += 1
        if run.average:
            run.average.update(step)
        rescue.append(save_last)
        if before is not None and learning_rate > 0:
            require_movement(before, run.parameters)
            has_moved = True

        # Tell the owner, and save.
        loss_sum, loss_tokens = reduce(share.losses, "sum").tolist()
        real_tokens, seconds = int(lengths[indices].sum()), time.monotonic() - began
        run.record(
            step,
            {
                "train_loss": loss_sum / max(1.0, loss_tokens),
                "learning_rate": learning_rate,
                "batch_size": len(indices),
                "real_tokens": real_tokens,
                "seconds": seconds,
                **mechanism.statistics(share.norms),
            },
        )
        progress.set_postfix_str(f"{real_tokens / seconds:.0f} real tokens/s")
        progress.update()
        if step == run.steps or ends_epoch(run, step):
            evaluate(run, step, stop)
        if step % settings.save_steps == 0 and step < run.steps and try_to_save(run, step, save):
            saved_at = step
    progress.close()

    # A checkpoint that the main process could not write may differ from what others believe.
    if on_main_process(lambda: saved_at != step):
        try_to_save(run, step, save)
    finish(run, step, LACK_OF_MEMORY if failed else stop.signal_name)
    return EXIT_FAILED if failed else EXIT_OK if step == run.steps else EXIT_INTERRUPTED


@dataclass
class Share:
    """What this process has added to the sum of a step.

    Attributes:
        losses: float32 [2], their sum, and of how many tokens.
        norms: what `mechanism.add` returned.
        rows: examples that are in the sum.
        out_of_memory: whether it ended early, so that the sum is not whole.
    """

    losses: torch.Tensor
    norms: list[torch.Tensor] = field(default_factory=list)
    rows: int = 0
    out_of_memory: bool = False


def add_own_share(
    run: Run,
    halving: Halving,
    microbatches: list[Microbatch | None],
    total: torch.Tensor,
    stop: StopRequest,
) -> Share:
    """Put what this process's microbatches contribute into `total` [parameters], unless stopped.

    A microbatch is added once it has passed as a whole, so running out of memory while it passes
    leaves the sum as it was; running out of it later ends the share.
    """
    mechanism = run.mechanism
    share = Share(torch.zeros(2, device=run.device))
    total.zero_()

    def attempt(part: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        # Without privacy a pass that failed has left some gradients.
        run.optimizer.zero_grad()
        batch = whole_batch if part is whole else tensors_of(run, "train", part)
        max_seq_len = run.settings.max_seq_len
        return pass_microbatch(mechanism, run.language_model, max_seq_len, part.examples, batch)

    for microbatch in batches(run, "train", microbatches):
        if stop_asked(run, stop):
            break
        if microbatch is None:
            with mechanism.capture(np.zeros(1, dtype=np.int64)):
                run.language_model.idle_pass()
            continue
        whole, whole_batch = microbatch
        try:
            for part, (sums, counts) in halving.passes(whole, attempt):
                share.norms.append(mechanism.add(total))
                share.losses += torch.stack([sums.nansum(), counts.sum()])
                share.rows += len(part.examples)
        except torch.OutOfMemoryError:
            if run.is_sharded:  # The others are in the middle of a pass, which waits for this one.
                raise
            share.out_of_memory = True
            break
    return share


def own_microbatches(
    run: Run,
    indices: np.ndarray,
    lengths: np.ndarray,
    shapes: Shapes | None = None,
    parts: list[np.ndarray] | None = None,
) -> list[Microbatch | None]:
    """This rank's share of a batch; with a sharded base all ranks have equally many, some None."""
    num_ranks = run.accelerator.num_processes
    if parts is None:
        ranks = cut_microbatches(indices, lengths, run.token_budget, num_ranks, shapes, run.cost)
    else:
        ranks = deal_parts(parts, lengths, run.token_budget, num_ranks, shapes, run.cost)
    own = ranks[run.accelerator.process_index]
    idle = max(map(len, ranks)) - len(own) if run.is_sharded else 0
    return [*own, *[None] * idle]


def batches(
    run: Run, split: str, microbatches: list[Microbatch | None]
) -> Iterator[tuple[Microbatch, dict[str, torch.Tensor]] | None]:
    """Microbatches with their tensors, which are on their way to the device one pass ahead."""
    ahead = (
        None if part is None else (part, tensors_of(run, split, part)) for part in microbatches
    )
    following = next(ahead, None)
    for _ in microbatches:
        current, following = following, next(ahead, None)
        yield current


def tensors_of(run: Run, split: str, part: Microbatch) -> dict[str, torch.Tensor]:
    """A microbatch of a split, on the device."""
    return run.data[split].collate(
        part.examples, run.pad_id, run.device, rows=part.rows, tokens=part.tokens
    )


def pass_microbatch(
    mechanism: Mechanism,
    language_model: LanguageModel,
    max_seq_len: int,
    examples: np.ndarray,
    batch: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward and backward pass of a microbatch, after which `mechanism.add` adds it.

    Returns:
        Summed losses and numbers of tokens with loss, each [examples].
    """
    with mechanism.capture(examples, len(batch["lengths"])):
        sums, counts = language_model.example_losses(batch)
        losses = normalise(sums, counts, mechanism.loss_normalization, max_seq_len)
        losses.sum().backward()
    return sums.detach(), counts


def agree(
    run: Run, share: Share, halving: Halving, stop: StopRequest, drawn: int
) -> tuple[bool, bool]:
    """Whether the step is abandoned, since a stop was asked for, and since a rank lacks memory.

    Lets the report say, where that matters, that rows of one length passed in several shapes.

    Raises:
        RuntimeError: not all of the `drawn` rows are in the sums of all ranks, each once.
    """
    facts = [stop.requested, share.out_of_memory, halving.has_halved, share.rows]
    stopped, failed, halved, rows = over_all_ranks(facts, run.device)
    if not (stopped or failed or rows == drawn):
        raise RuntimeError(f"{rows:.0f} rows of {drawn} that were drawn are in the sum")
    mechanism, is_fixed = run.mechanism, run.shapes is not None and run.shapes.tokens is not None
    if halved and is_fixed and run.is_main and HALVED not in mechanism.numerics:
        mechanism.numerics = with_earlier(run.folder, HALVED)
    return stopped > 0, failed > 0


def over_all_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sums of a few numbers over all ranks."""
    return reduce(torch.tensor(numbers, dtype=torch.float32, device=device), "sum").tolist()


def stop_asked(run: Run, stop: StopRequest) -> bool:
    """Whether this process, or with a sharded base any, was asked to stop."""
    if not run.is_sharded:
        return stop.requested
    return over_all_ranks([stop.requested], run.device)[0] > 0


def ends_epoch(run: Run, step: int) -> bool:
    """Whether as many examples as the data set has were (expected to be) drawn since the last."""
    batch, examples = run.mechanism.divisor, run.mechanism.num_examples
    return step * batch // examples > (step - 1) * batch // examples


def evaluate(run: Run, step: int, stop: StopRequest) -> None:
    """Record and show the validation loss, where there is a validation split."""
    if "val" not in run.data:
        return
    data = run.data["val"]
    microbatches = own_microbatches(run, np.arange(len(data)), data.lengths)
    loss = validation_loss(run, microbatches, stop)
    if loss is not None and run.is_main:
        run.record(step, {"validation_loss": loss})
        Progress.write(f"step {step}: validation loss {loss:.4f} (private)", file=sys.stderr)
    if run.average and step == run.steps:
        with run.average.in_place():
            loss = validation_loss(run, microbatches, stop)
        if loss is not None and run.is_main:
            run.record(step, {"validation_loss_of_average": loss})


@torch.no_grad()
def validation_loss(
    run: Run, microbatches: list[Microbatch | None], stop: StopRequest
) -> float | None:
    """Mean loss in nats per token with loss, over all ranks; None if a stop was asked for.

    Args:
        microbatches: of this rank; None is a pass that only keeps pace with other ranks.
    """
    language_model = run.language_model
    language_model.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    for microbatch in batches(run, "val", microbatches):
        if stop_asked(run, stop):
            sums[2] = 1
            break
        if microbatch is None:
            language_model.example_losses(language_model.public_batch(1))
            continue
        _, batch = microbatch
        losses, counts = language_model.example_losses(batch)
        sums[0] += losses.sum()
        sums[1] += counts.sum()
    loss, tokens, stopped = reduce(sums, "sum").tolist()
    return None if stopped else loss / max(1.0, tokens)


def require_movement(before: list[torch.Tensor], parameters: dict[str, torch.Tensor]) -> None:
    """Raise unless the first step moved every trainable tensor that it had a gradient for."""
    pairs = list(zip(before, parameters.values()))
    # The device is asked once for all of them, and not for each.
    pulled = torch.stack([tensor.grad.any() for _, tensor in pairs]).tolist()
    moved = torch.stack([(old != tensor).any() for old, tensor in pairs]).tolist()
    for name, was_pulled, has_moved in zip(parameters, pulled, moved):
        # Without noise the gradient of LoRA's A is zero as long as B is.
        if was_pulled and not has_moved:
            raise RuntimeError(f"{name} did not move in the first step: it is not being trained")
    if not any(pulled):
        raise RuntimeError("every gradient of the first step is zero: nothing is being trained")


def with_earlier(folder: Path, numerics: str) -> str:
    """What the probe found now and at earlier starts of the run, which may have been elsewhere."""
    file = folder / "private" / NUMERICS
    found = json.loads(file.read_text()) if file.exists() else []
    if numerics not in found:
        found.append(numerics)
        write_json(file, found)
    return "; ".join(found)


def write_checkpoint(run: Run, step: int) -> None:
    """Write a checkpoint; on the main process alone."""
    if run.is_main:
        states = {"optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict()}
        if run.average:
            states["average"] = run.average.state_dict()
        if run.frozen:  # which are not drawn again: another machine may draw other ones
            states["frozen"] = {name: tensor.detach() for name, tensor in run.frozen.items()}
        save_checkpoint(
            run.folder / "checkpoints",
            step,
            run.parameters,
            states,
            {"ledger": run.mechanism.head},
            run.settings.keep_checkpoints,
        )


def save(run: Run, step: int) -> None:
    """Write a checkpoint, once all processes are known to train the same model."""
    require_same_tensors(run.parameters)
    write_checkpoint(run, step)


def try_to_save(run: Run, step: int, writing: Callable[[Run, int], None]) -> bool:
    """Write a checkpoint, or warn that the disk takes none; whether it was written."""
    try:
        writing(run, step)
    except OSError as error:
        say(f"warning: no checkpoint at step {step}: {error}; the steps so far are in memory alone")
        return False
    return True


# ------------------------------------------------------------------------ the end


def finish(run: Run, step: int, stopped_by: str) -> None:
    """Write the report and, if all steps are taken, the adapter; close what is open.

    A report that names its adapter comes last, so that a run which was killed before goes on.
    """
    if run.is_main:
        canaries = {"canaries": run.settings.num_canary_rows}
        # Of a finished run whose adapter was moved away, the report names the one on record.
        report = run.mechanism.report(step) | canaries | {ADAPTER_HASH: run.mechanism.adapter}
        write_report(run.folder, report)
        if step == run.steps:
            sha256 = save_adapter(run, report)
            run.mechanism.record_adapter(sha256)
            report = run.mechanism.report(step) | canaries | {ADAPTER_HASH: sha256}
            write_report(run.folder, report)
        if run.metrics:
            run.metrics.close()
        run.mechanism.close()
        say_end(run.folder, report, step == run.steps, stopped_by)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


def save_adapter(run: Run, report: dict) -> str:
    """Write the adapter, its model card and its training style, in one piece; returns its hash.

    One that is on record already stays as it is: another version of PEFT writes another one.

    Raises:
        UsageError: the one on record is not there, and what is written now differs from it.
    """
    settings, final = run.settings, run.folder / "adapter"
    if final.exists() and run.mechanism.adapter == adapter_sha256(final):
        return run.mechanism.adapter
    info = {
        "prompt_style": settings.prompt_style,
        "max_seq_len": settings.max_seq_len,
        "base_model": portable(settings.model_name),
        "base_model_fingerprint": run.base_fingerprint,
        "base_model_bits": settings.quantised_bits,
    } | ({"prompt_date": run.prompt_date} if run.prompt_date else {})
    run.model.peft_config["default"].base_model_name_or_path = portable(settings.model_name)
    if not run.average:
        write_adapter(run, final, info, report)
    else:
        write_adapter(run, run.folder / LAST_ADAPTER, info, report)
        with run.average.in_place():
            write_adapter(run, final, info | {"average": settings.average}, report)
    return adapter_sha256(final)


def write_adapter(run: Run, folder: Path, info: dict, report: dict) -> None:
    """Write the model's adapter as it is now, see `save_adapter`."""
    settings = run.settings
    card = model_card(settings.model_name, settings.prompt_style, report, str(folder))
    with whole_folder(folder) as temporary:
        run.model.save_pretrained(temporary, save_embedding_layers=False)
        write_adapter_info(temporary, info)
        write_atomic(temporary / "README.md", card)
        if run.mechanism.adapter and folder.name == "adapter":
            run.mechanism.record_adapter(adapter_sha256(temporary))


def say_start(run: Run) -> None:
    """Tell what will be done."""
    if not run.is_main:
        return
    num_parameters = sum(tensor.numel() for tensor in run.parameters.values())
    num_examples = run.mechanism.num_examples
    say(f"{num_parameters:,} trainable parameters, {num_examples:,} examples, {run.steps:,} steps")
    say(run.mechanism.describe())
    if "val" not in run.data:
        say("no validation split: no loss on rows that are held out will be known")
    if run.first_step:
        say(f"continuing {run.folder} after step {run.first_step:,}")


def say_counts(settings: TrainingSettings, counts: dict[str, dict[str, int]]) -> None:
    """Tell the owner of rows that teach less than they could; and that --check is through."""
    for split, found in counts.items():
        if found["cut"]:
            say(
                f"warning: of {found['rows']:,} rows of {split}, {found['cut']:,} are cut at "
                f"--max_seq_len {settings.max_seq_len} and {found['without_loss']:,} have no token "
                "with loss (private); use a greater one, or shorter rows"
            )
    if settings.check:
        say("--check: nothing was found that would stop this run")


def say_end(folder: Path, report: dict, finished: bool, stopped_by: str) -> None:
    """Tell what was done, and where it is."""
    if not finished:
        say(f"stopped by {stopped_by}; the same command with --resume auto continues {folder}")
        return
    if report["guarantee"]:
        say(f"epsilon {rounded_up(report['epsilon']['upper'])} at delta {report['delta']:g}")
    say(f"adapter {folder / 'adapter'}, report {folder / 'privacy_report.md'}")


if __name__ == "__main__":
    run_cli(main)
