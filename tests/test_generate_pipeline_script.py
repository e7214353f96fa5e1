"""The script of the whole pipeline: what it says, that it runs, and that it goes on after a kill.

A script is run by bash. Its Python is a client that has this process run the commands, one after
the other, so that libraries are loaded once; tests that are marked slow run it as it is.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pyarrow.parquet
import pytest

import generate_pipeline_script
from data.prepare_instructions import SPLIT_SHARES
from privacy_checks.composition import composed_report
from privacy_checks.tiny_model import byte_tokenizer, tiny_llama
from tests.annotation_server import KEY, Reply, Request, Server, answer
from tests.json_lines import jsonl
from tests.paths import ROOT
from tests.resampling import save_tiny_encoder
from tests.test_readme import GENERATORS, run_script
from utils.cli import EXIT_FAILED, EXIT_USAGE, UsageError
from utils.files import read_jsonl, write_json
from utils.privacy.accounting import ADD_REMOVE

CLIENT = """#!/usr/bin/env bash
case "$2" in *flock*) exec {python} "$@" ;; esac  # a lock is the shell's
printf '%s\\0' "$@" > "{folder}/asked"
read -r code < "{folder}/code"
cat "{folder}/out"
exit "$code"
"""
KILLED = -signal.SIGKILL


def printed(capsys, *flags: str) -> str:
    assert generate_pipeline_script.main(list(flags)) == 0
    return capsys.readouterr().out


def flags_of(folder: Path, model: str, data: str, *more: str) -> list[str]:
    """Flags of a pipeline of a few seconds."""
    return [
        "--data", data, "--model_name", model, "--projects_dir", str(folder / "projects"),
        "--project", "mine", "--eps", "8", "--delta", "1e-3", "--total_bs", "8",
        "--lr", "1e-3", "--num_epochs", "0.5", "--max_seq_len", "320", "--num_samples", "32",
        "--embedding_model", str(folder / "encoder" / "model"),
        "--split", "train=0.6,val=0.1,test=0.3", *more,
    ]  # fmt: skip


def save_terse_model(folder: Path) -> str:
    """The tiny model, but with texts that end after some twenty tokens."""
    model = tiny_llama()
    model.lm_head.weight.data[model.config.eos_token_id] *= 40
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(file: Path, rows: int = 80, owners: int = 40) -> None:
    with open(file, "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["user_id", "text"])
        writer.writerows([f"user {n % owners}", f"say hello to {n}, please"] for n in range(rows))


class Shell:
    """Runs scripts whose Python is the client, and their commands in this process.

    Attributes:
        commands: all that were asked for, as words.
        dies: whether a script is killed with a command, before that does anything.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.commands: list[list[str]] = []
        self.dies: Callable[[list[str]], bool] = lambda words: False
        for name in ("asked", "code"):
            os.mkfifo(folder / name)
        self.python = folder / "python"
        self.python.write_text(CLIENT.format(folder=folder, python=sys.executable))
        self.python.chmod(0o700)

    def run(self, script: str, **options) -> tuple[int, str]:
        """Exit code and stdout of a script."""
        process = subprocess.Popen(
            ["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True,
            **options,
        )  # fmt: skip
        threading.Thread(target=self._end, args=(process,), daemon=True).start()
        while asked := (self.folder / "asked").read_text():
            words = asked.split("\0")[:-1]
            self.commands.append(words)
            if self.dies(words):
                os.killpg(process.pid, signal.SIGKILL)
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                code = run_command(words)
            (self.folder / "out").write_text(out.getvalue())
            (self.folder / "code").write_text(f"{code}\n")
        return process.wait(), process.stdout.read()

    def _end(self, process: subprocess.Popen) -> None:
        process.wait()
        (self.folder / "asked").write_text("")


def run_command(words: list[str]) -> int:
    """What `python WORDS` does, in this process; returns its exit code."""
    if words[0] == "-c":
        with mock.patch.object(sys, "argv", ["-c", *words[2:]]):
            exec(words[1], {})
        return 0
    try:
        if words[0] not in GENERATORS:
            return run_script(["python", *words])
        # The line that --run would start, through a launcher that takes seconds.
        line = io.StringIO()
        with contextlib.redirect_stdout(line):
            code = run_script(["python", *(word for word in words if word != "--run")])
        return code or run_script(shlex.split(line.getvalue()))
    except UsageError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell, and the toolkit's folder as the current one."""
    monkeypatch.chdir(ROOT)
    made = Shell(tmp_path)
    monkeypatch.setattr(generate_pipeline_script.sys, "executable", str(made.python))
    return made


def test_the_script_leads_from_a_file_to_a_page(shell, tmp_path, capsys, key):
    """It is killed in the middle; another one, with an annotator, goes on from there."""
    save_tiny_encoder(tmp_path / "encoder")
    model = save_terse_model(tmp_path / "a model")
    data = tmp_path / 'it\'s $HOME, "chats" – ü.csv'
    write_rows(data)
    flags = flags_of(tmp_path, model, str(data), "--unit_column", "user_id")
    project = tmp_path / "projects" / "mine"
    script = printed(capsys, *flags)
    assert "there is no annotator" in script
    shell.dies = lambda words: "resample_with_dp_histogram.resample" in words
    assert shell.run(script)[0] == KILLED
    assert [words[-1] for words in shell.commands if words[0] in GENERATORS] == ["0.001", "32"]
    assert not (project / "report").exists()

    shell.dies = lambda words: False
    shell.commands.clear()
    with Server() as server:
        script = printed(capsys, *flags, "--annotator", server.url, "fake")
        code, out = shell.run(script)
    assert code == 0
    # What was done is not done again.
    assert "data.prepare_instructions" not in str(shell.commands)
    assert "resample_with_dp_histogram.extract" not in str(shell.commands)
    assert [words[-1] for words in shell.commands if words[0] in GENERATORS] == ["0.001", "1"]
    page = (project / "report" / "report.html").read_text()
    assert "-differentially private" in page
    assert "ABOVE TARGET" not in page
    assert str(project / "report" / "report.html") in out
    answered = read_jsonl(project / "annotations" / "answers.jsonl")
    selected = read_jsonl(project / "resampling" / "selected" / "selected.jsonl")
    asked = {row["instruction"] for row in selected}
    assert {record["instruction"] for record in answered if record["status"] == "ok"} == asked
    assert len(asked) > 4
    assert (project / "outputs" / "answers" / "adapter").is_dir()
    assert "answers" in (project / "report" / "report.md").read_text()

    # What every stage protects is the person, and all of them together keep to the budget.
    run, ledger = project / "outputs/instructions", "resampling/private_data/histogram_ledger.jsonl"
    composed = composed_report([run], [project / ledger])
    assert 6 < composed["epsilon"][ADD_REMOVE]["upper"] <= 8
    for name in ("outputs/instructions/privacy_report", "resampling/selected/resampling_report"):
        assert json.loads((project / f"{name}.json").read_text())["unit_column"] == "user_id"
    assert KEY not in script
    assert set(project.iterdir()) == {
        project / name for name in ("annotations", "data", "evaluation_outputs", "stages", "report",
                                    "inference_outputs", "outputs", "resampling")
    }  # fmt: skip

    shell.commands.clear()
    other = printed(capsys, *flags, "--eps", "2")
    assert shell.run(other)[0] == 2
    assert shell.commands == []


STAGES = [
    "prepare", "type_a", "type_b", "resample", "budget", "annotate", "type_c", "type_d",
    "evaluate", "evaluate_answers",
]  # fmt: skip


def leave_traces(words: list[str]) -> int:
    """What the script looks at of what a command leaves, and nothing else."""
    values = dict(zip(words, words[1:]))
    if "--output_dir" in values:
        Path(values["--output_dir"], values["--job_sess"]).mkdir(parents=True)
    elif "--output" in values:
        Path(values["--output"]).mkdir(parents=True, exist_ok=True)
        for name in ("instructions.jsonl", "selected.jsonl"):
            Path(values["--output"], name).write_text("{}\n" * 9)
    elif "num_examples" in words[1]:
        print(60)
    return 0


def test_a_kill_at_any_command_costs_no_stage_that_is_done(shell, tmp_path, capsys):
    annotator = ["--annotator", "http://localhost:1/v1", "M"]
    script = printed(capsys, *flags_of(tmp_path, "M", "d.csv", *annotator))
    records, stderr = tmp_path / "projects" / "mine" / "stages", tmp_path / "stderr"
    killed: list[list[str]] = []

    def dies_once(words: list[str]) -> bool:
        is_new = words not in killed
        killed.extend([words] * is_new)
        return is_new

    shell.dies = dies_once
    code, began = KILLED, []
    with mock.patch(f"{__name__}.run_command", leave_traces):
        while code == KILLED:
            done = [stage for stage in STAGES if (records / stage).exists()]
            assert STAGES[: len(done)] == done
            with stderr.open("w") as stream:
                code, _ = shell.run(script, stderr=stream)
            now = re.findall("^== (.+)$", stderr.read_text(), re.MULTILINE)
            assert now == STAGES[len(done) :][: len(now)]
            began += now
    assert code == 0
    assert list(dict.fromkeys(began)) == STAGES
    assert len(killed) > 15


def test_figures_that_a_kill_left_half_are_made_again_and_whole_ones_are_not(
    shell, tmp_path, capsys
):
    script = printed(capsys, *flags_of(tmp_path, "M", "d.csv"))
    results, asked = tmp_path / "projects/mine/evaluation_outputs/instructions", []

    def leave_half(words: list[str]) -> int:
        if not words[1].startswith("evaluation.") or words[1] == "evaluation.report":
            return leave_traces(words)
        tool = words[1].removeprefix("evaluation.")
        asked.append((tool, (results / "private" / f"{tool}.json").exists()))
        write_json(results / "private" / f"{tool}.json", {})
        if tool == "distribution":
            return EXIT_USAGE  # too few texts
        is_stopped = tool == "memorisation" and asked.count((tool, False)) == 1
        return EXIT_FAILED if is_stopped else 0  # before its released file

    with mock.patch(f"{__name__}.run_command", leave_half):
        assert shell.run(script)[0] == EXIT_FAILED
        assert shell.run(script)[0] == 0
    tools = ["perplexity", "distribution", "memorisation", "distribution", "memorisation"]
    assert asked == [(tool, False) for tool in tools]


def test_two_of_a_script_do_not_work_at_once(shell, tmp_path, capsys):
    script, others = printed(capsys, *flags_of(tmp_path, "M", "d.csv")), []
    impatient = script.replace("time.sleep(0.25)", "time.sleep(0)")

    def start_another(_: list[str]) -> int:
        if not others:
            words = ["bash", "-c", impatient]
            others.append(subprocess.run(words, capture_output=True, text=True, timeout=60))
        return EXIT_FAILED

    with mock.patch(f"{__name__}.run_command", start_another):
        assert shell.run(script)[0] == EXIT_FAILED
        assert shell.run(script)[0] == EXIT_FAILED  # the lock went with the first one
    assert others[0].returncode == EXIT_USAGE
    (line,) = others[0].stderr.splitlines()
    assert "projects/mine; wait for its end, or stop it" in line
    assert len(shell.commands) == 2


def first_commands(shell: Shell, script: str) -> list[list[str]]:
    """The commands of a script as bash gives them, none of which does anything."""
    shell.dies = lambda words: False
    with mock.patch(f"{__name__}.run_command", return_value=0):
        assert shell.run(script)[0] != 0  # it counts texts that nobody made
    return shell.commands


@pytest.mark.parametrize(
    "name", ["a b", "it's", '"', "$HOME", "`id`", "ü é", "-x", "--run", "a\nexit 1", "*", "\\", "#"]
)
def test_names_arrive_as_they_are(shell, tmp_path, capsys, name):
    flags = flags_of(tmp_path, name, name, f"--text_column={name}", f"--unit_column={name}")
    flags = [word for word in flags if word not in ("--data", "--model_name", name)]
    flags += [f"--data={name}", f"--model_name={name}"]
    is_folder_name = not set("\n\\") & set(name)
    if is_folder_name:
        flags += [f"--project={name}"]
    prepare, train, sample, extract, *embed = first_commands(shell, printed(capsys, *flags))
    given = "./" * name.startswith("-") + name

    def values(words: list[str], flag: str) -> list[str]:
        joined = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
        return joined or [words[words.index(flag) + 1]]

    assert values(prepare, "--input") == values(train, "--model_name") == [given]
    assert values(sample, "--model_name") == [given]
    assert values(prepare, "--text_column") == [name]
    columns = [values(words, "--unit_column") for words in (prepare, train, embed[1])]
    assert columns == [[name]] * 3
    project = tmp_path / "projects" / (name if is_folder_name else "mine")
    assert values(prepare, "--output") == [str(project / "data" / "instructions")]
    assert values(extract, "--output") == [str(project / "resampling" / "synthetic")]


def test_training_leaves_room_for_the_histogram_that_is_drawn(shell, tmp_path, capsys):
    script = printed(capsys, *flags_of(tmp_path, "M", "d.csv", "--histogram_sigma", "7.5"))
    train = first_commands(shell, script)[1]
    assert train[train.index("--reserve_histogram_sigma") + 1] == "7.5"
    assert "--histogram_sigma 7.5 \\\n" in script
    assert train[train.index("--save_steps") + 1] == "1"
    assert "--unit_column" not in script


def test_a_recipe_is_advised_unless_it_is_given(shell, tmp_path, capsys):
    flags = flags_of(tmp_path, "M", "d.csv")
    given = first_commands(shell, printed(capsys, *flags))[1]
    assert [word for word in ("--total_bs", "--clip", "--lr") if word not in given] == []
    assert "--advised" not in given
    assert given[given.index("--clip") + 1] == "0.5"
    shell.commands.clear()
    script = printed(capsys, *without(flags, "--total_bs", "--lr"), "--project", "other")
    advised = first_commands(shell, script)[1]
    assert [word for word in ("--total_bs", "--clip", "--lr") if word in advised] == []
    assert "--advised" in advised
    assert advised[advised.index("--num_epochs") + 1] == "0.5"


def test_who_of_several_owners_counts_is_said_wherever_their_rows_are_read(shell, tmp_path, capsys):
    flags = flags_of(tmp_path, "M", "d.jsonl", "--unit_column", "who", "--owner", "first")
    script = printed(capsys, *flags, "--max_rows_per_unit", "2")
    prepare, train, *_ = first_commands(shell, script)
    assert all(words[words.index("--owner") + 1] == "first" for words in (prepare, train))
    # In the record of its command, too, and where rows are embedded.
    assert script.count("--unit_column who --owner first") == 4


def without(flags: list[str], *names: str) -> list[str]:
    """Flags but for some that have one value each."""
    places = {place for name in names for place in (flags.index(name), flags.index(name) + 1)}
    return [word for place, word in enumerate(flags) if place not in places]


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["--lr"], [], "--total_bs and --lr go together"),
        (["--total_bs"], [], "--total_bs and --lr go together"),
        (["--total_bs", "--lr"], ["--clip", "0.5"], "--clip 0.5 needs --total_bs and --lr"),
        (["--total_bs", "--lr"], ["--clip", "1"], "--clip 1 needs --total_bs and --lr"),
    ],
)
def test_half_a_recipe_is_refused(tmp_path, names, more, message):
    with pytest.raises(UsageError, match=message):
        generate_pipeline_script.main(without(flags_of(tmp_path, "M", "d.csv", *more), *names))


def test_rows_are_the_unit_where_no_column_is_one(shell, tmp_path, capsys):
    script = printed(capsys, *flags_of(tmp_path, "M", "d.csv", "--unit_column", "none"))
    prepare, *others = first_commands(shell, script)
    assert prepare[prepare.index("--unit_column") + 1] == "none"
    assert not [words for words in others if "--unit_column" in words]


def test_a_column_of_owners_that_is_not_named_is_warned_of(tmp_path, capsys):
    write_rows(tmp_path / "d.csv", rows=2)
    flags = flags_of(tmp_path, "M", str(tmp_path / "d.csv"))
    warned = []
    for more in ([], ["--unit_column", "user_id"], ["--unit_column", "none"]):
        assert generate_pipeline_script.main([*flags, *more]) == 0
        warned.append("warning: 'user_id' seems to say whose a row is" in capsys.readouterr().err)
    assert warned == [True, False, False]


def test_a_file_that_cannot_be_read_gives_no_script(tmp_path, capsys):
    (tmp_path / "d.csv").touch()
    with pytest.raises(UsageError, match="no first line with the names of the columns"):
        generate_pipeline_script.main(flags_of(tmp_path, "M", str(tmp_path / "d.csv")))
    assert capsys.readouterr().out == ""


def test_from_another_folder_what_is_there_gets_its_whole_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").write_text("text\n")
    flags = flags_of(tmp_path, "org/model", "d.csv", "--projects_dir", "p")
    script = printed(capsys, *flags)
    assert f"--input {tmp_path}/d.csv" in script
    assert f"project={tmp_path}/p/mine\n" in script
    assert "--model_name org/model " in script
    assert f"\ncd {ROOT}\n" in script


def test_a_file_of_flags_gives_the_same_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "flags.yaml"
    file.write_text(
        "data: [a.csv, b.csv]\nmodel_name: M\neps: 6\nproject: mine\n"
        f"projects_dir: {tmp_path}\nannotator: [http://localhost:1/v1, N]\n"
    )
    flags = ["--data", "a.csv", "b.csv", "--model_name", "M", "--eps", "6", "--project", "mine"]
    flags += ["--projects_dir", str(tmp_path), "--annotator", "http://localhost:1/v1", "N"]
    script = printed(capsys, *flags)
    assert printed(capsys, "--config", str(file)) == script
    assert printed(capsys, "--config", str(tmp_path / "mine" / "pipeline.yaml")) == script


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--annotator", "http://me:secret@host/v1", "M"], "a key belongs into OPENAI_API_KEY"),
        (["--annotator", "http://host/v1?key=secret", "M"], "a key belongs into OPENAI_API_KEY"),
        (["--annotator", "M", "http://host/v1"], "the address of a server comes first"),
        (["--delta", "0.5"], "--delta 0.5: must be between 1e-12 and 0.01"),
        (["--delta", "small"], "--delta small: must be between .*, and below 1/N; or auto"),
        (["--max_seq_len", "1"], "--max_seq_len 1 leaves no token to learn from"),
        (["--max_cost", "5"], "--max_cost 5 needs --annotator"),
        (["--turn", "all"], "whose they are with --unit_column, conversation where no column"),
    ],
)
def test_what_no_script_can_mean_is_refused(tmp_path, more, message):
    with pytest.raises(UsageError, match=message) as raised:
        generate_pipeline_script.main(flags_of(tmp_path, "M", "d.csv", *more))
    assert "secret" not in str(raised.value)


def test_conversations_may_be_what_is_protected(shell, tmp_path, capsys):
    data = tmp_path / "chats.jsonl"
    said = [conversation(n, "role", "content", "user", "assistant") for n in range(9)]
    data.write_text(jsonl({"messages": turns * 2} for turns in said))
    flags = flags_of(tmp_path, "M", str(data), "--turn", "all", "--unit_column", "conversation")
    prepare, train, *_ = first_commands(shell, printed(capsys, *flags, "--split", "train=1"))
    assert run_command(prepare) == 0
    found = read_jsonl(tmp_path / "projects" / "mine" / "data" / "instructions" / "train.jsonl")
    assert [*Counter(row["conversation"] for row in found).values()] == [2] * 9
    assert train[train.index("--unit_column") + 1] == "conversation"


# ------------------------------------------------------------------ as it is, at full size

ROWS, OWNERS = 30_000, 311
FULL_SIZE_SECONDS = 1800


def conversation(n: int, role: str, content: str, user: str, assistant: str) -> list[dict]:
    return [
        {role: user, content: f"say hello to {n}, please"},
        {role: assistant, content: "hello"},
    ]


def write_csv(folder: Path) -> Path:
    write_rows(folder / "rows.csv", ROWS, OWNERS)
    return folder / "rows.csv"


def write_messages(folder: Path) -> Path:
    lines = (
        {"user_id": n % OWNERS, "messages": conversation(n, "role", "content", "user", "assistant")}
        for n in range(ROWS)
    )
    (folder / "chats.jsonl").write_text(jsonl(lines))
    return folder / "chats.jsonl"


def write_share_gpt(folder: Path) -> Path:
    chats = [
        {"user_id": f"u{n % OWNERS}",
         "conversations": conversation(n, "from", "value", "human", "gpt")}
        for n in range(ROWS)
    ]  # fmt: skip
    (folder / "chats.json").write_text(json.dumps(chats))
    return folder / "chats.json"


def write_parquet(folder: Path) -> Path:
    numbers = range(ROWS)
    table = pyarrow.table({
        "id": list(numbers), "user_id": [n % OWNERS for n in numbers],
        "text": [f"say hello to {n}, please" for n in numbers], "ts": [1e9 + n for n in numbers],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def write_texts(folder: Path) -> Path:
    texts = folder / "texts"
    texts.mkdir()
    for n in range(ROWS):
        (texts / f"{n}.txt").write_text(f"say hello to {n}, please")
    return texts


def full_size(folder: Path, data: Path, *more: str) -> list[str]:
    save_tiny_encoder(folder / "encoder")
    size = ["--num_samples", "100", "--num_epochs", "0.2", "--split", SPLIT_SHARES]
    return flags_of(folder, save_terse_model(folder / "model"), str(data), *size, *more)


def require_pages(project: Path, least_units: int) -> None:
    """The pages of a script that ran to its end, and the report of its training."""
    page = (project / "report" / "report.md").read_text()
    assert "-differentially private" in page
    assert "ABOVE TARGET" not in page
    assert "MAUVE" in (project / "report/private/report-internal.md").read_text()
    report = json.loads((project / "outputs/instructions/privacy_report.json").read_text())
    assert report["num_examples"] > least_units
    assert report["steps_lost"] == 0


@pytest.mark.slow
@pytest.mark.timeout(FULL_SIZE_SECONDS)
@pytest.mark.parametrize(
    ("write", "more", "least_units"),
    [
        (write_messages, ["--unit_column", "user_id"], 280),
        (write_share_gpt, ["--unit_column", "user_id"], 280),
        (write_parquet, ["--text_column", "text", "--unit_column", "user_id"], 280),
        # Rows are the units here.
        (write_texts, ["--total_bs", "128", "--delta", "1e-6", "--num_epochs", "0.02"], 28_000),
    ],
)
def test_every_form_of_rows_leads_to_a_page(shell, tmp_path, capsys, key, write, more, least_units):
    with Server(most_seconds=FULL_SIZE_SECONDS) as server:
        flags = full_size(tmp_path, write(tmp_path), *more, "--annotator", server.url, "fake")
        assert shell.run(printed(capsys, *flags))[0] == 0
    require_pages(tmp_path / "projects" / "mine", least_units)


def slow_answer(request: Request) -> Reply:
    return replace(answer(request), wait=0.5)


@pytest.mark.slow
@pytest.mark.timeout(FULL_SIZE_SECONDS)
def test_a_csv_leads_to_a_page_through_kills_in_every_stage(tmp_path, capsys, key):
    """Its commands are processes, and a kill takes all of them at once."""
    write_rows(tmp_path / "rows.csv", ROWS, OWNERS)
    script, project = tmp_path / "mine.sh", tmp_path / "projects" / "mine"
    # What a stage leaves in its middle.
    begun = [
        "data/.instructions.partial/train.jsonl",
        "outputs/instructions/checkpoints/step-000002",
        "inference_outputs/instructions/shard-0.jsonl",
        "resampling/synthetic_embeddings",
        "annotations/answers.jsonl",
    ]
    with Server(slow_answer, most_seconds=FULL_SIZE_SECONDS) as server:
        named = ["--text_column", "text", "--unit_column", "user_id"]
        flags = full_size(
            tmp_path, tmp_path / "rows.csv", *named, "--annotator", server.url, "fake"
        )
        script.write_text(printed(capsys, *flags))
        for stage, file in zip(("prepare", "type_a", "type_b", "resample", "annotate"), begun):
            process = bash(script)
            while not ((project / file).is_dir() or has_bytes(project / file)):
                assert process.poll() is None
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == KILLED
            assert not (project / "stages" / stage).exists()
        assert not (project / "report").exists()
        assert bash(script).wait() == 0
    require_pages(project, 280)
    asked = Counter(request.instruction for request in server.requests)
    assert max(asked.values()) <= 2  # what was in flight at the kill, and nothing else


def has_bytes(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def bash(script: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", str(script)], env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
