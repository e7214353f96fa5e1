"""Show on one screen what a run came to: guarantee, losses, samples, and where everything is.

    python -m evaluation.summary --run outputs/mine --samples inference_outputs/mine

Losses come from the run's private/ folder, which no guarantee covers: they are for its owner.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from utils.cli import UsageError, run_cli
from utils.command_line.parser import flag, natural_int, read_flags
from utils.files import read_jsonl, required_object
from utils.printable import printable
from utils.privacy.guarantee import name_of_unit, rounded_up
from utils.runs.run_folder import BACKUP
from utils.sampling.shards import read_samples


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the summary."""

    run: Path = flag("folder of a training run", type=Path, required=True)
    samples: Path | None = flag("folder of what was sampled from it", type=Path)
    untuned: Path | None = flag(
        "folder of what was sampled from the base model alone, to show next to each sample",
        type=Path,
    )
    num_shown: int = flag("samples to show", 10, type=natural_int)


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    print(f"== {settings.run}")
    print(printable(guarantee_line(settings.run)))
    for name, first, last in loss_changes(settings.run):
        print(f"{name:<16} {first:.3f} -> {last:.3f} nats a token (private)")
    print(f"adapter          {settings.run / 'adapter'}")
    print(f"report           {settings.run / 'privacy_report.md'}")
    if settings.samples:
        samples = read_samples(settings.samples)
        before = {each["id"]: each for each in read_samples(settings.untuned or settings.samples)}
        print(f"\n== {settings.samples}: {len(samples):,} samples, of which")
        for sample in samples[: settings.num_shown]:
            base = before.get(sample["id"]) if settings.untuned else None
            print(shown(sample, None if base is None else base["text"]))


def guarantee_line(run: Path) -> str:
    """The run's guarantee in a line.

    Raises:
        UsageError: there is no report at `run`.
    """
    file = run / "privacy_report.json"
    if not file.is_file():
        raise UsageError(f"--run {str(run)!r}: no privacy_report.json there; train.py writes one")
    report = required_object(file, BACKUP, "guarantee")
    if not report["guarantee"]:
        return f"NO GUARANTEE     {report['why']}"
    return (
        f"guarantee        epsilon {rounded_up(report['epsilon']['upper'])} at delta "
        f"{report['delta']:g}, one {name_of_unit(report)} added or removed; "
        f"{report['steps_taken']} steps, noise multiplier {report['noise_multiplier']:g}"
    )


def loss_changes(run: Path) -> list[tuple[str, float, float]]:
    """First and last value of each loss under the run's `private/`; none where that is gone."""
    file = run / "private" / "metrics.jsonl"
    records = list(read_jsonl(file)) if file.is_file() else []
    changes = []
    for name in ("train_loss", "validation_loss"):
        values = [record[name] for record in records if name in record]
        if values:
            changes.append((name.replace("_", " "), values[0], values[-1]))
    return changes


def shown(sample: dict, untuned: str | None = None, width: int = 96) -> str:
    """A sample in a few lines: its prompt, if it had one, what the base wrote, and its text."""
    prompt = textwrap.shorten(printable(sample["prompt"]), width, placeholder=" ...")
    lines = [f"  [{sample['id']}]{f' {prompt}' if prompt else ''}"]
    texts = {"    ": sample["text"]}
    if untuned is not None:
        texts = {"    untuned: ": untuned, "    tuned:   ": sample["text"]}
    for name, text in texts.items():
        text = textwrap.shorten(printable(text), 3 * width, placeholder=" ...") or "(nothing)"
        lines += textwrap.wrap(text, width, initial_indent=name, subsequent_indent=" " * len(name))
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
