"""Plan a training run and print the one command that starts it.

    python generate_train_command.py --dataset_name quickstart_instructions \\
        --model_name data/quickstart_model --job_sess mine --prompt_style uncond_generation \\
        --eps 8 --delta 1e-5 --advised --max_seq_len 128

Counts the training examples, computes the noise multiplier that --eps and --delta need, and
prints an `accelerate launch` line on stdout; what it means goes to stderr. Paste the line, or
run it at once with --run, which passes its exit code on.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from utils.cli import EXIT_OK, UsageError, run_cli, say
from utils.command_line.config import ConfigSettings, read_config_and_flags, write_config
from utils.command_line.launch import DEFAULT_PORT, launch_command, print_or_run
from utils.command_line.parser import (
    flag,
    natural_int,
    parser_of,
    port,
    positive_float,
    to_argv,
)
from utils.command_line.training_flags import (
    TrainingSettings,
    check_training_settings,
    default_settings,
    plan_of,
    plan_to_follow,
    settle_delta,
)
from utils.models.base_folder import read_config
from utils.models.footprint import CARDS, GIB, Architecture, Training, remedy
from utils.privacy.accounting import MAX_STEPS
from utils.privacy.banded import BANDED, WHITE
from utils.privacy.plan import ROWS, PrivacyPlan, num_steps
from utils.privacy.recipe import (
    FIRST_STEPS,
    HALF_STEPS,
    LEAST_SIZE,
    LOW_RANK,
    MOST_STEPS,
    TRIED_WIDTH,
    batch_sizes,
    best_places,
    learning_rate,
    noise_of,
    promise,
    recipe_warnings,
    schedule_warnings,
    signal_to_noise,
    warmup_steps,
)
from utils.runs.preflight import check_here
from utils.runs.run_folder import arguments_of, holds_run, require_usable
from utils.texts.data_sets import count_train_examples, tried_places
from utils.texts.units import read_units, rows_to_keep

# Far beyond any run; more are a slip of the pen.
MOST_TOKENS = 1e18
# Features of a token in LLaMA 2 7B, an example of a wide base.
WIDE = 4096
# What goes with every size; the flags that advice chooses; and what none of a run has.
RECIPE: dict[str, Any] = {"loss_normalization": "tokens", "clip": 0.5, "lr_scheduler": "cosine"}
CHOSEN = (*RECIPE, "total_bs", "num_epochs", "warmup_steps", "lr")
WITHOUT_ADVICE: dict[str, Any] = {
    "advised": False, "compute": None, "hours": None, "tokens_per_second": None
}  # fmt: skip

_launch = partial(flag, group="launch")
_advice = partial(flag, group="advice")


@dataclass(frozen=True, kw_only=True)
class Settings(ConfigSettings, TrainingSettings):
    """The training run's flags, and those of the launch."""

    gpus: int = _launch("GPUs of each machine, one process per GPU", 1)
    num_machines: int = _launch(
        "machines of the job; each needs its own line, which differs in --machine_rank alone", 1
    )
    machine_rank: int = _launch("the machine this line is for, from 0", 0, type=natural_int)
    main_process_ip: str | None = _launch("address of machine 0, as the others see it")
    main_process_port: int | None = _launch(
        f"its port; {DEFAULT_PORT} with several machines, any free one otherwise",
        type=port,
    )
    card: int | None = _launch(
        "GiB of memory of each GPU: warn if the run does not fit, with the flags to change, as "
        "computed from the shapes in the model's config.json",
        type=int,
        choices=CARDS,
    )
    run: bool = _launch("run the command; pass on its exit code", False)

    advise: bool = _advice(
        "print, in place of a command, what could stand for --total_bs, --num_epochs, --lr, its "
        "schedule, --clip and --loss_normalization at the same --eps and as many tokens, and end",
        False,
    )
    advised: bool = _advice(
        "take the flags of the line that --advise marks; --num_epochs, or --compute or --hours, "
        "say how much there is",
        False,
    )
    compute: float | None = _advice(
        "tokens that all steps may take, where a row counts as --max_seq_len of them and a unit as "
        "--max_rows_per_unit rows; those of --num_epochs if left out",
        type=positive_float,
        metavar="TOKENS",
    )
    hours: float | None = _advice(
        "the same in hours, with --tokens_per_second", type=positive_float
    )
    tokens_per_second: float | None = _advice(
        "what a --dry_run of such a run says, counted as --compute is: shorter rows take less time",
        type=positive_float,
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    settings = read_config_and_flags(Settings, __doc__, argv)
    run = settings.run or settings.is_rehearsal
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    check_advice(settings, run, given)
    if settings.advise or settings.advised:
        settings = replace(settings, **RECIPE)
    warnings = check_training_settings(settings)
    warnings += check_here(settings.model_name, settings.gpus, must=run)
    counted, size_warnings = train_examples(settings)
    num_examples = counted + settings.num_canary_rows
    is_auto = settings.delta == "auto"
    settings = settle_delta(settings, num_examples)
    warnings += size_warnings
    if settings.advise:
        table, table_warnings = advice(settings, num_examples)
        for warning in warnings + table_warnings:
            say(f"warning: {warning}")
        print(table)
        return EXIT_OK
    if settings.advised:
        settings = replace(settings, **followed(settings, num_examples), **WITHOUT_ADVICE)
    require_usable(settings.folder, settings.run_settings, settings.resume, default_settings())
    plan, plan_warnings = plan_to_follow(settings, num_examples)
    compared = over_white(settings, plan, num_examples) if plan and plan.bands > 1 else None
    settings = replace(
        settings,
        num_train_examples=settings.num_train_examples if settings.draws_units else counted,
        num_train_units=counted if settings.draws_units else settings.num_train_units,
        noise_multiplier=plan.noise_multiplier if plan else settings.noise_multiplier,
        bands=plan.bands if plan and settings.noise == BANDED else settings.bands,
    )

    footprint = footprint_of(settings)
    trained = footprint.trained if footprint else None
    warnings += plan_warnings + memory_warnings(settings, footprint)
    if plan:
        warnings += recipe_warnings(plan, settings.max_seq_len)
    steps = plan.steps if plan else num_steps(settings.num_epochs, num_examples, settings.total_bs)
    best_rate, bears_more = None, False
    if plan and footprint:
        best_rate = learning_rate(plan, settings.optimizer, footprint.architecture.hidden)
        bears_more = settings.noise == WHITE and footprint.rank <= LOW_RANK
    warnings += schedule_warnings(
        settings.lr_scheduler,
        settings.warmup_steps,
        steps,
        settings.lr,
        best_rate,
        bears_more,
    )
    for warning in warnings:
        say(f"warning: {warning}")
    say_summary(settings, plan, num_examples, trained, is_auto, steps, compared)
    if settings.config and not settings.is_rehearsal:
        write_config(settings.config_file, settings)
    command = launch_command(
        "train.py",
        to_argv(parser_of(TrainingSettings, ""), settings),
        settings.gpus,
        settings.num_machines,
        settings.machine_rank,
        settings.main_process_ip,
        settings.main_process_port,
    )
    return print_or_run(command, run)


def check_advice(settings: Settings, run: bool, given: set[str]) -> None:
    """Refuse advice next to what it would change, and without it what it alone reads.

    Args:
        given: names of flags that stand on the command line.

    Raises:
        UsageError: see its message.
    """
    if settings.advise and (run or settings.advised):
        raise UsageError(
            "--advise prints in place of a command; leave --run, --advised and rehearsals out"
        )
    advises = settings.advise or settings.advised
    for name in ("compute", "hours", "tokens_per_second"):
        if not advises and getattr(settings, name) is not None:
            raise UsageError(f"--{name} needs --advise or --advised: no run reads it")
    if advises and settings.eps == -1:
        raise UsageError("advice weighs noise, and --eps -1 has none; give --eps")
    if advises and settings.noise_multiplier is not None:
        raise UsageError("advice calibrates --noise_multiplier for every line; leave it out")
    for name in ("compute", "hours"):
        if getattr(settings, name) is not None and "num_epochs" in given:
            raise UsageError(f"--{name} and --num_epochs both say how much there is; leave one out")
    if settings.advised:
        # A size or a rate of one's own next to the others would be of no line. A file of flags has
        # them all, those at their defaults too.
        defaults = default_settings()
        for name in CHOSEN:
            is_own = getattr(settings, name) not in (RECIPE.get(name), defaults[name])
            if (is_own or name in given) and name != "num_epochs":
                raise UsageError(f"--advised chooses --{name}; leave one of the two out")


@dataclass(frozen=True)
class Recipe:
    """A line of advice.

    Attributes:
        promise: see `recipe.promise`.
        epochs: as --num_epochs.
        warnings: of the plan.
    """

    promise: float
    epochs: float
    plan: PrivacyPlan
    warnings: list[str]


def recipes(settings: Settings, num_examples: int) -> tuple[list[Recipe], UsageError | None]:
    """What can be had at one epsilon and one compute, around the best, the smallest batch first.

    Returns:
        The lines, and why there is none of some size, such as more noise, steps or bands than it
        can have.

    Raises:
        UsageError: there is nothing to choose from.
    """
    a_draw = settings.tokens_of_a_draw
    num_draws = int(tokens_to_spend(settings, num_examples * a_draw) / a_draw)
    if num_draws < 1:
        rows = " x --max_rows_per_unit" if a_draw > settings.max_seq_len else ""
        raise UsageError(
            f"one draw takes {a_draw:,} tokens, --max_seq_len{rows}, and there are fewer to spend; "
            "lower these, or raise --compute, --hours or --num_epochs"
        )
    if num_draws > MAX_STEPS * num_examples:
        raise UsageError(
            f"{num_draws:,} draws of {num_examples:,} take more than {MAX_STEPS:,} steps, the most "
            "that is accounted for; lower --compute, --hours or --num_epochs"
        )
    sizes, refused = batch_sizes(num_examples, num_draws), dict[int, UsageError]()

    @cache
    def of_size(place: int) -> Recipe | None:
        size = sizes[place]
        steps = max(1, num_draws // size)
        # A little more than these steps, which is cut off.
        epochs = float(f"{(steps + 0.01) * size / num_examples:.6g}")
        try:
            sized = replace(settings, **RECIPE, total_bs=size, num_epochs=epochs)
            plan, warnings = plan_of(sized, num_examples)
        except UsageError as error:
            refused[place] = error
            return None
        assert plan is not None
        return Recipe(promise(plan, settings.max_seq_len), epochs, plan, warnings)

    def promised(place: int) -> float:
        recipe = of_size(place)
        return recipe.promise if recipe else 0.0

    first = sum(num_draws // size > FIRST_STEPS for size in sizes)
    places = best_places(promised, len(sizes), first)
    if not any(map(of_size, places)):
        places = range(len(sizes))
    found = [recipe for recipe in map(of_size, places) if recipe]
    if not found:
        # The smallest batch has the most steps, and so the widest bounds.
        raise refused[0]
    return found, refused[min(refused)] if len(found) < len(places) else None


def recipe_flags(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """The flags of a line of advice, those of `RECIPE` among them.

    A base of unknown width gets the rate of a wide one: too low a rate learns less, and too high a
    one nothing.
    """
    plan, base = recipe.plan, footprint_of(settings)
    width = base.architecture.hidden if base else WIDE
    return {
        "total_bs": plan.expected_batch_size,
        "num_epochs": recipe.epochs,
        **RECIPE,
        "warmup_steps": warmup_steps(plan.steps),
        "lr": learning_rate(plan, settings.optimizer, width),
    }


def followed(settings: Settings, num_examples: int) -> dict[str, Any]:
    """The flags that --advised takes: of the run that is continued, or of the best line."""
    if settings.resume == "auto" and holds_run(settings.folder):
        # What is known of the base, or of recipes, may have changed since it began.
        begun_with = arguments_of(settings.folder)
        flags = {name: begun_with[name] for name in CHOSEN if name in begun_with}
        say(f"--advised goes on as {settings.folder} began: {words_of(flags)}")
        return flags
    found, _ = recipes(settings, num_examples)
    best = max(found, key=lambda each: each.promise)
    if unknown := of_unknown_width(settings, best.plan):
        say(f"warning: {unknown}")
    return recipe_flags(settings, best)


def words_of(flags: dict[str, Any]) -> str:
    """Flags as they are typed."""
    return " ".join(
        f"--{name} {f'{value:.15g}' if isinstance(value, float) else value}"
        for name, value in flags.items()
    )


def advice(settings: Settings, num_examples: int) -> tuple[str, list[str]]:
    """A table of `recipes` with the flags of the best, and warnings of its plan."""
    found, refused = recipes(settings, num_examples)
    best = max(found, key=lambda each: each.promise)
    rows = [("total_bs", "num_epochs", "steps", "sigma", "sigma / total_bs", "tokens", "promise")]
    for each in found:
        plan = each.plan
        size, sigma = plan.expected_batch_size, plan.noise_multiplier
        rows.append((
            f"{size:,}", f"{each.epochs:g}", f"{plan.steps:,}", f"{sigma:.3f}",
            f"{sigma / size:.2e}", f"{plan.steps * size * settings.tokens_of_a_draw:,}",
            f"{each.promise:.2f}{' <-' if each is best else ''}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    wanted = f"of {LEAST_SIZE} or more that make {HALF_STEPS} to {MOST_STEPS} steps"
    size, steps = best.plan.expected_batch_size, best.plan.steps
    if size >= LEAST_SIZE and HALF_STEPS <= steps <= MOST_STEPS:
        reason = (
            f"Of batches {wanted}, the marked one promises most of what could be learnt: steps "
            "enough to get anywhere, at the least noise."
        )
    else:
        reason = f"No batch is {wanted}; this is the largest that leaves steps to learn in."
    table = "\n".join([
        *lines,
        *([f"Another size is left out: {refused}"] if refused else []),
        f"{reason} All are ({best.plan.target_epsilon:g}, {best.plan.delta:g})-DP; from public "
        f"numbers alone. {more_to_gain(settings)}{of_unknown_width(settings, best.plan)}Paste its "
        "flags, or give --advised in place of --advise:",
        words_of(recipe_flags(settings, best)),
    ])  # fmt: skip
    return table, best.warnings


def more_to_gain(settings: Settings) -> str:
    """A sentence on the flags that learnt more and were not given, if there are such."""
    flags = [] if settings.target_modules else ["--target_modules all-linear"]
    if settings.noise == WHITE:
        try:
            check_training_settings(replace(settings, noise=BANDED))
            flags.append(f"--noise {BANDED}")
        except UsageError:
            pass  # Not with these units, or this optimizer.
    if not flags:
        return ""
    return (
        "SmolLM2-135M learnt more from as many tokens, for no more epsilon, by "
        f"{' and '.join(flags)}: add what you can afford here, and it advises anew. "
    )


def of_unknown_width(settings: Settings, plan: PrivacyPlan) -> str:
    """A sentence on the rate, where it follows from a width that is not known."""
    rate = learning_rate(plan, settings.optimizer)
    if footprint_of(settings) or rate == learning_rate(plan, settings.optimizer, WIDE):
        return ""
    return (
        f"{settings.model_name} has no config.json here that tells its width, so --lr is that of "
        f"{WIDE:,} features a token; a base of up to {TRIED_WIDTH} learns more at {rate:g}. "
    )


def over_white(
    settings: Settings, plan: PrivacyPlan, num_examples: int
) -> tuple[float, float] | None:
    """A plan's noise over white noise of the same guarantee: in a step, and in the sum of all.

    None where there is no such noise: the plan spends less than its target, or no accountant has
    so small a sampling rate.
    """
    if settings.noise_multiplier is not None:
        return None
    try:
        white, _ = plan_of(replace(settings, noise=WHITE, bands="auto"), num_examples)
    except UsageError:
        return None
    assert white is not None
    of_a_step, of_all = noise_of(plan)
    ratio = plan.noise_multiplier / white.noise_multiplier
    return ratio * of_a_step, ratio * of_all / math.sqrt(plan.steps)


def tokens_to_spend(settings: Settings, of_an_epoch: int) -> float:
    """What all steps of a plan may take, in tokens.

    Raises:
        UsageError: the flags say it twice, or half.
    """
    if (settings.hours is None) != (settings.tokens_per_second is None):
        raise UsageError("--hours needs --tokens_per_second, and the other way round")
    if settings.hours is not None and settings.compute is not None:
        raise UsageError("--compute and --hours both say how much there is; leave one out")
    tokens = settings.compute or settings.num_epochs * of_an_epoch
    if settings.hours is not None and settings.tokens_per_second is not None:
        tokens = settings.hours * 3600 * settings.tokens_per_second
    if tokens > MOST_TOKENS:
        raise UsageError(f"{tokens:.2g} tokens are more than {MOST_TOKENS:g}, the most for advice")
    return tokens


def train_examples(settings: Settings) -> tuple[int, list[str]]:
    """What a step draws of the train split, rows or units, counted or as stated, and warnings.

    Raises:
        UsageError: the data set is not here and its size is not stated, or it has another size.
    """
    name, stated = settings.dataset_name, getattr(settings, settings.size_flag)
    num_rows = count_train_examples(name, settings.prompt_style)
    if num_rows is None:
        if stated is None:
            raise UsageError(
                f"{tried_places(name)}. Where it is on the hub or on another machine, state its "
                f"size with --{settings.size_flag}"
            )
        return stated, [f"{name} is not here; it must be where the command runs"]
    sizes = {"num_train_examples": num_rows}
    if settings.unit_column is not None:
        units = read_units(
            name,
            settings.unit_column,
            owner=settings.owner,
            unowned_rows_are_units=settings.unowned_rows_are_units,
        )
        sizes["num_train_units"] = int(units.max()) + 1
        if settings.max_rows_per_unit is not None and settings.unit_sampling == ROWS:
            sizes["num_train_examples"] = len(rows_to_keep(units, settings.max_rows_per_unit))
    for size_flag, found in sizes.items():
        stated = getattr(settings, size_flag)
        if stated not in (None, found):
            raise UsageError(f"--{size_flag} {stated}, but {name} has {found}")
    return sizes[settings.size_flag], []


def footprint_of(settings: Settings) -> Training | None:
    """What decides the run's memory; None if no config.json that is here tells the shapes."""
    config = read_config(settings.model_name)
    architecture = Architecture.of_config(config) if config else None
    if architecture is None:
        return None
    run = settings.footprint(architecture, 4 if settings.dtype == "float32" else 2)
    shards = settings.gpus * settings.num_machines if settings.fsdp else 1
    return replace(run, shards=shards)


def memory_warnings(settings: Settings, run: Training | None) -> list[str]:
    """What is to be said of the card that the user names.

    Args:
        run: see `footprint_of`.
    """
    card = settings.card
    if card is None:
        return []
    if run is None:
        return [
            f"--card {card}: whether the run fits is not known, since {settings.model_name} has no "
            "config.json here that tells its shapes"
        ]
    sequences = 1 if settings.perdevice_bs == "auto" else int(settings.perdevice_bs)
    if run.fits(sequences, card):
        return []
    flags = remedy(run, sequences, card)
    fix = f"use {flags}" if flags else "use a smaller model, or --fsdp and more --gpus"
    return [
        f"--card {card}: the run does not fit, it takes about {run.total(sequences) / GIB:.0f} GiB "
        f"(computed, not measured); {fix}"
    ]


def say_summary(
    settings: Settings,
    plan: PrivacyPlan | None,
    num_examples: int,
    trained: int | None,
    delta_is_auto: bool,
    steps: int,
    compared: tuple[float, float] | None,
) -> None:
    """Tell on stderr what the command will do.

    Args:
        trained: numbers in the adapter, where they are known.
        compared: see `over_white`.
    """
    canaries = settings.num_canary_rows
    counted = f", of which {canaries:,} rows of canaries" if canaries else ""
    drawn = "units" if settings.draws_units else "examples"
    rate = settings.total_bs / num_examples
    rows = [
        (f"training {drawn} N", f"{num_examples:,}{counted}"),
        (
            "batch size",
            f"{settings.total_bs:,}, sampling rate {rate:.4g}",
        ),
        ("logical steps", f"{steps:,}"),
    ]
    if settings.unit_column is not None:
        often = "a step" if settings.draws_units else "in all"
        most = f"at most {settings.max_rows_per_unit} rows {often}"
        rows.append(("unit", f"the rows of one {settings.unit_column}, {most}"))
    if plan:
        reserved = plan.reserved_histogram_sigma
        unit = "example" if plan.unit_column is None else "unit"
        of_delta = ", delta at most 1/(10 N)" if delta_is_auto else ""
        rows += [
            ("noise multiplier", f"{plan.noise_multiplier:g} (deviation over clip norm)"),
            ("clip norm", f"{plan.clip_norm:g}, {plan.clip_function}"),
            ("guarantee", f"({plan.target_epsilon:g}, {plan.delta:g})-DP, one {unit} added or "
             f"removed{f', with a histogram of sigma {reserved:g}' if reserved else ''}{of_delta}"),
        ]  # fmt: skip
        if settings.noise == BANDED:
            rows.append(("correlated noise", of_bands(plan, trained)))
        if compared:
            of_a_step, of_all = compared
            rows.append((
                "against white noise",
                f"{of_a_step:.2g} times in a step, {of_all:.2g} times in the sum of all steps",
            ))  # fmt: skip
        if trained:
            of_a_step, of_all = signal_to_noise(plan, trained, settings.max_seq_len)
            rows.append(
                ("signal over noise", f"at most {of_a_step:.2g} a step and {of_all:.2g} in all, "
                 f"with {'at most ' if settings.rank_pattern else ''}{trained:,} trained numbers")
            )  # fmt: skip
    else:
        rows.append(("guarantee", "NONE: --eps -1 trains without differential privacy"))
    processes = settings.gpus * settings.num_machines
    fitting = settings.perdevice_bs == "auto"
    budget = "as many as fit" if fitting else f"{settings.perdevice_bs * settings.max_seq_len:,}"
    rows += [
        ("processes", f"{processes:,} on {settings.num_machines:,} machine(s)"),
        ("tokens", f"at most {settings.max_seq_len:,} a sequence, {budget} on a device at once"),
        ("outputs", str(settings.folder)),
    ]  # fmt: skip
    for name, value in rows:
        say(f"  {name:<20} {value}")


def of_bands(plan: PrivacyPlan, trained: int | None) -> str:
    """What correlated noise does, and what it takes."""
    if plan.bands == 1:
        return "none: one band is white noise, which is the least here if --bands is auto"
    kept = plan.bands - 1
    memory = f", {8 * kept * trained / GIB:.2g} GiB" if trained else ""
    times = plan.participations(range(plan.steps))
    often = "one step" if times == 1 else f"{times} steps"
    return (
        f"{plan.bands} bands: a {'row' if plan.unit_column is None else 'unit'} takes part in at "
        f"most {often}; {kept} past noises{memory} in the main process's memory"
    )


if __name__ == "__main__":
    run_cli(main)
