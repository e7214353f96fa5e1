"""An audit of a run by its own canaries: it finds noise that is missing, and claims that hold."""

import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from privacy_checks import audit_run
from privacy_checks.estimators import correct_guesses
from privacy_checks.observed_run import save_tiny_model
from tests.training import in_process, save_dataset
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError
from utils.privacy.mechanism import Private
from utils.runs.checkpointing import read_checkpoint, whole_checkpoints
from utils.texts.audit_canaries import TOKENS, AuditCanaries


class LittleNoise(Private):
    """A share of the noise that is accounted for."""

    share: float

    def release(self, total: torch.Tensor, step: int) -> torch.Tensor:
        honest = self.plan
        noise_multiplier = self.share * honest.noise_multiplier
        self.plan = replace(honest, noise_multiplier=noise_multiplier)
        try:
            return super().release(total, step)
        finally:
            self.plan = honest


class NoNoise(LittleNoise):
    share = 1e-3


class AFifth(LittleNoise):
    share = 0.2


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The flags of a tiny model and 16 rows."""
    folder = tmp_path_factory.mktemp("audited")
    save_tiny_model(folder / "model")
    return folder / "model", save_dataset(folder, rows=16)


def trained(parts, output, eps, canaries, mechanism=Private, *more):
    """Train 8 steps on all rows and canaries; returns the run's folder."""
    model, dataset = parts
    rows = 16 + canaries
    argv = [
        f"--dataset_name={dataset}", f"--model_name={model}", f"--output_dir={output}",
        "--job_sess=job", "--prompt_style=uncond_generation", "--max_seq_len=32",
        f"--total_bs={rows}", "--perdevice_bs=64", "--num_epochs=8", "--lr=0.01",
        f"--eps={eps}", "--delta=1e-5", "--clip=0.01", "--save_steps=1", "--keep_checkpoints=8",
        "--max_eval_examples=1", "--no_eval_at_start", f"--audit_canaries={canaries}", *more,
    ]  # fmt: skip
    assert in_process(lambda given: train.main(given, private=mechanism), argv) == EXIT_OK
    return output / "job"


def audited(parts, run, *more) -> int:
    argv = [str(run), f"--model_name={parts[0]}", "--perdevice_bs=64", *more]
    return in_process(audit_run.main, argv)


def test_a_run_without_noise_is_flagged_and_nothing_of_a_canary_leaves(parts, tmp_path, capsys):
    run = trained(parts, tmp_path, 1, 64, NoNoise, "--num_epochs=4", "--noise_multiplier=40")
    before = sorted(run.rglob("*"))
    assert audited(parts, run, f"--output={tmp_path / 'audit'}") == EXIT_FAILED
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "audit" / "audit_run.json").read_text())
    assert result["refuted"]
    assert result["checkpoints"] == 4
    assert 0 < result["claimed_epsilon"] < 1
    assert "REFUTED: epsilon is at least" in shown
    assert {each["attack"] for each in result["bounds"]} == {
        audit_run.OF_LOSSES, audit_run.OF_CHECKPOINTS
    }  # fmt: skip
    # All guesses right is the most there is, and more at the lower confidence.
    for each in result["bounds"]:
        assert 0 <= each["epsilon"] <= each["without_noise"]
    low, high = ([e["without_noise"] for e in result["bounds"] if e["confidence"] == confidence]
                 for confidence in audit_run.CONFIDENCES)  # fmt: skip
    assert np.all(np.array(low) > high)

    # A figure for each canary would be a list of that length.
    def lists(value):
        if isinstance(value, list):
            yield value
        for each in value.values() if isinstance(value, dict) else value:
            if isinstance(each, list | dict):
                yield from lists(each)

    assert max(map(len, lists(result))) == len(result["bounds"]) < 64
    assert sorted(run.rglob("*")) == before
    assert (tmp_path / "audit" / "audit_run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="use another --output"):
        audited(parts, run, f"--output={tmp_path / 'audit'}")


def test_as_many_checkpoints_are_looked_at_as_are_asked_for(parts, tmp_path, monkeypatch, capsys):
    run = trained(parts, tmp_path, 1, 64, NoNoise, "--num_epochs=4", "--noise_multiplier=40")
    restore, steps = audit_run.restore_adapter, []

    def watched(parameters, adapter):
        steps.append(adapter)
        restore(parameters, adapter)

    read, most = [], []

    def counted(path):
        checkpoint = read_checkpoint(path)
        read.append(weakref.ref(checkpoint))
        most.append(sum(each() is not None for each in read))
        return checkpoint

    monkeypatch.setattr(audit_run, "restore_adapter", watched)
    monkeypatch.setattr(audit_run, "read_checkpoint", counted)
    assert audited(parts, run, "--max_checkpoints=3") == EXIT_FAILED
    assert most == [1, 2, 2]
    saved = [read_checkpoint(each).adapter for each in whole_checkpoints(run / "checkpoints")][::-1]
    assert len(saved) == 4
    name = next(name for name in steps[0] if "lora_B" in name)
    looked_at = [
        [torch.equal(adapter[name], each[name]) for each in saved].index(True) for adapter in steps
    ]
    assert looked_at == [0, 2]
    with pytest.raises(UsageError, match="--max_checkpoints 1"):
        audited(parts, run, "--max_checkpoints=1")
    assert "gradients of canaries: " in capsys.readouterr().err


def run_of(inside, claimed=1.0, drawn=1.0) -> audit_run.AuditedRun:
    canaries = AuditCanaries(len(inside), TOKENS, 0)
    return audit_run.AuditedRun(Path("run"), "base", {}, canaries, inside, claimed, 1e-5, drawn)


def f_dp(scores, run, sides=2, attacks=1) -> float:
    """The bound at 95%."""
    right = partial(correct_guesses, scores[run.inside], scores[~run.inside])
    return audit_run.bound(right, run, sides, 0.95, "f-DP", attacks)


@pytest.mark.parametrize("sides", audit_run.SIDES)
def test_scores_that_know_no_coin_refute_nothing(sides):
    """About 10 of 200 at 95%, at most: of several numbers of guesses the best one counts."""
    random, above = np.random.default_rng(0), 0
    for _ in range(200):
        run = run_of(random.random(128) < 0.5)
        above += f_dp(random.normal(size=128), run, sides, 2) > 0
    assert above <= 10


def test_a_canary_that_no_step_drew_shows_nothing_and_the_power_says_so():
    """What is expected without noise is what a run shows in which whoever was drawn is known."""
    random = np.random.default_rng(0)
    inside, drawn = random.random((2, 1000)) < np.array([[0.5], [0.2]])
    scores = (inside & drawn) + random.random(1000) / 2
    found, whole = (
        audit_run.judged(run_of(inside, 8.0, share), {audit_run.OF_LOSSES: each})["bounds"]
        for share, each in ((0.2, scores), (1.0, inside.astype(float)))
    )
    for each, most in zip(found, whole):
        assert each["epsilon"] == pytest.approx(each["without_noise"], abs=0.5)
        assert 0.5 < each["without_noise"] < most["without_noise"] - 0.5
    # Half of what is guessed out would be wrong.
    assert f_dp(scores, run_of(inside), 1) > f_dp(scores, run_of(inside), 2) + 1


@pytest.mark.parametrize("drawn", [0.05, 0.3, 1.0])
def test_as_many_guesses_are_right_as_of_somebody_who_knows_who_was_drawn(drawn):
    random, found = np.random.default_rng(0), []
    for _ in range(200):
        inside = random.random(1000) < 0.5
        known = inside & (random.random(1000) < drawn)
        scores = known + random.random(1000) / 2
        found.append(correct_guesses(scores[inside], scores[~inside], 125, 125))
    expected = audit_run.right_without_noise(run_of(np.ones(1000), 1.0, drawn), 125, 125)
    assert np.mean(found) == pytest.approx(expected, abs=3)


def test_a_claim_that_no_audit_of_so_few_could_refute_is_said_to_be_one(capsys):
    inside = np.arange(64) < 32
    result = audit_run.judged(run_of(inside, 8.0), {audit_run.OF_LOSSES: inside.astype(float)})
    assert not result["refuted"]
    assert result["best"] == max(
        each["without_noise"] for each in result["bounds"] if each["confidence"] == 0.99
    )
    assert "so few and seldom drawn refute no claim above" in audit_run.as_text(result)
    unclaimed = audit_run.judged(run_of(inside, None), {audit_run.OF_LOSSES: inside.astype(float)})
    assert not unclaimed["refuted"]
    assert "nothing was claimed" in audit_run.as_text(unclaimed)


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_a_bound_falls_with_the_noise_and_the_fewer_canaries_there_are(share):
    random = np.random.default_rng(0)
    inside = random.random(1024) < 0.5
    scores = 4 * inside + random.normal(size=1024) * share
    many, few = run_of(inside), run_of(inside[:128])
    found = f_dp(scores, many)
    assert found > f_dp(scores[:128], few) > 0
    assert found <= f_dp(inside.astype(float), many)
    more_noise = scores + 4 * random.normal(size=1024)
    assert f_dp(more_noise, many) < found


def test_a_sketch_keeps_inner_products():
    random = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 5 * audit_run.SKETCH, generator=random)
    second += first
    sketch = audit_run.Sketch(len(first), torch.device("cpu"))
    made = sketch(first), sketch(second)
    assert len(made[0]) == audit_run.SKETCH
    exact, about = ((a @ b) / (a.norm() * b.norm()) for a, b in ((first, second), made))
    assert about == pytest.approx(exact.item(), abs=0.05)
    small = audit_run.Sketch(7, torch.device("cpu"))
    assert torch.equal(small(first[:7]), first[:7])


def test_a_run_without_canaries_is_refused(parts, tmp_path):
    run = trained(parts, tmp_path, -1, 0, Private, "--clip=-1", "--num_epochs=1")
    with pytest.raises(UsageError, match="was trained without --audit_canaries"):
        audited(parts, run)
    with pytest.raises(UsageError, match="holds no run"):
        audited(parts, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mechanism", [NoNoise, AFifth])
def test_runs_with_less_noise_than_is_claimed_are_flagged(parts, tmp_path, mechanism):
    """At least 9 of 10, by their canaries alone."""
    flagged = 0
    for number in range(10):
        run = trained(parts, tmp_path / str(number), 1, 1024, mechanism, f"--seed={number}")
        flagged += audited(parts, run) == EXIT_FAILED
    assert flagged >= 9


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("eps", [1, 4, 8])
def test_sound_runs_stay_below_their_claims(parts, tmp_path, eps):
    for number in range(10):
        run = trained(parts, tmp_path / str(number), eps, 256, Private, f"--seed={number}")
        assert audited(parts, run) == EXIT_OK
