"""What the guarantee costs in utility: synthetic data and models tuned on it, at several epsilons.

    python -m benchmarks.utility --instructions FILE --work_dir utility --json utility.json

Real instructions are parted into private and held-out ones. Each generator (see `arms`) learns from
the private ones, a pool is sampled from it, and rows of the pool make a synthetic set: drawn at
random (before), or selected by a DP histogram of the private rows (after), which training's epsilon
pays for too. A model tuned on each set is scored on the held-out instructions; each set is compared
with them by MAUVE. Sets, histograms and tuning are repeated for every seed; generators are not.

Every step runs the toolkit's own commands, and one that has ended is passed over when the same
command goes on after a stop. --size paper asks for the sizes of the paper, for GPUs; single flags
change either size.
"""

from dataclasses import dataclass

from benchmarks import studies
from utils.command_line.parser import answer_early, flag, positive_float, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings(studies.Settings):
    """The flags."""

    embedder: str = flag("sentence-transformers model", "data/quickstart_embedder")
    epsilons: list[float] = flag(
        "targets, histogram included", [2.86, 5.94], type=positive_float, nargs="+"
    )
    num_seeds: int = flag("synthetic sets of each kind", 3)
    size: str = flag(
        "what the flags below are where they are left out; small is shown",
        "small", choices=("small", "paper"),
    )  # fmt: skip
    total_bs: int = flag("expected logical batch of DP training", 256)
    num_epochs: float = flag("of DP training", 1.0)
    delta: float = flag("of the guarantee", 1e-5)
    clip: float = flag("clip norm", 1.0)
    lr: float = flag("learning rate of DP training; tuning has half of it", 2e-3)
    num_samples: int = flag("texts sampled from each generator", 1500)
    num_selected: int = flag("rows of a synthetic set", 400)
    num_bins: int = flag("bins of the DP histogram", 50)
    tuning_bs: int = flag("logical batch of tuning on a set", 16)


answer_early(__name__, Settings, __doc__)

import json
from pathlib import Path

import numpy as np
from prv_accountant import PRVAccountant
from prv_accountant.privacy_random_variables import (
    GaussianMechanism,
    PoissonSubsampledGaussianMechanism,
)
from scipy.optimize import brentq

from benchmarks.figures import markdown
from benchmarks.studies import (
    fitting_instructions,
    losses_by_model,
    model_flags,
    require_same_settings,
    run_once,
    side_by_side,
)
from evaluation.measures.intervals import plus_minus
from evaluation.measures.mauve import mauve
from privacy_checks.composition import composed_report
from resample_with_dp_histogram.embeddings import open_embeddings
from resample_with_dp_histogram.extract import INSTRUCTIONS_FILE
from utils.cli import UsageError, run_cli
from utils.files import read_jsonl, write_json
from utils.folders import save_dataset
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian, calibrate_noise_multiplier
from utils.privacy.plan import num_steps
from utils.sampling.shards import read_samples
from utils.versions import versions_of

BEFORE, AFTER = "before", "after"
HISTOGRAM_SIGMA = 10.0
LOOSE_EPS_ERROR = 0.1
# MAUVE depends on its clusters, so a set's score is the mean over as many clusterings.
CLUSTERINGS = 5
VERSIONED = ("torch", "transformers", "peft", "prv-accountant", "faiss-cpu")
# Of the paper's section 5. Two cores end the other size, that of the flags, within two hours.
PAPER = {
    "max_seq_len": 1024, "num_test": 5000, "total_bs": 4096, "num_epochs": 10.0, "delta": 5e-7,
    "clip": 0.5, "lr": 1e-3, "num_samples": 1_000_000, "num_selected": 180_000, "num_bins": 1000,
    "tuning_bs": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """Where the rows of synthetic sets come from.

    Attributes:
        epsilon: the target of its DP training; None without clipping and noise.
        loose: its noise comes from the accountant settings of the published code (eps_error 0.1).
        trained: a generator is trained for it; if not, the base model stands in for one.
        sampled: its pool is sampled; if not, its rows are the private ones themselves.
        kinds: how sets are taken that a model is tuned on.
    """

    name: str
    epsilon: float | None = None
    loose: bool = False
    trained: bool = True
    sampled: bool = True
    kinds: tuple[str, ...] = (BEFORE, AFTER)


def arms(epsilons: list[float]) -> list[Arm]:
    """What is compared."""
    return [
        *(Arm(str(epsilon), epsilon) for epsilon in epsilons),
        Arm("inf"),
        Arm("loose", max(epsilons), loose=True),
        Arm("base", trained=False, kinds=()),
        Arm("real", trained=False, sampled=False, kinds=(BEFORE,)),
    ]


@dataclass(frozen=True)
class SyntheticSet:
    """Rows to tune a model on."""

    arm: Arm
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.arm.name}-{self.kind}-{self.seed}"


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    if settings.size == "paper":
        settings = read_flags(Settings, __doc__, argv, **PAPER)
    require_same_settings(settings)
    study = Study(settings)
    study.part_instructions()
    side_by_side(settings.jobs, study.make_pool, [arm for arm in study.arms if arm.sampled])
    side_by_side(settings.jobs, study.tune, study.sets)
    study.score()
    found = study.findings()
    print(table(found))
    settings.write(found)


class Study:
    """The steps, each over the commands of the toolkit, and where their outputs lie."""

    def __init__(self, settings: Settings):
        self.settings, self.folder = settings, settings.work_dir.resolve()
        self.arms = arms(settings.epsilons)
        self.sets = [
            SyntheticSet(arm, kind, seed)
            for seed in range(settings.num_seeds)
            for arm in self.arms
            for kind in arm.kinds
        ]
        self._model = model_flags(settings)

    # -------------------------------------------------------------- steps

    def part_instructions(self) -> None:
        """Part the instructions into private and held-out ones, and embed both."""
        settings, data = self.settings, self.folder / "data"
        if not (data / "test.json").exists():
            shuffled = fitting_instructions(settings)
            write_json(data / "private.json", shuffled[settings.num_test :])
            write_json(data / "test.json", shuffled[: settings.num_test])
        for name, kind in (("private", "--private"), ("test", "--synthetic")):
            self._save(name, self._texts(name))
            self._embed(name, data / f"{name}.json", kind)

    def make_pool(self, arm: Arm) -> None:
        """Train a generator, sample from it, extract and embed what ended by itself.

        Raises:
            UsageError: the pool is no larger than the set to select from it.
        """
        settings = self.settings
        if arm.trained:
            self._train(
                "train", arm.name, "private", f"--total_bs={settings.total_bs}",
                f"--num_epochs={settings.num_epochs}", f"--lr={settings.lr}", "--seed=0",
                *self._privacy(arm),
            )  # fmt: skip
        self.run(
            f"sample {arm.name}", "inference.py", *self._model, "--top_p=0.95",
            *([f"--adapter_path={self._adapter(arm.name)}"] if arm.trained else []),
            "--instruction_file=utils/syn_instruct.txt", f"--num_samples={settings.num_samples}",
            f"--job_sess={arm.name}", f"--output_dir={self.folder / 'samples'}",
        )  # fmt: skip
        samples, pool = (self.folder / place / arm.name for place in ("samples", "pools"))
        if not arm.trained:
            # The base seldom ends a text, so those that were cut are taken too.
            texts = [sample["text"] for sample in read_samples(samples)]
            samples = samples.with_suffix(".json")
            write_json(samples, texts)
        self.run(
            f"extract {arm.name}", "-m", "resample_with_dp_histogram.extract",
            f"--instructions={samples}", f"--output={pool}",
        )  # fmt: skip
        self._embed(arm.name, pool / INSTRUCTIONS_FILE, "--synthetic")
        if (size := len(self._pool(arm))) <= settings.num_selected:
            raise UsageError(
                f"{arm.name}: {size:,} of the sampled texts are usable, too few to take "
                f"--num_selected {settings.num_selected:,} from; raise --num_samples"
            )

    def tune(self, chosen: SyntheticSet) -> None:
        """Tune the base model on a set."""
        texts = self._pool(chosen.arm)
        self._save(chosen.name, [texts[row] for row in self.rows(chosen)])
        self._train(
            "tune", chosen.name, chosen.name, f"--total_bs={self.settings.tuning_bs}",
            "--num_epochs=1", f"--lr={self.settings.lr / 2}", f"--seed={chosen.seed}", "--eps=-1",
        )  # fmt: skip

    def rows(self, chosen: SyntheticSet) -> list[int]:
        """Which rows of its pool a set has."""
        settings = self.settings
        if chosen.kind == BEFORE:
            random, pool = np.random.default_rng(chosen.seed), len(self._pool(chosen.arm))
            return random.choice(pool, settings.num_selected, replace=False).tolist()
        output = self.folder / "selected" / chosen.name
        # Each selection has a ledger of its own: a user makes one of them.
        private = self.folder / "counted" / chosen.name
        private.mkdir(parents=True, exist_ok=True)
        if not (private / "private").exists():
            (private / "private").symlink_to(self.folder / "embeddings" / "private" / "private")
        name = chosen.arm.name
        self.run(
            f"select {chosen.name}", "-m", "resample_with_dp_histogram.resample",
            f"--private_embeddings={private}",
            f"--synthetic_embeddings={self.folder / 'embeddings' / name}",
            f"--synthetic_instructions={self.folder / 'pools' / name / INSTRUCTIONS_FILE}",
            f"--num_bins={settings.num_bins}", f"--histogram_sigma={HISTOGRAM_SIGMA}",
            f"--num_samples={settings.num_selected}", f"--seed={chosen.seed}",
            f"--output={output}",
        )  # fmt: skip
        return [row["row"] for row in read_jsonl(output / "selected.jsonl")]

    def score(self) -> None:
        """Held-out losses of the base model, the generators and all tuned models."""
        names = [arm.name for arm in self.arms if arm.trained] + [each.name for each in self.sets]
        self.run(
            "score", "-m", "evaluation.perplexity", *self._model, "--public",
            f"--dataset_name={self.folder / 'data' / 'test'}",
            f"--perdevice_bs={self.settings.perdevice_bs}", f"--output={self.folder / 'losses'}",
            "--adapter_path", *(str(self._adapter(name)) for name in names),
        )  # fmt: skip

    # -------------------------------------------------------------- what was found

    def findings(self) -> dict:
        """All figures, a JSON-able dict."""
        settings, private = self.settings, len(self._texts("private"))
        losses = losses_by_model(self.folder / "losses")
        generators, sets, base = {}, [], {}
        for arm in self.arms:
            if arm.trained:
                report = self.folder / "outputs" / arm.name / "privacy_report.json"
                sigma = json.loads(report.read_text()).get("noise_multiplier")
                loss = losses[str(self._adapter(arm.name))]
                generators[arm.name] = {"loss": loss, "noise_multiplier": sigma}
            for kind in arm.kinds or (BEFORE,):
                seeds = [SyntheticSet(arm, kind, seed) for seed in range(settings.num_seeds)]
                mauves = [self._mauve(each) for each in seeds]
                if not arm.kinds:
                    base = {"mauve": mauves, "loss": losses[settings.model_name]}
                    continue
                sets.append({
                    "source": arm.name, "kind": kind, "epsilon": self._epsilon(seeds[0]),
                    "mauve": mauves,
                    "loss": [losses[str(self._adapter(each.name))] for each in seeds],
                })  # fmt: skip
        times = sorted((self.folder / "times").glob("*.json"))
        return {
            "sizes": {
                "private": private,
                "steps": num_steps(settings.num_epochs, private, settings.total_bs),
                "pools": {arm.name: len(self._pool(arm)) for arm in self.arms if arm.sampled},
            },
            "base": base,
            "generators": generators,
            "sets": sets,
            "seconds": {path.stem: json.loads(path.read_text()) for path in times},
            "settings": settings.on_record(),
            "versions": versions_of(VERSIONED),
        }

    def _mauve(self, chosen: SyntheticSet) -> float:
        """MAUVE of a set and as many held-out rows, the mean over clusterings."""
        private = not chosen.arm.sampled
        embeddings = self.folder / "embeddings"
        pool = open_embeddings(embeddings / ("private" if private else chosen.arm.name), private)
        real = open_embeddings(embeddings / "test", private=False).vectors
        random = np.random.default_rng(chosen.seed)
        held_out = random.choice(len(real), self.settings.num_selected, replace=False)
        one, other = pool.vectors[self.rows(chosen)], real[held_out]
        return float(np.mean([mauve(one, other, seed) for seed in range(CLUSTERINGS)]))

    def _epsilon(self, chosen: SyntheticSet) -> float | None:
        """What a set costs, composed; None for those without privacy."""
        if chosen.arm.epsilon is None:
            return None
        ledger = self.folder / "counted" / chosen.name / "histogram_ledger.jsonl"
        run = self.folder / "outputs" / chosen.arm.name
        report = composed_report(run, [ledger] if chosen.kind == AFTER else [])
        return report["epsilon"][ADD_REMOVE]["upper"]

    # -------------------------------------------------------------- commands and places

    def _privacy(self, arm: Arm) -> list[str]:
        """Flags of a generator's training that decide its guarantee."""
        settings = self.settings
        if arm.epsilon is None:
            return ["--eps=-1"]
        flags = [
            f"--eps={arm.epsilon}", f"--delta={settings.delta}", f"--clip={settings.clip}",
            f"--reserve_histogram_sigma={HISTOGRAM_SIGMA}",
        ]  # fmt: skip
        if arm.loose:
            rows = len(self._texts("private"))
            rate, steps = (
                settings.total_bs / rows,
                num_steps(settings.num_epochs, rows, settings.total_bs),
            )
            sigma = loose_noise_multiplier(arm.epsilon, settings.delta, rate, steps)
            flags.append(f"--noise_multiplier={sigma}")
        return flags

    def _train(self, step: str, job: str, data: str, *flags: str) -> None:
        self.run(
            f"{step} {job}", "train.py", *self._model,
            f"--dataset_name={self.folder / 'data' / data}", f"--job_sess={job}",
            f"--output_dir={self.folder / 'outputs'}",
            f"--perdevice_bs={self.settings.perdevice_bs}", "--loss_normalization=tokens",
            "--no_eval_at_start", "--resume=auto", *flags,
        )  # fmt: skip

    def _embed(self, name: str, texts: Path, kind: str) -> None:
        self.run(
            f"embed {name}", "-m", "resample_with_dp_histogram.embed", kind,
            f"--instructions={texts}", f"--model={self.settings.embedder}",
            f"--output={self.folder / 'embeddings' / name}",
        )  # fmt: skip

    def run(self, name: str, *command: str) -> None:
        """`run_once` in the folder of the study."""
        run_once(self.folder, name, *command)

    def _save(self, name: str, texts: list[str]) -> None:
        """Write a data set whose train and test splits are the texts."""
        folder = self.folder / "data" / name
        if not folder.exists():
            rows = [{"instruction": text} for text in texts]
            save_dataset(folder, {"train": rows, "test": rows}, ["instruction"], {"rows": name})

    def _adapter(self, name: str) -> Path:
        return self.folder / "outputs" / name / "adapter"

    def _texts(self, name: str) -> list[str]:
        return json.loads((self.folder / "data" / f"{name}.json").read_text())

    def _pool(self, arm: Arm) -> list[str]:
        if not arm.sampled:
            return self._texts("private")
        rows = read_jsonl(self.folder / "pools" / arm.name / INSTRUCTIONS_FILE)
        return [row["instruction"] for row in rows]


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
    base, loss = plus_minus(found["base"]["mauve"]), found["base"]["loss"]
    interval = f"{loss['value']:.3f} ({loss['low']:.3f} to {loss['high']:.3f})"
    rows = [["nothing (base model)", "its samples, cut ones too", "0", base, interval]]
    for each in found["sets"]:
        epsilon = "none" if each["epsilon"] is None else f"{each['epsilon']:.3f}"
        losses = plus_minus([loss["value"] for loss in each["loss"]])
        mauves = plus_minus(each["mauve"])
        rows.append([each["source"], f"{each['kind']} selection", epsilon, mauves, losses])
    headings = ["learnt from", "set", "epsilon", "MAUVE", "held-out loss, nats a token"]
    return markdown(headings, rows)


if __name__ == "__main__":
    run_cli(main)
