"""A statement of what was released of private data: what a registry of deployments asks for.

    python -m privacy_checks.statement outputs/instructions outputs/answers \\
        --histogram resampling/private_data/histogram_ledger.jsonl --output statement

Writes OUTPUT/statement.html, .md and .json for whoever was not there: privacy loss, unit of
privacy, trust model, what is not protected, accounting, randomness, numerics and whatever else the
registry of DP deployments asks of an entry of its third tier; in what it tells it follows NIST SP
800-226. Each entry says whether it is from the ledger, was checked by this command, or is declared
by the owner; what nobody declared is "not declared". Lines of Python in it compute epsilon anew,
without this toolkit. An edited ledger, another adapter than the ledger's, and a histogram or run of
the same data that is not named are refused. A run of the same data without a guarantee, named or
next to these, and one that was stopped before its last step are told of first.

--audit adds what an audit of one of the runs found: bound, power and claim; one that refutes its
run's claim leaves nothing to state. --owner_file is YAML, one `NAME: text` a line; --help_owner
prints one to fill in. --key signs the statement with the ledgers' heads and the adapters' hashes,
and --verify_key looks whether all is as it was signed; `privacy_checks.report --help` says how to
make keys.
"""

from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

from privacy_checks.flags import SpentSettings
from utils.command_line.parser import answer_early, flag, read_flags

# What only the owner knows, and the question that each answers.
OWNER = {
    "name": "What is the deployment called?",
    "curator": "Who holds the private data, and answers for this release?",
    "contact": "Whom may a reader ask?",
    "purpose": "What is released, for which use?",
    "published": "When, and where?",
    "data": "Whose data is it, from when and where, and what is in a row?",
    "preparation": "How were rows chosen, cleaned and parted before they were counted?",
    "other_releases": "What else was ever released of the same data?",
    "hyperparameters": "How were learning rate and all else chosen: on public data, or on these?",
    "trust": "Who could see the private rows and the private/ folders, under which rules?",
    "side_channels": "Who could watch the machine, its clock, its memory or its power?",
    "access": "Who gets what is released, under which terms?",
    "retention": "How long are rows, private/ folders and checkpoints kept?",
    "rationale": "Why are this epsilon, delta and unit right for these people and this use?",
}


@dataclass(frozen=True, kw_only=True)
class Settings(SpentSettings):
    """The flags of the statement."""

    audit: list[Path] = flag(
        "what privacy_checks.audit_run or audit_texts wrote of these runs",
        [],
        nargs="+",
        type=Path,
        metavar="FILE.json",
    )
    owner_file: Path | None = flag("what the owner declares", type=Path, metavar="FILE.yaml")
    help_owner: bool = flag("print an --owner_file to fill in, and end", False)
    output: Path = flag("folder for the statement", Path("statement"), type=Path, metavar="DIR")
    overwrite: bool = flag("replace a statement that this tool wrote there", False)
    key: Path | None = flag(
        "sign the statement with this private key (Ed25519)", type=Path, metavar="KEYFILE"
    )


answer_early(__name__, Settings, __doc__)

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import yaml

from evaluation.page.printing import Verbatim, portable
from evaluation.page.sections import Chart, best_catch, best_guess, factor, line_chart, odds
from evaluation.report import ESCAPED, environment
from privacy_checks.composition import composed_report, events_of, why_no_guarantee
from privacy_checks.registry import left_out, unprotected_by, without_guarantee
from privacy_checks.report import verify
from privacy_checks.signature import differences, head_of, read_private_key, read_public_key, sign
from utils.cli import EXIT_OK, UsageError, in_one_line, run_cli, say
from utils.files import open_text, required_object, write_atomic, write_json
from utils.folders import LOCK_FILE, claimed, locked, require_folder
from utils.privacy.accounting import ADD_REMOVE, catch_rates, compute_delta
from utils.privacy.guarantee import claim, conditions, exception, name_of_unit, rounded_up
from utils.privacy.ledger import LEDGER_FILE
from utils.versions import toolkit_commit, versions_of

FILES = ("statement.html", "statement.md", "statement.json")
SIGNATURE_FILE = "statement.sig.json"
# In the head of every page.
MARK = "privacy_checks.statement"
LEDGER, CHECKED, DECLARED = "from the ledger", "checked", "declared by the owner"
NOT_DECLARED = "not declared"
LIBRARIES = ("dp-accounting", "prv-accountant", "scipy", "numpy", "torch", "cryptography")
# Of the bounds of an audit that are shown.
CONFIDENCES = (0.95, 0.99)
# Rates of false alarms in words, and those of the picture.
FALSE_ALARMS = (0.001, 0.01, 0.1)
PICTURED = [number / 50 for number in range(51)]
STEP = {
    False: """    step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))""",
    True: """    shares = [binom.pmf(i, rows, rate) for i in range(rows + 1)]
    step = dp_event.MixtureOfGaussiansDpEvent(sigma, list(range(rows + 1)), shares)""",
}


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    if settings.help_owner:
        print("\n".join(f"{name}:  # {question}" for name, question in OWNER.items()))
        return EXIT_OK
    settings.require_runs()
    runs, histograms, output = settings.run, settings.histogram, settings.output
    if settings.verify_key:
        public = read_public_key(settings.verify_key)
        return verify(differences(output, FILES, runs, histograms, public, SIGNATURE_FILE))
    key = read_private_key(settings.key, "--key") if settings.key else None
    with claimed(output):
        require_room(output, settings.overwrite)
        statement = make_statement(settings)
        # That of another statement would not hold for this one.
        (output / SIGNATURE_FILE).unlink(missing_ok=True)
        write_json(output / FILES[2], as_json(statement))
        for name, suffix in zip(FILES, ESCAPED):
            page = environment(statement, suffix, ESCAPED[suffix])
            text = page.get_template(f"statement{suffix}.j2").render()
            write_atomic(output / name, text.rstrip() + "\n")
        say(f"written to {output}")
        if key:
            say(f"signed: {sign(output, FILES, runs, histograms, key, SIGNATURE_FILE)}")
    return EXIT_OK


def require_room(output: Path, overwrite: bool) -> None:
    """Refuse a folder with files in the way, unless they are a statement that may be replaced.

    Raises:
        UsageError: names the first of them, or what is no folder.
    """
    require_folder(output)
    there = [output / name for name in (*FILES, SIGNATURE_FILE) if (output / name).exists()]
    page = output / FILES[0]
    if there and not (page.is_file() and MARK in page.read_text("utf-8", "replace")[:500]):
        raise UsageError(f"{there[0]} exists and is no statement; use another --output")
    if there and not overwrite:
        raise UsageError(
            f"{there[0]} exists; add --overwrite to replace it, or use another --output"
        )


@dataclass(frozen=True)
class Entry:
    """An entry of a registry, and where it comes from.

    Attributes:
        source: LEDGER, CHECKED, DECLARED or NOT_DECLARED.
    """

    title: str
    lines: list[str]
    source: str


@dataclass(frozen=True)
class Audit:
    """What an audit found of a run.

    Attributes:
        through: what was attacked.
        at_95, at_99: lower bounds on epsilon with that confidence, in percent.
        without_noise: the one at 99% that is expected of a run without noise: the audit's power.
        claimed: the epsilon that the run promises by itself.
    """

    run: str
    through: str
    canaries: int
    at_95: float
    at_99: float
    without_noise: float
    claimed: float


@dataclass(frozen=True)
class Statement:
    """What the templates show.

    Attributes:
        warnings: what a reader must know first, in sentences.
        promise: in a sentence.
        entries: by a name, in the order of the page.
        audits: of these runs, none of which refuted what is claimed.
        attack: what an attacker can find out at most, in sentences.
        odds: how sure somebody is, before and after at most.
        picture: of `attack`.
        recompute: lines of Python that print epsilon.
    """

    warnings: list[str]
    promise: str
    epsilon: float
    delta: float
    entries: dict[str, Entry]
    audits: list[Audit]
    attack: list[str]
    odds: list[tuple[str, str]]
    picture: Chart
    recompute: str
    made: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    commit: str = field(default_factory=toolkit_commit)

    @property
    def origin(self) -> str:
        """When it was made, and by which commit."""
        by = f" by commit {self.commit} of the toolkit" if self.commit else ""
        return f"Made on {self.made}{by}; in what it tells it follows NIST SP 800-226"

    @property
    def code(self) -> Verbatim:
        """`recompute`, with nothing that looks like a path taken out."""
        return Verbatim(self.recompute)


def make_statement(settings: Settings) -> Statement:
    """Compose, check and declare.

    Runs without a guarantee are warned of, whether they are named or lie next to the others.

    Raises:
        UsageError: no run has a guarantee; a run is still spending; what read the same data is not
            named; or the ledgers, the adapters or what the owner declares are not in order.
    """
    named, histograms = settings.run, settings.histogram
    for run in named:
        if (run / LOCK_FILE).exists():  # held by a run that goes on, or left by a kill
            with locked(run, "name other RUNs"):
                pass
    declared = read_owner(settings.owner_file) if settings.owner_file else {}
    runs = [run for run in named if not why_no_guarantee(run)]
    composed = composed_report(runs or named, histograms, settings.delta)
    if not composed["guarantee"]:
        raise UsageError(f"{composed['run']} has no guarantee to state: {composed['why']}")
    if missing := [str(path) for found in left_out(runs, histograms) for path in found]:
        raise UsageError(
            f"of the same private data, and not named: {', '.join(missing)}; name runs next to the "
            "others and histograms with --histogram, for a statement is of all that was spent"
        )
    unprotected = [run for run in named if run not in runs] + without_guarantee(named, histograms)
    beyond = [unprotected_by(run) for run in unprotected]
    composed["not_covered"] += beyond
    events = events_of(composed["mechanisms"])
    unit = name_of_unit(composed).replace("example", "row")
    epsilon = composed["epsilon"][ADD_REMOVE]["upper"]
    guess = best_guess(compute_delta(events, 0.0, ADD_REMOVE))
    rates = catch_rates(events, [*FALSE_ALARMS, *PICTURED])
    return Statement(
        warnings=[portable(each) for each in (*beyond, *map(stopped, unfinished(composed)))],
        promise=portable(f"What is released of {composed['run']} is {claim(composed)}."),
        epsilon=epsilon,
        delta=composed["delta"],
        entries=entries_of(composed, declared),
        audits=[read_audit(path, runs) for path in settings.audit],
        attack=[
            f"Somebody who sees all that is released, knows every other {unit} and guesses whether "
            f"one {unit} was in the data is right at most {guess} of the time; a coin, 50%.",
            best_catch(dict(zip(FALSE_ALARMS, rates)), unit),
            f"Whatever they believed before, odds change by a factor of at most {factor(epsilon)}, "
            f"{exception(composed)}.",
        ],
        odds=odds(epsilon),
        picture=picture(rates[len(FALSE_ALARMS) :]),
        recompute=recomputed_by(composed["mechanisms"], composed["delta"]),
    )


def unfinished(composed: dict) -> list[dict]:
    """The runs of a composed report whose model has not all the steps that were planned."""
    facts = composed.get("runs", [composed])
    return [run for run in facts if run["steps_taken"] < run["steps_planned"]]


def stopped(run: dict) -> str:
    """What a reader must know of an unfinished run.

    Args:
        run: an entry of `unfinished`.
    """
    recorded = run["steps_taken"] + run["steps_lost"]
    return (
        f"{run['run']} was stopped after step {run['steps_taken']} of {run['steps_planned']}: what "
        f"is stated covers the {recorded} steps on record, and no longer holds once it goes on"
    )


def read_audit(path: Path, runs: Sequence[Path]) -> Audit:
    """The result of an audit of one of these runs.

    Raises:
        UsageError: it is none, or of another run, or refutes what its run claims.
    """
    remedy = "make it with privacy_checks.audit_run RUN --output DIR"
    found = required_object(path, remedy)
    try:
        at_95, at_99 = (
            [each for each in found["bounds"] if each["confidence"] == level]
            for level in CONFIDENCES
        )
        audit = Audit(
            run=portable(found["run"]),
            through=", ".join(dict.fromkeys(str(each["attack"]) for each in at_99)),
            canaries=int(found["canaries"]),
            at_95=max(float(each["epsilon"]) for each in at_95),
            at_99=max(float(each["epsilon"]) for each in at_99),
            without_noise=max(float(each["without_noise"]) for each in at_99),
            claimed=float(found["claimed_epsilon"]),
        )
        if not np.isfinite(astuple(audit)[2:]).all():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"--audit {path} is no result of an audit of a DP run; {remedy}") from None
    if {"ledger": found.get("ledger")} not in [head_of(run / LEDGER_FILE) for run in runs]:
        raise UsageError(
            f"--audit {path} is of a run that is not named here, or of one that went on since; "
            f"{remedy}"
        )
    if audit.at_99 > audit.claimed:
        raise UsageError(
            f"--audit {path}: epsilon is at least {audit.at_99:.3f} and {audit.claimed:.3f} was "
            "claimed, so there is nothing to state; do not release the run"
        )
    return audit


def read_owner(path: Path) -> dict[str, str]:
    """What an owner declares, by the names of `OWNER`; an empty entry declares nothing.

    Raises:
        UsageError: the file is not YAML, or has an entry of another name, or one that is no text.
    """
    try:
        with open_text(path) as text:
            found = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"--owner_file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--owner_file {path} is not YAML: {in_one_line(error, 200)}") from None
    if not isinstance(found, dict):
        raise UsageError(f"--owner_file {path} has no `NAME: text`; --help_owner prints one")
    for name, value in found.items():
        if name not in OWNER:
            raise UsageError(f"--owner_file {path}: {name!r} is none of {', '.join(OWNER)}")
        if isinstance(value, dict | list):
            raise UsageError(f"--owner_file {path}: {name} is not one text; put it in quotes")
    return {name: str(value).strip() for name, value in found.items() if value is not None}


def entries_of(composed: dict, declared: dict[str, str]) -> dict[str, Entry]:
    """All entries by their names.

    Args:
        composed: of `composed_report`.
        declared: of `read_owner`.
    """
    (bounds,) = composed["epsilon"].values()
    epsilon, facts = bounds["upper"], composed.get("runs", [composed])
    spent = [
        f"{each['mechanism']}: {repeated(each['times'])}, sampling rate "
        f"{each['sampling_rate']:.6g}, noise multiplier {each['noise_multiplier']:g}"
        for each in composed["mechanisms"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in versions_of(LIBRARIES).items())
    several = [
        f"all {each['rows']} rows of one person: epsilon {rounded_up(each['epsilon'], '.4f')}"
        for each in composed["rows_of_one_person"]
        if each["rows"] > 1
    ]
    numerics = [
        f"{each['run']}: how far a row's gradient was its own: {each['numerics']}" for each in facts
    ]
    made = {
        "privacy_loss": Entry(
            "Privacy loss",
            [
                f"epsilon {rounded_up(epsilon, '.4f')} at delta {composed['delta']:g}, an upper "
                "bound",
                *(
                    f"epsilon {rounded_up(each['epsilon'], '.4f')} at delta {each['delta']:g}"
                    for each in composed["epsilon_at_other_deltas"][ADD_REMOVE]
                ),
                *composed["above_target"],
            ],
            LEDGER,
        ),
        "neighbours": Entry("Neighbouring relation", [claim(composed)], LEDGER),
        "unit": Entry("Unit of privacy", [composed["unit"], *several], LEDGER),
        "flavour": Entry(
            "Flavour",
            ["approximate differential privacy, unbounded: what is added or removed changes N"],
            LEDGER,
        ),
        "trust_model": Entry(
            "Trust model",
            ["central: the curator sees all rows, and adds the noise; one static release"],
            LEDGER,
        ),
        "constants": Entry("Public constants", conditions(composed), LEDGER),
        "mechanisms": Entry("Mechanisms, composed in one accountant", spent, LEDGER),
        "accounting": Entry(
            "Accounting", [f"{bounds['accountant']}; computed with {versions}"], CHECKED
        ),
        "covered": Entry("Covered", composed["covered"], LEDGER),
        "not_covered": Entry("Not protected", composed["not_covered"], LEDGER),
        "randomness": Entry(
            "Randomness",
            [
                "no run or histogram drew from a known seed; draws and noise are ChaCha20's, keyed "
                "from the operating system's entropy at every process start"
            ],
            CHECKED,
        ),
        "numerics": Entry(
            "Numerics",
            [*numerics, "noise is added in float64 and rounded to a public grid (Mironov 2012)"],
            CHECKED,
        ),
        "records": Entry("Records", composed["checks"], CHECKED),
    }
    asked = {
        name: Entry(
            question,
            [declared[name] if declared.get(name) else NOT_DECLARED],
            DECLARED if declared.get(name) else NOT_DECLARED,
        )
        for name, question in OWNER.items()
    }
    return {
        name: Entry(entry.title, [portable(line) for line in entry.lines], entry.source)
        for name, entry in (made | asked).items()
    }


def repeated(times: int) -> str:
    """How often a mechanism ran, in words."""
    return "once" if times == 1 else f"{times} times"


def recomputed_by(mechanisms: list[dict], delta: float) -> str:
    """Lines of Python that print the epsilon of a report's "mechanisms" with dp-accounting."""
    several = any(each.get("rows_per_unit", 1) > 1 for each in mechanisms)
    events = [
        (each["sampling_rate"], each["noise_multiplier"], each["times"])
        + ((each.get("rows_per_unit", 1),) if several else ())
        for each in mechanisms
    ]
    return "\n".join(
        [
            "from dp_accounting import dp_event, pld",
            *(["from scipy.stats import binom"] if several else []),
            "accountant = pld.PLDAccountant(value_discretization_interval=1e-4)",
            f"for rate, sigma, times{', rows' if several else ''} in {events!r}:",
            STEP[several],
            "    accountant.compose(step, times)",
            f"print(accountant.get_epsilon({delta!r}))",
        ]
    )


def picture(rates: list[float]) -> Chart:
    """The most that an attack finds at each rate of false alarms, next to a coin."""
    title = "What an attacker finds at most"
    chart = {
        "title": title, "kind": "line", "x_label": "false alarms, of those that were out",
        "y_label": "found, of those that were in",
        "lines": {"most under the guarantee": list(zip(PICTURED, rates)),
                  "a coin": [(0.0, 0.0), (1.0, 1.0)]},
    }  # fmt: skip
    return line_chart(chart, "attack")


def as_json(statement: Statement) -> dict:
    """The statement for programs, without its picture."""
    facts = asdict(statement)
    picture = facts.pop("picture")
    return {"follows": "NIST SP 800-226"} | facts | {"picture": picture[2]}


if __name__ == "__main__":
    run_cli(main)
