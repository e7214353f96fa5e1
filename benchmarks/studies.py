"""What studies on real instructions share: their flags, their parts, commands run once.

Every step of a study runs the toolkit's own commands, and one that has ended is passed over when
the same command goes on after a stop.
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import sched_getaffinity, sched_setaffinity
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

import numpy as np
import yaml
from scipy import stats

from benchmarks import figures
from benchmarks.environments import ROOT
from evaluation.results import read_results
from resample_with_dp_histogram.extract import distinct_instructions
from utils.cli import UsageError, in_one_line, say
from utils.command_line.parser import flag, natural_int, parser_of, positive_int
from utils.command_line.training_flags import TrainingSettings, check_training_settings
from utils.files import write_json
from utils.folders import require_same_settings
from utils.texts.data_sets import rows_fingerprint
from utils.texts.prompts import UNCONDITIONAL, training_ids
from utils.texts.text_inputs import FORMATS, read_entries

Item = TypeVar("Item")
# In the folder of a study, made with its data.
RECORD = "settings.json"
# Rows of tables that are of no arm.
RESERVED = ("base", "real")


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags of every study."""

    instructions: str = flag(f"real instructions: {FORMATS}", required=True, metavar="PATH")
    split: str | None = flag("the split to read where --instructions is a saved DatasetDict")
    work_dir: Path = flag("everything stays here", required=True, type=Path, metavar="DIR")
    model_name: str = flag("base model: a hub id or a folder", "data/quickstart_model")
    dtype: str = flag("of the frozen base", "bfloat16", choices=("bfloat16", "float32"))
    jobs: int = flag("commands at once; each gets its share of the cores", 1)
    perdevice_bs: int = flag("sequences of max_seq_len on a device at once", 32)
    max_seq_len: int = flag("tokens; longer instructions are left out", 64)
    num_test: int = flag("held-out instructions, those included that a private one equals", 600)


@dataclass(frozen=True, kw_only=True)
class ArmsSettings(Settings):
    """The flags of a study of arms, on a base that it makes itself."""

    only: list[str] | None = flag("names of the arms to take; all of them if left out", nargs="+")
    model_name: str = flag("base model; a small one, made on the spot, if left out", "")
    dtype: str = flag("of the frozen base", "bfloat16", choices=("bfloat16", "float32"))
    num_public: int = flag(
        "public instructions, for the small base and for topics", 4000, type=natural_int
    )
    pretraining_tokens: int = flag("of the small base", 4_000_000, type=positive_int)
    delta: float = flag("of the guarantee", 1e-5)
    num_private: int | None = flag(
        "private instructions; all that are left if left out", type=positive_int
    )


def distinct(settings: Settings) -> list[str]:
    """All instructions that differ in their words, in their order."""
    kept, _ = distinct_instructions(read_entries(settings.instructions, settings.split))
    return list(kept.values())


def shuffled(texts: list[str]) -> list[str]:
    """The texts in a random order, always the same."""
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]


def public_and_rest(settings: ArmsSettings) -> tuple[list[str], list[str]]:
    """Public instructions, and those that are left.

    Raises:
        UsageError: there are too few.
    """
    texts, number = shuffled(distinct(settings)), settings.num_public
    if not number and not settings.model_name:
        raise UsageError(
            "--num_public 0: a small base is made of public rows; give some, or --model_name"
        )
    _require_enough(settings, texts[number:], f"are left besides --num_public {number}")
    return texts[:number], texts[number:]


def held_out_and_private(settings: ArmsSettings, texts: list[str]) -> tuple[list[str], list[str]]:
    """Held-out instructions, without those that a private one equals, and private ones.

    Args:
        texts: what is left of the public ones, as it is to be learnt.

    Raises:
        UsageError: there are too few.
    """
    _require_enough(settings, texts, f"fit into --max_seq_len {settings.max_seq_len}")
    test, number = settings.num_test, settings.num_private
    private = texts[test:] if number is None else texts[test : test + number]
    return unseen(texts[:test], private), private


def _require_enough(settings: ArmsSettings, texts: list[str], which: str) -> None:
    wanted = settings.num_test + (settings.num_private or 1)
    if len(texts) < wanted:
        raise UsageError(
            f"{len(texts):,} distinct instructions {which}, fewer than --num_test and "
            f"--num_private together ({wanted:,}); lower one of them"
        )


def cut_at_words(model_name: str, texts: list[str], most: int) -> list[str]:
    """The texts, those of more than `most` tokens without the words that begin beyond them."""
    from utils.models.loading import load_tokenizer  # takes seconds, and --help has no need of it

    tokenizer = load_tokenizer(model_name)
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    cut = []
    for text, offsets in zip(texts, found["offset_mapping"]):
        if len(offsets) > most:
            kept = text[: offsets[most][0]]
            text = kept.rsplit(maxsplit=1)[0] if len(kept.split()) > 1 else kept
        cut.append(text)
    return cut


def unseen(texts: list[str], private: list[str]) -> list[str]:
    """The texts that no private one equals; of those that are cut, some are left the same words.

    Raises:
        UsageError: there is none.
    """
    known = set(private)
    if kept := [text for text in texts if text not in known]:
        return kept
    raise UsageError(
        f"each of {len(texts):,} held-out instructions is a private one too once it is cut; raise "
        "--row_tokens"
    )


def that_fit(settings: Settings, texts: list[str]) -> list[str]:
    """The texts that --max_seq_len does not cut.

    Raises:
        UsageError: they are fewer than 4 x --num_test.
    """
    from utils.models.loading import load_tokenizer  # takes seconds, and --help has no need of it

    most = settings.max_seq_len
    # One token more than may be there shows what would be cut.
    ids = training_ids(
        load_tokenizer(settings.model_name), UNCONDITIONAL, texts, max_seq_len=most + 1
    )
    fitting = [text for text, (each, _) in zip(texts, ids) if len(each) <= most]
    if len(fitting) < 4 * settings.num_test:
        raise UsageError(
            f"{len(fitting):,} distinct instructions fit into --max_seq_len {most}, fewer than 4 x "
            f"--num_test = {4 * settings.num_test:,}; raise --max_seq_len, or lower --num_test"
        )
    return fitting


@dataclass(frozen=True)
class Generator:
    """One run of training.

    Attributes:
        flags: of `train.py`, by name.
        epsilon: None without privacy.
    """

    arm: str
    flags: dict
    epsilon: float | None
    seed: int

    @property
    def name(self) -> str:
        """A file name, of its flags too."""
        digest = hashlib.sha256(json.dumps(self.flags, sort_keys=True).encode()).hexdigest()[:8]
        return f"{folded(self.arm)}-{self.epsilon or 'inf'}-{self.seed}-{digest}"


def folded(arm: str) -> str:
    """The name of an arm in those of files."""
    return arm.replace(" ", "_")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key!r} is there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_arms(file: Path) -> dict[str, dict]:
    """Flags of train.py by the name of an arm, with those of all arms.

    Args:
        file: YAML of `arms`, and maybe `common` for all of them.

    Raises:
        UsageError: the file is not such a one.
    """
    where = f"--arms {file}"
    try:
        given = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{where}: {in_one_line(error, 200)}") from None
    is_table = isinstance(given, dict) and {"arms"} <= set(given) <= {"arms", "common"}
    arms = given["arms"] if is_table else None
    tables = [given.get("common"), *arms.values()] if isinstance(arms, dict) else [arms]
    if not arms or not all(isinstance(each, dict | None) for each in tables):
        raise UsageError(
            f"{where}: needs `arms`, flags of train.py by the name of an arm, and maybe `common`, "
            "those of all arms, and nothing else"
        )
    flags = {arm: (tables[0] or {}) | (own or {}) for arm, own in arms.items()}
    for arm, own in flags.items():
        if not isinstance(arm, str) or arm in RESERVED:
            raise UsageError(
                f"{where}: {arm!r} cannot name an arm: it is no text without quotes, or a row of "
                f"the table; use another name than {' and '.join(RESERVED)}"
            )
        for name, value in own.items():
            if not (isinstance(name, str) and isinstance(value, str | int | float)):
                raise UsageError(f"{where}: {arm}: {name}: {value} is not a flag and its one value")
        # They are the study's, for all arms alike.
        if own.get("eps", -1) != -1 or {"delta", "noise_multiplier"} & set(own):
            raise UsageError(
                f"{where}: {arm} has an eps other than -1, a delta or a noise_multiplier"
            )
    if len({folded(arm) for arm in flags}) < len(flags):
        raise UsageError(f"{where}: two arms are the same but for a space; use other names")
    return flags


def read_generators(
    file: Path, only: list[str] | None, epsilons: list[float], num_seeds: int, defaults: dict
) -> list[Generator]:
    """What a YAML of arms asks to train: all arms for one seed after the other.

    Args:
        file: see `read_arms`; an arm with `eps: -1` is without privacy, and every other one is for
            each epsilon.
        only: names of arms; all of them if None.
        defaults: flags of arms that do not say.

    Raises:
        UsageError: the file has no arms, or none that `only` names.
    """
    flags = {arm: defaults | own for arm, own in read_arms(file).items()}
    if unknown := set(only or flags) - set(flags):
        raise UsageError(f"--only: {file} has no arm {', '.join(sorted(unknown))}")
    return [
        Generator(arm, own, None if own.get("eps") == -1 else epsilon, seed)
        for seed in range(num_seeds)
        for arm, own in flags.items()
        if only is None or arm in only
        for epsilon in (dict.fromkeys(epsilons) if own.get("eps") != -1 else epsilons[:1])
    ]


def require_trainable(arm: str, words: Sequence[str]) -> None:
    """Refuse a command of train.py as it would itself, before hours of other work.

    Args:
        words: FLAG=VALUE each, those of the study and of the arm.

    Raises:
        UsageError: names the arm.
    """

    def refuse(message: str) -> NoReturn:
        raise UsageError(message)

    parser = parser_of(TrainingSettings, None)
    parser.error = refuse  # type: ignore[method-assign]
    names = [word.partition("=")[0] for word in words]
    try:
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"{name} is the study's own")
        given = TrainingSettings(**vars(parser.parse_args(words)))
        check_training_settings(given)
        if given.is_rehearsal:
            raise UsageError("a rehearsal trains nothing")
    except UsageError as error:
        raise UsageError(f"--arms: {arm}: {error}") from None


def words_of(flags: dict) -> list[str]:
    """Flags by name as the words of a command; False leaves a flag out."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in flags.items()
        if value is not False
    ]


def interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean by Student's t; infinite for a single value."""
    if len(values) < 2:
        return float("inf")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(stats.t.ppf(0.975, len(values) - 1)) * error


def mean_of(values: Sequence[float], sign: str = "") -> str:
    """A mean, with half of its 95% interval where there are several values.

    Args:
        sign: "+" for differences.
    """
    width = f" +- {interval(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.3f}{width}"


def model_flags(settings: Settings, style: str = UNCONDITIONAL) -> list[str]:
    """Flags of training, sampling and scoring alike."""
    return [
        f"--model_name={settings.model_name}", f"--prompt_style={style}",
        f"--max_seq_len={settings.max_seq_len}", f"--dtype={settings.dtype}",
    ]  # fmt: skip


def begun_alike(settings: Settings, texts: list[str], **more: object) -> dict:
    """What is to be on record of a study, once it is known that its data can be made.

    Args:
        texts: what all its rows come from.
        more: what else decides its figures.

    Raises:
        UsageError: its folder was begun with something else.
    """
    file = settings.work_dir / RECORD
    given = settings.on_record() | {"instructions_sha256": rows_fingerprint(texts)} | more
    before = json.loads(file.read_text()) if file.exists() else given
    require_same_settings(
        before, given, f"{settings.work_dir} was begun with", "use another --work_dir"
    )
    return given


def recorded(settings: Settings) -> dict:
    """Flags and what `begun_alike` has put on record, for the figures."""
    return json.loads((settings.work_dir / RECORD).read_text()) | settings.on_record()


def side_by_side(jobs: int, step: Callable[[Item], None], items: Sequence[Item]) -> None:
    """A step for every item, so many at once, each on its share of the cores."""
    cores = sorted(sched_getaffinity(0))
    shares = iter([cores[job::jobs] or cores for job in range(jobs)])
    # A thread's cores are those of the commands that it starts.
    with ThreadPoolExecutor(jobs, initializer=lambda: sched_setaffinity(0, next(shares))) as pool:
        futures = [pool.submit(step, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            if any(future.running() for future in futures):
                say("stopping once running commands have ended")
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_once(folder: Path, name: str, *command: str, makes: Sequence[Path] = ()) -> None:
    """Run a command of the toolkit, its output in a log; pass over one that has ended well.

    Args:
        folder: of the study.
        makes: what the command refuses to find. It is removed first: a stop left it, and nobody
            has used it.

    Raises:
        UsageError: it failed; the log is named.
    """
    finished = folder / "times" / f"{name.replace(' ', '-')}.json"
    log = folder / "logs" / f"{finished.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        # The command holds this lock too, and outlives a study that is killed.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name} runs already; waiting for its end")
            fcntl.flock(file, fcntl.LOCK_EX)
        if finished.exists():
            return
        file.truncate(0)
        for path in makes:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        began = time.monotonic()
        if run_command(command, file):
            last = log.read_text().strip().splitlines()[-1:]
            raise UsageError(f"{name} failed: {''.join(last)[:200]} (all of it is in {log})")
        seconds = time.monotonic() - began
        say(f"{name}: {seconds:.0f} s")
        write_json(finished, seconds)


def run_command(command: Sequence[str], log: TextIO) -> int:
    """Run a command of the toolkit, and give its exit code."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, check=False)
    return done.returncode


def losses_by_model(folder: Path) -> dict[str, dict]:
    """Loss per token and its interval, by model, from what `evaluation.perplexity` wrote."""
    (result,) = read_results(folder, private=False)
    return {
        score["subject"]: {key: score[key] for key in ("value", "low", "high")}
        for score in result["scores"]
        if score["name"] == "loss per token (nats)"
    }
