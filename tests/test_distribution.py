"""Closeness and diversity of texts: who is compared with whom, and what may be released."""

import json
import zlib

import numpy as np
import pytest

from evaluation import distribution
from evaluation.distribution import Sample, TextSet, evaluate, figures_of, samples, text_set
from evaluation.measures.mauve import mauve
from resample_with_dp_histogram import embed
from tests.resampling import save_tiny_encoder, unit_vectors
from tests.training import run_process
from utils.cli import UsageError

DIMENSIONS, TOPICS = 16, 8
CENTRES = np.random.default_rng(99).normal(size=(TOPICS, DIMENSIONS))
NEAR, SKEWED = (0, 1, 2, 3), (0, 0, 0, 1)


class TopicModel:
    """Embeds a text near the centre of the topic that it begins with."""

    def encode(self, texts, *_, **__):
        texts = list(texts)
        noise = [np.random.default_rng(zlib.crc32(t.encode())).normal(size=DIMENSIONS)
                 for t in texts]  # fmt: skip
        return CENTRES[[int(text.split()[0][1:]) for text in texts]] + 0.5 * np.array(noise)


@pytest.fixture
def topic_model(monkeypatch):
    monkeypatch.setattr(embed, "load_model", lambda name: TopicModel())


def made_texts(count, topics, seed):
    random = np.random.default_rng(seed)
    return [
        f"t{topics[row % len(topics)]} " + " ".join(map(str, random.integers(200, size=8)))
        for row in range(count)
    ]


def run(tmp_path, real, synthetic, *flags, selected=None, output="out"):
    """Write the sets, run the command; returns OUTPUT."""
    argv = [f"--output={tmp_path / output}", *flags]
    for name, texts in (("real", real), ("synthetic", synthetic), ("selected", selected)):
        if texts is not None:
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(texts))
            argv.append(f"--{name}={path}")
    distribution.main(argv)
    return tmp_path / output


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    result = json.loads(path.read_text(), parse_constant=refuse)
    return result, {(score["name"], score["subject"]): score for score in result["scores"]}


def test_a_near_set_scores_as_its_control_and_a_skewed_one_worse(topic_model, tmp_path, capsys):
    real, near = made_texts(1000, NEAR, 1), made_texts(800, NEAR, 2)
    skewed = made_texts(600, SKEWED, 3)
    folder = run(tmp_path, real, skewed, "--num_rows=400", selected=near)
    result, scores = read(folder / "private" / "distribution.json")
    assert result["private"] is True
    for name in ("MAUVE", "recall", "coverage"):
        selected, synthetic = scores[name, "selected"], scores[name, "synthetic"]
        assert selected["better"] == "higher"
        assert selected["value"] == pytest.approx(selected["control"], abs=0.05), name
        assert synthetic["value"] < synthetic["control"] - 0.25, name
        assert synthetic["low"] < synthetic["value"] < synthetic["high"]
    for name in ("precision", "density"):
        assert scores[name, "selected"]["value"] == pytest.approx(
            scores[name, "selected"]["control"], abs=0.12
        )
    assert {subject for _, subject in scores} == {"synthetic", "selected"}
    assert list(result["charts"][0]["lines"]) == ["real", "synthetic", "selected"]
    assert "400 texts of each set in each of 5 draws" in result["notes"][0]
    shown = capsys.readouterr().out
    assert f"{scores['MAUVE', 'selected']['value']:.4g}" in shown
    assert "How diverse the synthetic texts are" in shown


def test_what_may_be_released_knows_nothing_of_the_real_texts(topic_model, tmp_path):
    synthetic, selected = made_texts(300, NEAR, 2), made_texts(120, SKEWED, 3)
    flags, released = ["--num_rows=100", "--num_seeds=2"], []
    for number, real in enumerate([made_texts(400, NEAR, 1), made_texts(30, (5,), 4)]):
        real += ["t1 quite other words"] * 5 * number
        folder = run(tmp_path, real, synthetic, *flags, selected=selected, output=f"out{number}")
        assert {path.name for path in folder.rglob("*")} == {
            "private", "README.md", "distribution.json",
        }  # fmt: skip
        result, scores = read(folder / "distribution.json")
        assert all(score["control"] is None for score in result["scores"])
        assert not any(name in ("MAUVE", "precision") for name, _ in scores)
        private, _ = read(folder / "private" / "distribution.json")
        assert private["notes"][0].startswith(f"{(100, 17)[number]} texts of each set")
        released.append({key: result[key] for key in ("scores", "charts", "notes", "private")})
    assert released[0] == released[1]
    assert released[0]["private"] is False
    assert "synthetic 300, selected 120" in " ".join(released[0]["notes"])


def test_public_texts_give_one_public_result(topic_model, tmp_path):
    real = made_texts(60, NEAR, 1)
    folder = run(tmp_path, real, real, "--public", "--num_rows=20", "--num_seeds=2")
    assert [path.name for path in folder.iterdir()] == ["distribution.json"]
    result, scores = read(folder / "distribution.json")
    assert result["private"] is False
    assert scores["MAUVE", "synthetic"]["control"] is not None
    with pytest.raises(UsageError, match="distribution.json exists; use another --output"):
        run(tmp_path, real, real)


def test_figures_of_whole_sets_stand_beside_those_of_the_real_one(topic_model, tmp_path):
    real = [f"t{row % 4} a b c d" for row in range(40)]
    synthetic = [f"t1 w{row // 2}" for row in range(100)] + [" \n", "?!"]
    folder = run(tmp_path, real, synthetic, "--num_seeds=2")
    _, scores = read(folder / "private" / "distribution.json")
    expected = {
        "words of a text, median": (2, 5), "words of a text, mean": (2, 5),
        "words of a text, 95th percentile": (2, 5), "distinct words": (51, 8),
        "exact duplicates, share": (0.5, 0.9),
    }  # fmt: skip
    for name, (value, control) in expected.items():
        score = scores[name, "synthetic"]
        assert (score["value"], score["control"], score["low"]) == (value, control, None), name


def spread_of(vectors, words=None):
    words = words or [[str(row)] for row in range(len(vectors))]
    return TextSet([1] * len(words), {"words of a text, mean": 1.0}, words, vectors)


def test_words_and_vectors_of_drawn_texts_belong_together():
    texts = made_texts(100, NEAR, 1)
    drawn = text_set("synthetic", texts, 20, TopicModel())
    assert len(drawn.words) == len(drawn.vectors) == 40
    assert len(drawn.lengths) == 100
    again = embed.unit_vectors(TopicModel().encode(map(" ".join, drawn.words)), np.arange(40), "")
    np.testing.assert_array_equal(drawn.vectors, again)
    assert drawn.words != text_set("selected", texts, 20, TopicModel()).words


def test_samples_are_equal_in_size_part_the_real_texts_and_follow_the_seed():
    sets = {"real": spread_of(unit_vectors(50, 1)), "synthetic": spread_of(unit_vectors(40, 2))}
    drawn = samples(sets, 20, seed=3)
    assert {name: len(sample.words) for name, sample in drawn.items()} == {
        "real": 20, "reference": 20, "synthetic": 20,
    }  # fmt: skip
    rows = {name: [int(word) for (word,) in sample.words] for name, sample in drawn.items()}
    assert not set(rows["real"]) & set(rows["reference"])
    assert len(set(rows["synthetic"])) == 20
    for name, source in {"reference": "real", "real": "real", "synthetic": "synthetic"}.items():
        np.testing.assert_array_equal(drawn[name].vectors, sets[source].vectors[rows[name]])
    assert samples(sets, 20, seed=3)["synthetic"].words == drawn["synthetic"].words
    assert samples(sets, 20, seed=4)["synthetic"].words != drawn["synthetic"].words
    # The same rows with or without the real set, and a smaller sample is part of a larger one.
    alone = samples({"synthetic": sets["synthetic"]}, 10, seed=3)
    assert alone["synthetic"].words == drawn["synthetic"].words[:10]


def test_a_set_is_compared_with_the_reference_and_never_with_its_control():
    vectors = unit_vectors(200, 1)
    drawn = {
        "real": Sample([["x", "y"]] * 100, -vectors[:100]),
        "reference": Sample([["a", "b"]] * 50 + [["a", "c"]] * 50, vectors[100:]),
        "synthetic": Sample([["a", "b"]] * 100, vectors[100:]),
    }
    figures = figures_of(drawn, seed=0)
    assert figures["MAUVE"]["synthetic"] == pytest.approx(1)
    assert figures["MAUVE"]["real"] < 0.1
    assert figures[distribution.SHARED] == {"real": 0, "synthetic": 1}
    distance = figures[distribution.DIVERGENCE]
    assert distance["real"] == 1
    assert 0 < distance["synthetic"] < 0.5
    assert figures["distinct-2"] == {"real": 1 / 100, "synthetic": 1 / 100}
    # No text has three words.
    assert "distinct-3" not in figures


def test_another_seed_has_other_clusters():
    drawn = {name: Sample([["a"]], unit_vectors(200, seed)) for name, seed in
             (("reference", 1), ("synthetic", 2))}  # fmt: skip
    found = [figures_of(drawn, seed)["MAUVE"]["synthetic"] for seed in (0, 1)]
    assert found == [
        mauve(drawn["reference"].vectors, drawn["synthetic"].vectors, s) for s in (0, 1)
    ]
    assert found[0] != found[1]


def test_a_figure_that_a_seed_lacks_is_left_out():
    """One text of forty has three words: the first seed draws it, the second does not."""
    words = [["a"], ["a", "b", "c"]] + [["a"]] * 38
    sets = {"synthetic": spread_of(unit_vectors(40, 1), words)}
    drawn = ["distinct-3" in figures_of(samples(sets, 20, seed), seed) for seed in (0, 1)]
    assert drawn == [True, False]
    result = evaluate(sets, 20, num_seeds=2, private=False)
    names = {score.name for score in result.scores}
    assert "distinct-1" in names
    assert "distinct-3" not in names


def test_draws_that_are_all_one_set_have_no_interval():
    """Forty texts of forty are the same ones for every seed; what they are compared with is not."""
    words = [[f"w{row}", f"v{row}"] for row in range(80)]
    sets = {
        name: spread_of(unit_vectors(rows, seed), words[:rows])
        for name, rows, seed in (("real", 80, 1), ("synthetic", 40, 2), ("selected", 60, 3))
    }
    result = evaluate(sets, 40, num_seeds=3, private=True)
    found = {(score.name, score.subject): score for score in result.scores}
    own, compared = "similarity of two texts", "coverage"
    assert found[own, "synthetic"].low is None
    assert found[own, "synthetic"].high is None
    for key in ((own, "selected"), (compared, "synthetic"), (compared, "selected")):
        assert found[key].low is not None, key
    assert found[own, "synthetic"].n == 40
    assert found["words of a text, mean", "selected"].n == 60


def test_scores_are_means_over_seeds_with_their_deviation():
    sets = {
        name: spread_of(unit_vectors(rows, seed))
        for name, rows, seed in (("real", 80, 1), ("synthetic", 60, 2))
    }
    result = evaluate(sets, 40, num_seeds=3, private=True)
    per_seed = [figures_of(samples(sets, 40, seed), seed)["coverage"] for seed in range(3)]
    (score,) = [score for score in result.scores if score.name == "coverage"]
    values = [figures["synthetic"] for figures in per_seed]
    assert np.std(values) > 0
    assert score.value == pytest.approx(np.mean(values))
    assert score.high - score.low == pytest.approx(2 * np.std(values, ddof=1))
    assert score.control == pytest.approx(np.mean([figures["real"] for figures in per_seed]))


@pytest.mark.parametrize(
    ("real", "synthetic", "flags", "message"),
    [
        (0, 50, [], "real.json' holds no instruction"),
        (19, 50, [], "--real .*real.json' has 19 texts with a word; 20 or more are needed, since"),
        (50, 9, [], "--synthetic .* has 9 texts with a word; 10 or more are needed$"),
        (50, 50, ["--num_seeds=1"], "--num_seeds 1: .* needs 2 or more"),
        (50, 50, ["--num_rows=9"], "--num_rows 9: 10 or more are needed"),
        (50, 50, ["--selected=missing.txt"], "'missing.txt' does not exist"),
    ],
)
def test_too_little_to_compare_is_refused(
    topic_model, tmp_path, real, synthetic, flags, message
):  # fmt: skip
    texts = made_texts(real, NEAR, 1), made_texts(synthetic, NEAR, 2) + ["", "?!"]
    with pytest.raises(UsageError, match=message):
        run(tmp_path, *texts, *flags)
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_on_a_text_is_named(tmp_path, monkeypatch):
    class Broken(TopicModel):
        def encode(self, texts, *_, **__):
            vectors = super().encode(texts)
            vectors[[text == "t1 broken" for text in texts]] = np.nan
            return vectors

    monkeypatch.setattr(embed, "load_model", lambda name: Broken())
    texts = made_texts(40, NEAR, 1)
    with pytest.raises(UsageError, match="--synthetic's texts with a word, row 7 .* NaN"):
        run(tmp_path, texts, [*texts[:7], "t1 broken", *texts])


def test_sets_of_unlike_sizes_are_compared_at_the_smallest_and_it_is_said(
    topic_model, tmp_path, capsys
):
    real, synthetic = made_texts(500, NEAR, 1), made_texts(40, NEAR, 2)
    run(tmp_path, real, [*synthetic, "..."], "--num_seeds=2")
    said = capsys.readouterr().err
    assert "1 texts without a word left out" in said
    assert "40 texts of each set are compared, not --num_rows 1,000: real 500, synthetic 40" in said


def test_texts_that_are_all_alike_are_no_defect(topic_model, tmp_path):
    folder = run(tmp_path, ["t1 one"] * 40, ["t1 one"] * 40, "--num_seeds=2")
    _, scores = read(folder / "private" / "distribution.json")
    for name in ("MAUVE", "precision", "recall", "coverage"):
        assert scores[name, "synthetic"]["value"] == pytest.approx(1), name


def test_the_command_runs_with_an_encoder_on_odd_texts(tmp_path):
    encoder = save_tiny_encoder(tmp_path / "encoder")
    (tmp_path / "real.txt").write_text("\n".join(made_texts(40, NEAR, 1)), encoding="utf-8")
    odd = ["Größe \u2028 in Zeilen", "日本語のテキスト", "e\u0301 🙂 x", "a" * 500] * 5
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    done = run_process(
        "-m", "evaluation.distribution", f"--model={encoder}", "--num_seeds=2",
        f"--real={tmp_path / 'real.txt'}", f"--synthetic={tmp_path / 'odd.json'}",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "exact duplicates, share" in done.stdout
    _, scores = read(tmp_path / "out" / "distribution.json")
    assert scores["exact duplicates, share", "synthetic"]["value"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("name", "ends"), [("MAUVE", (0.9, 1.0)), ("distinct-2", (0.9, 1.0)), ("density", (0.9, 1.06))]
)
def test_the_interval_of_a_share_ends_at_one(name, ends):
    values = [0.98 - 0.08, 0.98, 0.98 + 0.08] if name == "density" else [0.9, 1.0, 1.0, 1.0]
    (score,) = distribution.scores_of(name, {"synthetic": values}, {"synthetic": 9}, set())
    assert (score.low, score.high) == (pytest.approx(ends[0], abs=0.03), pytest.approx(ends[1]))


def test_the_interval_of_a_share_does_not_begin_below_zero():
    values = {"synthetic": [0.0, 0.0, 0.0, 0.1]}
    (score,) = distribution.scores_of("recall", values, {"synthetic": 9}, set())
    assert score.low == 0 < score.value < score.high
