"""What the sampling engines share: requests, completions, decoding settings, and the draw.

Every token is drawn from one uniform number, a hash of (seed, number of the sample, position). So
a sample's text is decided by the seed, its number, its prompt and the model: whatever else is in
the batch, however many processes there are, and however often the run was stopped. (Floating-point
sums depend on the shape of a batch, so that a token whose uniform number falls on the very border
between two may differ.) This is more than a convenience: a run that drew afresh after
every stop would keep the short texts, which are finished first, and redraw the long ones.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from utils.cli import UsageError

STOP, LENGTH, PROMPT_TOO_LONG = "stop", "length", "prompt_too_long"
# Numbers of likeliest tokens among which a CPU looks for a nucleus before it sorts them all.
NUCLEUS_SIZES = (256, 4096)


@dataclass(frozen=True)
class Decoding:
    """How a text follows its prompt.

    Attributes:
        max_seq_len: longest prompt and text together, in tokens.
        max_new_tokens: longest text; None is what the prompt leaves of `max_seq_len`.
        top_k: 0 is off.
        top_p: 1 is off.
        stop_ids: tokens that end a text.
    """

    max_seq_len: int
    max_new_tokens: int | None
    no_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    stop_ids: frozenset[int]

    def limit(self, prompt: list[int]) -> int:
        """The most tokens that may follow `prompt`; 0 or less if it leaves no room."""
        room = self.max_seq_len - len(prompt)
        return room if self.max_new_tokens is None else min(room, self.max_new_tokens)


@dataclass(frozen=True)
class Request:
    """A prompt, as token ids, and the number of the sample to draw for it."""

    sample_id: int
    prompt: list[int]


@dataclass(frozen=True)
class Completion:
    """The tokens drawn for a request, a stop token included, and why there are no more."""

    sample_id: int
    tokens: list[int]
    finish_reason: str


def completion_of(sample_id: int, tokens: list[int], stop_ids: frozenset[int]) -> Completion:
    """A completion that ends with the first stop token, or with the last token."""
    for number, token in enumerate(tokens, start=1):
        if token in stop_ids:
            return Completion(sample_id, tokens[:number], STOP)
    return Completion(sample_id, tokens, LENGTH)


@contextmanager
def own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """A block in which what a model brings along (its temperature, top-p, length) decides nothing.

    Afterwards the model is as it was, and so is its attention, which an engine may exchange.
    """
    attention, generation_config = model.config._attn_implementation, model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def uniform_bits(seed: int, sample: str, position: int) -> int:
    """32 bits, as a signed integer, for the token of `sample` at `position`."""
    digest = hashlib.blake2b(f"{seed} {sample} {position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


class Drawer:
    """Takes the next token of every row of a batch, and notices logits that are not finite."""

    def __init__(self, decoding: Decoding, device: torch.device):
        self._decoding = decoding
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, scores: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Logits that are highest at the token to take.

        Args:
            scores: the model's logits [rows, vocabulary].
            bits: integers of 32 random bits [rows].
        """
        # In place and without a look at it, so that a GPU need not wait.
        self._broken |= ~scores.amax(-1).isfinite().all()
        if self._decoding.no_sample:
            return scores
        d = self._decoding
        tokens = draw(scores, bits, d.temperature, d.top_k, d.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens.unsqueeze(-1), 0.0)

    def check(self) -> None:
        """Refuse to go on after logits that are not finite.

        Raises:
            UsageError: there were some.
        """
        if self._broken:
            raise UsageError(
                "the model's logits are NaN or infinite: its weights or the adapter's are broken, "
                "or the dtype is too narrow for them (try --dtype float32)"
            )


def draw(
    scores: torch.Tensor,
    bits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Draw a token from each row's distribution by inverting its distribution function.

    The distribution is softmax(scores / temperature), among the `top_k` likeliest tokens, and of
    those among the fewest that together have `top_p` of their probability.

    Args:
        scores: logits [rows, vocabulary]; -inf is never drawn.
        bits: integers of 32 random bits [rows].

    Returns:
        Token ids [rows].
    """
    uniform = ((bits.long() & 0xFFFFFFFF).double() + 0.5) / 2**32
    scores = scores / temperature
    if top_k > 0:
        values, tokens = scores.topk(min(top_k, scores.shape[-1]))
        return _draw_among(values.softmax(-1, dtype=torch.float64), tokens, top_p, uniform)[0]
    if top_p < 1:
        return _draw_from_nucleus(scores, top_p, uniform)
    return _invert(scores.softmax(-1, dtype=torch.float64), uniform)


def _draw_from_nucleus(scores: torch.Tensor, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """`draw` with top-p alone; sorts no more of the vocabulary than the nucleus needs."""
    vocabulary = scores.shape[-1]
    log_normaliser = scores.logsumexp(-1, keepdim=True)
    drawn = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    # A GPU sorts fast, and must not be asked in between whether a nucleus was found.
    sizes = [size for size in NUCLEUS_SIZES if size < vocabulary and scores.device.type == "cpu"]
    for size in [*sizes, vocabulary]:
        values, tokens = scores[rows].topk(size)
        probabilities = (values.double() - log_normaliser[rows]).exp()
        drawn[rows], mass = _draw_among(probabilities, tokens, top_p, uniform[rows])
        if size < vocabulary:
            rows = rows[mass < top_p]
            if not len(rows):
                break
    return drawn


def _draw_among(
    probabilities: torch.Tensor, tokens: torch.Tensor, top_p: float, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw among candidates in order of falling probability.

    Args:
        probabilities: of the candidates [rows, candidates], float64.
        tokens: their ids [rows, candidates].

    Returns:
        Token ids [rows], and the mass of all candidates [rows]: where that is below `top_p`, the
        nucleus reaches beyond them and the draw is void.
    """
    cumulative = probabilities.cumsum(-1)
    kept = probabilities.where(cumulative - probabilities < top_p, 0)
    # In the order of ids, which rounding cannot change, so that tokens of nearly the same
    # probability keep their places on the line that the uniform number falls on.
    tokens, order = tokens.sort(-1)
    place = _invert(kept.gather(-1, order), uniform)
    return tokens.gather(-1, place.unsqueeze(-1)).squeeze(-1), cumulative[:, -1]


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index [rows] at which the cumulated `weights` [rows, n] pass `uniform` [rows] of all."""
    cumulative = weights.cumsum(-1)
    # Scaled by the last sum, which is not quite 1, so that the search always ends inside.
    targets = uniform * cumulative[:, -1]
    places = torch.searchsorted(cumulative, targets.unsqueeze(-1), right=True).squeeze(-1)
    return places.clamp(max=weights.shape[-1] - 1)  # sums of NaN are passed nowhere
