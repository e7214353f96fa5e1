"""Small topics and a small private data set, for tests of `topics`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resample_with_dp_histogram import embed
from topics import assign, fit, histogram
from utils.files import json_lines

WORDS = {"river": "boat", "bread": "flour", "piano": "chord", "goal": "match"}
NO_NOISE = ["--insecure_fixed_noise_seed=0", "--histogram_sigma=0"]


def texts_of(count: int, seed: int) -> list[str]:
    """Distinct sentences around the pairs of `WORDS`."""
    random = np.random.default_rng(seed)
    subjects = random.choice(list(WORDS), count)
    return [
        f"{subject} " * int(random.integers(1, 9)) + f"and {WORDS[subject]} number {seed}.{number}"
        for number, subject in enumerate(subjects)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_lines(rows))
    return path


def save_private(folder: Path, texts: list[str], persons: list[str] | None = None) -> Path:
    """A private data set with splits `train` and `val`."""
    rows = [{"instruction": text, "id": number} for number, text in enumerate(texts)]
    if persons:
        rows = [row | {"person": person} for row, person in zip(rows, persons)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "val.jsonl", rows[:3])
    return folder


def fitted(folder: Path, encoder: str, *more: str) -> Path:
    """Topics of 80 public texts."""
    public = [{"instruction": text} for text in texts_of(80, seed=1)]
    write_rows(folder / "public.jsonl", public)
    fit.main([
        f"--public={folder / 'public.jsonl'}", f"--model={encoder}", "--num_topics=6",
        f"--output={folder / 'topics'}", *more,
    ])  # fmt: skip
    return folder / "topics"


def assigned(topics: Path, data: Path, output: Path, *more: str) -> Path:
    assign.main([f"--private={data}", f"--topics={topics}", f"--output={output}", *more])
    return output


def stop_embedding(set_attribute: Callable, stop: Callable) -> None:
    """Have `stop` called once 24 texts of a batch of 1 each are embedded and saved."""
    unit_vectors, calls = embed.unit_vectors, []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 4:
            stop()
        return unit_vectors(*given)

    set_attribute(embed, "unit_vectors", stopping)
    set_attribute(embed, "SAVE_SECONDS", 0)


def counted(data: Path, output: Path, *more: str) -> dict:
    """The histogram of an assigned data set, as its file says."""
    histogram.main([f"--assigned={data}", f"--output={output}", *more])
    return json.loads((output / histogram.HISTOGRAM_FILE).read_text())


def counts_of(report: dict) -> dict[int, float]:
    """The noisy count of each topic."""
    return {each["topic"]: each["count"] for each in report["topics"] + report["left_out"]}
