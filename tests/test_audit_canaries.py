"""Canaries of an audit: what they say, which are in, and what training makes of them."""

import json

import numpy as np
import pytest

import train
from tests.helpers import adapted_model, clipped_sum, random_examples
from tests.training import NUM_EXAMPLES, flags, in_process, save_dataset
from utils.cli import UsageError
from utils.models.loading import load_tokenizer
from utils.privacy.accounting import compute_epsilon
from utils.privacy.ledger import LEDGER_FILE, read_plan
from utils.texts.audit_canaries import (
    COINS_FILE,
    NATURAL,
    TOKENS,
    AuditCanaries,
    as_trained,
    read_coins,
)

COUNT = 32


@pytest.fixture
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


def rows_of(data) -> list[tuple[int, ...]]:
    return [tuple(data.ids[a:b].tolist()) for a, b in zip(data.offsets, data.offsets[1:])]


@pytest.mark.parametrize("kind", [TOKENS, NATURAL])
def test_they_are_distinct_and_follow_from_the_seed(kind, tokenizer):
    made = [
        rows_of(AuditCanaries(COUNT, kind, seed).examples(tokenizer, "uncond_generation", 100))
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1]
    assert len(set(made[0])) == COUNT
    assert not set(made[0]) & set(made[2])
    # More of them are the same ones and others.
    more = AuditCanaries(COUNT + 1, kind, 0).examples(tokenizer, "uncond_generation", 100)
    assert rows_of(more)[:COUNT] == made[0]


def test_those_of_tokens_end_like_any_row_and_have_no_other_special_token(tokenizer):
    made = AuditCanaries(COUNT, TOKENS, 0).examples(tokenizer, "vicuna", 100)
    for *ids, last in rows_of(made):
        assert last == tokenizer.eos_token_id
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_natural_ones_begin_as_users_do_and_pairs_answer_with_the_ending(tokenizer):
    canaries = AuditCanaries(COUNT, NATURAL, 0)
    alone = canaries.examples(tokenizer, "uncond_generation", 100)
    text = tokenizer.decode(rows_of(alone)[3], skip_special_tokens=True)
    assert text == f"{canaries.opening(3)} {canaries.ending(3)}"
    pairs = canaries.examples(tokenizer, "vicuna", 500)
    answer = rows_of(pairs)[3][pairs.loss_starts[3] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == canaries.ending(3)
    topical = canaries.examples(tokenizer, "topic_generation", 500)
    assert rows_of(topical)[3][topical.loss_starts[3] :] == rows_of(alone)[3][1:]
    topic = tokenizer.decode(rows_of(topical)[3][: topical.loss_starts[3]])
    assert canaries.opening(3) in topic
    assert canaries.ending(3) not in topic


@pytest.mark.parametrize(("kind", "length"), [(TOKENS, 8), (NATURAL, 40)])
def test_those_that_are_cut_are_refused(kind, length, tokenizer):
    with pytest.raises(UsageError, match=f"--max_seq_len {length} cuts the audit's canaries"):
        AuditCanaries(COUNT, kind, 0).examples(tokenizer, "uncond_generation", length)


def test_one_that_is_out_leaves_the_clipped_sum_as_it_would_be_without_its_row():
    model, canaries = adapted_model(["q_proj", "v_proj"]), random_examples([5, 9, 7, 4])
    inside = np.array([True, False, True, False])
    total, norms = clipped_sum(model, as_trained(canaries, inside, 2), 0.1)
    alone, _ = clipped_sum(model, canaries, 0.1, indices=np.flatnonzero(inside))
    assert norms[~inside].tolist() == [0, 0]
    np.testing.assert_allclose(total, alone, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- in training


AUDITED = (
    f"--audit_canaries={COUNT}", "--max_seq_len=64", "--num_epochs=0.25", "--noise_multiplier=2",
    "--save_steps=1",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, tiny_model_dir, monkeypatch):
    """Train in this process; returns the run's folder and the examples that were trained on."""
    dataset, seen = save_dataset(tmp_path), []
    monkeypatch.setattr(
        train, "tokenise_once",
        lambda *given, make=train.tokenise_once: seen.append(make(*given)) or seen[-1],
    )  # fmt: skip

    def start(*more, dp=True) -> tuple:
        argv = flags(tiny_model_dir, dataset, tmp_path, "--no_eval_at_start", *more, dp=dp)
        assert in_process(train.main, argv) == 0
        return tmp_path / "job", seen[-1]["train"]

    return start


def test_all_of_them_count_in_n_and_secret_coins_put_half_of_them_in(run, tokenizer):
    folder, data = run(*AUDITED)
    plan = read_plan(folder / LEDGER_FILE)
    assert len(data) == plan.num_examples == NUM_EXAMPLES + COUNT
    assert plan.sampling_rate == 8 / (NUM_EXAMPLES + COUNT)
    report = json.loads((folder / "privacy_report.json").read_text())
    assert report["canaries"] == COUNT
    # The guarantee is that of the plan, which knows of no coin.
    spent = compute_epsilon(plan.events(report["steps_taken"]), plan.delta).upper
    assert report["epsilon"]["upper"] == spent <= 8
    coins = json.loads((folder / "private" / COINS_FILE).read_text())["inside"]
    assert 4 < len(coins) < 28  # two-sided, 1 in 100,000
    every = AuditCanaries(COUNT, TOKENS, 0).examples(tokenizer, "uncond_generation", 64)
    for number, row in enumerate(rows_of(data)[NUM_EXAMPLES:]):
        out = (tokenizer.eos_token_id,)
        assert row == (rows_of(every)[number] if number in coins else out)
        assert (data.loss_starts[NUM_EXAMPLES + number] == 0) == (number in coins)
    # Neither in the counts of the owner's rows, nor anywhere outside private/.
    counted = json.loads((folder / "private" / "row_counts.json").read_text())["train"]
    assert counted == {"rows": NUM_EXAMPLES, "cut": 0, "without_loss": 0}
    assert [path.parent.name for path in folder.rglob(COINS_FILE)] == ["private"]
    released = [path for path in folder.rglob("*.json") if "private" not in path.parts]
    assert len(released) > 3
    assert not any("inside" in path.read_text() for path in released)


def test_coins_are_the_same_when_a_run_goes_on_and_others_in_another_run(run, tmp_path):
    tossed = []
    for job in ("job", "other"):
        run(*AUDITED, f"--job_sess={job}")
        tossed.append((tmp_path / job / "private" / COINS_FILE).read_text())
        (tmp_path / job / "adapter").rename(tmp_path / job / "elsewhere")
    assert tossed[0] != tossed[1]
    _, data = run(*AUDITED, "--resume=auto")
    assert (tmp_path / "job" / "private" / COINS_FILE).read_text() == tossed[0]
    in_now = data.lengths[NUM_EXAMPLES:] > 1
    assert np.flatnonzero(in_now).tolist() == json.loads(tossed[0])["inside"]


def test_a_run_does_not_go_on_without_its_coins_or_with_other_canaries(run):
    folder, _ = run(*AUDITED)
    for flag, named in (("--audit_canaries=31", "audit_canaries 32"),
                        ("--audit_canary_kind=natural", "audit_canary_kind tokens")):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            run(*AUDITED, "--resume=auto", flag)
    (folder / "adapter").rename(folder / "elsewhere")
    (folder / "private" / COINS_FILE).unlink()
    with pytest.raises(UsageError, match=f"{COINS_FILE} is not there or damaged"):
        run(*AUDITED, "--resume=auto")


@pytest.mark.parametrize("coins", ["{}", '{"inside": [8]}', '{"inside": ["1"]}', '{"inside": 3}',
                                   '{"inside": [true]}', '{"inside": [1.0]}'])  # fmt: skip
def test_damaged_coins_are_refused(tmp_path, coins):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / COINS_FILE).write_text(coins)
    with pytest.raises(UsageError, match="not there or damaged"):
        read_coins(tmp_path, 8)


def test_a_kind_without_canaries_is_refused(run):
    with pytest.raises(UsageError, match="--audit_canary_kind needs --audit_canaries"):
        run("--audit_canary_kind=natural")
