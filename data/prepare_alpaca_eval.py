"""Turn AlpacaEval's instructions into the file that sampling reads.

    python data/prepare_alpaca_eval.py

downloads alpaca_eval.json from the hub (tatsu-lab/alpaca_eval) and writes its 805 instructions to
utils/alpaca_eval_instructions.txt: for each a line `### BOI ### 1`, the text, a line
`### EOI ###`. Without a connection, download the file elsewhere and name it with --input.

AlpacaEval is licensed CC BY-NC 4.0 (no commercial use). Its licence forbids shipping the
instructions with this project, so the file is made here, on the machine that uses it; do not pass
it on under other terms.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import UsageError, in_one_line, run_cli, say  # noqa: E402
from utils.command_line.parser import flag, read_flags  # noqa: E402
from utils.folders import claimed  # noqa: E402
from utils.texts.prompts import write_instruction_file  # noqa: E402
from utils.texts.rows import raw_rows  # noqa: E402

HUB_ID, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"
NUM_INSTRUCTIONS = 805


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of this script."""

    input: str | None = flag(
        'a JSON list of objects with "instruction"; alpaca_eval.json from the hub if left out',
        metavar="FILE",
    )
    output: str = flag(
        "the instruction file to write", "utils/alpaca_eval_instructions.txt", metavar="FILE"
    )
    overwrite: bool = flag("replace an output that is there, which is refused otherwise", False)


def main(argv: list[str] | None = None) -> None:
    """Read AlpacaEval's instructions and write them as an instruction file."""
    settings = read_flags(Settings, __doc__, argv)
    output = Path(settings.output)
    with claimed(output):
        prepare(settings, output)


def prepare(settings: Settings, output: Path) -> None:
    """Make `output`, which nobody else makes meanwhile."""
    if output.exists() and not settings.overwrite:
        raise UsageError(f"--output {settings.output!r} exists; replace it with --overwrite")
    instructions = read_instructions(Path(settings.input) if settings.input else download())
    if len(instructions) != NUM_INSTRUCTIONS:
        say(
            f"warning: AlpacaEval has {NUM_INSTRUCTIONS} instructions, this file has "
            f"{len(instructions)}; scores will not compare with published ones"
        )
    write_instruction_file(output, instructions)
    say(f"wrote {len(instructions)} instructions to {output}")
    say("licence: CC BY-NC 4.0, not for commercial use and not to be shipped with this project")


def download() -> Path:
    """Path of AlpacaEval's file in the hub's cache, downloaded if it is not there.

    Raises:
        UsageError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_ID, HUB_FILE, repo_type="dataset"))
    except OSError as error:
        reason = in_one_line(error, 120)
        raise UsageError(
            f"cannot download {HUB_FILE} of {HUB_ID} ({reason}); download it elsewhere from "
            f"https://huggingface.co/datasets/{HUB_ID} and name it with --input"
        ) from None


def read_instructions(path: Path) -> list[str]:
    """The instructions of a JSON list of objects, in order.

    Raises:
        UsageError: no such file, not such a list, or an instruction without text.
    """
    try:
        rows = list(raw_rows(path, form=".json"))
    except UsageError as error:
        raise UsageError(f"cannot read --input: {error}") from None
    if not rows:
        raise UsageError(f"--input {str(path)!r} is not a JSON list of objects, or an empty one")
    instructions = []
    for number, row in enumerate(rows):
        text = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UsageError(
                f"--input {str(path)!r}, object {number}: needs an 'instruction' that is a text"
            )
        instructions.append(text)
    return instructions


if __name__ == "__main__":
    run_cli(main)
