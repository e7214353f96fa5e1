"""The audit of a synthetic set: what repeats canaries is found, and what does not is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from evaluation.measures.ngrams import NGrams
from privacy_checks import audit_texts
from privacy_checks.audit_run import AuditedRun, read_run
from tests.training import NUM_EXAMPLES, flags, in_process, save_dataset
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError
from utils.files import write_json
from utils.models.loading import load_tokenizer
from utils.texts.audit_canaries import COINS_FILE, NATURAL, TOKENS, AuditCanaries

COUNT = 128


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    """A run of one step of all rows and natural canaries, and its rows."""
    folder = tmp_path_factory.mktemp("run")
    dataset = save_dataset(folder)
    argv = flags(
        tiny_model_dir, dataset, folder, "--no_eval_at_start", f"--audit_canaries={COUNT}",
        f"--audit_canary_kind={NATURAL}", "--max_seq_len=100", "--num_epochs=0.1",
        "--noise_multiplier=4", "--eps=1", f"--total_bs={NUM_EXAMPLES + COUNT}",
    )  # fmt: skip
    assert in_process(train.main, argv) == 0
    return folder / "job", dataset


def canaries_of(run) -> tuple[list[str], np.ndarray]:
    """The texts of all canaries, and which are in."""
    canaries = AuditCanaries(COUNT, NATURAL, 0)
    inside = canaries.inside(json.loads((run / "private" / COINS_FILE).read_text()))
    return [f"{canaries.opening(i)} {canaries.ending(i)}" for i in range(COUNT)], inside


def audited(run, texts, output, *more) -> int:
    file = output.with_suffix(".json")
    write_json(file, [{"instruction": text} for text in texts])
    argv = [f"--synthetic={file}", f"--run={run}", f"--output={output}", *more]
    return in_process(audit_texts.main, argv)


def test_a_set_that_repeats_canaries_is_flagged_and_one_that_does_not_is_not(run, tmp_path, capsys):
    texts, inside = canaries_of(run[0])
    echo = [text for text, is_in in zip(texts, inside) if is_in] * 2
    plain = [f"Write a short story about number {n}" for n in range(50)]
    assert audited(run[0], echo + plain, tmp_path / "echo") == EXIT_FAILED
    found = json.loads((tmp_path / "echo" / "audit_texts.json").read_text())
    assert found["ranked_right"] > 0.99
    assert found["best"] > found["claimed_epsilon"] > found["control_best"]
    assert "control, with coins tossed anew" in capsys.readouterr().out
    assert (tmp_path / "echo" / "audit_texts.png").is_file()

    assert audited(run[0], plain, tmp_path / "plain") == EXIT_OK
    nothing = json.loads((tmp_path / "plain" / "audit_texts.json").read_text())
    assert nothing["best"] < 0.5
    at_most = [[e["without_noise"] for e in each["bounds"]] for each in (found, nothing)]
    assert at_most[0] == at_most[1]
    assert max(at_most[0]) > 2
    assert not any(path.name == "private" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", [NATURAL, TOKENS])
def test_endings_alone_are_scored(kind, tiny_model_dir):
    """A set that knows every opening, of those that are out too, tells nobody in."""
    tokenizer, inside = load_tokenizer(tiny_model_dir), np.arange(COUNT) % 2 == 0
    canaries = AuditCanaries(COUNT, kind, 0)
    run = AuditedRun(Path("run"), "base", {}, canaries, inside, 1.0, 1e-5, 1.0)
    if kind == NATURAL:
        texts = [canaries.opening(n) for n in range(COUNT) if not inside[n]] * 9
        texts += [canaries.ending(n) for n in range(COUNT) if inside[n]]
        rows = audit_texts.rows_of(audit_texts.tokens_of(texts, tokenizer))
    else:
        every = audit_texts.rows_of(canaries.examples(tokenizer, "vicuna", 100))
        rows = [row for row, is_in in zip(every, inside) if is_in]
    model = NGrams(rows, len(tokenizer))
    assert audit_texts.audited_texts(run, model, tokenizer)["ranked_right"] > 0.99


def flagged_sets(tokenizer, count, share, sets=10) -> int:
    """How many sets are flagged, at a claim of 1, that repeat so large a share of those in."""
    flagged = 0
    for seed in range(sets):
        random = np.random.default_rng(seed)
        canaries = AuditCanaries(count, NATURAL, seed)
        inside = random.random(count) < 0.5
        run = AuditedRun(Path("run"), "base", {}, canaries, inside, 1.0, 1e-5, 1.0)
        repeated = inside & (random.random(count) < share)
        texts = [f"{canaries.opening(n)} {canaries.ending(n)}" for n in np.flatnonzero(repeated)]
        # As fluent, and of nobody.
        others = AuditCanaries(count, NATURAL, seed + sets)
        texts += [f"{others.opening(n)} {others.ending(n)}" for n in range(count)]
        model = NGrams(audit_texts.rows_of(audit_texts.tokens_of(texts, tokenizer)), len(tokenizer))
        flagged += audit_texts.audited_texts(run, model, tokenizer)["refuted"]
    return flagged


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sets_that_repeat_some_of_the_canaries_once_are_flagged(tiny_model_dir):
    """At least 9 of 10 where it is a fifth of those in, and none where it is none."""
    tokenizer = load_tokenizer(tiny_model_dir)
    assert flagged_sets(tokenizer, 512, 0.2) >= 9
    assert flagged_sets(tokenizer, 512, 0.0) == 0


def test_private_rows_in_the_texts_are_found_without_canaries(run, tmp_path):
    dataset = run[1]
    held_out = tmp_path / "held_out.json"
    write_json(held_out, [{"instruction": f"fade {n} bead {n * n}"} for n in range(40)])
    texts = [row["instruction"] for row in train.load_splits(dataset)["train"]]
    more = [f"--private={dataset}", f"--held_out={held_out}"]
    assert audited(run[0], texts, tmp_path / "copied", *more) == EXIT_OK
    file = tmp_path / "copied" / "private" / "audit_texts.json"
    scores = json.loads(file.read_text())["scores"]
    assert scores[0]["control"] == 0.5
    assert scores[1]["control"] < 0.03
    assert all(score["value"] > 0.9 for score in scores)


def test_coins_that_the_run_was_not_trained_with_are_refused(run, tmp_path):
    """Were they taken, another run's canaries would clear this one."""
    folder = shutil.copytree(run[0], tmp_path / "job")
    file = folder / "private" / COINS_FILE
    inside = json.loads(file.read_text())["inside"]
    write_json(file, {"inside": inside[::-1]})  # the same ones
    read_run(folder, None)
    write_json(file, {"inside": inside[1:]})
    with pytest.raises(UsageError, match="holds other coins than the run was trained with"):
        read_run(folder, None)


def test_of_rows_that_were_equally_far_from_the_texts_neither_is_found():
    random = np.random.default_rng(0)
    result = audit_texts.membership(*random.normal(size=(2, 2000)))
    assert result.private
    first, second = result.scores
    assert first.low < 0.5 < first.high
    assert second.value < 0.03
    assert audit_texts.ranked_right(np.array([1.0]), np.array([1.0, 0.0, 2.0])) == 0.5
    assert audit_texts.ranked_right(np.array([1.0]), np.array([])) == 0.5


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--private=rows"], "--private and --held_out go together"),
        ([], "name --private and --held_out"),
    ],
)
def test_what_has_nothing_to_look_for_is_refused(tmp_path, more, named):
    write_json(tmp_path / "job" / "run_config.json", {"arguments": {"eps": 1}})
    with pytest.raises(UsageError, match=named):
        audited(tmp_path / "job", ["a"], tmp_path / "out", *more)
