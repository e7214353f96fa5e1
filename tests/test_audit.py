"""The empirical audit: it passes the training run as it is, and catches it broken."""

import json
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import lfilter

from privacy_checks import audit, randomness, replay
from privacy_checks.observed_run import Observation
from privacy_checks.persons import CANARY_ROWS
from tests.mutated_train import observe_mutated_training
from tests.test_plan import small_plan
from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.privacy.accounting import SampledGaussian, compute_epsilon
from utils.privacy.banded import band_coefficients
from utils.secure_random import SecureRandom

# The same mu, and so the same claim, as the full size: sqrt(steps) / sigma = 1.
SMALL = {"canaries": 2000, "steps": 4, "noise_multiplier": 2.0, "delta": 1e-5}
RELEASE = "broadcast(mechanism.release(total_of_all, step))"
SMALL_FLAGS = ["--canaries=2000", "--steps=4", "--noise_multiplier=2"]


@pytest.fixture(scope="module", autouse=True)
def _few_rows():
    """In the replays, so that they take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "WIDE_ROWS", 24)
        yield


@pytest.fixture(scope="module")
def sound():
    """A small canary run, a sampled run and the move of others in a replay, all sound."""
    return *audit.canary_run(**SMALL), audit.sampled_run(), audit.others_move()


def failed(result: dict) -> set[str]:
    return {check["name"] for check in result["checks"] if not check["passed"]}


def test_the_training_run_passes(sound):
    result = audit.judge(*sound)
    assert failed(result) == set()
    assert result["passed"]
    assert result["claimed_epsilon"] == pytest.approx(4.377, abs=1e-3)
    best = max(result["lower_bounds"].values())
    assert 0.6 * result["claimed_epsilon"] <= best <= result["claimed_epsilon"]


@pytest.mark.parametrize(
    ("broken", "catches"),
    [
        ("noise_half", {"claim", "noise scale"}),
        ("clip_double", {"claim", "clip"}),
        ("no_clip", {"claim", "clip"}),
        ("reuse_noise", {"noise between and within steps"}),
    ],
)
def test_a_broken_mechanism_is_caught(sound, broken, catches):
    *_, second, others = sound
    result = audit.judge(*audit.canary_run(**SMALL, broken=broken), second, others)
    assert not result["passed"]
    # Noise of another scale has another grid, and repeated noise has no power.
    assert catches <= failed(result) <= catches | {"power", "grid"}


def test_shuffled_epochs_are_caught(sound):
    inside, run, _, others = sound
    result = audit.judge(inside, run, audit.sampled_run("shuffle"), others)
    assert failed(result) == {
        "sampler, batch sizes", "sampler, counts of examples", "sampler, adjacent batches",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("coupling", "least"),
    [("dropout_by_place", 0.1), ("rope_state", 0.01), ("bf16_free_shapes", 1e-4)],
)
def test_a_row_that_changes_others_is_caught(sound, coupling, least):
    *runs, others = sound
    assert others == 0
    moved = audit.others_move(coupling)
    assert moved > least
    assert failed(audit.judge(*runs, moved)) == {"others"}


def test_noise_that_repeats_at_another_process_start_is_caught(sound):
    inside, run, second, others = sound
    run.seen.released[2], kept = (
        run.seen.clipped_sums[2] + second.noise[1] * run.plan.noise_multiplier,
        run.seen.released[2],
    )
    try:
        caught = failed(audit.judge(inside, run, second, others))
    finally:
        run.seen.released[2] = kept
    assert "noise between process starts" in caught
    assert "noise between and within steps" not in caught


# ---------------------------------------------------------------- correlated noise

# Two participations each: mu is 1 but for what the last columns lack.
BANDS = SMALL | {"steps": 8, "noise_multiplier": 2**0.5, "bands": 4}


@pytest.mark.slow
def test_correlated_noise_passes_and_is_caught_where_it_is_not_what_is_accounted():
    sound = *audit.canary_run(**BANDS), audit.sampled_run(bands=4), 0.0
    result = audit.judge(*sound)
    assert failed(result) == set()
    assert result["claimed_epsilon"] == pytest.approx(4.377, abs=0.01)
    *run, second, others = sound
    name = "correlation_kept_secretly_short"
    short = audit.judge(*audit.canary_run(**BANDS, broken=name), second, others)
    assert failed(short) == {"claim"}
    often = audit.judge(*run, audit.sampled_run(name, bands=4), others)
    assert "sampler, groups" in failed(often)
    half = audit.judge(*audit.canary_run(**BANDS, broken="noise_half"), second, others)
    assert {"claim", "noise scale"} <= failed(half)


def simulated(random, bands):
    """Who was in, a sound run of the default sizes without a model, and its claim."""
    canaries, steps, sigma = audit.sizes_of(read_flags(audit.Settings, "", [f"--bands={bands}"]))
    plan = small_plan(
        num_examples=canaries, expected_batch_size=canaries // bands, steps=steps, clip_norm=1.0,
        band_coefficients=band_coefficients(bands, steps) if bands > 1 else None,
    )  # fmt: skip
    inside = random.random(canaries) < 0.5
    groups = np.arange(inside.sum()) % bands
    batches = [np.flatnonzero(groups == step % bands) for step in range(steps)]
    sums = sigma * lfilter([1.0], plan.coefficients, random.normal(size=(steps, canaries)), axis=0)
    for step, batch in enumerate(batches):
        sums[step, np.flatnonzero(inside)[batch]] += 1
    updates = np.zeros((steps, audit.NUM_PARAMETERS))
    updates[:, audit.canary_coordinates(canaries)] = sums / plan.expected_batch_size
    claim = compute_epsilon([SampledGaussian(1.0, sigma, -(-steps // bands))], 1e-5).upper
    seen = Observation(batches=batches, updates=list(updates))
    return inside, audit.Run(plan, seen, {}), claim


@pytest.mark.parametrize("bands", [1, 2, 4, 5])
def test_a_sound_run_has_power_at_the_default_sizes_whatever_the_bands(bands):
    """The least power is three deviations away, and more: less than one in a thousand fails."""
    random, found = np.random.default_rng(bands), []
    for _ in range(10):
        inside, run, claim = simulated(random, bands)
        found.append(max(audit._lower_bounds(inside, run).values()) / claim)
    mean, deviation = np.mean(found), np.std(found, ddof=1)
    assert mean - 3 * deviation > audit.POWER


def of_steps(batches, bands):
    """A sampled run of which only the draws are known."""
    plan = small_plan(
        num_examples=100, expected_batch_size=10,
        band_coefficients=band_coefficients(bands, 20) if bands > 1 else None,
    )  # fmt: skip
    return audit.Run(plan, Observation(batches=batches), {})


def test_a_row_of_two_groups_is_noticed():
    random = np.random.default_rng(1)
    groups = np.arange(100) % 4
    sound = [
        np.flatnonzero((groups == step % 4) & (random.random(100) < 0.4)) for step in range(20)
    ]
    often = [
        np.flatnonzero((groups % 2 == step % 2) & (random.random(100) < 0.4)) for step in range(20)
    ]
    (separation, *others) = audit._sampler_checks(of_steps(sound, 4))
    assert all(check.passed for check in (separation, *others))
    assert not audit._sampler_checks(of_steps(often, 4))[0].passed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bands=3"], "must be 1, 2, 4 or 5"),
        (["--bands=4", "--unit"], "does not go with --unit"),
        (["--break=correlation_kept_secretly_short"], "needs --bands 2 or more"),
        (["--bands=5", "--steps=16"], "--steps 16: must be a multiple of --bands 5"),
    ],
)
def test_bands_that_the_audit_cannot_have_are_refused(more, message):
    with pytest.raises(UsageError, match=message):
        audit.main(more)


# ---------------------------------------------------------------- persons

# The same mu again.
PERSONS = SMALL | {"steps": 2, "noise_multiplier": 2**0.5, "protects": audit.PERSONS}


@pytest.fixture(scope="module")
def persons():
    """Runs as in `sound`, whose canaries are persons, and one that protects their rows."""
    rows = audit.canary_run(**PERSONS | {"protects": audit.ROWS_OF_PERSONS})
    return audit.canary_run(**PERSONS), audit.sampled_run(unit=True), rows


def test_persons_are_protected_where_rows_are_not(persons):
    run, second, rows = persons
    result = audit.judge_persons(*run, second, 0.0, *rows)
    assert failed(result) == set()
    assert result["passed"]
    claim = result["claimed_epsilon"]
    assert claim == result["claimed_epsilon_of_a_row"] == pytest.approx(4.377, abs=1e-3)
    assert 0.6 * claim <= max(result["lower_bounds"].values()) <= claim
    assert max(result["lower_bounds_where_rows_are_protected"].values()) > CANARY_ROWS * claim
    # The run that protects persons is no example of one that does not.
    swapped = audit.judge_persons(*run, second, 0.0, *run)
    assert failed(swapped) == {"rows are no persons"}
    assert not swapped["passed"]


@pytest.mark.parametrize(
    ("broken", "catches"),
    [
        ("cap_ignored", {"cap"}),
        ("mean_by_row_clip", {"claim", "clip"}),
        ("noise_half", {"claim", "noise scale"}),
        ("clip_double", {"claim", "clip"}),
    ],
)
def test_a_broken_protection_of_persons_is_caught(persons, broken, catches):
    _, second, rows = persons
    result = audit.judge_persons(*audit.canary_run(**PERSONS, broken=broken), second, 0.0, *rows)
    assert not result["passed"]
    assert catches <= failed(result) <= catches | {"power", "grid"}


def test_a_person_who_is_drawn_for_each_row_is_caught(persons):
    run, second, rows = persons
    # As a sampler of rows would: each row by itself.
    batches = [np.flatnonzero(taken) for taken in bernoulli(examples=100 * CANARY_ROWS)]
    by_row = replace(second, seen=replace(second.seen, batches=batches))
    assert {"sampler, batch sizes", "sampler, counts of examples"} <= failed(
        audit.judge_persons(*run, by_row, 0.0, *rows)
    )


def test_a_break_of_persons_needs_persons():
    with pytest.raises(audit.UsageError, match="--break cap_ignored needs --unit"):
        audit.main(["--break=cap_ignored"])


# ---------------------------------------------------------------- defects in train.py itself


@pytest.mark.parametrize(
    ("old", "new", "catches"),
    [
        ("(total, plan.noise_multiplier,", "(total, 1.5,", "noise scale"),
        ("(total, plan.noise_multiplier,", "(total / 2, plan.noise_multiplier,", "power"),
        ("return add_noise(", "return 1e-4 + add_noise(", "grid"),
        (RELEASE, "total_of_all.double()", "steps"),
        (RELEASE, f"{RELEASE}; released = {RELEASE}", "steps"),
        (RELEASE, f"{RELEASE} + 1e-4", "update"),
    ],
)
def test_a_defect_in_the_loop_is_caught(sound, monkeypatch, old, new, catches):
    *_, second, others = sound
    observe_mutated_training(monkeypatch, old, new)
    assert catches in failed(audit.judge(*audit.canary_run(**SMALL), second, others))


# ---------------------------------------------------------------- tests of the randomness


def bernoulli(steps=100, examples=100, rate=0.2):
    taken = np.zeros((steps, examples), dtype=bool)
    for row in taken:
        row[SecureRandom().bernoulli_indices(round(rate * 100), 100, examples)] = True
    return taken


def fixed_size():
    return np.array([np.random.default_rng().permutation(100) < 20 for _ in range(100)])


def same_people():
    """Batches of the right sizes, half of which hold the same examples as the one before."""
    taken = bernoulli()
    taken[1::2] = taken[::2]
    return taken


def favourites():
    """Half of the examples are taken three times as often as the other half."""
    return np.concatenate([bernoulli(examples=50, rate=0.1), bernoulli(examples=50, rate=0.3)], 1)


P_VALUES = [randomness.batch_size_p_value, randomness.count_p_value, randomness.adjacent_p_value]


@pytest.mark.parametrize("p_value", P_VALUES)
def test_poisson_samples_are_accepted_and_p_values_mean_what_they_say(p_value):
    values = np.array([p_value(bernoulli(), 0.2) for _ in range(300)])
    assert values.min() > 1e-7
    assert 0.3 < (values < 0.5).mean() < 0.7


def test_batches_of_one_size_and_batches_that_depend_on_each_other_are_rejected():
    assert randomness.batch_size_p_value(fixed_size(), 0.2) < 1e-9
    assert randomness.adjacent_p_value(same_people(), 0.2) < 1e-9
    assert randomness.count_p_value(favourites(), 0.2) < 1e-9
    assert randomness.batch_size_p_value(bernoulli(rate=0.3), 0.2) < 1e-9


@pytest.fixture
def noise():
    return SecureRandom().gaussian(16 * 8192).numpy().reshape(16, 8192)


def test_fresh_noise_is_accepted(noise):
    assert randomness.scale_p_value(noise) > 1e-7
    assert randomness.repetition_p_value(noise) > 1e-7
    assert randomness.repetition_p_value(noise[:8], noise[8:]) > 1e-7


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_a_wrong_scale_is_rejected(noise, factor):
    assert randomness.scale_p_value(factor * noise) < 1e-9


@pytest.mark.parametrize(
    "repeat",
    [
        lambda noise: (3, slice(None), noise[7]),  # a whole step again
        lambda noise: (3, slice(None), -noise[7]),  # with its sign changed
        lambda noise: (3, slice(0, 1000), noise[7, 512:1512]),  # a part of it, elsewhere
        lambda noise: (5, slice(4096, 5120), noise[5, :1024]),  # one tensor's noise in another
    ],
)
def test_noise_that_repeats_is_rejected(noise, repeat):
    row, place, values = repeat(noise)
    noise[row, place] = values
    assert randomness.repetition_p_value(noise) < 1e-9


# ---------------------------------------------------------------- the command


class ThisProcess:
    """Stands in for a pool of processes: `second` is what its one task returns."""

    def __init__(self, second):
        self.second = second

    def __call__(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, *_):
        future = Future()
        future.set_result(self.second)
        return future


COUPLED = "rope_state"


@pytest.mark.parametrize("broken", [None, "noise_half", COUPLED])
def test_the_command_tells_writes_json_and_exits_by_the_verdict(
    sound, monkeypatch, tmp_path, capsys, broken
):
    *_, second, others = sound
    monkeypatch.setattr(audit, "ProcessPoolExecutor", ThisProcess(second))
    monkeypatch.setattr(audit, "others_move", lambda broken: 0.3 if broken == COUPLED else others)
    file = tmp_path / "audit.json"
    file.write_text("old")
    more = ["--break", broken] if broken else []
    assert audit.main([*SMALL_FLAGS, f"--json={file}", *more]) == (1 if broken else 0)
    told = capsys.readouterr()
    assert f"{file} is replaced" in told.err
    assert ("FAILED in" if broken else "PASSED in") in told.out
    assert ("BROKEN ON PURPOSE" in told.out) is bool(broken)
    result = json.loads(file.read_text())
    assert result["passed"] is (broken is None)
    assert result["lower_bounds"].keys() == {"gaussian_pair", "gdp", "one_run", "one_run_f_dp"}
    assert f"Claimed epsilon {result['claimed_epsilon']:.3f}" in told.out


@pytest.mark.parametrize("canaries", ["0", "99", "8193", "many"])
def test_a_useless_number_of_canaries_is_refused(canaries, capsys):
    with pytest.raises((audit.UsageError, SystemExit)) as refused:
        audit.main([f"--canaries={canaries}"])
    assert canaries in str(refused.value) + capsys.readouterr().err


def test_every_broken_mechanism_has_its_name_in_the_flag():
    assert set(audit.BROKEN) == audit.DESCRIPTIONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "broken"),
    [(unit, broken) for unit in (False, True) for broken in (None, *audit.DESCRIPTIONS)
     if unit or broken not in audit.BREAKS_OF_PERSONS],
)  # fmt: skip
def test_the_full_size_audit(tmp_path, unit, broken):
    file = tmp_path / "audit.json"
    more = [*(["--break", broken] if broken else []), *(["--unit"] if unit else [])]
    assert audit.main([f"--json={file}", *more]) == (1 if broken else 0)
    result = json.loads(file.read_text())
    assert result["passed"] is (broken is None)
    assert result["seconds"] < 300
