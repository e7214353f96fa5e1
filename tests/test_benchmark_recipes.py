"""The study of recipes from end to end on a tiny base that it makes itself."""

import json

import pytest
from datasets import load_from_disk

from benchmarks import recipes, small_base, studies
from benchmarks.studies import interval, mean_of
from tests.studies import TEXTS, one_by_one, ran, run_here
from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.command_line.training_flags import TrainingSettings
from utils.files import write_json

ARMS = """
common: {total_bs: 10, num_epochs: 0.3, clip: 1, lora_r: 2}
arms:
  slow: {lr: 1e-3}
  very fast: {lr: 1e-1}
  no privacy: {eps: -1, clip: -1, lr: 1e-2}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs the study, with more flags, and gives the names of the commands that ran and figures."""
    folder = tmp_path_factory.mktemp("recipes")
    write_json(folder / "texts.json", TEXTS)
    (folder / "arms.yaml").write_text(ARMS)

    def run(*more):
        ran.clear()
        recipes.main([
            f"--instructions={folder / 'texts.json'}", f"--work_dir={folder / 'work'}",
            f"--arms={folder / 'arms.yaml'}", f"--json={folder / 'found.json'}",
            "--max_seq_len=24", "--num_test=10", "--num_public=40", "--num_private=50",
            "--pretraining_tokens=64", "--delta=1e-3", "--perdevice_bs=5", *more,
        ])  # fmt: skip
        return ["-".join(name.split("-")[:2]) for name in ran], json.loads(
            (folder / "found.json").read_text()
        )

    def run_command(command, log):
        assert "--perdevice_bs=5" in command
        assert "--num_rows=10" in command or command[0] == "train.py"
        return run_here(command, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "run_command", run_command)
        patch.setattr(recipes, "side_by_side", one_by_one)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        patch.setattr(small_base, "SHAPE", small_base.SHAPE | shape)
        patch.setattr(small_base, "WINDOW", 8)
        patch.setattr(small_base, "BATCH", 4)
        yield run


def test_a_study_goes_on_where_it_stopped_and_grows(study):
    ran, found = study("--num_seeds=1", "--only", "slow", "no privacy")
    assert ran == ["train-slow", "train-no_privacy", ran[2]]
    assert [(arm["arm"], arm["epsilon"]) for arm in found["arms"]] == [
        ("slow", 5.94), ("no privacy", None),
    ]  # fmt: skip
    before = found["arms"][0]["loss"]
    ran, found = study("--num_seeds=2")
    assert ran[:4] == [
        "train-very_fast", "train-slow", "train-very_fast", "train-no_privacy"
    ]  # fmt: skip
    slow, fast, free = found["arms"]
    assert slow["loss"][:1] == before
    assert [len(arm["loss"]) for arm in found["arms"]] == [2, 2, 2]
    assert slow["steps"] == 1
    assert slow["noise_multiplier"] == fast["noise_multiplier"] > 0.3
    assert free["noise_multiplier"] is None
    assert study("--num_seeds=2")[0] == []
    lines = recipes.table(found).splitlines()
    assert len(lines) == 2 + 1 + 3
    # Pairs of one seed, with an interval over generators.
    pairs = [one - other for one, other in zip(fast["loss"], slow["loss"])]
    assert f"{sum(pairs) / 2:+.3f} +- {interval(pairs):.3f}" in lines[4]


def test_an_interval_is_students():
    # t of two degrees of freedom at 97.5% is 4.303.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert interval([1.0]) == float("inf")
    assert (mean_of([1.0, 2.0, 3.0]), mean_of([1.0], "+")) == ("2.000 +- 2.484", "+1.000")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("{lrr: 1e-3}", "unrecognized arguments: --lrr=1e-3"),
        ("{lr: true}", "argument --lr: expected one argument"),
        ("{lr: fast}", "argument --lr: 'fast' is not a number above 0"),
        ("{eps: -1, noise: banded}", "--noise needs --eps"),
        ("{dry_run: true}", "a rehearsal trains nothing"),
        ("{seed: 7}", "--seed is the study's own"),
        ("{prompt_style: topic_generation}", "--prompt_style is the study's own"),
        ("{max_seq_len: 64}", "--max_seq_len is the study's own"),
    ],
)
def test_what_training_would_refuse_is_refused_before_it(study, tmp_path, own, message):
    file = tmp_path / "arms.yaml"
    file.write_text(f"common: {{clip: 1}}\narms: {{good: {{}}, odd: {own}}}")
    with pytest.raises(UsageError, match=f"--arms: odd: {message}"):
        study(f"--arms={file}")
    file.write_text("arms: {a/b: {clip: 1}}")
    with pytest.raises(UsageError, match="--arms: a/b: .* must be a folder name"):
        study(f"--arms={file}")
    assert ran == []


def test_a_study_stays_with_its_instructions(study, tmp_path):
    _, found = study("--num_seeds=1", "--only", "slow")
    assert found["settings"]["base"].startswith("small-")
    assert len(found["settings"]["instructions_sha256"]) == 64
    write_json(tmp_path / "others.json", TEXTS[1:])
    with pytest.raises(UsageError, match="was begun with instructions_sha256 .*another --work_dir"):
        study(f"--instructions={tmp_path / 'others.json'}")


def test_a_remedy_is_not_refused(study, tmp_path):
    few = (f"--work_dir={tmp_path}", "--num_seeds=1", "--only", "slow")
    with pytest.raises(UsageError, match="104 distinct .* are left besides --num_public 40, fewer"):
        study(*few, "--num_private=5000")
    assert study(*few, "--num_private=50")[1]["arms"]
    with pytest.raises(UsageError, match="--num_public 0: a small base is made of public rows"):
        study("--num_public=0")


def test_the_arms_that_come_with_it_are_flags_of_training():
    given = read_flags(recipes.Settings, None, ["--instructions=x", "--work_dir=x"])
    names = {each.arm for each in recipes.generators_of(given)}
    assert {"published", "no privacy"} <= names
    known = set(TrainingSettings.__dataclass_fields__)
    assert all(set(each.flags) <= known for each in recipes.generators_of(given))


def test_no_held_out_text_is_a_private_one_that_was_cut_to_the_same_words(tmp_path, monkeypatch):
    write_json(tmp_path / "texts.json", TEXTS)
    given = read_flags(recipes.Settings, None, [
        f"--instructions={tmp_path / 'texts.json'}", f"--work_dir={tmp_path}", "--num_test=10",
        "--num_public=40", "--num_private=50", "--model_name=any",
    ])  # fmt: skip
    monkeypatch.setattr(recipes, "cut_at_words", lambda name, texts, most: [t[:2] for t in texts])
    recipes.save_data(given, tmp_path)
    splits = load_from_disk(tmp_path / "data")
    train, test = (splits[name]["instruction"][:] for name in ("train", "test"))
    assert len(train) == 50
    assert len(set(train)) < 36
    assert 0 < len(test) < 10
    assert not set(test) & set(train)
    monkeypatch.setattr(recipes, "cut_at_words", lambda name, texts, most: ["same" for _ in texts])
    with pytest.raises(UsageError, match="raise --row_tokens"):
        recipes.save_data(given, tmp_path / "other")


def test_a_base_is_made_once_for_its_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(small_base, "_pretrain", lambda *given: None)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    monkeypatch.setattr(small_base, "SHAPE", small_base.SHAPE | shape)
    one = small_base.small_base(tmp_path, TEXTS, 10)
    made = (one / "model.safetensors").stat().st_mtime_ns
    assert small_base.small_base(tmp_path, TEXTS, 10) == one
    assert (one / "model.safetensors").stat().st_mtime_ns == made
    assert small_base.small_base(tmp_path, TEXTS[1:], 10) != one
