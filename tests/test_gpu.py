"""What a GPU must do as a CPU does, in whole runs and in parts: `pytest -m gpu`.

Without one these tests are skipped, and most of them run on the pretend device
(tests/pretend_cuda), which tests/test_pretend_cuda.py sees to.
"""

import linecache
import re
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import inference
import train
from privacy_checks import tiny_model as tiny
from privacy_checks.replay import replay_wide
from tests.helpers import (
    adapted_model,
    clipped_sum,
    random_examples,
    reference_sum,
    relative_error,
    tiny_model,
)
from tests.training import flags, in_process, run_process, save_dataset
from utils.cli import EXIT_OK, UsageError
from utils.command_line.parser import read_flags
from utils.dp_utils import PerExampleGradients, add_noise
from utils.models.footprint import GIB, RowMemory
from utils.models.language_model import LanguageModel
from utils.models.loading import load_quantised_model, resolve_dtype
from utils.models.lora import default_target_modules, load_adapted
from utils.models.memory import MOST_SEQUENCES, PeakMemory, fitting_sequences
from utils.privacy.ledger import LEDGER_FILE
from utils.row_dropout import RowMasks, kept
from utils.runs.batching import Cost, Shapes
from utils.runs.checkpointing import load_last_good
from utils.runs.probe import Numerics, full_precision, probed
from utils.sampling.shards import read_samples
from utils.secure_random import SecureRandom

GPU = torch.device("cuda", 0)
PRETEND = "tests.pretend_cuda.device" in sys.modules

# Two steps, with a noise that needs no calibration.
SHORT = ("--num_epochs=0.5", "--eps=1e6", "--noise_multiplier=1", "--max_eval_examples=4")

pytestmark = pytest.mark.gpu
real_gpu = pytest.mark.skipif(PRETEND, reason="of kernels that the pretend device does not have")
pretend_gpu = pytest.mark.skipif(not PRETEND, reason="of the pretend device itself")


# ------------------------------------------------------------------------ sums and noise


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_clipped_sums_equal_the_reference_in_float64(model_type, dtype, tolerance):
    base = tiny_model(model_type).to(dtype)
    model = adapted_model(default_target_modules(base), base=base)
    data = random_examples([5, 30, 12, 17])
    expected, _ = reference_sum(model, data, 0.7)
    total, _ = clipped_sum(model.to(GPU), data, 0.7)
    assert total.device == GPU
    assert relative_error(total.cpu(), expected) < tolerance


def test_noise_is_the_cpus_to_the_last_bit():
    total = torch.randn(1000)
    noised = [
        add_noise(total.to(device), 0.8, 0.5, SecureRandom.insecure_fixed(1, "noise", 0)).cpu()
        for device in ("cpu", GPU)
    ]
    assert torch.equal(*noised)


def test_dropout_keeps_the_same_entries_as_on_a_cpu():
    seeds = torch.tensor([3, -(2**62), 17])
    assert torch.equal(kept(seeds, 20, 30, 0.1), kept(seeds.to(GPU), 20, 30, 0.1).cpu())


def test_flash_attention_needs_no_mask():
    language_model = LanguageModel(tiny.tiny_llama().to(GPU, torch.bfloat16))
    data = random_examples([30, 4, 17])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        sums, _ = language_model.example_losses(data.collate(np.arange(3), 0, GPU))
    language_model.needs_mask = True
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        masked, _ = language_model.example_losses(data.collate(np.arange(3), 0, GPU))
    assert torch.allclose(sums, masked, rtol=0.01)


# ------------------------------------------------------------------------ memory


@pytest.fixture
def capped_memory():
    """A device of 256 MiB, of which the rest cannot be had."""
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((256 << 20) / total)
    yield 256 << 20
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_fits_is_found_on_a_card_that_ends(capped_memory):
    def step(sequences: int) -> None:
        torch.zeros(sequences, 10 << 20, dtype=torch.uint8, device=GPU).add_(1)

    with PeakMemory(GPU) as peak:
        found = fitting_sequences(step, GPU)
        step(found)
    assert 2 < found < min(26, MOST_SEQUENCES)
    assert 0 < peak.peak <= capped_memory


def test_too_little_memory_is_said_in_a_line(capped_memory):
    def step(sequences: int) -> None:
        torch.zeros(sequences, 200 << 20, dtype=torch.uint8, device=GPU)

    with pytest.raises(UsageError, match="not two sequences fit"):
        fitting_sequences(step, GPU)


# ------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp("data"), rows=32)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A model so small that the pretend device is done with it soon."""
    folder = tmp_path_factory.mktemp("models") / "one-layer"
    tiny.save_tiny_model(folder, num_hidden_layers=1)
    return str(folder)


@pytest.fixture(scope="module")
def trained(one_layer, data, tmp_path_factory):
    """Flags of a DP run in bfloat16 of two steps, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("runs")
    argv = flags(
        one_layer, data, folder, "--dtype=bfloat16", "--gradient_checkpointing",
        "--perdevice_bs=auto", "--save_steps=1", *SHORT, "--insecure_fixed_noise_seed=3",
    )  # fmt: skip
    assert in_process(train.main, argv) == EXIT_OK
    return argv, folder / "job"


def test_a_run_in_bfloat16_trains_on_the_gpu(trained):
    argv, folder = trained
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "cuda in bfloat16" in (folder / "privacy_report.json").read_text()


def test_microbatches_are_large_where_launches_take_the_time(trained):
    """Sixteen times the rows of a CPU's, in lengths that are powers of two."""
    argv = [*trained[0], "--max_seq_len=1024", "--total_bs=256"]
    settings = read_flags(train.TrainingSettings, "", argv)
    shapes = train.shapes_to_try(settings, 4096, Cost(4000, overlaps=True), RowMemory())
    assert [each.tokens for each in shapes] == [None, 4096]
    assert shapes[1].padded(np.arange(1, 200)).max() == 256


def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(trained, tmp_path):
    argv, whole = trained
    folder = tmp_path / "job"
    shutil.copytree(whole, folder)
    # As a kill after the first step would have left it.
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    ledger = folder / LEDGER_FILE
    plan, first, *_ = ledger.read_text().splitlines(keepends=True)
    ledger.write_text(plan + first)
    stopped = load_last_good(folder / "checkpoints")
    assert stopped is not None
    assert all(tensor.device.type == "cpu" for tensor in stopped.adapter.values())
    assert in_process(train.main, [*argv, f"--output_dir={tmp_path}", "--resume=auto"]) == EXIT_OK
    adapter = "adapter/adapter_model.safetensors"
    assert (whole / adapter).read_bytes() == (folder / adapter).read_bytes()


def test_memory_that_runs_out_in_the_middle_of_a_step_changes_nothing(
    one_layer, data, tmp_path, monkeypatch, capped_memory, capsys
):
    original, failed = train.pass_microbatch, []

    def pass_microbatch(*given):
        result = original(*given)
        rows = len(given[-1]["lengths"])
        if stingy and rows > 1:
            failed.append(rows)
            torch.empty(capped_memory + 1, dtype=torch.uint8, device=GPU)
        return result

    monkeypatch.setattr(train, "pass_microbatch", pass_microbatch)
    monkeypatch.setattr(train, "probed", lambda *given: (given[4], Numerics(0.0, "nothing")))
    adapters = []
    for stingy in (False, True):
        folder = tmp_path / str(stingy)
        argv = flags(one_layer, data, folder, *SHORT, "--dtype=float32", "--perdevice_bs=4",
                     "--insecure_fixed_noise_seed=3", "--no_eval_at_start")  # fmt: skip
        assert in_process(train.main, argv) == EXIT_OK
        adapters.append(load_file(folder / "job" / "adapter" / "adapter_model.safetensors"))
    assert len(failed) > 1
    assert "out of memory in the middle of a step" in capsys.readouterr().err
    whole, halved = adapters
    assert all(torch.allclose(whole[name], halved[name], atol=1e-5) for name in whole)


@pytest.mark.parametrize("banded", [[], ["--noise=banded", "--bands=4"]])
def test_a_rehearsal_says_the_host_memory_of_past_noise_apart(
    one_layer, data, tmp_path, capsys, banded
):
    rehearsed = ["--num_epochs=2", "--dtype=float32", "--dry_run", *banded]
    argv = flags(one_layer, data, tmp_path, *SHORT, *rehearsed)
    assert in_process(train.main, argv) == EXIT_OK
    said = re.search(r"in a process(?: and (\S+) GiB of host memory)?", capsys.readouterr().err)
    adapter = 8 * (64 + 48 + 48 + 64)
    expected = [f"{8 * 3 * adapter / GIB:.3g}"] if banded else [None]
    assert said is not None
    assert [*said.groups()] == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_a_microbatch_waits_three_times_for_the_gpu_however_many_layers(
    layers, data, tmp_path, monkeypatch
):
    tiny.save_tiny_model(tmp_path / "model", num_hidden_layers=layers)
    seen, ends, steps = [], [], []
    original, assign = train.pass_microbatch, train.assign_gradient

    def pass_microbatch(*given):
        result = original(*given)
        ends.append((len(steps), len(seen)))
        return result

    def assign_gradient(*given):
        steps.append(len(seen))
        return assign(*given)

    monkeypatch.setattr(train, "pass_microbatch", pass_microbatch)
    monkeypatch.setattr(train, "assign_gradient", assign_gradient)
    monkeypatch.setattr(train, "probed", lambda *given: (given[4], Numerics(0.0, "nothing")))
    more = ("--target_modules=all-linear", "--lora_r=64", *SHORT)
    with waiting_noticed(seen):
        argv = flags(str(tmp_path / "model"), data, tmp_path, "--no_eval_at_start", *more)
        assert in_process(train.main, argv) == EXIT_OK
    # From the end of one pass to the end of the next of the same step, what is added between them.
    waited = [
        Counter(seen[first:last])
        for (step, first), (same_step, last) in zip(ends, ends[1:])
        if step == same_step
    ]
    assert len(waited) > 2
    expected = {
        "sizes = counts.tolist()",
        "cancelled = torch.stack([pair.cancelled for pair in pairs]).cpu()  # [layers, examples]",
        "if not finite.all():",
    }
    assert set().union(*waited) == expected
    assert max(each.total() for each in waited) == 3


class waiting_noticed(warnings.catch_warnings):
    """Appends the line of source, wherever the CPU waits for the GPU in the block."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self._seen = seen

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("always")
        show = warnings.showwarning

        def showwarning(message, category, filename, lineno, *more):
            if "synchronizing CUDA" in str(message):
                self._seen.append(linecache.getline(filename, lineno).strip())
            else:
                show(message, category, filename, lineno, *more)

        warnings.showwarning = showwarning
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        super().__exit__(*error)


@real_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_is_left_out_moves_no_other(dtype):
    moves = replay_wide(dtype, device="auto")
    assert moves.passed, moves


def probe_on_gpu(base, targets=("q_proj",), tokens=48):
    """What the probe finds of an adapted base; its company passes in one shape."""
    model = adapted_model(list(targets), base=base.to(torch.bfloat16)).to(GPU)
    free = Shapes(max_seq_len=tokens, token_budget=4 * tokens, tokens=None)
    fixed = replace(free, tokens=2 * tokens)
    gradients, language_model = PerExampleGradients(model), LanguageModel(model.get_base_model())
    full_precision()
    return probed(language_model, gradients, RowMasks(b"k"), free, fixed, lambda number: number)


@pytest.fixture
def any_order():
    """Kernels as torch chooses them, after the test too."""
    yield
    torch.use_deterministic_algorithms(False)


def test_no_kernel_is_taken_that_adds_in_no_order(any_order, capsys):
    probe_on_gpu(tiny.tiny_llama())
    assert torch.get_deterministic_debug_mode() == 2
    assert "order of sums" not in capsys.readouterr().err


def test_a_base_that_needs_such_a_kernel_is_told(any_order, capsys):
    def unordered(_module, _inputs, hidden):
        one = torch.zeros(1, dtype=torch.long, device=hidden.device)
        hidden.detach().clone().put_(one, hidden.detach().flatten()[:1])

    base = tiny.tiny_llama()
    base.model.norm.register_forward_hook(unordered)
    probe_on_gpu(base)
    assert torch.get_deterministic_debug_mode() == 1
    assert "the order of sums is not fixed: put_" in capsys.readouterr().err


@real_gpu
def test_long_rows_of_a_deep_base_have_gradients_of_their_own(any_order):
    wide = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    deep = tiny.tiny_llama(**wide, num_hidden_layers=16, max_position_embeddings=1024)
    probe_on_gpu(deep, ("q_proj", "v_proj"), tokens=1024)


def test_an_adapter_is_merged_on_the_gpu(trained, one_layer, monkeypatch):
    merging, places = Linear.get_delta_weight, []

    def watched(layer, name):
        delta = merging(layer, name)
        places.append((delta.device, layer.base_layer.weight.dtype))
        return delta

    monkeypatch.setattr(Linear, "get_delta_weight", watched)
    adapter = trained[1] / "adapter"
    model = load_adapted(one_layer, adapter, torch.bfloat16, merge=True, device=GPU)
    assert places == [(GPU, torch.bfloat16)] * 4
    assert {(each.device, each.dtype) for each in model.parameters()} == {(GPU, torch.bfloat16)}


@pytest.mark.parametrize("engine", ["static", "continuous", "vllm"])
def test_texts_are_drawn_by(engine, trained, one_layer, tmp_path):
    if engine == "vllm":
        pytest.importorskip("vllm")
    _, run = trained
    argv = [
        f"--model_name={one_layer}", f"--adapter_path={run / 'adapter'}", "--job_sess=job",
        f"--output_dir={tmp_path}", "--instruction_file=utils/syn_instruct.txt", "--top_p=0.95",
        "--prompt_style=uncond_generation", "--num_samples=6", "--max_seq_len=16",
        f"--engine={engine}", "--dtype=bfloat16",
    ]  # fmt: skip
    assert in_process(inference.main, argv) == EXIT_OK
    assert len(list(read_samples(tmp_path / "job"))) == 6


# ------------------------------------------------------------------------ devices as they are


def test_a_gpu_without_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert resolve_dtype("auto", GPU) == torch.float32
    assert resolve_dtype("float32", GPU) == torch.float32
    with pytest.raises(UsageError, match=r"--dtype bfloat16: .*7\.5, below 8\.0"):
        resolve_dtype("bfloat16", GPU)


def test_a_gpu_with_bfloat16_takes_it():
    assert resolve_dtype("auto", GPU) == torch.bfloat16


@real_gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_passes_gradients_to_its_adapters(bits, tiny_model_dir):
    pytest.importorskip("bitsandbytes")
    base = load_quantised_model(tiny_model_dir, torch.bfloat16, bits, GPU)
    model = adapted_model(default_target_modules(base), base=base)
    total, norms = clipped_sum(model.to(GPU), random_examples([5, 30, 12]), 0.7)
    assert torch.isfinite(total).all()
    assert (norms > 0).all()


@real_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a single GPU")
def test_two_gpus_train_one_model(tiny_model_dir, data, tmp_path):
    argv = flags(tiny_model_dir, data, tmp_path, "--insecure_fixed_noise_seed=3")
    launcher = ("-m", "accelerate.commands.launch", "--num_processes=2", "--multi_gpu")
    done = run_process(*launcher, "train.py", *argv)
    assert done.returncode == EXIT_OK, done.stderr


# ------------------------------------------------------------------------ the pretend device


@pretend_gpu
def test_tensors_of_both_devices_do_not_mix():
    with pytest.raises(RuntimeError, match=r"same device.*add.*in tests/test_gpu\.py"):
        torch.ones(2, device=GPU) + torch.ones(2)
    assert (torch.ones(2, device=GPU) + torch.tensor(1.0)).tolist() == [2, 2]


@pretend_gpu
def test_what_waits_is_told_by_its_line():
    values, seen = torch.arange(4, device=GPU), []
    with waiting_noticed(seen):
        values.sum().item()
        values[values > 1]
        values[values > 1] = 0
        torch.ones(4).to(GPU)
        torch.ones(4).pin_memory().to(GPU, non_blocking=True)
        values.nonzero_static(size=1)
        values[torch.tensor([0])]
    assert seen == [
        "values.sum().item()", "values[values > 1]", "torch.ones(4).to(GPU)",
        "values[torch.tensor([0])]",
    ]  # fmt: skip


@pretend_gpu
def test_memory_is_counted_until_its_last_tensor_goes():
    before = torch.cuda.memory_allocated()
    whole = torch.zeros(1 << 20, dtype=torch.uint8, device=GPU)
    view = whole[10:]
    assert torch.cuda.memory_allocated() - before == 1 << 20
    del whole
    assert torch.cuda.memory_allocated() - before == 1 << 20
    del view
    assert torch.cuda.memory_allocated() == before
