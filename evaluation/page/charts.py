"""Charts as inline SVG that takes its colours and fonts from the page around it.

matplotlib draws with sentinel colours, which become `currentColor` and the CSS variables --grid
and --series-1 to --series-6, so that one file reads well in light and in dark. The same input gives
the same bytes, and no id occurs in two charts of a page that have different keys.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.printable import printable

INK, GRID = "#f0000a", "#f0000b"
SERIES = ("#f00001", "#f00002", "#f00003", "#f00004", "#f00005", "#f00006")
# In addition to colour, so that lines differ without it.
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)))
MARKS = ("o", "s", "^", "D", "v", "P")
WIDTH, LINES_HEIGHT, LINE_HEIGHT = 5.2, 3.1, 0.2  # inches of 72 units
LEGEND_WIDTH, MOST_CHARACTERS = 52, 240
FONT_SIZE = 10.5
SETTINGS = {
    "svg.fonttype": "none", "font.size": FONT_SIZE, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "grid.linewidth": 0.8, "lines.linewidth": 1.8, "legend.frameon": False,
    # What a page shows as text needs no markup of matplotlib's.
    "text.parse_math": False,
}  # fmt: skip


def line_chart(chart: dict, key: str) -> str:
    """Lines or steps over a common axis.

    Args:
        chart: the fields of `evaluation.results.Chart`; of the kind "marked", each line's points
            have marks of their own. May have "boundaries": words by the x where they apply from.
        key: a name that no other chart of the page has.

    Returns:
        An `<svg>` element with a text alternative.
    """
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": key}):
        labels = [_wrapped(label, LEGEND_WIDTH) for label in chart["lines"]]
        columns = 1 if max(map(len, labels), default=0) > LEGEND_WIDTH // 2 else 2
        lines = sum(label.count("\n") + 1 for label in labels) / columns
        figure = Figure(figsize=(WIDTH, LINES_HEIGHT + LINE_HEIGHT * lines), layout="constrained")
        axes = figure.subplots()
        for number, points in enumerate(chart["lines"].values()):
            x, y = zip(*points) if points else ((), ())
            axes.plot(
                x, y, drawstyle="steps-mid" if chart["kind"] == "step" else "default",
                color=SERIES[number % len(SERIES)], linestyle=STYLES[number % len(STYLES)],
                marker=_mark(chart["kind"], number, len(points)), markersize=4.5,
                label=labels[number],
            )  # fmt: skip
        for x, words in chart.get("boundaries", {}).items():
            axes.axvline(x, color=INK, linewidth=0.8, linestyle=":")
            axes.annotate(
                words, (x, 0), xycoords=("data", "axes fraction"), xytext=(4, 5),
                textcoords="offset points", rotation=90, va="bottom",
            )  # fmt: skip
        axes.set_xlabel(_wrapped(chart["x_label"], 60))
        axes.set_ylabel(_wrapped(chart["y_label"], 36))
        _tidy(axes)
        if all(float(x).is_integer() for points in chart["lines"].values() for x, _ in points):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(labels) > 1:
            figure.legend(
                loc="outside upper left", ncols=columns, handlelength=2.4, columnspacing=1.2
            )
        return _inline(figure, describe(chart))


def score_chart(name: str, scores: Sequence[dict], control: str, key: str) -> str:
    """Scores of one name as dots with their intervals, and their controls as hollow diamonds.

    Args:
        name: what was measured.
        scores: fields of `evaluation.results.Score`, each of another subject.
        control: what the diamonds are; "" where there are none.
        key: as for `line_chart`.
    """
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": key}):
        height = 0.75 + 0.52 * len(scores)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for row, score in enumerate(scores):
            if score["low"] is not None:
                axes.plot([score["low"], score["high"]], [-row, -row], color=SERIES[0], lw=2.2)
            axes.plot(score["value"], -row, "o", color=SERIES[0], markersize=7)
            if score["control"] is not None:
                axes.plot(
                    score["control"], -row, "D", markersize=7, markeredgewidth=1.6,
                    markerfacecolor="none", markeredgecolor=SERIES[1],
                )  # fmt: skip
            # Above its line rather than next to the axis: subjects may be long, screens narrow.
            axes.annotate(
                _short(score["subject"], 60), (0, -row), xycoords=("axes fraction", "data"),
                xytext=(0, 7), textcoords="offset points",
            )  # fmt: skip
        axes.set_ylim(-len(scores) + 0.6, 0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        _tidy(axes, rows=False)
        return _inline(figure, describe_scores(name, scores, control))


def describe(chart: dict) -> str:
    """A chart of lines in words: where each begins and ends."""
    lines = [
        f"{label}: from {points[0][1]:.4g} at {points[0][0]:.4g} to {points[-1][1]:.4g} at "
        f"{points[-1][0]:.4g}, highest {max(y for _, y in points):.4g}"
        for label, points in chart["lines"].items()
        if points
    ]
    return f"{chart['title']}: {chart['y_label']} over {chart['x_label']}. " + "; ".join(lines)


def describe_scores(name: str, scores: Sequence[dict], control: str) -> str:
    """A chart of scores in words."""
    parts = []
    for score in scores:
        words = f"{score['subject']}: {score['value']:.4g}"
        if score["low"] is not None:
            words += f", from {score['low']:.4g} to {score['high']:.4g}"
        if score["control"] is not None:
            words += f", control {score['control']:.4g}"
        parts.append(words)
    meaning = f" The control is {control}." if control else ""
    return f"{name}. " + "; ".join(parts) + "." + meaning


def _mark(kind: str, number: int, num_points: int) -> str | None:
    """The mark of a line's points: one of its own where the kind says so, or for a lone point."""
    if kind == "marked":
        return MARKS[number % len(MARKS)]
    return "." if num_points == 1 else None


def _short(text: str, width: int) -> str:
    text = printable(text)
    return textwrap.shorten(text, width, placeholder=" …") if len(text) > width else text


def _wrapped(text: str, width: int) -> str:
    """The whole of a label, in as many lines as it needs; only an endless one is cut."""
    return textwrap.fill(_short(text, MOST_CHARACTERS), width)


def _tidy(axes: Axes, rows: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if rows:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="both" if rows else "x")
    axes.set_axisbelow(True)


def _inline(figure: Figure, description: str) -> str:
    """The figure as an element for a page: no fixed size, the page's colours, ids of its own."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The page's fonts have glyphs that matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    (view,) = re.findall(r'viewBox="[^"]+"', svg)[:1]
    svg = svg[svg.index("</defs>") + len("</defs>") :].strip()  # of the first: a global style
    # Ids that something refers to are hashes of what they name and of the chart's key.
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"\n(?=L |z|C |Q )", " ", svg)
    for colour, value in {INK: "currentColor", GRID: "var(--grid)"}.items():
        svg = svg.replace(colour, value)
    for number, colour in enumerate(SERIES, start=1):
        svg = svg.replace(colour, f"var(--series-{number})")
    return f'<svg {view} role="img" aria-label="{escape(description)}">\n{svg}'
