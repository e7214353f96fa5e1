"""The draw of a token: its distribution, its support, its ends, and logits that are no numbers."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.cli import UsageError
from utils.sampling import decoding
from utils.sampling.decoding import Decoding, Drawer, draw, uniform_bits

LEVEL = 1e-4  # of significance: what is right stays above, what is wrong falls below


def test_uniform_bits_are_uniform_and_differ_in_every_argument():
    bits = [
        uniform_bits(seed, str(sample), position)
        for seed in range(4)
        for sample in range(50)
        for position in range(50)
    ]
    assert len(set(bits)) > len(bits) - 10  # 10,000 draws from 2**32 rarely collide
    uniform = (np.array(bits) + 2**31) / 2**32
    assert stats.kstest(uniform, "uniform").pvalue > LEVEL
    assert stats.kstest(np.sort(uniform) ** 1.1, "uniform").pvalue < LEVEL


def test_draw_at_the_ends_of_the_uniform_range():
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    lowest, highest = torch.tensor([0]), torch.tensor([-1])  # 0 and 2**32 - 1 as unsigned bits
    assert draw(scores, lowest) == 1
    assert draw(scores, highest) == 2


FLAGS = [
    {"top_p": 0.9}, {"top_p": 0.999}, {"top_p": 1e-6}, {"top_k": 5}, {"top_k": 10_000},
    {"temperature": 0.7}, {"temperature": 2.0, "top_k": 300, "top_p": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_draw_equals_the_inverse_of_what_transformers_leaves(flags, spread):
    """The library's warpers, then the token at which the sum of probabilities passes the number.

    A spread of 0.1 makes nuclei of thousands of tokens, one of 3 of a few dozen.
    """
    torch.manual_seed(0)
    scores = spread * torch.randn(40, 6000)
    bits = torch.randint(-(2**31), 2**31, (40,))
    warped = scores
    if "temperature" in flags:
        warped = TemperatureLogitsWarper(flags["temperature"])(None, warped)
    if "top_k" in flags:
        warped = TopKLogitsWarper(min(flags["top_k"], 6000))(None, warped)
    if "top_p" in flags:
        warped = TopPLogitsWarper(flags["top_p"])(None, warped)
    cumulative = warped.double().softmax(-1).cumsum(-1)
    uniform = ((bits & 0xFFFFFFFF).double() + 0.5) / 2**32
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    assert (draw(scores, bits, **flags) == expected).float().mean() >= 0.95  # rounding at borders
    assert warped.gather(-1, draw(scores, bits, **flags)[:, None]).isfinite().float().mean() > 0.97


def test_a_row_does_not_depend_on_the_others(monkeypatch):
    """Nor on how many of the likeliest tokens were looked at first."""
    torch.manual_seed(1)
    scores = torch.randn(30, 5000) * torch.linspace(0.1, 5, 30)[:, None]
    bits = torch.randint(-(2**31), 2**31, (30,))
    together = draw(scores, bits, top_p=0.9)
    alone = [draw(row[None], bit[None], top_p=0.9) for row, bit in zip(scores, bits)]
    assert together.tolist() == torch.cat(alone).tolist()
    monkeypatch.setattr(decoding, "NUCLEUS_SIZES", ())
    assert together.tolist() == draw(scores, bits, top_p=0.9).tolist()


SETTINGS = Decoding(
    max_seq_len=8, max_new_tokens=None, no_sample=False, temperature=1.0, top_k=0, top_p=1.0,
    repetition_penalty=1.0, seed=0, stop_ids=frozenset(),
)  # fmt: skip


@pytest.mark.parametrize("no_sample", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("flags", [{}, {"top_p": 0.5}, {"top_k": 2}], ids=str)
def test_logits_that_are_no_numbers_are_noticed(no_sample, bad, flags):
    drawer = Drawer(Decoding(**(vars(SETTINGS) | flags | {"no_sample": no_sample})), "cpu")
    scores = torch.randn(3, 9)
    scores[:, 0] = -torch.inf  # a token that a processor forbade
    drawer(scores, torch.arange(3))
    drawer.check()
    scores[1, 4] = bad
    drawer(scores, torch.arange(3))
    drawer(torch.randn(3, 9), torch.arange(3))
    with pytest.raises(UsageError, match="NaN or infinite.*--dtype float32"):
        drawer.check()
