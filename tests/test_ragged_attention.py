"""Attention of requests in a row, against each request alone, in plain arithmetic."""

import types

import pytest
import torch

from utils.sampling.ragged_attention import ragged_attention


class Cache:
    """Gives all keys and values, as a paged cache does, where the layer brings the new ones."""

    def __init__(self, key, value):
        self._all = key, value

    def update(self, key, value, layer, arguments):
        assert layer == 3
        arguments["cu_seq_lens_k"] = arguments["cu_seq_lens_k"]["full_attention"]
        return self._all


def attend(query, key, value, window):
    """Softmax attention of one request; [heads, tokens, width]."""
    later = key.shape[1] - query.shape[1]
    scores = query @ key.transpose(1, 2) * 0.3
    for i in range(query.shape[1]):
        for j in range(key.shape[1]):
            if j > i + later or (window and j <= i + later - window):
                scores[:, i, j] = -torch.inf
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "lengths",  # new tokens, all tokens
    [[(1, 5), (1, 1), (1, 9)], [(4, 4), (6, 6)], [(3, 8), (1, 4), (5, 5), (1, 1), (2, 2)]],
    ids=["decoding", "prompts", "mixed"],
)
def test_each_request_sees_its_own_keys_alone(lengths, window):
    torch.manual_seed(0)
    heads, key_heads, width = 6, 2, 8
    if window:  # a window's cache holds no more than a single new token may see
        lengths = [(new, min(all, window) if new == 1 else all) for new, all in lengths]
    query = torch.randn(1, heads, sum(new for new, _ in lengths), width)
    key, value = torch.randn(2, 1, key_heads, sum(all for _, all in lengths), width)
    starts = [torch.tensor([0, *column]).cumsum(0).int() for column in zip(*lengths)]
    output, weights = ragged_attention(
        types.SimpleNamespace(layer_idx=3), query, None, None, None, scaling=0.3,
        sliding_window=window, cache=Cache(key, value), cu_seq_lens_q=starts[0],
        cu_seq_lens_k={"full_attention": starts[1]},
    )  # fmt: skip
    assert weights is None
    expected = []
    for n in range(len(lengths)):
        rows = slice(*starts[0][n : n + 2].tolist())
        columns = slice(*starts[1][n : n + 2].tolist())
        own = [
            part[0, :, columns].repeat_interleave(heads // key_heads, 0) for part in (key, value)
        ]
        expected.append(attend(query[0, :, rows], *own, window))
    expected = torch.cat(expected, 1).transpose(0, 1).unsqueeze(0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
