"""A small base for studies: a LLaMA of 7 million weights, made on the spot of public texts.

Hundreds of DP steps of it take minutes on two cores, so that a study can afford several generators
of each kind. It is made once for each set of texts, in a folder that is named by their hash.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measuring import device
from utils.folders import whole_folder
from utils.progress import Progress

VOCABULARY = 8192
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW, BATCH, LEARNING_RATE, WARMUP = 128, 16, 2e-3, 0.05


def small_base(folder: Path, texts: list[str], num_tokens: int) -> Path:
    """The folder of a base that was pre-trained on these texts; made if it is not there.

    Args:
        folder: bases lie in it.
        texts: public ones; nothing private may have gone into them.
        num_tokens: of pre-training, over as many passes as that takes.
    """
    base = folder / f"small-{_digest(texts, num_tokens, SHAPE)}"
    if base.exists():
        return base
    torch.manual_seed(0)
    _make(base, bpe_tokenizer(texts), LlamaForCausalLM(LlamaConfig(**SHAPE)), texts, num_tokens)
    return base


def taught(base: Path, texts: list[str], num_tokens: int) -> Path:
    """The folder of a small base whose pre-training went on with other texts, next to it.

    Args:
        texts, num_tokens: as those of `small_base`.
    """
    other = base.with_name(f"taught-{_digest(base.name, texts, num_tokens)}")
    if not other.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        _make(other, tokenizer, LlamaForCausalLM.from_pretrained(base), texts, num_tokens)
    return other


def _digest(*recipe: object) -> str:
    """Of what a base is made of, and of how."""
    whole = [*recipe, WINDOW, BATCH, LEARNING_RATE]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:12]


def _make(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
    texts: list[str],
    num_tokens: int,
) -> None:
    """Pre-train the model on texts, and write both."""
    _pretrain(model, _stream(tokenizer, texts), num_tokens)
    with whole_folder(folder) as partial:
        tokenizer.save_pretrained(partial)
        model.eval().save_pretrained(partial)


def bpe_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts, of up to so many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def _stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts one after the other, each between its marks: int64 [tokens]."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([[bos, *each, eos] for each in ids])


def _pretrain(model: LlamaForCausalLM, stream: np.ndarray, num_tokens: int) -> None:
    """AdamW over random windows of the stream, with a warm-up and a cosine."""
    steps = max(1, num_tokens // (WINDOW * BATCH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)

    def rate(step: int) -> float:
        if step < WARMUP * steps:
            return (step + 1) / (WARMUP * steps)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    random, places = np.random.default_rng(0), np.arange(WINDOW)
    place = device()
    model.to(place).train()
    for _ in Progress(range(steps), "pre-train the small base", unit="step"):
        starts = random.integers(0, len(stream), BATCH)
        ids = torch.from_numpy(stream[(starts[:, None] + places) % len(stream)]).to(place)
        with torch.autocast(place.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
