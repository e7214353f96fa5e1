"""Turn sampled texts into a list of distinct instructions, and count what was dropped.

    python -m resample_with_dp_histogram.extract --instructions inference_outputs/mine \\
        --output synthetic/mine

Writes OUTPUT/instructions.jsonl, one object a line in the order of the input: row (its number from
0), sample_id and shard (the sample that it was and the file that holds that sample; null where the
input does not say) and instruction. preparation.json has the counts, and the SHA-256 of what was
read and written. Dropped are texts without a word (empty), sampled texts that were cut before their
end (truncated), and texts whose words came before in the same order (duplicate).

This is for synthetic texts, where nothing is spent. Private ones are embedded as they are: what
deduplication does to one row depends on the others, which no guarantee for a row covers.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.cli import UsageError, run_cli, say
from utils.command_line.parser import command_line, flag, read_flags
from utils.files import hashes_of, sha256_of, write_json
from utils.folders import PREPARATION_FILE, claimed, require_new, whole_folder
from utils.texts.text_filters import comparison_form
from utils.texts.text_inputs import FORMATS, Origin, files_of, origins, read_entries

EXTRACT = "resample_with_dp_histogram.extract"
# The texts that this command writes, and those that resample selects, in the same form.
INSTRUCTIONS_FILE, SELECTED_FILE = "instructions.jsonl", "selected.jsonl"
EMPTY, TRUNCATED, DUPLICATE = "empty", "truncated", "duplicate"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `extract`."""

    instructions: list[str] = flag(
        f"what was sampled: {FORMATS}", required=True, nargs="+", metavar="PATH"
    )
    split: str | None = flag("the split to read of a saved DatasetDict")
    output: Path = flag("folder, which must not exist", required=True, type=Path, metavar="DIR")


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    with claimed(settings.output):
        extract(settings)


def extract(settings: Settings) -> None:
    """Read, tell apart, and write what is to be kept."""
    output = settings.output
    require_new(output)
    entries: list[str | None] = []
    samples: list[Origin] = []
    hashes: dict[str, str] = {}
    for path in settings.instructions:
        entries += read_entries(path, settings.split)
        samples += origins(path, settings.split, cut=True)
        hashes |= hashes_of(files_of(path, settings.split))
    kept, dropped = distinct_instructions(entries)
    counts = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())
    say(f"{len(entries):,} texts: {len(kept):,} kept; dropped: {counts}")
    if not kept:
        raise UsageError(f"{' '.join(settings.instructions)!r} holds no instruction to keep")
    with whole_folder(output) as folder:
        with open(folder / INSTRUCTIONS_FILE, "w", encoding="utf-8") as file:
            for row, (place, text) in enumerate(kept.items()):
                record = {"row": row, **samples[place]._asdict(), "instruction": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        preparation = {"sources": settings.instructions, "kept": len(kept), "dropped": dropped}
        written = {INSTRUCTIONS_FILE: sha256_of(folder / INSTRUCTIONS_FILE)}
        preparation |= {"inputs_sha256": hashes, "outputs_sha256": written}
        preparation["commands"] = [command_line(EXTRACT, Settings, settings)]
        write_json(folder / PREPARATION_FILE, preparation)
    say(f"wrote {output / INSTRUCTIONS_FILE}")


def distinct_instructions(entries: list[str | None]) -> tuple[dict[int, str], Counter[str]]:
    """The texts that are distinct in `comparison_form`, and why the others are dropped.

    Args:
        entries: texts, None for one that was cut before its end; see `read_entries`.

    Returns:
        Stripped texts by their place in `entries`, and the dropped by reason.
    """
    kept: dict[int, str] = {}
    dropped = Counter({EMPTY: 0, TRUNCATED: 0, DUPLICATE: 0})
    seen = set()
    for place, entry in enumerate(entries):
        if entry is None:
            dropped[TRUNCATED] += 1
            continue
        form = comparison_form(entry)
        # Hashes, since a million forms would double the memory of the texts.
        digest = hashlib.blake2b(form.encode(), digest_size=16).digest()
        if not form:
            dropped[EMPTY] += 1
        elif digest in seen:
            dropped[DUPLICATE] += 1
        else:
            seen.add(digest)
            kept[place] = entry.strip()
    return kept, dropped


if __name__ == "__main__":
    run_cli(main)
