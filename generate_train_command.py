"""Plan a training run and print the one command that starts it.

    python generate_train_command.py --dataset_name quickstart_instructions \\
        --model_name data/quickstart_model --job_sess mine --prompt_style uncond_generation \\
        --eps 8 --delta 1e-5 --clip 1.0 --loss_normalization tokens --max_seq_len 128

Counts the training examples, computes the noise multiplier that --eps and --delta need, and
prints an `accelerate launch` line on stdout; what it means goes to stderr. Paste the line, run it
with `bash -c "$(python generate_train_command.py ...)"`, or add --run.
"""

import argparse

from utils.cli import UsageError, run_cli, say
from utils.command_line.launch import DEFAULT_PORT, launch_command, print_or_run
from utils.command_line.parser import make_parser, natural_int, positive_int, run_folder, to_argv
from utils.command_line.training_flags import add_training_arguments, check_training_arguments
from utils.privacy.plan import PrivacyPlan, num_steps, plan_from_arguments
from utils.runs.run_folder import require_usable
from utils.texts.canaries import num_canary_rows
from utils.texts.data_sets import count_train_examples, tried_places


def build_parser() -> argparse.ArgumentParser:
    """The training run's flags, and those of the launch."""
    parser = make_parser(__doc__)
    add_training_arguments(parser)
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--gpus", type=positive_int, default=1, help="GPUs of each machine, one process per GPU"
    )
    group.add_argument(
        "--num_machines",
        type=positive_int,
        default=1,
        help="machines of the job; each needs its own line, which differs in --machine_rank alone",
    )
    group.add_argument(
        "--machine_rank", type=natural_int, default=0, help="the machine this line is for, from 0"
    )
    group.add_argument(
        "--main_process_ip", default=None, help="address of machine 0, as the others see it"
    )
    group.add_argument(
        "--main_process_port",
        type=positive_int,
        default=None,
        help=f"its port; {DEFAULT_PORT} with several machines, any free one otherwise",
    )
    group.add_argument("--run", action="store_true", help="run the command; pass on its exit code")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    warnings = check_training_arguments(args)
    found = count_train_examples(args.dataset_name)
    elsewhere = args.num_train_examples is not None
    if found is None and not elsewhere:
        raise UsageError(
            f"{tried_places(args.dataset_name)}. Where it is on the hub or on another machine, "
            "state its size with --num_train_examples"
        )
    if found is None:
        warnings.append(f"{args.dataset_name} is not here; it must be where the command runs")
    elif elsewhere and found != args.num_train_examples:
        raise UsageError(
            f"--num_train_examples {args.num_train_examples}, but {args.dataset_name} has {found}"
        )
    args.num_train_examples = found or args.num_train_examples
    require_usable(run_folder(args), args)
    num_examples = args.num_train_examples + num_canary_rows(args)
    plan, plan_warnings = plan_from_arguments(args, num_examples)
    if plan:
        args.noise_multiplier = plan.noise_multiplier

    for warning in warnings + plan_warnings:
        say(f"warning: {warning}")
    say_summary(args, plan, num_examples)
    train_parser = make_parser("")
    add_training_arguments(train_parser)
    command = launch_command(
        "train.py",
        to_argv(train_parser, args),
        args.gpus,
        args.num_machines,
        args.machine_rank,
        args.main_process_ip,
        args.main_process_port,
    )
    return print_or_run(command, args.run)


def say_summary(args: argparse.Namespace, plan: PrivacyPlan | None, num_examples: int) -> None:
    """Tell on stderr what the command will do."""
    steps = plan.steps if plan else num_steps(args.num_epochs, num_examples, args.total_bs)
    canaries = num_canary_rows(args)
    counted = f", of which {canaries:,} rows of canaries" if canaries else ""
    rows = [
        ("training examples N", f"{num_examples:,}{counted}"),
        ("batch size", f"{args.total_bs:,}, sampling rate {args.total_bs / num_examples:.4g}"),
        ("logical steps", f"{steps:,}"),
    ]
    if plan:
        reserved = plan.reserved_histogram_sigma
        rows += [
            ("noise multiplier", f"{plan.noise_multiplier:g} (deviation over clip norm)"),
            ("clip norm", f"{plan.clip_norm:g}, {plan.clip_function}"),
            ("guarantee", f"({plan.target_epsilon:g}, {plan.delta:g})-DP, one example added or "
             f"removed{f', with a histogram of sigma {reserved:g}' if reserved else ''}"),
        ]  # fmt: skip
    else:
        rows.append(("guarantee", "NONE: --eps -1 trains without differential privacy"))
    processes = args.gpus * args.num_machines
    fitting = args.perdevice_bs == "auto"
    budget = "as many as fit" if fitting else f"{args.perdevice_bs * args.max_seq_len:,}"
    rows += [
        ("processes", f"{processes:,} on {args.num_machines:,} machine(s)"),
        ("tokens", f"at most {args.max_seq_len:,} a sequence, {budget} on a device at once"),
        ("outputs", str(run_folder(args))),
    ]  # fmt: skip
    for name, value in rows:
        say(f"  {name:<20} {value}")


if __name__ == "__main__":
    run_cli(main)
