"""How well models predict held-out texts: loss in nats, with intervals, against the base model.

    python -m evaluation.perplexity --dataset_name quickstart_instructions --split test \\
        --model_name data/quickstart_model --adapter_path outputs/mine/adapter \\
        --prompt_style uncond_generation --max_seq_len 128 --output evaluation_outputs/mine

Loss falls on the same tokens as in training: on every token of an instruction, or, for pairs, on
the answer. `exp` of the loss per token is the perplexity. Merged models are models: name one as
--model_name. Texts that the run of an adapter was trained on are refused, where its folder is here.
Held-out texts are private data unless --public says otherwise, so the figures go under
OUTPUT/private.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, read_flags
from utils.command_line.training_flags import ModelSettings, require_fitting_style


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """The flags of this evaluation."""

    dataset_name: str = flag(
        "held-out texts: data/NAME, a folder or a file, as in training; pairs where the name "
        "starts with `labelled`",
        required=True,
    )
    split: str = flag("the split to read; a lone file is read whole", "test")
    num_rows: int = flag("rows used, the first ones", 1000)
    adapter_path: list[str] = flag(
        "adapters to compare with the base model", [], nargs="+", metavar="DIR"
    )
    perdevice_bs: int = flag("sequences of max_seq_len tokens on the device at once", 16)
    public: bool = flag("the texts are public, so the figures are too", False)
    output: Path = flag("folder for the figures", type=Path, metavar="DIR", required=True)


answer_early(__name__, Settings, __doc__)

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.measures.intervals import BOOTSTRAP, bootstrap, ratio_of_sums
from evaluation.results import Result, Score, require_new_result, table, write_result
from utils.cli import UsageError, run_cli, say
from utils.command_line.sampling_flags import check_adapter
from utils.models.adapter_info import read_adapter_info
from utils.models.language_model import LanguageModel
from utils.models.loading import load_base_model, load_tokenizer, quiet_libraries, resolve_dtype
from utils.models.lora import load_adapted
from utils.progress import Progress
from utils.runs.batching import cut_microbatches
from utils.runs.run_folder import private_identity_of
from utils.texts.data_sets import find_dataset, load_split, rows_fingerprint
from utils.texts.prompts import fix_date
from utils.texts.tokens import TokenisedExamples, tokenised

TOOL = "perplexity"


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    require_fitting_style(settings.dataset_name, settings.prompt_style)
    require_new_result(settings.output, TOOL)
    for adapter in settings.adapter_path:
        for notice in check_adapter(adapter, settings.prompt_style):
            say(f"warning: {notice}")
    rows = load_split(settings.dataset_name, settings.split, settings.prompt_style)
    place = find_dataset(settings.dataset_name)
    if place and place.is_file():
        say(f"{place} has no splits: all its rows are taken for held-out ones")
    for adapter in settings.adapter_path:
        require_unseen(rows["instruction"], adapter)
    rows = rows.select(range(min(len(rows), settings.num_rows)))
    quiet_libraries()
    tokenizer = tokenizer_of(settings.model_name, settings.adapter_path)
    data = tokenised(rows, tokenizer, settings.prompt_style, settings.max_seq_len)
    budget = settings.perdevice_bs * settings.max_seq_len
    losses = losses_of_models(
        settings.model_name, settings.adapter_path, data, settings.dtype, budget
    )
    result = compare(losses, settings.model_name, settings.public)
    write_result(settings.output, result, vars(settings))
    print(table(result))


def tokenizer_of(base: str, adapters: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a base; its template holds the day of the first adapter, if that has one.

    All are compared on the same tokens.
    """
    tokenizer = load_tokenizer(base)
    if adapters and (day := read_adapter_info(adapters[0]).get("prompt_date")):
        fix_date(tokenizer, day)
    return tokenizer


def require_unseen(texts: list[str], adapter: str) -> None:
    """Refuse texts that the run of an adapter was trained on; say what cannot be known.

    Args:
        texts: of all rows of the split.
        adapter: its folder, in that of its run.

    Raises:
        UsageError: they are the training rows, or more than half of them are among these.
    """
    known = private_identity_of(Path(adapter).resolve().parent)
    place = known.get("dataset_name", "")
    is_here = bool(place) and find_dataset(place) is not None
    training = set(load_split(place, "train")["instruction"]) if is_here else set()
    is_training_set = known.get("rows_fingerprint") == rows_fingerprint(texts)
    seen = len(texts) if is_training_set else sum(text in training for text in texts)
    if 2 * seen > len(texts):
        raise UsageError(
            f"--dataset_name: the run of {adapter} was trained on {seen:,} of these {len(texts):,} "
            "texts, so they are not held out; name a split or a file that it did not read"
        )
    if seen:
        say(f"{seen:,} of {len(texts):,} texts are among those that {adapter} was trained on")
    elif not is_here:
        say(
            f"warning: the training data of {adapter} is not here, to tell that it saw no such text"
        )


@torch.no_grad()
def example_losses(
    model: PreTrainedModel, data: TokenisedExamples, token_budget: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Summed token losses in nats, and numbers of tokens with loss, each float64 [examples].

    Args:
        token_budget: padded tokens on the device at once.
        name: for the progress bar.
    """
    language_model = LanguageModel(model.eval())
    sums, counts = np.zeros(len(data)), np.zeros(len(data))
    (microbatches,) = cut_microbatches(np.arange(len(data)), data.lengths, token_budget)
    for part in Progress(microbatches, name, unit="batch"):
        # Padding is never attended to and carries no loss, so any token serves.
        batch = data.collate(part.examples, 0, model.device)
        losses, tokens = language_model.example_losses(batch)
        sums[part.examples], counts[part.examples] = losses.cpu().numpy(), tokens.cpu().numpy()
    return sums, counts


def losses_of_models(
    base: str, adapters: Sequence[str], data: TokenisedExamples, dtype_name: str, token_budget: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`example_losses` of a base model and of adapters on it, by their names.

    Args:
        dtype_name: the flag --dtype.
        token_budget: padded tokens on the device at once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(dtype_name, device)
    model = load_base_model(base, dtype).to(device)
    losses = {base: example_losses(model, data, token_budget, "base model")}
    del model
    for number, adapter in enumerate(adapters, start=1):
        model = load_adapted(base, adapter, dtype, merge=True).to(device)
        name = f"adapter {number} of {len(adapters)}"
        losses[adapter] = example_losses(model, data, token_budget, name)
    return losses


def compare(losses: dict[str, tuple[np.ndarray, np.ndarray]], base: str, public: bool) -> Result:
    """Losses of every model, per token and per example, and what each gains on the base model.

    Examples without a token that carries loss are left out. A gain's interval comes from
    resampling examples with both models' losses, which differ far less from one another than
    examples do, so it is much narrower than the losses' own intervals tell.

    Args:
        losses: `example_losses` of every model, by its name.
        base: the name of the base model.

    Raises:
        UsageError: a model's losses are not finite.
    """
    counts = losses[base][1]
    used = counts > 0
    counts = counts[used]
    scores = []
    for name, (sums, _) in losses.items():
        sums, base_sums = sums[used], losses[base][0][used]
        if not np.isfinite(sums).all():
            raise UsageError(f"{name} gives losses that are not finite; try --dtype float32")
        control = {} if name == base else {
            "per_token": base_sums.sum() / counts.sum(),
            "per_example": (base_sums / counts).mean(),
        }  # fmt: skip
        scores.append(Score(
            "loss per token (nats)", name, sums.sum() / counts.sum(),
            *bootstrap(sums, counts, statistic=ratio_of_sums), control.get("per_token"), "lower",
            len(counts),
        ))  # fmt: skip
        scores.append(Score(
            "loss per token, mean over examples (nats)", name, (sums / counts).mean(),
            *bootstrap(sums / counts, statistic=np.mean), control.get("per_example"),
            "lower", len(counts),
        ))  # fmt: skip
        if name != base:
            gains = base_sums - sums
            scores.append(Score(
                "gain on the base model per token (nats)", name, gains.sum() / counts.sum(),
                *bootstrap(gains, counts, statistic=ratio_of_sums), 0.0, "higher",
                len(counts),
            ))  # fmt: skip
    return Result(
        tool=TOOL,
        title="How well the models predict held-out texts",
        private=not public,
        interval=BOOTSTRAP,
        control="the base model" if len(losses) > 1 else "",
        scores=scores,
        notes=[
            f"{len(counts):,} held-out examples, {int(counts.sum()):,} tokens with loss; the "
            "perplexity is exp(loss per token)"
        ],
    )


if __name__ == "__main__":
    run_cli(main)
