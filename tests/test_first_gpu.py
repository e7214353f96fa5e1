"""`benchmarks/first_gpu.sh`: its steps, and the table that it ends with."""

import importlib
import json
import re
import shlex
import subprocess
from dataclasses import fields

import pytest
import torch

from benchmarks import first_gpu
from tests.paths import ROOT
from utils.command_line.parser import read_flags
from utils.files import write_json
from utils.models.loading import load_base_model, load_tokenizer

SCRIPT = ROOT / "benchmarks" / "first_gpu.sh"


@pytest.fixture(scope="module")
def steps():
    """Seconds, name and command of each step."""
    done = subprocess.run([SCRIPT, "--dry_run"], capture_output=True, text=True, check=True)
    found = re.findall(r"^(.*) \(at most (\d+) s\): (.*)$", done.stdout, re.MULTILINE)
    assert len(found) == len(done.stdout.splitlines())
    return [(int(seconds), name, shlex.split(command)) for name, seconds, command in found]


def test_its_steps_take_ten_minutes_and_end_with_the_table(steps):
    assert sum(seconds for seconds, _, _ in steps) <= 600
    assert steps[0][2][-2:] == ["benchmarks.first_gpu", "--prepare"]
    assert steps[-1][2][-1] == "benchmarks.first_gpu"


def test_its_commands_parse_and_write_what_the_table_reads(steps, tmp_path):
    written = {"model", "mixed.jsonl", *(f"rows-{n}.jsonl" for n in first_gpu.ROW_LENGTHS)}
    for _, _, (python, _, module, *arguments) in steps:
        assert python == "python"
        if module == "pytest":
            continue
        settings_class = importlib.import_module(
            "benchmarks.workload" if module == "benchmarks.training" else module
        ).Settings
        settings = read_flags(settings_class, "", arguments, **_engines(settings_class))
        for field in fields(settings):
            value = str(getattr(settings, field.name))
            if value.startswith("first_gpu/"):
                name = value.removeprefix("first_gpu/")
                assert field.name == "json" or name in written, value
                written.add(name)
    source = (ROOT / "benchmarks" / "first_gpu.py").read_text()
    assert {"exactness-bfloat16.json", "exactness-float32.json", "training.json", "sampling.json",
            *(f"memory-{n}.json" for n in first_gpu.ROW_LENGTHS)} <= written  # fmt: skip
    assert 'read("training")' in source


def _engines(settings_class) -> dict:
    return {"engines": []} if "engines" in {f.name for f in fields(settings_class)} else {}


def test_an_unknown_flag_is_refused():
    done = subprocess.run([SCRIPT, "--dryrun"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--dry_run" in done.stderr


def test_what_it_measures_with_needs_no_download(tmp_path):
    small = first_gpu.MODEL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    first_gpu.prepare(tmp_path, small)
    assert load_base_model(str(tmp_path / "model"), torch.bfloat16).config.vocab_size == 32000
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    for tokens in first_gpu.ROW_LENGTHS:
        lines = (tmp_path / f"rows-{tokens}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["instruction"] for line in lines]
        assert {len(tokenizer(text)["input_ids"]) for text in texts} == {tokens - 1}  # and its end


def test_the_table_shows_what_is_there_and_what_is_missing(tmp_path):
    assert {value for _, value in first_gpu.figures(tmp_path)} == {first_gpu.MISSING}
    setting = {"flops_of_a_step": 100, "matmul_peak_flops_per_second": 50}
    engines = [
        {"engine": name, "real_tokens_per_second": speed, "seconds": [4, 5, 8], "setting": setting}
        for name, speed in (("ours-nondp", 200), ("ours-dp", 150))
    ]
    write_json(tmp_path / "training.json", engines)
    write_json(tmp_path / "memory-16.json", [{"peak_memory_mib": 1234.5}])
    cases = [{"others_move": 0.0}, {"others_move": 0.0031}]
    write_json(tmp_path / "exactness-bfloat16.json", {"cases": cases})
    rates = {"engines": {"static": {"tokens_per_second": 1200.4}}}
    write_json(tmp_path / "sampling.json", rates)
    found = dict(first_gpu.figures(tmp_path))
    assert found["moved of other rows, bfloat16"] == "0.0031 C"
    assert found["moved of other rows, float32"] == first_gpu.MISSING
    assert found["share of matmul peak, ours-dp"] == "0.40"
    assert found["speed, ours-dp over ours-nondp"] == "0.75"
    assert found["peak memory, rows of 16 tokens"] == "1,234 MiB"
    assert found["sampling, static"] == "1,200 tokens/s"
    assert found["sampling, continuous"] == first_gpu.MISSING
