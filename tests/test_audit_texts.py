"""The audit of a synthetic set: what repeats canaries is found, and what does not is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import inference
import train
from evaluation.measures.ngrams import NGrams
from privacy_checks import audit_texts
from privacy_checks.audit_run import AuditedRun, read_run
from tests.fluent_model import canary_texts, save_fluent_model
from tests.paths import ROOT
from tests.test_audit_run import NoNoise
from tests.training import NUM_EXAMPLES, flags, in_process, save_dataset
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError
from utils.files import write_json
from utils.models.loading import load_tokenizer
from utils.privacy.mechanism import Private
from utils.texts.audit_canaries import COINS_FILE, NATURAL, TOKENS, AuditCanaries
from utils.texts.text_inputs import read_instructions

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
    coins = json.loads((run / "private" / COINS_FILE).read_text())
    return canary_texts(COUNT, 0), AuditCanaries(COUNT, NATURAL, 0).inside(coins)


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
    assert found["ranked_right"][audit_texts.OF_RUNS] > 0.99
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


def test_an_adapter_that_was_tuned_on_the_texts_tells_too(run, tmp_path, tiny_model_dir, capsys):
    texts, inside = canaries_of(run[0])
    echo = [text for text, is_in in zip(texts, inside) if is_in]
    file = tmp_path / "echo.json"
    write_json(file, [{"instruction": text} for text in echo])
    argv = flags(
        tiny_model_dir, str(file), tmp_path, "--max_seq_len=100", "--target_modules=all-linear",
        "--lora_r=32", "--num_epochs=80", "--lr=0.003", "--total_bs=16", "--perdevice_bs=16",
        "--save_steps=1000",
        dp=False,
    )  # fmt: skip
    assert in_process(train.main, argv) == EXIT_OK
    tuned = f"--tuned={tmp_path / 'job' / 'adapter'}"
    assert audited(run[0], echo, tmp_path / "audit", tuned) == EXIT_FAILED
    found = json.loads((tmp_path / "audit" / "audit_texts.json").read_text())
    attacks = {audit_texts.OF_RUNS, audit_texts.OF_TUNING}
    assert {each["attack"] for each in found["bounds"]} == set(found["ranked_right"]) == attacks
    assert found["ranked_right"][audit_texts.OF_TUNING] > 0.7
    assert f"ranked right by {audit_texts.OF_TUNING}" in capsys.readouterr().out
    # It must have seen the texts, in their order, and no more.
    with pytest.raises(UsageError, match="was not tuned on these"):
        audited(run[0], echo[:-1], tmp_path / "fewer", tuned)
    with pytest.raises(UsageError, match="was trained with --eps 1.0, not -1"):
        audited(run[0], echo, tmp_path / "own", f"--tuned={run[0] / 'adapter'}")
    config = tmp_path / "job" / "run_config.json"
    kept = config.read_text()
    for name, value in {"prompt_style": "vicuna", "audit_canaries": 32}.items():
        known = json.loads(kept)
        known["arguments"][name] = value
        write_json(config, known)
        with pytest.raises(UsageError, match=f"was trained with --{name} {value}, not"):
            audited(run[0], echo, tmp_path / name, tuned)
    config.write_text(kept)
    # In its place the audited run's own, which tells more.
    shutil.rmtree(tmp_path / "job" / "adapter")
    shutil.copytree(run[0] / "adapter", tmp_path / "job" / "adapter")
    with pytest.raises(UsageError, match="is another adapter|says that there is no guarantee"):
        audited(run[0], echo, tmp_path / "swapped", tuned)


@pytest.mark.parametrize("kind", [NATURAL, TOKENS])
def test_endings_alone_are_scored(kind, tiny_model_dir):
    """A set that knows every opening, of those that are out too, tells nobody in."""
    tokenizer, inside = load_tokenizer(tiny_model_dir), np.arange(COUNT) % 2 == 0
    canaries = AuditCanaries(COUNT, kind, 0)
    if kind == NATURAL:
        texts = [canaries.opening(n) for n in range(COUNT) if not inside[n]] * 9
        texts += [canaries.ending(n) for n in range(COUNT) if inside[n]]
        rows = audit_texts.rows_of(audit_texts.tokens_of(texts, tokenizer))
    else:
        every = audit_texts.rows_of(canaries.examples(tokenizer, "vicuna", 100))
        rows = [row for row, is_in in zip(every, inside) if is_in]
    data = audit_texts.canaries_of(canaries, tokenizer)
    if kind == NATURAL:
        scored = data.ids[data.offsets[0] + data.loss_starts[0] : data.offsets[1] - 1]
        assert tokenizer.decode(scored).strip() == canaries.ending(0)
    scores = audit_texts.row_scores(NGrams(rows, len(tokenizer)), data)
    assert audit_texts.ranked_right(scores[inside], scores[~inside]) > 0.99


def flagged_sets(tokenizer, count, share, sets=10) -> int:
    """How many sets are flagged, at a claim of 1, that repeat so large a share of those in."""
    flagged = 0
    for seed in range(sets):
        random = np.random.default_rng(seed)
        canaries = AuditCanaries(count, NATURAL, seed)
        inside = random.random(count) < 0.5
        run = AuditedRun(Path("run"), "base", {}, canaries, inside, 1.0, 1e-5, 1.0)
        repeated = inside & (random.random(count) < share)
        texts = [text for text, is_there in zip(canary_texts(count, seed), repeated) if is_there]
        texts += canary_texts(count, seed + sets)  # as fluent, and of nobody
        model = NGrams(audit_texts.rows_of(audit_texts.tokens_of(texts, tokenizer)), len(tokenizer))
        scores = audit_texts.row_scores(model, audit_texts.canaries_of(canaries, tokenizer))
        flagged += audit_texts.audited_texts(run, {audit_texts.OF_RUNS: scores})["refuted"]
    return flagged


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sets_that_repeat_some_of_the_canaries_once_are_flagged(tiny_model_dir):
    """At least 9 of 10 where it is a fifth of those in, and none where it is none."""
    tokenizer = load_tokenizer(tiny_model_dir)
    assert flagged_sets(tokenizer, 512, 0.2) >= 9
    assert flagged_sets(tokenizer, 512, 0.0) == 0


@pytest.fixture(scope="module")
def fluent(tmp_path_factory):
    """A model that writes as canaries do, and 16 rows."""
    folder = tmp_path_factory.mktemp("fluent")
    save_fluent_model(folder / "model")
    return folder / "model", save_dataset(folder, rows=16)


def audited_run(fluent, folder, eps, mechanism, *more) -> int:
    """Train 12 steps on all of 1,024 canaries; sample 4,000 texts, tune on them, audit."""
    model, dataset = fluent
    adapter = (
        f"--model_name={model}", f"--output_dir={folder}", "--prompt_style=uncond_generation",
        "--max_seq_len=64", "--perdevice_bs=64", "--target_modules=all-linear", "--lora_r=64",
        "--lora_alpha=64", "--lora_dropout=0", "--no_eval_at_start",
    )  # fmt: skip
    argv = [
        f"--dataset_name={dataset}", "--job_sess=job", f"--eps={eps}", "--delta=1e-5",
        "--clip=0.01", "--total_bs=1040", "--num_epochs=12", "--lr=0.01", "--audit_canaries=1024",
        f"--audit_canary_kind={NATURAL}", "--max_eval_examples=1", *adapter, *more,
    ]  # fmt: skip
    assert in_process(lambda given: train.main(given, private=mechanism), argv) == EXIT_OK
    argv = [
        f"--instruction_file={ROOT / 'utils' / 'syn_instruct.txt'}", "--num_samples=4000",
        f"--model_name={model}", f"--adapter_path={folder / 'job' / 'adapter'}", "--job_sess=texts",
        f"--output_dir={folder}", "--prompt_style=uncond_generation", "--max_seq_len=64",
        "--perdevice_bs=256",
    ]  # fmt: skip
    assert in_process(inference.main, argv) == EXIT_OK
    texts = folder / "texts.json"
    sampled = read_instructions(str(folder / "texts"))
    write_json(texts, [{"instruction": text} for text in sampled])
    argv = [
        f"--dataset_name={texts}", "--job_sess=tuned", "--eps=-1", "--total_bs=64",
        "--num_epochs=2", "--lr=0.003", *adapter,
    ]  # fmt: skip
    assert in_process(train.main, argv) == EXIT_OK
    tuned = f"--tuned={folder / 'tuned' / 'adapter'}"
    return audited(folder / "job", sampled, folder / "audit", tuned)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_texts_of_runs_without_noise_are_flagged(fluent, tmp_path):
    """At least 9 of 10, by a model that is tuned on them."""
    flagged = 0
    for number in range(10):
        folder = tmp_path / str(number)
        flagged += audited_run(fluent, folder, 1, NoNoise, f"--seed={number}") == EXIT_FAILED
    assert flagged >= 9


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("eps", [1, 4, 8])
def test_texts_of_sound_runs_stay_below_their_claims(fluent, tmp_path, eps):
    for number in range(10):
        folder = tmp_path / str(number)
        assert audited_run(fluent, folder, eps, Private, f"--seed={number}") == EXIT_OK


def test_losses_of_a_tuned_model_that_are_not_finite_are_refused(monkeypatch, tiny_model_dir):
    losses = {tiny_model_dir: (np.zeros(2), None), "job/adapter": (np.array([1, np.nan]), None)}
    monkeypatch.setattr(audit_texts, "losses_of_models", lambda *_: losses)
    arguments = {"max_seq_len": 32, "dtype": "float32"}
    canaries, inside = AuditCanaries(2, NATURAL, 0), np.ones(2, dtype=bool)
    run = AuditedRun(Path("run"), tiny_model_dir, arguments, canaries, inside, 1.0, 1e-5, 1.0)
    data = audit_texts.canaries_of(canaries, load_tokenizer(tiny_model_dir))
    with pytest.raises(UsageError, match="--tuned job/adapter gives losses that are not finite"):
        audit_texts.lowered_losses(run, Path("job/adapter"), data, 1)


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


def test_files_are_read_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_texts, "load_tokenizer", lambda _: pytest.fail("loaded"))
    for more in (
        [f"--private={run[1]}", f"--held_out={tmp_path / 'none.json'}"],
        [f"--histogram={tmp_path / 'none.jsonl'}"],
        [f"--tuned={tmp_path / 'none' / 'adapter'}"],
    ):
        with pytest.raises(UsageError, match="none"):
            audited(run[0], ["text"], tmp_path / "output", *more)


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
