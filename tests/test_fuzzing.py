"""Whatever stands in a file, its reader gives an answer or one line: no traceback, no hang."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from query_gpt35_for_annotation import read_batch
from query_gpt35_for_annotation.client import read_completion
from query_gpt35_for_annotation.job import Job, check_folder, instruction_id, read_records
from resample_with_dp_histogram.embeddings import open_embeddings
from utils.cli import UsageError
from utils.command_line.sampling_flags import check_adapter
from utils.models.adapter_info import adapter_sha256
from utils.privacy.ledger import (
    head_file,
    read_histograms,
    read_ledger,
    read_plan,
    steps_in,
)
from utils.sampling.shards import check_manifest, finish_reasons, origins, read_samples

EXAMPLES = 2000  # of each kind of file, 10,000 in all
FUZZED = settings(max_examples=EXAMPLES, deadline=10_000, suppress_health_check=list(HealthCheck))
# What a reader looks for, so that inputs come near to what it takes.
NAMES = st.sampled_from(
    ["id", "prompt", "text", "finish_reason", "kind", "chain", "plan", "step", "custom_id",
     "response", "status_code", "body", "choices", "message", "content", "usage", "error", "code",
     "num_examples", "num_embedded", "num_texts", "dimensions", "unit_column", "lines", "model",
     "decoding", "base_url", "instruction_sha256", "instruction", "status", "answer", "shard",
     "unmetered_attempts", "prompt_tokens", "completion_tokens", "peft_type", "prompt_style"]
)  # fmt: skip
WORDS = st.sampled_from(["plan", "step", "gaussian_histogram", "adapter", "stop", "ok", "LORA", ""])
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=12,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=8)


def as_bytes(value) -> bytes:
    return json.dumps(value).encode()


LINE = st.one_of(OBJECTS.map(as_bytes), VALUES.map(as_bytes), st.binary(max_size=30))
LINES = st.lists(LINE, max_size=4).map(b"\n".join) | st.lists(LINE, max_size=4).map(
    lambda lines: b"".join(line + b"\n" for line in lines)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.slow
@FUZZED
@given(content=LINES)
def test_ledgers(folder, content):
    path = emptied(folder) / "privacy_ledger.jsonl"
    path.write_bytes(content)
    with suppress(UsageError):
        steps_in(read_ledger(path))
    with suppress(UsageError):
        read_plan(path)
    with suppress(UsageError):
        read_histograms(path, 5)
    head_file(path).write_bytes(content)
    with suppress(UsageError):
        read_histograms(path)


@pytest.mark.slow
@FUZZED
@given(content=LINES, manifest=LINE)
def test_shards(folder, content, manifest):
    emptied(folder)
    (folder / "shard-0.jsonl").write_bytes(content)
    (folder / "manifest.json").write_bytes(manifest)
    for read in (
        finish_reasons,
        read_samples,
        lambda folder: origins(folder, cut=True),
        lambda folder: check_manifest(folder, {"model": "m", "id": 1}),
    ):
        with suppress(UsageError):
            read(folder)


@pytest.mark.slow
@FUZZED
@given(content=LINES, manifest=LINE)
def test_answers_and_manifests(folder, content, manifest):
    emptied(folder)
    (folder / "answers.jsonl").write_bytes(content)
    (folder / "manifest.json").write_bytes(manifest)
    for private in (True, False):
        with suppress(UsageError):
            open_embeddings(folder, private)
    with suppress(UsageError):
        check_folder(Job(folder, "m", "", {}, ["q"]), read_records(folder))


@pytest.mark.slow
@FUZZED
@given(results=LINES, values=VALUES)
def test_results_of_batches_and_completions(folder, results, values):
    emptied(folder)
    (folder / "batch").mkdir()
    request = {"custom_id": instruction_id("q"), "body": {"messages": [{"content": "q"}]}}
    (folder / "batch" / "requests-00001.jsonl").write_bytes(as_bytes(request) + b"\n")
    ours = as_bytes({"custom_id": instruction_id("q"), "response": values})
    (folder / "results.jsonl").write_bytes(ours + b"\n" + results)
    with suppress(UsageError):
        read_batch.merge(folder, [folder / "results.jsonl"], True)
    for body in (values, {"choices": [values]}, {"choices": [{"message": values}]}):
        with suppress(ValueError):
            read_completion(body)


@pytest.mark.slow
@FUZZED
@given(config=LINE, style=LINE)
def test_adapters(folder, config, style):
    emptied(folder)
    for name, content in (("adapter_config.json", config), ("training_style.json", style)):
        (folder / name).write_bytes(content)
    (folder / "adapter_model.safetensors").write_bytes(config)
    with suppress(UsageError):
        check_adapter(str(folder), "vicuna")
    with suppress(UsageError):
        adapter_sha256(folder)
