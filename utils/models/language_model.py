"""A causal language model cut into decoder and head, for per-example losses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, masking_utils

from utils.cli import UsageError, say
from utils.dp_utils import PerExampleGradients
from utils.models.losses import example_losses

# Architectures for which a right-padded batch without an attention mask is shown, by test, to
# give real tokens the same logits as with one: their attention is causal and nothing else.
MASK_FREE_MODEL_TYPES = {
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "olmo2",
}  # fmt: skip


class LanguageModel:
    """A causal LM cut into decoder and frozen head, for per-example losses of padded batches.

    The head carries the scalings that configurations name: a factor (Cohere), a divisor
    (Granite), a soft-cap (Gemma). A model whose own logits the two parts do not reproduce keeps
    its own head, with a line on stderr that says so.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.needs_mask = model.config.model_type not in MASK_FREE_MODEL_TYPES
        self._own_head = False
        if not self._parts_are_exact():
            say(f"{model.config.model_type}: its own head is used, so all logits are held at once")
            self._own_head = True

    def example_losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed token losses (float32) and numbers of tokens with loss, both [examples].

        Args:
            batch: `input_ids` [examples, tokens], right-padded; `lengths` and `loss_starts`
                [examples].
        """
        mask = None
        if self.needs_mask:
            positions = torch.arange(batch["input_ids"].shape[1], device=batch["lengths"].device)
            # An empty row sees its first token: a row that sees nothing is not a number.
            mask = (positions < batch["lengths"].clamp(min=1)[:, None]).long()
        hidden = self._decode(batch["input_ids"], mask)
        return example_losses(
            hidden, batch["input_ids"], batch["loss_starts"], batch["lengths"],
            self._head, self.vocabulary,
        )  # fmt: skip

    def public_batch(self, examples: int, tokens: int = 4) -> dict[str, torch.Tensor]:
        """A batch of arbitrary tokens that no data went into, for passes that only check.

        None of them is for padding: an embedding of zeros at a row's start stays zero in every
        layer without biases, where a norm's derivative is a thousand, and so overflows in the end.
        """
        ids = torch.arange(examples * tokens, device=self.model.device) * 7919 % self.vocabulary
        padding = self.model.config.get_text_config().pad_token_id
        if padding is not None:
            ids[ids == padding] = (padding + 1) % self.vocabulary
        lengths = torch.full((examples,), tokens, device=ids.device)
        return {
            "input_ids": ids.view(examples, tokens),
            "lengths": lengths,
            "loss_starts": torch.zeros_like(lengths),
        }

    def idle_pass(self) -> None:
        """A forward and a backward pass that add nothing.

        With a sharded base, a rank that has no microbatch left keeps pace with the others, whose
        layers it holds a part of.
        """
        losses, _ = self.example_losses(self.public_batch(1))
        (0 * losses.sum()).backward()

    def _decode(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        part = self.model if self._own_head else self.model.base_model
        with _no_packed_rows():
            return part(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._own_head:
            return hidden
        config = self.model.config.get_text_config()
        factor = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        logits = self.model.get_output_embeddings()(hidden)
        if factor != divisor:
            logits = logits * (factor / divisor)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def _parts_are_exact(self, tokens: int = 16) -> bool:
        """Compare with the model's own logits on arbitrary (public) tokens.

        Raises:
            UsageError: these are not finite.
        """
        ids = self.public_batch(1, tokens)["input_ids"]
        training = self.model.training
        self.model.eval()
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        if not own.isfinite().all():
            raise UsageError(
                f"{self.model.config.model_type}: the base's logits of made-up tokens are not "
                "finite; use a whole copy of it, or --dtype float32"
            )
        parts = self._head(self._decode(ids, None)).float()
        self.model.train(training)
        return torch.allclose(own, parts, rtol=1e-4, atol=1e-4 * own.abs().max().item())


@contextmanager
def _no_packed_rows() -> Iterator[None]:
    """A pass in which each row is one text.

    Without a mask transformers looks, in every pass, at whether positions begin anew within a row:
    a GPU would be waited for only to learn that they never do.
    """
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def require_coverage(gradients: PerExampleGradients, language_model: LanguageModel) -> None:
    """Refuse a model whose adapters do not see examples apart, by a pass over two public ones.

    Raises:
        UsageError: an adapter sees the tokens of all examples in one row, as experts do, or is
            used never or twice; the message names it.
    """
    try:
        with gradients.capture(2):
            sums, _ = language_model.example_losses(language_model.public_batch(2))
            if sums.requires_grad:  # else no adapter took part, which is told by name
                sums.sum().backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UsageError(
            f"per-example clipping cannot cover this model: {error}; train adapters on other "
            "layers with --target_modules"
        ) from error
