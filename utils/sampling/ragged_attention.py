"""Attention for continuous batching on a CPU, where transformers has no kernel of varying lengths.

Its own stand-in lets every token look at the keys of all requests, behind a mask: work and memory
grow with the square of the batch. Here each request sees its own keys alone.
"""

from itertools import pairwise

import torch
from torch.nn import functional as F

NAME = "ragged_sdpa"


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **arguments,
) -> tuple[torch.Tensor, None]:
    """Causal attention of requests that lie one after the other; an `AttentionInterface` function.

    Args:
        query: [1, heads, tokens, width], the new tokens of all requests.
        key, value: [1, key-value heads, tokens, width], of the new tokens.
        arguments: `cache`, the paged cache that adds the earlier tokens' keys and values, and what
            it needs; `cu_seq_lens_q` and `cu_seq_lens_k`, where each request begins.

    Returns:
        [1, tokens, heads, width], and no attention weights.
    """
    cache = arguments.pop("cache")
    key, value = cache.update(key, value, module.layer_idx, arguments)
    query = query[0].transpose(0, 1)  # [tokens, heads, width]
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [all tokens, kv heads, width]
    query_spans = list(pairwise(arguments["cu_seq_lens_q"].tolist()))
    key_spans = list(pairwise(arguments["cu_seq_lens_k"].tolist()))
    output = torch.empty_like(query)

    decoding = [n for n, (start, end) in enumerate(query_spans) if end - start == 1]
    if decoding:
        places = torch.tensor([query_spans[n][0] for n in decoding])
        spans = torch.tensor([key_spans[n] for n in decoding])
        output[places] = _attend_from_one(query[places], key, value, spans, scaling)
    for (start, end), (key_start, key_end) in zip(query_spans, key_spans):
        if end - start > 1:
            output[start:end] = _attend_from_many(
                query[start:end], key[key_start:key_end], value[key_start:key_end], scaling,
                sliding_window,
            )  # fmt: skip
    return output.unsqueeze(0), None


def _attend_from_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one token a request [requests, heads, width] to all keys of its span."""
    requests, heads, width = query.shape
    lengths = spans[:, 1] - spans[:, 0]
    steps = torch.arange(int(lengths.max()))
    seen = steps < lengths[:, None]  # [requests, longest]
    places = torch.where(seen, spans[:, :1] + steps, 0)
    # Heads that share keys are queries of one head, so that no key is copied for each of them.
    output = F.scaled_dot_product_attention(
        query.reshape(requests, key.shape[1], -1, width),
        key[places].transpose(1, 2),
        value[places].transpose(1, 2),
        attn_mask=seen[:, None, None],
        scale=scaling,
    )
    return output.reshape(requests, heads, width)


def _attend_from_many(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of the last tokens of one request [tokens, heads, width]."""
    later = len(key) - len(query)
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(later)
    if sliding_window is not None:
        mask = mask.triu(later - sliding_window + 1)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)
