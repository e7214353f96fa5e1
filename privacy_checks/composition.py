"""What runs and histograms of one private data set spent together, read from their ledgers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, say
from utils.files import required_object
from utils.privacy.accounting import (
    ADD_REMOVE,
    MAX_DELTA,
    MIN_DELTA,
    REPLACE,
    SampledGaussian,
    compute_delta,
    compute_epsilon,
    epsilon_bounds,
)
from utils.privacy.guarantee import (
    COVERED,
    NOT_PROBED,
    NOTHING_COVERED,
    listed,
    not_covered_of,
    person,
    rounded_up,
    rows_of_one_person,
    unit_of,
)
from utils.privacy.ledger import (
    LEDGER_FILE,
    adapter_in,
    counted,
    read_histograms,
    read_ledger,
    read_plan,
    require_head,
    steps_in,
)
from utils.privacy.plan import ROWS, PrivacyPlan
from utils.runs.run_folder import (
    BACKUP,
    CONFIG_FILE,
    REPORT_FILE,
    arguments_of,
    require_own_adapter,
)

HISTOGRAM_MECHANISM = "Gaussian histogram"
ALLOW_ABOVE_TARGET = "exit with 0 though all together spent more than a run's target epsilon"
STEPS = ("steps_planned", "steps_taken", "steps_lost")
# Factors between delta and the other deltas of the table.
OTHER_DELTAS = (10, 0.1, 0.01)
CURVE_POINTS = 24
# The claim in privacy_report.json may come from another version of the accountant.
CLAIM_TOLERANCE = 0.02


def composed_report(
    runs: Path | Sequence[Path],
    histograms: Sequence[Path] = (),
    delta: float | None = None,
    epsilon: float | None = None,
    relations: Sequence[str] = (ADD_REMOVE,),
) -> dict:
    """Read the ledgers of runs and of histograms, check them, and compose them.

    Several runs are composed as if each read the same private rows: adding or removing one row
    then moves every one of them, so the result is an upper bound for rows that only some read.

    Args:
        runs: a run's folder or several, or copies that hold what may be released of them.
        histograms: ledgers of histograms of the same private data.
        delta, epsilon: where to evaluate the privacy curve. If None: the plans' delta, on which
            all runs must agree since a guarantee has one; the plans' largest target epsilon.
        relations: ADD_REMOVE, REPLACE or both.

    Returns:
        A JSON-able dict.

    Raises:
        UsageError: a ledger was edited, truncated or is another run's or another dataset's; a run
            is named twice; the runs' deltas differ and none is given; or no accountant can be
            trusted with the values.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    for folder in folders:
        if why := why_no_guarantee(folder):
            return _no_guarantee([folder], why)
    read = [_read_run(folder) for folder in folders]
    _require_distinct(read)
    events = _histograms(histograms, read)
    if any(event["insecure"] for event in events):
        return _no_guarantee(folders, "a histogram's noise came from a known seed (a test)")
    for run in read:
        _require_claim(run)
    _require_one_unit(read)
    _require_relations(read, relations)
    plan = max((run.plan for run in read), key=lambda each: each.bands)
    training = [run.mechanism(run.steps_recorded, len(read) > 1) for run in read]
    released = [run.mechanism(range(run.steps), len(read) > 1) for run in read]
    facts = [run.facts() for run in read]
    not_covered = [
        *not_covered_of(plan.unit_column, "; ".join(each["numerics"] for each in facts)),
        "other runs and histograms of the same private dataset, whose ledgers are not named here: "
        "every one of them adds to epsilon",
    ]
    if not events:
        not_covered += [
            f"the histogram of sigma {event.noise_multiplier:g} that the target of {run.folder} "
            "also pays for: name its ledger with --histogram once it is made"
            for run in read
            for event in run.plan.reserved
        ]
    return {
        "guarantee": True,
        "above_target": _above_target(read, [*training, *events]),
        "run": _names(folders),
        "unit": _unit_of_all(read),
        "neighbouring_relations": list(relations),
        **(facts[0] if len(read) == 1 else {"runs": facts}),
        "mechanisms": [*training, *events],
        **{name: sum(run[name] for run in facts) for name in STEPS},
        **_costs(
            [*training, *events],
            [*released, *events] if released != training else None,
            _common_delta(read) if delta is None else delta,
            max(run.plan.target_epsilon for run in read) if epsilon is None else epsilon,
            relations,
            plan,
        ),
        "checks": [
            f"{run.folder}: {check}" if len(read) > 1 else check
            for run in read
            for check in run.checks
        ],
        "covered": COVERED + [f"the noisy histogram in {event['ledger']}" for event in events],
        "not_covered": not_covered,
    }


@dataclass(frozen=True)
class _Run:
    """What the folder of a DP run says.

    Attributes:
        num_canary_rows: rows of N that are canaries, which only training reads.
        steps: in the released model.
        steps_recorded: the numbers of those in the ledger.
        ledger_end: its last chain value; chains begin with a random run id.
    """

    folder: Path
    plan: PrivacyPlan
    num_canary_rows: int
    steps: int
    steps_recorded: list[int]
    own_report: dict
    checks: Sequence[str]
    ledger_end: str

    @property
    def private_examples(self) -> int | None:
        """N of the private data as a histogram counts it; None if the run drew rows of persons."""
        if self.plan.unit_sampling == ROWS:
            return None
        return self.plan.num_examples - self.num_canary_rows

    def mechanism(self, steps: Sequence[int], named: bool) -> dict:
        """The steps of training of these numbers, as an entry of the composition."""
        training = f"training of {self.folder}" if named else "training"
        (event,) = self.plan.events(self.plan.participations(steps))
        of_bands = {}
        if self.plan.bands > 1:
            # A step that was lost and taken again may have come any time after itself.
            in_turn = len(set(steps)) == len(steps)
            of_bands = {"steps": len(steps), "every": self.plan.bands if in_turn else 1}
        return {
            "mechanism": f"{training}, all steps on record",
            "sampling_rate": event.sampling_rate,
            "noise_multiplier": event.noise_multiplier,
            "rows_per_unit": event.rows_per_unit,
            "times": event.steps,
        } | of_bands

    def facts(self) -> dict:
        """What the report says of this run alone."""
        return {
            "run": str(self.folder),
            "num_examples": self.plan.num_examples,
            "unit_sampling": self.plan.unit_sampling,
            "max_rows_per_unit": self.plan.max_rows_per_unit,
            "canaries": self.num_canary_rows,
            "clip_norm": self.plan.clip_norm,
            "bands": self.plan.bands,
            "numerics": self.own_report.get("numerics", NOT_PROBED),
            "steps_planned": self.plan.steps,
            "steps_taken": self.steps,
            "steps_lost": len(self.steps_recorded) - self.steps,
            "target_epsilon": self.plan.target_epsilon,
            "target_delta": self.plan.delta,
            "plan_hash": self.plan.digest(),
        }


def _names(folders: Sequence[Path]) -> str:
    return " and ".join(map(str, folders))


def _no_guarantee(folders: Sequence[Path], why: str) -> dict:
    return {
        "guarantee": False,
        "why": why,
        "run": _names(folders),
        "covered": [],
        "not_covered": [NOTHING_COVERED],
    }


def _require_distinct(runs: Sequence[_Run]) -> None:
    """Refuse a run that is named twice, or together with its copy."""
    seen: dict[str, _Run] = {}
    for run in runs:
        if run.ledger_end in seen:
            other = seen[run.ledger_end].folder
            raise UsageError(f"{run.folder} and {other} hold the same run; name it once")
        seen[run.ledger_end] = run


def _require_one_unit(runs: Sequence[_Run]) -> None:
    """Refuse runs whose neighbours are not the same: a guarantee has one unit."""
    first = runs[0]
    for run in runs:
        if _neighbour(run.plan) != _neighbour(first.plan):
            raise UsageError(
                f"the unit of {first.folder} is {unit_of(first.plan)}, and of {run.folder} "
                f"{unit_of(run.plan)}; make one report for each"
            )


def _require_relations(runs: Sequence[_Run], relations: Sequence[str]) -> None:
    """Refuse REPLACE with correlated noise, of which it says nothing."""
    if REPLACE in relations:
        for run in runs:
            if run.plan.bands > 1:
                raise UsageError(
                    f"neighbouring relation {REPLACE!r}: no accountant has it for the noise of "
                    f"{run.plan.bands} bands of {run.folder}, where another example is of another "
                    f"group; use {ADD_REMOVE!r}"
                )


def _neighbour(plan: PrivacyPlan) -> tuple[str | None, str | None]:
    """Which rows come or go together, however many of them a run uses."""
    return plan.unit_column, plan.owner


def _unit_of_all(runs: Sequence[_Run]) -> str:
    """The unit of all runs, with how many of its rows they use where that is the same."""
    units = {unit_of(run.plan) for run in runs}
    column, owner = _neighbour(runs[0].plan)
    return units.pop() if len(units) == 1 or column is None else person(column, owner)


def _common_delta(runs: Sequence[_Run]) -> float:
    """The delta of all plans: a guarantee has one, and none of several is everybody's."""
    deltas = {run.plan.delta for run in runs}
    if len(deltas) > 1:
        raise UsageError(
            f"the runs were planned for the deltas {listed(sorted(deltas))}, and a guarantee has "
            "one; give --delta"
        )
    return deltas.pop()


def _above_target(runs: Sequence[_Run], mechanisms: list[dict]) -> list[str]:
    """A sentence for each run whose target is less than what all mechanisms spend together."""
    events, found = events_of(mechanisms), []
    for run in runs:
        delta, target = run.plan.delta, run.plan.target_epsilon
        spent = compute_epsilon(events, delta).upper
        if spent > target:
            found.append(
                f"ABOVE TARGET: together they spend epsilon {rounded_up(spent)} at delta "
                f"{delta:g}, and {run.folder} was planned for {target:g}. Only the epsilon of all "
                "that read the private rows may be promised to anybody."
            )
    return found


def exit_code(report: dict, allow_above_target: bool) -> int:
    """The exit code of a command that shows a composed report; says why it is not 0."""
    if not report["guarantee"]:
        return EXIT_FAILED
    if report["above_target"] and not allow_above_target:
        say(
            "more was spent than a run was planned for, so the exit code is 1; if that is meant, "
            "add --allow_above_target"
        )
        return EXIT_FAILED
    return EXIT_OK


def why_no_guarantee(folder: Path) -> str:
    """Why what a run released may be as private as its rows; nothing where noise protects them.

    Raises:
        UsageError: there is no run.
    """
    arguments, report = arguments_of(folder), folder / REPORT_FILE
    for name in ("eps", "insecure_fixed_noise_seed"):
        if not isinstance(arguments, dict) or name not in arguments:
            raise UsageError(f"{folder / CONFIG_FILE} has no {name!r}; {BACKUP}")
    if arguments["eps"] == -1:
        return "trained without differential privacy"
    says_so = report.exists() and not required_object(report, BACKUP, "guarantee")["guarantee"]
    if says_so or arguments["insecure_fixed_noise_seed"] is not None:
        return "noise and sampling came from a known seed (a test)"
    return ""


def _read_run(folder: Path) -> _Run:
    """Read a DP run, and check its ledger against all that kept the ledger's head."""
    arguments = arguments_of(folder)
    if not (folder / LEDGER_FILE).exists():
        raise UsageError(f"{folder} has no {LEDGER_FILE}: what its run spent is not known")
    plan = read_plan(folder / LEDGER_FILE)
    records = read_ledger(folder / LEDGER_FILE)
    steps, own_report, checks = _read_heads(folder, plan, records)
    if own_report:
        checks.append(require_own_adapter(folder, own_report, adapter_in(records)))
    return _Run(
        folder=folder,
        plan=plan,
        # Runs of earlier versions have no such flags.
        num_canary_rows=arguments.get("num_canaries", 0) * arguments.get("canary_repeats", 1)
        + arguments.get("audit_canaries", 0),
        steps=steps,
        steps_recorded=steps_in(records),
        own_report=own_report,
        checks=checks,
        ledger_end=records[-1]["chain"],
    )


def _read_heads(run: Path, plan: PrivacyPlan, records: list[dict]) -> tuple[int, dict, list[str]]:
    """Steps in the released model, the run's own report, and what was checked.

    A checkpoint or a report keeps the ledger's head at its moment, and no step after the last of
    these is in any model that was saved.
    """
    ledger, report = run / LEDGER_FILE, run / REPORT_FILE
    checks = [f"{ledger.name}: the hash chain of {len(records)} lines is whole"]
    needed = ("guarantee", "steps_taken", "ledger", "epsilon")
    own_report = required_object(report, BACKUP, *needed) if report.exists() else {}
    if own_report.get("plan_hash", plan.digest()) != plan.digest():
        raise UsageError(f"{report} is of another plan than {ledger}; restore the run's own")
    if (run / "adapter").exists() and not own_report:
        raise UsageError(f"{run} has an adapter but no {report.name}; restore it")
    heads = {report: (own_report["steps_taken"], own_report["ledger"])} if own_report else {}
    for file in sorted(run.glob("checkpoints/step-*/state.json")):
        state = required_object(file, BACKUP, "step", "ledger")
        heads[file] = (state["step"], state["ledger"])
    for file, (step, head) in heads.items():
        require_head(ledger, records, head)
        known = steps_in(records[: head["lines"]])
        counted = step + own_report.get("steps_lost", 0) if file == report else len(known)
        # After a crash, steps beyond those of the model are on record.
        if step not in (0, *known) or counted != len(known):
            raise UsageError(f"{file} counts {step} steps, which {ledger} does not; restore it")
    if own_report:
        checks.append(f"{ledger.name} continues what {report.name} knew of it")
    if count := len(heads) - bool(own_report):
        checks.append(f"{ledger.name} continues what {count} checkpoint(s) knew of it")
    if not heads:
        checks.append(
            f"nothing to compare {ledger.name} with: lines cut off its end would not be noticed, "
            "and every step in it is taken as released"
        )
        return len(steps_in(records)), own_report, checks
    step, _ = max(heads.values(), key=lambda each: each[1]["lines"])
    return step, own_report, checks


def _require_claim(run: _Run) -> None:
    """Refuse a run whose own report claims less than its ledger gives."""
    if run.own_report.get("steps_taken") != run.steps:
        return
    claim = run.own_report["epsilon"]["upper"]
    # Reports of earlier versions claim what the steps of the released model cost.
    counts_lost = "epsilon_without_lost_steps" in run.own_report
    counted = run.steps + run.own_report["steps_lost"] if counts_lost else run.steps
    times = run.plan.participations(run.steps_recorded[:counted])
    spent = compute_epsilon(run.plan.events(times), run.plan.delta).upper
    if claim < spent - CLAIM_TOLERANCE:
        raise UsageError(
            f"{run.folder / 'privacy_report.json'} claims epsilon {claim}, but its ledger gives "
            f"{spent:.3f}: the report was edited"
        )


def _histograms(paths: Sequence[Path], runs: Sequence[_Run]) -> list[dict]:
    """The mechanisms in ledgers of histograms of what the runs read."""
    units = {_neighbour(run.plan) for run in runs}
    sizes = [size for run in runs if (size := run.private_examples) is not None]
    events: dict[str, dict] = {}
    for path in paths:
        records = read_histograms(path) if path.is_file() else []
        if not records:
            raise UsageError(f"no ledger of histograms at {path}")
        for record in records:
            whose = record.get("unit_column"), record.get("owner")
            if whose not in units:
                raise UsageError(
                    f"the unit of {runs[0].folder} is {unit_of(runs[0].plan)}, and {path} is of "
                    f"{counted(record['num_examples'], *whose)}: leave --histogram out, or make "
                    "the histogram anew with the run's --unit_column and --owner"
                )
            if len(sizes) == len(runs) and record["num_examples"] not in sizes:
                theirs = "the run's has" if len(sizes) == 1 else "the runs' have"
                raise UsageError(
                    f"{path} is of a private dataset of {record['num_examples']} examples, "
                    f"{theirs} {listed(sizes)}: what is spent on two datasets does not compose; "
                    "make one report for each"
                )
            # Chains begin with a random run id, so equal ones are copies.
            if record["chain"] in events:
                other = events[record["chain"]]["ledger"]
                raise UsageError(f"{path} and {other} hold the same histogram; name it once")
            events[record["chain"]] = {
                "mechanism": HISTOGRAM_MECHANISM,
                "sampling_rate": 1.0,
                "noise_multiplier": record["noise_multiplier"] / record["sensitivity"],
                "times": 1,
                "ledger": str(path),
                "insecure": record["insecure"],
            }
    return list(events.values())


def events_of(mechanisms: list[dict]) -> list[SampledGaussian]:
    """What an accountant composes, of a report's "mechanisms"."""
    return [
        SampledGaussian(
            entry["sampling_rate"],
            entry["noise_multiplier"],
            entry["times"],
            entry.get("rows_per_unit", 1),
        )
        for entry in mechanisms
    ]


def _costs(
    mechanisms: list[dict],
    without_lost_steps: list[dict] | None,
    delta: float,
    epsilon: float,
    relations: Sequence[str],
    plan: PrivacyPlan,
) -> dict:
    """Epsilon at `delta` and at others, and delta at `epsilon`, by relation.

    Args:
        plan: says what the unit is.
    """
    events = events_of(mechanisms)
    others = [delta * factor for factor in OTHER_DELTAS]
    return {
        "delta": delta,
        "epsilon": {name: _epsilons(events, delta, name) for name in relations},
        "epsilon_without_lost_steps": without_lost_steps
        and {name: _epsilons(events_of(without_lost_steps), delta, name) for name in relations},
        "rows_of_one_person": rows_of_one_person(plan, events, delta),
        "epsilon_at_other_deltas": {
            name: [
                {"delta": other, "epsilon": compute_epsilon(events, other, name).upper}
                for other in others
                if MIN_DELTA <= other <= MAX_DELTA
            ]
            for name in relations
        },
        "delta_at_epsilon": {
            name: {"epsilon": epsilon, "delta": compute_delta(events, epsilon, name)}
            for name in relations
        },
    }


def _epsilons(events: list[SampledGaussian], delta: float, relation: str) -> dict:
    return asdict(epsilon_bounds(events, delta, relation))


def epsilon_over_steps(report: dict, points: int = CURVE_POINTS) -> list[dict]:
    """Epsilon of all mechanisms together after some of the steps that were taken.

    Several runs count one after the other, in the order in which they were named.

    Args:
        report: of `composed_report`; its first relation and its delta are used.
        points: at most this many, evenly spaced, and the end of every run.

    Returns:
        One {"step", "epsilon"} a point; upper bounds.
    """
    training, histograms = by_kind(report["mechanisms"])
    relation = report["neighbouring_relations"][0]
    taken = sum(map(_steps_of, training))
    count = min(points - 1, taken)
    curve = []
    evenly = {round(taken * i / max(1, count)) for i in range(count + 1)}
    for step in sorted(evenly | set(accumulate(map(_steps_of, training)))):
        events = events_of([*_first_steps(training, step), *histograms])
        epsilon = compute_epsilon(events, report["delta"], relation).upper
        curve.append({"step": step, "epsilon": epsilon})
    return curve


def curve_by_run(report: dict, curve: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """`epsilon_over_steps` as (step, epsilon) of each run, from where the one before ended."""
    training, start, found = by_kind(report["mechanisms"])[0], 0, {}
    for run, entry in zip(report.get("runs", [report]), training):
        end = start + _steps_of(entry)
        points = [(each["step"], each["epsilon"]) for each in curve]
        found[run["run"]] = [point for point in points if start <= point[0] <= end]
        start = end
    return found


def by_kind(mechanisms: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training runs and histograms."""
    kinds: tuple[list[dict], list[dict]] = ([], [])
    for entry in mechanisms:
        kinds[entry["mechanism"] == HISTOGRAM_MECHANISM].append(entry)
    return kinds


def _first_steps(training: list[dict], steps: int) -> list[dict]:
    """The runs after `steps` steps of all of them, one run after the other."""
    taken = []
    for entry in training:
        here = min(_steps_of(entry), steps)
        # A unit takes part in one of so many steps in turn.
        times = min(entry["times"], -(-here // entry.get("every", 1)))
        taken.append(entry | {"times": times})
        steps -= here
    return taken


def _steps_of(entry: dict) -> int:
    """The steps of a run; an accountant counts fewer of them where noise is correlated."""
    return entry.get("steps", entry["times"])
