"""Held-out losses: against the model's own logits, one example at a time, and what is compared."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import perplexity
from evaluation.perplexity import require_unseen
from evaluation.results import read_results
from tests.training import flags, save_dataset
from train import main as train
from utils.cli import UsageError
from utils.files import write_json
from utils.texts.data_sets import load_split


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """An adapter that has learnt the letters of `save_dataset`."""
    folder = tmp_path_factory.mktemp("perplexity")
    more = ["--num_epochs=8", "--lr=0.05", "--no_eval_at_start"]
    train(flags(tiny_model_dir, save_dataset(folder), folder, *more, dp=False))
    return str(folder / "job" / "adapter")


def save_held_out(folder, texts):
    path = folder / "held_out"
    split = datasets.Dataset.from_dict({"instruction": texts})
    datasets.DatasetDict(train=split.select([]), test=split).save_to_disk(path)
    return str(path)


def arguments(model, dataset, output, *more):
    return [
        f"--model_name={model}", f"--dataset_name={dataset}", f"--output={output}",
        "--prompt_style=uncond_generation", "--max_seq_len=32", *more,
    ]  # fmt: skip


def scores(folder, private=True):
    (result,) = read_results(folder, private)
    return {(score["name"].split(" (")[0], score["subject"]): score for score in result["scores"]}


TEXTS = ["a", "fed a bed", "cab", "a bead faded", "deaf cab a bed faced"]


def test_losses_are_those_of_the_model_one_example_at_a_time(tiny_model_dir, tmp_path):
    dataset = save_held_out(tmp_path, TEXTS)
    perplexity.main(arguments(tiny_model_dir, dataset, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sums, counts = [], []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
        losses = (
            -model(ids).logits[0, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        )
        sums.append(losses.sum().item())
        counts.append(len(losses))
    found = scores(tmp_path / "out")
    per_token = found["loss per token", tiny_model_dir]
    assert per_token["value"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    per_example = found["loss per token, mean over examples", tiny_model_dir]
    assert per_example["value"] == pytest.approx(np.mean(np.divide(sums, counts)), rel=1e-5)
    assert per_token["low"] < per_token["value"] < per_token["high"]


def test_an_adapter_is_compared_with_its_base(tiny_model_dir, adapter, tmp_path):
    dataset = save_held_out(tmp_path, TEXTS)
    more = ["--adapter_path", adapter]
    perplexity.main(arguments(tiny_model_dir, dataset, tmp_path / "out", *more))
    found = scores(tmp_path / "out")
    base, tuned = (found["loss per token", name] for name in (tiny_model_dir, adapter))
    gain = found["gain on the base model per token", adapter]
    assert gain["value"] == pytest.approx(base["value"] - tuned["value"])
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert tuned["control"] == base["value"]
    assert not (tmp_path / "out" / "perplexity.json").exists()


def test_a_gain_is_compared_example_by_example():
    """Examples differ by far more than models do, and the gain's interval must not see that."""
    counts = np.full(200, 10.0)
    base = counts * np.random.default_rng(0).uniform(2, 6, 200)
    result = perplexity.compare(
        {"base": (base, counts), "tuned": (base - 0.1 * counts, counts)}, "base", public=False
    )
    found = {(score.name.split(" (")[0], score.subject): score for score in result.scores}
    gain = found["gain on the base model per token", "tuned"]
    assert (gain.low, gain.value, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    tuned = found["loss per token", "tuned"]
    # The deviation of the mean is 4/sqrt(12 * 200), so the interval is 3.92 times that wide.
    assert tuned.high - tuned.low == pytest.approx(3.92 * 4 / np.sqrt(12 * 200), rel=0.15)


def test_examples_without_loss_are_left_out_and_infinite_losses_refused():
    counts = np.array([0.0, 2.0, 4.0])
    result = perplexity.compare({"base": (np.array([0.0, 2.0, 8.0]), counts)}, "base", public=True)
    per_token, per_example = result.scores
    assert (per_token.value, per_example.value) == (10 / 6, 1.5)
    with pytest.raises(UsageError, match="base gives losses that are not finite"):
        perplexity.compare({"base": (np.array([0.0, np.nan, 8.0]), counts)}, "base", public=True)


def test_public_texts_give_public_figures(tiny_model_dir, tmp_path):
    dataset = save_held_out(tmp_path, TEXTS)
    perplexity.main(arguments(tiny_model_dir, dataset, tmp_path / "out", "--public"))
    assert scores(tmp_path / "out", private=False)
    assert not (tmp_path / "out" / "private").exists()
    settings = json.loads((tmp_path / "out" / "perplexity.json").read_text())["settings"]
    assert settings["max_seq_len"] == 32


def test_the_answer_alone_carries_loss_in_pairs(tiny_model_dir, tmp_path):
    rows = [{"instruction": "fed a bed", "answer": "cab"}, {"instruction": "a", "answer": "bed"}]
    (tmp_path / "labelled_rows.json").write_text(json.dumps(rows))
    style = ["--prompt_style=alpaca", "--max_seq_len=300"]
    dataset = str(tmp_path / "labelled_rows")
    perplexity.main(arguments(tiny_model_dir, dataset, tmp_path / "out", *style))
    (result,) = read_results(tmp_path / "out", True)
    # The space before an answer, its three letters, and its end.
    assert result["notes"][0].startswith("2 held-out examples, 10 tokens with loss")


def test_the_instruction_alone_carries_loss_after_a_topic(tiny_model_dir, tmp_path):
    rows = [{"topic": "beds, food", "instruction": text} for text in ("cab", "a")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    by_topic = ["--prompt_style=topic_generation", "--max_seq_len=100"]
    command = arguments(tiny_model_dir, tmp_path / "rows", tmp_path / "out", *by_topic)
    perplexity.main(command)
    (result,) = read_results(tmp_path / "out", True)
    assert result["notes"][0].startswith("2 held-out examples, 6 tokens with loss")
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "cab"}]))
    with pytest.raises(UsageError, match="lacks column 'topic', which --prompt_style topic_gen"):
        perplexity.main([*command, f"--output={tmp_path / 'other'}"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split=valid"], "no example in a split 'valid'"),
        (["--split=train"], "no example in a split 'train'"),
        (["--dataset_name=nowhere"], "no data set 'nowhere' here"),
        (["--adapter_path=nowhere"], "no adapter at 'nowhere'"),
        (["--prompt_style=vicuna"], "--prompt_style vicuna does not fit"),
        (["--model_name=/nowhere"], "no model at '/nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_model_dir, tmp_path, more, message):
    dataset = save_held_out(tmp_path, TEXTS)
    with pytest.raises(UsageError, match=message):
        perplexity.main(arguments(tiny_model_dir, dataset, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def rows_of(adapter) -> list[str]:
    """What the run of `adapter` was trained on."""
    config = json.loads((Path(adapter).parent / "private" / "identity.json").read_text())
    return load_split(config["dataset_name"], "train")["instruction"][:]


@pytest.mark.parametrize("seen", [slice(None), slice(1, 50)])
@pytest.mark.parametrize("is_here", [True, False])
def test_texts_that_the_run_was_trained_on_are_refused(
    adapter, tiny_model_dir, tmp_path, capsys, seen, is_here
):
    """All of them by their fingerprint, and a part of them where the run's data is here."""
    run = shutil.copytree(Path(adapter).parent, tmp_path / "run")
    rows = rows_of(adapter)
    if not is_here:
        identity = json.loads((run / "private" / "identity.json").read_text())
        write_json(run / "private" / "identity.json", identity | {"dataset_name": "gone"})
    (tmp_path / "rows.json").write_text(json.dumps(rows[seen]))
    more = [f"--adapter_path={run / 'adapter'}"]
    call = arguments(tiny_model_dir, tmp_path / "rows", tmp_path / "out", *more)
    if seen == slice(None) or is_here:
        number = len(rows[seen])
        with pytest.raises(UsageError, match=f"trained on {number} of these {number} texts"):
            perplexity.main(call)
        assert not (tmp_path / "out").exists()
    else:
        require_unseen(rows[seen], str(run / "adapter"))
        assert "is not here, to tell that it saw no such text" in capsys.readouterr().err


def test_of_a_lone_file_and_of_a_few_rows_that_were_seen_it_is_said(
    adapter, tiny_model_dir, tmp_path, capsys
):
    (tmp_path / "rows.json").write_text(json.dumps(["a bed", "fed", rows_of(adapter)[3]]))
    more = [f"--adapter_path={adapter}"]
    perplexity.main(arguments(tiny_model_dir, tmp_path / "rows", tmp_path / "out", *more))
    told = capsys.readouterr().err
    assert "rows.json has no splits: all its rows are taken for held-out ones" in told
    assert "1 of 3 texts are among those that" in told


def test_an_earlier_result_stays(tiny_model_dir, tmp_path):
    call = arguments(tiny_model_dir, save_held_out(tmp_path, TEXTS), tmp_path / "out")
    perplexity.main(call)
    with pytest.raises(UsageError, match="exists; use another --output"):
        perplexity.main(call)
