"""Compiled frozen parts: which they are, that they change no sum, when a run goes on without."""

import json
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

import train
from privacy_checks.tiny_model import tiny_llama
from tests.helpers import adapted_model, clipped_sum, random_examples, relative_error, tiny_model
from tests.training import flags, in_process, save_dataset
from utils.cli import EXIT_OK, UsageError
from utils.models import compiled
from utils.models.compiled import compile_parts, frozen_parts, undo
from utils.models.loading import load_quantised_model
from utils.runs.probe import Numerics

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(autouse=True)
def no_machine_code(monkeypatch):
    """Graphs are made as for the real compiler, and then computed operation by operation."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def kinds(model):
    return sorted(type(part).__name__ for part in frozen_parts(model))


def test_parts_are_norms_and_mlps_without_adapters():
    norms = ["LlamaRMSNorm"] * 5
    assert kinds(adapted_model(ATTENTION)) == sorted([*norms, "LlamaMLP", "LlamaMLP"])
    assert kinds(adapted_model("all-linear")) == norms
    of_mlp = adapted_model(["down_proj"], base=tiny_llama().bfloat16())
    assert kinds(of_mlp) == sorted([*norms, "LlamaAttention", "LlamaAttention"])
    gpt2 = adapted_model(["c_attn"], base=tiny_model("gpt2"))
    assert kinds(gpt2) == sorted(["GPT2MLP"] * 2 + ["LayerNorm"] * 5)


def test_quantised_weights_are_left_to_their_own_kernels(tiny_model_dir):
    base = load_quantised_model(tiny_model_dir, torch.float32, 8, torch.device("cpu"))
    assert set(kinds(adapted_model(["q_proj"], base=base))) == {"LlamaRMSNorm"}


@pytest.mark.parametrize(
    ("targets", "checkpointing", "backend"),
    [
        (ATTENTION, True, "eager"),
        pytest.param("all-linear", False, "aot_eager", marks=pytest.mark.slow),
        pytest.param(ATTENTION, False, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_clipped_sums_are_those_of_the_model_as_it_was(
    targets, checkpointing, backend, monkeypatch
):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model, data = adapted_model(targets, checkpointing=checkpointing), random_examples([5, 30, 12])
    expected, norms = clipped_sum(model, data, 0.7)
    parts = frozen_parts(model)
    counters.clear()
    compile_parts(parts)
    total, observed = clipped_sum(model, data, 0.7)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert relative_error(total, expected.double()) < 1e-6
    assert torch.allclose(observed, norms, rtol=1e-5)
    undo(parts)
    assert torch.equal(clipped_sum(model, data, 0.7)[0], expected)


@pytest.mark.slow
def test_one_compilation_is_for_all_layers_and_shapes():
    def graphs(layers, budgets):
        torch._dynamo.reset()
        counters.clear()
        model = adapted_model(ATTENTION, base=tiny_llama(num_hidden_layers=layers))
        compile_parts(frozen_parts(model))
        for budget in budgets:
            clipped_sum(model, random_examples([5, 30, 12, 17, 9, 40, 41]), 0.7, budget=budget)
        return counters["stats"]["unique_graphs"]

    assert graphs(2, [1000]) == graphs(4, [1000, 90, 130, 200])


# ---------------------------------------------------------------- runs


@pytest.fixture
def argv(tiny_model_dir, tmp_path):
    return flags(tiny_model_dir, save_dataset(tmp_path), tmp_path, "--num_epochs=0.25",
                 "--insecure_fixed_noise_seed=3", "--compile")  # fmt: skip


def losses(folder):
    lines = (folder / "private" / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for name, value in json.loads(line).items() if "loss" in name]


@pytest.mark.slow
def test_a_run_learns_the_same_and_may_go_on_without(argv, tmp_path, capsys):
    assert in_process(train.main, argv) == EXIT_OK
    job = tmp_path / "job"
    said, seen = capsys.readouterr().err, losses(job)
    assert "--compile: " not in said
    assert "exact, probed" in json.loads((job / "privacy_report.json").read_text())["numerics"]
    assert json.loads((job / "run_config.json").read_text())["arguments"]["compile"] is True
    shutil.rmtree(job / "adapter")
    assert in_process(train.main, [*argv[:-1], "--resume=auto"]) == EXIT_OK
    shutil.rmtree(job)
    assert in_process(train.main, argv[:-1]) == EXIT_OK
    assert seen == pytest.approx(losses(job), rel=1e-5)


@pytest.mark.slow
def test_so_does_one_without_privacy(argv, tmp_path):
    plain = [*(each for each in argv if "noise_seed" not in each), "--eps=-1", "--clip=-1"]
    assert in_process(train.main, plain) == EXIT_OK
    seen = losses(tmp_path / "job")
    shutil.rmtree(tmp_path / "job")
    assert in_process(train.main, [each for each in plain if each != "--compile"]) == EXIT_OK
    assert seen == pytest.approx(losses(tmp_path / "job"), rel=1e-5)


def broken(graph, inputs):
    raise OSError("no compiler on this machine")


def test_what_cannot_be_compiled_is_said_in_a_line(argv, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "BACKEND", broken)
    assert in_process(train.main, argv) == EXIT_OK
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "--compile" in each]
    assert "cannot, and goes on without" in line
    assert "no compiler on this machine" in line


EXACT, REFUSED = Numerics(0.0, "cpu"), UsageError("an example's gradient changes by 3%")


@pytest.mark.parametrize(
    "found",
    [
        EXACT,
        Numerics(0.002, "cpu"),
        pytest.param(REFUSED, marks=pytest.mark.slow),
    ],
    ids=["exact", "not exact", "refused"],
)
def test_a_run_that_is_not_exact_compiled_goes_on_as_it_was(argv, found, monkeypatch, capsys):
    compiled_when_probed = []

    def probed(language_model, *given):
        is_compiled = "forward" in vars(language_model.model.model.norm)
        compiled_when_probed.append(is_compiled)
        if is_compiled and isinstance(found, UsageError):
            raise found
        return given[2], found if is_compiled else EXACT

    monkeypatch.setattr(train, "probed", probed)
    assert in_process(train.main, argv) == EXIT_OK
    lines = [each for each in capsys.readouterr().err.splitlines() if "--compile" in each]
    if found is EXACT:
        assert (compiled_when_probed, lines) == ([True], [])
    else:
        assert compiled_when_probed == [True, False]
        assert "goes on without, since compiled parts are not exact: " in lines[0]
        assert len(lines) == 1


def test_sharded_layers_are_not_compiled(argv):
    with pytest.raises(UsageError, match="--compile does not go with --fsdp"):
        in_process(train.main, [*argv, "--fsdp"])


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a compiler on a busy machine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_machine_code_learns_the_same(argv, dtype, tmp_path, monkeypatch, capsys):
    if shutil.which("g++") is None:
        pytest.skip("the compiler of a CPU needs g++")
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    assert in_process(train.main, [*argv, f"--dtype={dtype}"]) == EXIT_OK
    assert "--compile: " not in capsys.readouterr().err
    seen = losses(tmp_path / "job")
    shutil.rmtree(tmp_path / "job")
    assert in_process(train.main, [*argv[:-1], f"--dtype={dtype}"]) == EXIT_OK
    assert seen == pytest.approx(losses(tmp_path / "job"), rel=1e-5 if dtype == "float32" else 0.01)
