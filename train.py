"""Fine-tune a causal language model with LoRA, with or without differential privacy.

    accelerate launch train.py --dataset_name quickstart_instructions \\
        --model_name data/quickstart_model --job_sess mine --prompt_style uncond_generation \\
        --eps 8 --delta 1e-5 --clip 1.0 --loss_normalization tokens --max_seq_len 128

`generate_train_command.py` prints this line with the noise multiplier filled in. The run is
written to outputs/JOB_SESS: adapter/, privacy_report.json and .md, checkpoints/, and private/ for
everything that the guarantee does not cover. A stopped run goes on with --resume auto.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather, reduce
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UsageError, in_one_line, run_cli, say
from utils.command_line.parser import make_parser, run_folder
from utils.command_line.training_flags import (
    add_training_arguments,
    check_training_arguments,
    module_settings,
    quantised_bits,
)
from utils.dp_utils import PerExampleGradients, add_noise, assign_gradient, flatten_gradients
from utils.files import JsonlAppender, write_atomic
from utils.folders import whole_folder
from utils.models.adapter_info import write_adapter_info
from utils.models.language_model import LanguageModel
from utils.models.loading import (
    load_base_model,
    load_quantised_model,
    load_tokenizer,
    model_fingerprint,
    quiet_libraries,
    resolve_dtype,
    share_cores,
)
from utils.models.lora import attach_lora, default_target_modules
from utils.models.losses import normalise
from utils.models.memory import fitting_sequences
from utils.privacy.guarantee import build_report, write_report
from utils.privacy.ledger import LEDGER_FILE, Ledger, read_plan
from utils.privacy.plan import PrivacyPlan, num_steps, plan_from_arguments
from utils.runs.batching import cut_microbatches, poisson_batch, shuffled_batch
from utils.runs.checkpointing import Checkpoint, load_last_good, restore_adapter, save_checkpoint
from utils.runs.distributed import (
    is_loss_of_a_rank,
    on_main_process,
    require_same_on_every_rank,
    require_same_tensors,
    shard_base,
)
from utils.runs.run_folder import begin, holds_run, model_card, require_usable
from utils.runs.stopping import StopRequest, launched_by_accelerate
from utils.secure_random import SecureRandom
from utils.texts.canaries import require_whole_canaries, with_canaries
from utils.texts.data_sets import load_splits
from utils.texts.tokens import TokenisedExamples, open_tokens, tokenise

# Flags that may differ between the machines of a job; what they lead to is compared by itself.
DIFFERS_BY_MACHINE = {"dataset_name", "model_name", "output_dir", "report_to"}


def build_parser() -> argparse.ArgumentParser:
    """The command line of the training run."""
    parser = make_parser(__doc__)
    add_training_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # What saves the work, once there is some, if another process of the job is lost.
    rescue: list[Callable[[], None]] = []
    try:
        return fine_tune(args, rescue)
    except RuntimeError as error:
        if not is_loss_of_a_rank(error):
            raise
        for save in rescue:
            save()
        reason = in_one_line(error, 160)
        say(
            "error: another process of this job has ended, so this one ends too; the same command "
            f"with --resume auto continues {run_folder(args)} ({reason})"
        )
        return EXIT_FAILED


def fine_tune(args: argparse.Namespace, rescue: list[Callable[[], None]]) -> int:
    """The run: setup, the loop, the end. Returns the exit code."""
    # ------------------------------------------------------------------ what is asked for
    notices = check_training_arguments(args)
    folder = run_folder(args)
    require_usable(folder, args)
    splits = load_splits(args.dataset_name)
    num_rows = len(splits["train"])
    if args.num_train_examples not in (None, num_rows):
        raise UsageError(
            f"--num_train_examples {args.num_train_examples}, but the train split of "
            f"{args.dataset_name} has {num_rows}: the guarantee was computed for another N"
        )
    splits["train"] = with_canaries(splits["train"], args)
    num_examples = len(splits["train"])
    plan, plan_notices = plan_from_arguments(args, num_examples)
    steps = plan.steps if plan else num_steps(args.num_epochs, num_examples, args.total_bs)
    if (folder / LEDGER_FILE).exists():
        plan.require_same(read_plan(folder / LEDGER_FILE), str(folder))

    accelerator = make_accelerator(args, folder)
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    if on_main_process((folder / "adapter").exists):
        if is_main:
            say(f"{folder} is finished already: its adapter is in {folder / 'adapter'}")
        return EXIT_OK
    start_tracker(accelerator, args, folder)
    sharded = args.fsdp and num_ranks > 1
    if args.fsdp and not sharded:
        notices.append("--fsdp: a single process shards nothing")
    if is_main:
        for notice in notices + plan_notices:
            say(f"warning: {notice}")

    # ------------------------------------------------------------------ model and data
    quiet_libraries()
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model_name)
    if "val" in splits:
        shown = min(len(splits["val"]), args.max_eval_examples)
        splits["val"] = splits["val"].select(range(shown))
    data = tokenise_once(splits, tokenizer, args, accelerator, folder)
    train_data, lengths = data["train"], data["train"].lengths
    require_whole_canaries(lengths, args)

    dtype, bits = resolve_dtype(args.dtype, device), quantised_bits(args)
    base = load_base_model(args.model_name, dtype)
    fingerprint = model_fingerprint(base)  # of the base as it is, quantised or not
    facts = {
        "base model": fingerprint,
        "training data": train_data.fingerprint(),
        "validation data": data["val"].fingerprint() if "val" in data else None,
        "privacy plan": plan and plan.digest(),
    }
    facts |= {f"--{name}": vars(args)[name] for name in vars(args).keys() - DIFFERS_BY_MACHINE}
    require_same_on_every_rank(facts)
    if bits:
        base = load_quantised_model(args.model_name, dtype, bits, device)
    targets = args.target_modules or default_target_modules(base)
    model = attach_lora(
        base,
        args.lora_r,
        args.lora_alpha,
        args.lora_dropout,
        "all-linear" if targets == ["all-linear"] else targets,
        args.gradient_checkpointing,
        use_rslora=args.use_rslora,
        rank_pattern=module_settings(args.rank_pattern, int),
        alpha_pattern=module_settings(args.alpha_pattern, float),
    )
    targets = sorted(model.peft_config["default"].target_modules)  # all-linear spelt out
    if sharded:
        shard_base(model, device)
    model.to(device)
    language_model = LanguageModel(base)
    gradients = PerExampleGradients(model)
    if plan:
        require_coverage(gradients, language_model)
    trainable = gradients.parameters
    optimizer = torch.optim.AdamW(trainable.values(), lr=args.lr, weight_decay=args.wd)
    scheduler = transformers.get_scheduler(args.lr_scheduler, optimizer, args.warmup_steps, steps)

    total = torch.zeros(gradients.num_parameters, device=device)

    def add_microbatch(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Add clipped per-example gradients to `total`; plain ones to .grad without privacy.

        Returns summed losses, numbers of tokens with loss, and norms, each [examples].
        """
        examples = len(batch["lengths"])
        with gradients.capture(examples) if plan else nullcontext():
            sums, counts = language_model.example_losses(batch)
            losses = normalise(sums, counts, args.loss_normalization, args.max_seq_len)
            losses.sum().backward()
        norms = gradients.add_clipped_sum(total, args.clip, args.clip_function) if plan else None
        return sums.detach(), counts, norms

    sequences = args.perdevice_bs
    if sequences == "auto":
        model.train()
        sequences = fitting_batch(add_microbatch, language_model, args.max_seq_len, accelerator)
    token_budget = sequences * args.max_seq_len

    # ------------------------------------------------------------------ begin, or continue
    ledger = private_log = None

    def begin_or_continue() -> Checkpoint | None:
        nonlocal ledger, private_log
        checkpoint = load_last_good(folder / "checkpoints") if holds_run(folder) else None
        identity = {"base_model_fingerprint": fingerprint, "lora_target_modules": targets}
        begin(folder, args, identity, private_identity={"training_data": facts["training data"]})
        ledger = Ledger(folder / LEDGER_FILE, plan) if plan else None
        private_log = JsonlAppender(folder / "private" / "metrics.jsonl")
        if checkpoint and ledger:
            ledger.require_head(checkpoint.state["ledger"])
        elif ledger and ledger.steps_recorded:
            say(f"warning: {folder} has no whole checkpoint; starting again from step 0")
        return checkpoint

    # The other machines of a job may not see the folder.
    checkpoint = on_main_process(begin_or_continue)
    step = 0
    if checkpoint:
        step = checkpoint.state["step"]
        restore_adapter(trainable, checkpoint.adapter)
        optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
        scheduler.load_state_dict(checkpoint.optimizer["scheduler"])
    # Fresh keys at every process start: a resumed run never repeats noise or draws.
    secure = {stream: SecureRandom() for stream in ("sampling", "dropout", "noise")}

    def randomness(stream: str) -> SecureRandom:
        if args.insecure_fixed_noise_seed is not None:
            return SecureRandom.insecure_fixed(args.insecure_fixed_noise_seed, stream, step)
        return secure[stream]

    def write_checkpoint() -> None:
        if is_main:
            state = {"ledger": ledger.head if ledger else None}
            states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            checkpoints = folder / "checkpoints"
            save_checkpoint(checkpoints, step, trainable, states, state, args.keep_checkpoints)

    def save() -> None:
        require_same_tensors(trainable)
        write_checkpoint()

    # Tensors and `step` change together, between two messages to other processes.
    rescue.append(write_checkpoint)

    def stop_asked() -> bool:
        """Whether this process, or with a sharded base any, was asked to stop."""
        if not sharded:
            return stop.requested
        return bool(reduce(torch.tensor(float(stop.requested), device=device), "max"))

    def own_share(ranks: list[list[np.ndarray]]) -> list[np.ndarray | None]:
        """This rank's microbatches; with a sharded base all ranks have equally many, some None."""
        idle = max(map(len, ranks)) - len(ranks[rank]) if sharded else 0
        return ranks[rank] + [None] * idle

    def log(values: dict) -> None:
        """Record values computed from private data, under private/."""
        if is_main:
            private_log.append([{"step": step, **values}])
            if args.report_to != "wandb" or not plan or args.report_private_metrics:
                accelerator.log(values, step=step)

    def evaluate() -> None:
        if "val" in data:
            microbatches = cut_microbatches(
                np.arange(len(data["val"])), data["val"].lengths, token_budget, num_ranks
            )
            loss = validation_loss(
                language_model, data["val"], own_share(microbatches), device, stop_asked
            )
            if loss is not None and is_main:
                log({"validation_loss": loss})
                tqdm.write(f"step {step}: validation loss {loss:.4f} (private)", file=sys.stderr)

    if is_main:
        say_start(plan, steps, step, num_examples, gradients.num_parameters, folder)
    stop = StopRequest()
    progress = tqdm(total=steps, initial=step, desc="train", unit="step", disable=not is_main)
    if step == 0 and not args.no_eval_at_start:
        evaluate()

    # ------------------------------------------------------------------ the loop
    saved_at = step if checkpoint else -1
    moved = step > 0
    while step < steps:
        began = time.monotonic()
        if plan:
            # Which mask an example gets depends on who else is in its microbatch, so masks that
            # anybody can work out would let one example move the clipped sum by many times C.
            # Secret ones are independent of the data: given them, it moves by at most C.
            torch.manual_seed(int(randomness("dropout").uint64(1)[0] >> 1) ^ rank)
        else:
            torch.manual_seed(public_dropout_seed(args.seed, step, rank))
        model.train()

        # Draw: once for the whole job, then split over ranks and microbatches.
        if plan:
            drawn = [poisson_batch(num_examples, args.total_bs, randomness("sampling"))]
        else:
            drawn = [shuffled_batch(num_examples, args.total_bs, args.seed, step)]
        (indices,) = broadcast_object_list(drawn)
        microbatches = own_share(cut_microbatches(indices, lengths, token_budget, num_ranks))

        # Sum of clipped per-example gradients (of plain ones in a run without privacy).
        total.zero_()
        optimizer.zero_grad()
        all_norms, loss_sum, loss_tokens = [], 0.0, 0
        for microbatch in microbatches:
            if stop_asked():
                break
            if microbatch is None:
                language_model.idle_pass()
                continue
            batch = train_data.collate(microbatch, tokenizer.pad_token_id, device)
            sums, counts, norms = add_microbatch(batch)
            if plan:
                all_norms.append(norms)
            loss_sum += sums.nansum()
            loss_tokens += counts.sum()
        if not plan:
            total.copy_(flatten_gradients(trainable))

        # Reduce over ranks. A stop asked of one rank abandons the step on all of them.
        if reduce(torch.tensor(float(stop.requested), device=device), "max"):
            break
        gradient = reduce(total, "sum")

        # Noise: once for the whole job, and on record before anybody can see its result.
        if plan:
            if is_main:
                ledger.record_step(step + 1)
                sigma, clip_norm = plan.noise_multiplier, plan.clip_norm
                gradient = add_noise(gradient, sigma, clip_norm, randomness("noise"))
            gradient = broadcast(gradient.double())

        # Divide by the public batch size, and step.
        assign_gradient(trainable, gradient / args.total_bs)
        before = None if moved else [tensor.detach().clone() for tensor in trainable.values()]
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        step += 1
        if not moved and learning_rate > 0:
            require_movement(before, trainable)
            moved = True

        # Tell the owner, and save.
        sums = torch.tensor([float(loss_sum), float(loss_tokens)], device=device)
        loss_sum, loss_tokens = reduce(sums, "sum").tolist()
        real_tokens, seconds = int(lengths[indices].sum()), time.monotonic() - began
        log(
            {
                "train_loss": loss_sum / max(1.0, loss_tokens),
                "learning_rate": learning_rate,
                "batch_size": len(indices),
                "real_tokens": real_tokens,
                "seconds": seconds,
                **clipping_summary(all_norms, args.clip),
            }
        )
        progress.set_postfix_str(f"{real_tokens / seconds:.0f} real tokens/s")
        progress.update()
        epochs_done = step * args.total_bs // num_examples
        if step == steps or epochs_done > (step - 1) * args.total_bs // num_examples:
            evaluate()
        if step % args.save_steps == 0 and step < steps:
            try:
                save()
                saved_at = step
            except OSError as error:
                say(f"warning: no checkpoint at step {step}: {error}; training goes on")
    progress.close()

    # ------------------------------------------------------------------ the end
    finished = step == steps
    # A checkpoint that the main process could not write may differ from what others believe.
    if on_main_process(lambda: saved_at != step):
        save()
    if is_main:
        report = build_report(
            plan,
            steps_taken=step,
            steps_recorded=ledger.steps_recorded if ledger else 0,
            ledger_head=ledger.head if ledger else None,
            insecure=args.insecure_fixed_noise_seed is not None,
        )
        write_report(folder, report)
        if finished:
            save_adapter(model, args, folder / "adapter", fingerprint, report)
        private_log.close()
        if ledger:
            ledger.close()
        say_end(folder, report, finished, stop.signal_name)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return EXIT_OK if finished else EXIT_INTERRUPTED


def make_accelerator(args: argparse.Namespace, folder: Path) -> Accelerator:
    """Accelerate's state of this process."""
    # Without a GPU, processes find each other only where accelerate is told to use the CPU.
    cpu = not torch.accelerator.is_available()
    tracker = None if args.report_to == "none" else args.report_to
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UsageError(f"--report_to {tracker}: pip install {tracker}")
    accelerator = Accelerator(cpu=cpu, log_with=tracker, project_dir=folder / "private")
    if cpu and launched_by_accelerate():
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return accelerator


def start_tracker(accelerator: Accelerator, args: argparse.Namespace, folder: Path) -> None:
    """Start the tracker that was asked for; it writes under private/."""
    if args.report_to == "none" or not accelerator.is_main_process:
        return
    private = folder / "private"
    os.environ.setdefault("TRACKIO_DIR", str(private / "trackio"))
    private.mkdir(parents=True, exist_ok=True)
    options = {"wandb": {"dir": str(private), "name": args.job_sess}}
    accelerator.init_trackers(args.job_sess, init_kwargs=options)


def tokenise_once(
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, TokenisedExamples]:
    """Tokenise on one process of each machine, into files that all of its processes map.

    The files are gone as soon as all have them open: nothing of the data stays in the run's folder.
    """
    first = accelerator.process_index - accelerator.local_process_index
    place = folder / "private" / f"tokens-{first}"
    try:
        if accelerator.is_local_main_process:
            for split, rows in splits.items():
                hidden = not accelerator.is_main_process
                rows = tqdm(rows, f"tokenise {split}", unit="row", disable=hidden, leave=False)
                tokenise(rows, tokenizer, args.prompt_style, args.max_seq_len, place / split)
        accelerator.wait_for_everyone()
        data = {split: open_tokens(place / split) for split in splits}
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_local_main_process:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # Folders that hold something else stay.
                for made in (folder / "private", folder, folder.parent):
                    made.rmdir()
    return data


def fitting_batch(
    add_microbatch: Callable,
    language_model: LanguageModel,
    max_seq_len: int,
    accelerator: Accelerator,
) -> int:
    """--perdevice_bs auto: as many sequences of `max_seq_len` as fit on every device."""

    def step(sequences: int) -> None:
        add_microbatch(language_model.public_batch(sequences, max_seq_len))

    count = torch.tensor([fitting_sequences(step, accelerator.device)], device=accelerator.device)
    count = int(gather(count).min())
    if accelerator.is_main_process:
        say(f"--perdevice_bs auto: {count} sequences of {max_seq_len} tokens fit on a device")
    return count


def public_dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed from (seed, step, rank) alone, so that a resumed run without privacy repeats it."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@torch.no_grad()
def validation_loss(
    language_model: LanguageModel,
    data: TokenisedExamples,
    microbatches: list[np.ndarray | None],
    device: torch.device,
    stop_asked: Callable[[], bool],
) -> float | None:
    """Mean loss in nats per token with loss, over all ranks; None if a stop was asked for.

    Args:
        microbatches: of this rank; None is a pass that only keeps pace with other ranks.
    """
    language_model.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for microbatch in microbatches:
        if stop_asked():
            sums[2] = 1
            break
        if microbatch is None:
            language_model.example_losses(language_model.public_batch(1))
            continue
        losses, counts = language_model.example_losses(data.collate(microbatch, 0, device))
        sums[0] += losses.sum()
        sums[1] += counts.sum()
    loss, tokens, stopped = reduce(sums, "sum").tolist()
    return None if stopped else loss / max(1.0, tokens)


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


def require_movement(before: list[torch.Tensor], trainable: dict[str, torch.Tensor]) -> None:
    """Raise unless the first step moved every trainable tensor that it had a gradient for."""
    for old, (name, tensor) in zip(before, trainable.items()):
        # Without noise the gradient of LoRA's A is zero as long as B is.
        if tensor.grad.any() and torch.equal(old, tensor):
            raise RuntimeError(f"{name} did not move in the first step: it is not being trained")
    if not any(tensor.grad.any() for tensor in trainable.values()):
        raise RuntimeError("every gradient of the first step is zero: nothing is being trained")


def clipping_summary(norms: list[torch.Tensor], clip_norm: float) -> dict:
    """Quantiles of the per-example gradient norms, and what was clipped: for private/ alone."""
    if not norms:
        return {}
    norms = torch.cat(norms)
    finite = norms[torch.isfinite(norms)]
    if not len(finite):
        return {"non_finite": len(norms)}
    quantiles = torch.quantile(finite, torch.tensor([0.1, 0.5, 0.9], device=finite.device))
    return {
        "norm_quantiles_10_50_90": [round(value, 5) for value in quantiles.tolist()],
        "clipped_fraction": (finite > clip_norm).float().mean().item(),
        "non_finite": len(norms) - len(finite),
    }


def save_adapter(
    model: PeftModel, args: argparse.Namespace, final: Path, fingerprint: str, report: dict
) -> None:
    """Write the adapter, its model card and its training style, in one piece."""
    info = {
        "prompt_style": args.prompt_style,
        "max_seq_len": args.max_seq_len,
        "base_model": args.model_name,
        "base_model_fingerprint": fingerprint,
        "base_model_bits": quantised_bits(args),
    }
    card = model_card(args.model_name, args.prompt_style, report, str(final))
    with whole_folder(final) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        write_adapter_info(temporary, info)
        write_atomic(temporary / "README.md", card)


def say_start(
    plan: PrivacyPlan | None,
    steps: int,
    step: int,
    num_examples: int,
    num_parameters: int,
    folder: Path,
) -> None:
    """Tell what will be done."""
    say(f"{num_parameters:,} trainable parameters, {num_examples:,} examples, {steps:,} steps")
    if plan:
        say(
            f"({plan.target_epsilon:g}, {plan.delta:g})-DP: sampling rate "
            f"{plan.sampling_rate:.3g}, noise multiplier {plan.noise_multiplier:g}, "
            f"clip norm {plan.clip_norm:g}"
        )
    else:
        say("NO differential privacy (--eps -1)")
    if step:
        say(f"continuing {folder} after step {step:,}")


def say_end(folder: Path, report: dict, finished: bool, stopped_by: str) -> None:
    """Tell what was done, and where it is."""
    if not finished:
        say(f"stopped by {stopped_by}; the same command with --resume auto continues {folder}")
        return
    if report["guarantee"]:
        say(f"epsilon {report['epsilon']['upper']:.3f} at delta {report['delta']:g}")
    say(f"adapter {folder / 'adapter'}, report {folder / 'privacy_report.md'}")


if __name__ == "__main__":
    run_cli(main)
