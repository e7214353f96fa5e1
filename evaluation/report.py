"""One page that says what came of a run: the guarantee, how close, how good, and what leaked.

    python -m evaluation.report outputs/instructions outputs/answers \\
        --histogram resampling/private_data/histogram_ledger.jsonl \\
        --samples inference_outputs/instructions --selection resampling/selected --output report
    python -m evaluation.report --project projects/mine --output report

Writes OUTPUT/report.html, which needs no network and no script, and OUTPUT/report.md with the same
facts. Both may be released: nothing in them was computed from private data but what the composed
guarantee covers, and nothing under a private/ folder is read. With --internal the page has
everything else too, and is OUTPUT/private/report-internal.html and .md. Exit code 1 if there is no
guarantee, or if more was spent than a run was planned for; the page says so.
"""

from dataclasses import dataclass
from pathlib import Path

from evaluation.page.material import Sources, collect
from privacy_checks.composition import ALLOW_ABOVE_TARGET, exit_code
from utils.command_line.parser import answer_early, command_line, flag, natural_int, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings(Sources):
    """The flags of the report."""

    project: Path | None = flag(
        "a folder in which runs, histograms, samples, selections, annotations and evaluations are "
        "found by themselves, next to what other flags name",
        type=Path,
        metavar="DIR",
    )
    output: Path = flag("folder for the page", type=Path, required=True, metavar="DIR")
    overwrite: bool = flag("replace a page that this tool wrote there", False)
    allow_above_target: bool = flag(ALLOW_ABOVE_TARGET, False)
    num_shown: int = flag("texts of each kind to show", 6, type=natural_int)


answer_early(__name__, Settings, __doc__)

from collections.abc import Callable

import jinja2
from markupsafe import Markup, escape

from evaluation.page.printing import counted, markdown, one_line, percent, plain, portable_word
from evaluation.page.project import with_project
from evaluation.page.sections import Page
from evaluation.results import PRIVATE_FOLDER, shown
from utils.cli import UsageError, run_cli, say
from utils.files import write_atomic
from utils.folders import claimed, private_folder
from utils.privacy.guarantee import rounded_up

TEMPLATES = Path(__file__).parent / "page" / "templates"
ESCAPED: dict[str, Callable[[str], str]] = {".html": escape, ".md": markdown}
# By which a later call knows a page of this tool, which it may replace.
MARK = "evaluation.report"


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    if settings.project:
        settings = with_project(settings, settings.project)
    if not settings.run:
        raise UsageError("name the RUNs, or the folder that they are in with --project")
    with claimed(settings.output):
        return write_page(settings)


def write_page(settings: Settings) -> int:
    """Collect, render and write; returns the exit code."""
    internal, output = settings.internal, settings.output
    if settings.real and not internal:
        raise UsageError(
            f"--real {settings.real}: real texts are for the internal page; add --internal"
        )
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is not a folder; use another")
    folder = output / PRIVATE_FOLDER if internal else output
    paths = {
        suffix: folder / f"{'report-internal' if internal else 'report'}{suffix}"
        for suffix in ESCAPED
    }
    for path in paths.values():
        require_replaceable(path, settings.overwrite)
    own = command_line("evaluation.report", Settings, settings)
    page = Page(collect(settings), settings.num_shown, own)
    if internal:
        private_folder(folder)
    for suffix, path in paths.items():
        write_atomic(path, render(page, suffix))
        say(f"written to {path}" + (" (private: do not share)" if internal else ""))
    for line in page.above_target:
        say(line)
    if page.guarantee:
        print(promise(page))
    else:
        say(f"THERE IS NO PRIVACY GUARANTEE: {promise(page)}")
    return exit_code(page.composed, settings.allow_above_target)


def require_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse a file that exists, unless it is a page of this tool that may be replaced.

    Raises:
        UsageError: says which of the two it is.
    """
    if not path.exists():
        return
    own = path.is_file() and MARK.encode() in path.read_bytes()[:500]
    if not own:
        raise UsageError(f"{path} exists and is not a page of this tool; use another --output")
    if not overwrite:
        raise UsageError(f"{path} exists; add --overwrite to replace it, or use another --output")


def environment(page: object, suffix: str, escaped: Callable[[str], str]) -> jinja2.Environment:
    """Templates that speak of `page`; whatever they print of it is text, and never markup.

    Args:
        page: a `Page`, or what else has what the template shows.
        suffix: of the blocks that the page is made of, .html or .md.
        escaped: makes a plain text one of that format.
    """

    def finalize(value: object) -> str:
        return value if isinstance(value, Markup) else escaped(plain(value))

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.globals |= {"page": page, "blocks": f"blocks{suffix}.j2", "mark": MARK}
    # Python's format, such as {{ 0.5 | format(".3f") }}.
    made.filters |= {"format": format, "shown": shown, "word": portable_word}
    made.filters |= {"counted": counted, "one_line": one_line, "percent": percent}
    made.filters |= {"rounded_up": rounded_up}
    return made


def render(page: Page, suffix: str) -> str:
    """The page as .html or .md."""
    made = environment(page, suffix, ESCAPED[suffix])
    return made.get_template(f"report{suffix}.j2").render().rstrip() + "\n"


def promise(page: Page) -> str:
    """What is promised, or why nothing is, in a line for a terminal."""
    line = '{% from "guarantee.j2" import promise %}{{ promise() | one_line }}'
    return environment(page, ".md", Markup).from_string(line).render()


if __name__ == "__main__":
    run_cli(main)
