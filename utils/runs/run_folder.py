"""The folder of a training run: what is in it, what may leave it, and when it may be continued.

adapter/              released: PEFT adapter, model card, training style
adapter_last/         released, where adapter/ is an average: likewise, as the last step left it
privacy_report.json   released, also as .md
privacy_ledger.jsonl  released: the steps that were taken
run_config.json       released: arguments, versions
checkpoints/          noised, but kept: adapter, optimizer and average at some steps
private/              computed from private data without noise: never leaves
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.cli import UsageError
from utils.files import required_object, write_json
from utils.folders import (
    locked,
    names_in,
    portable,
    portable_word,
    private_folder,
    require_same_settings,
    tidied,
)
from utils.models.adapter_info import adapter_sha256
from utils.privacy.guarantee import claim
from utils.versions import versions_of

# What the last step left, where adapter/ is an average.
LAST_ADAPTER = "adapter_last"
# What may leave the building; a test fails on anything else outside checkpoints/ and private/.
RELEASABLE = {
    "adapter", LAST_ADAPTER, "privacy_report.json", "privacy_report.md", "privacy_ledger.jsonl",
    "run_config.json",
}  # fmt: skip
CONFIG_FILE, REPORT_FILE = "run_config.json", "privacy_report.json"
BACKUP = "restore it from a backup"
# Settings that may say something of this machine.
PLACES = ("dataset_name", "model_name", "output_dir")
# In a report: the hash of the adapter that it is of; None as long as there is none.
ADAPTER_HASH = "adapter_sha256"
# In a run's private identity: of the coins of its audit.
COINS = "audit_coins"
NO_GUARANTEE = "**No privacy guarantee**"
VERSIONED = ("torch", "transformers", "peft", "accelerate", "prv-accountant", "dp-accounting")
# Settings that a continued run may change, since none of them changes what is learnt or how
# private it is. The privacy plan and the contents of data and base model are compared by
# themselves, so their names and sources may change too.
FREE_ON_RESUME = {
    "dataset_name", "model_name", "output_dir", "perdevice_bs", "gradient_checkpointing", "fsdp",
    "no_eval_at_start", "max_eval_examples", "save_steps", "keep_checkpoints", "resume",
    "report_to", "report_private_metrics", "num_train_examples", "num_train_units",
    "noise_multiplier", "bands", "compile",
}  # fmt: skip


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / CONFIG_FILE).exists()


def arguments_of(folder: Path) -> dict:
    """The flags of a run, by name.

    Raises:
        UsageError: there is no run.
    """
    if not holds_run(folder):
        raise UsageError(f"{folder} holds no run: there is no {CONFIG_FILE}")
    return required_object(folder / CONFIG_FILE, BACKUP, "arguments")["arguments"]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder in the block, on the first process of a job.

    Raises:
        UsageError: another process has it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with tidied(folder, folder.parent), locked(folder, "use another --job_sess"):
        yield


def require_usable(folder: Path, settings: dict, resume: str, defaults: dict) -> None:
    """Refuse a folder with a run in it unless `--resume auto` may continue that run.

    Args:
        settings: the flags of this run by their names, see `TrainingSettings.run_settings`.
        defaults: of flags that the version which began the run may not have had.

    Raises:
        UsageError: names every setting that differs, or the flag that continues the run.
    """
    if not holds_run(folder):
        # A run that was killed while it began has left these two, and nothing in them.
        foreign = names_in(folder) - {"private", "checkpoints"}
        if foreign:
            raise UsageError(f"{folder} holds no run of this tool; use another --job_sess")
        return
    begun_with = defaults | arguments_of(folder)
    fixed = begun_with.keys() - FREE_ON_RESUME
    require_same_settings(
        {f"--{name}": begun_with[name] for name in begun_with if name in fixed},
        {f"--{name}": settings.get(name) for name in fixed},
        f"{folder} holds a run with",
        "use that value and --resume auto, or another --job_sess",
    )
    if resume != "auto":
        raise UsageError(
            f"{folder} holds a run with these settings; add --resume auto to continue it, or use "
            "another --job_sess"
        )


def begin(folder: Path, settings: dict, identity: dict, private_identity: dict) -> None:
    """Write what a run starts with, or check a continued run against it.

    Args:
        identity: public facts that a continued run must share, such as the base's fingerprint.
        private_identity: such facts computed from private data; kept under `private/`.

    Raises:
        UsageError: a continued run differs; the message names the fact.
    """
    private_file = folder / "private" / "identity.json"
    if not holds_run(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        private_folder(folder / "private")
        places = {name: settings[name] for name in PLACES}
        write_json(private_file, private_identity | places)
        config = {
            "arguments": settings | {name: portable(place) for name, place in places.items()},
            "argv": [portable_word(word) for word in sys.argv],
            "versions": versions_of(VERSIONED),
        }
        config |= identity
        write_json(folder / CONFIG_FILE, config)
        return
    begun_with = json.loads((folder / CONFIG_FILE).read_text())
    known = json.loads(private_file.read_text())
    begun_with |= known
    now = identity | private_identity
    # Runs of earlier versions have none. Their tokens say as much, and are compared.
    for name in ("rows_fingerprint", "prompt_date", COINS):
        begun_with.setdefault(name, now.get(name))
    require_same_settings(
        {name.replace("_", " "): begun_with.get(name) for name in now},
        {name.replace("_", " "): value for name, value in now.items()},
        f"{folder} holds a run with",
        "use another --job_sess",
        shown=False,
    )
    if not private_identity.keys() <= known.keys():
        write_json(private_file, private_identity | known)


def date_of(folder: Path) -> str | None:
    """The day that the prompts of a run hold; None where they hold none, or there is no run."""
    if not holds_run(folder):
        return None
    return json.loads((folder / CONFIG_FILE).read_text()).get("prompt_date")


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end: its adapter is there, and its report names it.

    A report of an earlier version names none, but was written before the adapter.
    """
    report = folder / REPORT_FILE
    if not (folder / "adapter").exists() or not report.exists():
        return False
    return json.loads(report.read_text()).get(ADAPTER_HASH, "an earlier version's") is not None


def require_own_adapter(folder: Path, report: dict, recorded: str | None) -> str:
    """Refuse a run's folder whose adapter is another one than its report and ledger say.

    Args:
        report: the run's own.
        recorded: the adapter at the end of its ledger, if it has one.

    Returns:
        What was found, in words.

    Raises:
        UsageError: names both hashes, or what the model card denies, or how to finish the run.
    """
    adapter, path = folder / "adapter", folder / REPORT_FILE
    named = report.get(ADAPTER_HASH)
    if named is None and (recorded or (ADAPTER_HASH in report and adapter.exists())):
        raise UsageError(
            f"{folder} was stopped while its adapter was put on record; the command of the run "
            "with --resume auto finishes it"
        )
    if named != recorded:
        raise UsageError(
            f"{path} is of the adapter {named}, the ledger of {recorded}; restore the run's own"
        )
    if not adapter.exists():
        return "adapter: not here, so there is nothing to compare"
    card = adapter / "README.md"
    if report["guarantee"] and card.exists() and NO_GUARANTEE in card.read_text():
        raise UsageError(
            f"{card} says that there is no guarantee, {path} that there is one; restore the run's "
            "own adapter and report"
        )
    if named is None:
        return f"adapter: nothing to compare it with, {path.name} is of a version that named none"
    if named != (found := adapter_sha256(adapter)):
        raise UsageError(
            f"{adapter} is another adapter ({found}) than the one that {path} is of ({named}); "
            "restore the run's own"
        )
    return f"adapter: the one that {path.name} and ledger name, {named}"


def private_identity_of(folder: Path) -> dict:
    """What a run's `private/` says of the data and the places that it began with, if it is here."""
    private_file = folder / "private" / "identity.json"
    return json.loads(private_file.read_text()) if private_file.exists() else {}


def model_name_of(folder: Path) -> str:
    """The base model of a run as it was given, which only its `private/` knows of a local one."""
    released = arguments_of(folder)["model_name"]
    return private_identity_of(folder).get("model_name", released)


def model_card(base_model: str, prompt_style: str, report: dict, adapter: str) -> str:
    """The README.md of an adapter, without what the paths say of this machine."""
    base_model, adapter = portable(base_model), portable(adapter)
    if report["guarantee"]:
        guarantee = f"This adapter is {claim(report)} (see privacy_report.md of the run)."
    else:
        guarantee = f"{NO_GUARANTEE}: {report['why']}. Treat it as private data."
    return f"""---
base_model: {json.dumps(base_model)}
library_name: peft
---
# LoRA adapter for {base_model}

{guarantee}

Prompt style: `{prompt_style}`. Sample from it with

    python generate_inference_command.py --model_name {base_model} --adapter_path {adapter} \\
        --prompt_style {prompt_style} --instruction_file FILE --job_sess NAME
"""


def dataset_name_of(folder: Path) -> str:
    """The data set of a run as it was given, see `model_name_of`."""
    released = arguments_of(folder)["dataset_name"]
    return private_identity_of(folder).get("dataset_name", released)
