"""A list of distinct instructions out of shards and files, with counts of what was dropped."""

import json

import pytest

from resample_with_dp_histogram import extract
from tests.json_lines import jsonl
from tests.training import run_process
from utils.cli import UsageError
from utils.files import hashes_of, read_jsonl, sha256_of


def write_shard(path, *samples, torn=""):
    path.parent.mkdir(exist_ok=True)
    rows = [{"id": i, "text": text, "finish_reason": reason} for i, (text, reason) in samples]
    path.write_text(jsonl(rows) + torn, encoding="utf-8")


def extracted(output):
    return [row["instruction"] for row in read_jsonl(output / "instructions.jsonl")]


def test_shards_become_distinct_instructions_and_every_drop_is_counted(tmp_path, capsys):
    samples = list(
        enumerate(
            [
                (" Tell me a joke.\n", "stop"), ("A cut one tha", "length"),
                ("tell me, a JOKE", "stop"), ("  \n", "stop"), ("?!", "stop"),
                ("Größe in\nzwei Zeilen", "stop"), ("", "prompt_too_long"),
            ]
        )
    )  # fmt: skip
    write_shard(tmp_path / "shards" / "shard-0.jsonl", *samples[:4])
    write_shard(tmp_path / "shards" / "shard-1.jsonl", *samples[4:], torn='{"id": 9, "te')
    write_shard(tmp_path / "shards" / "shard-2.jsonl")
    (tmp_path / "more.txt").write_text("Tell me a joke\nWhat else?\n")
    sources = [str(tmp_path / "shards"), str(tmp_path / "more.txt")]
    extract.main(["--instructions", *sources, "--output", str(tmp_path / "out")])
    assert extracted(tmp_path / "out") == [
        "Tell me a joke.", "Größe in\nzwei Zeilen", "What else?",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "preparation.json").read_text()) == {
        "sources": sources,
        "kept": 3,
        "dropped": {"empty": 2, "truncated": 2, "duplicate": 2},
        "inputs_sha256": hashes_of(
            [*(tmp_path / f"shards/shard-{n}.jsonl" for n in range(3)), tmp_path / "more.txt"]
        ),
        "outputs_sha256": {"instructions.jsonl": sha256_of(tmp_path / "out/instructions.jsonl")},
        "commands": [
            ["python", "-m", "resample_with_dp_histogram.extract", "--instructions", *sources,
             "--output", str(tmp_path / "out")]
        ],
    }  # fmt: skip
    assert "9 texts: 3 kept; dropped: 2 empty, 2 truncated, 2 duplicate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": 0, "text": "a"}\n{"id": 1, "te\n{"id": 2, "text": "b"}\n', "line 2 is not a JSON"),
        ('{"id": 0, "text": "a"}\n{"step": 1, "loss": 2.0}\n', "shard-0.jsonl, entry 2 has no"),
        ("", "holds no instruction to keep"),
        ('{"text": "  "}\n', "holds no instruction to keep"),
    ],
)
def test_torn_foreign_and_empty_shards_are_one_line_and_code_2(tmp_path, lines, message):
    (tmp_path / "shard-0.jsonl").write_text(lines)
    command = ["-m", "resample_with_dp_histogram.extract", "--instructions", str(tmp_path)]
    done = run_process(*command, "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UsageError, match="--output .* exists"):
        extract.main(["--instructions", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []
