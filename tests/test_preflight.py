"""What is seen before a run begins: each thing in one line, and nothing is left behind."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from datetime import date, datetime
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.utils import chat_template_utils

import generate_inference_command
import generate_train_command
import inference
import train
from privacy_checks.tiny_model import byte_tokenizer, tiny_llama
from tests.json_lines import jsonl
from tests.paths import ROOT
from tests.training import flags, in_process, save_dataset
from utils.cli import UsageError, run_cli
from utils.models.footprint import GIB
from utils.models.loading import load_base_model, load_skeleton
from utils.runs import preflight
from utils.runs.preflight import (
    check_positions,
    require_gpus,
    require_room,
    trained_positions,
    visible_gpus,
)
from utils.texts.prompts import write_instruction_file

# Numbers of an adapter of rank 8 of the tiny model.
ADAPTER = 2 * 8 * (64 + 48 + 48 + 64)
# Bytes of the adapter, and of thrice its size in each of three checkpoints.
DISK = 4 * ADAPTER * (1 + 3 * 3)
DATED = (
    "{{ strftime_now('%d %b %Y %H:%M:%S') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}<assistant>"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp("data"))


def with_config(folder, changes, model_dir):
    """A copy of a model folder whose config.json has other values."""
    model = load_base_model(model_dir, torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


def with_tokenizer(folder, changes, model=None):
    """A tiny model's folder whose tokenizer was changed by a function."""
    (model or tiny_llama()).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    changes(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


def refused(main, argv, capsys) -> str:
    """The one line with which a command refuses; its exit code is 2."""
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: in_process(main, argv))
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def sampling(model, **changes):
    values = {
        "instruction_file": "i.txt", "model_name": model, "job_sess": "job",
        "prompt_style": "uncond_generation", "max_seq_len": 24, "num_samples": 2,
    } | changes  # fmt: skip
    return [f"--{name}={value}" if value is not True else f"--{name}"
            for name, value in values.items() if value is not None]  # fmt: skip


def samples_file():
    Path("i.txt").write_text("### BOI ### 1\n2\n### EOI ###\n")


# ---------------------------------------------------------------- --check and --dry_run


@pytest.mark.parametrize("rehearsal", ["--check", "--dry_run"])
@pytest.mark.parametrize("dp", [True, False])
def test_a_rehearsed_training_leaves_nothing_behind(
    here, letters, tiny_model_dir, capsys, rehearsal, dp
):
    argv = flags(tiny_model_dir, letters, here / "outputs", rehearsal, dp=dp)
    assert in_process(train.main, argv) == 0
    assert list(here.iterdir()) == []
    words = capsys.readouterr().err
    if rehearsal == "--check":
        assert "--check: nothing was found that would stop this run" in words
    else:
        found = re.search(r"--dry_run: (\S+) s a step and (\S+) h for 8 steps.* (\S+) GiB", words)
        seconds, hours, gib = map(float, found.groups())
        assert 0 < seconds < 60
        assert hours == pytest.approx(8 * seconds / 3600, rel=0.01)
        assert 0.05 < gib < 10
        assert f"{DISK / 1e6:,.1f} MB of disk" in words


def test_a_rehearsed_training_of_units_is_of_the_shapes_of_units(here, tiny_model_dir, capsys):
    rows = [{"instruction": "a" * (1 + row % 20), "who": f"u{row % 16}"} for row in range(64)]
    (here / "rows.jsonl").write_text(jsonl(rows))
    units = ["--unit_column=who", "--max_rows_per_unit=3", "--total_bs=4", "--dry_run"]
    units.append("--noise_multiplier=5")
    argv = flags(tiny_model_dir, "rows.jsonl", here / "outputs", *units)
    assert in_process(train.main, argv) == 0
    assert "h for 4 steps" in capsys.readouterr().err
    assert not (here / "outputs").exists()


@pytest.mark.parametrize(
    ("units", "longest"),
    [([], 8 * 32), (["--unit_column=who", "--max_rows_per_unit=3", "--total_bs=4"], 4 * 3 * 32)],
)
def test_the_rate_for_advice_is_of_rows_of_the_greatest_length(
    here, tiny_model_dir, capsys, monkeypatch, units, longest
):
    """A millisecond a token and half a second for the release: private lengths have no part."""
    seconds, passed = [0.0], train.pass_microbatch

    def passing(*given):
        seconds[0] += 1e-3 * given[-1]["input_ids"].numel()
        passed(*given)

    monkeypatch.setattr(train, "pass_microbatch", passing)
    monkeypatch.setattr(train.Private, "rehearse_release", lambda *_: 0.5)
    monkeypatch.setattr(train, "time", Mock(wraps=time, monotonic=lambda: seconds[0]))
    for length in (3, 30):
        rows = [{"instruction": "a" * length, "who": f"u{row % 16}"} for row in range(64)]
        (here / "rows.jsonl").write_text(jsonl(rows))
        argv = flags(tiny_model_dir, "rows.jsonl", here / "outputs", *units, "--dry_run")
        assert in_process(train.main, [*argv, "--noise_multiplier=5"]) == 0
        words = capsys.readouterr().err
        (rate,) = re.findall(r"--tokens_per_second (\S+) for --advise, were all rows of 32", words)
        assert rate == f"{longest / (1e-3 * longest + 0.5):.3g}"


def memory_of_rehearsals(*argv: str) -> None:
    """Rehearse with white noise, then with 40 bands, and print what is in use where it counts.

    For a process whose allocator gives back what is freed.
    """

    def fitting(_step, _device):
        print(psutil.Process().memory_info().rss / GIB)
        return 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fitting_sequences", fitting)
        for noise in ([], ["--noise=banded", "--bands=40"]):
            assert in_process(train.main, [*argv, *noise]) == 0


def test_a_rehearsal_counts_the_noise_that_a_run_with_bands_keeps(here, letters, tiny_model_dir):
    """39 of 40 vectors of past noise; also where it is asked how many sequences fit."""
    wide = ["--lora_r=1024", "--target_modules=all-linear", "--total_bs=1", "--perdevice_bs=auto"]
    argv = flags(tiny_model_dir, letters, here / "outputs", *wide, "--dry_run")
    script = "import sys; from tests.test_preflight import *; memory_of_rehearsals(*sys.argv[1:])"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *argv],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    rehearsed = [float(gib) for gib in re.findall(r"(\S+) GiB of memory", done.stderr)]
    fitted = [float(gib) for gib in done.stdout.split()]
    # Of each of two layers, the sum of the features on both sides of seven Linear layers.
    trained = 2 * 1024 * 512
    for without, with_bands in (rehearsed, fitted):
        assert with_bands - without > 0.9 * 8 * 39 * trained / GIB


def test_rehearsals_of_a_run_that_is_there_change_nothing(here, letters, tiny_model_dir):
    argv = flags(tiny_model_dir, letters, here / "outputs", "--num_epochs=0.3", dp=False)
    assert in_process(train.main, argv) == 0
    (here / "outputs" / "job" / "privacy_report.json").unlink()  # as if it was stopped
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for rehearsal in ("--check", "--dry_run"):
        assert in_process(train.main, [*argv, "--resume=auto", rehearsal]) == 0
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_rehearsed_sampling_leaves_nothing_behind(here, tiny_model_dir, capsys):
    samples_file()
    for rehearsal in ("check", "dry_run"):
        assert in_process(inference.main, sampling(tiny_model_dir, **{rehearsal: True})) == 0
    assert [path.name for path in here.iterdir()] == ["i.txt"]
    words = capsys.readouterr().err
    assert "--check: nothing was found" in words
    assert re.search(r"--dry_run: \d+ tokens/s .* h at most for 2 texts.* GiB .* MB", words)


@pytest.mark.parametrize("flag", ["--check", "--dry_run"])
def test_generators_run_a_rehearsal_at_once(here, letters, tiny_model_dir, monkeypatch, flag):
    ran = []
    for module in (generate_train_command, generate_inference_command):
        monkeypatch.setattr(module, "print_or_run", lambda *given: ran.append(given) or 0)
    samples_file()
    assert generate_train_command.main(flags(tiny_model_dir, letters, here, flag)) == 0
    assert generate_inference_command.main([*sampling(tiny_model_dir), flag]) == 0
    assert [(flag in command, run) for command, run in ran] == [(True, True)] * 2
    with pytest.raises(UsageError, match="--elsewhere and --run, --check or --dry_run"):
        generate_inference_command.main([*sampling(tiny_model_dir), flag, "--elsewhere"])


# ---------------------------------------------------------------- tokens and positions


def pad_beyond(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def longer(tokenizer):
    tokenizer.add_tokens(["abc"])


def test_a_padding_id_beyond_the_embedding_is_refused(here, letters, capsys):
    model = with_tokenizer(here / "model", pad_beyond)
    line = refused(train.main, flags(model, letters, here / "outputs"), capsys)
    assert "padding token '[PAD]' has the id 259, but the model's embedding has 259 rows" in line
    assert "\"pad_token\" to '</s>'" in line
    samples_file()
    assert "padding token" in refused(inference.main, sampling(model, check=True), capsys)


def test_added_tokens_beyond_the_embedding_are_refused_where_they_occur(here, capsys):
    model = with_tokenizer(here / "model", longer)
    (here / "rows.jsonl").write_text(jsonl([{"instruction": "xyz"}] * 8))
    argv = flags(model, "rows.jsonl", here / "outputs", "--check", dp=False)
    assert in_process(train.main, argv) == 0
    (here / "rows.jsonl").write_text(jsonl([{"instruction": "xabcx"}] * 8))
    line = refused(train.main, argv, capsys)
    assert "largest token 'abc' has the id 259" in line
    write_instruction_file("i.txt", ["xabcx"])
    conditional = {"prompt_style": "llama2", "num_samples": None, "max_seq_len": 64}
    assert "largest token 'abc'" in refused(inference.main, sampling(model, **conditional), capsys)


def test_padding_that_is_the_end_is_fine(here, letters):
    model = with_tokenizer(here / "model", lambda t: setattr(t, "pad_token", t.eos_token))
    assert in_process(train.main, flags(model, letters, here / "outputs", "--check")) == 0


def test_a_table_of_positions_is_a_limit(here, letters, capsys):
    shape = {"n_positions": 16, "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 259}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2))
    model = with_tokenizer(here / "model", lambda _: None, gpt2)
    line = refused(train.main, flags(model, letters, here / "outputs"), capsys)
    assert "--max_seq_len 32, but gpt2 has a table of 16 positions; use --max_seq_len 16" in line
    samples_file()
    assert "a table of 16 positions" in refused(inference.main, sampling(model), capsys)
    argv = flags(model, letters, here / "outputs", "--max_seq_len=16", "--check")
    assert in_process(train.main, argv) == 0


def test_positions_that_turn_go_on_with_a_warning():
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "vocab_size": 259}
    config = OPTConfig(
        max_position_embeddings=16, num_hidden_layers=1, num_attention_heads=2, **shape
    )
    opt = OPTForCausalLM(config)
    with pytest.raises(UsageError, match="a table of 16 positions"):
        check_positions(opt, 17)
    assert check_positions(opt, 16) == []
    llama = tiny_llama()
    (warning,) = check_positions(llama, 513)
    assert "goes beyond the 512 positions" in warning
    assert check_positions(llama, 512) == []
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    llama.config.rope_parameters = stretched
    assert trained_positions(llama.config) == 2048
    assert check_positions(llama, 2048) == []


# ---------------------------------------------------------------- the base


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
@pytest.mark.parametrize("dp", [True, False])
def test_a_base_that_is_stored_quantised_is_refused_before_it_is_loaded(
    here, letters, tiny_model_dir, capsys, method, dp
):
    changes = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 32}}
    model = with_config(here / "model", changes, tiny_model_dir)
    line = refused(train.main, flags(model, letters, here / "outputs", "--check", dp=dp), capsys)
    assert f"stored quantised by {method}" in line
    assert "--load_in_4bit" in line


def test_a_head_that_is_nowhere_is_refused_and_not_drawn(here, capsys):
    tiny_llama(tie_word_embeddings=True).save_pretrained(here / "model")
    byte_tokenizer().save_pretrained(here / "model")
    load_base_model(str(here / "model"), torch.float32)
    file = here / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(UsageError, match="has no weights for lm_head.weight.*tie_word_embeddings"):
        load_base_model(str(here / "model"), torch.float32)


def test_weights_of_another_shape_are_refused_by_name(here, tiny_model_dir):
    model = with_config(here / "model", {"intermediate_size": 48}, tiny_model_dir)
    with pytest.raises(UsageError, match=r"weights \[32, 64\] for .*down_proj.* \[32, 48\]"):
        load_base_model(model, torch.float32)


def test_a_damaged_tokenizer_is_one_line(here, tiny_model_dir, letters, capsys):
    for content in ('{"version": "1.0"}', '{"added_tokens": [], "model": {"type": "none"}}'):
        model = with_config(here / "model", {}, tiny_model_dir)
        (here / "model" / "tokenizer.json").write_text(content)
        argv = flags(model, letters, here / "outputs", "--check", dp=False)
        assert "tokenizer of" in refused(train.main, argv, capsys)


def test_an_adapter_on_a_head_that_is_the_embedding(here, letters, capsys):
    tiny_llama(tie_word_embeddings=True).save_pretrained(here / "model")
    byte_tokenizer().save_pretrained(here / "model")
    heads = ["--target_modules", "q_proj", "lm_head"]
    argv = flags("model", letters, here / "outputs", *heads)
    assert "head of this model is its embedding" in refused(train.main, argv, capsys)
    base = load_base_model("model", torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    get_peft_model(base, config).save_pretrained("adapter", save_embedding_layers=False)
    samples_file()
    line = refused(inference.main, sampling("model", adapter_path="adapter", check=True), capsys)
    assert "merged into one it would change both; add --no_merge" in line
    argv = sampling("model", adapter_path="adapter", no_merge=True, check=True)
    assert in_process(inference.main, argv) == 0


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_check_sees_an_adapter_that_does_not_fit(here, tiny_model_dir, capsys, change):
    base = load_base_model(tiny_model_dir, torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained("adapter")
    file = Path("adapter/adapter_model.safetensors")
    weights = load_file(file)
    if change == "one more":
        weights["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(
            8, 32
        )
    else:
        weights.popitem()
    save_file(weights, file)
    samples_file()
    argv = sampling(tiny_model_dir, adapter_path="adapter", check=True)
    line = refused(inference.main, argv, capsys)
    assert ("which no layer of this model takes" if change == "one more" else "lacks ") in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "model"),
        ("{}", "model_type"),
        ('{"model_type": "nosuch"}', "nosuch"),
        ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
        ('{"model_type": "t5"}', "makes no model"),
    ],
)
def test_a_damaged_config_is_one_line(here, letters, tiny_model_dir, capsys, content, message):
    model = with_config(here / "model", {}, tiny_model_dir)
    (here / "model" / "config.json").write_text(content)
    line = refused(train.main, flags(model, letters, here / "outputs", "--check"), capsys)
    assert message in line


def test_a_skeleton_holds_no_weights(tiny_model_dir):
    model = load_skeleton(tiny_model_dir)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert AutoConfig.from_pretrained(tiny_model_dir).hidden_size == model.config.hidden_size


# ---------------------------------------------------------------- templates and their day


class Tomorrow(date):
    @classmethod
    def today(cls):
        return date(2031, 5, 6)


class ClockOfTomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2031, 5, 6)


def test_the_day_of_a_run_stays_and_travels_with_the_adapter(
    here, tiny_model_dir, monkeypatch, capsys
):
    model = with_tokenizer(here / "model", lambda t: setattr(t, "chat_template", DATED))
    data = save_dataset(here, labelled=True)
    style = ["--prompt_style=chat_template", "--max_seq_len=120"]
    argv = flags(model, data, here / "outputs", *style, dp=False)
    kept = train.save_checkpoint

    class Crash(Exception):
        pass

    def crash(*given):
        kept(*given)
        raise Crash

    monkeypatch.setattr(train, "save_checkpoint", crash)
    with pytest.raises(Crash):
        in_process(train.main, argv)
    monkeypatch.setattr(train, "save_checkpoint", kept)
    today = date.today().isoformat()
    monkeypatch.setattr(train, "date", Tomorrow)
    monkeypatch.setattr(inference, "date", Tomorrow)
    monkeypatch.setattr(chat_template_utils, "datetime", ClockOfTomorrow)
    assert in_process(train.main, [*argv, "--resume=auto"]) == 0
    assert json.loads((here / "outputs/job/run_config.json").read_text())["prompt_date"] == today
    adapter = here / "outputs" / "job" / "adapter"
    assert json.loads((adapter / "training_style.json").read_text())["prompt_date"] == today
    write_instruction_file("i.txt", ["hi"])
    conditional = {
        "prompt_style": "chat_template", "num_samples": None, "max_seq_len": 120,
        "max_new_tokens": 2, "engine": "static",
    }  # fmt: skip
    for more, day in (({"adapter_path": adapter}, today), ({"job_sess": "base"}, "2031-05-06")):
        assert in_process(inference.main, sampling(model, **(conditional | more))) == 0
        manifest = here / "inference_outputs" / more.get("job_sess", "job") / "manifest.json"
        assert json.loads(manifest.read_text())["prompt_date"] == day


def test_a_template_that_drops_the_instruction_stops_training_and_sampling(here, capsys):
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    model = with_tokenizer(here / "model", lambda t: setattr(t, "chat_template", parts))
    data = save_dataset(here, labelled=True)
    argv = flags(model, data, here / "outputs", "--prompt_style=chat_template")
    assert "drops the instruction" in refused(train.main, argv, capsys)
    write_instruction_file("i.txt", ["hi"])
    argv = sampling(model, prompt_style="chat_template", num_samples=None)
    assert "drops the instruction" in refused(inference.main, argv, capsys)
    assert not (here / "outputs").exists()
    assert not (here / "inference_outputs").exists()


# ---------------------------------------------------------------- rows


def test_rows_that_are_cut_or_have_no_loss_are_counted_under_private(here, tiny_model_dir, capsys):
    rows = [{"instruction": "a" * 300, "answer": "b"}] * 7 + [{"instruction": "a", "answer": "b"}]
    (here / "labelled_rows.jsonl").write_text(jsonl(rows))
    argv = flags(
        tiny_model_dir, "labelled_rows.jsonl", here / "outputs", "--prompt_style=llama2", dp=False
    )
    assert in_process(train.main, argv) == 0
    expected = {"train": {"rows": 8, "cut": 7, "without_loss": 7}}
    counts = here / "outputs" / "job" / "private" / "row_counts.json"
    assert json.loads(counts.read_text()) == expected
    words = capsys.readouterr().err
    assert "of 8 rows of train, 7 are cut at --max_seq_len 32 and 7 have no token with" in words
    assert "private" in words


def test_rows_that_are_whole_are_not_spoken_of(here, letters, tiny_model_dir, capsys):
    assert in_process(train.main, flags(tiny_model_dir, letters, here / "o", "--check")) == 0
    assert "are cut" not in capsys.readouterr().err


# ---------------------------------------------------------------- disk and GPUs


def test_room_is_asked_for_before_the_model_is_loaded(
    here, letters, tiny_model_dir, monkeypatch, capsys
):
    asked = []

    def full(_descriptor, _start, size):
        asked.append(size)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(preflight.os, "posix_fallocate", full)
    monkeypatch.setattr(train, "load_base_model", None)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: in_process(train.main, flags(tiny_model_dir, letters, here / "outputs")))
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "Disk quota exceeded, the run needs 0.1 MB" in line
    assert str(here / "outputs" / "job") in line
    assert "make room" in line
    assert asked == [DISK]
    assert not (here / "outputs").exists()


def test_sampling_asks_for_room_before_the_model_is_loaded(
    here, tiny_model_dir, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preflight.os, "posix_fallocate", full)
    monkeypatch.setattr(inference, "load_base_model", None)
    samples_file()
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: in_process(inference.main, sampling(tiny_model_dir)))
    assert ended.value.code == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "inference_outputs").exists()


def test_room_that_is_asked_for_is_given_back(tmp_path):
    require_room(tmp_path, 5_000_000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="the run needs 1"):
        require_room(tmp_path, 10**18)


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    require_gpus(2, 2)
    require_gpus(2, 0)  # on the CPU
    require_gpus(2, None)
    with pytest.raises(UsageError, match="--gpus 3, but this machine has 2 .* use --gpus 2"):
        require_gpus(3, 2)
    monkeypatch.setattr(preflight, "GPUS_OF_THE_DRIVER", tmp_path)
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == 2
    for chosen, visible in (("0", 1), ("", 0), ("0,1,7", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_gpus() == visible
    monkeypatch.setattr(preflight, "GPUS_OF_THE_DRIVER", tmp_path / "none")
    assert visible_gpus() is None


@pytest.mark.parametrize("module", ["train", "inference"])
def test_a_generator_counts_gpus_and_looks_at_the_models_folder(
    here, letters, monkeypatch, capsys, module
):
    samples_file()
    generator, argv = {
        "train": (generate_train_command, flags("/nowhere/model", letters, here)),
        "inference": (generate_inference_command, sampling("/nowhere/model")),
    }[module]
    assert generator.main(argv) == 0
    assert "warning: no model at '/nowhere/model'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no model at '/nowhere/model'"):
        generator.main([*argv, "--run"])
    (here / "empty").mkdir()
    with pytest.raises(UsageError, match="a folder without config.json"):
        generator.main([*argv, "--model_name=empty"])
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 1)
    assert generator.main([*argv, "--gpus=2", "--model_name=a/b"]) == 0
    assert "warning: --gpus 2, but this machine has 1" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--gpus 2, but this machine has 1"):
        generator.main([*argv, "--gpus=2", "--model_name=a/b", "--run"])
