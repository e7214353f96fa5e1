"""Memory per GPU and time per logical step of models that were not run here, as arithmetic.

    python -m benchmarks.projection

Prints the tables of docs/scaling.md, which states the formulas. Nothing here is measured but the
noise: the rest is counted from shapes, published peaks, and an assumed utilisation.
"""

from itertools import product

from benchmarks.figures import markdown
from utils.cli import run_cli
from utils.command_line.parser import make_parser
from utils.models.footprint import LLAMA, NF4_BYTES, Architecture, Training

# An A100 SXM with 80 GB: published bf16 peak, and what training is assumed to reach of it.
PEAK_FLOPS, UTILISATION, GPU_BYTES = 312e12, 0.35, 80e9
# Bytes per second that one GPU receives: NVLink within a machine of 8 GPUs, 25 GB/s for each of
# its 8 network cards beyond; and what is assumed to be reached of both.
NVLINK, NETWORK, BANDWIDTH_REACHED, GPUS_PER_MACHINE = 300e9, 25e9, 0.7, 8
# Measured on 2 cores: docs/log.md.
NOISE_PER_SECOND = 10e6 / 0.24
# The paper's setting, on instructions of 116 tokens on average.
BATCH, MEAN_TOKENS, MICROBATCH_TOKENS, RANK = 4096, 116, 4096, 8
# Parameter, gradient, two moments, own sum, reduced sum (4 bytes each); noised and divided (8).
ADAPTER_BYTES = 6 * 4 + 2 * 8
LOGITS_BYTES = 3 * 128 * 2**20
GPUS = (1, 2, 4, 8, 16, 32, 64)


SHAPES = {name.upper(): shape for name, shape in LLAMA.items()}


def adapter_parameters(shape: Architecture) -> int:
    """LoRA on q, k, v, o."""
    return Training(architecture=shape, rank=RANK, max_seq_len=MICROBATCH_TOKENS).trained


def activation_bytes(shape: Architecture) -> int:
    """Of a token in one layer, kept for the backward pass.

    In bf16 the inputs and outputs of norms, projections, attention and MLP; in float32 the
    inputs of the four adapters, each with dropout of its own.
    """
    d = shape.hidden
    return 2 * (7 * d + 2 * shape.key_value + 4 * shape.inner) + 4 * 4 * d


def memory(shape: Architecture, gpus: int, base: str) -> float:
    """Bytes on one GPU, with gradient checkpointing.

    Args:
        base: "whole" (bf16), "sharded" (bf16, FSDP2) or "4-bit" (whole).
    """
    if base == "4-bit":
        weights = NF4_BYTES * shape.layer_parameters
    elif base == "sharded" and gpus > 1:
        # Its shard, the layer at work, and the next one on its way.
        weights = 2 * shape.layer_parameters * (1 / gpus + 2 / shape.layers)
    else:
        weights = 2 * shape.layer_parameters
    examples = MICROBATCH_TOKENS / MEAN_TOKENS
    # Checkpoints between layers, and one layer's activations in full.
    activations = MICROBATCH_TOKENS * (2 * shape.hidden * shape.layers + activation_bytes(shape))
    return (
        weights
        + 2 * shape.whole_parameters
        + adapter_parameters(shape) * (ADAPTER_BYTES + 4 * examples)
        + activations
        + LOGITS_BYTES
    )


def seconds_per_step(shape: Architecture, gpus: int, *, sharded: bool) -> float:
    """Time of one logical step, with gradient checkpointing."""
    parameters = shape.layer_parameters + shape.whole_parameters
    # 2 each for the forward pass, its recomputation and the gradient of activations; the frozen
    # weights have none.
    flops = BATCH * MEAN_TOKENS * 6 * parameters
    computing = flops / (gpus * PEAK_FLOPS * UTILISATION)
    link = BANDWIDTH_REACHED * (NVLINK if gpus <= GPUS_PER_MACHINE else NETWORK)
    part_elsewhere = (gpus - 1) / gpus
    if sharded:
        # Layers are gathered for each forward and each backward pass, behind the computation.
        passes = 2 * BATCH * MEAN_TOKENS / MICROBATCH_TOKENS / gpus
        gathering = passes * 2 * shape.layer_parameters * part_elsewhere / link
        computing = max(computing, gathering)
    reducing = 2 * 4 * adapter_parameters(shape) * part_elsewhere / link
    return computing + reducing + adapter_parameters(shape) / NOISE_PER_SECOND


def tables() -> str:
    """Both tables in one, in Markdown."""
    headings = ["model", "GPUs", "whole, GB", "sharded, GB", "4-bit, GB", "whole, s/step",
                "sharded, s/step"]  # fmt: skip
    rows = []
    for (name, shape), gpus in product(SHAPES.items(), GPUS):
        needed = {base: memory(shape, gpus, base) for base in ("whole", "sharded", "4-bit")}
        fits = {base: amount <= GPU_BYTES for base, amount in needed.items()}
        cells = [f"{needed[b] / 1e9:.1f}" if fits[b] else "does not fit" for b in needed]
        for base in ("whole", "sharded"):
            seconds = seconds_per_step(shape, gpus, sharded=base == "sharded")
            cells.append(f"{seconds:.0f}" if fits[base] else "")
        rows.append([name, str(gpus), *cells])
    return markdown(headings, rows)


def main(argv: list[str] | None = None) -> None:
    make_parser(__doc__).parse_args(argv)
    print(tables())


if __name__ == "__main__":
    run_cli(main)
