"""What a whole pipeline leaves, made by its own tools on a tiny model, for tests of its report."""

import hashlib
import json
from pathlib import Path

import datasets

import inference
import train
from evaluation.results import Chart, Result, Score, write_result
from query_gpt35_for_annotation.client import answer_record
from query_gpt35_for_annotation.job import Job
from resample_with_dp_histogram import extract, resample
from tests import training
from tests.paths import ROOT
from tests.resampling import save_embeddings, unit_vectors
from utils.files import JsonlAppender, hashes_of, read_jsonl, sha256_of, write_json
from utils.texts.prompts import write_instruction_file

LEDGER = "private_data/histogram_ledger.jsonl"
ANSWER = "Water freezes at 0 °C."


def make_folders(model: str) -> list[str]:
    """Run the pipeline in the current folder; returns the report's flags, but for --output."""
    real = training.save_dataset(Path())
    pairs = training.save_dataset(Path(), labelled=True)
    private_question = "what did patient zero say"
    write_instruction_file("questions.txt", [private_question, "say hello"])

    # Both runs and the histogram together stay below epsilon 3.
    budget = ["--eps=3", "--num_epochs=0.5"]
    instructions = [*budget, "--job_sess=instructions", "--noise_multiplier=0.8"]
    pairs_form = ["--prompt_style=vicuna", "--max_seq_len=200"]
    answers = [*budget, *pairs_form, "--job_sess=answers", "--noise_multiplier=0.8"]
    public = [*pairs_form, "--job_sess=synthetic_answers", "--num_epochs=0.2", "--eps=-1"]
    for data, more, dp in (
        (real, instructions, True), (pairs, answers, True), (pairs, public, False),
    ):  # fmt: skip
        argv = training.flags(model, data, Path("outputs"), *more, dp=dp)
        assert training.in_process(train.main, argv) == 0

    sample = [f"--model_name={model}", "--max_seq_len=100", "--seed=3"]
    assert training.in_process(inference.main, [
        *sample, f"--instruction_file={ROOT / 'utils/syn_instruct.txt'}",
        "--adapter_path=outputs/instructions/adapter", "--job_sess=instructions",
        "--prompt_style=uncond_generation", "--num_samples=80",
    ]) == 0  # fmt: skip
    assert training.in_process(inference.main, [
        *sample, "--instruction_file=questions.txt", "--adapter_path=outputs/answers/adapter",
        "--job_sess=answers", "--prompt_style=vicuna", "--max_seq_len=400",
    ]) == 0  # fmt: skip

    extract.main(["--instructions", "inference_outputs/instructions", "--output", "synthetic"])
    texts = [row["instruction"] for row in read_jsonl("synthetic/instructions.jsonl")]
    pool = unit_vectors(len(texts), seed=1)
    save_embeddings(Path("synthetic_embeddings"), pool, private=False, texts=texts)
    rows = unit_vectors(training.NUM_EXAMPLES, seed=2, weights=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02])
    save_embeddings(Path("private_data"), rows, private=True)
    resample.main([
        "--private_embeddings=private_data", "--synthetic_embeddings=synthetic_embeddings",
        "--synthetic_instructions=synthetic/instructions.jsonl", "--output=selected",
        "--num_bins=4", "--num_samples=8",
    ])  # fmt: skip
    annotate([row["instruction"] for row in read_jsonl("selected/selected.jsonl")])
    evaluate()
    return [
        "outputs/instructions", "outputs/answers", "--histogram", LEDGER, "--samples",
        "inference_outputs/instructions", "inference_outputs/answers", "--extraction", "synthetic",
        "--selection", "selected", "--annotations", "annotations", "--evaluations", "results",
        "--synthetic_runs", "outputs/synthetic_answers",
    ]  # fmt: skip


def annotate(instructions: list[str]) -> None:
    """Answers as `annotate` records them."""
    decoding = {"temperature": 0.7, "max_tokens": 64}
    hashes = hashes_of([Path("selected/selected.jsonl")])
    job = Job(
        Path("annotations"), "gpt-3.5-turbo", "https://api.openai.com/v1", decoding, [], hashes
    )
    write_json("annotations/manifest.json", job.manifest())
    usage = {"prompt_tokens": 10, "completion_tokens": 20}
    with JsonlAppender("annotations/answers.jsonl") as file:
        for text in instructions:
            file.append([answer_record(text, "ok", 0, ANSWER, job.model, "stop", usage)])


def evaluate() -> None:
    """Results as the tools of `evaluation` write them, public ones and private ones."""
    settings = {"seed": 0}
    diversity = Score("distinct 2-grams", "synthetic", 0.71, 0.69, 0.73)
    curve = Chart("Coverage", "rank", "share", {"synthetic": [[1, 0.1], [2, 0.3], [9, 1.0]]})
    write_result(Path("results"), Result(
        "distribution", "How diverse the synthetic texts are", False, "over seeds", [diversity],
        charts=[curve],
    ), settings)  # fmt: skip
    close = Score("MAUVE", "synthetic against real", 0.61, 0.55, 0.67, 0.97, "higher")
    write_result(Path("results"), Result(
        "distribution", "How close the synthetic texts are", True, "over seeds", [close],
        "other real texts",
    ), settings)  # fmt: skip
    wins = [
        Score("win rate", "base", 0.5, 0.5, 0.5, None, "higher"),
        Score("win rate", "answers", 0.58, 0.49, 0.66, 0.5, "higher", 1234),
        Score("win rate", "synthetic answers", 0.63, 0.56, 0.7, 0.5, "higher"),
    ]
    write_result(Path("results"), Result(
        "judge", "Whose answers a judge prefers", False, "95% bootstrap", wins, "the base model",
        notes=["16 questions."],
    ), settings)  # fmt: skip
    leak = Score("exposure (bits)", "canaries", 1.1, 0.8, 1.4, 1.0, "lower")
    write_result(Path("results"), Result(
        "memorisation", "What was memorised", True, "95% bootstrap", [leak], "unseen canaries",
    ), settings)  # fmt: skip


def rehash() -> None:
    """Bring the hashes on record up to date, after a test has changed texts of the pipeline."""
    for record in ("inference_outputs/instructions/manifest.json",
                   "inference_outputs/answers/manifest.json", "synthetic/preparation.json",
                   "selected/resampling_report.json", "annotations/manifest.json"):  # fmt: skip
        path = Path(record)
        content = json.loads(path.read_text())
        for name in content.get("outputs_sha256", {}):
            content["outputs_sha256"][name] = sha256_of(path.parent / name)
        if "inputs_sha256" in content:
            content["inputs_sha256"] = hashes_of(map(Path, content["inputs_sha256"]))
        write_json(path, content)


def file_hashes(folder: Path) -> dict[str, str]:
    """What is in each file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_real_rows() -> list[str]:
    """The private rows that the first run was trained on."""
    return datasets.load_from_disk("letters")["train"]["instruction"]
