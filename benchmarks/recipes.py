"""Which recipe learns most at one epsilon? Held-out losses of several generators of every arm.

    python -m benchmarks.recipes --instructions FILE --work_dir recipes --json recipes.json --jobs 2

Real instructions are parted into public ones, of which a small base is pre-trained on the spot (or
--model_name stands in for it), private ones and held-out ones. Every arm of --arms is a set of
flags of `train.py`; it is trained once for every epsilon and seed, and scored on the held-out
instructions. Private and held-out ones are cut at a word, so that none has more than --row_tokens:
a step then takes seconds, and --max_seq_len is to texts as it is in the paper's setting.

Every step runs the toolkit's own commands, and one that has ended is passed over when the same
command goes on after a stop; an arm whose flags have changed is trained anew.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import studies
from utils.command_line.parser import answer_early, flag, positive_float, positive_int, read_flags

ARMS = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, kw_only=True)
class Settings(studies.ArmsSettings):
    """The flags."""

    arms: Path = flag(
        "YAML of the arms; this folder's recipes.yaml has an example", ARMS, type=Path
    )
    epsilons: list[float] = flag("targets", [5.94], type=positive_float, nargs="+")
    num_seeds: int = flag("generators of each arm", 3, type=positive_int)
    max_seq_len: int = flag("tokens", 256)
    perdevice_bs: int = flag("sequences of max_seq_len on a device at once", 8)
    row_tokens: int = flag(
        "the most that private and held-out instructions have", 30, type=positive_int
    )


answer_early(__name__, Settings, __doc__)

import hashlib
import json

import numpy as np

from benchmarks.figures import markdown
from benchmarks.small_base import small_base
from benchmarks.studies import (
    RECORD,
    Generator,
    begun_alike,
    cut_at_words,
    held_out_and_private,
    losses_by_model,
    mean_of,
    model_flags,
    public_and_rest,
    read_generators,
    recorded,
    require_trainable,
    run_once,
    side_by_side,
    words_of,
)
from utils.cli import run_cli
from utils.files import write_json
from utils.folders import save_dataset
from utils.privacy.plan import num_steps
from utils.texts.data_sets import count_train_examples
from utils.versions import versions_of

# Of an arm that does not say.
SIZES = {"total_bs": 512, "num_epochs": 1.0}
VERSIONED = ("torch", "transformers", "peft", "dp-accounting")


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    folder = settings.work_dir.resolve()
    generators = generators_of(settings)
    for each in generators:
        require_trainable(each.arm, training(settings, folder, each))
    based = replace(settings, model_name=save_data(settings, folder))
    side_by_side(settings.jobs, lambda each: train(based, folder, each), generators)
    scored = score(based, folder, generators)
    found = findings(settings, folder, generators, scored)
    found["settings"] |= {"base": Path(based.model_name).name}
    print(table(found))
    settings.write(found)


def generators_of(settings: Settings) -> list[Generator]:
    """What is to be trained, see `read_generators`."""
    return read_generators(
        settings.arms, settings.only, settings.epsilons, settings.num_seeds, SIZES
    )


def save_data(settings: Settings, folder: Path) -> str:
    """Part the instructions, save the private and held-out ones, and say what the base is.

    Raises:
        UsageError: there are too few instructions, or the folder was begun with others.
    """
    public, rest = public_and_rest(settings)
    # Arms come and go in one study; all else stays.
    record = begun_alike(replace(settings, epsilons=[], num_seeds=1), [*public, *rest])
    base = settings.model_name or str(
        small_base(folder / "bases", public, settings.pretraining_tokens)
    )
    if not (folder / "data").exists():
        texts = cut_at_words(base, rest, settings.row_tokens)
        parts = dict(zip(("test", "train"), held_out_and_private(settings, texts)))
        write_json(settings.work_dir / RECORD, record)
        rows = {name: [{"instruction": text} for text in part] for name, part in parts.items()}
        save_dataset(folder / "data", rows, ["instruction"], {"rows": "study"})
    return base


def training(settings: Settings, folder: Path, generator: Generator) -> list[str]:
    """The flags of a generator's training."""
    target = {"eps": generator.epsilon, "delta": settings.delta} if generator.epsilon else {}
    return [
        *model_flags(settings), f"--dataset_name={folder / 'data'}",
        f"--job_sess={generator.name}", f"--output_dir={folder / 'outputs'}",
        "--no_eval_at_start", "--resume=auto", f"--perdevice_bs={settings.perdevice_bs}",
        f"--seed={generator.seed}", *words_of(target | generator.flags),
    ]  # fmt: skip


def train(settings: Settings, folder: Path, generator: Generator) -> None:
    """Train one generator."""
    run_once(folder, f"train {generator.name}", "train.py", *training(settings, folder, generator))


def score(settings: Settings, folder: Path, generators: list[Generator]) -> dict[str, float]:
    """Held-out losses by generator's name, and the base's by its own; those known are kept."""
    file = folder / "losses.json"
    losses = json.loads(file.read_text()) if file.exists() else {}
    missing = [each.name for each in generators if each.name not in losses]
    if not missing:
        return losses
    output = folder / "losses" / hashlib.sha256(" ".join(missing).encode()).hexdigest()[:12]
    adapters = [str(folder / "outputs" / name / "adapter") for name in missing]
    run_once(
        folder, f"score {output.name}", "-m", "evaluation.perplexity", "--public",
        *model_flags(settings), f"--dataset_name={folder / 'data'}",
        f"--perdevice_bs={settings.perdevice_bs}", f"--output={output}",
        f"--num_rows={settings.num_test}",
        "--adapter_path", *adapters, makes=[output],
    )  # fmt: skip
    found = {name: each["value"] for name, each in losses_by_model(output).items()}
    losses |= {"base": found[settings.model_name]} | {
        name: found[at] for name, at in zip(missing, adapters)
    }
    write_json(file, losses)
    return losses


def findings(
    settings: Settings, folder: Path, generators: list[Generator], losses: dict[str, float]
) -> dict:
    """All figures, a JSON-able dict."""
    private = count_train_examples(str(folder / "data")) or 0
    arms: dict[tuple[str, float | None], dict] = {}
    for each in generators:
        output = folder / "outputs" / each.name
        arm = arms.setdefault((each.arm, each.epsilon), {
            "arm": each.arm, "epsilon": each.epsilon, "flags": each.flags, "loss": [],
            "seconds": [],
        })  # fmt: skip
        arm["loss"].append(losses[each.name])
        seconds = folder / "times" / f"train-{each.name}.json"
        arm["seconds"].append(json.loads(seconds.read_text()))
        report = json.loads((output / "privacy_report.json").read_text())
        arm["noise_multiplier"] = report.get("noise_multiplier")
        arm["steps"] = num_steps(
            float(each.flags["num_epochs"]), private, int(each.flags["total_bs"])
        )
    return {
        "base": losses["base"],
        "arms": list(arms.values()),
        "settings": recorded(settings),
        "versions": versions_of(VERSIONED),
    }


def table(found: dict) -> str:
    """Markdown: a line for each arm, with intervals over its generators.

    `closed` is the share of the gap between the first arm and the best one without privacy that an
    arm closes.
    """
    first = {arm["epsilon"]: arm for arm in reversed(found["arms"])}
    free = [float(np.mean(arm["loss"])) for arm in found["arms"] if arm["epsilon"] is None]
    rows = [["untuned base", "", "", "", "", f"{found['base']:.3f}", "", ""]]
    for arm in found["arms"]:
        mean, reference = float(np.mean(arm["loss"])), first[arm["epsilon"]]
        pairs = [one - other for one, other in zip(arm["loss"], reference["loss"])]
        gap = float(np.mean(reference["loss"])) - min(free, default=float("nan"))
        private = arm["epsilon"] is not None
        is_first = arm is reference
        sigma = f"{arm['noise_multiplier']:.3f}" if private else ""
        rows.append([
            arm["arm"], f"{arm['epsilon'] or 'infinite'}", f"{arm['steps']:,}", sigma,
            f"{np.median(arm['seconds']):.0f}", mean_of(arm["loss"]),
            "" if is_first else mean_of(pairs, "+"),
            f"{(float(np.mean(reference['loss'])) - mean) / gap:.0%}"
            if private and not is_first and gap > 0 else "",
        ])  # fmt: skip
    headings = [
        "arm", "epsilon", "steps", "sigma", "s", "held-out loss",
        "against the first of its epsilon", "closed",
    ]  # fmt: skip
    return markdown(headings, rows)


if __name__ == "__main__":
    run_cli(main)
