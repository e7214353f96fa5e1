"""A tiny LLaMA that writes as natural canaries do, and has room to tell one ending from another."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.small_base import bpe_tokenizer
from privacy_checks.audit_texts import tokens_of
from privacy_checks.tiny_model import tiny_llama
from utils.texts.audit_canaries import NATURAL, AuditCanaries

# Syllables, and the words of openings, are tokens.
VOCABULARY = 512
STEPS, BATCH, LEARNING_RATE, WARMUP = 300, 128, 4e-3, 50
# Of nobody: a seed that no run takes.
PUBLIC_SEED = 10**6


def canary_texts(count: int, seed: int) -> list[str]:
    """Natural canaries, an opening and an ending each."""
    canaries = AuditCanaries(count, NATURAL, seed)
    return [f"{canaries.opening(n)} {canaries.ending(n)}" for n in range(count)]


def save_fluent_model(folder: Path) -> None:
    """Pre-train one layer of 128 on canaries of another seed, until no syllable is expected."""
    texts = canary_texts(STEPS * BATCH, PUBLIC_SEED)
    tokenizer = bpe_tokenizer(texts[:4000], VOCABULARY)
    model = tiny_llama(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_key_value_heads=4,
    ).train()  # fmt: skip
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        # Tokens that look alike to the layer would have their canaries' gradients overlap.
        embeddings /= embeddings.std()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - step / STEPS)
    )
    data = tokens_of(texts, tokenizer)
    for rows in np.arange(len(data)).reshape(STEPS, BATCH):
        batch = data.collate(rows, 0)
        ids = batch["input_ids"]
        is_text = torch.arange(ids.shape[1]) < batch["lengths"][:, None]
        model(input_ids=ids, labels=torch.where(is_text, ids, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)
