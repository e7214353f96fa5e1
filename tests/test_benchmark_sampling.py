"""`python -m benchmarks.sampling`: that it runs, and how it counts."""

import json

import pytest

from benchmarks import sampling
from utils.cli import UsageError
from utils.command_line.parser import read_flags


def test_quick_measures_every_engine(tmp_path, capsys, monkeypatch):
    real = sampling.run

    def run(arguments, engine):
        """In a process of its own for one engine, which is enough to see that it works."""
        if engine == "continuous":
            return real(arguments, engine)
        settings = read_flags(sampling.Settings, "", arguments)
        return sampling.measure(settings, engine)

    monkeypatch.setattr(sampling, "run", run)
    sampling.main(["--quick", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(sampling.ENGINES)
    for engine in sampling.ENGINES:
        (run,) = figures["runs"][engine]
        assert run["texts"] == (1 if engine == sampling.ONE_BY_ONE else 4)
        assert 1 <= run["tokens"] <= 11 * run["texts"]
        assert figures["engines"][engine]["tokens_per_second"] > 0
    assert figures["runs"]["static"][0]["tokens"] == figures["runs"]["continuous"][0]["tokens"]


def test_medians_spreads_and_ratios():
    measured = {
        sampling.ONE_BY_ONE: [{"tokens": n, "seconds": 2.0} for n in (40, 20, 30)],
        "continuous": [{"tokens": n, "seconds": 1.0} for n in (60, 90, 200)],
        "vllm": [{"tokens": 120, "seconds": 1.0}],
    }
    report = sampling.summarise(measured)
    assert report["continuous"] == {
        "tokens_per_second": 90, "lowest": 60, "highest": 200, "times_one_at_a_time": 6,
        "share_of_vllm": pytest.approx(0.75),
    }  # fmt: skip


def test_a_failure_is_told_in_a_line(tmp_path):
    with pytest.raises(UsageError, match="one at a time failed: .*no model at"):
        sampling.main(["--model_name", str(tmp_path / "nothing"), "--repeats", "1"])
