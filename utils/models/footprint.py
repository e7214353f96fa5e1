"""How much memory of a GPU a training run takes, computed from public shapes; no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

GIB = 2**30
# GPUs by their memory in GiB.
CARDS = (24, 40, 80)
FLOAT = 4
# What is used of the memory that there is; the rest is for libraries, fragmentation and others.
USABLE_SHARE = 0.9
# NF4: 4 bits a weight, 8 bits for every 64 of them, 32 bits for every 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Logits held at a time, in elements: 32 Mi of them are 128 MiB in float32.
CHUNK_ELEMENTS = 1 << 25
# For each trained number, while a step is released: noise, sums and what is rounded, five float64
# vectors.
RELEASE_BYTES = 5 * 8

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Linear layers that read the tensor which another one reads too.
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "up_proj"}
# Architectures whose MLP has no gate.
WITHOUT_GATE = {
    "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt",
    "opt", "phi", "starcoder2",
}  # fmt: skip


@dataclass(frozen=True)
class RowMemory:
    """What a row of a microbatch takes until its gradients are clipped, by its padded length alone.

    Attributes:
        held: bytes of a token that the forward pass keeps and the backward pass lets go of, layer
            by layer, while it makes gradients.
        working: bytes of a token that a layer needs meanwhile.
        matrices: (count, d_in, d_out) of the LoRA matrices whose per-example gradients are kept.
    """

    held: int = 1
    working: int = 0
    matrices: tuple[tuple[int, int, int], ...] = ()

    def kept(self, tokens: int) -> int:
        """Bytes of the row's gradients; of each matrix what `dp_utils.instantiates` says."""
        return FLOAT * sum(
            count * min(d_in * d_out, tokens * (d_in + d_out))
            for count, d_in, d_out in self.matrices
        )

    def of(self, tokens: int) -> int:
        """Bytes of the row at their height, either when the backward pass begins or at its end."""
        return max(tokens * self.held, self.kept(tokens)) + tokens * self.working


@dataclass(frozen=True)
class Architecture:
    """The shapes of a decoder whose layers are all alike.

    Attributes:
        hidden, inner, query, key_value: features of a token between layers, within an MLP, of all
            its queries, and of all its keys.
        gated: whether an MLP has a gate next to its first layer.
        tied: whether the head is the embedding.
    """

    hidden: int
    layers: int
    inner: int
    query: int
    key_value: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> "Architecture | None":
        """What a `config.json` describes; None if it does not say enough."""
        nested = config.get("text_config")
        if isinstance(nested, Mapping):
            config = nested

        def number(*names: str) -> int:
            found = (config.get(name) for name in names)
            return next((each for each in found if isinstance(each, int) and each), 0)

        hidden = number("hidden_size", "n_embd", "d_model")
        layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        heads = number("num_attention_heads", "n_head", "n_heads")
        vocabulary = number("vocab_size")
        if not (hidden and layers and heads and vocabulary):
            return None
        head = number("head_dim") or hidden // heads
        return cls(
            hidden=hidden,
            layers=layers,
            inner=number("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
            query=heads * head,
            key_value=(number("num_key_value_heads") or heads) * head,
            vocabulary=vocabulary,
            gated=config.get("model_type") not in WITHOUT_GATE,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the Linear layers of one layer, under LLaMA's names."""
        d, inner = self.hidden, self.inner
        shapes = {
            "q_proj": (d, self.query), "k_proj": (d, self.key_value),
            "v_proj": (d, self.key_value), "o_proj": (self.query, d),
            "gate_proj": (d, inner), "up_proj": (d, inner), "down_proj": (inner, d),
        }  # fmt: skip
        return {name: s for name, s in shapes.items() if self.gated or name != "gate_proj"}

    @property
    def layer_parameters(self) -> int:
        """Of all layers: their Linear layers and two norms each."""
        of_one = sum(d_in * d_out for d_in, d_out in self.linears.values())
        return self.layers * (of_one + 2 * self.hidden)

    @property
    def whole_parameters(self) -> int:
        """Of embeddings, head and last norm, which every process holds whole."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden


LLAMA = {
    "7b": Architecture(4096, 32, 11_008, 4096, 4096, 32_000),
    "13b": Architecture(5120, 40, 13_824, 5120, 5120, 32_000),
    "70b": Architecture(8192, 80, 28_672, 8192, 1024, 32_000),
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What of a run decides its memory on one device.

    Attributes:
        rank: of the adapters.
        frozen_a: whether only B is trained.
        target_modules: LLaMA's names, or all-linear; empty for the attention projections. Any
            other name counts as all-linear, which takes the most.
        itemsize: bytes of a number of the base and of its activations, 2 or 4.
        bits: of a weight of a quantised base.
        is_private: whether per-example gradients are kept.
        units_at_once: whose sums are kept.
        copies: float32 numbers of each trained one, with itself: the optimizer's, an average.
        shards: devices that share the layers of the base.
    """

    architecture: Architecture
    rank: int
    max_seq_len: int
    frozen_a: bool = False
    target_modules: tuple[str, ...] = ()
    itemsize: int = 2
    bits: int | None = None
    gradient_checkpointing: bool = False
    is_private: bool = True
    units_at_once: int = 0
    copies: int = 3
    shards: int = 1

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the adapted Linear layers of one layer."""
        linears, targets = self.architecture.linears, self.target_modules or ATTENTION
        if not set(targets) <= linears.keys():
            return linears
        return {name: linears[name] for name in targets}

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(count * d_in * d_out for count, d_in, d_out in self.matrices)

    @property
    def matrices(self) -> tuple[tuple[int, int, int], ...]:
        """(count, d_in, d_out) of the LoRA matrices that are trained."""
        layers, rank = self.architecture.layers, self.rank
        lasts = [(layers, rank, d_out) for _, d_out in self.adapted.values()]
        return (*(() if self.frozen_a else self._firsts), *lasts)

    @property
    def _firsts(self) -> list[tuple[int, int, int]]:
        """`matrices` of LoRA's A."""
        return [(self.architecture.layers, d_in, self.rank) for d_in, _ in self.adapted.values()]

    @property
    def weights(self) -> float:
        """Bytes of the base, and of one matrix in full where it is unpacked to be used."""
        shape = self.architecture
        each = {None: self.itemsize, 8: 1, 4: NF4_BYTES}[self.bits]
        # Its shard, the layer at work, and the next one.
        share = 1 if self.shards == 1 else min(1, 1 / self.shards + 2 / shape.layers)
        unpacked = max(d_in * d_out for d_in, d_out in shape.linears.values()) if self.bits else 0
        whole = self.itemsize * (shape.whole_parameters + unpacked)
        return each * shape.layer_parameters * share + whole

    @property
    def adapters(self) -> int:
        """Bytes of the adapters and of what is kept for each of their numbers all the time."""
        frozen = sum(count * d_in * rank for count, d_in, rank in self._firsts if self.frozen_a)
        # One copy more is the sum of a step.
        return FLOAT * (self.trained * (self.copies + 1 + self.units_at_once) + frozen)

    @property
    def row(self) -> RowMemory:
        """What a row takes in the forward and backward pass.

        Frozen Linear layers keep nothing. Kept are float32 inputs of norms, what attention and
        the MLP's products need, and the adapters' inputs; with checkpointing the input of each
        layer, and one layer in full. What a layer works with was measured to be a quarter of what
        it keeps.
        """
        shape, adapted = self.architecture, self.adapted
        inputs = {SAME_INPUT.get(name, name): d_in for name, (d_in, _) in adapted.items()}
        layer = (
            2 * FLOAT * shape.hidden
            + self.itemsize * 2 * (shape.query + shape.key_value)
            + self.itemsize * (3 if shape.gated else 2) * shape.inner
            + self.itemsize * (sum(inputs.values()) + self.rank * len(adapted))
        )
        working = layer // 4
        if self.gradient_checkpointing:
            held, working = shape.layers * self.itemsize * shape.hidden, layer + working
        else:
            held = shape.layers * layer
        return RowMemory(held, working, self.matrices if self.is_private else ())

    @property
    def logits(self) -> int:
        """Bytes of a chunk of logits, and of the one float32 buffer more."""
        most = min(CHUNK_ELEMENTS, self.max_seq_len * self.architecture.vocabulary)
        return most * (2 * self.itemsize + FLOAT if self.itemsize < FLOAT else 2 * FLOAT)

    def total(self, sequences: int) -> float:
        """Bytes at their height, with so many sequences of the greatest length at once."""
        passing = sequences * self.row.of(self.max_seq_len) + self.logits
        releasing = RELEASE_BYTES * self.trained if self.is_private else 0
        return self.weights + self.adapters + max(passing, releasing)

    def fits(self, sequences: int, card: int) -> bool:
        """Whether so many sequences at once fit on a card of so many GiB."""
        return self.total(sequences) <= USABLE_SHARE * card * GIB

    def most_sequences(self, card: int) -> int:
        """The most sequences at once that fit on a card of so many GiB; 0 for none."""
        left = USABLE_SHARE * card * GIB - self.weights - self.adapters - self.logits
        most = int(left // self.row.of(self.max_seq_len))
        return most if most > 0 and self.fits(most, card) else 0


def remedy(training: Training, sequences: int, card: int) -> str | None:
    """The flags to change so that a run fits on a card of so many GiB; None if nothing helps.

    Args:
        sequences: --perdevice_bs.
    """
    for flags, changed in _alternatives(training):
        if most := min(sequences, changed.most_sequences(card)):
            lower = [f"--perdevice_bs {most}"] if most < sequences else []
            return " ".join([*lower, *flags])
    return None


def _alternatives(training: Training) -> Iterator[tuple[Sequence[str], Training]]:
    """Changes to a run that take ever more from it, with their flags."""
    checkpointed = replace(training, gradient_checkpointing=True)
    saving = [] if training.gradient_checkpointing else ["--gradient_checkpointing"]
    yield [], training
    yield saving, checkpointed
    if training.itemsize == FLOAT:
        checkpointed = replace(checkpointed, itemsize=2)
        saving = [*saving, "--dtype bfloat16"]
        yield saving, checkpointed
    if training.shards == 1 and training.bits is None:
        for bits in (8, 4):
            yield [*saving, f"--load_in_{bits}bit"], replace(checkpointed, bits=bits)
    shorter = replace(checkpointed, max_seq_len=max(1, training.max_seq_len // 2))
    yield [*saving, f"--max_seq_len {shorter.max_seq_len}"], shorter
