"""The scaling benchmark, and the projection in docs/scaling.md."""

import json

import pytest

from benchmarks import projection, scaling
from tests.paths import ROOT
from tests.training import save_dataset


def test_the_documented_tables_are_what_the_projection_prints():
    assert projection.tables() in (ROOT / "docs" / "scaling.md").read_text()


def test_the_shapes_are_those_of_llama():
    sizes = [s.layer_parameters + s.whole_parameters for s in projection.SHAPES.values()]
    # As transformers counts them in LLaMA 7B and 13B, and in Llama 2 70B.
    assert sizes == [6_738_415_616, 13_015_864_320, 68_976_648_192]
    # 8 · (in + out) of four square projections in each of 32 layers.
    assert projection.adapter_parameters(projection.SHAPES["7B"]) == 8_388_608


def test_memory_and_time_fall_as_they_must():
    seven, _, seventy = projection.SHAPES.values()
    assert projection.memory(seventy, 64, "sharded") < projection.memory(seventy, 8, "sharded")
    assert projection.memory(seven, 1, "sharded") == projection.memory(seven, 8, "whole")
    times = [projection.seconds_per_step(seven, g, sharded=False) for g in projection.GPUS]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[3] == pytest.approx(8, rel=0.05)
    # By hand: 475136 tokens, 6 FLOPs each for 6.74e9 parameters, at 109.2 TFLOP/s.
    assert times[0] == pytest.approx(175.9 + 0.2, rel=0.01)


def test_steps_but_the_first_give_the_figures(tmp_path, monkeypatch, capsys):
    speeds = iter([[100.0, 110.0], [99.0, 109.0], [100.0, 110.0], [90.0, 95.0]])
    monkeypatch.setattr(scaling, "tokens_per_second", lambda *_: next(speeds))
    data, file = save_dataset(tmp_path), tmp_path / "figures.json"
    options = [f"--dataset_name={data}", "--rounds=1", f"--json={file}"]
    assert scaling.main(options) == 0
    assert "| 2 | 1 | 104.0 | 0.990 |" in capsys.readouterr().out
    assert json.loads(file.read_text())["medians"] == {"1": 105.0, "2": 104.0}
    assert scaling.main(options) == 1  # 92.5 of 105


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, capsys):
    options = [f"--dataset_name={save_dataset(tmp_path)}", "--total_bs=16", "--steps=3", "--quick"]
    assert scaling.main(options) in (0, 1)
    assert capsys.readouterr().out.count("|\n") == 4
