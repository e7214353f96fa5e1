"""Disks that take nothing, for every command: one line, and what was there stays."""

import json

import pytest

from query_gpt35_for_annotation.client import answer_record
from tests.faults import on_small_disk, with_quota
from tests.helpers import slow
from tests.json_lines import jsonl
from tests.resampling import save_embeddings, save_tiny_encoder, unit_vectors
from tests.training import flags, save_dataset
from utils.files import write_json

TEXTS = [f"{number} ".ljust(400, "x") for number in range(300)]
# Runs commands one after the other, and prints the exit code and the stderr of each.
SCRIPT = """
import contextlib, importlib, json, os, resource, subprocess, sys, tempfile
from pathlib import Path
from utils.cli import run_cli

fault, outside, commands = sys.argv[1], sys.argv[3], json.loads(Path(sys.argv[2]).read_text())
Path("file").write_text("old")
place = {"ENOTDIR": "file/out", "ENAMETOOLONG": "x" * 300}.get(fault, "out")
if fault == "EROFS":
    subprocess.run(["mount", "-o", "remount,ro", "none", os.getcwd()], check=True)
if fault == "EDQUOT":
    with contextlib.suppress(OSError), open("filler", "wb", buffering=0) as filler:
        while True:
            filler.write(os.urandom(4096))
            os.fsync(filler)
if fault == "EFBIG":
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
found = {}
for name, module, words in commands:
    output = place if fault in ("ENOTDIR", "ENAMETOOLONG") else f"{place}-{name}"
    with tempfile.TemporaryFile(dir=outside) as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        sys.argv = [module, *(word.replace("OUTPUT", str(Path.cwd() / output)) for word in words)]
        main = importlib.import_module(module).main
        try:
            run_cli(lambda: main(sys.argv[1:]))
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            code = repr(error)
        os.dup2(stderr, 2)
        said.seek(0)
        left = sorted(map(str, Path().glob(f"*out-{name}*")))
        found[name] = code, said.read().decode(errors="replace"), left
print(json.dumps(found))
assert Path("file").read_text() == "old"
"""


def commands(folder, model, names):
    """Name, module and words of each command, with OUTPUT for the place that a fault is made at."""
    write_json(folder / "texts.json", TEXTS)
    (folder / "block.txt").write_text("### BOI ### 1\n120\n### EOI ###\n")
    synthetic, private = unit_vectors(300, seed=1), unit_vectors(60, seed=2)
    save_embeddings(folder / "synthetic", synthetic, private=False, texts=TEXTS)
    save_embeddings(folder / "private_data", private, private=True)
    answers = [answer_record(text, "ok", 0, answer=text) for text in TEXTS]
    (folder / "answers").mkdir()
    (folder / "answers" / "answers.jsonl").write_text(jsonl(answers))
    letters = save_dataset(folder)
    encoder = save_tiny_encoder(folder / "encoder") if "embed" in names else ""
    texts = f"--instructions={folder / 'texts.json'}"
    known = {
        "prepare_instructions": (
            "data.prepare_instructions", [f"--input={folder / 'texts.json'}", "--output=OUTPUT"]
        ),
        "annotate": (
            "query_gpt35_for_annotation.annotate",
            [texts, "--output=OUTPUT", "--base_url=http://127.0.0.1:9/v1", "--max_retries=0"],
        ),
        "build_dataset": (
            "query_gpt35_for_annotation.build_dataset",
            [f"--answers={folder / 'answers'}", "--output=OUTPUT/labelled_x"],
        ),
        "report": ("evaluation.report", [str(folder / "letters"), "--output=OUTPUT"]),
        "train": ("train", flags(model, letters, "OUTPUT")),
        "inference": (
            "inference",
            [f"--model_name={model}", f"--instruction_file={folder / 'block.txt'}",
             "--job_sess=job", "--output_dir=OUTPUT", "--max_seq_len=32",
             "--prompt_style=uncond_generation"],
        ),
        "embed": (
            "resample_with_dp_histogram.embed",
            ["--synthetic", texts, "--output=OUTPUT", f"--model={encoder}"],
        ),
        "resample": (
            "resample_with_dp_histogram.resample",
            [f"--private_embeddings={folder / 'private_data'}", "--output=OUTPUT",
             f"--synthetic_embeddings={folder / 'synthetic'}",
             f"--synthetic_instructions={folder / 'texts.json'}", "--num_bins=5",
             "--ledger=OUTPUT-ledger.jsonl"],
        ),
    }  # fmt: skip
    return [(name, *known[name]) for name in names]


# Commands whose output appears at once or not at all.
WHOLE = ("prepare_instructions", "report", "resample")
QUICK = ("prepare_instructions", "annotate", "build_dataset")
ALL = (*QUICK, "report", "train", "inference", "embed", "resample")


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("EROFS", QUICK),
        *(slow(fault, ALL) for fault in ("EROFS", "EDQUOT", "ENOTDIR", "ENAMETOOLONG", "EFBIG")),
    ],
)
def test_what_a_disk_does_not_take_is_one_line(tiny_model_dir, tmp_path, fault, names):
    inputs = tmp_path / "commands.json"
    (tmp_path / "inputs").mkdir()
    write_json(inputs, commands(tmp_path / "inputs", tiny_model_dir, names))
    (tmp_path / "disk").mkdir()
    run = with_quota if fault == "EDQUOT" else on_small_disk
    finished = run(tmp_path / "disk", "16m", "-c", SCRIPT, fault, str(inputs), str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    for name, (code, said, left) in json.loads(finished.stdout.splitlines()[-1]).items():
        assert code in (1, 2), (name, code, said)
        assert "Traceback" not in said, (name, said)
        errors = [
            line for line in said.splitlines() if line.startswith(("error: ", "stopped early"))
        ]
        assert len(errors) == 1, (name, said)
        # Some ask for room first; what says no is the quota all the same.
        if fault == "EDQUOT":
            assert "quota" in errors[0].lower() or "full" in errors[0].lower(), errors
        # What was spent stays on record, and others keep what they have, to go on from.
        made = [path for path in left if "ledger" not in path]
        assert name not in WHOLE or made == [], (name, made)
