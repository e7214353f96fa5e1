"""Training that protects persons: what is drawn and recorded, resume, processes, bad input."""

import json
import signal
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from privacy_checks.observed_run import PublicSteps, observe
from tests.processes import run_until_killed
from tests.test_distributed import assert_same_sums, run_jobs
from tests.training import flags, in_process
from utils.cli import UsageError, run_cli
from utils.privacy import mechanism
from utils.privacy.ledger import LEDGER_FILE, read_ledger, read_plan, steps_in

FIXED = "--insecure_fixed_noise_seed=1"
PERSONS, MOST, K = 40, 6, 3
UNIT = ("--unit_column=user_id", f"--max_rows_per_unit={K}")
BY_ROW = "--unit_sampling=rows"
SIZES = 1 + np.arange(PERSONS) % MOST
ROWS, KEPT = int(SIZES.sum()), int(np.minimum(SIZES, K).sum())


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A file of texts of 40 persons with one to six rows each."""
    return save_rows(tmp_path_factory.mktemp("data"), user_ids(0))


def user_ids(seed: int) -> list:
    owners = np.repeat(np.arange(PERSONS), SIZES)
    return [f"user {owner}" for owner in np.random.default_rng(seed).permutation(owners)]


def save_rows(folder: Path, owners: list, column: str = "user_id") -> str:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abc d"), random.integers(1, 31))) for _ in owners]
    file = folder / "letters.jsonl"
    datasets.Dataset.from_dict({"instruction": texts, column: owners}).to_json(file)
    return str(file)


@pytest.fixture
def run(tiny_model_dir, letters, tmp_path):
    """Train in this process, with the person as the unit; returns the run's folder."""

    def call(*more, output="outputs", dataset=letters, unit=UNIT):
        argv = flags(tiny_model_dir, dataset, tmp_path / output, *unit, *more)
        assert in_process(train.main, argv) == 0
        return tmp_path / output / "job"

    return call


def report(folder: Path) -> dict:
    return json.loads((folder / "privacy_report.json").read_text())


def ledger_steps(folder: Path) -> list[int]:
    return steps_in(read_ledger(folder / LEDGER_FILE))


def largest_difference(left: Path, right: Path) -> float:
    left, right = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (left, right)
    )
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


# ---------------------------------------------------------------- what is protected


def test_units_are_drawn_whole_and_give_at_most_k_rows(tiny_model_dir, letters, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = observe(flags(tiny_model_dir, letters, tmp_path, *UNIT, "--num_epochs=2"), PublicSteps)
    assert len(seen.batches) == 2 * PERSONS // 8
    owners = np.array([int(name.split()[1]) for name in user_ids(0)])
    taken = np.zeros(PERSONS)
    for batch in seen.batches:
        counts = np.bincount(owners[batch], minlength=PERSONS)
        drawn = counts > 0
        assert (counts[drawn] == np.minimum(SIZES, K)[drawn]).all()
        taken += drawn
    # Persons with one row are drawn as often as those with six.
    assert abs(taken.sum() - 80) < 5 * np.sqrt(80 * 0.8)


@pytest.mark.parametrize(
    ("more", "n", "steps", "sampling"),
    [((), PERSONS, PERSONS // 8, "units"), ((BY_ROW,), KEPT, KEPT // 8, "rows")],
)
def test_plan_and_report_have_the_unit_and_n(run, more, n, steps, sampling):
    folder = run(*more)
    plan = read_plan(folder / LEDGER_FILE)
    assert (plan.unit_column, plan.max_rows_per_unit) == ("user_id", K)
    assert (plan.unit_sampling, plan.num_examples, plan.steps) == (sampling, n, steps)
    assert ledger_steps(folder) == list(range(1, steps + 1))
    values = report(folder)
    assert values["guarantee"] is True
    assert values["num_examples"] == n
    assert values["epsilon"]["upper"] <= 8
    assert not (folder / "private" / train.LARGEST_UNITS).exists()


def test_stated_sizes_are_held_against_what_is_found(run):
    run(f"--num_train_units={PERSONS}", output="units")
    run(BY_ROW, f"--num_train_examples={KEPT}", output="rows")
    with pytest.raises(UsageError, match=f"--num_train_units 39, .* has {PERSONS} units"):
        run("--num_train_units=39", output="never")
    with pytest.raises(UsageError, match=f"has {KEPT} rows"):
        run(BY_ROW, f"--num_train_examples={ROWS}", output="never")


def test_rows_keep_those_of_the_cap(run, monkeypatch):
    drawn, sample = [], mechanism.poisson_batch

    def watched(count, *rest):
        drawn.append(count)
        return sample(count, *rest)

    monkeypatch.setattr(mechanism, "poisson_batch", watched)
    run(BY_ROW)
    assert set(drawn) == {KEPT}


@pytest.mark.parametrize(
    "canaries",
    [("--num_canaries=5", "--canary_repeats=2"), ("--num_canaries=4", "--audit_canaries=6")],
)
def test_a_canary_is_a_unit_of_its_own(run, monkeypatch, canaries):
    made = []

    class Watched(mechanism.Units):
        def __init__(self, of_row, max_rows):
            super().__init__(of_row, max_rows)
            made.append(of_row)

    monkeypatch.setattr(train, "Units", Watched)
    folder = run(*canaries, "--max_seq_len=64", f"--num_train_units={PERSONS}")
    (of_row,) = made
    assert of_row[ROWS:].tolist() == list(range(PERSONS, PERSONS + 10))
    assert of_row[:ROWS].max() == PERSONS - 1
    assert read_plan(folder / LEDGER_FILE).num_examples == PERSONS + 10
    values = report(folder)
    assert (values["num_examples"], values["canaries"]) == (PERSONS + 10, 10)


def test_a_run_that_protects_rows_warns_and_keeps_the_largest_units(run, capsys):
    folder = run(unit=())
    told = capsys.readouterr().err
    assert "the data has a column 'user_id', and the guarantee is for one row" in told
    assert "--unit_column user_id --max_rows_per_unit K" in told
    file = folder / "private" / train.LARGEST_UNITS
    assert json.loads(file.read_text()) == {"user_id": MOST}
    # Nothing of that may leave.
    for name in ("privacy_report.json", "privacy_report.md", "run_config.json"):
        assert "user_id" not in (folder / name).read_text()


def test_other_ways_to_compute_the_same_change_nothing_that_is_released(run):
    left = run(FIXED, output="left")
    for name, more in {
        "small": ["--perdevice_bs=1"],
        "auto": ["--perdevice_bs=auto"],
        "checkpointing": ["--gradient_checkpointing"],
    }.items():
        assert largest_difference(left, run(FIXED, *more, output=name)) < 1e-4


# ---------------------------------------------------------------- resume


class Crash(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def crashed(run, letters):
    """Runs that end in their fifth step; the same call then goes on."""

    def call(*more, **options):
        calls = [train.assign_gradient] * 4

        def crashing(*args):
            if not calls:
                raise Crash
            return calls.pop()(*args)

        with mock.patch("train.assign_gradient", crashing), pytest.raises(Crash):
            run(*more, **options)
        return lambda *again, **changed: run(*more, "--resume=auto", *again, **options | changed)

    return call


LONG = "--num_epochs=1.6"  # 8 steps of 8 of 40 persons


@pytest.mark.parametrize("sampling", [(LONG,), (BY_ROW, "--num_epochs=0.6")])
def test_a_resumed_run_equals_an_uninterrupted_one(run, crashed, sampling):
    whole = run(FIXED, "--lora_dropout=0.1", *sampling)
    go_on = crashed(FIXED, "--lora_dropout=0.1", *sampling, output="broken")
    folder = go_on()
    assert largest_difference(whole, folder) < 1e-6
    assert report(folder)["steps_lost"] == 2


def test_kill_9_loses_nothing_but_steps_since_the_checkpoint(
    run, tiny_model_dir, letters, tmp_path
):
    argv = flags(tiny_model_dir, letters, tmp_path / "outputs", *UNIT, LONG)
    died = run_until_killed(argv, "train.assign_gradient", 5)
    assert died.returncode == -signal.SIGKILL, died.stderr
    values = report(run("--resume=auto", LONG))
    assert (values["steps_taken"], values["steps_lost"]) == (8, 2)
    assert values["guarantee"] is True


def test_another_unit_is_refused_on_resume(crashed, tmp_path, letters):
    go_on = crashed(LONG)
    with pytest.raises(UsageError, match="max_rows_per_unit"):
        go_on("--max_rows_per_unit=4")
    with pytest.raises(UsageError, match="unit_sampling"):
        go_on(BY_ROW, "--num_epochs=0.6")
    renamed = save_rows(tmp_path, user_ids(0), "author")
    with pytest.raises(UsageError, match="unit_column"):
        go_on("--unit_column=author", dataset=renamed)
    # The same file with rows that belong to others.
    original = Path(letters).read_text()
    save_rows(Path(letters).parent, user_ids(1))
    try:
        with pytest.raises(UsageError, match="units"):
            go_on()
    finally:
        Path(letters).write_text(original)
    assert report(go_on())["steps_taken"] == 8


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory, tiny_model_dir, letters):
    """The folder of what one process summed, as arrays by job, and of what two reported."""
    folder = tmp_path_factory.mktemp("jobs")
    other = folder / "other"
    other.mkdir()
    more = {
        # Many persons, of whom some parts; and so few that a process has nobody.
        "many": ["--total_bs=36", "--num_epochs=3"],
        "few": ["--total_bs=1", "--num_epochs=0.2"],
    }
    jobs = [
        {
            "name": f"{kind}{name}",
            "argv": flags(tiny_model_dir, letters, folder / f"runs{kind}", FIXED, *UNIT,
                          "--lora_dropout=0.2", f"--job_sess={name}", *batches, *sharding),
            "public_steps": True,
        }
        for kind, sharding in {"": [], "sharded-": ["--fsdp"]}.items()
        for name, batches in more.items()
    ]  # fmt: skip
    alone = {}
    for job in jobs[:2]:
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = [*job["argv"], f"--output_dir={folder / 'alone'}"]
        alone[job["name"]] = np.array(observe(argv, PublicSteps).clipped_sums)
    moved = save_rows(other, user_ids(1))
    argv = flags(tiny_model_dir, letters, folder / "runs", *UNIT, "--job_sess=refused")
    jobs.append({"name": "refused", "argv": argv, "by_rank": {"1": [f"--dataset_name={moved}"]}})
    run_jobs(folder / "two", jobs, 2)
    return folder / "two", alone


@pytest.mark.parametrize("kind", ["", "sharded-"])
@pytest.mark.parametrize("job", ["many", "few"])
def test_two_processes_have_the_sums_of_one(processes, kind, job):
    two, alone = processes
    assert_same_sums(two / f"{kind}{job}-0.npz", alone[job])
    rows = np.array([np.load(two / f"{job}-{rank}.npz")["batches"] for rank in (0, 1)])
    if job == "many":
        assert (rows > 0).all()  # persons were shared


def test_a_process_whose_rows_belong_to_others_is_refused(processes):
    two, _ = processes
    code, message = json.loads((two / "refused-0.json").read_text())
    assert code == 2
    assert message.startswith("rank 1 of this job has another unit of some row than rank 0")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "owners", "message"),
    [
        (["--total_bs=41"], None, "--total_bs 41 exceeds the 40 values of user_id"),
        (["--max_rows_per_unit=0"], None, "'0' is not a whole number of 1 or more"),
        (["--unit_column=author"], None, "the train split has no such column"),
        ([], [None, *user_ids(0)[1:]], "row 1 has no owner"),
        ([], [["a", "b"]] * ROWS, "row 1 has a list of 2 owners"),
        (["--delta=0.03"], None, "must be below 1/N = 2.50e-02"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(
    run, capsys, tmp_path, letters, more, owners, message
):
    dataset = save_rows(tmp_path, owners) if owners else letters
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: run(*more, dataset=dataset))
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in told
    assert "error: " in told
    assert not (tmp_path / "outputs").exists()


def test_owners_that_are_asked_for_are_taken(run, tmp_path):
    owners = [[name, "another"] for name in user_ids(0)]
    folder = run("--owner=first", dataset=save_rows(tmp_path, owners))
    assert read_plan(folder / LEDGER_FILE).num_examples == PERSONS
    some = [None if row % 2 else name for row, name in enumerate(user_ids(0))]
    (tmp_path / "some").mkdir()
    folder = run(
        "--unowned_rows_are_units", dataset=save_rows(tmp_path / "some", some), output="unowned"
    )
    named = {name for name in some if name}
    assert read_plan(folder / LEDGER_FILE).num_examples == len(named) + some.count(None)
    assert all(torch.isfinite(value).all() for value in load_file(
        folder / "adapter" / "adapter_model.safetensors").values())  # fmt: skip
