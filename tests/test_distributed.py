"""Jobs of several processes and of two machines, as `accelerate launch` starts them, on gloo."""

import json
import os
import signal
import socket
import subprocess
import time
from unittest import mock

import datasets
import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from privacy_checks.observed_run import PublicSteps, observe
from privacy_checks.tiny_model import save_tiny_model
from tests.helpers import slow
from tests.paths import ROOT
from tests.processes import Command
from tests.training import flags, in_process, save_dataset
from utils.command_line.launch import launch_command, with_this_python
from utils.privacy.ledger import LEDGER_FILE, read_ledger, steps_in
from utils.runs import distributed

FIXED = "--insecure_fixed_noise_seed=1"
DROPOUT = "--lora_dropout=0.2"
FROZEN = [FIXED, "--job_sess=frozen", "--frozen_a"]
BANDED = [FIXED, "--job_sess=banded", "--noise=banded", "--bands=8"]
# Sums of float32 numbers in another order; a lost, doubled or reweighed example moves them by
# more than 1e-2.
SUMMATION = 1e-6
# With 2 examples expected in a batch, most ranks of four have none, and so has a whole step.
BATCHES = {"many": ["--total_bs=32", "--num_epochs=3"], "few": ["--total_bs=2", "--num_epochs=0.3"]}
TRAIN_ONLY = "train_only.jsonl"


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_model_dir):
    """A folder, a model, a data set; the folder also has its train split alone, as TRAIN_ONLY."""
    folder = tmp_path_factory.mktemp("jobs")
    data = save_dataset(folder)
    datasets.load_from_disk(data)["train"].to_json(folder / TRAIN_ONLY)
    return folder, tiny_model_dir, data


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(command: list[str]) -> subprocess.Popen:
    """Start `accelerate launch ...` with one thread a process."""
    return subprocess.Popen(
        with_this_python(command),
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: int = 200) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def launch(folder, jobs, *machine, gpus) -> subprocess.Popen:
    """Run jobs in the processes of one launch, as the generator prints it; reports to `folder`."""
    script, arguments = str(ROOT / "tests/distributed_worker.py"), [write_jobs(folder, jobs)]
    return start(launch_command(script, arguments, gpus, *machine))


def write_jobs(folder, jobs) -> str:
    folder.mkdir(parents=True)
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return str(file)


def run_jobs(folder, jobs, ranks, machines=1) -> None:
    """`launch`, and wait for it, without the seconds that a launcher and its processes import."""
    file, here = write_jobs(folder, jobs), ranks // machines
    job = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(here), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port())}  # fmt: skip
    processes = [
        Command(
            "tests.distributed_worker", [file], RANK=str(rank), LOCAL_RANK=str(rank % here), **job
        )
        for rank in range(ranks)
    ]
    for process in processes:
        assert process.wait() == 0, process.stderr


def observed_jobs(parts, output, *more) -> list[dict]:
    """A job with many examples in a batch and one with few; public steps, one sum per step."""
    folder, model, _ = parts
    data = folder / TRAIN_ONLY
    return [
        {
            "name": name,
            # Masks follow the row, so they are the same in any number of processes.
            "argv": flags(
                model, data, output, FIXED, DROPOUT, f"--job_sess={name}", *batches, *more
            ),
            "public_steps": True,
        }
        for name, batches in BATCHES.items()
    ]


@pytest.fixture(scope="module")
def alone(parts):
    """What one process sums, by job: float64 [steps, parameters]."""
    sums = {}
    for job in observed_jobs(parts, parts[0] / "alone"):
        AcceleratorState._reset_state(reset_partial_state=True)
        sums[job["name"]] = observe(job["argv"], PublicSteps).clipped_sums
    return {name: np.array(rows) for name, rows in sums.items()}


@pytest.fixture(scope="module")
def interrupted(parts):
    """Runs of one process: one that crashed in its fifth step, the same uninterrupted, one with
    correlated noise, one that trains B alone, and one without privacy."""
    folder, model, data = parts
    whole, broken = (
        flags(model, data, folder / "one", FIXED, f"--job_sess={name}")
        for name in ("whole", "broken")
    )
    banded, frozen = (flags(model, data, folder / "one", *more) for more in (BANDED, FROZEN))
    plain = flags(model, data, folder / "one", "--job_sess=plain", dp=False)
    for argv in (whole, banded, frozen, plain):
        assert in_process(train.main, argv) == 0
    calls = iter([train.assign_gradient] * 4)
    with mock.patch("train.assign_gradient", lambda *args: next(calls)(*args)):
        pytest.raises(StopIteration, in_process, train.main, broken)
    return folder / "one"


@pytest.fixture(scope="module")
def two(parts, interrupted):
    """The reports of two processes that ran several jobs."""
    folder, model, data = parts
    other_model = folder / "other-model"
    save_tiny_model(other_model, seed=5)
    output = folder / "two-runs"
    refused = {
        "model": f"--model_name={other_model}",
        "plan": "--noise_multiplier=3",
        "rate": "--lr=0.02",
    }
    jobs = observed_jobs(parts, output)
    for name, fits in (("halved", 32), ("starved", 0)):
        job, _ = observed_jobs(parts, folder / name)
        jobs.append(job | {"name": name, "memory": {"1": fits}})
    # With a validation split, whose losses are computed in step too.
    sharded = ["--fsdp", f"--dataset_name={data}"]
    for job in observed_jobs(parts, folder / "sharded-runs", *sharded):
        jobs.append(job | {"name": f"sharded-{job['name']}"})
    for name, flag in refused.items():
        argv = flags(model, data, output, f"--job_sess=refused-{name}")
        jobs.append({"name": name, "argv": argv, "by_rank": {"1": [flag]}})
    argv = flags(model, data, interrupted, FIXED, "--job_sess=broken", "--resume=auto", "--fsdp")
    jobs.append({"name": "resumed", "argv": argv})
    argv = flags(model, data, output, "--job_sess=refused-adapter")
    jobs.append({"name": "adapter", "argv": argv, "other_adapter": ["1"]})
    jobs.append({"name": "frozen", "argv": flags(model, data, output, *FROZEN, "--fsdp")})
    jobs.append({"name": "banded", "argv": flags(model, data, output, *BANDED)})
    argv = flags(model, data, folder / "two-runs", "--job_sess=plain", "--fsdp", dp=False)
    jobs.append({"name": "plain", "argv": argv})
    finish(launch(folder / "two", jobs, gpus=2))
    return folder / "two"


@pytest.fixture(scope="module", params=["forked", slow("launched")])
def four(request, parts):
    """The reports of four processes on two machines, of which the second has a folder of its own.

    Two machines are two launches on one, or as many ranks of each.
    """
    (_, model, data), folder = parts, parts[0] / request.param
    elsewhere = [f"--output_dir={folder / 'machine-1'}"]
    jobs = [
        job | {"by_rank": {"2": elsewhere, "3": elsewhere}}
        for job in observed_jobs(parts, folder / "machine-0")
    ]
    rows = datasets.load_from_disk(data)
    rows["train"] = rows["train"].map(lambda row: {"instruction": row["instruction"][::-1]})
    rows.save_to_disk(folder / "other-data")
    argv = flags(model, data, folder / "machine-0", "--job_sess=refused")
    other = [*elsewhere, f"--dataset_name={folder / 'other-data'}"]
    jobs.append({"name": "data", "argv": argv, "by_rank": {"2": other, "3": other}})
    if request.param == "forked":
        run_jobs(folder / "four", jobs, 4, 2)
        return folder / "four"
    reports, port = [folder / f"four-{machine}" for machine in (0, 1)], free_port()
    running = [
        launch(reports[machine], jobs, 2, machine, "127.0.0.1", port, gpus=2) for machine in (0, 1)
    ]
    for process in running:
        finish(process)
    for file in [*reports[1].glob("*.npz"), *reports[1].glob("data-*.json")]:
        file.rename(reports[0] / file.name)
    return reports[0]


def assert_same_sums(report, expected):
    observed = np.load(report)["clipped_sums"]
    assert observed.shape == expected.shape
    for ours, theirs in zip(observed, expected):
        assert np.linalg.norm(ours - theirs) <= SUMMATION * np.linalg.norm(theirs)


@pytest.mark.parametrize("job", BATCHES)
def test_two_processes_have_the_same_clipped_sums_as_one(two, alone, job):
    assert_same_sums(two / f"{job}-0.npz", alone[job])


@pytest.mark.parametrize("job", BATCHES)
def test_so_have_four_on_two_machines(four, alone, job):
    assert_same_sums(four / f"{job}-0.npz", alone[job])


def test_a_batch_is_split_over_all_ranks_and_ranks_without_examples_step_too(four, alone):
    many, few = (
        np.array([np.load(four / f"{job}-{rank}.npz")["batches"] for rank in range(4)])
        for job in BATCHES
    )  # [ranks, steps]
    assert (many > 0).all()
    assert (few == 0).any(axis=0).mean() > 0.8  # in most steps some rank has none
    assert (few.sum(axis=0) == 0).any()  # in one of them all have none
    assert few.shape[1] == len(alone["few"])


def test_only_the_first_of_two_machines_writes(four):
    assert (four.parent / "machine-0" / "many" / "adapter").is_dir()
    assert not (four.parent / "machine-1").exists()


@pytest.mark.parametrize("job", BATCHES)
def test_a_sharded_base_gives_the_same_clipped_sums(two, alone, job):
    assert_same_sums(two / f"sharded-{job}-0.npz", alone[job])
    # Each rank holds half of the layers. Of two, one with queries of 32 x 32, keys and values of
    # 16 x 32, an MLP of 64 features and two norms.
    for rank in (0, 1):
        here, all_layers = np.load(two / f"sharded-{job}-{rank}.npz")["layers"]
        assert all_layers == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32)
        assert here == all_layers / 2


def test_memory_that_runs_out_on_one_rank_changes_no_sum(two, alone):
    assert_same_sums(two / "halved-0.npz", alone["many"])


def test_a_rank_with_too_little_for_one_row_ends_all_of_them_and_the_step_is_saved(two, parts):
    codes = [json.loads((two / f"starved-{rank}.json").read_text())[0] for rank in (0, 1)]
    assert codes == [1, 1]
    folder = parts[0] / "starved" / "many"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000"]
    assert steps_in(read_ledger(folder / LEDGER_FILE)) == []


def test_a_machine_with_other_data_is_refused(four):
    code, message = json.loads((four / "data-0.json").read_text())
    assert code == 2
    assert message.startswith("rank 2, 3 of this job has another training data than rank 0")
    assert [json.loads((four / f"data-{r}.json").read_text()) for r in (1, 2, 3)] == [[2, ""]] * 3
    assert not (four.parent / "machine-0" / "refused").exists()


@pytest.mark.parametrize(
    ("job", "named"),
    [
        ("model", "base model"),
        ("plan", "privacy plan"),
        ("rate", "--lr"),
        ("adapter", "adapter at the start"),
    ],
)
def test_a_rank_that_would_train_something_else_is_refused_by_name(two, parts, job, named):
    code, message = json.loads((two / f"{job}-0.json").read_text())
    assert code == 2
    assert message.startswith(f"rank 1 of this job has another {named} than rank 0")
    assert json.loads((two / f"{job}-1.json").read_text()) == [2, ""]  # said once
    assert not (parts[0] / "two-runs" / f"refused-{job}").exists()


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_adapters(left, right):
    left, right = adapter(left), adapter(right)
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[name], right[name], atol=1e-4) for name in left)


def test_two_processes_resume_what_one_began_and_release_the_same(two, interrupted):
    assert (two / "resumed-1.npz").exists()
    records = read_ledger(interrupted / "broken" / LEDGER_FILE)
    assert steps_in(records) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert_same_adapters(interrupted / "whole", interrupted / "broken")


def test_two_processes_have_the_correlated_noise_and_the_groups_of_one(two, parts, interrupted):
    assert (two / "banded-1.npz").exists()
    assert_same_adapters(interrupted / "banded", parts[0] / "two-runs" / "banded")


def test_two_processes_with_a_sharded_base_have_the_frozen_a_of_one(two, parts, interrupted):
    assert (two / "frozen-1.npz").exists()
    assert_same_adapters(interrupted / "frozen", parts[0] / "two-runs" / "frozen")


def test_without_privacy_two_processes_train_what_one_does(two, parts, interrupted):
    assert_same_adapters(interrupted / "plain", parts[0] / "two-runs" / "plain")


@pytest.mark.parametrize("killed", [1, slow(0)])
def test_a_killed_rank_ends_the_others_and_one_process_resumes_the_job(parts, tmp_path, killed):
    """From its last step if the main process lives, else from the last checkpoint."""
    _, model, data = parts
    long = [FIXED, "--num_epochs=500", "--save_steps=4", "--no_eval_at_start"]
    config = ["--config_file", str(ROOT / "accelerate_configs" / "multi_gpu.yaml")]
    launcher = ["accelerate", "launch", "--quiet", *config, "--num_processes", "2"]
    process = start([*launcher, "train.py", *flags(model, data, tmp_path, *long)])
    folder = tmp_path / "job"
    end = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(True)}
    ranks[str(killed)].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 2, 130)
    said = [line for line in output.splitlines() if "error:" in line]
    assert len(said) == 1, output
    assert "another process of this job has ended" in said[0]
    assert "--resume auto" in said[0]
    assert 'train.py", line' not in output  # the launcher has a stack trace of its own

    taken = len((folder / LEDGER_FILE).read_text().splitlines()) - 1
    saved = int(max(p.name for p in folder.glob("checkpoints/step-*")).removeprefix("step-"))
    assert taken - saved <= (1 if killed else 4)
    with mock.patch.object(train.StopRequest, "requested", True):
        resumed = flags(model, data, tmp_path, *long, "--resume=auto")
        assert in_process(train.main, resumed) == 130
    report = json.loads((folder / "privacy_report.json").read_text())
    assert (report["steps_taken"], report["steps_lost"]) == (saved, taken - saved)


def test_adapters_that_differ_between_ranks_stop_the_job(monkeypatch):
    said = []

    def gather(given):
        said.extend(given)
        return said

    monkeypatch.setattr(distributed, "gather_object", gather)
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    for _same_rank in range(2):
        distributed.require_same_tensors(tensors)
    tensors["b"][1] = torch.finfo(torch.float32).smallest_normal
    with pytest.raises(RuntimeError, match=r"ranks \[2\] differ"):
        distributed.require_same_tensors(tensors)


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (torch.distributed.DistBackendError("no words"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("q_proj was used twice in one forward pass"), False),
    ],
)
def test_the_loss_of_a_rank_is_known_by_what_it_says(error, is_loss):
    assert distributed.is_loss_of_a_rank(error) == is_loss
