"""The vLLM engine's glue, against a stand-in; test_inference.py runs the real one (`-m vllm`)."""

import importlib.util
import sys
import types
from dataclasses import replace

import pytest

from tests.test_engines import GREEDY, SAMPLING
from utils.cli import UsageError
from utils.sampling import vllm_engine
from utils.sampling.decoding import Completion, Request
from utils.sampling.engines import complete
from utils.sampling.vllm_engine import ModelFolder, sample_seed


class FakeEngine:
    """Keeps to the engine's calls: prompts are added, and every step ends the oldest of them.

    The text of a prompt counts up from its last token until a stop token or the limit.
    """

    def __init__(self):
        self.requests, self.most, self.engine_core = [], 0, self
        self.down = False

    def add_request(self, request_id, prompt, parameters, lora_request=None):
        assert isinstance(request_id, str)
        self.requests.append((request_id, prompt["prompt_token_ids"], parameters, lora_request))
        self.most = max(self.most, len(self.requests))

    def step(self):
        id, prompt, parameters, _ = self.requests.pop(0)
        tokens = []
        for token in range(prompt[-1] + 1, prompt[-1] + 1 + parameters.max_tokens):
            tokens.append(token)
            if token in parameters.stop_token_ids:
                break
        output = types.SimpleNamespace(token_ids=tuple(tokens))
        unfinished = types.SimpleNamespace(finished=False)
        finished = types.SimpleNamespace(finished=True, request_id=id, outputs=[output])
        return [unfinished, finished]

    def shutdown(self):
        self.down = True


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for the package; what it was asked for is in its attributes."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.util.spec_from_loader("vllm", None)
    module.engine, module.parameters = FakeEngine(), []

    def make(path, **options):
        module.path, module.options = path, options
        return types.SimpleNamespace(llm_engine=module.engine)

    def parameters(**values):
        module.parameters.append(types.SimpleNamespace(**values))
        return module.parameters[-1]

    module.LLM, module.SamplingParams = make, parameters
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for name, part in {"vllm": module, "vllm.lora": types.ModuleType("vllm.lora"),
                       "vllm.lora.request": request}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, part)
    for name in vllm_engine.LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "0")
    return module


FOLDER = ModelFolder("model", "float32", cache_bytes=10**6)


def test_completions_and_their_reasons(fake):
    requests = [Request(0, [10]), Request(1, [18]), Request(2, [1] * 48), Request(3, [5] * 46)]
    decoding = replace(SAMPLING, stop_ids=frozenset([20]))
    found = list(complete("vllm", FOLDER, requests, decoding, 4))
    assert sorted(found, key=lambda completion: completion.sample_id) == [
        Completion(0, list(range(11, 21)), "stop"),
        Completion(1, [19, 20], "stop"),
        Completion(2, [], "prompt_too_long"),
        Completion(3, [6, 7], "length"),
    ]
    assert fake.engine.down
    assert fake.path == "model"
    expected = {"dtype": "float32", "max_model_len": 48, "max_num_seqs": 4,
                "kv_cache_memory_bytes": 10**6, "generation_config": "vllm"}  # fmt: skip
    assert expected.items() <= fake.options.items()


def test_decoding_flags_reach_it_and_seeds_differ(fake):
    changes = {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1}
    requests = [Request(i, [1]) for i in range(50)]
    list(complete("vllm", FOLDER, requests, replace(SAMPLING, **changes), 4))
    list(complete("vllm", FOLDER, requests[:1], GREEDY, 4))
    *sampled, greedy = fake.parameters
    for parameters in sampled:
        assert changes.items() <= vars(parameters).items()
        assert (parameters.max_tokens, parameters.stop_token_ids) == (47, [2])
    assert len({parameters.seed for parameters in sampled}) == 50
    assert greedy.temperature == 0
    assert sample_seed(0, 1) != sample_seed(1, 1)
    assert all(0 <= sample_seed(s, 3) < 2**63 for s in range(100))


def test_requests_are_taken_as_they_are_needed_and_a_stop_ends_it(fake):
    taken, seen = [], []

    def requests():
        for id in range(1000):
            taken.append(id)
            yield Request(id, [1])

    for completion in complete("vllm", FOLDER, requests(), SAMPLING, 4, lambda: len(seen) >= 3):
        seen.append(completion)
    assert len(seen) == 3
    assert len(taken) < 20
    assert fake.engine.most == 8
    assert fake.engine.down


def test_a_kept_adapter_is_a_lora_request_of_an_allowed_rank(fake, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 12, "rank_pattern": {"q": 20}}')
    folder = replace(FOLDER, adapter=str(tmp_path))
    fake.engine.step = lambda: pytest.fail("asked for nothing")
    list(complete("vllm", folder, [], SAMPLING, 4))
    assert (fake.options["enable_lora"], fake.options["max_lora_rank"]) == (True, 32)


def test_a_start_that_fails_is_one_line(fake, monkeypatch):
    def refuse(path, **options):
        raise ValueError("max_model_len 48 is\nabove 16")

    monkeypatch.setattr(fake, "LLM", refuse)
    with pytest.raises(UsageError, match="could not start: max_model_len 48 is above 16"):
        list(complete("vllm", FOLDER, [Request(0, [1])], SAMPLING, 4))


def test_an_error_counts_unless_a_stop_was_asked_for(fake, monkeypatch):
    def dead():
        raise RuntimeError("engine is dead")

    monkeypatch.setattr(fake.engine, "step", dead)
    with pytest.raises(UsageError, match="engine is dead"):
        list(complete("vllm", FOLDER, [Request(0, [1])], SAMPLING, 4))
    answers = iter([False, True, True])
    stopped = complete("vllm", FOLDER, [Request(0, [1])], SAMPLING, 4, lambda: next(answers))
    assert list(stopped) == []
