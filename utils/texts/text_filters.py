"""What the scripts that prepare data sets share: when two texts count as one, and the split."""

import random
import re


def comparison_form(text: str) -> str:
    """The lower-case words of `text` between single spaces: texts equal in it count as the same.

    Letter case, white space and punctuation do not tell two texts apart.
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def split_rows(rows: list[dict], train_size: int, val_size: int, seed: int) -> dict[str, list]:
    """Shuffle `rows` by `seed` and part them into train, val and, with all that is left, test."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    return {
        "train": shuffled[:train_size],
        "val": shuffled[train_size : train_size + val_size],
        "test": shuffled[train_size + val_size :],
    }
