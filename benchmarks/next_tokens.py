"""How often models have the next token of a text right: a model, and adapters on it.

    python -m benchmarks.next_tokens --texts FILE --model_name data/quickstart_model \\
        --prompt_style uncond_generation --max_seq_len 64 --adapter_path A/adapter B/adapter \\
        --output DIR

Writes OUTPUT/next_tokens.json: by model, the share of all tokens of the texts, the end included, to
which it gives the highest probability.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, read_flags
from utils.command_line.training_flags import ModelSettings
from utils.texts.text_inputs import FORMATS

FILE = "next_tokens.json"


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """The flags."""

    texts: str = flag(f"texts: {FORMATS}", required=True, metavar="PATH")
    adapter_path: list[str] = flag("adapters", [], nargs="+", metavar="DIR")
    perdevice_bs: int = flag("sequences of max_seq_len tokens on the device at once", 16)
    output: Path = flag("folder for the figures", type=Path, metavar="DIR", required=True)


answer_early(__name__, Settings, __doc__)

import numpy as np
import torch
from transformers import PreTrainedModel

from utils.cli import run_cli
from utils.files import write_json
from utils.models.loading import load_base_model, load_tokenizer, quiet_libraries, resolve_dtype
from utils.models.lora import load_adapted
from utils.runs.batching import cut_microbatches
from utils.texts.text_inputs import read_instructions
from utils.texts.tokens import TokenisedExamples, tokenised


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(settings.dtype, device)
    base, longest = settings.model_name, settings.max_seq_len
    rows = [{"instruction": text} for text in read_instructions(settings.texts)]
    data = tokenised(rows, load_tokenizer(base), settings.prompt_style, longest)
    budget = settings.perdevice_bs * longest
    found = {base: accuracy(load_base_model(base, dtype).to(device), data, budget)}
    for adapter in settings.adapter_path:
        model = load_adapted(base, adapter, dtype, merge=True).to(device)
        found[adapter] = accuracy(model, data, budget)
    write_json(settings.output / FILE, found)


@torch.no_grad()
def accuracy(model: PreTrainedModel, data: TokenisedExamples, token_budget: int) -> float:
    """The share of tokens with loss that the model has right.

    Args:
        token_budget: padded tokens on the device at once.
    """
    right = tokens = 0
    (microbatches,) = cut_microbatches(np.arange(len(data)), data.lengths, token_budget)
    for part in microbatches:
        batch = data.collate(part.examples, 0, model.device)
        ids, places = batch["input_ids"], torch.arange(batch["input_ids"].shape[1] - 1) + 1
        places = places.to(model.device)
        # Padding stands on the right, where no token before it sees it.
        guesses = model.eval()(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        has_loss = (places >= batch["loss_starts"][:, None]) & (places < batch["lengths"][:, None])
        right += int(((guesses == ids[:, 1:]) & has_loss).sum())
        tokens += int(has_loss.sum())
    return right / tokens


if __name__ == "__main__":
    run_cli(main)
