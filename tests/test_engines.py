"""Engines: what they draw, in which distribution, when they end; locks and manifests."""

import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

from privacy_checks.tiny_model import tiny_llama
from utils.cli import UsageError
from utils.folders import names_in
from utils.sampling import continuous, engines
from utils.sampling.decoding import Completion, Decoding, Request
from utils.sampling.engines import complete, fitting_batch_size
from utils.sampling.shards import (
    check_manifest,
    finish_reasons,
    rank_locked,
    wait_for_other_ranks,
)

ENGINES = ("continuous", "static")  # vLLM has an environment, and tests, of its own

EOS = 2
SAMPLING = Decoding(
    max_seq_len=48, max_new_tokens=None, no_sample=False, temperature=1.0, top_k=0, top_p=1.0,
    repetition_penalty=1.0, seed=0, stop_ids=frozenset([EOS]),
)  # fmt: skip
GREEDY = replace(SAMPLING, no_sample=True)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def random_requests(number, seed=0, longest=40, vocabulary=259):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, number)
    return [Request(i, random.integers(3, vocabulary, n).tolist()) for i, n in enumerate(lengths)]


def tokens_of(engine, model, requests, decoding, batch_size=4):
    """Drawn tokens by id."""
    return {c.sample_id: c.tokens for c in complete(engine, model, requests, decoding, batch_size)}


def constant_model(logits):
    """A LLaMA whose logits are `logits`, whatever it reads.

    All embeddings are equal, so that every layer sees the same vector at every position.
    """
    model = tiny_llama(vocab_size=len(logits))
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[1].clone()
        hidden = model.model(torch.tensor([[0]])).last_hidden_state[0, 0]
        wanted = torch.tensor(logits, dtype=torch.float32)
        model.lm_head.weight[:] = wanted[:, None] * hidden / (hidden @ hidden)
    return model


# ---------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_equals_generate_one_by_one(engine, model):
    requests = random_requests(13)
    drawn = tokens_of(engine, model, requests, GREEDY)
    assert len(drawn) == len(requests)
    for request in requests:
        expected = model.generate(
            torch.tensor([request.prompt]),
            do_sample=False,
            max_new_tokens=GREEDY.limit(request.prompt),
            eos_token_id=EOS,
        )[0, len(request.prompt) :]
        assert drawn[request.sample_id] == expected.tolist()


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.8}]
    + [{"temperature": 1.3, "top_k": 50, "top_p": 0.9, "seed": 5}],
)
def test_a_text_depends_on_neither_engine_nor_batch(model, changes):
    decoding = replace(SAMPLING, **changes)
    requests = random_requests(6)
    alone = {}
    for request in requests:
        alone |= tokens_of("static", model, [request], decoding)
    assert tokens_of("static", model, requests, decoding, batch_size=4) == alone
    assert tokens_of("continuous", model, requests, decoding, batch_size=3) == alone
    assert tokens_of("continuous", model, requests[::-1], decoding, batch_size=16) == alone


def test_a_full_cache_changes_no_text(model, monkeypatch):
    requests = [Request(i, [1]) for i in range(24)]
    decoding = replace(SAMPLING, max_seq_len=120, stop_ids=frozenset([EOS, 50]))
    expected = tokens_of("static", model, requests, decoding)
    config = transformers.ContinuousBatchingConfig
    made = []

    def crowded(**arguments):
        made.append(config(**(arguments | {"max_requests_per_batch": 24, "max_batch_tokens": 24})))
        return made[-1]

    resets = []
    manager = transformers.generation.continuous_batching.offloading_manager.OffloadingManager
    offload = manager.offload_requests
    monkeypatch.setattr(manager, "offload_requests", lambda self: resets.append(1) or offload(self))
    monkeypatch.setattr(transformers, "ContinuousBatchingConfig", crowded)
    assert tokens_of("continuous", model, requests, decoding, batch_size=3) == expected
    assert resets, "the cache was never full, so this test shows nothing"


def test_identical_prompts_and_other_seeds_give_other_texts(model):
    requests = [Request(i, [1]) for i in range(12)]
    first = tokens_of("continuous", model, requests, SAMPLING)
    other = tokens_of("continuous", model, requests, replace(SAMPLING, seed=1))
    assert len({tuple(tokens) for tokens in [*first.values(), *other.values()]}) == 24


FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 8}, "qwen2": {}, "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8}, "phi3": {"pad_token_id": 0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8}, "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_agree_on_other_architectures(family):
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(settings | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    requests = random_requests(6, longest=20, vocabulary=64)
    decoding = replace(SAMPLING, max_seq_len=32, temperature=0.8)
    static = tokens_of("static", model, requests, decoding)
    assert tokens_of("continuous", model, requests, decoding) == static


# ---------------------------------------------------------------------- its distribution

LEVEL = 1e-4  # of significance: what is right stays above, what is wrong falls below
LOGITS = [2.0, -1.0, 0.5, 1.5, 0.0, -2.0, 1.0, -0.5]


def expected_distribution(temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities by the definition of each flag, in numpy."""
    probabilities = np.exp(np.array(LOGITS) / temperature)
    order = np.argsort(-probabilities)
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


def p_value(counts, probabilities):
    """Of a chi-square test; 0 where something impossible was drawn."""
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    return stats.chisquare(counts[possible], counts.sum() * probabilities[possible]).pvalue


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "flags",
    [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.75}]
    + [{"temperature": 1.5, "top_k": 6, "top_p": 0.8}],
    ids=str,
)
def test_tokens_follow_the_decoding_flags(engine, flags):
    model = constant_model(LOGITS)
    decoding = replace(SAMPLING, max_new_tokens=4, stop_ids=frozenset([99]), **flags)
    requests = [Request(i, [1]) for i in range(1000)]
    drawn = np.array(list(tokens_of(engine, model, requests, decoding, 250).values()))
    counts = np.bincount(drawn.flatten(), minlength=len(LOGITS))
    assert p_value(counts, expected_distribution(**flags)) > LEVEL
    for wrong in ({"temperature": 1.2}, {"top_k": 4}, {"top_p": 0.9}, {"temperature": 0.5}):
        assert p_value(counts, expected_distribution(**wrong)) < LEVEL
    pairs = stats.contingency.crosstab(*drawn[:, :2].T).count
    assert stats.chi2_contingency(pairs).pvalue > LEVEL, "the second token hangs on the first"


def test_repetition_penalty_equals_generate_and_spares_padding():
    # Token 0, with which short rows are padded, must compete without a penalty.
    torch.manual_seed(1)
    model = tiny_llama(vocab_size=12)
    with torch.no_grad():
        model.lm_head.weight[0] *= 4
    decoding = replace(GREEDY, repetition_penalty=1.8, max_seq_len=40)
    requests = random_requests(8, longest=20, vocabulary=12)
    drawn = tokens_of("static", model, requests, decoding)
    for request in requests:
        expected = model.generate(
            torch.tensor([request.prompt]),
            do_sample=False,
            repetition_penalty=1.8,
            max_new_tokens=decoding.limit(request.prompt),
            eos_token_id=EOS,
        )[0, len(request.prompt) :]
        assert drawn[request.sample_id] == expected.tolist()
    assert drawn != tokens_of("static", model, requests, GREEDY)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_model_brings_along_decides_nothing(engine):
    model = tiny_llama()
    expected = tokens_of(engine, model, random_requests(5), SAMPLING)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0, max_length=3,
        min_new_tokens=20, suppress_tokens=list(range(100)), eos_token_id=7,
    )  # fmt: skip
    assert tokens_of(engine, model, random_requests(5), SAMPLING) == expected


# ---------------------------------------------------------------------- when a text ends


@pytest.mark.parametrize("engine", ENGINES)
def test_finish_reasons(engine, model):
    free = tokens_of(engine, model, [Request(0, [1])], replace(SAMPLING, stop_ids=frozenset([EOS])))
    third = free[0][2]
    requests = [Request(0, [1]), Request(1, [1] * 48), Request(2, [1] * 60), Request(3, [1] * 46)]
    decoding = replace(SAMPLING, stop_ids=frozenset([EOS, third]))
    ended = {c.sample_id: c for c in complete(engine, model, requests, decoding, 4)}
    first_stop = free[0].index(third) + 1
    assert ended[0] == Completion(0, free[0][:first_stop], "stop")
    assert ended[1] == Completion(1, [], "prompt_too_long")
    assert ended[2] == Completion(2, [], "prompt_too_long")
    assert (len(ended[3].tokens), ended[3].finish_reason) == (2, "length")


@pytest.mark.parametrize("engine", ENGINES)
def test_max_new_tokens_and_max_seq_len_both_bound(engine, model):
    decoding = replace(GREEDY, max_new_tokens=5, stop_ids=frozenset([9999]))
    drawn = tokens_of(engine, model, [Request(0, [1]), Request(1, [1] * 45)], decoding)
    assert [len(drawn[0]), len(drawn[1])] == [5, 3]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_ends_the_engine_and_its_threads(engine, model):
    before = threading.active_count()
    seen = []
    drawn = complete(
        engine, model, random_requests(200), SAMPLING, 4, should_stop=lambda: len(seen) >= 3
    )
    for completion in drawn:
        seen.append(completion)
    assert 3 <= len(seen) < 10
    assert threading.active_count() == before


@pytest.mark.parametrize("engine", ENGINES)
def test_requests_are_taken_as_they_are_needed(engine, model):
    taken = []

    def requests():
        for request in random_requests(2000):
            taken.append(request.sample_id)
            yield request

    drawn = complete(engine, model, requests(), SAMPLING, 4)
    next(drawn)
    drawn.close()
    assert len(taken) < 500


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("decoding", [SAMPLING, GREEDY, replace(SAMPLING, top_p=0.9)])
def test_logits_that_are_no_numbers_end_it_in_a_line(engine, decoding):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(UsageError, match="logits are NaN or infinite"):
        tokens_of(engine, model, random_requests(5), decoding)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_is_as_it_was(engine, model):
    before = model.config._attn_implementation, model.generation_config
    tokens_of(engine, model, random_requests(2), SAMPLING)
    assert (model.config._attn_implementation, model.generation_config) == before


def test_attention_that_an_engine_exchanges_while_it_begins_is_put_back(model, monkeypatch):
    begin = type(model).init_continuous_batching

    def exchanging(self, *given, **options):
        self.set_attn_implementation("eager")
        return begin(self, *given, **options)

    monkeypatch.setattr(type(model), "init_continuous_batching", exchanging)
    before = model.config._attn_implementation
    tokens_of("continuous", model, random_requests(2), SAMPLING)
    assert model.config._attn_implementation == before != "eager"


@pytest.mark.parametrize(
    ("dtype", "capability", "fix"),
    [
        (torch.bfloat16, (8, 0), "pip install flash-attn"),
        (torch.bfloat16, (7, 5), "compute capability 8.0 or more"),
        (torch.float32, (9, 0), "it takes bfloat16"),
    ],
)
def test_a_gpu_without_flash_attention_says_so(dtype, capability, fix, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = SimpleNamespace(_attn_implementation="sdpa")
    model = SimpleNamespace(config=config, device=torch.device("cuda", 0), dtype=dtype)
    continuous._choose_attention(model)
    assert fix in capsys.readouterr().err
    config._attn_implementation = "flash_attention_2"
    continuous._choose_attention(model)
    assert not capsys.readouterr().err


def test_too_little_memory_is_said_in_a_line(model):
    with pytest.raises(UsageError, match="--perdevice_bs 100000000 .*lower one of them"):
        tokens_of("continuous", model, [Request(0, [1])], SAMPLING, batch_size=10**8)


def test_fitting_batch_size_on_a_cpu(model):
    assert fitting_batch_size(model, 1024) == engines.MAX_BATCH_SIZE_ON_CPU
    sequence = engines.cache_bytes(model, 1000)
    assert sequence == 2 * 2 * 2 * 8 * 4 * 1000  # keys and values, layers, heads, width, bytes
    assert fitting_batch_size(model, 10**12) == 1


# ---------------------------------------------------------------------- the folder


def test_a_folder_has_one_run_with_many_processes(tmp_path):
    folder = tmp_path / "new"
    refused = pytest.raises(UsageError, match="in use by another .* another --job_sess")
    with rank_locked(folder, 0), rank_locked(folder, 1):
        for rank in (0, 1):
            with refused:
                rank_locked(folder, rank).__enter__()
    with rank_locked(folder, 3), pytest.raises(UsageError, match="new is in use"):
        rank_locked(folder, 0).__enter__()
    with rank_locked(folder, 0):
        assert names_in(folder) == set()


def test_the_first_process_waits_for_the_others(tmp_path):
    ended = []

    def other(ready):
        with rank_locked(tmp_path, 2):
            ready.set()
            time.sleep(0.5)
            ended.append(2)

    ready = threading.Event()
    thread = threading.Thread(target=other, args=(ready,))
    thread.start()
    ready.wait()
    wait_for_other_ranks(tmp_path, 3)
    assert ended == [2]
    thread.join()


def test_samples_without_a_manifest_are_not_added_to(tmp_path):
    check_manifest(tmp_path, {"top_p": 0.9})
    (tmp_path / "shard-3.jsonl").write_text("")
    with pytest.raises(UsageError, match="without manifest.json"):
        check_manifest(tmp_path, {"top_p": 0.9})


def test_check_manifest_names_the_setting(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"top_p": 0.9, "seed": 1}))
    check_manifest(tmp_path, {"top_p": 0.9, "unknown_then": 3})
    with pytest.raises(UsageError, match=r"top_p 0\.9, not 0\.8; .*--job_sess"):
        check_manifest(tmp_path, {"seed": 1, "top_p": 0.8})


def test_finish_reasons_of_all_shards_pass_over_torn_lines(tmp_path):
    record = '{"id": %d, "finish_reason": "stop"}'
    (tmp_path / "shard-0.jsonl").write_text(record % 4 + "\n" + record % 5)
    (tmp_path / "shard-7.jsonl").write_text(record % 1 + "\n" + '{"id": 2, "fini')
    assert finish_reasons(tmp_path) == {4: "stop", 1: "stop"}
