"""What the guarantee costs in utility: synthetic data and models tuned on it, at several epsilons.

    python -m benchmarks.utility --instructions FILE --work_dir utility --json utility.json

Real instructions are parted into private and held-out ones. For every epsilon of --epsilons and
for infinity (neither clipping nor noise), a generator learns from the private ones by DP training,
a pool is sampled from it, and rows of the pool make a synthetic set: drawn at random (before), or
selected by a DP histogram of the private rows (after), which training's epsilon pays for too. A
model tuned on each set is scored on the held-out instructions; each set is compared with them by
MAUVE. Baselines: the untuned base model, as many private rows themselves, and `loose`: the same
at the largest epsilon with noise from the accountant settings of the published code (eps_error
0.1). Sets, histograms and tuning are repeated for every seed; generators are not.

Every stage runs the toolkit's own commands, and one that has ended is passed over when the same
command goes on after a stop. --size paper asks for the sizes of the paper, for GPUs; single flags
change either size.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from prv_accountant import PRVAccountant
from prv_accountant.privacy_random_variables import (
    GaussianMechanism,
    PoissonSubsampledGaussianMechanism,
)
from scipy.optimize import brentq

from evaluation.measures.intervals import plus_minus
from evaluation.measures.mauve import mauve
from evaluation.results import read_results
from privacy_checks.composition import composed_report
from resample_with_dp_histogram.embeddings import open_embeddings
from resample_with_dp_histogram.extract import INSTRUCTIONS_FILE, distinct_instructions
from utils.cli import UsageError, run_cli, say
from utils.command_line.parser import make_parser, natural_int, positive_float, positive_int
from utils.files import read_jsonl, write_json
from utils.models.loading import load_tokenizer
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian, calibrate_noise_multiplier
from utils.privacy.plan import num_steps
from utils.sampling.shards import read_samples
from utils.texts.prompts import UNCONDITIONAL, training_ids
from utils.texts.text_inputs import FORMATS, read_entries
from utils.versions import versions_of

ROOT = Path(__file__).resolve().parent.parent
# Two cores end the first within two hours; the second is that of the paper's section 5.
SIZES = {
    "small": {
        "max_seq_len": 64, "num_test": 600, "total_bs": 256, "num_epochs": 1.0, "delta": 1e-5,
        "clip": 1.0, "lr": 2e-3, "num_samples": 1500, "num_selected": 400, "num_bins": 50,
        "tuning_bs": 16,
    },
    "paper": {
        "max_seq_len": 1024, "num_test": 5000, "total_bs": 4096, "num_epochs": 10.0, "delta": 5e-7,
        "clip": 0.5, "lr": 1e-3, "num_samples": 1_000_000, "num_selected": 180_000,
        "num_bins": 1000, "tuning_bs": 32,
    },
}  # fmt: skip
BASE, REAL, LOOSE, INFINITY = "base", "real", "loose", "inf"
BEFORE, AFTER = "before", "after"
HISTOGRAM_SIGMA = 10.0
LOOSE_EPS_ERROR = 0.1
# MAUVE depends on its clusters, so a set's score is the mean over as many clusterings.
CLUSTERINGS = 5
# Flags that say where things are on this machine, and not how the figures came about.
LOCAL = ("json", "work_dir", "instructions", "jobs")
VERSIONED = ("torch", "transformers", "peft", "prv-accountant", "faiss-cpu")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the study."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--instructions", required=True, metavar="PATH", help=f"real instructions: {FORMATS}")
    add("--split", help="the split to read where --instructions is a saved DatasetDict")
    add("--work_dir", required=True, type=Path, metavar="DIR", help="everything stays here")
    add("--model_name", default="data/quickstart_model", help="base model: a hub id or a folder")
    add("--embedder", default="data/quickstart_embedder", help="sentence-transformers model")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the frozen base")
    add("--epsilons", type=positive_float, nargs="+", default=[2.86, 5.94], help="targets, "
        "histogram included")  # fmt: skip
    add("--num_seeds", type=positive_int, default=3, help="synthetic sets of each kind")
    add("--jobs", type=positive_int, default=1, help="commands at once; each gets its share of "
        "the cores")  # fmt: skip
    add("--perdevice_bs", type=positive_int, default=32, help="sequences of max_seq_len on a "
        "device at once")  # fmt: skip
    add("--json", type=Path, default=None, metavar="FILE", help="also write this")
    group = parser.add_argument_group("size")
    group.add_argument("--size", choices=SIZES, default="small", help="what the flags below are "
                       "where they are left out")  # fmt: skip
    explained = {
        "max_seq_len": "tokens; longer instructions are left out",
        "num_test": "held-out instructions",
        "total_bs": "expected logical batch of DP training",
        "num_epochs": "of DP training",
        "delta": "of the guarantee",
        "clip": "clip norm",
        "lr": "learning rate of DP training; tuning has half of it",
        "num_samples": "texts sampled from each generator",
        "num_selected": "rows of a synthetic set",
        "num_bins": "bins of the DP histogram",
        "tuning_bs": "logical batch of tuning on a set",
    }
    for name, help_ in explained.items():
        kind = positive_float if isinstance(SIZES["small"][name], float) else natural_int
        group.add_argument(f"--{name}", type=kind, default=None, help=help_)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for name, value in SIZES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.work_dir = args.work_dir.resolve()
    require_same_settings(args)
    study = Study(args)
    study.prepare()
    study.side_by_side(study.make_pool, [*study.generators, BASE])
    study.check_pools()
    study.side_by_side(study.tune, study.sets())
    study.score()
    found = study.findings()
    print(table(found))
    if args.json:
        write_json(args.json, found)


def require_same_settings(args: argparse.Namespace) -> None:
    """Refuse to go on in a folder that was begun with other settings.

    Raises:
        UsageError: names the first setting that differs.
    """
    file, given = args.work_dir / "settings.json", study_settings(args)
    begun = json.loads(file.read_text()) if file.exists() else given
    for name, value in given.items():
        if begun.get(name) != value:
            raise UsageError(
                f"{args.work_dir} was begun with --{name} {begun.get(name)}, not {value}; use "
                "another --work_dir"
            )
    write_json(file, given)


def study_settings(args: argparse.Namespace) -> dict:
    """The flags that decide the figures."""
    return {name: value for name, value in vars(args).items() if name not in LOCAL}


@dataclass(frozen=True)
class SyntheticSet:
    """Rows to tune a model on: of a generator's pool, or private ones (source REAL)."""

    source: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.source}-{self.kind}-{self.seed}"


class Study:
    """The stages, each over the commands of the toolkit, and where their outputs lie."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.work_dir
        self.generators = [*map(str, args.epsilons), INFINITY, LOOSE]
        # Of commands that run at once, each has a slot, and with it a share of the cores.
        self._slots, self._free_slots = 1, [0]

    # -------------------------------------------------------------- stages

    def prepare(self) -> None:
        """Part the instructions into private and held-out ones, and embed both."""
        args, data = self.args, self.folder / "data"
        if not (data / "test.json").exists():
            kept, _ = distinct_instructions(read_entries(args.instructions, args.split))
            texts = list(kept.values())
            tokenizer = load_tokenizer(args.model_name)
            # One token more than may be there shows what would be cut.
            ids = training_ids(tokenizer, UNCONDITIONAL, texts, max_seq_len=args.max_seq_len + 1)
            fitting = [t for t, (each, _) in zip(texts, ids) if len(each) <= args.max_seq_len]
            if len(fitting) < 4 * args.num_test:
                raise UsageError(
                    f"{len(fitting):,} distinct instructions fit into --max_seq_len "
                    f"{args.max_seq_len}: too few for --num_test {args.num_test}"
                )
            rows = np.random.default_rng(0).permutation(len(fitting))
            shuffled = [fitting[row] for row in rows]
            write_json(data / "private.json", shuffled[args.num_test :])
            write_json(data / "test.json", shuffled[: args.num_test])
        for name in ("private", "test"):
            self._save(self._dataset(name), self._texts(name))
        self._embed("private", data / "private.json", "--private")
        self._embed("test", data / "test.json", "--synthetic")

    def make_pool(self, source: str) -> None:
        """Train a generator, sample from it, extract and embed what ended by itself."""
        args, adapter = self.args, self.folder / "outputs" / source / "adapter"
        if source != BASE:
            self._run(f"train {source}", "train.py", *self._training(
                "private", source, args.total_bs, args.num_epochs, args.lr, 0
            ), *self._privacy(source))  # fmt: skip
        self._run(
            f"sample {source}", "inference.py", f"--model_name={args.model_name}",
            *([] if source == BASE else [f"--adapter_path={adapter}"]),
            "--instruction_file=utils/syn_instruct.txt", f"--num_samples={args.num_samples}",
            f"--job_sess={source}", f"--output_dir={self.folder / 'samples'}", "--top_p=0.95",
            f"--prompt_style={UNCONDITIONAL}", f"--max_seq_len={args.max_seq_len}",
            f"--dtype={args.dtype}",
        )  # fmt: skip
        samples, pool = (self.folder / place / source for place in ("samples", "pools"))
        if source == BASE:
            # It seldom ends a text, so those that were cut are taken too.
            texts = [sample["text"] for sample in read_samples(samples)]
            samples = self.folder / "samples" / f"{BASE}.json"
            write_json(samples, texts)
        self._run(
            f"extract {source}", "-m", "resample_with_dp_histogram.extract",
            f"--instructions={samples}", f"--output={pool}",
        )  # fmt: skip
        self._embed(source, pool / INSTRUCTIONS_FILE, "--synthetic")

    def check_pools(self) -> None:
        """Refuse to go on where a pool is no larger than the set to select from it."""
        for source in [*self.generators, BASE]:
            size, wanted = len(self._pool(source)), self.args.num_selected
            if size <= wanted:
                raise UsageError(
                    f"{source}: {size:,} of the sampled texts are usable, too few to take "
                    f"--num_selected {wanted:,} from; raise --num_samples"
                )

    def sets(self) -> list[SyntheticSet]:
        """All sets to tune on."""
        kinds = [(source, kind) for source in self.generators for kind in (BEFORE, AFTER)]
        kinds.append((REAL, BEFORE))
        seeds = range(self.args.num_seeds)
        return [SyntheticSet(*kind, seed) for seed in seeds for kind in kinds]

    def tune(self, chosen: SyntheticSet) -> None:
        """Tune the base model on a set."""
        texts = self._pool(chosen.source)
        self._save(self._dataset(chosen.name), [texts[row] for row in self.rows(chosen)])
        self._run(f"tune {chosen.name}", "train.py", *self._training(
            chosen.name, chosen.name, self.args.tuning_bs, 1, self.args.lr / 2, chosen.seed
        ), "--eps=-1")  # fmt: skip

    def rows(self, chosen: SyntheticSet) -> list[int]:
        """Which rows of its pool a set has."""
        args = self.args
        if chosen.kind == BEFORE:
            random = np.random.default_rng(chosen.seed)
            pool = len(self._pool(chosen.source))
            return random.choice(pool, args.num_selected, replace=False).tolist()
        output = self.folder / "selected" / chosen.name
        # Each selection has a ledger of its own: a user makes one of them.
        private = self.folder / "counted" / chosen.name
        private.mkdir(parents=True, exist_ok=True)
        if not (private / "private").exists():
            (private / "private").symlink_to(self._embeddings("private") / "private")
        self._run(
            f"select {chosen.name}", "-m", "resample_with_dp_histogram.resample",
            f"--private_embeddings={private}",
            f"--synthetic_embeddings={self._embeddings(chosen.source)}",
            f"--synthetic_instructions={self.folder / 'pools' / chosen.source}"
            f"/{INSTRUCTIONS_FILE}",
            f"--num_bins={args.num_bins}", f"--histogram_sigma={HISTOGRAM_SIGMA}",
            f"--num_samples={args.num_selected}", f"--seed={chosen.seed}",
            f"--output={output}",
        )  # fmt: skip
        return [row["row"] for row in read_jsonl(output / "selected.jsonl")]

    def score(self) -> None:
        """Held-out losses of the base model, the generators and all tuned models."""
        names = [*self.generators, *(each.name for each in self.sets())]
        args = self.args
        self._run(
            "score", "-m", "evaluation.perplexity", f"--model_name={args.model_name}",
            f"--dataset_name={self._dataset('test')}", f"--prompt_style={UNCONDITIONAL}",
            f"--max_seq_len={args.max_seq_len}", f"--dtype={args.dtype}", "--public",
            f"--perdevice_bs={args.perdevice_bs}", f"--output={self.folder / 'losses'}",
            "--adapter_path", *(str(self._adapter(name)) for name in names),
        )  # fmt: skip

    # -------------------------------------------------------------- what was found

    def findings(self) -> dict:
        """All figures, a JSON-able dict."""
        losses = self._losses()
        results = []
        for source, kind in dict.fromkeys((each.source, each.kind) for each in self.sets()):
            seeds = [each for each in self.sets() if (each.source, each.kind) == (source, kind)]
            results.append({
                "source": source,
                "kind": kind,
                "epsilon": self._epsilon(source, seeds[0]),
                "mauve": [self._mauve(each) for each in seeds],
                "loss": [losses[str(self._adapter(each.name))] for each in seeds],
            })  # fmt: skip
        base = [SyntheticSet(BASE, BEFORE, seed) for seed in range(self.args.num_seeds)]
        return {
            "sizes": {
                "private": len(self._texts("private")),
                "steps": num_steps(
                    self.args.num_epochs, len(self._texts("private")), self.args.total_bs
                ),
                "pools": {s: len(self._pool(s)) for s in [*self.generators, BASE]},
            },
            "base": {
                "mauve": [self._mauve(each) for each in base],
                "loss": losses[self.args.model_name],
            },
            "generators": {
                name: {
                    "loss": losses[str(self._adapter(name))],
                    "noise_multiplier": self._noise_multiplier(name),
                }
                for name in self.generators
            },
            "sets": results,
            "seconds": self._times,
            "settings": study_settings(self.args),
            "versions": versions_of(VERSIONED),
        }

    def _losses(self) -> dict[str, dict]:
        """Loss per token and its interval, by model."""
        (result,) = read_results(self.folder / "losses", private=False)
        return {
            score["subject"]: {key: score[key] for key in ("value", "low", "high")}
            for score in result["scores"]
            if score["name"] == "loss per token (nats)"
        }

    def _mauve(self, chosen: SyntheticSet) -> float:
        """MAUVE of a set and as many held-out rows, the mean over clusterings."""
        private = chosen.source == REAL
        embeddings = open_embeddings(
            self._embeddings("private" if private else chosen.source), private
        )
        real = open_embeddings(self._embeddings("test"), private=False).vectors
        random = np.random.default_rng(chosen.seed)
        held_out = random.choice(len(real), self.args.num_selected, replace=False)
        one, other = embeddings.vectors[self.rows(chosen)], real[held_out]
        return float(np.mean([mauve(one, other, seed) for seed in range(CLUSTERINGS)]))

    def _epsilon(self, source: str, chosen: SyntheticSet) -> float | None:
        """What a set costs, composed; None for those without privacy."""
        if source in (INFINITY, REAL):
            return None
        ledgers = self.folder / "counted" / chosen.name / "histogram_ledger.jsonl"
        run = self.folder / "outputs" / source
        report = composed_report(run, [ledgers] if chosen.kind == AFTER else [])
        return report["epsilon"][ADD_REMOVE]["upper"]

    # -------------------------------------------------------------- commands and places

    def _training(
        self, data: str, job: str, batch: int, epochs: float, lr: float, seed: int
    ) -> list[str]:
        """Flags of a training run that have nothing to do with privacy."""
        args = self.args
        return [
            f"--dataset_name={self._dataset(data)}", f"--model_name={args.model_name}",
            f"--job_sess={job}", f"--output_dir={self.folder / 'outputs'}",
            f"--prompt_style={UNCONDITIONAL}", f"--max_seq_len={args.max_seq_len}",
            f"--total_bs={batch}", f"--num_epochs={epochs}", f"--lr={lr}", f"--seed={seed}",
            f"--perdevice_bs={args.perdevice_bs}", f"--dtype={args.dtype}",
            "--loss_normalization=tokens", "--no_eval_at_start", "--resume=auto",
        ]  # fmt: skip

    def _privacy(self, source: str) -> list[str]:
        """Flags of a generator's training that decide its guarantee."""
        args = self.args
        if source == INFINITY:
            return ["--eps=-1"]
        epsilon = max(args.epsilons) if source == LOOSE else float(source)
        flags = [f"--eps={epsilon}", f"--delta={args.delta}", f"--clip={args.clip}"]
        if source == LOOSE:
            rows = len(self._texts("private"))
            steps = num_steps(args.num_epochs, rows, args.total_bs)
            sigma = loose_noise_multiplier(epsilon, args.delta, args.total_bs / rows, steps)
            flags.append(f"--noise_multiplier={sigma}")
        return [*flags, f"--reserve_histogram_sigma={HISTOGRAM_SIGMA}"]

    def _run(self, name: str, *command: str) -> None:
        """Run a command of the toolkit on this job's share of the cores; its output goes to a log.

        One that has ended well before is passed over.

        Raises:
            UsageError: it failed; the log is named.
        """
        finished = self.folder / "times" / f"{name.replace(' ', '-')}.json"
        if finished.exists():
            return
        cores = sorted(os.sched_getaffinity(0))
        slot = self._free_slots.pop()
        own = set(cores[slot :: self._slots]) or set(cores)
        log = self.folder / "logs" / f"{finished.stem}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            with open(log, "w") as file:
                done = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, check=False,
                    preexec_fn=lambda: os.sched_setaffinity(0, own),
                )  # fmt: skip
        finally:
            self._free_slots.append(slot)
        if done.returncode:
            last = log.read_text().strip().splitlines()[-1:]
            raise UsageError(f"{name} failed: {''.join(last)[:200]} (all of it is in {log})")
        seconds = time.monotonic() - began
        say(f"{name}: {seconds:.0f} s")
        write_json(finished, seconds)

    def side_by_side(self, stage: Callable, items: list) -> None:
        """A stage for every item, --jobs at once."""
        self._slots, self._free_slots = self.args.jobs, list(range(self.args.jobs))
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = [pool.submit(stage, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                say(f"{error or type(error).__name__}; stopping once running commands have ended")
                for future in futures:
                    future.cancel()
                raise
        self._slots, self._free_slots = 1, [0]

    def _embed(self, name: str, texts: Path, kind: str) -> None:
        self._run(
            f"embed {name}", "-m", "resample_with_dp_histogram.embed", kind,
            f"--instructions={texts}", f"--model={self.args.embedder}",
            f"--output={self._embeddings(name)}",
        )  # fmt: skip

    def _save(self, path: str, texts: list[str]) -> None:
        """Write a data set whose train and test splits are the texts."""
        if not Path(path).exists():
            datasets.disable_progress_bars()
            rows = datasets.Dataset.from_dict({"instruction": texts})
            datasets.DatasetDict(train=rows, test=rows).save_to_disk(path)

    def _dataset(self, name: str) -> str:
        return str(self.folder / "data" / name)

    def _embeddings(self, name: str) -> Path:
        return self.folder / "embeddings" / name

    def _adapter(self, name: str) -> Path:
        return self.folder / "outputs" / name / "adapter"

    def _noise_multiplier(self, name: str) -> float | None:
        report = json.loads((self.folder / "outputs" / name / "privacy_report.json").read_text())
        return report.get("noise_multiplier")

    def _texts(self, name: str) -> list[str]:
        return json.loads((self.folder / "data" / f"{name}.json").read_text())

    def _pool(self, source: str) -> list[str]:
        if source == REAL:
            return self._texts("private")
        rows = read_jsonl(self.folder / "pools" / source / INSTRUCTIONS_FILE)
        return [row["instruction"] for row in rows]

    @property
    def _times(self) -> dict[str, float]:
        """Seconds of every command, by its name."""
        files = sorted((self.folder / "times").glob("*.json"))
        return {path.stem: json.loads(path.read_text()) for path in files}


def loose_noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The noise multiplier at which an accountant with a wide error says `epsilon`.

    Training and the histogram composed, from PRV's upper bound at `LOOSE_EPS_ERROR`.
    """

    def excess(sigma: float) -> float:
        accountant = PRVAccountant(
            [
                PoissonSubsampledGaussianMechanism(rate, sigma),
                GaussianMechanism(HISTOGRAM_SIGMA),
            ],
            max_self_compositions=[steps, 1],
            eps_error=LOOSE_EPS_ERROR,
            delta_error=delta / 1000,
        )
        return accountant.compute_epsilon(delta, [steps, 1])[2] - epsilon

    histogram = SampledGaussian(1.0, HISTOGRAM_SIGMA, 1)
    tight = calibrate_noise_multiplier(epsilon, delta, rate, steps, [histogram])
    return round(brentq(excess, tight - 0.001, 1.2 * tight, xtol=1e-3), 3)


def table(found: dict) -> str:
    """Markdown: a line for each kind of set, mean and deviation over seeds."""
    lines = [
        "| learnt from | set | epsilon | MAUVE | held-out loss, nats a token |",
        "|---|---|---|---|---|",
    ]
    base = found["base"]
    lines.append(
        f"| nothing (base model) | its samples, cut ones too | 0 | {plus_minus(base['mauve'])} | "
        f"{base['loss']['value']:.3f} ({base['loss']['low']:.3f} to {base['loss']['high']:.3f}) |"
    )
    for each in found["sets"]:
        epsilon = "none" if each["epsilon"] is None else f"{each['epsilon']:.3f}"
        losses = [loss["value"] for loss in each["loss"]]
        lines.append(
            f"| {each['source']} | {each['kind']} selection | {epsilon} | "
            f"{plus_minus(each['mauve'])} | {plus_minus(losses)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
