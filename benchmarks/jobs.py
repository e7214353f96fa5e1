"""What every engine is given: a model, instructions, LoRA.

Peers import this in their environment, which lacks most of what the toolkit's own modules need.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

PEERS = ("published-loop", "opacus-hooks", "opacus-ghost", "opake")
OURS = ("ours-nondp", "ours-dp")


@dataclass(frozen=True)
class Job:
    """One engine's task.

    Attributes:
        engine: a name in `PEERS` or `OURS`.
        folder: holds `model`, `instructions.jsonl` and `tokens.npz`.
        targets: LoRA's target modules; `all-linear` alone for all.
        dtype: of the frozen base.
        steps: logical steps that are timed, after a warm-up.
        rows_per_unit: successive instructions are of one person; `ours-dp` clips persons if it is
            more than 1.
    """

    engine: str
    folder: str
    num_examples: int
    max_seq_len: int
    perdevice_bs: int
    lora_r: int
    targets: list[str]
    dtype: str
    steps: int
    rows_per_unit: int = 1

    @property
    def model(self) -> str:
        """Folder of the base model."""
        return str(Path(self.folder) / "model")

    @property
    def dataset(self) -> str:
        """File of the instructions."""
        return str(Path(self.folder) / "instructions.jsonl")

    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens."""
        return np.load(Path(self.folder) / "tokens.npz")["lengths"]

    def examples(self) -> list[np.ndarray]:
        """Token ids of every example, int64 [tokens] each."""
        tokens = np.load(Path(self.folder) / "tokens.npz")
        return np.split(tokens["ids"], np.cumsum(tokens["lengths"])[:-1])
