"""The training run, through its own command line."""

import errno
import functools
import json
import re
import shutil
import signal
import subprocess
import time
from itertools import islice
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import peft
import pytest
import torch
import wandb
from safetensors.torch import load_file

import train
from privacy_checks.composition import composed_report
from privacy_checks.randomness import repetition_p_value, scale_p_value, whitened
from privacy_checks.tiny_model import save_tiny_model
from tests.faults import Terminal, on_small_disk
from tests.helpers import slow
from tests.json_lines import jsonl
from tests.paths import ROOT
from tests.processes import Command, run_until_killed
from tests.training import (
    NUM_EXAMPLES,
    TOPICS,
    draw_before_adapter,
    flags,
    in_process,
    save_dataset,
)
from utils.cli import UsageError, run_cli
from utils.command_line.parser import read_flags
from utils.command_line.training_flags import TrainingSettings
from utils.files import sha256_of, write_json
from utils.models.adapter_info import adapter_sha256
from utils.models.lora import load_adapted, use_row_dropout
from utils.privacy import mechanism, plan
from utils.privacy.guarantee import rounded_up
from utils.privacy.ledger import LEDGER_FILE, adapter_in, read_ledger, read_plan, steps_in
from utils.row_dropout import RowMasks
from utils.runs.run_folder import LAST_ADAPTER, RELEASABLE, model_name_of
from utils.texts import tokens
from utils.texts.canaries import canary, secrets
from utils.texts.data_sets import rows_fingerprint
from utils.texts.prompts import TOPIC, UNCONDITIONAL

FIXED = "--insecure_fixed_noise_seed=1"


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp("data"))


class Crash(Exception):
    """Stands for the end of the process."""


def train_here(arguments: list[str], crash_in_step: int | None = None) -> None:
    """Train in this process; a crash comes between backward and optimizer step."""
    if crash_in_step:
        calls = [train.assign_gradient] * (crash_in_step - 1) + [Crash]
        with mock.patch("train.assign_gradient", side_effect=stepwise(calls)):
            pytest.raises(Crash, in_process, train.main, arguments)
    else:
        assert in_process(train.main, arguments) == 0


@pytest.fixture
def run(tiny_model_dir, letters, tmp_path):
    """Train in this process; returns the run's folder."""

    def call(
        *more, dp=True, output="outputs", dataset=letters, model=tiny_model_dir, crash_in_step=None
    ):
        arguments = flags(model, dataset, tmp_path / output, *more, dp=dp)
        train_here(arguments, crash_in_step)
        return tmp_path / output / "job"

    return call


@pytest.fixture(scope="module")
def trained(tiny_model_dir, letters, tmp_path_factory):
    """Train once for all tests; returns the folder with the run's."""

    @functools.cache
    def call(*more, crash_in_step=None):
        output = tmp_path_factory.mktemp("trained")
        train_here(flags(tiny_model_dir, letters, output, *more), crash_in_step)
        return output

    return call


@pytest.fixture
def copied(trained, tmp_path):
    """What `run` leaves, as a copy of a run that was trained once for all tests."""

    def call(*more, output="outputs", crash_in_step=None):
        shutil.copytree(trained(*more, crash_in_step=crash_in_step), tmp_path / output)
        return tmp_path / output / "job"

    return call


def stepwise(calls):
    """A function that does as the next of `calls` each time; an exception among them is raised."""
    remaining = iter(calls)

    def step(*args):
        call = next(remaining)
        if call is Crash:
            raise Crash
        return call(*args)

    return step


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def largest_difference(left: Path, right: Path) -> float:
    left, right = adapter(left), adapter(right)
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def report(folder: Path) -> dict:
    return json.loads((folder / "privacy_report.json").read_text())


def ledger_steps(folder: Path) -> list[int]:
    return steps_in(read_ledger(folder / LEDGER_FILE))


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "private" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- what a run leaves

ALLOWED = [
    r"adapter(_last)?/(adapter_model\.safetensors|adapter_config\.json|training_style\.json|README\.md)",
    r"checkpoints/step-\d{6}/(adapter\.safetensors|optimizer\.pt|state\.json|sha256\.json)",
    r"privacy_report\.(json|md)",
    r"privacy_ledger\.jsonl",
    r"run_config\.json",
    r"private/(README\.md|identity\.json|metrics\.jsonl|numerics\.json|row_counts\.json)",
]
METRICS = {
    "step", "train_loss", "validation_loss", "learning_rate", "batch_size", "real_tokens",
    "seconds", "norm_quantiles_10_50_90", "clipped_fraction", "non_finite",
}  # fmt: skip


@pytest.mark.parametrize("averaged", [False, True])
def test_a_private_run_leaves_these_files_and_no_others(run, monkeypatch, averaged):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = run(*(["--average=ema:0.5"] if averaged else []))
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files]
    released = RELEASABLE - (set() if averaged else {LAST_ADAPTER})
    assert {path.name for path in folder.iterdir()} == released | {"checkpoints", "private"}
    unexpected = [n for n in names if not any(re.fullmatch(pattern, n) for pattern in ALLOWED)]
    assert unexpected == []
    assert all(any(re.fullmatch(p, name) for name in names) for p in ALLOWED), names
    assert not any(b"hf_secret" in path.read_bytes() for path in files)
    # Nothing under private/ is per example, and nothing computed without noise is elsewhere.
    for record in metrics(folder):
        assert record.keys() - {"validation_loss_of_average"} <= METRICS
        assert all(not isinstance(v, list) or len(v) == 3 for v in record.values())
    public = "".join(
        path.read_text(errors="replace") for path in files if "private" not in path.parts
    )
    assert 'loss"' not in public
    identity = json.loads((folder / "private" / "identity.json").read_text())
    assert identity["training_data"] not in public
    assert identity["rows_fingerprint"] not in public


@pytest.mark.parametrize(
    "more",
    [[], ["--average=ema:0.5"], ["--frozen_a"], ["--optimizer=sgd"],
     slow(["--frozen_a", "--average=ema:0.5", "--keep_checkpoints=1"])],
)  # fmt: skip
def test_the_room_that_is_asked_for_is_what_a_run_takes(run, monkeypatch, more):
    asked = mock.Mock()
    monkeypatch.setattr(train, "require_room", asked)
    folder = run("--lora_r=128", *more, dp=False)
    (_, size), _ = asked.call_args
    checkpoints, adapters = (
        [sum(file.stat().st_size for file in path.rglob("*")) for path in folder.glob(pattern)]
        for pattern in ("checkpoints/*", "adapter*")
    )
    taken = sum(adapters) + sum(checkpoints) + max(checkpoints)
    assert size == pytest.approx(taken, rel=0.1)


def test_what_is_released_says_nothing_of_the_machine(
    run, tiny_model_dir, letters, tmp_path, monkeypatch
):
    """A real process with absolute paths, one of them below the working folder."""
    inside = tmp_path / "models" / "inside"
    shutil.copytree(tiny_model_dir, inside)
    for output, model, named in (
        ("outputs", tiny_model_dir, "tiny-llama"), ("other", "~/models/inside", "models/inside"),
    ):  # fmt: skip
        arguments = flags(model, letters, tmp_path / output, "--save_steps=2")
        process = Command("train", arguments, folder=tmp_path, HOME=str(tmp_path), USER="alice")
        assert process.wait() == 0, process.stderr
        folder = tmp_path / output / "job"
        released = [f for name in [*RELEASABLE, "checkpoints"] for f in (folder / name).rglob("*")]
        released = [f for f in [*released, *folder.iterdir()] if f.is_file()]
        assert len(released) > 10
        tell_tales = [str(tmp_path), str(Path(tiny_model_dir).parent), str(ROOT), "alice"]
        found = {(f, t) for f in released for t in tell_tales if t.encode() in f.read_bytes()}
        assert found == set()
        config = json.loads((folder / "run_config.json").read_text())
        assert config["arguments"]["model_name"] == named
        assert config["arguments"]["output_dir"] == output
        assert f"--output_dir={output}" in config["argv"]
        adapted = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert adapted["base_model_name_or_path"] == named
        assert f"--model_name {named} " in (folder / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("older", [True, False])
def test_a_run_goes_on_whether_its_folder_holds_whole_paths_or_not(
    stopped, tmp_path, tiny_model_dir, older
):
    config = tmp_path / "outputs" / "job" / "run_config.json"
    begun_with = json.loads(config.read_text())
    assert begun_with["arguments"]["model_name"] == "tiny-llama"
    if older:
        begun_with["arguments"]["model_name"] = tiny_model_dir
        config.write_text(json.dumps(begun_with))
        private = config.parent / "private" / "identity.json"
        known = json.loads(private.read_text())
        write_json(private, {"training_data": known["training_data"]})
    assert model_name_of(config.parent) == tiny_model_dir
    folder = stopped("--resume=auto")
    if older:
        fingerprint = json.loads(private.read_text())["rows_fingerprint"]
        assert fingerprint == known["rows_fingerprint"]
    merged = load_adapted(tiny_model_dir, folder / "adapter", torch.float32, merge=True)
    assert merged.config.model_type == "llama"


def test_private_is_for_its_owner_alone_from_its_first_moment(run, private_modes):
    folder = run()
    assert set(private_modes) == {"0o700"}
    (folder / "private").chmod(0o755)  # as earlier versions made it
    shutil.rmtree(folder / "adapter")
    run("--resume=auto")
    assert (folder / "private").stat().st_mode & 0o777 == 0o700


TOKENISING = ("utils.texts.tokens.training_ids", "utils.texts.tokens.open_tokens")


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
@pytest.mark.parametrize("target", [*TOKENISING, "train.load_base_model"])
def test_a_signal_before_the_first_step_leaves_nothing(
    tiny_model_dir, letters, tmp_path, target, number
):
    arguments = flags(tiny_model_dir, letters, tmp_path / "outputs")
    died = run_until_killed(arguments, target, 1, number)
    assert died.returncode == 130
    assert died.stderr.endswith("interrupted\n")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("target", TOKENISING)
def test_what_kill_9_leaves_of_tokens_goes_with_the_next_start(
    run, tiny_model_dir, letters, tmp_path, target
):
    run_until_killed(flags(tiny_model_dir, letters, tmp_path / "outputs"), target, 1)
    private = tmp_path / "outputs" / "job" / "private"
    assert list(private.iterdir()) == [private / "tokens-0"]
    # As another machine of a job leaves them.
    (private / "tokens-0").rename(private / "tokens-8")
    run()
    assert not list(private.glob("tokens-*"))


def test_the_report_holds_the_guarantee_and_agrees_with_the_ledger(copied):
    folder = copied()
    values = report(folder)
    assert values["guarantee"] is True
    assert values["steps_planned"] == values["steps_taken"] == 8
    assert values["steps_lost"] == 0
    assert ledger_steps(folder) == list(range(1, 9))
    assert (values["num_examples"], values["expected_batch_size"]) == (NUM_EXAMPLES, 8)
    assert values["sampling_rate"] == 8 / NUM_EXAMPLES
    epsilon = values["epsilon"]
    assert epsilon["lower"] <= epsilon["estimate"] <= epsilon["upper"] <= epsilon["target"] == 8
    assert epsilon["pld"] == pytest.approx(epsilon["estimate"], abs=0.02)
    page = (folder / "privacy_report.md").read_text()
    assert f"({rounded_up(epsilon['upper'])}, 0.001)-differentially private" in page
    assert rounded_up(epsilon["upper"]) in (folder / "adapter" / "README.md").read_text()
    first, last = (
        [m["validation_loss"] for m in metrics(folder) if "validation_loss" in m][i]
        for i in (0, -1)
    )
    assert first > 5.0
    assert last != first


def test_two_runs_of_one_seed_differ_in_noise_and_in_who_is_sampled(run):
    left, right = run(output="left"), run(output="right")
    assert largest_difference(left, right) > 1e-3
    sizes = [[m["batch_size"] for m in metrics(f) if "batch_size" in m] for f in (left, right)]
    assert sizes[0] != sizes[1]


def test_a_fixed_noise_seed_repeats_a_run_and_forfeits_the_guarantee(run, copied, capsys):
    left, right = copied(FIXED, output="left"), run(FIXED, output="right")
    assert largest_difference(left, right) == 0
    assert "NO guarantee" in capsys.readouterr().err
    values = report(left)
    assert values["guarantee"] is False
    assert values["epsilon"]["upper"] is None
    assert values["covered"] == []
    assert "no privacy guarantee" in (left / "privacy_report.md").read_text().lower()


def test_dropout_is_off_in_a_private_run_unless_it_is_asked_for(run):
    def recorded(folder):
        adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        arguments = json.loads((folder / "run_config.json").read_text())["arguments"]
        assert adapter["lora_dropout"] == arguments["lora_dropout"]
        return adapter["lora_dropout"]

    # The flags of these tests name it; the default is what a user gets.
    given = [word for word in flags("", "", Path()) if "--lora_dropout" in word]
    assert given == ["--lora_dropout=0"]
    for eps, dropout in (("8", 0.0), ("-1", 0.05)):
        argv = ["--dataset_name=x", "--model_name=x", "--job_sess=x", f"--eps={eps}",
                "--prompt_style=uncond_generation"]  # fmt: skip
        assert read_flags(TrainingSettings, "", argv).dropout == dropout
    assert recorded(run(output="a")) == 0
    assert recorded(run("--lora_dropout=0.25", output="b")) == 0.25


def test_dropout_repeats_without_privacy_and_with_a_known_seed_and_is_fresh_otherwise(run):
    dropout = "--lora_dropout=0.5"
    assert largest_difference(run(FIXED, dropout, output="a"), run(FIXED, dropout, output="b")) == 0
    left, right = (run(dropout, dp=False, output=name) for name in "cd")
    assert largest_difference(left, right) == 0

    # The fixed seed decides the noise, but here not the masks.
    def fresh_masks(model, _settings):
        use_row_dropout(model, masks := RowMasks())
        return masks

    with mock.patch.object(train, "row_masks", fresh_masks):
        other = run(FIXED, dropout, output="e")
    assert largest_difference(run(FIXED, dropout, output="f"), other) > 1e-4


# ---------------------------------------------------------------- trackers


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("more", "shown"), [([], False), (["--report_private_metrics"], True)])
def test_wandb_gets_no_loss_of_a_private_run_unless_it_is_asked_for(
    run, monkeypatch, tmp_path, private_modes, more, shown
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    try:
        folder = run("--report_to=wandb", *more)
    finally:
        wandb.teardown()
    assert set(private_modes) == {"0o700"}
    kept = everything_in(folder / "private" / "wandb")
    assert b"job" in kept  # the run is there
    assert (b"train_loss" in kept) is shown
    assert (b"validation" in kept) is shown
    losses = [m["validation_loss"] for m in metrics(folder) if "validation_loss" in m]
    assert not any(f"{loss:.4f}".encode() in kept for loss in losses) or shown


# ---------------------------------------------------------------- what must not matter


@pytest.mark.parametrize(
    "more",
    [["--perdevice_bs=16"], ["--perdevice_bs=1"], ["--gradient_checkpointing"]],
)
def test_performance_settings_leave_the_released_adapter_alone(run, copied, more):
    left = copied(FIXED, output="left")
    assert largest_difference(left, run(FIXED, *more, output="right")) < 1e-4


# ---------------------------------------------------------------- hostile batches and examples


def test_empty_batches_are_noised_recorded_steps(run, monkeypatch):
    monkeypatch.setattr(mechanism, "poisson_batch", lambda *_: np.array([], dtype=np.int64))
    folder = run()
    assert ledger_steps(folder) == list(range(1, 9))
    assert all(m.get("batch_size", 0) == 0 for m in metrics(folder))
    # B starts at zero, so it holds nothing but what noise moved.
    tensors = [tensor for name, tensor in adapter(folder).items() if "lora_B" in name]
    assert all((tensor != 0).all() for tensor in tensors)


def test_an_example_with_a_nan_loss_contributes_nothing(run, monkeypatch):
    original = train.normalise

    def poisoned(sums, counts, *rest):
        losses = original(sums, counts, *rest)
        return torch.where(torch.arange(len(losses)) == 0, losses * float("nan"), losses)

    monkeypatch.setattr(train, "normalise", poisoned)
    folder = run()
    assert all(tensor.isfinite().all() for tensor in adapter(folder).values())
    assert sum(m.get("non_finite", 0) for m in metrics(folder)) >= 8
    assert report(folder)["guarantee"] is True


def test_a_tensor_that_does_not_move_stops_the_run(run, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(RuntimeError, match="lora_A.* did not move"):
        run()


# ---------------------------------------------------------------- topics


def test_a_run_on_topics_learns_the_instructions_alone_and_reads_the_same_rows(
    run, monkeypatch, tmp_path, tiny_model_dir, letters
):
    made, tokenise = [], train.tokenise_once
    monkeypatch.setattr(
        train, "tokenise_once", lambda *given: made.append(tokenise(*given)) or made[-1]
    )
    dataset, tokenizer = save_dataset(tmp_path, topics=True), train.load_tokenizer(tiny_model_dir)
    short = ("--max_seq_len=96", "--num_epochs=0.25", "--no_eval_at_start")
    on_topics = (*short, f"--prompt_style={TOPIC}", "--num_canaries=2", "--noise_multiplier=2")
    folder, plain = run(*on_topics, dataset=dataset), run(*short, dp=False, output="plain")
    topical, unconditioned = (each["train"] for each in made)
    for row in range(NUM_EXAMPLES):
        ids, start = topical.ids[slice(*topical.offsets[row : row + 2])], topical.loss_starts[row]
        assert TOPICS[row % 3] in tokenizer.decode(ids[:start])
        # With loss are the very tokens that have it without a topic.
        alone = unconditioned.ids[slice(*unconditioned.offsets[row : row + 2])]
        np.testing.assert_array_equal(ids[start:], alone[1:])
    assert len(topical) == NUM_EXAMPLES + 2
    info = json.loads((folder / "adapter" / "training_style.json").read_text())
    assert info["prompt_style"] == TOPIC
    # Runs and histograms of the rows with topics and without are of the same rows.
    rows = rows_fingerprint(train.load_splits(letters)["train"]["instruction"])
    identities = [
        json.loads((each / "private/identity.json").read_text()) for each in (folder, plain)
    ]
    assert [each["rows_fingerprint"] for each in identities] == [rows, rows]
    # Another topic of one row is other training data.
    (folder / "adapter").rename(folder / "elsewhere")
    columns = datasets.load_from_disk(dataset)["train"].to_dict()
    columns["topic"][0] = TOPICS[1]
    shutil.rmtree(dataset)
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)).save_to_disk(dataset)
    with pytest.raises(UsageError, match="holds a run with another training data"):
        run(*on_topics, "--resume=auto", dataset=dataset)


def test_topics_need_a_data_set_that_has_them(run):
    with pytest.raises(
        UsageError, match="lacks column 'topic'.* python -m topics.assign --private"
    ):
        run(f"--prompt_style={TOPIC}")


# ---------------------------------------------------------------- canaries

CANARIES = ("--num_canaries=5", "--canary_repeats=2", "--max_seq_len=64")
WITH_CANARIES = NUM_EXAMPLES + 10


def test_canaries_count_in_n_like_any_other_row(run, monkeypatch, letters, tiny_model_dir):
    """In the plan, the ledger and the report; and as many rows are there to be sampled."""
    drawn, tokenised = [], []
    sample, open_tokens = mechanism.poisson_batch, tokens.open_tokens
    monkeypatch.setattr(
        mechanism, "poisson_batch", lambda count, *rest: drawn.append(count) or sample(count, *rest)
    )
    monkeypatch.setattr(
        tokens, "open_tokens", lambda folder: tokenised.append(open_tokens(folder)) or tokenised[-1]
    )
    folder = run(*CANARIES, f"--num_train_examples={NUM_EXAMPLES}")
    assert set(drawn) == {len(tokenised[0])} == {WITH_CANARIES}
    plan = read_plan(folder / LEDGER_FILE)
    assert (plan.num_examples, plan.steps) == (WITH_CANARIES, 9)  # floor(74 / 8)
    values = report(folder)
    assert values["num_examples"] == WITH_CANARIES
    assert values["canaries"] == 10
    assert "10 of N are canaries" in (folder / "privacy_report.md").read_text()
    assert values["sampling_rate"] == 8 / WITH_CANARIES
    identity = json.loads((folder / "private" / "identity.json").read_text())
    rows = train.load_splits(letters)["train"]["instruction"]
    assert identity["rows_fingerprint"] == rows_fingerprint(rows)  # of those without canaries
    named = json.loads((folder / "run_config.json").read_text())["arguments"]
    assert (named["num_canaries"], named["canary_repeats"]) == (5, 2)
    # Those at the end are the canaries, whole.
    ids = tokenised[0].ids[tokenised[0].offsets[-2] : tokenised[0].offsets[-1]]
    text = train.load_tokenizer(tiny_model_dir).decode(ids)
    assert canary(list(islice(secrets(named["seed"]), 5))[-1], UNCONDITIONAL)["instruction"] in text


def test_a_delta_is_held_against_n_with_the_canaries(run):
    with pytest.raises(UsageError, match=r"below 1/N = 1\.35e-02"):
        run(*CANARIES, "--delta=0.0145")  # between 1/74 and 1/64


def test_pairs_take_canaries_too_and_without_privacy_they_are_learnt(run, tmp_path):
    more = ["--prompt_style=vicuna", "--max_seq_len=300", "--num_canaries=2"]
    folder = run(*more, dp=False, dataset=save_dataset(tmp_path, labelled=True))
    seen = sum(m["batch_size"] for m in metrics(folder) if "batch_size" in m)
    assert seen == 64  # floor(66 / 8) steps of 8 rows


def test_a_run_with_canaries_goes_on_and_refuses_other_ones_by_name(run):
    run(*CANARIES, crash_in_step=5)
    for flag, named in [("--num_canaries=4", "num_canaries 5"), ("--seed=1", "seed 0"),
                        ("--canary_repeats=1", "canary_repeats 2")]:  # fmt: skip
        with pytest.raises(UsageError, match=named):
            run(*CANARIES, "--resume=auto", flag)
    assert report(run(*CANARIES, "--resume=auto"))["steps_taken"] == 9


@pytest.mark.parametrize("dp", [True, False])
def test_a_run_of_before_there_was_a_flag_goes_on_with_its_default_alone(run, dp):
    config = run("--max_seq_len=64", dp=dp, crash_in_step=5) / "run_config.json"
    begun_with = json.loads(config.read_text())
    for name in ("num_canaries", "canary_repeats", "optimizer"):
        del begun_with["arguments"][name]
    config.write_text(json.dumps(begun_with))
    for flag, message in (
        ("--num_canaries=5", "--num_canaries 0, not 5"),
        ("--optimizer=sgd", "--optimizer adamw, not sgd"),
    ):
        with pytest.raises(UsageError, match=message):
            run("--max_seq_len=64", flag, "--resume=auto", dp=dp)
    assert report(run("--max_seq_len=64", "--resume=auto", dp=dp))["guarantee"] is dp


# ---------------------------------------------------------------- crash, stop, resume


def test_a_run_goes_on_with_its_own_noise_where_another_would_be_calibrated(
    run, copied, monkeypatch
):
    folder = copied(crash_in_step=5)
    begun = read_plan(folder / LEDGER_FILE)
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", lambda *_: 2 * begun.noise_multiplier)
    assert report(run("--resume=auto"))["noise_multiplier"] == begun.noise_multiplier
    assert report(run(output="another"))["noise_multiplier"] == 2 * begun.noise_multiplier


def test_a_resumed_run_equals_an_uninterrupted_one_and_counts_what_was_lost(run):
    whole = run(FIXED, "--lora_dropout=0.1", output="whole")
    run(FIXED, "--lora_dropout=0.1", output="broken", crash_in_step=5)
    folder = run(FIXED, "--lora_dropout=0.1", "--resume=auto", output="broken")
    assert largest_difference(whole, folder) == 0
    assert ledger_steps(folder) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    values = report(folder)
    assert (values["steps_taken"], values["steps_lost"]) == (8, 2)


@pytest.mark.parametrize("dp", [slow(True), False])
def test_an_average_is_the_adapter_and_the_same_after_a_crash(run, dp):
    rule, plain = [FIXED] if dp else [], run(*([FIXED] if dp else []), dp=dp, output="plain")
    whole = run(*rule, "--average=tail:0.75", dp=dp, output="whole")
    run(*rule, "--average=tail:0.75", dp=dp, output="broken", crash_in_step=5)
    folder = run(*rule, "--average=tail:0.75", "--resume=auto", dp=dp, output="broken")
    assert largest_difference(whole, folder) == 0
    # The run itself is the one without an average, which is kept apart.
    assert largest_difference(whole, plain) > 0
    last = load_file(folder / "adapter_last" / "adapter_model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in adapter(plain).items())
    styles = [
        json.loads((folder / name / "training_style.json").read_text()).get("average")
        for name in ("adapter", "adapter_last")
    ]
    assert styles == ["tail:0.75", None]
    assert report(folder)["adapter_sha256"] == adapter_sha256(folder / "adapter")
    assert "validation_loss_of_average" in metrics(folder)[-1]
    assert run(*rule, "--average=tail:0.75", "--resume=auto", dp=dp, output="broken") == folder


@pytest.mark.parametrize(
    "flags", [["--optimizer=adamw_corrected"], ["--optimizer=sgd", "--frozen_a"]]
)
def test_another_optimizer_learns_otherwise_and_goes_on_after_a_crash(run, flags):
    whole = run(FIXED, *flags, output="whole")
    run(FIXED, *flags, output="broken", crash_in_step=5)
    folder = run(FIXED, *flags, "--resume=auto", output="broken")
    assert largest_difference(whole, folder) == 0
    plain = run(FIXED, output="plain")
    assert largest_difference(whole, plain) > 0
    frozen = "--frozen_a" in flags
    drawn, moved = adapter(run(FIXED, "--frozen_a", "--lr=1e-30", output="drawn")), adapter(whole)
    unmoved = {name for name in moved if torch.equal(drawn[name], moved[name])}
    assert unmoved == ({name for name in moved if ".lora_A." in name} if frozen else set())


def test_a_run_that_trains_b_alone_goes_on_with_the_a_that_it_began_with(run, monkeypatch):
    whole = run(FIXED, "--frozen_a", output="whole")
    folder = run(FIXED, "--frozen_a", output="broken", crash_in_step=5)
    with monkeypatch.context() as elsewhere:
        draw_before_adapter(elsewhere)
        shutil.copytree(folder.parent, folder.parents[1] / "moved")
        moved = run(FIXED, "--frozen_a", "--resume=auto", output="moved")
    assert largest_difference(whole, moved) == 0
    (checkpoint,) = folder.glob("checkpoints/step-000003")
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    del states["frozen"]  # as earlier versions did not keep it
    torch.save(states, checkpoint / "optimizer.pt")
    sums = json.loads((checkpoint / "sha256.json").read_text())
    write_json(
        checkpoint / "sha256.json", sums | {"optimizer.pt": sha256_of(checkpoint / "optimizer.pt")}
    )
    with pytest.raises(UsageError, match=r"lora_A.*: its shape is none in the checkpoint"):
        run(FIXED, "--frozen_a", "--resume=auto", output="broken")


def test_the_corrected_optimizer_knows_the_noise_of_the_divided_sum(monkeypatch):
    made = mock.Mock()
    monkeypatch.setattr(train, "CorrectedAdamW", made)
    plan = mock.Mock(noise_multiplier=3.0, clip_norm=0.5, expected_batch_size=12)
    train.make_optimizer(mock.Mock(optimizer="adamw_corrected", lr=0.1, wd=0.2), ["tensor"], plan)
    made.assert_called_once_with(["tensor"], 0.1, 0.2, 3.0 * 0.5 / 12)


def test_both_epsilons_are_reported_after_a_crash(run):
    run(crash_in_step=6)
    values = report(run("--resume=auto"))
    assert values["steps_lost"] == 3
    without = values["epsilon_without_lost_steps"]
    assert without["upper"] < values["epsilon"]["upper"]


def test_a_resumed_run_draws_fresh_noise(run, monkeypatch):
    drawn = []
    original = mechanism.add_noise

    def recording(clipped_sum, *rest):
        noised = original(clipped_sum, *rest)
        drawn.append((noised - clipped_sum).numpy())
        return noised

    monkeypatch.setattr(mechanism, "add_noise", recording)
    run(crash_in_step=5)
    run("--resume=auto")
    assert len(drawn) == 10
    correlations = np.corrcoef(drawn) - np.eye(10)
    assert np.abs(correlations).max() < 6 / np.sqrt(len(drawn[0]))


def test_correlated_noise_begins_anew_after_a_crash_and_groups_go_on(run, monkeypatch):
    """Rate 1 in a group of eight: every row takes part in every eighth step, lost ones apart."""
    banded, noise, drawn = ["--noise=banded", "--bands=8", "--num_epochs=2"], [], []
    add_noise, draw = mechanism.add_noise, mechanism.Private.draw

    def noising(clipped_sum, *rest):
        noised = add_noise(clipped_sum, *rest)
        noise.append((noised - clipped_sum).numpy())
        return noised

    def drawing(self, step):
        drawn.append((step, draw(self, step)))
        return drawn[-1][1]

    monkeypatch.setattr(mechanism, "add_noise", noising)
    monkeypatch.setattr(mechanism.Private, "draw", drawing)
    run(*banded, crash_in_step=5)
    with pytest.raises(UsageError, match="a run with --bands 8, not 4"):
        run(*banded, "--bands=4", "--resume=auto")
    # Left to the toolkit, they are the run's own.
    folder = run(*banded, "--bands=auto", "--resume=auto")
    assert ledger_steps(folder) == [*range(1, 6), *range(4, 17)]

    plan = read_plan(folder / LEDGER_FILE)
    assert plan.bands == 8
    noise = np.array(noise) / (plan.noise_multiplier * plan.clip_norm)
    before, after = (whitened(part, plan.coefficients) for part in (noise[:5], noise[5:]))
    assert min(map(scale_p_value, (before, after))) > 1e-6
    assert repetition_p_value(np.concatenate([before, after])) > 1e-6
    assert scale_p_value(noise) < 1e-6
    groups = {step % 8: rows.tolist() for step, rows in drawn}
    assert sorted(sum(groups.values(), [])) == list(range(64))
    assert all(rows.tolist() == groups[step % 8] for step, rows in drawn)

    values = report(folder)
    assert (values["steps_lost"], values["participations"]) == (2, 3)
    assert values["epsilon_without_lost_steps"]["upper"] <= 8 < values["epsilon"]["upper"]
    composed = composed_report(folder)
    (entry,) = composed["mechanisms"]
    assert (entry["sampling_rate"], entry["times"], entry["steps"]) == (1.0, 3, 18)
    assert composed["epsilon"]["add_or_remove_one"]["upper"] == values["epsilon"]["upper"]


@pytest.mark.parametrize(
    ("target", "call", "resumed_from", "lost"),
    [
        ("train.assign_gradient", 5, 3, 2),  # between backward and optimizer step
        ("train.save_checkpoint", 2, 3, 3),  # between step and checkpoint
        ("torch.save", 2, 3, 3),  # in the middle of writing a checkpoint
        ("train.save_adapter", 1, 8, 0),  # between the last checkpoint and the adapter
    ],
)
def test_kill_9_loses_nothing_but_steps_since_the_checkpoint(
    run, tiny_model_dir, letters, tmp_path, capsys, target, call, resumed_from, lost
):
    died = run_until_killed(flags(tiny_model_dir, letters, tmp_path / "outputs"), target, call)
    assert died.returncode == -signal.SIGKILL, died.stderr
    folder = run("--resume=auto")
    assert f"after step {resumed_from}" in capsys.readouterr().err
    values = report(folder)
    assert (values["steps_taken"], values["steps_lost"]) == (8, lost)
    released = values["epsilon_without_lost_steps"] or values["epsilon"]
    assert released["upper"] <= 8
    assert not list(folder.rglob("*.partial*")), "a half-written checkpoint was left behind"
    trained = [record["step"] for record in metrics(folder) if "train_loss" in record]
    assert trained == list(range(1, 9))


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("train.write_report", 1),
        ("train.adapter_sha256", 1),  # the adapter is there, and on record nowhere
        ("train.write_report", 2),  # it is in the ledger, and not in the report
    ],
)
@pytest.mark.parametrize("dp", [True, slow(False)])
def test_a_kill_at_the_end_is_repaired_by_the_same_command(
    run, tiny_model_dir, letters, tmp_path, capsys, target, call, dp
):
    died = run_until_killed(
        flags(tiny_model_dir, letters, tmp_path / "outputs", dp=dp), target, call
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    folder = tmp_path / "outputs" / "job"
    if dp and (folder / "adapter").exists():
        with pytest.raises(UsageError, match="--resume auto finishes it"):
            composed_report(folder)
    weights = adapter(folder) if (folder / "adapter").exists() else None
    assert run("--resume=auto", dp=dp) == folder
    assert "finished already" not in capsys.readouterr().err
    assert weights is None or all(
        torch.equal(weights[name], tensor) for name, tensor in adapter(folder).items()
    )
    assert report(folder)["adapter_sha256"] == adapter_sha256(folder / "adapter")
    if dp:
        assert adapter_in(read_ledger(folder / LEDGER_FILE)) == adapter_sha256(folder / "adapter")
        assert ledger_steps(folder) == list(range(1, 9))
        assert composed_report(folder)["guarantee"] is True
    run("--resume=auto", dp=dp)
    assert "finished already" in capsys.readouterr().err


def test_the_hash_of_an_adapter_is_one_that_a_shell_gives_too(copied):
    folder = copied() / "adapter"
    files = "sha256sum adapter_config.json adapter_model.safetensors | sha256sum"
    shell = subprocess.run(files, shell=True, cwd=folder, capture_output=True, text=True)
    assert shell.stdout.split()[0] == adapter_sha256(folder)


def test_a_run_that_an_earlier_version_finished_is_finished(run, copied, capsys):
    """Its report and its ledger name no adapter."""
    folder = copied()
    older = report(folder)
    del older["adapter_sha256"]
    write_json(folder / "privacy_report.json", older)
    run("--resume=auto")
    assert "finished already" in capsys.readouterr().err


def test_a_finished_run_takes_no_further_step(run, copied):
    folder = copied()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    before = (folder / LEDGER_FILE).read_text()
    with pytest.raises(UsageError, match="ends with an adapter, so step 7 cannot follow"):
        run("--resume=auto")
    assert (folder / LEDGER_FILE).read_text() == before


def test_a_lost_adapter_that_cannot_be_made_again_leaves_the_report_as_it_was(
    run, copied, monkeypatch
):
    """As under another version of PEFT, which writes another configuration."""
    folder = copied()
    before = (folder / "privacy_report.json").read_text()
    shutil.move(folder / "adapter", folder / "moved")
    save_pretrained = peft.PeftModel.save_pretrained

    def by_another_version(model, place, **options):
        save_pretrained(model, place, **options)
        config = place / "adapter_config.json"
        config.write_text(config.read_text() + " ")

    with monkeypatch.context() as patched:
        patched.setattr(peft.PeftModel, "save_pretrained", by_another_version)
        with pytest.raises(UsageError, match="ends with the adapter .* restore the run's own"):
            run("--resume=auto")
    assert (folder / "privacy_report.json").read_text() == before
    assert not (folder / "adapter").exists()
    run("--resume=auto")
    assert adapter_sha256(folder / "adapter") == adapter_sha256(folder / "moved")
    assert (folder / "privacy_report.json").read_text() == before


@pytest.fixture
def long_run(tiny_model_dir, letters, tmp_path):
    """A process that trains for 4,000 steps, and its folder."""
    more = flags(tiny_model_dir, letters, tmp_path / "outputs", "--num_epochs=500")
    process = Command("train", more)
    yield process, tmp_path / "outputs" / "job"
    process.kill()
    process.wait()


def test_sigterm_saves_and_ends_with_130(long_run):
    process, folder = long_run
    wait_for(lambda: (folder / LEDGER_FILE).exists() and len(ledger_steps(folder)) >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130, process.stderr
    assert "stopped by SIGTERM" in process.stderr
    assert "--resume auto" in process.stderr
    values = report(folder)
    assert values["steps_lost"] == 0
    assert 4 <= values["steps_taken"] < 4000
    newest = max((folder / "checkpoints").iterdir())
    assert newest.name == f"step-{values['steps_taken']:06d}"


@pytest.mark.slow
def test_a_closed_terminal_saves_what_was_learnt(tiny_model_dir, letters, tmp_path):
    more = flags(tiny_model_dir, letters, tmp_path / "outputs", "--num_epochs=500")
    terminal = Terminal("train.py", *more)
    folder = tmp_path / "outputs" / "job"
    ledger = folder / LEDGER_FILE
    terminal.read_until(condition=lambda: ledger.exists() and len(ledger_steps(folder)) >= 4)
    assert terminal.close() == 130
    values = report(folder)
    assert (values["steps_lost"], 0 < values["steps_taken"] < 4000) == (0, True)
    newest = max((folder / "checkpoints").iterdir())
    assert newest.name == f"step-{values['steps_taken']:06d}"


FULL = """
import shutil, sys
import train
from utils.cli import run_cli
release, room = train.Private.release, int(sys.argv.pop(1))
def filling(self, total, step):
    released = release(self, total, step)
    if step == 3:  # the checkpoint of step 3 is there
        with open("ballast", "wb") as file:
            file.write(bytes(max(0, shutil.disk_usage(".").free - room * 1024)))
    return released
train.Private.release = filling
code = 1
try:
    run_cli(lambda: train.main(sys.argv[1:]))
except SystemExit as ended:
    code = ended.code
import json, os
from utils.privacy.ledger import read_ledger, steps_in
steps = steps_in(read_ledger("outputs/job/privacy_ledger.jsonl"))
checkpoints = os.listdir("outputs/job/checkpoints")
print(json.dumps({"code": code, "steps": steps, "checkpoints": checkpoints}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_fills_up_is_said_in_lines_and_keeps_what_it_holds(
    tiny_model_dir, letters, tmp_path, room
):
    arguments = flags(tiny_model_dir, letters, Path("outputs"))
    finished = on_small_disk(tmp_path, "4m", "-c", FULL, str(room), *arguments)
    assert "Traceback" not in finished.stderr
    found = json.loads(finished.stdout)
    assert "step-000003" in found["checkpoints"]
    assert not any("partial" in name for name in found["checkpoints"])
    if room:
        # Lines of the ledger have room, checkpoints and the report have not.
        assert found["steps"] == list(range(1, 9))
    assert "no checkpoint at step" in finished.stderr
    assert "error: [Errno 28] No space left on device" in finished.stderr
    assert found["code"] == 1


def wait_for(condition, process, seconds=120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_full_disk_costs_checkpoints_but_not_the_run(run, monkeypatch, capsys):
    original, calls = train.save_checkpoint, []

    def full_at_first(*args):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(train, "save_checkpoint", full_at_first)
    folder = run()
    assert "no checkpoint at step 3" in capsys.readouterr().err
    assert report(folder)["steps_taken"] == 8


@pytest.fixture(scope="module")
def unsaved(tiny_model_dir, letters, tmp_path_factory):
    """The folder with a run that crashed between its last checkpoint and its adapter."""
    output = tmp_path_factory.mktemp("unsaved")
    with mock.patch("train.save_adapter", side_effect=Crash), pytest.raises(Crash):
        in_process(train.main, flags(tiny_model_dir, letters, output, FIXED))
    return output


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped"])
def test_a_poisoned_checkpoint_is_passed_over(
    run, trained, unsaved, tmp_path, capsys, file, damage
):
    reference = adapter(trained(FIXED) / "job")
    folder = shutil.copytree(unsaved, tmp_path / "outputs") / "job"
    path = folder / "checkpoints" / "step-000008" / file
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    folder = run(FIXED, "--resume=auto")
    told = capsys.readouterr().err
    assert f"{file} has changed" in told
    assert "after step 6" in told
    assert all(torch.equal(reference[name], tensor) for name, tensor in adapter(folder).items())


@pytest.fixture
def stopped(run, copied):
    """The folder of a run that crashed in its fifth step."""
    copied(crash_in_step=5)
    return run


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--eps=7", "eps 8"),
        ("--delta=1e-4", "delta 0.001"),
        ("--clip=1", "clip 0.5"),
        ("--clip_function=automatic", "clip_function flat"),
        ("--loss_normalization=max_seq_len", "loss_normalization tokens"),
        ("--total_bs=4", "total_bs 8"),
        ("--num_epochs=2", "num_epochs 1"),
        ("--max_seq_len=16", "max_seq_len 32"),
        ("--noise_multiplier=9", "noise_multiplier"),
        ("--reserve_histogram_sigma=10", "reserve_histogram_sigma None"),
        ("--lora_r=4", "lora_r 8"),
        (FIXED, "insecure_fixed_noise_seed None"),
    ],
)
def test_a_changed_setting_is_refused_by_name(stopped, flag, named):
    with pytest.raises(UsageError, match=re.escape(named)):
        stopped("--resume=auto", flag)


def test_a_run_without_privacy_cannot_continue_a_private_one(stopped):
    with pytest.raises(UsageError, match="eps 8"):
        stopped("--resume=auto", dp=False)


def test_other_data_of_the_same_size_is_refused(stopped, tmp_path):
    rows = [{"instruction": "x" * 20}] * NUM_EXAMPLES
    other = tmp_path / "other"
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(other)
    with pytest.raises(UsageError, match="another training data"):
        stopped("--resume=auto", dataset=str(other))


def test_another_base_model_is_refused(stopped, tmp_path):
    save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match="another base model fingerprint"):
        stopped("--resume=auto", model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:-2], "truncated"),
        (
            lambda lines: [*lines[:2], lines[2].replace('"step": 2', '"step": 1'), *lines[3:]],
            "edited",
        ),
        (lambda lines: lines[:2] + lines[3:], "edited"),
        (lambda lines: [], "truncated"),
    ],
)
def test_a_ledger_that_was_tampered_with_is_refused(stopped, tmp_path, edit, message):
    path = tmp_path / "outputs" / "job" / LEDGER_FILE
    lines = path.read_text().splitlines(keepends=True)[:4]  # what the checkpoint of step 3 knows
    path.write_text("".join(edit(lines)))
    with pytest.raises(UsageError, match=message):
        stopped("--resume=auto")


def test_a_kill_in_the_first_line_of_the_ledger_loses_nothing(run):
    ledger = run(crash_in_step=1) / LEDGER_FILE
    ledger.write_bytes(ledger.read_bytes()[:40])
    values = report(run("--resume=auto"))
    assert (values["steps_taken"], values["steps_lost"]) == (8, 0)


def test_a_checkpoint_of_a_step_that_the_run_has_not_is_refused(stopped, tmp_path):
    (newest,) = (tmp_path / "outputs" / "job").glob("checkpoints/step-*")
    state = json.loads((newest / "state.json").read_text()) | {"step": 9}
    (newest / "state.json").write_text(json.dumps(state))
    sums = json.loads((newest / "sha256.json").read_text())
    sums["state.json"] = sha256_of(newest / "state.json")
    (newest / "sha256.json").write_text(json.dumps(sums))
    with pytest.raises(UsageError, match="is of step 9, but the run has 8"):
        stopped("--resume=auto")


def test_a_second_run_on_the_same_folder_is_refused_until_the_first_ends(run, long_run):
    process, folder = long_run
    wait_for(lambda: (folder / ".lock").exists(), process)
    for resume in ([], ["--resume=auto"]):
        with pytest.raises(UsageError, match=r"outputs/job is in use.*another --job_sess"):
            run("--num_epochs=500", *resume)
    wait_for(lambda: (folder / LEDGER_FILE).exists() and len(ledger_steps(folder)) >= 4, process)
    process.kill()
    process.wait()
    assert (folder / ".lock").exists()  # but nobody holds it
    ledger = (folder / LEDGER_FILE).read_text()
    with pytest.raises(UsageError, match="num_epochs 500"):
        run("--resume=auto")
    assert (folder / LEDGER_FILE).read_text() == ledger
    assert not (folder / ".lock").exists()


def test_a_run_is_not_overwritten_and_a_finished_one_says_so(run, copied, capsys):
    folder = copied()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UsageError, match="--resume auto"):
        run()
    run("--resume=auto")
    assert "finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# ---------------------------------------------------------------- without privacy


def test_without_privacy_the_loss_falls_and_the_report_says_no(run):
    folder = run("--num_epochs=12", "--lr=0.02", dp=False)
    losses = [m["validation_loss"] for m in metrics(folder) if "validation_loss" in m]
    assert len(losses) == 13
    # The frozen random head, with logits of about 0.1, cannot say more than this.
    assert losses[-1] < losses[0] - 0.2
    assert report(folder)["guarantee"] is False
    assert not (folder / LEDGER_FILE).exists()
    assert "No privacy guarantee" in (folder / "adapter" / "README.md").read_text()


def test_without_privacy_a_resumed_run_equals_an_uninterrupted_one(run):
    more = ["--lora_dropout=0.1", "--lr_scheduler=linear"]
    whole = run(*more, dp=False, output="whole")
    run(*more, dp=False, output="broken", crash_in_step=5)
    folder = run(*more, "--resume=auto", dp=False, output="broken")
    assert largest_difference(whole, folder) == 0


def test_a_run_of_one_step_moves_though_it_warms_up(run):
    folder = run("--num_epochs=0.1", "--lr_scheduler=cosine", "--warmup_steps=1")
    (step,) = (m for m in metrics(folder) if "real_tokens" in m)
    assert step["learning_rate"] == pytest.approx(0.01 / 2)
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(weights[name].any() for name in weights if "lora_B" in name)


def test_pairs_are_trained_on_their_answers(run, tmp_path):
    folder = run(
        "--prompt_style=vicuna", "--max_seq_len=300", dataset=save_dataset(tmp_path, labelled=True)
    )
    style = json.loads((folder / "adapter" / "training_style.json").read_text())
    assert style["prompt_style"] == "vicuna"
    tokens = [m for m in metrics(folder) if "real_tokens" in m]
    assert len(tokens) == 8


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset_name=nowhere/at/all"], "no data set 'nowhere/at/all'"),
        (["--model_name=/nowhere/model"], "no model at '/nowhere/model'"),
        (["--clip=-1"], "needs a clip norm of 1e-06 to 1e+06"),
        (["--delta=0.02"], "must be below 1/N"),
        (["--eps=0"], "must be above 0"),
        (["--eps=nan"], "must be above 0"),
        (["--total_bs=65"], "exceeds the 64 training examples"),
        (["--prompt_style=vicuna"], "does not fit"),
        (["--target_modules", "nosuch"], "--target_modules"),
        (["--num_train_examples=63"], "train split of"),
        (["--report_to=trackio"], "pip install trackio"),
        (["--perdevice_bs=0"], "not a whole number of 1 or more"),
        (["--job_sess=../up"], "must be a folder name"),
        (["--lora_dropout=1"], "must be in [0, 1)"),
        (["--load_in_4bit", "--load_in_8bit"], "choose one"),
        (["--load_in_4bit", "--fsdp"], "--fsdp cannot shard a base in 4 bits"),
        (["--perdevice_bs=auto", "--fsdp"], "--perdevice_bs auto does not go with --fsdp"),
        (["--canary_repeats=2"], "--canary_repeats needs --num_canaries"),
        (["--num_canaries=1"], "--max_seq_len 32 cuts the canaries' secrets off"),
        (["--num_canaries=-1"], "not a whole number of 0 or more"),
        (["--rank_pattern", "q_proj"], "'' is not a whole number of 1 or more"),
        (["--rank_pattern", "q_proj=0"], "'0' is not a whole number of 1 or more"),
        (["--rank_pattern", "q proj=4"], "'q proj=4' is not NAME=NUMBER"),
        (["--alpha_pattern", "up_proj=4"], "--alpha_pattern up_proj: no adapted layer"),
        (["--optimizer=adamw_corrected", "--noise=banded"], "knows the variance of white noise"),
        (["--optimizer=adamw_corrected", "--eps=-1"], "--optimizer adamw_corrected needs --eps"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(run, capsys, tmp_path, more, message):
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: run(*more))
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in told
    assert "error: " in told
    assert not (tmp_path / "outputs").exists()


def test_delta_auto_is_on_record_as_its_number_and_goes_on(run, capsys):
    folder = run("--delta=auto", crash_in_step=5)
    assert json.loads((folder / "run_config.json").read_text())["arguments"]["delta"] == 1e-3
    run("--delta=auto", "--resume=auto")
    assert report(folder)["delta"] == read_plan(folder / LEDGER_FILE).delta == 1e-3
    assert "(8, 0.001)-DP" in capsys.readouterr().err


def test_a_delta_above_a_tenth_of_1_over_n_is_warned_of(run, capsys):
    run("--delta=0.01", "--num_epochs=0.2")
    assert "above 1/(10 N)" in capsys.readouterr().err


def test_a_foreign_folder_is_left_alone(run, tmp_path):
    (tmp_path / "outputs" / "job").mkdir(parents=True)
    (tmp_path / "outputs" / "job" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="no run of this tool"):
        run()


def test_auto_finds_how_much_fits_and_learns_the_same(run, capsys):
    for dp in (True, False):
        more = (FIXED,) if dp else ()
        fixed = run(*more, dp=dp, output=f"fixed{dp}")
        found = run(*more, "--perdevice_bs=auto", dp=dp, output=f"auto{dp}")
        assert "--perdevice_bs auto: 64 sequences of 32 tokens fit" in capsys.readouterr().err
        assert largest_difference(fixed, found) < 1e-5


def test_rows_that_cannot_be_used_leave_no_copy_behind(run, tmp_path):
    rows = [{"instruction": "hello"}] * 63 + [{"instruction": None}]
    data = tmp_path / "rows.jsonl"
    data.write_text(jsonl(rows))
    with pytest.raises(UsageError, match="entry 64, column 'instruction'"):
        run(dataset=str(data))
    assert not (tmp_path / "outputs").exists()
    data = tmp_path / "labelled_rows.jsonl"  # read, and found unusable where tokens are written
    data.write_text(jsonl([{"instruction": "hello", "answer": "hello"}]))
    with pytest.raises(UsageError, match="every example is longer"):
        run("--prompt_style=vicuna", "--total_bs=1", "--delta=0.01", dataset=str(data))
    assert not (tmp_path / "outputs").exists()


def test_a_first_step_that_leaves_a_tensor_where_it_was_ends_the_run():
    def tensors(**gradients):
        parameters = {name: torch.ones(2) for name in gradients}
        for name, gradient in gradients.items():
            parameters[name].grad = torch.full((2,), gradient)
        return parameters

    before = [torch.ones(2), torch.ones(2)]
    parameters = tensors(a=0.0, b=1.0)
    with pytest.raises(RuntimeError, match="b did not move in the first step"):
        train.require_movement(before, parameters)
    parameters["b"][1] = 2.0
    train.require_movement(before, parameters)
    with pytest.raises(RuntimeError, match="every gradient of the first step is zero"):
        train.require_movement(before, tensors(a=0.0, b=0.0))
