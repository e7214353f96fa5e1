"""The benchmark of training: what it measures, counts and writes."""

import json

import numpy as np
import pytest
import torch

from benchmarks import memory, training, workload
from benchmarks.engines import ours
from benchmarks.engines.published_loop import _keep_input
from benchmarks.jobs import OURS, PEERS, Job
from privacy_checks.tiny_model import save_tiny_model
from tests.helpers import adapted_model, random_examples, reference_gradients
from tests.json_lines import jsonl
from tests.training import run_process
from utils.models.language_model import LanguageModel
from utils.models.losses import normalise

KEYS = {"real_tokens_per_second", "processed_over_real", "peak_memory_mib", "seconds"}


@pytest.fixture
def texts(tmp_path):
    """A data set of 40 instructions of 1 to 40 words."""
    path = tmp_path / "texts.jsonl"
    rows = [{"instruction": " ".join(["word"] * (1 + number % 40))} for number in range(40)]
    path.write_text(jsonl(rows))
    return str(path)


@pytest.fixture
def job(tmp_path):
    """A job on the tiny model with two examples of 5 and 9 tokens."""
    save_tiny_model(tmp_path / "model")
    np.savez(tmp_path / "tokens.npz", ids=np.arange(3, 17), lengths=np.array([5, 9]))
    return Job("ours-dp", str(tmp_path), 2, 16, 1, 8, ["q_proj", "o_proj"], "float32", 1)


@pytest.mark.slow
def test_our_engines_are_measured_and_written(texts, tmp_path, capsys):
    arguments = ["--quick", "--dataset_name", texts, "--engines", *OURS, "--rounds", "1"]
    assert training.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["engine"] for row in rows] == list(OURS)
    for row in rows:
        assert row.keys() >= KEYS
        assert row["processed_over_real"] >= 1
        assert min(row["seconds"] + [row["peak_memory_mib"]]) > 0
    printed = capsys.readouterr().out
    assert "ours-dp over ours-nondp" in printed
    assert "a logical batch of 40" in printed


def test_persons_are_measured(texts, tmp_path):
    arguments = [
        f"--dataset_name={texts}", "--engines=ours-dp", "--rows_per_unit=4", "--num_examples=10",
        "--hidden_size=64", "--num_layers=1", "--vocab_size=300", "--max_seq_len=64",
    ]  # fmt: skip
    settings = workload.read_settings("", OURS, arguments)
    workload.prepare(settings, tmp_path, workload.instructions(texts))
    (job,) = workload.make_jobs(settings, str(tmp_path))
    assert ours.run(job)["processed_tokens"] > 0
    (report,) = tmp_path.glob("outputs-*/job/privacy_report.json")
    report = json.loads(report.read_text())
    assert (report["unit_column"], report["max_rows_per_unit"]) == ("user_id", 4)
    assert report["num_examples"] == report["expected_batch_size"] == 3


@pytest.mark.slow
def test_every_engine_runs(texts, tmp_path):
    arguments = ["--quick", "--dataset_name", texts, "--json", str(tmp_path / "out.json")]
    assert training.main(arguments) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["engine"] for row in rows] == list(PEERS + OURS)


def test_peers_do_without_what_only_the_toolkit_needs():
    missing = ("cryptography", "datasets", "prv_accountant", "dp_accounting", "faiss", "openai")
    check = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    check += "import benchmarks.engine, benchmarks.engines.published_loop"
    done = run_process("-c", check)
    assert done.returncode == 0, done.stderr


def test_memory_of_both_is_compared_in_every_case(texts, monkeypatch, capsys):
    monkeypatch.setattr(memory, "SHORT_EXAMPLES", 40)
    found = {"seconds": [1.0], "processed_tokens": 1, "peak_memory_mib": 100.0}
    peaks = {"ours-nondp": 100.0, "ours-dp": 125.0}

    monkeypatch.setattr(workload, "run", lambda job: found | {"peak_memory_mib": peaks[job.engine]})
    assert memory.main(["--quick", "--dataset_name", texts]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 * 2
    assert all(line.endswith("1.250") for line in lines if "ours-dp" in line)


def test_flops_are_counted_by_hand(job):
    # 2 layers, hidden 32, inner 64, 4 heads over 2 key/value heads of 8, vocabulary 259.
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64) + 32 * 259
    lora = 2 * 2 * 8 * (32 + 32)
    attention = 2 * 32 * (5**2 + 9**2)
    inputs_of_first = 32 * 32 + 2 * 32 * 16
    expected = 14 * (4 * linear - 2 * inputs_of_first + 6 * lora) + 6 * attention
    assert training.step_flops(job) == expected


def test_the_published_loop_takes_the_true_per_example_gradients():
    data = random_examples([9, 9, 9])
    model = adapted_model(["q_proj", "v_proj"])
    expected = reference_gradients(model, data)
    language_model = LanguageModel(model.get_base_model())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            module.register_forward_hook(_keep_input)
    sums, counts = language_model.example_losses(data.collate(np.arange(3), 0))
    normalise(sums, counts, "max_seq_len", 64).sum().backward()
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    found = torch.cat([tensor.per_example.flatten(1) for tensor in trainable], dim=1)
    assert torch.allclose(found.double(), expected, atol=1e-7)
