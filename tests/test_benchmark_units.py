"""The study of units from end to end on a tiny model: every arm pays the same epsilon."""

import json

import numpy as np
import pytest

from benchmarks import studies, units
from tests.studies import TEXTS, one_by_one, run_here
from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.files import write_json


def settings(*more):
    return read_flags(units.Settings, None, ["--instructions=x", "--work_dir=x", *more])


@pytest.fixture(scope="module")
def found(tiny_model_dir, tmp_path_factory):
    """What a study of one cap found."""
    folder = tmp_path_factory.mktemp("units")
    write_json(folder / "texts.json", TEXTS)

    def run_command(command, log):
        assert "--num_rows=20" in command or command[0] == "train.py"
        return run_here(command, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "run_command", run_command)
        patch.setattr(units, "side_by_side", one_by_one)
        units.main([
            f"--instructions={folder / 'texts.json'}", f"--work_dir={folder / 'work'}",
            f"--json={folder / 'found.json'}", f"--model_name={tiny_model_dir}",
            "--dtype=float32", "--max_seq_len=100", "--num_test=20", "--num_private=100",
            "--num_persons=40", "--rows_in_a_step=12", "--num_steps=3", "--caps", "2",
            "--num_seeds=1", "--delta=1e-3",
        ])  # fmt: skip
    return json.loads((folder / "found.json").read_text())


def test_every_arm_pays_the_same_in_as_many_steps(found):
    arms = found["arms"]
    assert [(arm["owners"], arm["unit_sampling"], arm["cap"]) for arm in arms] == [
        ("even", None, None),
        *((owners, by, 2) for owners in ("even", "zipf") for by in ("rows", "units")),
    ]
    assert all(5.8 < arm["epsilon"] <= 5.94 and arm["steps_taken"] == 3 for arm in arms)
    # 12 rows in a step: of 100; of two for each of 40 persons; or six persons of two.
    sizes = [(arm["num_examples"], arm["expected_batch_size"]) for arm in arms]
    assert sizes[:3] == [(100, 12), (80, 12), (40, 6)]
    zipf = units.rows_of_persons("zipf", settings("--num_private=100", "--num_persons=40"))
    kept = np.minimum(zipf, 2)
    assert sizes[3:] == [(kept.sum(), 12), (40, round(12 / kept.mean()))]
    losses = [*(arm["loss"][0] for arm in arms), found["base"]["value"]]
    assert len(set(losses)) == 6


def test_the_table_has_a_line_for_each_arm(found):
    lines = units.table(found).splitlines()
    assert len(lines) == 2 + 1 + 5
    sigma = found["arms"][2]["noise_multiplier"]
    assert f"| a person, units | even | 2 | 40 | 6 | {sigma:.3f} ({sigma / 6:.1e}) |" in lines[5]


def test_persons_own_all_rows_and_each_has_one():
    for owners, most in (("even", 8), ("zipf", 516)):
        rows = units.rows_of_persons(owners, settings())
        assert (len(rows), rows.sum(), rows.min(), rows.max()) == (500, 4000, rows[-1], most)
        assert rows.min() >= 1
    with pytest.raises(UsageError, match="--num_private 10 is less than --num_persons 20"):
        units.rows_of_persons("even", settings("--num_private=10", "--num_persons=20"))
