"""Runs next to each other: what they were given, what they promise, and how well they do.

    python -m evaluation.compare outputs/instructions outputs/instructions_rank_4 --output compared

Held-out losses of all runs are computed on the same rows, the test split of their data set, and a
difference to the first run has an interval of its own: examples are resampled with both losses,
which differ far less from one another than examples do. MAUVE is taken from what
evaluation.distribution found of samples that lead back to the run's adapter.

Writes compare.txt, .csv and .html. Held-out texts are private unless --public says otherwise, so
what was measured on them goes under OUTPUT/private, and OUTPUT itself has the runs' flags and
epsilons alone.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the comparison."""

    run: list[Path] = flag("folders of training runs", name="run", type=Path, nargs="+")
    dataset_name: str | None = flag(
        "held-out texts for all runs: data/NAME, a folder or a file; the runs' own if left out"
    )
    split: str = flag("the split to read; a lone file is read whole", "test")
    num_rows: int = flag("rows used, the first ones", 1000)
    perdevice_bs: int = flag("sequences of max_seq_len tokens on the device at once", 16)
    dtype: str = flag(
        "dtype of the base; auto: bfloat16 on GPUs that have it",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    evaluations: list[Path] = flag(
        "folders with results of evaluation.distribution; if left out, those below "
        "evaluation_outputs, next to the folder that a run is in",
        [],
        type=Path,
        nargs="+",
        metavar="DIR",
    )
    public: bool = flag("the held-out texts are public, so the figures are too", False)
    output: Path = flag("folder for the comparison", type=Path, required=True, metavar="DIR")


answer_early(__name__, Settings, __doc__)

import csv
import io
from collections.abc import Sequence

import jinja2
import numpy as np
from markupsafe import Markup

from evaluation.distribution import MAUVE, SYNTHETIC
from evaluation.distribution import TOOL as DISTRIBUTION
from evaluation.measures.intervals import BOOTSTRAP, SEEDS, bootstrap, ratio_of_sums
from evaluation.page.charts import score_chart
from evaluation.page.material import Training, read_training, weights_of
from evaluation.page.printing import plain
from evaluation.perplexity import losses_of_models, require_unseen, tokenizer_of
from evaluation.results import PRIVATE_FOLDER, Score, interval, shown
from utils.cli import UsageError, run_cli, say
from utils.files import json_object, write_atomic
from utils.folders import (
    PREPARATION_FILE,
    claimed,
    portable,
    private_folder,
    require_absent,
)
from utils.models.loading import quiet_libraries
from utils.printable import printable
from utils.runs.run_folder import dataset_name_of, model_name_of
from utils.sampling.shards import MANIFEST_FILE
from utils.texts.data_sets import load_split
from utils.texts.tokens import tokenised

FILES = ("compare.txt", "compare.csv", "compare.html")
TEMPLATES = Path(__file__).parent / "page" / "templates"
LOSS, GAIN, GAIN_ON_FIRST = "loss a token", "gain on the base", "gain on the first run"
# Flags of a run, by the heading of their column.
FLAGS = {
    "noise multiplier": "noise_multiplier", "clip norm": "clip", "rank": "lora_r",
    "batch": "total_bs", "epochs": "num_epochs", "learning rate": "lr", "seed": "seed",
}  # fmt: skip
# What must be equal for losses to be comparable.
SAME = ("prompt_style", "max_seq_len")


@dataclass(frozen=True)
class Compared:
    """A run in the table.

    Attributes:
        facts: what may be shown to anyone, by column.
        figures: what was measured, by column; a column may be missing.
        base_loss: of the run's base model, a token.
    """

    name: str
    facts: dict[str, str]
    figures: dict[str, Score]
    base_loss: float


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    with claimed(settings.output):
        compare(settings)


def compare(settings: Settings) -> None:
    """Read, measure and write."""
    output = settings.output
    for folder in (output, output / PRIVATE_FOLDER):
        require_absent(folder, FILES)
    runs = [read_training(path, internal=False) for path in settings.run]
    require_comparable(runs)
    losses = held_out_losses(settings, runs)
    compared = [
        Compared(
            portable(str(run.folder)),
            facts_of(run),
            figures_of(run, losses, runs[0]) | mauve_of(run, settings),
            float(ratio_of_sums(*losses[model_name_of(run.folder)])),
        )
        for run in runs
    ]
    write(output, compared, measured=settings.public)
    if not settings.public:
        write(private_folder(output / PRIVATE_FOLDER), compared, measured=True)
    print(printable(as_text(compared)))


def require_comparable(runs: Sequence[Training]) -> None:
    """Refuse runs that learn different things, and one that is named twice.

    Raises:
        UsageError: names the runs, and the flag that differs.
    """
    first = runs[0]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UsageError("a RUN is named twice; name each once")
    for run in runs:
        for name in SAME:
            values = first.arguments[name], run.arguments[name]
            if values[0] != values[1]:
                raise UsageError(
                    f"{first.folder} has --{name} {values[0]} and {run.folder} {values[1]}: losses "
                    "of the two are not of the same texts; compare each with runs of its kind"
                )


def held_out_losses(
    settings: Settings, runs: Sequence[Training]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`example_losses` of every base model and adapter on the same rows, by their names.

    Examples without a token that carries loss are left out.

    Raises:
        UsageError: the runs have no common held-out rows, or cut them into other tokens.
    """
    names = {dataset_name_of(run.folder): run for run in runs}
    if settings.dataset_name is None and len(names) > 1:
        raise UsageError(
            f"the RUNs were trained on {' and '.join(names)}; name held-out texts for all of them "
            "with --dataset_name"
        )
    style, longest = (runs[0].arguments[name] for name in SAME)
    rows = load_split(settings.dataset_name or next(iter(names)), settings.split, style)
    for run in runs:
        require_unseen(rows["instruction"], adapter_of(run))
    rows = rows.select(range(min(len(rows), settings.num_rows)))
    quiet_libraries()
    losses: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for base in dict.fromkeys(model_name_of(run.folder) for run in runs):
        adapters = [adapter_of(run) for run in runs if model_name_of(run.folder) == base]
        data = tokenised(rows, tokenizer_of(base, adapters), style, longest)
        budget = settings.perdevice_bs * longest
        losses |= losses_of_models(base, adapters, data, settings.dtype, budget)
    counts = [found for _, found in losses.values()]
    if not all(np.array_equal(counts[0], other) for other in counts):
        raise UsageError("the RUNs' tokenizers differ, and so would a loss a token: compare others")
    used = counts[0] > 0
    return {name: (sums[used], found[used]) for name, (sums, found) in losses.items()}


def adapter_of(run: Training) -> str:
    return str(run.folder / "adapter")


def facts_of(run: Training) -> dict[str, str]:
    """What a run was given and what it promises, by column."""
    epsilon, delta = run.own_cost or (None, None)
    is_private = run.arguments["eps"] != -1
    facts = {
        "epsilon": "none" if epsilon is None else f"{epsilon:.3f}",
        "delta": "" if delta is None else f"{delta:g}",
    }
    for column, name in FLAGS.items():
        value = run.arguments.get(name)
        is_given = value is not None and (is_private or name not in ("noise_multiplier", "clip"))
        facts[column] = f"{value:g}" if is_given else ""
    return facts


def figures_of(
    run: Training, losses: dict[str, tuple[np.ndarray, np.ndarray]], first: Training
) -> dict[str, Score]:
    """The loss of a run, and how much less it is than that of others on the same examples."""
    sums, counts = losses[adapter_of(run)]
    others = {GAIN: model_name_of(run.folder)}
    if run is not first:
        others[GAIN_ON_FIRST] = adapter_of(first)
    columns = {LOSS: sums} | {column: losses[name][0] - sums for column, name in others.items()}
    return {
        column: Score(
            column, str(run.folder), float(ratio_of_sums(each, counts)),
            *bootstrap(each, counts, statistic=ratio_of_sums), n=len(counts),
        )
        for column, each in columns.items()
    }  # fmt: skip


def mauve_of(run: Training, settings: Settings) -> dict[str, Score]:
    """MAUVE of the synthetic texts that a run's adapter wrote, where an evaluation has it."""
    near = run.folder.resolve().parent.parent / "evaluation_outputs"
    weights = weights_of(run.folder)
    for folder in settings.evaluations or sorted([near, *near.glob("*")]):
        for place in (folder, folder / PRIVATE_FOLDER):
            result = json_object(place / f"{DISTRIBUTION}.json")
            if not result or (settings.public and result["private"]):
                continue
            texts = Path(result["settings"]["synthetic"])
            sources = json_object(texts.parent / PREPARATION_FILE).get("sources", [texts])
            manifests = [json_object(Path(source) / MANIFEST_FILE) for source in sources]
            if not {manifest.get("adapter_sha256") for manifest in manifests} <= {*weights}:
                continue
            for score in result["scores"]:
                if (score["name"], score["subject"]) == (MAUVE, SYNTHETIC):
                    return {MAUVE: Score(**score)}
    return {}


def write(folder: Path, compared: Sequence[Compared], measured: bool) -> None:
    """Write the table in its three forms.

    Args:
        measured: with the figures, and not with what may be shown to anyone alone.
    """
    pages = (as_text(compared, measured), as_csv(compared, measured), as_html(compared, measured))
    for name, page in zip(FILES, pages):
        write_atomic(folder / name, page)
        private = folder.name == PRIVATE_FOLDER
        say(f"written to {folder / name}" + " (private: no guarantee covers it)" * private)


def columns_of(compared: Sequence[Compared], measured: bool) -> list[str]:
    """The figures that the table has."""
    known = {column for run in compared for column in run.figures} if measured else set()
    return [column for column in (LOSS, GAIN, GAIN_ON_FIRST, MAUVE) if column in known]


def table_of(compared: Sequence[Compared], measured: bool) -> list[list[str]]:
    """Headings and rows, each figure with its interval."""
    columns = columns_of(compared, measured)

    def cell(score: Score | None) -> str:
        if score is None:
            return ""
        ends = interval(score.low, score.high)
        return shown(score.value) + (f" ({ends})" if ends else "")

    rows = [
        [run.name, *run.facts.values(), *(cell(run.figures.get(column)) for column in columns)]
        for run in compared
    ]
    return [["run", *compared[0].facts, *columns], *rows]


def notes_of(compared: Sequence[Compared], measured: bool) -> list[str]:
    """What a reader has to know in order to read the table right."""
    notes = [
        "Epsilon is what each run spent alone. Runs on the same private rows spend more together "
        "(python -m privacy_checks.report RUN RUN says how much), and no guarantee covers the "
        "choice among them."
    ]
    if measured:
        number = compared[0].figures[LOSS].n
        notes.append(
            f"Losses are in nats, of {number:,} held-out examples; intervals of losses and gains: "
            f"{BOOTSTRAP}, gains with both losses of an example; of MAUVE: {SEEDS}."
        )
    return notes


def as_text(compared: Sequence[Compared], measured: bool = True) -> str:
    """The table for a terminal."""
    rows = table_of(compared, measured)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *notes_of(compared, measured)]) + "\n"


def as_csv(compared: Sequence[Compared], measured: bool) -> str:
    """The table for other programs: the ends of intervals have columns of their own."""
    columns, ends = columns_of(compared, measured), ("value", "low", "high")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    headings = [name if end == "value" else f"{name}, {end}" for name in columns for end in ends]
    writer.writerow(["run", *compared[0].facts, *headings])
    for run in compared:
        scores = [run.figures.get(column) for column in columns]
        numbers = [getattr(score, end, None) for score in scores for end in ends]
        writer.writerow([run.name, *run.facts.values(), *numbers])
    return buffer.getvalue()


def as_html(compared: Sequence[Compared], measured: bool) -> str:
    """The table as a page that loads nothing, with a chart of the losses if it has them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    chart = None
    if measured:
        scores = [
            vars(run.figures[LOSS]) | {
                "subject": f"{run.name}, epsilon {run.facts['epsilon']}", "control": run.base_loss
            }
            for run in compared
        ]  # fmt: skip
        chart = Markup(score_chart("Held-out loss (nats a token)", scores, "the base", LOSS))
    headings, *rows = table_of(compared, measured)
    return environment.get_template("compare.html.j2").render(
        headings=headings, rows=rows, chart=chart, notes=notes_of(compared, measured)
    )


if __name__ == "__main__":
    run_cli(main)
