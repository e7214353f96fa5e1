"""Commands that read private files leave no copy of them in a library's cache or elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from privacy_checks.tiny_model import byte_tokenizer
from tests.json_lines import jsonl
from tests.paths import ROOT
from tests.resampling import save_tiny_encoder
from tests.training import NUM_EXAMPLES, flags
from utils.texts.tokens import TOKEN_FILES

SECRET = "the quick canary"
ROWS = [{"instruction": f"{SECRET} {n}", "answer": "fly"} for n in range(NUM_EXAMPLES)]
OTHERS = [{"instruction": f"some other bird {n}"} for n in range(NUM_EXAMPLES)]
# Every command that reads private rows, with its flags; run in one process.
SCRIPT = """
import importlib, json, os, sys
for module, argv in json.loads(sys.argv[1]):
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if importlib.import_module(module).main(argv):
        sys.exit(f"{module} failed")
"""


def save(kind: str, path: Path) -> str:
    """ROWS in a form that people have them in."""
    rows = datasets.Dataset.from_list(ROWS)
    if kind == "saved":
        datasets.DatasetDict(train=rows, test=rows).save_to_disk(path)
        return str(path)
    file = path.with_suffix(f".{kind}")
    if kind == "parquet":
        rows.to_parquet(file)
    else:
        file.write_text(jsonl(ROWS) if kind == "jsonl" else json.dumps(ROWS))
    return str(file)


def copies(*folders: Path) -> list[str]:
    """Files below `folders` that hold a private row, as text or as tokens of the byte tokenizer."""
    ids = byte_tokenizer()(SECRET, add_special_tokens=False)["input_ids"]
    tokens = np.array(ids, dtype=TOKEN_FILES["ids"]).tobytes()
    return [
        str(file)
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file() and any(text in file.read_bytes() for text in (SECRET.encode(), tokens))
    ]


@pytest.mark.parametrize("kind", ["saved", "parquet", "jsonl", "json"])
def test_no_command_leaves_a_copy_of_private_rows(tiny_model_dir, tmp_path, kind):
    data = save(kind, tmp_path / "rows")
    others = tmp_path / "others.jsonl"
    others.write_text(jsonl(OTHERS))
    encoder = save_tiny_encoder(tmp_path / "encoder")
    home, temporary, out = (tmp_path / name for name in ("home", "temporary", "out"))
    for folder in (home, temporary):
        folder.mkdir()
    split = ["--split=train"] if kind == "saved" else []
    read = "resample_with_dp_histogram.embed", "evaluation.distribution", "evaluation.memorisation"
    training = [*flags(tiny_model_dir, data, out, "--num_canaries=1"), "--max_seq_len=64"]
    commands = [
        ("train", training),
        (read[0], ["--private", f"--instructions={data}", f"--model={encoder}",
                   f"--output={out}/embedded", *split]),
        (read[1], [f"--real={data}", f"--synthetic={others}", f"--model={encoder}",
                   "--num_seeds=2", f"--output={out}/results", *split]),
        (read[2], [f"--private={data}", f"--held_out={others}", f"--synthetic={others}",
                   "--no_embeddings", f"--output={out}/results", "--split=train"]),
        ("evaluation.perplexity", [f"--dataset_name={data}", f"--model_name={tiny_model_dir}",
                                   "--prompt_style=uncond_generation", "--max_seq_len=64",
                                   f"--output={out}/results"]),
    ]  # fmt: skip
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))
    }
    environment |= {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert copies(tmp_path / "rows" if kind == "saved" else tmp_path)  # they would be found
    assert copies(home, temporary, out) == []
