"""Whatever stands in a file, its reader gives an answer or one line: no traceback, no hang."""

import gzip
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import prepare_instructions
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
from utils.sampling.shards import check_manifest, finish_reasons, read_samples
from utils.texts.rows import count_rows, names_of, read_table
from utils.texts.text_inputs import COLUMNS, origins, read_instructions

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
        lambda folder: origins(str(folder), None, cut=True),
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


# ------------------------------------------------------------------------ users' files

TURN = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
# One small file of each kind that people bring, and of each fault that such files have.
CORPUS = [
    b"text\n" + b"[" * 20_000 + b"\n",
    b'{"instruction": "a"}\n{"instruction": "b"}',
    b'\xef\xbb\xbf{"instruction": "a"}\r\n\r\n{"instruction": "b"}\r\n',
    b'[{"instruction": "a", "output": "b", "input": ""}, {"instruction": null, "output": 1}]',
    b'["a", "b",]',
    b'{"instruction": ["a", "b"], "id": [1, "2"]}',
    b'{"instruction": {"0": "a", "1": "b"}}',
    b'{"data": [{"instruction": "a"}]}',
    as_bytes({"messages": TURN}) + b"\n" + as_bytes({"messages": None}) + b"\n",
    as_bytes({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    as_bytes({"conversation": list(TURN) + [{"role": "user", "content": [{"text": "c"}]}],
              "conversation_hash": "x", "language": "English"}),
    as_bytes({"message_id": "1", "parent_id": None, "role": "prompter", "text": "a"}) + b"\n"
    + as_bytes({"message_id": "2", "parent_id": "9", "role": "assistant", "text": "b"}),
    as_bytes({"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a", "replies": [
        {"role": "assistant", "text": "b", "rank": None, "replies": [], "deleted": False}]}}),
    b'{"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}',
    b'{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"a\\"}]"}',
    b'question,answer,user_id\n"a, b",c,1\n"d\ne",f,2\n',
    b"sep=;\nprompt;response\na;b\n",
    b"prompt\tresponse\na\tb\n\n",
    b'prompt,prompt\na,"b',
    b"### BOI ### 2\na\n### EOI ###\n",
    b"### BOI ### x\na",
    b"one line\r\nanother \xe2\x80\xa8 line\n\n",
    b'{"instruction": "\\ud83d"}\n{"instruction": "\\u0000 \xf0\x9f\x98\x80"}\n',
    b'{"instruction": "a", "finish_reason": "length"}\n{"instruction": "b", "text": 1e999}\n',
    "ab".encode("utf-16"),
    b"\xff\xfe\x00",
    b"caf\xe9\n",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    b"[" * 100_000,
    b'{"instruction": ' + b'[{"a": ' * 3000,
    b"PAR1\x00\x00PAR1",
    b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00]\x94(\x8c\x01a\x94\x8c\x01b\x94e.",
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    gzip.compress(b'{"instruction": "a"}\n', mtime=0),
    gzip.compress(b"a", mtime=0)[:-4],
    b"",
    b"\n \n",
    b"null",
]  # fmt: skip
SUFFIXES = st.sampled_from(
    [".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".pkl", ".json.gz", ".csv.gz"]
)


@st.composite
def files(draw) -> bytes:
    """A file of the corpus, or two of them run together, with some of their bytes changed."""
    content = bytearray(b"".join(draw(st.lists(st.sampled_from(CORPUS), min_size=1, max_size=2))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, min(len(content), 300)))
        end = place + draw(st.integers(0, 3))
        content[place:end] = draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"]", b",", b"\n", b"\\", b"null"])
        )
    return bytes(content)


def read_as_users_file(folder: Path, content: bytes, suffix: str) -> None:
    """Read a file in all ways that commands have; a data set is made of it whole or not at all."""
    file = emptied(folder) / f"rows{suffix}"
    file.write_bytes(content)
    for read in (
        lambda: read_table([file], COLUMNS),
        lambda: count_rows([file], COLUMNS),
        lambda: names_of(file),
        lambda: read_instructions(str(file)),
    ):
        with suppress(UsageError):
            read()
    output = folder / "made"
    for flags in ((), ("--turn=all", "--unit_column=none"), ("--text_column=prompt",)):
        with suppress(UsageError):
            prepare_instructions.main(
                [f"--input={file}", f"--output={output}", "--overwrite", *flags]
            )
            assert read_instructions(str(output), "train")
        assert {path.name for path in folder.iterdir()} <= {file.name, "made"}


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_files_of_users_as_they_are(folder, number):
    for suffix in (".json", ".csv"):
        read_as_users_file(folder, CORPUS[number], suffix)


@settings(FUZZED, max_examples=10, derandomize=True)
@given(content=files(), suffix=SUFFIXES)
def test_some_files_of_users_that_were_changed(folder, content, suffix):
    read_as_users_file(folder, content, suffix)


@pytest.mark.slow
@settings(FUZZED, max_examples=10_000)
@given(content=files(), suffix=SUFFIXES)
def test_files_of_users_that_were_changed(folder, content, suffix):
    read_as_users_file(folder, content, suffix)
