"""Print the one command that samples from a model, with or without an adapter.

    python generate_inference_command.py --instruction_file utils/syn_instruct.txt \\
        --model_name data/quickstart_model --adapter_path outputs/mine/adapter --job_sess mine \\
        --max_seq_len 128 --top_p 0.95 --prompt_style uncond_generation --num_samples 1000

Checks the instruction file and the adapter's prompt style, and prints an `accelerate launch` line
on stdout; what it means goes to stderr. Paste the line, or run it at once with --run, which passes
its exit code on. With --elsewhere, files that are not on this machine are warnings: the line may
run on another one. An adapter that learnt by topics takes --prompt_style topic_generation, and
--topic_histogram FILE in place of --instruction_file.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils.cli import UsageError, run_cli, say
from utils.command_line.config import ConfigSettings, read_config_and_flags, write_config
from utils.command_line.launch import launch_command, print_or_run
from utils.command_line.parser import (
    flag,
    parser_of,
    to_argv,
)
from utils.command_line.sampling_flags import (
    SamplingSettings,
    check_adapter,
    check_sampling_settings,
    describe_decoding,
    read_instructions,
)
from utils.runs.preflight import check_here
from utils.texts.prompts import UNCONDITIONAL, Instruction

MISSING_HERE = "{} is not here; it must be where the command runs"

_launch = partial(flag, group="launch")


@dataclass(frozen=True, kw_only=True)
class Settings(ConfigSettings, SamplingSettings):
    """The flags of sampling, and those of the launch."""

    gpus: int = _launch("processes, one per GPU", 1)
    run: bool = _launch("run the command; pass on its exit code", False)
    elsewhere: bool = _launch(
        "the command runs on another machine: what is missing here is a warning", False
    )


def main(argv: list[str] | None = None) -> int:
    settings = read_config_and_flags(Settings, __doc__, argv)
    run = settings.run or settings.is_rehearsal
    if settings.elsewhere and run:
        raise UsageError(
            "--elsewhere and --run, --check or --dry_run exclude each other; leave one out"
        )
    settings, warnings = check_sampling_settings(settings)
    instructions = None
    if settings.elsewhere and not Path(settings.source).exists():
        warnings.append(MISSING_HERE.format(settings.source))
    else:
        instructions = read_instructions(settings)
    if settings.elsewhere and settings.adapter_path and not Path(settings.adapter_path).exists():
        warnings.append(MISSING_HERE.format(settings.adapter_path))
    else:
        warnings += check_adapter(settings.adapter_path, settings.prompt_style)
    if not settings.elsewhere:
        warnings += check_here(settings.model_name, settings.gpus, must=run)

    for warning in warnings:
        say(f"warning: {warning}")
    say_summary(settings, instructions)
    if settings.config and not settings.is_rehearsal:
        write_config(settings.config_file, settings)
    arguments = to_argv(parser_of(SamplingSettings, ""), settings)
    command = launch_command("inference.py", arguments, settings.gpus)
    return print_or_run(command, run)


def say_summary(settings: Settings, instructions: list[Instruction] | None) -> None:
    """Tell on stderr what the command will do."""
    if instructions is None:
        samples = (
            f"{settings.num_samples:,}" if settings.num_samples else "as the instruction file says"
        )
    else:
        samples = f"{sum(instruction.count for instruction in instructions):,}"
        if settings.prompt_style != UNCONDITIONAL:
            kind = "topics" if settings.topic_histogram else "instructions"
            samples += f" for {len(instructions):,} {kind}"
    longest = settings.max_new_tokens or f"what the prompt leaves of {settings.max_seq_len:,}"
    rows = [
        ("samples", samples),
        ("model", f"{settings.model_name}, {settings.adapter_path or 'no adapter'}"),
        ("prompt style", settings.prompt_style),
        ("decoding", f"{describe_decoding(settings)}, seed {settings.seed}"),
        ("new tokens", f"at most {longest}"),
        (
            "engine",
            settings.engine + ", in the environment that has it" * (settings.engine == "vllm"),
        ),
        ("outputs", f"{settings.folder}; the same command again goes on where it stopped"),
    ]
    for name, value in rows:
        say(f"  {name:<20} {value}")


if __name__ == "__main__":
    run_cli(main)
