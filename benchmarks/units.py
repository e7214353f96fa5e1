"""What the unit of privacy costs: held-out loss of generators at one epsilon, by unit and by K.

    python -m benchmarks.units --instructions FILE --work_dir units --json units.json --jobs 2

Real instructions get made-up owners: as many rows for each person (even), or rows for the r-th
person in proportion to 1 / r (zipf). At one epsilon and delta, in as many steps, with as many rows
in an expected step, a generator learns from the private ones where the unit is a row; a person of
whom at most K rows are left, rows being drawn; and a person, drawn whole, of at most K rows. Each
is trained once for every seed, and scored on the held-out instructions.

Every step runs the toolkit's own commands, and one that has ended is passed over when the same
command goes on after a stop.
"""

from dataclasses import dataclass

from benchmarks import studies
from utils.command_line.parser import answer_early, flag, positive_float, positive_int, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings(studies.Settings):
    """The flags."""

    epsilon: float = flag("target of every arm", 5.94, type=positive_float)
    delta: float = flag("of the guarantee", 1e-5)
    caps: list[int] = flag("K of the arms of persons", [1, 4, 16], type=positive_int, nargs="+")
    num_private: int = flag("private rows", 4000)
    num_persons: int = flag("who have them", 500)
    rows_in_a_step: int = flag("expected, in every arm", 192)
    num_steps: int = flag("logical steps of every arm", 12)
    clip: float = flag("clip norm", 1.0)
    lr: float = flag("learning rate", 2e-3)
    num_seeds: int = flag("generators of each arm", 3)


answer_early(__name__, Settings, __doc__)

import json
from pathlib import Path

import numpy as np

from benchmarks.figures import markdown
from benchmarks.studies import (
    RECORD,
    begun_alike,
    distinct,
    losses_by_model,
    model_flags,
    recorded,
    run_once,
    shuffled,
    side_by_side,
    that_fit,
)
from evaluation.measures.intervals import plus_minus
from utils.cli import UsageError, run_cli
from utils.files import write_json
from utils.folders import save_dataset
from utils.privacy.plan import ROWS, UNITS

EVEN, ZIPF = "even", "zipf"
COLUMN = "user_id"


@dataclass(frozen=True)
class Arm:
    """One way to protect, and who owns the rows.

    Attributes:
        cap: K; None where the unit is a row, and owners do not count.
    """

    owners: str
    unit_sampling: str | None
    cap: int | None

    @property
    def name(self) -> str:
        """Part of a file name."""
        return f"{self.owners}-{self.unit_sampling}-{self.cap}" if self.cap else "row"


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    folder = settings.work_dir.resolve()
    sizes = {owners: rows_of_persons(owners, settings) for owners in (EVEN, ZIPF)}
    save_data(settings, folder, sizes)
    arms = [Arm(EVEN, None, None)]
    arms += [
        Arm(owners, by, cap)
        for owners in sizes
        for by in (ROWS, UNITS)
        for cap in dict.fromkeys(settings.caps)
    ]
    jobs = [(arm, seed) for arm in arms for seed in range(settings.num_seeds)]
    side_by_side(
        settings.jobs, lambda job: train(settings, folder, *job, sizes[job[0].owners]), jobs
    )
    adapters = [str(output_of(folder, arm, seed) / "adapter") for arm, seed in jobs]
    run_once(
        folder, "score", "-m", "evaluation.perplexity", *model_flags(settings), "--public",
        f"--dataset_name={folder / 'data' / EVEN}", f"--perdevice_bs={settings.perdevice_bs}",
        f"--num_rows={settings.num_test}", f"--output={folder / 'losses'}",
        "--adapter_path", *adapters, makes=[folder / "losses"],
    )  # fmt: skip
    found = findings(settings, folder, arms)
    print(table(found))
    settings.write(found)


def rows_of_persons(owners: str, settings: Settings) -> np.ndarray:
    """How many private rows each person has: int64 [persons], at least 1.

    Raises:
        UsageError: there are fewer rows than persons.
    """
    persons, rows = settings.num_persons, settings.num_private
    if rows < persons:
        raise UsageError(f"--num_private {rows} is less than --num_persons {persons}")
    weights = np.ones(persons) if owners == EVEN else 1 / np.arange(1, persons + 1)
    ends = np.rint(np.cumsum(weights) / weights.sum() * (rows - persons)).astype(np.int64)
    return 1 + np.diff(ends, prepend=0)


def save_data(settings: Settings, folder: Path, sizes: dict[str, np.ndarray]) -> None:
    """Write the private rows with their owners, once for each kind, and held-out rows with them.

    Raises:
        UsageError: there are too few instructions.
    """
    texts = shuffled(that_fit(settings, distinct(settings)))
    record = begun_alike(settings, texts)
    if (folder / "data" / ZIPF).exists():
        return
    wanted = settings.num_test + settings.num_private
    if len(texts) < wanted:
        raise UsageError(
            f"{len(texts):,} instructions fit, fewer than --num_test and --num_private together "
            f"({wanted:,})"
        )
    write_json(settings.work_dir / RECORD, record)
    test = [{"instruction": text, COLUMN: ""} for text in texts[: settings.num_test]]
    for owners, rows in sizes.items():
        whose = np.random.default_rng(0).permutation(np.repeat(np.arange(len(rows)), rows))
        train = [
            {"instruction": text, COLUMN: f"person {person}"}
            for text, person in zip(texts[settings.num_test : wanted], whose)
        ]
        columns = ["instruction", COLUMN]
        save_dataset(
            folder / "data" / owners, {"train": train, "test": test}, columns, {"rows": owners}
        )


def train(settings: Settings, folder: Path, arm: Arm, seed: int, sizes: np.ndarray) -> None:
    """Train one generator.

    Args:
        sizes: rows of each person.
    """
    drawn, of_all = settings.rows_in_a_step, int(sizes.sum())
    unit = []
    if arm.cap:
        kept = np.minimum(sizes, arm.cap)
        of_all = int(kept.sum())
        unit = [
            f"--unit_column={COLUMN}", f"--max_rows_per_unit={arm.cap}",
            f"--unit_sampling={arm.unit_sampling}",
        ]  # fmt: skip
        if arm.unit_sampling == UNITS:
            drawn, of_all = round(drawn / kept.mean()), len(sizes)
    # Half a step more than asked for, which is cut off, so that rounding does not lose one.
    epochs = (settings.num_steps + 0.5) * drawn / of_all
    output = output_of(folder, arm, seed)
    run_once(
        folder, f"train {output.name}", "train.py", *model_flags(settings), *unit,
        f"--dataset_name={folder / 'data' / arm.owners}", f"--job_sess={output.name}",
        f"--output_dir={output.parent}", f"--perdevice_bs={settings.perdevice_bs}",
        "--loss_normalization=tokens", "--no_eval_at_start", "--resume=auto",
        f"--eps={settings.epsilon}", f"--delta={settings.delta}", f"--clip={settings.clip}",
        f"--lr={settings.lr}", f"--total_bs={drawn}", f"--num_epochs={epochs}", f"--seed={seed}",
    )  # fmt: skip


def output_of(folder: Path, arm: Arm, seed: int) -> Path:
    """The folder of a run."""
    return folder / "outputs" / f"{arm.name}-{seed}"


def findings(settings: Settings, folder: Path, arms: list[Arm]) -> dict:
    """All figures, a JSON-able dict."""
    losses, found = losses_by_model(folder / "losses"), []
    for arm in arms:
        outputs = [output_of(folder, arm, seed) for seed in range(settings.num_seeds)]
        report = json.loads((outputs[0] / "privacy_report.json").read_text())
        facts = ("num_examples", "expected_batch_size", "noise_multiplier", "steps_taken")
        found.append(
            vars(arm)
            | {fact: report[fact] for fact in facts}
            | {"epsilon": report["epsilon"]["upper"]}
            | {"loss": [losses[str(output / "adapter")]["value"] for output in outputs]}
        )
    base = losses[settings.model_name]
    return {"base": base, "arms": found, "settings": recorded(settings)}


def table(found: dict) -> str:
    """Markdown: a line for each arm, the mean and deviation of its generators' losses."""
    rows = [["untuned base", "", "", "", "", "", f"{found['base']['value']:.3f}"]]
    for arm in found["arms"]:
        size, sigma = arm["expected_batch_size"], arm["noise_multiplier"]
        rows.append([
            f"a person, {arm['unit_sampling']}" if arm["cap"] else "a row",
            arm["owners"] if arm["cap"] else "", str(arm["cap"] or ""),
            f"{arm['num_examples']:,}", f"{size:,}", f"{sigma:.3f} ({sigma / size:.1e})",
            plus_minus(arm["loss"]),
        ])  # fmt: skip
    headings = ["the unit", "owners", "K", "N", "--total_bs", "sigma (over batch)", "loss"]
    return markdown(headings, rows)


if __name__ == "__main__":
    run_cli(main)
