"""`inference.py`: what it writes, what it refuses, and what a stop or a kill leaves."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

import inference
from benchmarks.environments import vllm_python
from privacy_checks.tiny_model import byte_tokenizer, save_tiny_model
from tests.helpers import adapted_model
from tests.paths import ROOT
from tests.processes import fork_server
from tests.test_engines import constant_model
from tests.training import in_process
from utils.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UsageError, run_cli
from utils.files import read_jsonl, sha256_of, write_json
from utils.models.adapter_info import write_adapter_info
from utils.models.loading import load_base_model, model_fingerprint
from utils.texts.prompts import write_instruction_file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, and one thread: the machine may be shared."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def save_adapter(target: Path, model: str) -> str:
    """Save a random adapter of a model, trained (it says) with uncond_generation."""
    base = load_base_model(model, torch.float32)
    fingerprint = model_fingerprint(base)
    adapted_model(["q_proj", "v_proj"], base=base).save_pretrained(target)
    info = {"prompt_style": "uncond_generation", "base_model": "tiny"}
    write_adapter_info(target, info | {"base_model_fingerprint": fingerprint})
    return str(target)


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, tmp_path_factory):
    """A random adapter of the tiny model."""
    return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", tiny_model_dir)


def flags(model, **changes):
    """Command line of a small unconditional run; None leaves a flag out, True gives it alone."""
    values = {
        "instruction_file": str(ROOT / "utils" / "syn_instruct.txt"), "model_name": model,
        "job_sess": "job", "prompt_style": "uncond_generation", "max_seq_len": 24,
        "num_samples": 12,
    } | changes  # fmt: skip
    argv = []
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name}"] + ([] if value is True else [str(value)])
    return argv


def run(model, **changes):
    """Run in this process; the code it returns."""
    return in_process(inference.main, flags(model, **changes))


def samples(job="job"):
    """Records by id; every id must be there once."""
    records = [
        record
        for shard in Path("inference_outputs", job).glob("shard-*.jsonl")
        for record in read_jsonl(shard)
    ]
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == len(records), "an id is there twice"
    return by_id


# ---------------------------------------------------------------------- what it writes


def test_unconditional_samples(folder, tiny_model_dir, capsys):
    assert run(tiny_model_dir) == EXIT_OK
    found = samples()
    assert sorted(found) == list(range(12))
    for record in found.values():
        assert list(record) == ["id", "prompt", "text", "num_tokens", "finish_reason"]
        assert record["prompt"] == ""
        assert 1 <= record["num_tokens"] <= 23
        assert (record["num_tokens"] == 23) or (record["finish_reason"] == "stop")
        assert "</s>" not in record["text"]
    assert len({record["text"] for record in found.values()}) == 12
    manifest = json.loads(Path("inference_outputs/job/manifest.json").read_text())
    assert (manifest["top_p"], manifest["seed"], manifest["num_samples"]) == (1.0, 0, 12)
    shard = "inference_outputs/job/shard-0.jsonl"
    assert manifest["outputs_sha256"] == {"shard-0.jsonl": sha256_of(shard)}
    assert "all 12 samples are in inference_outputs/job" in capsys.readouterr().err


def test_the_manifest_adds_up_the_seconds_of_its_runs(folder, tiny_model_dir):
    seconds = []
    for num_samples in (4, 8):
        run(tiny_model_dir, num_samples=num_samples)
        manifest = json.loads(Path("inference_outputs/job/manifest.json").read_text())
        seconds.append(manifest["seconds"])
    assert 0 < seconds[0] < seconds[1] < 60


def test_a_stop_token_is_counted_and_not_written(folder, tiny_model_dir):
    # 259 tokens, of which one ends the text: some of 200 texts end within 23 tokens.
    assert run(tiny_model_dir, num_samples=200, perdevice_bs=50) == EXIT_OK
    stopped = [r for r in samples().values() if r["finish_reason"] == "stop"]
    assert stopped
    empty = [r for r in stopped if r["num_tokens"] == 1]
    assert all(record["text"] == "" for record in empty)
    assert all("</s>" not in record["text"] for record in stopped)


def test_answers_to_instructions_and_their_copies(folder, tiny_model_dir):
    Path("i.txt").write_text(
        '### BOI ### 2\nSay é "a"\n\tand b\n### EOI ###\n### BOI ### 1\nBye\n### EOI ###\n'
    )
    run(tiny_model_dir, instruction_file="i.txt", prompt_style="alpaca", num_samples=None,
        max_seq_len=300)  # fmt: skip
    found = samples()
    assert [found[i]["prompt"] for i in range(3)] == ['Say é "a"\n\tand b'] * 2 + ["Bye"]
    assert found[0]["text"] != found[1]["text"], "copies of a prompt share their randomness"
    assert all(r["text"] == r["text"].strip() for r in found.values())


def test_white_space_parts_an_answer_but_belongs_to_an_instruction(folder):
    logits = [0.0] * 259
    logits[byte_tokenizer().convert_tokens_to_ids("Ġ")] = 50.0
    constant_model(logits).save_pretrained("spaces")
    byte_tokenizer().save_pretrained("spaces")
    write_instruction_file("i.txt", ["Go"])
    run("spaces", num_samples=1, job_sess="instruction")
    run("spaces", num_samples=None, prompt_style="llama2", instruction_file="i.txt")
    assert samples("instruction")[0]["text"] == " " * 23
    assert samples()[0]["text"] == ""


def test_a_prompt_that_leaves_no_room_is_recorded_once(folder, tiny_model_dir, capsys):
    write_instruction_file("i.txt", ["short", "long " * 100, "short too"])
    arguments = {"instruction_file": "i.txt", "prompt_style": "llama2", "num_samples": None,
                 "max_seq_len": 40}  # fmt: skip
    assert run(tiny_model_dir, **arguments) == EXIT_OK
    found = samples()
    too_long = {"text": "", "num_tokens": 0, "finish_reason": "prompt_too_long"}
    assert found[1] == {"id": 1, "prompt": "long " * 100} | too_long
    assert {found[0]["finish_reason"], found[2]["finish_reason"]} <= {"stop", "length"}
    capsys.readouterr()
    assert run(tiny_model_dir, **arguments) == EXIT_OK
    assert samples() == found
    assert "engine" not in capsys.readouterr().err, "a complete folder needs no model"


def test_samples_of_which_none_can_be_used_are_a_failure(folder, tiny_model_dir, capsys):
    write_instruction_file("i.txt", ["long " * 100, "longer " * 100])
    arguments = {"instruction_file": "i.txt", "prompt_style": "llama2", "num_samples": None,
                 "max_seq_len": 40, "engine": "static"}  # fmt: skip
    for _ in range(2):  # drawn, and found as they are
        assert run(tiny_model_dir, **arguments) == EXIT_FAILED
        assert "no prompt left room; use a greater --max_seq_len" in capsys.readouterr().err
    logits = [0.0] * 259
    logits[byte_tokenizer().convert_tokens_to_ids("a")] = 50.0
    constant_model(logits).save_pretrained("endless")
    byte_tokenizer().save_pretrained("endless")
    assert run("endless", num_samples=2, job_sess="endless", engine="static") == EXIT_OK
    assert "every text in inference_outputs/endless was cut" in capsys.readouterr().err


def test_engines_and_a_kept_adapter_draw_the_same(folder, tiny_model_dir, adapter_dir):
    run(tiny_model_dir, job_sess="base")
    for job, changes in {
        "merged": {},
        "apart": {"no_merge": True},
        "static": {"engine": "static"},
    }.items():
        assert run(tiny_model_dir, job_sess=job, adapter_path=adapter_dir, **changes) == EXIT_OK
    assert samples("merged") == samples("apart") == samples("static")
    assert samples("merged") != samples("base"), "the adapter changed nothing"


def test_repetition_penalty_takes_the_static_engine(folder, tiny_model_dir, capsys):
    run(tiny_model_dir, repetition_penalty=1.5)
    assert "--repetition_penalty: the continuous engine has none" in capsys.readouterr().err
    assert json.loads(Path("inference_outputs/job/manifest.json").read_text())["engine"] == "static"


# ---------------------------------------------------------------------- going on


def test_growing_keeps_what_is_there(folder, tiny_model_dir):
    run(tiny_model_dir, num_samples=5)
    first = samples()
    shard = Path("inference_outputs/job/shard-0.jsonl").read_bytes()
    run(tiny_model_dir, num_samples=12)
    assert Path("inference_outputs/job/shard-0.jsonl").read_bytes().startswith(shard)
    run(tiny_model_dir, num_samples=12, job_sess="at once")
    assert samples() == samples("at once")
    assert len(first) == 5


def test_a_torn_line_and_lost_lines_are_drawn_again(folder, tiny_model_dir):
    run(tiny_model_dir)
    expected = samples()
    shard = Path("inference_outputs/job/shard-0.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:7]) + lines[7][:-9])
    Path("inference_outputs/job/shard-4.jsonl").write_bytes(lines[9])  # of an earlier, wider run
    assert run(tiny_model_dir) == EXIT_OK
    assert samples() == expected


CHANGES = {
    "top_p": 0.9, "top_k": 7, "temperature": 0.5, "seed": 3, "engine": "static",
    "max_seq_len": 25, "max_new_tokens": 5, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tiny_model_dir, tmp_path_factory):
    """A folder with the samples of `flags(tiny_model_dir)`."""
    target = tmp_path_factory.mktemp("drawn")
    run(tiny_model_dir, output_dir=target)
    return target


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_not_mixed(folder, tiny_model_dir, drawn, name):
    before = (drawn / "job" / "shard-0.jsonl").read_bytes()
    with pytest.raises(UsageError, match=rf"holds samples with {name} .* not .*--job_sess"):
        run(tiny_model_dir, output_dir=drawn, num_samples=20, **{name: CHANGES[name]})
    assert (drawn / "job" / "shard-0.jsonl").read_bytes() == before


def test_another_adapter_base_or_instruction_file_is_not_mixed(
    folder, tiny_model_dir, drawn, adapter_dir
):
    with pytest.raises(UsageError, match="adapter_sha256 None, not "):
        run(tiny_model_dir, output_dir=drawn, num_samples=20, adapter_path=adapter_dir)
    save_tiny_model(folder / "other", seed=1)
    with pytest.raises(UsageError, match="model_fingerprint .* not "):
        run(folder / "other", output_dir=drawn, num_samples=20)
    conditional = {"instruction_file": "i.txt", "prompt_style": "vicuna", "num_samples": None,
                   "max_seq_len": 200, "max_new_tokens": 3}  # fmt: skip
    write_instruction_file("i.txt", ["one", "two"])
    run(tiny_model_dir, **conditional)
    with pytest.raises(UsageError, match="prompt_style vicuna, not alpaca"):
        run(tiny_model_dir, **(conditional | {"prompt_style": "alpaca"}))
    write_instruction_file("i.txt", ["one", "three"])
    with pytest.raises(UsageError, match="instruction_file_sha256"):
        run(tiny_model_dir, **conditional)


# ---------------------------------------------------------------------- topics


def by_topics(*counts: float, **changes) -> dict:
    """Flags for topics with so many private rows each, in a file of the working folder."""
    topics = [
        {"topic": 10 + place, "keywords": f"word{place}, other", "count": count}
        for place, count in enumerate(counts)
    ]
    write_json("topics.json", {"topics": topics})
    return {
        "instruction_file": None, "topic_histogram": "topics.json", "num_samples": 13,
        "prompt_style": "topic_generation", "max_seq_len": 60, "max_new_tokens": 5,
    } | changes  # fmt: skip


@pytest.mark.parametrize("engine", ["continuous", "static"])
def test_every_topic_gets_its_share_and_its_keywords_as_prompt(folder, tiny_model_dir, engine):
    assert run(tiny_model_dir, **by_topics(50, 0, 30.4, 19.6), engine=engine) == EXIT_OK
    found = samples()
    assert sorted(found) == list(range(13))
    asked = [(found[number]["topic"], found[number]["prompt"]) for number in range(13)]
    # Shares of 6.5, 0, 3.952 and 2.548: the largest remainders are rounded up.
    of_topic = {10: 6, 12: 4, 13: 3}
    assert asked == [
        (topic, f"word{topic - 10}, other") for topic, many in of_topic.items() for _ in range(many)
    ]
    assert len({record["text"] for record in found.values()}) == 13


def test_a_resumed_sampling_keeps_the_topic_of_every_sample(folder, tiny_model_dir):
    asked = by_topics(5, 2, 3)
    run(tiny_model_dir, **asked)
    expected = samples()
    shard = Path("inference_outputs/job/shard-0.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:4]))
    assert run(tiny_model_dir, **asked) == EXIT_OK
    assert samples() == expected
    shard.write_bytes(b"".join(lines[:4]))
    with pytest.raises(UsageError, match="holds samples with num_samples 13, not 20"):
        run(tiny_model_dir, **asked | {"num_samples": 20})
    with pytest.raises(UsageError, match="holds samples with topic_histogram_sha256 "):
        run(tiny_model_dir, **by_topics(5, 3, 2))
    write_instruction_file("i.txt", ["word0, other"])
    with pytest.raises(UsageError, match="holds samples with instruction_file_sha256 None, not "):
        run(tiny_model_dir, **asked | {"topic_histogram": None, "instruction_file": "i.txt",
                                       "num_samples": None})  # fmt: skip


def test_an_adapter_that_learnt_without_topics_does_not_sample_by_them(
    folder, tiny_model_dir, adapter_dir
):
    with pytest.raises(UsageError, match="trained with uncond_generation; use --prompt_style unc"):
        run(tiny_model_dir, adapter_path=adapter_dir, **by_topics(1))


# ---------------------------------------------------------------------- what it refuses


def test_adapters_that_do_not_fit(folder, tiny_model_dir, adapter_dir):
    with pytest.raises(UsageError, match=r"trained with uncond_generation; use --prompt_style unc"):
        run(tiny_model_dir, adapter_path=adapter_dir, prompt_style="vicuna", num_samples=None)
    with pytest.raises(UsageError, match="no adapter at 'nowhere'"):
        run(tiny_model_dir, adapter_path="nowhere")
    save_tiny_model(folder / "other", seed=1)
    for no_merge in (None, True):
        with pytest.raises(UsageError, match="was trained on 'tiny', which differs from --model"):
            run(folder / "other", adapter_path=adapter_dir, no_merge=no_merge)
    assert not list(folder.glob("inference_outputs/job/shard-*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no instruction"),
        ("### BOI ### 1\nWrite a poem.\n### EOI ###\n", "number of samples, found 'Write a poem.'"),
        ("### BOI ### 1\n0\n### EOI ###\n", "number of samples, found '0'"),
        ("### BOI ### 1\n5\n### EOI ###\n### BOI ### 1\n5\n### EOI ###\n", "its one block"),
    ],
)
def test_instruction_files_that_do_not_fit(folder, tiny_model_dir, text, message):
    Path("i.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        run(tiny_model_dir, instruction_file="i.txt", num_samples=None)


@pytest.mark.parametrize("engine", ["continuous", "static"])
def test_odd_prompts_are_prompts(folder, tiny_model_dir, engine):
    odd = [
        "",
        " ",
        "\x00",
        "</s>",
        "USER: a ASSISTANT: b",
        "\u2028 \N{GRINNING FACE}",
        "{instruction}",
    ]
    write_instruction_file("i.txt", odd)
    run(tiny_model_dir, engine=engine, instruction_file="i.txt", prompt_style="alpaca",
        num_samples=None, max_seq_len=300, max_new_tokens=3)  # fmt: skip
    found = samples()
    assert [found[id]["prompt"] for id in range(len(odd))] == odd
    assert all(1 <= record["num_tokens"] <= 3 for record in found.values())


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ('{"foo": 1}\n', "line 1 is not a sample"),
        ('{"id": "3", "finish_reason": "stop"}\n', "line 1 is not a sample"),
        ("not json\n", "line 1 is not a JSON object"),
        ('{"id": 3, "finish_reason": "stop"}\n' * 2, "line 2: sample 3 comes a second time"),
    ],
)
def test_foreign_lines_in_a_shard(folder, tiny_model_dir, shard, message):
    run(tiny_model_dir, num_samples=1)
    path = Path("inference_outputs/job/shard-5.jsonl")
    path.write_text(shard)
    with pytest.raises(UsageError, match=message):
        run(tiny_model_dir, num_samples=4)
    assert path.read_text() == shard


def test_a_damaged_manifest(folder, tiny_model_dir):
    run(tiny_model_dir, num_samples=1)
    Path("inference_outputs/job/manifest.json").write_text('{"seed": ')
    with pytest.raises(UsageError, match="manifest.json is damaged"):
        run(tiny_model_dir, num_samples=2)


# ---------------------------------------------------------------------- stops and kills


@pytest.fixture(scope="module")
def processes():
    return fork_server()


def run_in_process(argv, log, environment):
    """What `python inference.py` does, saving often, with its stderr in a file."""
    os.environ |= environment
    inference.SAVE_SECONDS = 0.05
    with open(log, "a") as file, contextlib.redirect_stderr(file):
        run_cli(lambda: inference.main(argv))


def start(processes, argv, log="log", **environment):
    process = processes.Process(target=run_in_process, args=(argv, log, environment))
    process.start()
    return process


def start_ranks(processes, argv, size):
    """Start the `size` processes of one run; rank R logs to logR."""
    if size == 1:
        return [start(processes, argv, "log0")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)}  # fmt: skip
    return [
        start(processes, argv, f"log{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **world)
        for rank in range(size)
    ]


def count_lines():
    return sum(p.read_bytes().count(b"\n") for p in Path("inference_outputs").glob("*/shard-*"))


def wait_for_lines(number, process):
    end = time.monotonic() + 60
    while count_lines() < number:
        assert process.is_alive(), "it ended before it could be stopped"
        assert time.monotonic() < end
        time.sleep(0.01)


LONG = {"num_samples": 1500, "max_seq_len": 60, "perdevice_bs": 8}


@pytest.mark.parametrize("engine", ["continuous", "static"])
def test_kills_at_random_moments_lose_and_double_nothing(folder, tiny_model_dir, processes, engine):
    moments = random.Random(0)
    small = LONG | {"num_samples": 250, "engine": engine}
    argv = flags(tiny_model_dir, **small)
    for number in range(4):
        process = start(processes, argv)
        if number % 2:  # the others are killed wherever they are
            wait_for_lines(count_lines() + 1, process)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.join()
    assert 2 <= count_lines() < 250
    process = start(processes, argv)
    process.join(120)
    assert process.exitcode == EXIT_OK, Path("log").read_text()
    assert sorted(samples()) == list(range(250))
    run(tiny_model_dir, **(small | {"job_sess": "at once"}))
    assert samples() == samples("at once")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["continuous", "static"])
def test_many_kills_of_one_or_two_processes(folder, tiny_model_dir, processes, engine):
    moments = random.Random(1)
    many = LONG | {"num_samples": 1500, "engine": engine}
    argv = flags(tiny_model_dir, **many)
    kills = 0
    while len(samples()) < 1400:
        ranks = start_ranks(processes, argv, moments.choice([1, 2]))
        if kills % 3:  # the others are killed wherever they are
            wait_for_lines(count_lines() + 1, ranks[0])
        time.sleep(moments.uniform(0, 1.5))
        moments.shuffle(ranks)
        for rank in ranks:
            rank.kill()
            time.sleep(moments.choice([0, 0.02]))
        for rank in ranks:
            rank.join()
        kills += 1
    assert kills >= 5
    ranks = start_ranks(processes, argv, 2)
    for rank in ranks:
        rank.join(300)
        assert rank.exitcode == EXIT_OK, Path("log0").read_text()
    assert sorted(samples()) == list(range(1500))
    run(tiny_model_dir, **(many | {"job_sess": "at once"}))
    assert samples() == samples("at once")


@pytest.mark.parametrize("engine", ["continuous", "static"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_soon_and_says_how_to_go_on(
    folder, tiny_model_dir, processes, number, engine
):
    process = start(processes, flags(tiny_model_dir, engine=engine, **LONG))
    wait_for_lines(1, process)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == EXIT_INTERRUPTED, Path("log").read_text()
    assert "the same command again goes on" in Path("log").read_text()
    assert "Traceback" not in Path("log").read_text()
    assert 0 < len(samples()) < 1500


def test_two_runs_at_once_do_not_share_a_folder(folder, tiny_model_dir, processes):
    process = start(processes, flags(tiny_model_dir, **LONG))
    wait_for_lines(1, process)
    with pytest.raises(
        UsageError, match="inference_outputs/job is in use by another .*another --job_sess"
    ):
        run(tiny_model_dir, **LONG)
    process.kill()
    process.join()
    small = LONG | {"num_samples": max(samples()) + 5}
    assert run(tiny_model_dir, **small) == EXIT_OK
    assert sorted(samples()) == list(range(small["num_samples"]))


def test_two_processes_share_the_work_and_one_finishes_it(folder, tiny_model_dir, processes):
    ranks = start_ranks(processes, flags(tiny_model_dir, num_samples=40), 2)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [EXIT_OK, EXIT_OK], Path("log1").read_text()
    shards = [Path(f"inference_outputs/job/shard-{rank}.jsonl").read_text() for rank in (0, 1)]
    ids = [[json.loads(line)["id"] for line in shard.splitlines()] for shard in shards]
    assert sorted(ids[0]) == list(range(0, 40, 2))
    assert sorted(ids[1]) == list(range(1, 40, 2))
    assert "all 40 samples" in Path("log0").read_text()
    assert "all 40 samples" not in Path("log1").read_text()
    run(tiny_model_dir, num_samples=40, job_sess="alone")
    assert samples() == samples("alone")


# ---------------------------------------------------------------------- vLLM, in its environment


def test_without_vllm_the_error_says_how_to_install_it(folder, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install -r benchmarks/requirements-vllm.txt"):
        run(tiny_model_dir, engine="vllm")
    assert not any(folder.iterdir())


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_vllm_draws_and_goes_on_like_the_others(folder, tmp_path):
    python = vllm_python()
    # Its attention on a CPU knows no heads as narrow as the tiny model's.
    wide = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    save_tiny_model(tmp_path / "wide", **wide)
    model = str(tmp_path / "wide")
    adapter_dir = save_adapter(tmp_path / "adapter", model)

    def run(job, **changes):
        argv = flags(model, engine="vllm", job_sess=job, perdevice_bs=4, **changes)
        done = subprocess.run(
            [python, ROOT / "inference.py", *argv], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return samples(job)

    base = run("base")
    merged = run("merged", adapter_path=adapter_dir)
    assert sorted(merged) == list(range(12))
    assert len({record["text"] for record in merged.values()}) == 12
    assert merged != base, "the adapter changed nothing"
    for record in merged.values():
        assert record["num_tokens"] == 23 or record["finish_reason"] == "stop"
    assert not Path("inference_outputs/merged/.merged_model").exists()
    first = run("grown", adapter_path=adapter_dir, num_samples=5)
    assert first.items() <= run("grown", adapter_path=adapter_dir).items()
    assert sorted(run("apart", adapter_path=adapter_dir, no_merge=True)) == list(range(12))
    assert run("greedy", no_sample=True, num_samples=1) == run_greedy(model)
    manifest = json.loads(Path("inference_outputs/apart/manifest.json").read_text())
    assert manifest["versions"]["vllm"]


def run_greedy(model):
    """What the default engine takes as the likeliest text."""
    run(model, no_sample=True, num_samples=1, job_sess="greedy_here")
    return samples("greedy_here")
