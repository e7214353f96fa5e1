"""What studies share: commands that are run once, whatever stops the study."""

import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.studies import read_generators, run_once, side_by_side
from tests.paths import ROOT
from utils.cli import UsageError

# Makes a folder, which it refuses to find.
MAKE = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); print('made')"


def test_a_command_that_has_ended_is_passed_over(tmp_path):
    output = tmp_path / "made"
    for _ in range(2):
        run_once(tmp_path, "make it", "-c", MAKE, str(output), makes=[output])
        assert (tmp_path / "logs" / "make-it.log").read_text() == "made\n"
        (output / "kept").touch()


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_a_stop_has_left_is_made_anew(tmp_path, is_folder):
    output = tmp_path / "made"
    output.mkdir() if is_folder else output.touch()
    (output / "half").touch() if is_folder else None
    with pytest.raises(UsageError, match=r"make failed: FileExistsError.*in .*logs/make.log"):
        run_once(tmp_path, "make", "-c", MAKE, str(output))
    run_once(tmp_path, "make", "-c", MAKE, str(output), makes=[output])
    assert list(output.iterdir()) == []
    assert (tmp_path / "logs" / "make.log").read_text() == "made\n"


def test_a_command_that_outlives_its_study_is_waited_for(tmp_path, capsys):
    output = tmp_path / "made"
    begun = f"open({str(tmp_path / 'begun')!r}, 'w')"
    slow = f"import time; {begun}; time.sleep(2); {MAKE}"
    study = f"""
from pathlib import Path
from benchmarks.studies import run_once
run_once(Path({str(tmp_path)!r}), "make", "-c", {slow!r}, {str(output)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", study], cwd=ROOT)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_once(tmp_path, "make", "-c", MAKE, str(output), makes=[output])
    assert "make runs already; waiting for its end" in capsys.readouterr().err
    assert output.is_dir()


def test_a_failure_is_said_once(tmp_path, capsys):
    def step(name):
        run_once(tmp_path, name, "-c", "raise SystemExit('no such thing')")

    with pytest.raises(UsageError, match="one failed: no such thing"):
        side_by_side(1, step, ["one", "two"])
    assert "no such thing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "needs `arms`") for text in (
            "", "- 1", "arms:", "arms: {}", "arms: [1, 2]", "common: {}", "arms: {a: 1}",
            "common: [1]\narms: {a: {}}", "arms: {a: {}}\ncomon: {lr: 1e-2}",
        )),
        ("a: [", "while parsing"),
        ("arms: {a: {lr: 1}, a: {lr: 2}}", "'a' is there twice"),
        ("arms: {a: {lr: 1, lr: 2}}", "'lr' is there twice"),
        ("arms: {a: {lr: 2020-13-45}}", "month must be in"),
        ("arms: {1: {}}", "1 cannot name an arm"),
        ("arms: {no: {}}", "False cannot name an arm"),
        ("arms: {null: {}}", "None cannot name an arm"),
        ("arms: {real: {eps: -1}}", "'real' cannot name an arm"),
        ("arms: {base: {}}", "'base' cannot name an arm"),
        ("arms: {a b: {}, a_b: {}}", "the same but for a space"),
        ("arms: {a: {1: 2, lr: 3}}", "a: 1: 2 is not a flag"),
        ("arms: {a: {lr: 2020-01-01}}", "a: lr: 2020-01-01 is not a flag"),
        ("arms: {a: {lr: }}", "a: lr: None is not a flag"),
        *((f"arms: {{one: {{{own}}}}}", "one has an eps other than -1, a delta or a noise_mu")
          for own in ("eps: 3", "delta: 1e-6", "noise_multiplier: 0.1")),
    ],
)  # fmt: skip
def test_odd_arms_are_a_line(tmp_path, text, message):
    file = tmp_path / "arms.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=f"--arms .*arms.yaml: .*{re.escape(message)}"):
        read_generators(file, None, [6.0], 1, {})
    file.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UsageError, match="can't decode"):
        read_generators(file, None, [6.0], 1, {})


def test_a_file_of_arms_runs_nothing(tmp_path):
    file, made = tmp_path / "arms.yaml", tmp_path / "made"
    for tag in ("apply:os.mkdir", "new:os.mkdir"):
        file.write_text(f"arms: {{a: {{lr: !!python/object/{tag} ['{made}']}}}}")
        with pytest.raises(UsageError, match="could not determine a constructor"):
            read_generators(file, None, [6.0], 1, {})
    assert not made.exists()


def test_generators_are_each_there_once(tmp_path):
    file = tmp_path / "arms.yaml"
    file.write_text("common: {lr: 1}\narms: {plain:, free: {eps: -1}}")
    made = read_generators(file, None, [6.0, 3.0, 6.0], 2, {"lr": 2, "clip": 3})
    assert [(each.arm, each.epsilon, each.seed) for each in made] == [
        (arm, epsilon, seed)
        for seed in (0, 1)
        for arm, epsilon in (("plain", 6.0), ("plain", 3.0), ("free", None))
    ]
    assert made[0].flags == {"lr": 1, "clip": 3}
    assert len(read_generators(file, ["free", "free"], [6.0], 1, {})) == 1
    with pytest.raises(UsageError, match="has no arm fastest"):
        read_generators(file, ["plain", "fastest"], [6.0], 1, {})
