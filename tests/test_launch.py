"""Launch lines: through a real shell unharmed, and run with their exit code and Ctrl-C."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.paths import ROOT
from utils.cli import UsageError
from utils.command_line.launch import launch_command, print_or_run
from utils.runs.stopping import launched_by_accelerate

HARD_VALUES = [
    "plain",
    "two words",
    "  spaces around  ",
    "",
    "it's",
    'say "hi"',
    "$HOME and $(echo no) and `echo no`",
    "line\nbreak\n",
    "tab\there",
    "back\\slash\\",
    "* ? [a] {b,c} ~ # ! & | ; < > ( )",
    "größer 漢字",
    "-1",
    "--flag=value",
]


def write_program(path, text):
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(text))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def through_bash(line, tmp_path):
    """The arguments that a program named `accelerate` gets when bash runs `line`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    write_program(programs / "accelerate", "import json, sys; print(json.dumps(sys.argv[1:]))")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    finished = subprocess.run(
        ["bash", "-c", line],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(finished.stdout)


def test_every_value_survives_the_printed_line_and_a_real_shell(tmp_path, capfd):
    command = launch_command("train.py", HARD_VALUES, gpus=1)
    assert print_or_run(command, run=False) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert through_bash(printed.out, tmp_path) == command[1:]
    assert command[-len(HARD_VALUES) :] == HARD_VALUES


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("machine", [(), (1, 0, None, 31000), (3, 2, "10.0.0.7"), (2, 0, "::1", 7)])
def test_accelerate_itself_reads_the_line_as_meant(gpus, machine):
    command = launch_command("train.py", ["--eps", "8"], gpus, *machine)
    assert command[:2] == ["accelerate", "launch"]
    read = launch_command_parser().parse_args(command[2:])
    machines, rank, address, port = (*machine, *(1, 0, None, None)[len(machine) :])
    processes = gpus * machines
    assert (read.num_processes, read.multi_gpu) == (processes, processes > 1)
    assert (read.num_machines, read.mixed_precision, read.dynamo_backend) == (machines, "no", "no")
    if machines > 1:
        assert (read.machine_rank, read.main_process_ip) == (rank, address)
        assert read.main_process_port == (port or 29500)
    elif processes > 1:
        assert read.main_process_port == (port or 0)
    assert Path(read.training_script).name == "train.py"
    assert read.training_script_args == ["--eps", "8"]


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ((2,), "--num_machines 2 needs --main_process_ip"),
        (
            (2, 2, "10.0.0.7"),
            "--machine_rank 2: ranks run from 0 to --num_machines - 1, which is 1",
        ),
        ((1, 1), "--machine_rank 1"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(machine, message):
    with pytest.raises(UsageError, match=message):
        launch_command("train.py", [], 8, *machine)


@pytest.mark.parametrize(
    ("name", "machine"),
    [("multi_gpu", ()), ("fsdp", ()), ("multi_node", (2, 0, "10.0.0.1"))],
)
def test_the_configuration_files_say_what_the_lines_say(name, machine):
    command = launch_command("train.py", [], 8, *machine)
    line = launch_command_parser().parse_args(command[2:])
    file = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert file.distributed_type == "MULTI_GPU"
    for setting in ("num_processes", "num_machines", "main_process_ip", "main_process_port"):
        assert getattr(file, setting) == getattr(line, setting), setting
    assert file.machine_rank == 0
    assert file.mixed_precision == line.mixed_precision


def test_the_script_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "train.py" in launch_command("train.py", [], 1)
    monkeypatch.chdir(tmp_path)
    assert str(ROOT / "train.py") in launch_command("train.py", [], 1)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_run_passes_the_exit_code_on(tmp_path, monkeypatch, capfd, code):
    launcher = write_program(tmp_path / "python", f"import sys; sys.exit({code})")
    monkeypatch.setattr(sys, "executable", str(launcher))
    assert print_or_run(launch_command("train.py", ["a b"], 1), run=True) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("+ accelerate launch ")
    assert err.endswith("train.py 'a b'\n")


def test_run_reports_a_death_by_signal_as_the_shell_does(tmp_path, monkeypatch):
    launcher = write_program(tmp_path / "python", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(sys, "executable", str(launcher))
    assert print_or_run(launch_command("train.py", [], 1), run=True) == 128 + signal.SIGKILL


def test_run_gives_the_arguments_to_accelerate_of_this_interpreter(tmp_path, monkeypatch):
    got = tmp_path / "got"
    text = f"import json, sys; json.dump(sys.argv[1:], open({str(got)!r}, 'w'))"
    monkeypatch.setattr(sys, "executable", str(write_program(tmp_path / "python", text)))
    command = launch_command("train.py", HARD_VALUES, 1)
    print_or_run(command, run=True)
    expected = ["-m", "accelerate.commands.accelerate_cli", *command[1:]]
    assert json.loads(got.read_text()) == expected


def test_ctrl_c_lets_the_script_save_its_work_and_ends_with_130(tmp_path):
    saved = tmp_path / "saved"
    script = write_program(
        tmp_path / "script",
        f"""
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(1)
            open({str(saved)!r}, "w").close()
        """,
    )
    # The launcher waits for its script and, like accelerate's, does not handle the signal.
    launcher = write_program(
        tmp_path / "python", f"import subprocess; subprocess.run([{str(script)!r}])"
    )
    main = (
        "import sys\n"
        "from utils.cli import run_cli\n"
        "from utils.command_line.launch import launch_command, print_or_run\n"
        f"sys.executable = {str(launcher)!r}\n"
        "run_cli(lambda: print_or_run(launch_command('train.py', [], 1), run=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", main],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert process.wait(timeout=30) == 130
    assert saved.exists()  # it ended after its script did
    assert "Traceback" not in process.communicate()[1]


@pytest.mark.parametrize("code", [0, 2, 130])
def test_a_real_launch_runs_the_script_and_passes_its_exit_code_on(tmp_path, capfd, code):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.cli import run_cli\n"
        "from utils.runs.stopping import launched_by_accelerate\n"
        "print(launched_by_accelerate(), sys.argv[1:])\n"
        f"run_cli(lambda: {code})\n"
    )
    assert print_or_run(launch_command(str(script), ["two words", "$HOME"], 1), run=True) == code
    out, err = capfd.readouterr()
    assert out == "True ['two words', '$HOME']\n"
    assert "Traceback" not in err


def test_this_process_was_not_launched_by_accelerate(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert not launched_by_accelerate()


FORWARDING = """
import sys
from utils.cli import run_cli
from utils.command_line.launch import launch_command, print_or_run
sys.executable = {launcher!r}
run_cli(lambda: print_or_run(launch_command('train.py', [], 1), run=True))
"""
# Deaf for its first second, as a script is that has yet to begin.
SLOW_SCRIPT = """
    import pathlib, sys, time
    sys.path.insert(0, {root!r})
    print("ready", flush=True)
    time.sleep(1)
    from utils.cli import run_cli
    from utils.runs.stopping import StopRequest
    def main():
        stop = StopRequest()
        deadline = time.monotonic() + {seconds}
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        name = stop.signal_name
        time.sleep(1.2)  # it is asked again meanwhile
        pathlib.Path({saved!r}).write_text(name)
        return 130 if name else 0
    run_cli(main)
"""


@pytest.mark.parametrize(
    ("number", "seconds", "code"),
    [
        (signal.SIGTERM, 60, 130),
        pytest.param(signal.SIGINT, 60, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 60, 130, marks=pytest.mark.slow),
        # One that has done its work all the same was not interrupted.
        (signal.SIGTERM, 0, 0),
    ],
)  # fmt: skip
def test_a_signal_to_the_generator_alone_reaches_the_script_and_is_waited_for(
    tmp_path, number, seconds, code
):
    saved = tmp_path / "saved"
    text = SLOW_SCRIPT.format(root=str(ROOT), saved=str(saved), seconds=seconds)
    script = write_program(tmp_path / "script", text)
    # As accelerate's does.
    launcher = write_program(
        tmp_path / "python",
        f"import subprocess, sys; sys.exit(bool(subprocess.run([{str(script)!r}]).returncode))",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", FORWARDING.format(launcher=str(launcher))],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert saved.read_text() == ("SIGTERM" if seconds else "")
    assert "Traceback" not in process.communicate()[1]
