"""Per-example language-model loss that never holds the logits of all tokens at once."""

from collections.abc import Callable, Sequence

import torch

from utils.models.footprint import CHUNK_ELEMENTS

Head = Callable[[torch.Tensor], torch.Tensor]


def token_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    counts: Sequence[int],
    head: Head,
    vocabulary: int,
) -> torch.Tensor:
    """Cross-entropy of every target token, chunk by chunk through a frozen head.

    No chunk holds tokens of two examples: which kernel multiplies a chunk, and so how it rounds,
    follows from its size, and an example's size is to be its own. Each chunk's gradient with
    respect to the hidden states is taken in the forward pass, while its logits exist, so that the
    backward pass only has to scale it.

    Args:
        hidden: [tokens, d], the decoder's last hidden states, example after example.
        targets: int64 [tokens].
        counts: tokens of each example.
        head: [n, d] -> logits [n, vocabulary]; frozen.

    Returns:
        float32 [tokens], in nats.
    """
    most = max(1, CHUNK_ELEMENTS // vocabulary)
    sizes = [min(most, count - start) for count in counts for start in range(0, count, most)]
    return _ChunkedCrossEntropy.apply(hidden, targets, head, sizes)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, sizes):
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        wants_gradient = ctx.needs_input_grad[0]
        # Written where a gradient is wanted, and never read elsewhere.
        gradient = torch.empty_like(hidden if wants_gradient else hidden[:0])
        end = 0
        for size in sizes:
            part = slice(end, end := end + size)
            with torch.set_grad_enabled(wants_gradient):
                states = hidden[part].detach().requires_grad_(wants_gradient)
                logits = head(states)
            losses[part], softmax = _cross_entropy(logits.detach(), targets[part])
            if wants_gradient:
                # The loss's gradient in the logits: softmax, less 1 at the target.
                softmax[torch.arange(len(softmax), device=softmax.device), targets[part]] -= 1
                (gradient[part],) = torch.autograd.grad(logits, states, softmax.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, loss_gradient):
        (gradient,) = ctx.saved_tensors
        return (gradient * loss_gradient[:, None]).to(gradient.dtype), None, None, None


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [n] and softmax [n, vocabulary] in float32, with one buffer more than the logits."""
    largest = logits.amax(dim=1, keepdim=True).float()
    exponentials = (logits - largest).exp_()
    sums = exponentials.sum(dim=1, keepdim=True)
    losses = sums.log() + largest - logits.gather(1, targets[:, None])
    return losses.squeeze(1), exponentials.div_(sums)


def example_losses(
    hidden: torch.Tensor,
    input_ids: torch.Tensor,
    loss_starts: torch.Tensor,
    lengths: torch.Tensor,
    head: Head,
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed token losses of every example, which no other example and no padding touches.

    Args:
        hidden: [examples, tokens, d] of right-padded sequences.
        input_ids: int64 [examples, tokens].
        loss_starts: int64 [examples], index of the first token that carries loss.
        lengths: int64 [examples], tokens without padding.

    Returns:
        float32 [examples] summed losses in nats, int64 [examples] numbers of tokens with loss.
    """
    positions = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    # The token at a position is predicted from the one before it, so position 0 has no loss.
    has_loss = (positions >= loss_starts[:, None]) & (positions < lengths[:, None])
    counts = has_loss.sum(dim=1)
    # The one place where a GPU is waited for: from here on all shapes are known.
    sizes = counts.tolist()
    rows, places = has_loss.nonzero_static(size=sum(sizes)).unbind(dim=1)
    states, targets = hidden[rows, places], input_ids[rows, places + 1]
    losses = token_losses(states, targets, sizes, head, vocabulary)
    return torch.stack([own.sum() for own in losses.split(sizes)]), counts


def normalise(
    sums: torch.Tensor, counts: torch.Tensor, normalization: str, max_seq_len: int
) -> torch.Tensor:
    """Divide each example's summed loss by the public `max_seq_len`, or by its own token count.

    Args:
        normalization: "max_seq_len" or "tokens".

    Returns:
        float32 [examples].
    """
    return sums / (max_seq_len if normalization == "max_seq_len" else counts.clamp(min=1))
