"""What the page says of numbers: bounds that are never rounded down, and careful readings."""

import math
import re
from pathlib import Path

import pytest
from markupsafe import Markup

from evaluation import report
from evaluation.page import sections
from evaluation.page.material import Material, Samples, Topics, Training
from evaluation.page.printing import one_line
from evaluation.results import Result, Score
from utils.privacy.accounting import SampledGaussian, compute_delta


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 2.4871, 8.0, 30.0, 1000.0])
def test_the_odds_are_bounds(epsilon):
    value = float(sections.factor(epsilon).replace(",", ""))
    assert value >= math.exp(min(epsilon, 700)) * (1 - 1e-12)
    assert value <= math.exp(min(epsilon, 700)) * 1.11
    for (before, after), prior in zip(sections.odds(epsilon), sections.PRIORS):
        assert float(before.rstrip("%")) == prior * 100
        exact = 1 / (1 + (1 - prior) / prior * math.exp(-epsilon))
        assert exact <= float(after.rstrip("%")) / 100 <= exact + 1.01e-4


def test_the_bound_on_a_guess_is_that_of_the_best_test():
    """For one Gaussian mechanism the best guess is right Phi(1 / (2 sigma)) of the time."""
    sigma = 2.0
    variation = compute_delta([SampledGaussian(1.0, sigma, 1)], 0.0)
    material = Material(True, {}, [], [], [], total_variation=variation)
    best = 0.5 * (1 + math.erf(1 / (2 * sigma) / math.sqrt(2)))
    assert (
        best
        <= float(sections.best_guess(material.total_variation).rstrip("%")) / 100
        <= best + 1e-4
    )


def test_what_an_attack_finds_is_rounded_up():
    told = sections.best_catch({0.001: 0.01201, 0.01: 0.09705}, "person")
    assert told == (
        "Of the persons that were in the data no attack finds more than 1.21% at a false-alarm "
        "rate of 0.1%, 9.71% at a false-alarm rate of 1%."
    )


def test_the_headline_of_copies_is_how_many_there_are():
    """The first figure; of other results the first that has a control."""

    def headline(first: str) -> str:
        scores = [vars(Score(first, "texts", 1.0)), vars(Score("more", "texts", 0.1, control=0))]
        result = vars(Result("memorisation", "", True, "", [], "chance"))
        result |= {"scores": scores, "charts": []}
        material = Material(True, {"guarantee": False}, [], [], [], results=[result])
        (finding,) = sections.Page(material, 0).findings
        return finding["headline"]["name"]

    copies = "copies or near copies of any private row, share"
    assert headline(copies) == copies
    assert headline("share") == "more"


@pytest.mark.parametrize("high", [None, 0.2])
def test_a_table_has_a_column_of_intervals_where_it_has_one(high):
    scores = [vars(Score("share", "texts", 0.1, n=9)), vars(Score("more", "texts", 0.1, n=9))]
    scores[1] |= {"low": high and 0.0, "high": high, "control": 0.3}
    result = vars(Result("memorisation", "", True, "spread", [], "chance"))
    result |= {"scores": scores, "charts": []}
    material = Material(True, {"guarantee": False}, [], [], [], results=[result])
    made = report.environment(sections.Page(material, 0), ".md", str)
    text = made.get_template("sections.j2").module.findings("leak")
    column = " interval |" if high else ""
    assert f"| measure | of | n | value |{column} control | reads |" in text
    assert ("| more | texts | 9 | 0.1 | 0 to 0.2 | 0.3 |" if high else "| 9 | 0.1 | 0.3 |") in text
    assert ("Intervals: spread." in text) == bool(high)


@pytest.mark.parametrize(
    ("value", "better", "reading"),
    [
        (0.58, "higher", "not told apart from the control"),
        (0.70, "higher", "better than the control"),
        (0.30, "higher", "worse than the control"),
        (0.70, "lower", "worse than the control"),
        (0.30, "lower", "better than the control"),
        (0.70, "", "higher than the control"),
        (0.30, "", "lower than the control"),
    ],
)
def test_a_score_is_read_by_its_interval(value, better, reading):
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "control": 0.5, "n": 100}
    assert sections.reading(score | {"better": better}) == reading
    for missing in ("control", "low"):
        assert sections.reading(score | {"better": better, missing: None}) == ""


@pytest.mark.parametrize(
    ("better", "value", "reading"),
    [
        ("higher", 0.9, "too few texts"),
        ("lower", 0.1, "too few texts"),
        ("lower", 0.5, "too few texts"),
        ("lower", 0.9, "worse than the control"),
    ],
)
def test_few_texts_decide_nothing_but_that_there_is_a_leak(better, value, reading):
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "control": 0.5, "n": 27}
    assert sections.reading(score | {"better": better}) == reading


@pytest.mark.parametrize(
    ("data", "remark"),
    [
        (["data/quickstart_instructions", "labelled_quickstart"], " (a demonstration)"),
        (["data/quickstart_instructions", "mine"], ""),
    ],
)
def test_the_quick_starts_page_is_called_a_demonstration(data, remark):
    runs = [
        Training(Path(folder), {"dataset_name": name}, [], {}, None, None, [])
        for folder, name in zip("ab", data)
    ]
    page = sections.Page(Material(False, {}, [], runs, [], "our letters"), 0)
    assert page.title == f"A model learnt from our letters{remark}"
    assert page.released == "a and b"


def test_the_headline_answers_the_question_and_prefers_a_control():
    def score(name, control=None):
        return {"name": name, "control": control}

    win, other, copies = score("win rate", 0.5), score("x", 1.0), score(sections.HEADLINES[-1])
    assert sections.headline([other, score("win rate"), win]) is win
    assert sections.headline([score("y"), other]) is other
    assert sections.headline([other, copies]) is copies
    assert sections.headline([]) is None


def test_a_single_example_has_no_interval():
    """Every draw of one example is that example; an exact interval of it has a width."""
    score = {"low": 5.0, "high": 5.0, "n": 1}
    assert sections.spread(score) == ""
    assert sections.spread(score | {"n": 2}) == "5 to 5"
    assert sections.spread(score | {"low": 0.0, "high": 0.975}) == "0 to 0.975"


def test_the_time_of_answers_to_hidden_prompts_is_hidden():
    manifest = {"num_samples": 5, "model_name": "m", "adapter_path": "a", "seconds": 61.4}
    drawn = [{"finish_reason": "stop", "num_tokens": 3}]
    page = sections.Page(Material(True, {"guarantee": False}, [], [], []), 0)
    templates = report.environment(page, ".md", Markup).get_template("sections.j2").module
    for hidden, end in ((False, "in 61 s"), (True, "not shown, since its prompts may be private")):
        samples = Samples(Path("folder"), manifest, drawn, hidden)
        text = one_line(templates.sampled(samples))
        assert text.endswith(end)
        assert ("61" in text) == (not hidden)


def test_long_texts_are_cut_and_empty_ones_are_named():
    assert sections.cut(" a ") == "a"
    assert sections.cut(" \n") == "(nothing)"
    cut = sections.cut("x" * 5000)
    assert len(cut) < 720
    assert cut.endswith("[…]")


def test_charts_of_lengths_hold_every_text():
    chart = sections.lengths_chart({"a": ["x" * n for n in (1, 5, 9, 500)], "b": [""]})
    assert re.search("a: from .*; b: from 1 at", chart.words)
    assert sections.lengths_rows({"a": ["x" * 10] * 3}) == [["a", "3", "10", "10", "10"]]


def test_topics_are_said_to_be_kept_or_lost_with_what_was_drawn():
    kept = [
        {"topic": 2, "keywords": "river, boat", "count": 40.0},
        {"topic": 0, "keywords": "bread", "count": 24.6},
    ]
    lost = [{"topic": 1, "keywords": "<b>", "count": -3.0}]
    counted = {"topics": kept, "left_out": lost, "noise_multiplier": 10.0, "least_count": 20.0}
    counted |= {"commands": [["python", "-m", "topics.histogram", "--assigned", "data/mine"]]}
    topics = Topics(Path("topics"), counted, "hash")
    manifest = {"prompt_style": "topic_generation", "num_samples": 9, "model_name": "m"}
    manifest |= {"adapter_path": "a", "versions": {}}
    drawn = [{"topic": 2 * (n % 3 > 0), "prompt": "", "text": "x", "finish_reason": "stop"}
             for n in range(9)]  # fmt: skip
    of_topics = Samples(Path("by topics"), manifest | {"topic_histogram_sha256": "hash"}, drawn)
    others = Samples(Path("others"), manifest | {"topic_histogram_sha256": "else"}, drawn)
    material = Material(
        True, {"guarantee": False}, [], [], [], samples=[of_topics, others], topics=topics
    )
    page = sections.Page(material, 0)
    assert "close" in page.sections
    assert "close" in page.cards
    assert any("topics.histogram --assigned data/mine" in line for line in page.commands)
    assert page.shown_topics == [
        ("river, boat", "40", "6"), ("bread", "25", "3"), ("<b>", "-3", "lost"),
    ]  # fmt: skip
    for suffix in report.ESCAPED:
        made = report.environment(page, suffix, report.ESCAPED[suffix])
        templates = made.get_template("sections.j2").module
        said = (
            "Of 3 topics 2 are kept and 1 lost, since the noise may be all that they are (a noisy "
            "count below 20)", "2 of them have a text among the 9 that were drawn",
        )  # fmt: skip
        for text in (templates.in_short("close"), templates.body("close")):
            assert all(part in one_line(text).replace("\\", "") for part in said)
        assert "Topics of private rows and of samples" in templates.body("close")
        assert "<b>" not in templates.body("close").replace("<b></b>", "")
        assert "2 topics kept, 1 left out" in one_line(templates.body("pipeline"))
    lines = sections.asked_chart(topics, page.of_topics).words
    assert "sampled" in lines
    assert "private, noise of deviation 10" in lines


def test_where_every_topic_is_lost_it_is_said_without_a_chart():
    lost = [{"topic": 0, "keywords": "bread", "count": 3.0}]
    counted = {"topics": [], "left_out": lost, "noise_multiplier": 10.0, "least_count": 20.0}
    material = Material(
        True, {"guarantee": False}, [], [], [], topics=Topics(Path("topics"), counted, "")
    )
    page = sections.Page(material, 0)
    assert page.closeness == []
    templates = report.environment(page, ".md", Markup).get_template("sections.j2").module
    assert "Of 1 topics 0 are kept and 1 lost" in one_line(templates.in_short("close"))
