"""Commands that read private files leave no copy of them in a library's cache or elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np

from privacy_checks.tiny_model import byte_tokenizer
from tests.json_lines import jsonl
from tests.paths import ROOT
from tests.resampling import save_tiny_encoder
from tests.training import NUM_EXAMPLES, flags
from utils.texts.tokens import TOKEN_FILES

SECRET = "the quick canary"
ROWS = [{"instruction": f"{SECRET} {n}", "answer": "fly"} for n in range(NUM_EXAMPLES)]
OTHERS = [{"instruction": f"some other bird {n}"} for n in range(NUM_EXAMPLES)]
KINDS = ("saved", "parquet", "jsonl", "json")
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


def commands(kind: str, folder: Path, model: str, encoder: str) -> list[tuple[str, list[str]]]:
    """Modules and flags, for private rows of one kind below `folder`."""
    data, out, others = save(kind, folder / "rows"), folder / "out" / kind, folder / "others.jsonl"
    split = ["--split=train"] if kind == "saved" else []
    training = [*flags(model, data, out, "--num_canaries=1"), "--max_seq_len=64"]
    return [
        ("train", training),
        ("resample_with_dp_histogram.embed", [
            "--private", f"--instructions={data}", f"--model={encoder}",
            f"--output={out}/embedded", *split]),
        ("evaluation.distribution", [
            f"--real={data}", f"--synthetic={others}", f"--model={encoder}", "--num_seeds=2",
            f"--output={out}/results", *split]),
        ("evaluation.memorisation", [
            f"--private={data}", f"--held_out={others}", f"--synthetic={others}",
            "--no_embeddings", f"--output={out}/results", "--split=train"]),
        ("evaluation.perplexity", [
            f"--dataset_name={data}", f"--model_name={model}",
            "--prompt_style=uncond_generation", "--max_seq_len=64", f"--output={out}/results"]),
    ]  # fmt: skip


def test_no_command_leaves_a_copy_of_private_rows(tiny_model_dir, tmp_path):
    (tmp_path / "others.jsonl").write_text(jsonl(OTHERS))
    encoder = save_tiny_encoder(tmp_path / "encoder")
    home, temporary, out = (tmp_path / name for name in ("home", "temporary", "out"))
    for folder in (home, temporary):
        folder.mkdir()
    jobs = [job for kind in KINDS for job in commands(kind, tmp_path, tiny_model_dir, encoder)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))
    }
    environment |= {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    # They would be found.
    assert {Path(file).relative_to(tmp_path).parts[0] for file in copies(tmp_path)} == {
        "rows", "rows.parquet", "rows.jsonl", "rows.json",
    }  # fmt: skip
    assert copies(home, temporary, out) == []
