"""Memory that runs out in the middle of a step: no row is lost, and none counts twice."""

import json
import random
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from privacy_checks.observed_run import Observation, PublicSteps, observe
from tests.test_probe import couple
from tests.training import flags, in_process, save_dataset
from utils.dp_utils import PerExampleGradients
from utils.models.loading import load_base_model
from utils.privacy.ledger import LEDGER_FILE, read_ledger, steps_in
from utils.privacy.mechanism import Private
from utils.runs import batching
from utils.runs.batching import Halving, Microbatch

# Without the time that calibration takes.
KNOWN = ("--insecure_fixed_noise_seed=1", "--noise_multiplier=2")
# All but a single row of the longest has to be halved.
MOST_TOKENS = 32
UNITS = ["--unit_column=who", "--max_rows_per_unit=3", "--total_bs=4", "--num_epochs=2"]
SUMMATION = 1e-6


class Adding(Private):
    """Keeps the rows that were added in each step."""

    added: list[list[int]]

    def draw(self, step):
        self.added.append([])
        return super().draw(step)

    def add(self, total):
        self.added[-1] += self._captured.tolist()
        return super().add(total)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The train split of `save_dataset` with owners, as JSON lines, and the whole of it."""
    folder = tmp_path_factory.mktemp("data")
    whole = save_dataset(folder)
    rows = datasets.load_from_disk(whole)["train"]
    owners = [f"u{number % 20}" for number in range(len(rows))]
    rows.add_column("who", owners).to_json(folder / "rows.jsonl")
    return folder / "rows.jsonl", whole


def starve(monkeypatch, where: str, most=MOST_TOKENS) -> None:
    """Let passes of training run out of memory.

    Args:
        where: "forward", "backward" (in the middle of it) or "after" it.
        most: padded tokens that fit, or a function that says whether a batch does not.
    """
    fails = most if callable(most) else lambda batch: batch["input_ids"].numel() > most
    whole, deposit = train.pass_microbatch, PerExampleGradients._deposit

    def full(*_):
        raise torch.OutOfMemoryError("pretended")

    def halfway(gradients, *given):
        deposit(gradients, *given)
        if len(gradients._captured) == 3:
            full()

    def pass_microbatch(*given):
        if not fails(given[-1]):
            return whole(*given)
        if where == "forward":
            full()
        how = halfway if where == "backward" else deposit
        with mock.patch.object(PerExampleGradients, "_deposit", how):
            whole(*given)
        return full()

    monkeypatch.setattr(train, "pass_microbatch", pass_microbatch)


def observed(argv: list[str]) -> tuple[Observation, list[list[int]]]:
    """A run whose steps are public, and the rows that it added."""
    AcceleratorState._reset_state(reset_partial_state=True)
    added: list[list[int]] = []
    return observe(argv, Adding, PublicSteps, added=added), added


@pytest.fixture(scope="module")
def undisturbed(data, tiny_model_dir, tmp_path_factory):
    """Runs with all the memory they need, of rows and of units."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        bool(more): observed(
            flags(tiny_model_dir, data[0], folder / str(bool(more)), *KNOWN, *more)
        )
        for more in ([], UNITS)
    }


@pytest.mark.parametrize("units", [False, True], ids=["rows", "units"])
@pytest.mark.parametrize(
    "where", ["forward", "backward", pytest.param("at random", marks=pytest.mark.slow)]
)
def test_every_drawn_row_is_added_once_whatever_runs_out(
    monkeypatch, tmp_path, data, tiny_model_dir, undisturbed, where, units
):
    if where == "at random":
        coin = random.Random(0)
        starve(
            monkeypatch, "after", lambda batch: len(batch["lengths"]) > 1 and coin.random() < 0.5
        )
    else:
        starve(monkeypatch, where)
    expected, expected_rows = undisturbed[units]
    more = UNITS if units else []
    seen, added = observed(flags(tiny_model_dir, data[0], tmp_path, *KNOWN, *more))
    assert [sorted(rows) for rows in added] == [sorted(rows) for rows in expected_rows]
    assert [sorted(rows) for rows in added] == [sorted(rows) for rows in seen.batches]
    for ours, theirs in zip(seen.clipped_sums, expected.clipped_sums, strict=True):
        assert np.linalg.norm(ours - theirs) <= SUMMATION * np.linalg.norm(theirs)
    assert seen.numerics.startswith("exact")


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (lambda rows: [slice(0, rows), slice(rows, None), slice(0, 1)], "has been added"),
        (lambda rows: [slice(0, rows)], "that were drawn are in the sum"),
    ],
    ids=["a row in both halves", "a half that is lost"],
)
def test_a_row_that_counts_twice_or_never_ends_the_run(
    monkeypatch, tmp_path, data, tiny_model_dir, cuts, message
):
    def halves(_self, part):
        found = [part.examples[cut] for cut in cuts(-(-part.rows // 2))]
        return [Microbatch(each, len(each), part.tokens) for each in found if len(each)]

    monkeypatch.setattr(Halving, "_halves", halves)
    starve(monkeypatch, "after")
    with pytest.raises(RuntimeError, match=message):
        observed(flags(tiny_model_dir, data[0], tmp_path, *KNOWN))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "job" / "adapter" / "adapter_model.safetensors")


def assert_same(left: Path, right: Path) -> None:
    left, right = adapter(left), adapter(right)
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[name], right[name], atol=1e-4) for name in left)


def test_without_privacy_a_failed_pass_leaves_no_gradient(
    monkeypatch, tmp_path, data, tiny_model_dir, capsys
):
    _, whole = data
    assert in_process(train.main, flags(tiny_model_dir, whole, tmp_path / "a", dp=False)) == 0
    starve(monkeypatch, "after")
    assert in_process(train.main, flags(tiny_model_dir, whole, tmp_path / "b", dp=False)) == 0
    assert_same(tmp_path / "a", tmp_path / "b")
    assert capsys.readouterr().err.count(batching.OUT_OF_MEMORY) == 1


@pytest.mark.parametrize("fixed", [False, True], ids=["any number of rows", "a fixed number"])
def test_a_report_says_whether_halves_were_computed_in_other_shapes(
    monkeypatch, tmp_path, data, tiny_model_dir, fixed
):
    monkeypatch.setattr(
        train, "load_base_model", lambda *given: couple(load_base_model(*given), 1e-2 * fixed)
    )
    starve(monkeypatch, "backward")
    more = [*KNOWN[1:], "--perdevice_bs=4", "--num_epochs=0.25"]
    argv = flags(tiny_model_dir, data[0], tmp_path, *more)
    assert in_process(train.main, argv) == 0
    report = json.loads((tmp_path / "job" / "privacy_report.json").read_text())
    assert ("memory ran out" in report["numerics"]) is fixed
    kept = json.loads((tmp_path / "job" / "private" / train.NUMERICS).read_text())
    assert len(kept) == 1 + fixed
    page = (tmp_path / "job" / "privacy_report.md").read_text()
    assert report["numerics"] in page


@pytest.mark.parametrize("where", ["a pass", "the sum", "the optimizer"])
def test_what_does_not_fit_at_all_ends_the_run_in_a_line_and_loses_no_step(
    monkeypatch, tmp_path, data, tiny_model_dir, where, capsys
):
    """In the sixth step, where the last checkpoint is of the third."""
    _, whole = data
    argv = flags(tiny_model_dir, whole, tmp_path / "a", *KNOWN, "--save_steps=3")
    assert in_process(train.main, argv) == 0
    starved = flags(tiny_model_dir, whole, tmp_path / "b", *KNOWN, "--save_steps=3")
    targets = {"a pass": (train, "pass_microbatch"), "the sum": (Private, "add"),
               "the optimizer": (torch.optim.AdamW, "step")}  # fmt: skip
    owner, name = targets[where]
    original = getattr(owner, name)

    def failing(*given, **options):
        if len(steps) > 5 or (where == "the optimizer" and len(steps) == 5):
            raise torch.OutOfMemoryError("pretended")
        return original(*given, **options)

    steps: list[int] = []
    begin = Private.begin
    with monkeypatch.context() as context:
        context.setattr(owner, name, failing)
        context.setattr(Private, "begin", lambda *given: steps.append(1) or begin(*given))
        assert in_process(train.main, starved) == 1
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "lack of memory" in line)
    for flag in ("--max_seq_len", "--gradient_checkpointing", "--dtype bfloat16", "--resume auto"):
        assert flag in told
    saved = max((tmp_path / "b" / "job" / "checkpoints").iterdir()).name
    # Half a step of the optimizer is no state to go on from.
    assert saved == ("step-000003" if where == "the optimizer" else "step-000005")
    recorded = steps_in(read_ledger(tmp_path / "b" / "job" / LEDGER_FILE))
    assert recorded == [1, 2, 3, 4, 5]
    assert in_process(train.main, [*starved, "--resume=auto"]) == 0
    assert_same(tmp_path / "a", tmp_path / "b")


def test_auto_tries_short_rows_too_and_the_allocator_is_set_up_before(
    monkeypatch, tmp_path, data, tiny_model_dir
):
    calls = []
    whole = train.pass_microbatch

    def pass_microbatch(*given):
        calls.append(tuple(given[-1]["input_ids"].shape))
        return whole(*given)

    monkeypatch.setattr(train, "pass_microbatch", pass_microbatch)
    monkeypatch.setattr(train, "use_expandable_segments", lambda: calls.append("allocator"))
    more = [*KNOWN[1:], "--perdevice_bs=auto", "--num_epochs=0.2", "--lora_r=64"]
    argv = flags(tiny_model_dir, data[0], tmp_path, *more)
    assert in_process(train.main, argv) == 0
    assert calls[0] == "allocator"
    one, two = calls[1:4], calls[4:7]
    assert [tokens for _, tokens in one] == [8, 16, 32]
    assert one[2], two[2] == ((1, 32), (2, 32))
    # The whole of the memory that one long row takes, and not of its tokens: 4 rows of 8.
    assert 1 < one[0][0] < 4
    assert one[0][0] < two[0][0] < 8
