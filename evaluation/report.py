"""One page that says what came of a run: the guarantee, how close, how good, and what leaked.

    python -m evaluation.report outputs/instructions outputs/answers \\
        --histogram resampling/private_data/histogram_ledger.jsonl \\
        --samples inference_outputs/instructions --selection resampling/selected --output report

Writes OUTPUT/report.html, which needs no network and no script, and OUTPUT/report.md with the same
facts. Both may be released: nothing in them was computed from private data but what the composed
guarantee covers, and nothing under a private/ folder is read. With --internal the page has
everything else too, and is OUTPUT/private/report-internal.html and .md. Exit code 1 if there is no
guarantee; the page says so.
"""

import argparse
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from evaluation.page.material import collect, printable
from evaluation.page.sections import Page, build_page
from evaluation.results import PRIVATE_FOLDER
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.command_line.parser import make_parser, natural_int, positive_float
from utils.files import write_atomic
from utils.runs.run_folder import PRIVATE_README
from utils.texts.text_inputs import FORMATS

TEMPLATES = Path(__file__).parent / "page" / "templates"
SUFFIXES = (".html", ".md")
# By which a later call knows a page of this tool, which it may replace.
MARK = "evaluation.report"


def build_parser() -> argparse.ArgumentParser:
    """The command line of the report."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="+", help="training runs that read the private rows")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the page")
    add("--overwrite", action="store_true", help="replace a page that this tool wrote there")
    add(
        "--internal",
        action="store_true",
        help="with everything computed from private data, for whoever may see that",
    )
    folders = {
        "--histogram": ("LEDGER", "ledgers of histograms of the same private rows"),
        "--samples": ("DIR", "what inference.py sampled from adapters of the runs"),
        "--evaluations": ("DIR", "the --output of evaluation.distribution, .perplexity and others"),
        "--synthetic_runs": (
            "RUN",
            "runs without DP on synthetic data alone: post-processing, which costs nothing. That "
            "it was synthetic is your claim, and the page says so",
        ),
    }
    for flag, (metavar, what) in folders.items():
        add(flag, type=Path, nargs="+", default=[], metavar=metavar, help=what)
    add("--extraction", type=Path, metavar="DIR", help="the --output of extract, for its counts")
    add("--selection", type=Path, metavar="DIR", help="the --output of resample")
    add("--annotations", type=Path, metavar="DIR", help="the --output of annotate")
    add(
        "--public_prompts",
        action="store_true",
        help="the prompts of --samples are no private rows, and may be shown with their answers",
    )
    add(
        "--real",
        type=Path,
        metavar="PATH",
        help=f"real texts to show beside the synthetic ones, with --internal alone: {FORMATS}",
    )
    add("--split", help="the split to read where --real is a saved DatasetDict")
    add("--delta", type=positive_float, help="the runs' if left out; needed where they differ")
    add("--num_shown", type=natural_int, default=6, help="texts of each kind to show")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.real and not args.internal:
        raise UsageError(
            f"--real {args.real}: real texts are for the internal page; add --internal"
        )
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output {args.output} is no folder; use another")
    folder = args.output / PRIVATE_FOLDER if args.internal else args.output
    name = "report-internal" if args.internal else "report"
    paths = {suffix: folder / f"{name}{suffix}" for suffix in SUFFIXES}
    for path in paths.values():
        require_replaceable(path, args.overwrite)
    material = collect(args)
    page = build_page(material, args.num_shown)
    if args.internal:
        write_atomic(folder / "README.md", PRIVATE_README)
    for suffix, path in paths.items():
        write_atomic(path, render(page, suffix))
        say(f"written to {path}" + (" (private: do not share)" if args.internal else ""))
    if page.guarantee:
        print(page.verdict[0])
    else:
        say(f"THERE IS NO PRIVACY GUARANTEE: {page.verdict[0]}")
    return EXIT_OK if page.guarantee else EXIT_FAILED


def require_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there, unless it is a page of this tool that may be replaced.

    Raises:
        UsageError: says which of the two it is.
    """
    if not path.exists():
        return
    own = path.is_file() and MARK.encode() in path.read_bytes()[:500]
    if not own:
        raise UsageError(f"{path} exists and is no page of this tool; use another --output")
    if not overwrite:
        raise UsageError(f"{path} exists; add --overwrite to replace it, or use another --output")


def render(page: Page, suffix: str) -> str:
    """The page as .html or .md; whatever it holds is text there, and never markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=suffix == ".html",
        finalize=finalize_html if suffix == ".html" else finalize_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["markup"] = Markup
    template = environment.get_template(f"report{suffix}.j2")
    return template.render(page=page, mark=Markup(MARK)).rstrip() + "\n"


def finalize_html(value: object) -> object:
    """What a template prints, made of characters that a page can hold."""
    return value if isinstance(value, Markup) else printable(str(value))


def finalize_markdown(value: object) -> str:
    """What a template prints, with every character escaped that Markdown or HTML would act on."""
    if isinstance(value, Markup):
        return value
    text = printable(str(value)).strip().replace("&", "&amp;")
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]~$])", r"\\\1", text)
    # Inside a word an underscore means nothing.
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    # At its start these would make headings, rules and lists.
    text = re.sub(r"^([#+=-]|\d+(?=[.)](\s|$)))", escaped_start, text)
    return re.sub(r"\s*\n\s*", "<br>", text)


def escaped_start(mark: re.Match) -> str:
    """A mark that begins a block in Markdown, as text."""
    return f"{mark[0]}\\" if mark[0].isdigit() else f"\\{mark[0]}"


if __name__ == "__main__":
    run_cli(main)
