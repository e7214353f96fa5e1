"""Counted bytes: of single operations by hand, and of whole passes."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import traffic
from benchmarks.traffic import COLUMNS, Settings, Traffic, counted
from tests.paths import ROOT
from utils.command_line.parser import read_flags
from utils.models.footprint import Architecture


def bytes_of(operation) -> dict:
    found = Traffic([])
    with torch.device("meta"), counted(found):
        operation(torch.empty(6, 10), torch.empty(10, 4, dtype=torch.bfloat16))
    return dict(found.by_kind)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x, w: x.bfloat16() @ w, {"casts": 60 * 6, "matrix products": 60 * 2 + 40 * 2 + 48}),
        (lambda x, w: x * 2, {"elementwise": 2 * 240}),
        (lambda x, w: x.add_(1), {"elementwise": 2 * 240}),
        (lambda x, w: x + x[:, :1], {"elementwise": 2 * 240 + 24}),
        (lambda x, w: x + x[:1].expand(6, 10), {"elementwise": 2 * 240 + 40}),
        (lambda x, w: x.t()[0], {}),
        (lambda x, w: x[torch.empty(2, dtype=torch.long)], {"copies": 2 * 80 + 16}),
        (lambda x, w: x.zero_(), {"copies": 240}),
        (lambda x, w: torch.zeros_like(x), {"copies": 240}),
        (lambda x, w: w.copy_(x.t()[:, :4]), {"copies": 160 + 80}),
    ],
)
def test_an_operation_reads_its_inputs_once_and_writes_its_output_once(operation, expected):
    assert bytes_of(operation) == expected


def settings(*flags) -> Settings:
    return read_flags(Settings, "", list(flags))


TINY = Architecture(256, 2, 512, 256, 256, 1000)


def test_what_the_adapters_cost_is_a_small_part_of_what_they_cost_in_float32():
    base, peft, ours = (
        sum(traffic.count(settings("--max_seq_len=64"), TINY, column).values())
        for column in COLUMNS
    )
    assert base < ours < peft
    assert ours - base < (peft - base) / 3


def test_what_is_recomputed_and_drawn_counts():
    def bytes_moved(*flags):
        shape = replace(TINY, layers=1)
        return sum(traffic.count_all(settings("--max_seq_len=64", *flags), shape, "ours").values())

    plain = bytes_moved()
    assert 1.1 * plain < bytes_moved("--gradient_checkpointing") < 2 * plain
    assert bytes_moved("--lora_dropout=0.1") > plain


@pytest.mark.slow
def test_two_layers_tell_what_three_move():
    flags, three = settings("--max_seq_len=64"), replace(TINY, layers=3)
    assert traffic.count(flags, three, "ours") == traffic.count_all(flags, three, "ours")


def test_the_documented_table_is_what_the_benchmark_prints(capsys, tmp_path):
    assert traffic.main([f"--json={tmp_path / 'traffic.json'}"]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "performance.md").read_text()
    (row,) = json.loads((tmp_path / "traffic.json").read_text())
    assert row.keys() == {"model", *COLUMNS}
    assert sum(row["ours"].values()) <= 600e9
