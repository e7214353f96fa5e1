"""Print one shell script that leads from a file of private rows to a synthetic set and its page.

    python generate_pipeline_script.py --data prompts.csv --text_column text \\
        --unit_column user_id --model_name data/quickstart_model --eps 6 --project mine > mine.sh
    bash mine.sh

The script prepares the rows, trains on them with differential privacy (Type A), samples (Type B),
selects by a noisy histogram, and evaluates; with --annotator it also has the selected instructions
answered, tunes on the answers (Type C) and answers with that (Type D). Everything is below
projects/NAME, one budget of --eps covers all that is released, and a script that was stopped goes
on where it was. It is meant to be read, and changed.
"""

import os
import shlex
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import jinja2

from data.prepare_instructions import CONVERSATION, SPLIT_SHARES, RowSettings, split_shares
from utils.cli import UsageError, run_cli, say
from utils.command_line.config import ConfigSettings, read_config_and_flags, write_config
from utils.command_line.launch import ROOT
from utils.command_line.parser import (
    batch_size,
    flag,
    job_name,
    parser_of,
    positive_float,
    positive_int,
    to_argv,
)
from utils.privacy.accounting import MAX_DELTA, MIN_DELTA
from utils.texts.forms import NO_COLUMN
from utils.texts.rows import is_readable, names_of
from utils.texts.units import is_owner_column

TEMPLATE = "pipeline.sh.j2"
LONGEST_LINE = 88
# Peak learning rate of training on answers, without privacy, and clip norm, if none is given.
ANSWERS_LR, CLIP = 1e-3, 0.5


def _shares(text: str) -> str:
    """The flag --split as it is, once it is known to be right."""
    split_shares(text)
    return text


_rows = partial(flag, group="your rows")
_model = partial(flag, group="models and training")
_annotation = partial(flag, group="annotation")


@dataclass(frozen=True, kw_only=True)
class Settings(ConfigSettings, RowSettings):
    """The flags of the script: of the rows, of the budget, and of the stages."""

    project: str = flag(
        "name of the folder that everything is written to", type=job_name, required=True
    )
    projects_dir: str = flag("projects are written below it", "projects")
    data: list[str] = _rows(
        "files, folders or hub data sets", nargs="+", required=True, metavar="PATH_OR_HUB_ID"
    )
    split: str = _rows("the share of each split", SPLIT_SHARES, type=_shares, metavar="SHARES")

    eps: float = flag(
        "epsilon of training and histogram together, such as 6",
        type=positive_float, required=True, group="privacy",
    )  # fmt: skip
    delta: str = flag(
        "target delta, below 1/N; auto: 1/(10 N), rounded down to a power of ten",
        "auto",
        group="privacy",
    )
    max_rows_per_unit: int = flag(
        "K, the rows of one unit of --unit_column that a step may take", 8, group="privacy"
    )
    histogram_sigma: float = flag(
        "deviation of the noise of every count of the histogram", 10.0, group="privacy"
    )

    model_name: str = _model("base model: a hub id or a folder", required=True)
    embedding_model: str | None = _model(
        "a sentence-transformers hub id or folder; sentence-t5-base if left out"
    )
    max_seq_len: int = _model("longest sequence in tokens; longer ones are cut", 512)
    perdevice_bs: int | str = _model(
        "sequences of max_seq_len that fit on a device at once, in training", 4, type=batch_size
    )
    gpus: int = _model("processes, one per GPU", 1)
    num_epochs: float = _model("of both trainings", 3.0)
    total_bs: int | None = _model(
        "expected rows (units with --unit_column) in a batch of the private training; as the "
        "generator advises for so many epochs if left out",
        type=positive_int,
    )
    lr: float | None = _model(
        "peak learning rate of both trainings; if left out, of the private one as the generator "
        f"advises, and {ANSWERS_LR:g} of the other",
        type=positive_float,
    )
    clip: float | None = _model(
        "clip norm C of the private training with a --total_bs of your own: the l2 bound of one "
        f"example's gradient; {CLIP:g} if left out, as the generator advises",
        type=positive_float,
    )
    num_samples: int = _model("synthetic instructions to sample; a quarter is selected", 10_000)

    annotator: list[str] | None = _annotation(
        "OpenAI-compatible server and its model, such as http://localhost:8000/v1 MODEL; the key "
        "is read from OPENAI_API_KEY when the script runs. Left out, the script ends before",
        nargs=2, metavar=("BASE_URL", "MODEL"),
    )  # fmt: skip
    max_cost: float | None = _annotation(
        "US dollars that annotation may cost", type=positive_float, metavar="USD"
    )

    @property
    def is_advised(self) -> bool:
        """Whether the generator chooses the recipe of the private training."""
        return self.total_bs is None

    @property
    def protects_units(self) -> bool:
        """Whether all rows of one owner are protected together."""
        return self.unit_column not in (None, NO_COLUMN)


def main(argv: list[str] | None = None) -> int:
    settings = read_config_and_flags(Settings, __doc__, argv)
    check(settings)
    unnamed = owners(settings.data) if settings.unit_column is None else []
    projects = Path(settings.projects_dir).expanduser()
    folder = (projects if Path.cwd() == ROOT else projects.absolute()) / settings.project
    print(script(settings, folder), end="")
    if settings.config:
        write_config(folder / "pipeline.yaml", settings)
    say("a script on stdout: store it as a file, read it, and start it with bash")
    say(f"  everything it makes  {folder}")
    whose = f"all rows of one {settings.unit_column}" if settings.protects_units else "one row"
    say(f"  budget               epsilon {settings.eps:g} for {whose}, delta {settings.delta}")
    for owner in unnamed:
        say(
            f"warning: {owner!r} seems to say whose a row is, and the budget is for one row; "
            f"--unit_column {shlex.quote(owner)} protects all rows of one, and {NO_COLUMN} says "
            "that rows are meant"
        )
    return 0


def check(settings: Settings) -> None:
    """Refuse what no script can mean.

    Raises:
        UsageError: see its message.
    """
    if settings.turn == "all" and not settings.protects_units:
        raise UsageError(
            "--turn all gives several rows of one conversation, and a guarantee for one row; name "
            f"whose they are with --unit_column, {CONVERSATION} where no column says it, or leave "
            "--turn out"
        )
    if settings.max_seq_len < 2:
        raise UsageError("--max_seq_len 1 leaves no token to learn from; use 2 or more")
    try:
        is_delta = settings.delta == "auto" or MIN_DELTA <= float(settings.delta) <= MAX_DELTA
    except ValueError:
        is_delta = False
    if not is_delta:
        raise UsageError(
            f"--delta {settings.delta}: must be between {MIN_DELTA:g} and {MAX_DELTA:g}, and "
            "below 1/N; or auto"
        )
    if (settings.total_bs is None) != (settings.lr is None):
        raise UsageError("--total_bs and --lr go together: give both, or neither for advised ones")
    if settings.is_advised and settings.clip is not None:
        raise UsageError(f"--clip {settings.clip:g} needs --total_bs and --lr of your own")
    if settings.max_cost and not settings.annotator:
        raise UsageError(f"--max_cost {settings.max_cost:g} needs --annotator BASE_URL MODEL")
    if settings.annotator:
        address = urlsplit(settings.annotator[0])
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UsageError(
                f"--annotator {settings.annotator[0]!r}: the address of a server comes first, such "
                "as http://localhost:8000/v1"
            )
        if address.username or address.password or address.query:
            raise UsageError(
                "--annotator: the address holds a name, a password or parameters, which would "
                "stand in the script; a key belongs into OPENAI_API_KEY"
            )


def owners(data: list[str]) -> list[str]:
    """Columns of the files that are here which seem to say whose a row is.

    Raises:
        UsageError: a file cannot be read.
    """
    files = [Path(name).expanduser() for name in data]
    here = [file for file in files if file.is_file() and is_readable(file)]
    return list(dict.fromkeys(filter(is_owner_column, chain.from_iterable(map(names_of, here)))))


def script(settings: Settings, folder: Path) -> str:
    """The script.

    Args:
        folder: the project's, as the toolkit's folder sees it.
    """
    units, flags = settings.protects_units, replace(settings, config=None)
    model = words(model_name=located(settings.model_name), max_seq_len=settings.max_seq_len)
    training = model + words(
        perdevice_bs=settings.perdevice_bs,
        gpus=settings.gpus,
        num_epochs=settings.num_epochs,
    )
    recipe = words(clip=settings.clip or CLIP, total_bs=settings.total_bs, lr=settings.lr)
    rows = to_argv(parser_of(RowSettings, None), settings) + words(split=settings.split)
    owner = words(unit_column=settings.unit_column) if units else []
    owner_flags = owner + words(owner=settings.owner)
    owner_flags += ["--unowned_rows_are_units"] * settings.unowned_rows_are_units
    encoder = settings.embedding_model and located(settings.embedding_model)
    annotator = settings.annotator and words(
        base_url=settings.annotator[0], model=settings.annotator[1], max_cost=settings.max_cost
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "utils" / "command_line"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quoted": shlex.quote, "wrapped": wrapped, "commented": commented}
    return environment.get_template(TEMPLATE).render(
        command=["python", Path(__file__).name, *to_argv(parser_of(Settings, None), flags)],
        eps=f"{settings.eps:g}",
        unit=f"all rows of one {one_line(settings.unit_column)}" if units else "one row",
        histogram_sigma=f"{settings.histogram_sigma:.15g}",
        root=str(ROOT),
        python=sys.executable,
        folder=str(folder),
        preparation=["--input", *map(located, settings.data), *rows],
        unit_flags=[*owner_flags, *words(max_rows_per_unit=settings.max_rows_per_unit)]
        if units
        else [],
        owner_flags=owner_flags,
        unit_column=spaced(owner),
        private_training=words(eps=settings.eps, delta=settings.delta)
        + training
        + (["--advised"] if settings.is_advised else recipe),
        training=training + words(lr=settings.lr or ANSWERS_LR),
        model=model,
        sampling=model + words(gpus=settings.gpus),
        num_samples=settings.num_samples,
        embedder=spaced(words(model=encoder)),
        memory_embedder=spaced(words(embedding_model=encoder)),
        annotator=annotator,
    )


def located(name: str) -> str:
    """A path as the toolkit's folder sees it, and no flag to a command line.

    A name of nothing that is here stays as it is: it may be the hub's.
    """
    path = Path(name).expanduser()
    if Path.cwd() != ROOT and path.exists():
        return os.path.abspath(path)
    return f"./{name}" if name.startswith("-") else name


def words(**flags: object) -> list[str]:
    """Words of a command line; a flag without a value is left out."""
    found = []
    for name, value in flags.items():
        if value is not None:
            text = f"{value:.15g}" if isinstance(value, float) else str(value)
            found += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return found


def spaced(found: list[str]) -> str:
    """Words at the end of a line of the script."""
    return "".join(f" {shlex.quote(word)}" for word in found)


def wrapped(found: list[str], indent: str = " " * 8) -> str:
    """Words of a command over as many lines as they take, a flag and its values on one."""
    parts: list[str] = []
    for word in found:
        if word.startswith("--") or not parts:
            parts.append(shlex.quote(word))
        else:
            parts[-1] += f" {shlex.quote(word)}"
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < LONGEST_LINE:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return f" \\\n{indent}".join(lines)


def commented(found: list[str]) -> str:
    """A command in the lines of a comment, whatever its words hold."""
    text = wrapped(found, indent="    ")
    return textwrap.indent(text, "#     ", lambda _: True).replace("\r", "\\r")


def one_line(text: str | None) -> str:
    """A name for a comment."""
    return " ".join((text or "").split())


if __name__ == "__main__":
    run_cli(main)
