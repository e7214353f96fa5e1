"""Runs next to each other: what stands in the table, and what of it may be shown."""

import csv
import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from evaluation import compare, perplexity
from evaluation.measures.intervals import bootstrap, ratio_of_sums
from evaluation.results import Result, Score, read_results, write_result
from tests.training import flags, in_process, save_dataset
from train import main as train
from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.files import sha256_of, write_json

PRIVATE = ["compare.csv", "compare.html", "compare.txt"]


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """A run with privacy and one without, of rank 4, on letters with a test split."""
    folder = tmp_path_factory.mktemp("compared")
    letters = Path(save_dataset(folder))
    splits = datasets.load_from_disk(letters)
    splits["test"] = splits["val"]
    data = folder / "data"
    splits.save_to_disk(data)
    outputs = folder / "mine" / "outputs"
    for job, dp, more in (("one", True, []), ("two", False, ["--lora_r=4", "--lr=0.05"])):
        argv = flags(tiny_model_dir, str(data), outputs, f"--job_sess={job}", *more, dp=dp)
        assert in_process(train, [*argv, "--no_eval_at_start"]) == 0
    return outputs / "one", outputs / "two"


def compared(output: Path, *argv) -> list[dict[str, str]]:
    compare.main([*map(str, argv), "--output", str(output)])
    with open(output / "private" / "compare.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_says_what_runs_were_given_and_how_they_do(
    runs, tiny_model_dir, tmp_path, capsys
):
    one, two = compared(tmp_path / "out", *runs)
    report = json.loads((runs[0] / "privacy_report.json").read_text())
    assert float(one["epsilon"]) == pytest.approx(report["epsilon"]["upper"], abs=1e-3)
    assert (two["epsilon"], two["delta"], two["noise multiplier"]) == ("none", "", "")
    assert [run["rank"] for run in (one, two)] == ["8", "4"]
    assert [run["batch"] for run in (one, two)] == ["8", "8"]
    assert [run["seed"] for run in (one, two)] == ["0", "0"]
    assert one["gain on the first run"] == ""

    # The same figures as those of evaluation.perplexity.
    adapters = [str(run / "adapter") for run in runs]
    data = json.loads((runs[0] / "private" / "identity.json").read_text())["dataset_name"]
    perplexity.main([
        f"--model_name={tiny_model_dir}", f"--dataset_name={data}", "--max_seq_len=32",
        "--prompt_style=uncond_generation", "--adapter_path", *adapters,
        f"--output={tmp_path / 'perplexity'}",
    ])  # fmt: skip
    (known,) = read_results(tmp_path / "perplexity", private=True)
    for name, column in (("loss per token", "loss a token"), ("gain", "gain on the base")):
        for run, adapter in zip((one, two), adapters):
            (score,) = (
                each for each in known["scores"]
                if each["name"].startswith(name) and each["subject"] == adapter
                and "over examples" not in each["name"]
            )  # fmt: skip
            for end, heading in (("value", column), ("low", f"{column}, low"),
                                 ("high", f"{column}, high")):  # fmt: skip
                assert float(run[heading]) == pytest.approx(score[end], abs=1e-6)
    difference = float(one["loss a token"]) - float(two["loss a token"])
    assert float(two["gain on the first run"]) == pytest.approx(difference, abs=1e-6)
    assert "loss a token" in capsys.readouterr().out


def test_a_difference_of_runs_is_of_pairs(monkeypatch):
    """Of losses that vary a lot and always differ by the same, the difference does not vary."""
    random = np.random.default_rng(0)
    counts = np.full(200, 10.0)
    first = random.normal(30, 10, 200)
    losses = {"b": (first, counts), "1/adapter": (first, counts), "2/adapter": (first - 1, counts)}
    runs = [stub(name) for name in ("1", "2")]
    monkeypatch.setattr(compare, "model_name_of", lambda folder: "b")
    found = compare.figures_of(runs[1], losses, runs[0])
    gain, loss = found[compare.GAIN_ON_FIRST], found[compare.LOSS]
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    assert loss.high - loss.low > 0.2
    alone = bootstrap(first - 1, counts, statistic=ratio_of_sums)
    assert (loss.low, loss.high) == pytest.approx(alone)


def test_what_was_measured_on_private_texts_is_under_private_alone(runs, tmp_path):
    compared(tmp_path / "out", *runs)
    assert sorted(path.name for path in (tmp_path / "out").glob("compare.*")) == PRIVATE
    released = [(tmp_path / "out" / name).read_text() for name in PRIVATE]
    private = [(tmp_path / "out" / "private" / name).read_text() for name in PRIVATE]
    for content in released:
        assert "epsilon" in content
        assert "loss a token" not in content
        assert "<svg" not in content
    for content in private:
        assert "loss a token" in content
    assert private[1].count("<svg") == 1
    for content in released + private:
        assert str(tmp_path) not in content
    # Where the texts are public, so is everything.
    compare.main([*map(str, runs), "--public", "--output", str(tmp_path / "public")])
    assert "loss a token" in (tmp_path / "public" / "compare.txt").read_text()
    assert not (tmp_path / "public" / "private").exists()


def write_mauve(folder: Path, texts: Path, value: float, *, private: bool = True) -> None:
    scores = [
        Score("MAUVE", "synthetic", value, value - 0.1, value + 0.1),
        Score("MAUVE", "selected", 1.0),
    ]
    result = Result("distribution", "Close?", private, "seeds", scores)
    write_result(folder, result, {"synthetic": str(texts)})


def test_mauve_is_that_of_the_runs_own_samples(runs, tmp_path):
    for run, value in zip(runs, (0.25, 0.75)):
        samples, texts = tmp_path / f"samples_{run.name}", tmp_path / f"texts_{run.name}"
        digest = sha256_of(run / "adapter" / "adapter_model.safetensors")
        write_json(samples / "manifest.json", {"adapter_sha256": digest})
        write_json(texts / "preparation.json", {"sources": [str(samples)]})
        write_mauve(tmp_path / f"result_{run.name}", texts / "instructions.jsonl", value)
    folders = [tmp_path / "result_two", tmp_path / "result_one"]
    settings = settings_of(tmp_path, evaluations=folders)
    one, two = (compare.read_training(run, internal=False) for run in runs)
    assert compare.mauve_of(one, settings)["MAUVE"].value == 0.25
    assert compare.mauve_of(two, settings)["MAUVE"].low == pytest.approx(0.65)
    # Of private texts nothing, next to public figures; nor of texts that no run wrote.
    assert compare.mauve_of(one, settings_of(tmp_path, evaluations=folders, public=True)) == {}
    write_json(tmp_path / "samples_two" / "manifest.json", {"adapter_sha256": "another"})
    assert compare.mauve_of(two, settings) == {}


def settings_of(output: Path, **given) -> compare.Settings:
    argv = ["run", "--output", str(output)]
    return dataclasses.replace(read_flags(compare.Settings, None, argv), **given)


def test_results_are_found_in_the_runs_project(runs, tmp_path):
    near = runs[0].parent.parent / "evaluation_outputs" / "instructions"
    digest = sha256_of(runs[0] / "adapter" / "adapter_model.safetensors")
    write_json(tmp_path / "samples" / "manifest.json", {"adapter_sha256": digest})
    write_json(tmp_path / "texts" / "preparation.json", {"sources": [str(tmp_path / "samples")]})
    write_mauve(near, tmp_path / "texts" / "instructions.jsonl", 0.5)
    (one,) = compared(tmp_path / "out", runs[0])
    assert one["MAUVE"] == "0.5"


def stub(name: str, **arguments) -> compare.Training:
    defaults = {"prompt_style": "vicuna", "max_seq_len": 32}
    return compare.Training(Path(name), defaults | arguments, [], {}, None, None, [])


def test_runs_of_different_kinds_are_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="a has --max_seq_len 32 and b 64: losses of the two"):
        compare.require_comparable([stub("a"), stub("b", max_seq_len=64)])
    with pytest.raises(UsageError, match="named twice"):
        compare.main([str(runs[0]), str(runs[0]), "--output", str(tmp_path / "out")])
    with pytest.raises(UsageError, match="has no example in a split 'none'"):
        compare.main([str(runs[0]), "--split", "none", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_not_replaced(runs, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "compare.csv").write_text("")
    with pytest.raises(UsageError, match="compare.csv exists; use another --output"):
        compare.main([str(runs[0]), "--output", str(tmp_path)])
