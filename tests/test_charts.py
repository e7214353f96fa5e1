"""Charts: one file for light and dark, ids of their own, the same bytes each time."""

import html.parser
import re

import pytest

from evaluation.page import charts

LINES = {"base": [[0, 3.0], [1, 2.0], [2, 1.5]], "tuned <b> & $x$": [[0, 3.0], [2, 0.5]]}
CHART = {"title": "Loss", "x_label": "step", "y_label": "nats", "kind": "line", "lines": LINES}
SCORES = [
    {"subject": "one", "value": 2.0, "low": 1.0, "high": 3.0, "control": 4.0},
    {"subject": "two", "value": 3.0, "low": None, "high": None, "control": None},
]


def drawn(kind: str, key: str = "key") -> str:
    if kind == "scores":
        return charts.score_chart("win rate", SCORES, "the base", key)
    return charts.line_chart(CHART | {"kind": kind}, key)


class Elements(html.parser.HTMLParser):
    """Names and attributes of all elements, and the texts."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("kind", ["line", "step", "scores"])
def test_a_chart_takes_its_colours_from_the_page(kind):
    svg = drawn(kind)
    assert not re.search(r"#[0-9a-f]{3,6}\b", svg)
    assert {"currentColor", "var(--grid)", "var(--series-1)"} <= set(
        re.findall(r"currentColor|var\(--[\w-]+\)", svg)
    )
    assert "font-family" not in svg
    assert "http" not in svg


@pytest.mark.parametrize("kind", ["line", "step", "scores"])
def test_a_chart_is_the_same_each_time_and_shares_no_id(kind):
    assert drawn(kind) == drawn(kind)
    ids = [set(re.findall(r' id="([^"]+)"', drawn(kind, key))) for key in ("one", "two")]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((drawn(kind, "one"), drawn(kind, "two")), ids):
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg)) == own


def test_a_chart_says_in_words_what_it_shows():
    _, attributes = Elements(drawn("line")).found[0]
    assert attributes["role"] == "img"
    assert attributes["aria-label"] == (
        "Loss: nats over step. base: from 3 at 0 to 1.5 at 2, highest 3; "
        "tuned <b> & $x$: from 3 at 0 to 0.5 at 2, highest 3"
    )
    assert charts.describe_scores("win rate", SCORES, "the base") == (
        "win rate. one: 2, from 1 to 3, control 4; two: 3. The control is the base."
    )


def test_labels_are_text_and_never_markup():
    found = Elements(drawn("line"))
    assert "b" not in [tag for tag, _ in found.found]
    assert any("tuned <b> & $x$" in text for text in found.texts)


def test_intervals_and_controls_stand_where_their_numbers_are():
    """Along the axis, low, value, high and control of 1, 2, 3, 4 are equally far apart."""
    svg = drawn("scores")
    (low, high), *_ = (
        (float(found[1]), float(found[2]))
        for found in re.finditer(
            r'd="M ([\d.]+) [\d.]+\s+L ([\d.]+) [\d.]+\s*"[^>]*series-1\); stroke-width: 2.2',
            svg,
        )
    )
    marks = re.findall(r'<use href="#[^"]+" x="([\d.]+)" y="[\d.]+" style="([^"]*)"', svg)
    values = [float(x) for x, style in marks if "fill: var(--series-1)" in style]
    control = [float(x) for x, style in marks if "stroke: var(--series-2)" in style]
    unit = (high - low) / 2
    assert unit > 20
    assert values == pytest.approx([low + unit, high], abs=0.01)
    assert control == pytest.approx([high + unit], abs=0.01)


def test_a_line_of_one_point_is_a_dot():
    dots = [
        charts.line_chart(CHART | {"lines": {"loss": points}}, "key").count("var(--series-1)")
        for points in ([[0, 1.0], [1, 2.0]], [[0, 1.0]])
    ]
    assert dots[1] > dots[0]


def test_odd_texts_and_numbers_make_a_chart():
    lines = {"漢字 " + "long " * 30: [[0, float("nan")], [1, 1.0]], "empty": []}
    assert charts.line_chart(CHART | {"lines": lines}, "odd").startswith("<svg ")


def test_ticks_of_whole_numbers_are_whole_and_legends_are_not_cut():
    long = "everything that was sampled, " * 4
    svg = charts.line_chart(CHART | {"lines": {long: [[0, 1.0], [3, 2.0]], "b": [[1, 1.0]]}}, "key")
    texts = [text.strip() for text in Elements(svg).texts if text.strip()]
    shown = " ".join(texts)
    assert " ".join(long.split()) in shown
    assert {"0", "1", "2", "3"} <= set(texts)
    assert not {"0.5", "1.5", "2.5"} & set(texts[: texts.index("step")])
    halves = charts.line_chart(CHART | {"lines": {"a": [[0.5, 1.0], [1.5, 2.0]]}}, "key")
    assert "0.75" in Elements(halves).texts or "0.8" in Elements(halves).texts


def test_a_boundary_is_drawn_where_it_is_and_named():
    words = "run 2 begins"
    assert words not in charts.line_chart(CHART, "key")
    assert words in charts.line_chart(CHART | {"boundaries": {1: words}}, "key")
