"""AlpacaEval's instructions as an instruction file."""

import json
import os
import subprocess
import sys

import pytest

from data.prepare_alpaca_eval import NUM_INSTRUCTIONS, main
from tests.paths import ROOT
from utils.cli import UsageError
from utils.texts.prompts import read_instruction_file


@pytest.fixture
def prepare(tmp_path):
    """Runs `main` on a JSON value, or a text as it is, and returns the path of the output."""

    def run(content, *flags):
        source, output = tmp_path / "alpaca_eval.json", tmp_path / "instructions.txt"
        source.write_text(content if isinstance(content, str) else json.dumps(content))
        main(["--input", str(source), "--output", str(output), *flags])
        return output

    return run


def objects(texts):
    return [{"instruction": text, "output": "x", "generator": "m"} for text in texts]


def test_every_instruction_survives_in_order_once(prepare, capfd):
    texts = ["What is it?", "Two\n\nlines", '"$HOME" `x`', "größer", "What is it?"]
    blocks = read_instruction_file(prepare(objects(texts)))
    assert [(block.text, block.count) for block in blocks] == [(text, 1) for text in texts]
    out, err = capfd.readouterr()
    assert out == ""
    assert "warning: AlpacaEval has 805 instructions, this file has 5" in err
    assert "CC BY-NC 4.0" in err


def test_the_whole_set_comes_without_a_warning(prepare, capfd):
    prepare(objects(f"Question {n}" for n in range(NUM_INSTRUCTIONS)))
    assert "warning" not in capfd.readouterr().err


def test_an_output_is_replaced_only_when_told(prepare):
    output = prepare(objects(["first"]))
    with pytest.raises(UsageError, match="exists; replace it with --overwrite"):
        prepare(objects(["second"]))
    assert read_instruction_file(output)[0].text == "first"
    prepare(objects(["second"]), "--overwrite")
    assert read_instruction_file(output)[0].text == "second"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "x"}', "cannot read --input"),
        ([], "not a JSON list of objects, or an empty one"),
        ({"instruction": "x"}, "must hold a list"),
        ([{"instruction": "x"}, {"prompt": "y"}], "object 1: needs an 'instruction'"),
        ([{"instruction": "x"}, "y"], "object 1: needs an 'instruction'"),
        ([{"instruction": "  "}], "object 0: needs an 'instruction'"),
        ([{"instruction": 7}], "object 0: needs an 'instruction'"),
        ([{"instruction": "a\n### EOI ###\nb"}], "holds a line"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(prepare, tmp_path, content, message):
    with pytest.raises(UsageError, match=message) as error:
        prepare(content)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "instructions.txt").exists()


def test_the_real_command_without_the_hub_says_what_to_do_and_ends_with_code_2(tmp_path):
    finished = subprocess.run(
        [sys.executable, ROOT / "data" / "prepare_alpaca_eval.py", "--output", tmp_path / "out"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: cannot download alpaca_eval.json of tatsu-lab/alpaca_eval")
    assert line.endswith("and name it with --input")
    assert not (tmp_path / "out").exists()
