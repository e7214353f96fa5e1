"""The composed report of a run and histograms of the same data."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from matplotlib.axes import Axes

from privacy_checks import composition, report
from utils.cli import UsageError, run_cli
from utils.files import write_json
from utils.models.adapter_info import adapter_sha256
from utils.privacy.accounting import (
    ADD_REMOVE,
    REPLACE,
    SampledGaussian,
    compute_delta,
    compute_epsilon,
    group_epsilons,
)
from utils.privacy.guarantee import (
    as_markdown,
    build_report,
    claim,
    promise,
    render,
    rounded_up,
    write_report,
)
from utils.privacy.ledger import (
    ADAPTER,
    HISTOGRAM,
    LEDGER_FILE,
    Ledger,
    head_file,
    read_ledger,
    record_histogram,
)
from utils.privacy.plan import PrivacyPlan
from utils.runs.run_folder import model_card

PLAN = PrivacyPlan(
    num_examples=500, expected_batch_size=10, steps=20, clip_norm=1.0, clip_function="flat",
    loss_normalization="tokens", noise_multiplier=1.0, delta=1e-5, target_epsilon=2.0,
)  # fmt: skip
TRAINING = SampledGaussian(10 / 500, 1.0, 20)
ARGUMENTS = {"eps": 2.0, "insecure_fixed_noise_seed": None}


def make_run(
    folder: Path, recorded=range(1, 21), *, checkpoints=(20,), own_report=True, plan=None
) -> Path:
    """The public part of a run's folder, as `train.py` leaves it; of `PLAN` if none is given."""
    plan = plan or PLAN
    write_json(folder / "run_config.json", {"arguments": ARGUMENTS})
    ledger = Ledger(folder / LEDGER_FILE, plan)
    for step in recorded:
        ledger.record_step(step)
        if step in checkpoints:
            state = {"ledger": ledger.head, "step": step}
            write_json(folder / "checkpoints" / f"step-{step:06d}" / "state.json", state)
    if own_report:
        write_json(folder / "adapter" / "adapter_config.json", {"r": 8})
        # Unlike those of other runs, as weights are.
        write_json(folder / "adapter" / "adapter_model.safetensors", str(folder))
        ledger.record_adapter(adapter_sha256(folder / "adapter"))
        own = build_report(
            plan,
            steps_taken=step,
            steps_recorded=ledger.steps_recorded,
            participations=plan.participations(ledger.steps),
            ledger_head=ledger.head,
        )
        write_report(folder, own | {"adapter_sha256": ledger.adapter})
    ledger.close()
    return folder


def test_a_run_that_was_stopped_right_after_it_went_on_is_read(tmp_path):
    """Its ledger ends with steps that a crash lost: the model has those of its checkpoint."""
    folder = make_run(tmp_path / "job", range(1, 16), checkpoints=(10,), own_report=False)
    records = read_ledger(folder / LEDGER_FILE)
    head = {"lines": len(records), "chain": records[-1]["chain"]}
    own = build_report(PLAN, steps_taken=10, steps_recorded=15, ledger_head=head)
    write_report(folder, own)
    composed = report.composed_report(folder)
    assert (composed["steps_taken"], composed["steps_lost"]) == (10, 5)
    # Nor may a report say that fewer are lost, or that another step is the model's.
    for change in ({"steps_lost": 0}, {"steps_taken": 5}):
        write_json(folder / "privacy_report.json", own | change)
        with pytest.raises(UsageError, match="which .* does not"):
            report.composed_report(folder)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "job")


@pytest.fixture
def histogram(tmp_path):
    path = tmp_path / "histogram.jsonl"
    record_histogram(path, num_examples=500, noise_multiplier=10.0, num_bins=1000)
    return path


# ---------------------------------------------------------------- what is composed


def test_training_alone_costs_what_its_own_report_says(run):
    composed = report.composed_report(run)
    own = json.loads((run / "privacy_report.json").read_text())
    assert composed["epsilon"][ADD_REMOVE]["upper"] == own["epsilon"]["upper"]
    assert composed["steps_taken"] == 20
    assert composed["steps_lost"] == 0
    assert composed["epsilon_without_lost_steps"] is None


def test_histograms_compose_in_one_accountant(run, histogram, tmp_path):
    second = tmp_path / "second.jsonl"
    record_histogram(second, num_examples=500, noise_multiplier=5.0, num_bins=10)
    record_histogram(second, num_examples=500, noise_multiplier=5.0, num_bins=10)
    events = [TRAINING, SampledGaussian(1.0, 10.0, 1), SampledGaussian(1.0, 5.0, 2)]
    composed = report.composed_report(run, [histogram, second])
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-5).upper
    assert composed["delta_at_epsilon"][ADD_REMOVE] == {
        "epsilon": 2.0, "delta": compute_delta(events, 2.0),
    }  # fmt: skip
    assert len(composed["covered"]) == len(report.composed_report(run)["covered"]) + 3


def test_the_curve_is_evaluated_where_it_is_asked_for(run):
    composed = report.composed_report(run, [], 1e-6, 1.5, (ADD_REMOVE, REPLACE))
    for relation in (ADD_REMOVE, REPLACE):
        expected = compute_epsilon([TRAINING], 1e-6, relation).upper
        assert composed["epsilon"][relation]["upper"] == expected
        assert composed["delta_at_epsilon"][relation]["delta"] == compute_delta(
            [TRAINING], 1.5, relation
        )
        others = composed["epsilon_at_other_deltas"][relation]
        assert [point["delta"] for point in others] == pytest.approx([1e-5, 1e-7, 1e-8])
        epsilons = [point["epsilon"] for point in others]
        assert epsilons[0] < expected < epsilons[1] < epsilons[2]
    assert composed["epsilon"][REPLACE]["upper"] > 1.05 * composed["epsilon"][ADD_REMOVE]["upper"]


def test_lost_steps_are_composed_apart(tmp_path):
    run = make_run(tmp_path / "job", [*range(1, 6), *range(4, 21)])
    composed = report.composed_report(run)
    assert (composed["steps_taken"], composed["steps_lost"]) == (20, 2)
    unseen = composed["epsilon_without_lost_steps"][ADD_REMOVE]["upper"]
    assert unseen == compute_epsilon([TRAINING], 1e-5).upper
    every = compute_epsilon([SampledGaussian(10 / 500, 1.0, 22)], 1e-5).upper
    assert composed["epsilon"][ADD_REMOVE]["upper"] == every
    assert f"if nobody saw one, it is {rounded_up(unseen)}" in report.render(
        composed, report.as_text
    )
    own = json.loads((run / "privacy_report.json").read_text())
    assert own["epsilon"]["upper"] == every
    # The claim that lost steps were never seen is not the headline's.
    write_json(run / "privacy_report.json", own | {"epsilon": own["epsilon"] | {"upper": unseen}})
    with (
        mock.patch.object(composition, "CLAIM_TOLERANCE", 1e-3),
        pytest.raises(UsageError, match="the report was edited"),
    ):
        report.composed_report(run)
    # A report of an earlier version claimed that.
    del own["epsilon_without_lost_steps"]
    write_json(run / "privacy_report.json", own | {"epsilon": own["epsilon"] | {"upper": unseen}})
    with mock.patch.object(composition, "CLAIM_TOLERANCE", 1e-3):
        assert report.composed_report(run)["epsilon"][ADD_REMOVE]["upper"] == every


def test_rows_of_one_person_are_composed_with_histograms(run, histogram):
    composed = report.composed_report(run, [histogram])
    events = [TRAINING, SampledGaussian(1.0, 10.0, 1)]
    found = {each["rows"]: each["epsilon"] for each in composed["rows_of_one_person"]}
    assert found == group_epsilons(events, 1e-5)
    assert f"10  {rounded_up(found[10], '.2f')}" in re.sub(
        " +", "  ", report.render(composed, report.as_text)
    )


def test_the_composed_guarantee_of_persons(tmp_path, histogram):
    unit = {"unit_column": "user_id", "max_rows_per_unit": 3, "unit_sampling": "rows"}
    plan = PrivacyPlan(**(vars(PLAN) | unit))
    persons = make_run(tmp_path / "persons", plan=plan)
    composed = report.composed_report(persons)
    spent = compute_epsilon([replace(TRAINING, rows_per_unit=3)], 1e-5).upper
    assert composed["epsilon"][ADD_REMOVE]["upper"] == spent
    assert composed["unit"].startswith("one person: all rows")
    assert composed["rows_of_one_person"] == []
    with pytest.raises(UsageError, match="the unit of .*persons is one person.*leave --histogram"):
        report.composed_report(persons, [histogram])
    with pytest.raises(UsageError, match="the unit of .* is one person.*, and of .*rows one exam"):
        report.composed_report([persons, make_run(tmp_path / "rows")])


def test_a_run_that_crashed_counts_the_steps_of_its_last_checkpoint(tmp_path):
    run = make_run(tmp_path / "job", range(1, 10), checkpoints=(3, 6), own_report=False)
    composed = report.composed_report(run)
    assert (composed["steps_taken"], composed["steps_lost"]) == (6, 3)
    assert "14 of 20 planned steps are not taken" in report.render(composed, report.as_text)


def test_what_checkpoints_knew_is_checked_and_said_once(tmp_path):
    run = make_run(tmp_path / "job", range(1, 10), checkpoints=(3, 6, 9))
    checks = report.composed_report(run)["checks"]
    assert [each for each in checks if "checkpoint" in each] == [
        "privacy_ledger.jsonl continues what 3 checkpoint(s) knew of it"
    ]
    assert "privacy_ledger.jsonl continues what privacy_report.json knew of it" in checks


def test_without_anything_to_compare_with_every_step_counts_as_released(tmp_path):
    run = make_run(tmp_path / "job", range(1, 10), checkpoints=(), own_report=False)
    composed = report.composed_report(run)
    assert (composed["steps_taken"], composed["steps_lost"]) == (9, 0)
    assert "would not be noticed" in composed["checks"][-1]


def test_what_is_reserved_and_not_named_is_named_as_not_covered(tmp_path, histogram, monkeypatch):
    without, reserved = PLAN, PrivacyPlan(**(vars(PLAN) | {"reserved_histogram_sigma": 10.0}))
    monkeypatch.setattr(f"{__name__}.PLAN", reserved)
    run = make_run(tmp_path / "job")
    assert "sigma 10" in report.composed_report(run)["not_covered"][-1]
    assert "sigma 10" not in report.composed_report(run, [histogram])["not_covered"][-1]
    other = make_run(tmp_path / "other", plan=without)
    assert f"the target of {run} also" in report.composed_report([run, other])["not_covered"][-1]


# ---------------------------------------------------------------- several runs

PAIRS_PLAN = PrivacyPlan(
    **(vars(PLAN) | {"num_examples": 400, "noise_multiplier": 0.9, "clip_norm": 0.5, "steps": 25})
)
PAIRS = SampledGaussian(10 / 400, 0.9, 25)


@pytest.fixture
def pairs(tmp_path):
    """Another run, on other rows of other number."""
    return make_run(tmp_path / "pairs", range(1, 26), checkpoints=(25,), plan=PAIRS_PLAN)


def test_runs_and_histograms_compose_in_one_accountant(run, pairs, histogram, tmp_path):
    other = tmp_path / "pairs_histogram.jsonl"
    record_histogram(other, num_examples=400, noise_multiplier=12.0, num_bins=10)
    events = [TRAINING, PAIRS, SampledGaussian(1.0, 10.0, 1), SampledGaussian(1.0, 12.0, 1)]
    composed = report.composed_report([run, pairs], [histogram, other])
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-5).upper
    assert composed["delta_at_epsilon"][ADD_REMOVE] == {
        "epsilon": 2.0, "delta": compute_delta(events, 2.0),
    }  # fmt: skip
    alone = [report.composed_report(each)["epsilon"][ADD_REMOVE]["upper"] for each in (run, pairs)]
    # Above what each costs, and below their sum, which one accountant need not pay.
    assert max(alone) * 1.05 < composed["epsilon"][ADD_REMOVE]["upper"] < sum(alone) * 0.95
    assert composed["steps_taken"] == 45
    assert [entry["num_examples"] for entry in composed["runs"]] == [500, 400]


@pytest.mark.usefixtures("short_curves")
def test_a_page_of_several_runs_names_each_of_them(run, pairs, capsys, tmp_path):
    out = tmp_path / "out"
    assert report.main([str(run), str(pairs), "--output", str(out)]) == 0
    told = capsys.readouterr().out
    epsilon = compute_epsilon([TRAINING, PAIRS], 1e-5).upper
    assert (
        f"{run} and {pairs} are together ({rounded_up(epsilon)}, 1e-05)-differentially private"
        in told
    )
    assert "N = 500 and 400" in told
    assert "clip norm 1 and 0.5" in told
    assert "upper bound" in told
    for each in (run, pairs):
        assert f"training of {each}, all steps on record" in told
        assert f"{each}: privacy_ledger.jsonl: the hash chain" in told
    curve = json.loads((out / "composed_report.json").read_text())["epsilon_over_steps"]
    assert (curve[0], curve[-1]["step"]) == ({"step": 0, "epsilon": 0.0}, 45)
    assert curve[-1]["epsilon"] == pytest.approx(epsilon, abs=0.02)
    assert (out / "epsilon_over_steps.png").exists()


def test_the_curve_takes_the_runs_one_after_the_other(run, pairs):
    composed = report.composed_report([pairs, run])
    points = {point["step"]: point["epsilon"] for point in report.epsilon_over_steps(composed, 10)}
    first = report.epsilon_over_steps(report.composed_report(pairs), 2)[1]
    assert points[25] == pytest.approx(first["epsilon"], rel=1e-6)
    assert points[30] > points[25]


def test_the_curve_shows_which_run_is_which(run, pairs):
    composed = report.composed_report([pairs, run])
    curves = composition.curve_by_run(composed, report.epsilon_over_steps(composed, 4))
    assert list(curves) == [str(pairs), str(run)]
    (first, second) = curves.values()
    assert (first[0][0], first[-1][0]) == (0, 25)
    # One run after the other: where the first ends the second begins.
    assert (first[-1], second[-1][0]) == (second[0], 45)
    composed |= {"epsilon_over_steps": report.epsilon_over_steps(composed)}
    with mock.patch("matplotlib.axes.Axes.plot", autospec=True, side_effect=Axes.plot) as drawn:
        report.plot(composed)
    labels = {call.kwargs["label"]: call.kwargs["marker"] for call in drawn.mock_calls}
    assert list(labels) == [str(pairs), str(run)]
    assert len(set(labels.values())) == 2


# All of one group of four in a step: closed forms alone.
BANDED = PrivacyPlan(
    **vars(PLAN) | {"expected_batch_size": 125, "band_coefficients": (0.8, 0.4, 0.3, 0.2)}
)


def test_correlated_noise_composes_with_a_histogram_by_what_a_row_takes_part_in(
    tmp_path, histogram
):
    folder = make_run(tmp_path / "banded", plan=BANDED)
    composed = report.composed_report(folder, [histogram])
    (training, _) = composed["mechanisms"]
    assert (training["sampling_rate"], training["times"], training["steps"]) == (1.0, 5, 20)
    events = [SampledGaussian(1.0, 1.0, 5), SampledGaussian(1.0, 10.0, 1)]
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-5).upper
    assert "Noise of 4 bands is correlated over steps" in render(composed, as_markdown)
    with pytest.raises(UsageError, match="no accountant has it for the noise of 4 bands"):
        report.composed_report(folder, relations=(ADD_REMOVE, REPLACE))
    curve = {each["step"]: each["epsilon"] for each in report.epsilon_over_steps(composed, 21)}
    assert list(curve) == list(range(21))
    one = [SampledGaussian(1.0, 1.0, 1), SampledGaussian(1.0, 10.0, 1)]
    assert curve[1] == curve[4] == compute_epsilon(one, 1e-5).upper < curve[5]
    assert curve[20] == composed["epsilon"][ADD_REMOVE]["upper"]
    assert composition.curve_by_run(composed, [{"step": 20, "epsilon": 1.0}]) == {
        str(folder): [(20, 1.0)]
    }


def test_what_is_printed_of_a_bound_is_one(run):
    """A claim of 5.889 would be less than an epsilon of 5.88949."""
    own = json.loads((run / "privacy_report.json").read_text())
    own["epsilon"] = own["epsilon"] | {"upper": 5.88949}
    assert claim(own).startswith("(5.890, 1e-05)-differentially private for")
    assert [rounded_up(bound) for bound in (5.88949, 5.875, 7.0)] == ["5.890", "5.875", "7.000"]
    assert rounded_up(5.00001e-7, ".3g") == "5.01e-7"


def test_lost_steps_count_for_their_group_and_a_claim_that_leaves_them_out_is_refused(tmp_path):
    lost = [*range(1, 6), *range(5, 21)]  # the fifth was taken twice
    folder = make_run(tmp_path / "banded", lost, plan=BANDED)
    composed = report.composed_report(folder)
    assert [entry["times"] for entry in composed["mechanisms"]] == [6]
    without = composed["epsilon_without_lost_steps"][ADD_REMOVE]["upper"]
    assert without == compute_epsilon([SampledGaussian(1.0, 1.0, 5)], 1e-5).upper
    curve = report.epsilon_over_steps(composed, 22)
    spent = [compute_epsilon([SampledGaussian(1.0, 1.0, n)], 1e-5).upper for n in (2, 6, 6)]
    assert [curve[step]["epsilon"] for step in (2, 6, 21)] == spent
    own = json.loads((folder / "privacy_report.json").read_text())
    own["epsilon"]["upper"] = without
    write_json(folder / "privacy_report.json", own)
    with pytest.raises(UsageError, match="the report was edited"):
        report.composed_report(folder)


def test_lost_steps_of_every_run_are_composed_apart(run, tmp_path):
    lost = [*range(1, 6), *range(4, 26)]
    other = make_run(tmp_path / "lost", lost, checkpoints=(25,), plan=PAIRS_PLAN)
    composed = report.composed_report([run, other])
    assert composed["steps_lost"] == 2
    events = [TRAINING, SampledGaussian(10 / 400, 0.9, 27)]
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-5).upper
    unseen = composed["epsilon_without_lost_steps"][ADD_REMOVE]["upper"]
    assert unseen == compute_epsilon([TRAINING, PAIRS], 1e-5).upper


def test_deltas_that_differ_need_one_that_is_given(run, tmp_path, capsys):
    plan = PrivacyPlan(**(vars(PAIRS_PLAN) | {"delta": 1e-6}))
    other = make_run(tmp_path / "other", range(1, 26), checkpoints=(25,), plan=plan)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: report.main([str(run), str(other)]))
    assert ended.value.code == 2
    assert (
        "deltas 1e-06 and 1e-05, and a guarantee has one; give --delta" in capsys.readouterr().err
    )
    composed = report.composed_report([run, other], delta=1e-5)
    assert (
        composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon([TRAINING, PAIRS], 1e-5).upper
    )


def test_a_histogram_of_none_of_the_datasets_is_refused(run, pairs, tmp_path):
    path = tmp_path / "other.jsonl"
    record_histogram(path, num_examples=501, noise_multiplier=10.0, num_bins=10)
    with pytest.raises(UsageError, match="501 examples, the runs' have 500 and 400"):
        report.composed_report([run, pairs], [path])


def test_a_run_counts_once(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    for again in (run, tmp_path / "copy"):
        with pytest.raises(UsageError, match="hold the same run; name it once"):
            report.composed_report([run, again])


@pytest.mark.parametrize("position", [0, 1])
def test_one_run_without_a_guarantee_forfeits_it_for_all(run, pairs, position):
    runs = [run, pairs]
    write_json(runs[position] / "run_config.json", {"arguments": ARGUMENTS | {"eps": -1}})
    composed = report.composed_report(runs)
    assert composed["guarantee"] is False
    assert composed["run"] == str(runs[position])


@pytest.mark.parametrize("position", [0, 1])
def test_the_claim_of_every_run_is_examined(run, pairs, position):
    file = [run, pairs][position] / "privacy_report.json"
    write_json(file, json.loads(file.read_text()) | {"epsilon": {"upper": 0.1}})
    with pytest.raises(UsageError, match="claims epsilon 0.1"):
        report.composed_report([run, pairs])


# ---------------------------------------------------------------- what is refused


def damaged(lines: list[str], damage: str) -> list[str]:
    if damage == "edited":
        return [lines[0].replace('"noise_multiplier": 1.0', '"noise_multiplier": 2.0'), *lines[1:]]
    if damage == "truncated":
        return lines[:-1]
    return [*lines[:4], *lines[5:]]


@pytest.mark.parametrize(
    ("damage", "message"), [("edited", "edited"), ("truncated", "truncated"), ("thinned", "edited")]
)
def test_a_damaged_ledger_is_refused(run, damage, message):
    lines = (run / LEDGER_FILE).read_text().splitlines(keepends=True)
    (run / LEDGER_FILE).write_text("".join(damaged(lines, damage)))
    with pytest.raises(UsageError, match=message):
        report.composed_report(run)


def test_a_truncated_ledger_shows_against_a_checkpoint_alone(tmp_path):
    run = make_run(tmp_path / "job", range(1, 10), checkpoints=(6,), own_report=False)
    lines = (run / LEDGER_FILE).read_text().splitlines(keepends=True)
    (run / LEDGER_FILE).write_text("".join(lines[:6]))
    with pytest.raises(UsageError, match="truncated"):
        report.composed_report(run)


def test_the_ledger_of_another_run_of_the_same_plan_is_refused(run, tmp_path):
    other = make_run(tmp_path / "other")
    shutil.copy(other / LEDGER_FILE, run / LEDGER_FILE)
    with pytest.raises(UsageError, match="another run's"):
        report.composed_report(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps_taken": 5}, "counts 5 steps"),
        ({"epsilon": {"upper": 0.1}}, "claims epsilon 0.1, but its ledger gives"),
        ({"plan_hash": "0" * 64}, "another plan"),
    ],
)
def test_an_edited_report_of_the_run_is_refused(run, change, message):
    file = run / "privacy_report.json"
    write_json(file, json.loads(file.read_text()) | change)
    with pytest.raises(UsageError, match=message):
        report.composed_report(run)


def test_an_adapter_next_to_another_runs_report_is_refused(run, pairs):
    shutil.rmtree(run / "adapter")
    shutil.copytree(pairs / "adapter", run / "adapter")
    with pytest.raises(UsageError, match=r"job/adapter is another adapter .* restore the run's"):
        report.composed_report(run)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors is missing"):
        report.composed_report(run)


def test_a_report_that_names_another_adapter_than_the_ledger_is_refused(run):
    file = run / "privacy_report.json"
    write_json(run / "adapter" / "adapter_config.json", {"r": 9})
    other = {"adapter_sha256": adapter_sha256(run / "adapter")}
    write_json(file, json.loads(file.read_text()) | other)
    with pytest.raises(UsageError, match="privacy_report.json is of the adapter .* the ledger of"):
        report.composed_report(run)


def test_a_card_without_a_guarantee_next_to_a_report_with_one_is_refused(run):
    own = json.loads((run / "privacy_report.json").read_text())
    card = run / "adapter" / "README.md"
    card.write_text(model_card("base", "vicuna", own, "adapter"))
    assert report.composed_report(run)["guarantee"] is True
    card.write_text(model_card("base", "vicuna", build_report(None), "adapter"))
    with pytest.raises(UsageError, match=r"README\.md says that there is no guarantee"):
        report.composed_report(run)


def test_a_copy_without_its_adapter_and_a_run_of_before_adapters_were_named_are_read(run):
    assert "nothing to compare" not in report.composed_report(run)["checks"][-1]
    file = run / "privacy_report.json"
    own = json.loads(file.read_text())
    shutil.move(run / "adapter", run.parent / "moved")
    assert report.composed_report(run)["checks"][-1].startswith("adapter: not here")
    shutil.move(run.parent / "moved", run / "adapter")
    lines = (run / LEDGER_FILE).read_text().splitlines(keepends=True)
    (run / LEDGER_FILE).write_text("".join(lines[:-1]))
    del own["adapter_sha256"]
    own["ledger"] = {"lines": 21, "chain": json.loads(lines[-2])["chain"]}
    write_json(file, own)
    assert "a version that named none" in report.composed_report(run)["checks"][-1]


def test_nothing_follows_the_adapter_in_a_ledger(run):
    assert read_ledger(run / LEDGER_FILE)[-1]["kind"] == ADAPTER
    text = (run / LEDGER_FILE).read_text()
    last = json.loads(text.splitlines()[-1])["chain"]
    for content in ({"kind": "step", "step": 21}, {"kind": ADAPTER, "adapter_sha256": "0" * 64}):
        chained = last + json.dumps(content, sort_keys=True)
        line = json.dumps(content | {"chain": hashlib.sha256(chained.encode()).hexdigest()})
        (run / LEDGER_FILE).write_text(text + line + "\n")
        with pytest.raises(UsageError, match="line 23: this ledger was edited or mixed"):
            read_ledger(run / LEDGER_FILE)
    (run / LEDGER_FILE).write_text(text)
    ledger = Ledger(run / LEDGER_FILE, PLAN)
    with pytest.raises(UsageError, match="ends with the adapter"):
        ledger.record_adapter("0" * 64)
    ledger.record_adapter(ledger.adapter)
    ledger.close()
    assert (run / LEDGER_FILE).read_text() == text


def test_reading_leaves_the_run_as_it_is(run, histogram):
    torn = (run / LEDGER_FILE).read_bytes() + b'{"kind": "st'
    (run / LEDGER_FILE).write_bytes(torn)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    report.composed_report(run, [histogram])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert (run / LEDGER_FILE).read_bytes() == torn


def test_a_histogram_of_another_dataset_is_refused(run, tmp_path):
    path = tmp_path / "other.jsonl"
    record_histogram(path, num_examples=501, noise_multiplier=10.0, num_bins=1000)
    with pytest.raises(UsageError, match="501 examples, the run's has 500"):
        report.composed_report(run, [path])


def person_plan(**changes):
    of_unit = {"unit_column": "person", "max_rows_per_unit": 8, "unit_sampling": "units"}
    return PrivacyPlan(**(vars(PLAN) | of_unit | changes))


def test_a_histogram_of_persons_composes_with_a_run_of_persons_and_the_report_says_so(tmp_path):
    run = make_run(tmp_path / "run", plan=person_plan())
    path = tmp_path / "persons.jsonl"
    record_histogram(
        path, num_examples=500, noise_multiplier=10.0, num_bins=10, unit_column="person"
    )
    composed = report.composed_report(run, [path])
    events = [TRAINING, SampledGaussian(1.0, 10.0, 1)]
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-5).upper
    person = "all rows of the train split with the same value of person, at most 8 of them"
    assert composed["unit"].startswith(f"one person: {person}")
    page = render(composed, as_markdown)
    assert f"private for adding or removing one person, {person}" in page
    assert "the unit is a row" not in page


def test_rows_and_persons_are_not_one_report(run, histogram, tmp_path):
    persons = make_run(tmp_path / "persons", plan=person_plan())
    path = tmp_path / "persons.jsonl"
    record_histogram(
        path, num_examples=500, noise_multiplier=10.0, num_bins=10, unit_column="person"
    )
    with pytest.raises(UsageError, match="job is one example: .* of 500 units of 'person': leav"):
        report.composed_report(run, [path])
    with pytest.raises(UsageError, match="persons is one person: .* is of 500 examples: leave"):
        report.composed_report(persons, [histogram])


def test_a_row_of_several_owners_is_of_the_one_who_counts_in_every_ledger(tmp_path):
    run = make_run(tmp_path / "run", plan=person_plan(owner="first"))
    facts = {"num_examples": 500, "noise_multiplier": 10.0, "num_bins": 10, "unit_column": "person"}
    record_histogram(tmp_path / "first.jsonl", **facts, owner="first")
    composed = report.composed_report(run, [tmp_path / "first.jsonl"])
    assert "value of person, of which the first counts, at most 8" in composed["unit"]
    record_histogram(tmp_path / "last.jsonl", **facts, owner="last")
    with pytest.raises(UsageError, match="of 500 units of 'person' .last owner.: leave"):
        report.composed_report(run, [tmp_path / "last.jsonl"])


def test_what_is_true_of_one_run_alone_names_it(run, tmp_path):
    banded = make_run(tmp_path / "banded", plan=BANDED)
    write_json(run / "run_config.json", {"arguments": ARGUMENTS | {"num_canaries": 7}})
    own = json.loads((banded / "privacy_report.json").read_text())
    write_json(banded / "privacy_report.json", own | {"numerics": "exact"})
    together, alone = (promise(report.composed_report(runs)) for runs in ([run, banded], [banded]))
    for named, words in ((banded, "Noise of 4 bands is"), (run, "7 of N are canaries"),
                         (banded, "Numerics: exact"), (run, "Numerics: not probed")):  # fmt: skip
        (line,) = [line for line in together if words in line]
        assert line.startswith(f"{named}: {words}")
    assert sum(line.startswith(("Noise of 4 bands is", "Numerics: exact")) for line in alone) == 2


def test_runs_that_use_another_number_of_a_persons_rows_compose(tmp_path):
    """The neighbours are the same: all rows of one person."""
    runs = [
        make_run(tmp_path / f"of{rows}", plan=person_plan(max_rows_per_unit=rows, unit_sampling=by))
        for rows, by in ((8, "units"), (3, "rows"))
    ]
    composed = report.composed_report(runs)
    events = [TRAINING, replace(TRAINING, rows_per_unit=3)]
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-5).upper
    assert composed["unit"].endswith("all rows of the train split with the same value of person")
    assert [run["max_rows_per_unit"] for run in composed["runs"]] == [8, 3]
    assert "N = 500 persons and 500 rows, the sampling rate" in render(composed, as_markdown)


def test_a_run_that_draws_rows_of_persons_does_not_know_how_many_there_are(tmp_path):
    run = make_run(tmp_path / "run", plan=person_plan(unit_sampling="rows"))
    path = tmp_path / "persons.jsonl"
    record_histogram(
        path, num_examples=77, noise_multiplier=10.0, num_bins=10, unit_column="person"
    )
    assert len(report.composed_report(run, [path])["mechanisms"]) == 2


@pytest.mark.parametrize(
    "canaries",
    [
        {"num_canaries": 10, "canary_repeats": 3},
        {"num_canaries": 5, "canary_repeats": 2, "audit_canaries": 20},
    ],
)
def test_canaries_count_in_training_and_not_in_a_histogram(run, tmp_path, canaries):
    """They are rows of N that training alone reads; the event of training keeps all of N."""
    write_json(run / "run_config.json", {"arguments": ARGUMENTS | canaries})
    paths = {}
    for count in (470, 500):
        paths[count] = tmp_path / f"{count}.jsonl"
        record_histogram(paths[count], num_examples=count, noise_multiplier=10.0, num_bins=1000)
    composed = report.composed_report(run, [paths[470]])
    events = [TRAINING, SampledGaussian(1.0, 10.0, 1)]
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-5).upper
    assert "30 of N are canaries" in report.render(composed, report.as_text)
    with pytest.raises(UsageError, match="500 examples, the run's has 470"):
        report.composed_report(run, [paths[500]])


def test_a_histogram_is_counted_once(run, histogram, tmp_path):
    shutil.copy(histogram, tmp_path / "copy.jsonl")
    shutil.copy(head_file(histogram), head_file(tmp_path / "copy.jsonl"))
    for again in (histogram, tmp_path / "copy.jsonl"):
        with pytest.raises(UsageError, match="hold the same histogram"):
            report.composed_report(run, [histogram, again])


def test_an_edited_histogram_ledger_is_refused(run, histogram):
    histogram.write_text(histogram.read_text().replace("10.0", "99.0"))
    with pytest.raises(UsageError, match="edited"):
        report.composed_report(run, [histogram])


def test_a_ledger_of_training_is_no_histogram(run):
    with pytest.raises(UsageError, match="no ledger of histograms"):
        report.composed_report(run, [run / LEDGER_FILE])
    before = (run / LEDGER_FILE).read_bytes()
    with pytest.raises(UsageError, match="the ledger of a training run"):
        record_histogram(run / LEDGER_FILE, num_examples=500, noise_multiplier=9.0, num_bins=10)
    assert (run / LEDGER_FILE).read_bytes() == before


def test_kinds_do_not_mix_in_a_ledger_even_with_a_whole_chain(run, histogram):
    for path, content in (
        (run / LEDGER_FILE, {"kind": HISTOGRAM, "num_examples": 500}),
        (histogram, {"kind": "step", "step": 21}),
    ):
        last = json.loads(path.read_text().splitlines()[-1])["chain"]
        text = last + json.dumps(content, sort_keys=True)
        line = json.dumps(content | {"chain": hashlib.sha256(text.encode()).hexdigest()})
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(UsageError, match="edited or mixed"):
            read_ledger(path)


def test_a_ledger_of_histograms_is_no_run(run, histogram):
    shutil.copy(histogram, run / LEDGER_FILE)
    with pytest.raises(UsageError, match="holds no privacy plan"):
        report.composed_report(run)


# ---------------------------------------------------------------- no guarantee


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"eps": -1}, "without differential privacy"),
        ({"insecure_fixed_noise_seed": 0}, "known seed"),
    ],
)
def test_no_guarantee_is_said_and_exits_1(run, capsys, tmp_path, arguments, why):
    write_json(run / "run_config.json", {"arguments": ARGUMENTS | arguments})
    assert report.main([str(run), "--output", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "There is NO PRIVACY GUARANTEE" in told
    assert why in told
    written = json.loads((tmp_path / "out" / "composed_report.json").read_text())
    assert written["guarantee"] is False
    assert "epsilon" not in written
    assert not (tmp_path / "out" / "epsilon_over_steps.png").exists()


def test_an_insecure_histogram_forfeits_the_guarantee(run, tmp_path):
    path = tmp_path / "insecure.jsonl"
    record_histogram(path, num_examples=500, noise_multiplier=9.0, num_bins=10, insecure=True)
    composed = report.composed_report(run, [path])
    assert composed["guarantee"] is False
    assert "histogram's noise" in composed["why"]


# ---------------------------------------------------------------- the command


def test_the_command_prints_and_writes_three_files(run, histogram, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [str(run), "--histogram", str(histogram), "--output", str(out), "--delta=1e-6"]
    argv += ["--relation", ADD_REMOVE, REPLACE]
    assert report.main(argv) == 0
    told = capsys.readouterr().out
    written = json.loads((out / "composed_report.json").read_text())
    page = (out / "composed_report.md").read_text()
    for relation in (ADD_REMOVE, REPLACE):
        claim = (
            f"({rounded_up(written['epsilon'][relation]['upper'])}, 1e-06)-differentially private"
        )
        assert claim in told
        assert claim in page
        assert relation in told
    for item in written["covered"] + written["not_covered"]:
        assert item in told
        assert item in page
    curve = written["epsilon_over_steps"]
    assert [point["step"] for point in curve] == list(range(21))
    assert all(a["epsilon"] < b["epsilon"] for a, b in zip(curve, curve[1:]))
    assert curve[0]["epsilon"] > 0  # the histogram is there before the first step
    assert curve[-1]["epsilon"] == pytest.approx(written["epsilon"][ADD_REMOVE]["upper"], abs=0.02)
    assert (out / "epsilon_over_steps.png").read_bytes().startswith(b"\x89PNG")
    assert "epsilon_over_steps.png" in page


@pytest.mark.usefixtures("short_curves")
def test_more_than_a_target_is_said_first_and_exits_1(run, pairs, tmp_path, capsys):
    """Two runs of one target each, or a histogram that was not reserved."""
    costly = tmp_path / "costly.jsonl"
    record_histogram(costly, num_examples=500, noise_multiplier=0.9, num_bins=10)
    for runs in ([run, pairs], [run]):
        words = [*map(str, runs), "--histogram", str(costly)]
        for extra, code in (([], 1), (["--allow_above_target"], 0)):
            out = tmp_path / f"out-{len(runs)}-{code}"
            assert report.main([*words, *extra, "--output", str(out)]) == code
            told = capsys.readouterr()
            first = told.out.splitlines()[1]
            assert first.startswith("ABOVE TARGET: together they spend epsilon ")
            assert f"{run} was planned for 2." in first
            assert ("add --allow_above_target" in told.err) == (code == 1)
            written = json.loads((out / "composed_report.json").read_text())
            assert len(written["above_target"]) == len(runs)
            assert (out / "composed_report.md").read_text().splitlines()[2] == first
    assert report.composed_report(run)["above_target"] == []
    assert report.main([str(run)]) == 0


def test_a_target_is_that_of_the_plans_own_delta(run):
    """Another --delta moves the epsilon that is shown, and no target."""
    spent = report.composed_report(run, delta=1e-9)
    assert spent["epsilon"][ADD_REMOVE]["upper"] > PLAN.target_epsilon
    assert spent["above_target"] == []


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "composed_report.md").write_text("mine")
    with pytest.raises(UsageError, match="exists; use another --output"):
        report.main([str(run), f"--output={tmp_path}"])
    assert (tmp_path / "composed_report.md").read_text() == "mine"
    assert not (tmp_path / "composed_report.json").exists()


def test_a_long_run_has_a_short_curve():
    composed = {
        "mechanisms": [
            {"sampling_rate": 0.01, "noise_multiplier": 1.0, "times": 1000, "mechanism": "x"}
        ],
        "neighbouring_relations": [ADD_REMOVE],
        "delta": 1e-5,
    }
    steps = [point["step"] for point in report.epsilon_over_steps(composed, points=5)]
    assert steps == [0, 250, 500, 750, 1000]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["{run}", "--histogram", "nowhere.jsonl"], "no ledger of histograms at nowhere.jsonl"),
        (["{run}", "--delta=1e-20"], "delta 1e-20: must be between 1e-12 and 0.01"),
        (["{run}", "--epsilon=-1"], "not a number above 0"),
        (["{run}", "--relation", "swap"], "invalid choice: 'swap'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, capsys, argv, message):
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: report.main([word.format(run=run) for word in argv]))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (LEDGER_FILE, f"no {LEDGER_FILE}"),
        ("privacy_report.json", "adapter but no privacy_report.json"),
        ("run_config.json", "there is no run_config.json"),
    ],
)
def test_an_incomplete_run_is_refused(run, name, message):
    (run / name).unlink()
    with pytest.raises(UsageError, match=message):
        report.composed_report(run)


def test_a_file_that_is_not_json_is_named(run):
    (run / "run_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"run_config.json is not a JSON object"):
        report.composed_report(run)
