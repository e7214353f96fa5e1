"""The plan, the ledger and the report."""

import dataclasses
import json

import pytest

from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.command_line.training_flags import (
    TrainingSettings,
    check_training_settings,
    plan_of,
)
from utils.privacy.accounting import compute_epsilon, group_epsilons
from utils.privacy.guarantee import as_markdown, build_report, render, rounded_up, write_report
from utils.privacy.ledger import Ledger, read_plan
from utils.privacy.plan import PrivacyPlan, num_steps

PERSONS = {"unit_column": "user_id", "max_rows_per_unit": 3}


def small_plan(**changes) -> PrivacyPlan:
    """A plan of 20 steps of 10 out of 500 examples, epsilon about 1.2."""
    values = {
        "num_examples": 500, "expected_batch_size": 10, "steps": 20, "clip_norm": 1.0,
        "clip_function": "flat", "loss_normalization": "tokens", "noise_multiplier": 1.0,
        "delta": 1e-5, "target_epsilon": 2.0,
    }  # fmt: skip
    return PrivacyPlan(**(values | changes))


def settings(**changes) -> TrainingSettings:
    argv = ["--dataset_name=x", "--model_name=x", "--job_sess=x",
            "--prompt_style=uncond_generation", "--eps=8", "--delta=1e-5", "--clip=1",
            "--total_bs=64"]  # fmt: skip
    return dataclasses.replace(read_flags(TrainingSettings, None, argv), **changes)


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "steps"),
    [(10, 180_000, 4096, 439), (3, 10, 10, 3), (0.1, 10, 10, 1), (0.3, 100, 10, 3), (1, 99, 10, 9)],
)
def test_steps_are_the_floor_in_exact_arithmetic(epochs, examples, batch, steps):
    assert num_steps(epochs, examples, batch) == steps


def test_the_plan_is_calibrated_below_its_target():
    plan, warnings = plan_of(settings(), 5000)
    assert warnings == []
    assert (plan.steps, plan.sampling_rate) == (234, 64 / 5000)
    report = build_report(plan, steps_taken=plan.steps, steps_recorded=plan.steps)
    assert 7.9 < report["epsilon"]["upper"] <= 8.0
    again, _ = plan_of(settings(noise_multiplier=plan.noise_multiplier), 5000)
    assert again == plan


def test_a_reserved_histogram_is_paid_for_by_the_same_target():
    alone, _ = plan_of(settings(eps=3.0), 5000)
    both, _ = plan_of(settings(eps=3.0, reserve_histogram_sigma=10.0), 5000)
    assert both.noise_multiplier > alone.noise_multiplier
    epsilon = build_report(both, steps_taken=both.steps, steps_recorded=both.steps)["epsilon"]
    assert epsilon["upper"] < epsilon["with_reserved_histogram"] <= 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_bs": 5001}, r"--total_bs 5001 exceeds the 5000"),
        ({"delta": 1 / 5000}, r"--delta 0.0002: must be below 1/N"),
        ({"delta": 0.5}, "must be below 1/N"),
        ({"noise_multiplier": 0.4}, r"--noise_multiplier 0.4 gives epsilon .* above --eps 8"),
    ],
)
def test_meaningless_plans_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        plan_of(settings(**changes), 5000)


def test_a_large_delta_is_warned_about():
    _, warnings = plan_of(settings(delta=5e-5), 5000)
    assert "above 1/(10 N)" in warnings[0]


def test_without_privacy_there_is_no_plan_and_no_epsilon():
    assert plan_of(settings(eps=-1), 5000) == (None, [])
    report = build_report(None)
    assert report["guarantee"] is False
    assert set(report["epsilon"].values()) == {None}
    assert "NO PRIVACY GUARANTEE" in render(report, as_markdown)


def test_the_report_says_what_the_contract_asks(tmp_path):
    plan = small_plan()
    report = build_report(plan, steps_taken=plan.steps, steps_recorded=plan.steps)
    assert {
        "unit", "neighbouring_relation", "num_examples", "sampling_rate", "expected_batch_size",
        "steps_planned", "steps_taken", "noise_multiplier", "clip_norm", "delta", "sampler",
        "noise_source", "covered", "not_covered",
    } <= report.keys()  # fmt: skip
    epsilon = report["epsilon"]
    assert epsilon["lower"] <= epsilon["estimate"] <= epsilon["upper"] <= epsilon["target"]
    assert abs(epsilon["pld"] - epsilon["estimate"]) < 0.02
    # The claim is the first accountant's; the second opinion lies above by its own error.
    assert epsilon["accountant"] == "dp-accounting 0.6.0 PLD"
    assert epsilon["pld"] == epsilon["upper"] < epsilon["prv"] < epsilon["upper"] + 0.02
    write_report(tmp_path, report)
    assert json.loads((tmp_path / "privacy_report.json").read_text()) == report
    page = (tmp_path / "privacy_report.md").read_text()
    assert f"({rounded_up(epsilon['upper'])}, {plan.delta:g})-differentially private" in page


def test_lost_steps_are_counted_apart_and_cost_what_they_would():
    plan = small_plan()
    report = build_report(plan, steps_taken=plan.steps, steps_recorded=plan.steps + 5)
    assert (report["steps_taken"], report["steps_lost"]) == (plan.steps, 5)
    unwatched = report["epsilon_without_lost_steps"]["upper"]
    assert unwatched < report["epsilon"]["upper"]
    every = compute_epsilon(plan.events(plan.steps + 5), plan.delta).upper
    assert report["epsilon"]["upper"] == every
    page = render(report, as_markdown)
    assert f"if nobody saw one, it is {rounded_up(unwatched)}" in page
    assert f"is ({rounded_up(every)}, 1e-05)-differentially private" in page


def whole_report(**changes) -> dict:
    plan = small_plan(**changes)
    return build_report(plan, steps_taken=plan.steps, steps_recorded=plan.steps)


def test_the_odds_are_bounded_except_with_the_probability_of_a_larger_loss():
    report = whole_report()
    more = report["epsilon"]["probability_of_more"]
    assert 3 * report["delta"] < more < 100 * report["delta"]
    page = render(report, as_markdown)
    assert f"at most e^epsilon, except with probability about {more:.2g}, that of a" in page
    report["epsilon"]["probability_of_more"] = None
    assert "above delta and not known more closely" in render(report, as_markdown)


def test_epsilon_of_several_rows_of_one_person_is_in_json_and_page(tmp_path):
    report = whole_report()
    several = report["rows_of_one_person"]
    assert [each["rows"] for each in several] == [1, 2, 5, 10, 20]
    assert several[0]["epsilon"] == report["epsilon"]["upper"]
    assert several[1]["epsilon"] > 2 * several[0]["epsilon"]
    write_report(tmp_path, report)
    page = (tmp_path / "privacy_report.md").read_text()
    assert f"## Several rows of one person\n\n{'Epsilon at delta 1e-05'}" in page
    assert f"| 2 | {rounded_up(several[1]['epsilon'], '.2f')} |" in page


def test_what_public_n_means_is_said():
    page = render(whole_report(), as_markdown)
    assert "N is the published size: with one example more or less, sampling rate and" in page


def test_the_generator_is_the_limit_of_the_guarantee():
    page = render(whole_report(), as_markdown)
    assert "somebody who can break ChaCha20" in page
    assert "unlimited" not in page


def test_canaries_are_named():
    report = whole_report()
    assert "canaries" not in render(report, as_markdown)
    page = render(report | {"canaries": 30}, as_markdown)
    assert "30 of N are canaries: made-up rows that are nobody's" in page


@pytest.mark.parametrize(
    ("sampling", "used", "counted"),
    [
        ("units", "at most 3 of them, drawn afresh, used in a step", "N = 500 persons, the"),
        ("rows", "at most 3 of them used", "N = 500, the"),
    ],
)
def test_the_guarantee_of_persons_is_for_persons(sampling, used, counted):
    report = whole_report(**PERSONS, unit_sampling=sampling)
    page = render(report, as_markdown)
    assert (
        "-differentially private for adding or removing one person, all rows of the train split "
        f"with the same value of user_id, {used}" in page
    )
    assert counted in page
    assert "the odds that the person was in the data" in page
    assert "several rows about one person" not in page
    assert "Several rows of one person" not in page
    assert "a person is what user_id tells apart" in page
    assert report["rows_of_one_person"] == []
    drawn = {"units": "person", "rows": "example"}[sampling]
    assert report["sampler"].startswith(f"Poisson: every {drawn} independently")


def test_known_noise_gives_no_epsilon():
    report = build_report(small_plan(), steps_taken=3, steps_recorded=3, insecure=True)
    assert report["guarantee"] is False
    assert report["epsilon"]["upper"] is None
    assert report["covered"] == []
    assert "NO PRIVACY GUARANTEE" in render(report, as_markdown)


# ---------------------------------------------------------------------------------- the ledger


@pytest.fixture
def ledger_file(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, small_plan())
    for step in range(1, 6):
        ledger.record_step(step)
    ledger.close()
    return path


def reopen(path, plan=None):
    return Ledger(path, plan or small_plan())


def test_a_ledger_counts_steps_across_process_starts(ledger_file):
    ledger = reopen(ledger_file)
    assert ledger.steps_recorded == 5
    ledger.record_step(6)
    assert reopen(ledger_file).steps_recorded == 6
    assert read_plan(ledger_file) == small_plan()


def test_a_torn_last_line_is_a_step_not_taken(ledger_file):
    whole = ledger_file.read_bytes()
    ledger_file.write_bytes(whole[:-9])
    ledger = reopen(ledger_file)
    assert ledger.steps_recorded == 4
    ledger.record_step(5)
    assert ledger_file.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:2], *lines[3:]],  # a line dropped from the middle
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],  # two lines swapped
        lambda lines: [*lines[:2], lines[2].replace('"step": 2', '"step": 9'), *lines[3:]],
        lambda lines: (
            [lines[0].replace('"noise_multiplier": 1.0', '"noise_multiplier": 2.0')] + lines[1:]
        ),
        lambda lines: lines + lines[-1:],  # a line repeated
        lambda lines: lines[1:],  # without the plan
    ],
)
def test_an_edited_ledger_is_refused(ledger_file, damage):
    lines = ledger_file.read_text().splitlines(keepends=True)
    damaged = damage(lines)
    assert damaged != lines
    ledger_file.write_text("".join(damaged))
    with pytest.raises(UsageError, match="edited or mixed"):
        reopen(ledger_file)


def test_a_line_of_another_run_of_the_same_plan_is_refused(ledger_file, tmp_path):
    other = Ledger(tmp_path / "other.jsonl", small_plan())
    for step in range(1, 7):
        other.record_step(step)
    last = (tmp_path / "other.jsonl").read_text().splitlines(keepends=True)[-1]
    ledger_file.write_text(ledger_file.read_text() + last)
    with pytest.raises(UsageError, match="edited or mixed"):
        reopen(ledger_file)


def test_a_truncated_or_foreign_ledger_does_not_fit_its_checkpoint(ledger_file, tmp_path):
    head = reopen(ledger_file).head
    reopen(ledger_file).require_head(head)
    lines = ledger_file.read_text().splitlines(keepends=True)
    ledger_file.write_text("".join(lines[:-1]))
    with pytest.raises(UsageError, match="truncated"):
        reopen(ledger_file).require_head(head)
    other = Ledger(tmp_path / "other.jsonl", small_plan())
    for step in range(1, 9):
        other.record_step(step)
    with pytest.raises(UsageError, match="another run's"):
        other.require_head(head)


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_multiplier", 0.9), ("clip_norm", 2.0), ("num_examples", 999), ("delta", 1e-7),
     ("steps", 99), ("expected_batch_size", 11), ("clip_function", "automatic")],
)  # fmt: skip
def test_another_plan_is_refused_naming_the_field(ledger_file, field, value):
    with pytest.raises(UsageError, match=f"privacy plan has {field}"):
        reopen(ledger_file, dataclasses.replace(small_plan(), **{field: value}))


def test_a_plan_from_before_there_were_units_loads_and_is_the_same(tmp_path):
    old = {"num_examples": 500, "expected_batch_size": 10, "steps": 20, "clip_norm": 1.0,
           "clip_function": "flat", "loss_normalization": "tokens", "noise_multiplier": 1.0,
           "delta": 1e-05, "target_epsilon": 2.0, "reserved_histogram_sigma": None,
           "neighbouring_relation": "add_or_remove_one", "sampler": "poisson"}  # fmt: skip
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"kind": "plan", "plan": old}) + "\n")
    plan = read_plan(tmp_path / "ledger.jsonl")
    plan.require_same(small_plan(), "there")
    assert plan == small_plan()
    # Of the release that had no units.
    assert plan.digest() == "4653f71a3a21e199b9cc8b220de6e722c88cd92b77ce88943676fc4b2ee52dcd"


@pytest.mark.parametrize(
    ("field", "value"),
    [("unit_column", "author"), ("max_rows_per_unit", 2), ("unit_sampling", "rows")],
)
def test_another_unit_is_another_plan(field, value):
    plan = small_plan(**PERSONS, unit_sampling="units")
    other = dataclasses.replace(plan, **{field: value})
    assert other.digest() != plan.digest()
    with pytest.raises(UsageError, match=f"privacy plan has {field}"):
        other.require_same(plan, "there")


def test_drawing_persons_costs_what_drawing_rows_does_and_drawing_their_rows_costs_more():
    (alone,), (drawn,), (rows,) = (
        small_plan(**unit).events(20)
        for unit in ({}, PERSONS | {"unit_sampling": "units"}, PERSONS | {"unit_sampling": "rows"})
    )
    assert drawn == alone
    assert rows == dataclasses.replace(alone, rows_per_unit=3)


def test_the_plan_of_persons_counts_persons():
    plan, _ = plan_of(settings(**PERSONS), 5000)
    assert plan == dataclasses.replace(
        plan_of(settings(), 5000)[0], **PERSONS, unit_sampling="units"
    )
    with pytest.raises(UsageError, match="--total_bs 64 exceeds the 63 values of user_id of x"):
        plan_of(settings(**PERSONS), 63)


def test_the_plan_of_rows_of_persons_is_calibrated_below_its_target():
    plan, _ = plan_of(settings(**PERSONS, unit_sampling="rows", reserve_histogram_sigma=10.0), 5000)
    spent = compute_epsilon(plan.events(plan.steps) + plan.reserved, 1e-5).upper
    assert 7.9 < spent <= 8.0
    assert plan.noise_multiplier > 1.3 * plan_of(settings(), 5000)[0].noise_multiplier
    with pytest.raises(UsageError, match="gives epsilon .* above --eps 8"):
        plan_of(settings(**PERSONS, unit_sampling="rows", noise_multiplier=0.7), 5000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit_column": "user_id"}, "--unit_column user_id needs --max_rows_per_unit"),
        ({"max_rows_per_unit": 3}, "--max_rows_per_unit needs --unit_column"),
        (
            PERSONS | {"max_rows_per_unit": 257, "unit_sampling": "rows"},
            "--max_rows_per_unit 257 with --unit_sampling rows is more than 256",
        ),
        ({"unit_sampling": "rows"}, "--unit_sampling needs --unit_column"),
        ({"num_train_units": 3}, "--num_train_units needs --unit_column"),
        ({"owner": "first"}, "--owner needs --unit_column"),
        ({"unowned_rows_are_units": True}, "--unowned_rows_are_units needs --unit_column"),
        (PERSONS | {"eps": -1, "clip": -1}, "--unit_column needs --eps"),
    ],
)
def test_half_a_unit_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        check_training_settings(settings(**changes))


def test_no_rows_of_a_person_are_no_cap(capsys):
    with pytest.raises(SystemExit):
        read_flags(TrainingSettings, None, ["--max_rows_per_unit=0"])
    assert "--max_rows_per_unit: '0' is not a whole number of 1 or more" in capsys.readouterr().err


def test_the_digest_sees_every_field():
    plan = small_plan()
    for field in dataclasses.fields(plan):
        value = (0.8, 0.6) if field.name == "band_coefficients" else "changed"
        changed = dataclasses.replace(plan, **{field.name: value})
        assert changed.digest() != plan.digest(), field.name


def test_a_plan_with_bands_counts_a_unit_in_one_of_so_many_steps():
    plan, _ = plan_of(settings(noise="banded", bands=4, num_epochs=2.5), 256)
    assert (plan.steps, plan.bands, plan.sampling_rate) == (10, 4, 64 / 256)
    (event,) = plan.events(plan.participations(range(plan.steps)))
    assert (event.sampling_rate, event.steps) == (1.0, 3)
    assert 7.9 < compute_epsilon([event], 1e-5).upper <= 8.0
    # Counted as often as it may be: fewer would be claimed too low.
    assert compute_epsilon(plan.events(2), 1e-5).upper < 7
    given = settings(noise="banded", num_epochs=2.5, noise_multiplier=plan.noise_multiplier)
    assert plan_of(given, 256, plan.band_coefficients)[0] == plan
    with pytest.raises(UsageError, match="gives epsilon .* in 10 steps, above --eps 8"):
        plan_of(dataclasses.replace(given, noise_multiplier=0.9), 256, plan.band_coefficients)


def test_a_report_of_correlated_noise_says_how_to_account_for_it(tmp_path):
    plan = small_plan(num_examples=30, band_coefficients=(0.8, 0.5, 0.3))
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, plan)
    assert read_plan(path) == plan
    for step in [*range(1, 9), *range(5, 21)]:  # four were lost in a crash
        ledger.record_step(step)
    ledger.require_unchanged()
    times = plan.participations(ledger.steps)
    assert times == 9
    report = build_report(plan, steps_taken=20, steps_recorded=24, participations=times)
    assert report["epsilon"]["upper"] == compute_epsilon(plan.events(9), 1e-5).upper
    assert report["epsilon_without_lost_steps"]["upper"] == (
        compute_epsilon(plan.events(7), 1e-5).upper
    )
    assert (report["bands"], report["participations"]) == (3, 9)
    assert report["band_coefficients"] == (0.8, 0.5, 0.3)
    assert "of one group in turn of 3" in report["sampler"]
    page = render(report, as_markdown)
    assert "Noise of 3 bands is correlated over steps" in page
    assert "epsilon counts one step in 3, at 3 times the sampling rate" in page
    # Nothing is said of it where there is none, and every step counts where nothing else is known.
    assert "bands" not in build_report(small_plan(), steps_taken=20, steps_recorded=20)
    most = build_report(plan, steps_taken=20, steps_recorded=24)["epsilon"]["upper"]
    assert most == compute_epsilon(plan.events(24), 1e-5).upper


def test_rows_of_one_person_in_several_groups_have_a_share_of_the_noise_each():
    plan = small_plan(num_examples=30, band_coefficients=(0.8, 0.5, 0.3))
    report = build_report(plan, steps_taken=20, steps_recorded=20, participations=7)
    rows = {each["rows"]: each["epsilon"] for each in report["rows_of_one_person"]}
    assert rows[1] == report["epsilon"]["upper"]
    # Without sampling it is what all in one group cost, and with it a little more.
    assert rows == pytest.approx(group_epsilons(plan.events(7), 1e-5))
    sampled = small_plan(band_coefficients=(0.8, 0.5, 0.3)).events(7)
    (apart, together) = (group_epsilons(sampled, 1e-5, (2,), each)[2] for each in (True, False))
    assert together < apart < 2 * together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bands": 4}, "--bands 4 needs --noise banded"),
        ({"noise": "banded", "bands": 79}, "--bands 79: at most 78, for 234 steps"),
        (
            PERSONS | {"noise": "banded", "unit_sampling": "rows"},
            "--noise banded with --unit_sampling rows and --max_rows_per_unit 3",
        ),
        ({"noise": "banded", "eps": -1, "clip": -1}, "--noise needs --eps"),
    ],
)
def test_bands_that_mean_nothing_are_refused(changes, message):
    def plan(asked):
        check_training_settings(asked)
        plan_of(asked, 5000)

    with pytest.raises(UsageError, match=message):
        plan(settings(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"band_coefficients": [0.8, 0.7]}, "squares add up to 1 at most"),
        ({"band_coefficients": [0.1] * 21}, "--bands 21: at most 20"),
        ({"band_coefficients": [0.1] * 9, "num_examples": 80}, "--bands 9: at most 8"),
        (
            PERSONS | {"band_coefficients": [0.8, 0.6], "unit_sampling": "rows"},
            "rows of a unit may be of several groups",
        ),
    ],
)
def test_no_plan_has_correlated_noise_that_its_events_do_not_account_for(changes, message):
    with pytest.raises(UsageError, match=message):
        small_plan(**changes)


@pytest.mark.parametrize("given", [[], ["--eps=abc"], ["--eps="]])
def test_privacy_or_none_is_never_assumed(given, capsys):
    with pytest.raises(SystemExit) as ended:
        read_flags(TrainingSettings, None, ["--job_sess=a", *given])
    assert ended.value.code == 2
    assert "--eps" in capsys.readouterr().err


def test_an_example_loss_is_the_mean_over_its_own_tokens():
    assert settings().loss_normalization == "tokens"
