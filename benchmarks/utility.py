"""What synthetic data is worth at one epsilon: sets of it, and models tuned on them.

    python -m benchmarks.utility --instructions FILE --work_dir utility --json utility.json --jobs 2

Real instructions are parted into public, held-out and private ones. A small base is made of the
public ones on the spot (or --model_name stands in for it), and topics are found in them. Each arm
of --arms is a set of flags of `train.py`; for every epsilon and seed a generator of it learns from
the private ones, by itself or by topic, and a pool is sampled from it: as many tokens of each. Rows
of the pool make a synthetic set: drawn at random (before), or selected by a DP histogram of the
private rows (after). Epsilon is of all that a set takes, histograms included: training leaves room
for them.

A model tuned on each set is scored on the held-out instructions, and the set is compared with them:
by MAUVE, by coverage, and by the shares of topics of another clustering, which neither training nor
selection has seen. Generators of one seed are pairs, and intervals are over generators.

Every step runs the toolkit's own commands, and one that has ended is passed over when the same
command goes on after a stop. --size small is for SmolLM2 on two cores, and --size paper asks for
the sizes of the paper, for GPUs; single flags change any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import studies
from utils.command_line.parser import (
    answer_early,
    flag,
    positive_float,
    positive_int,
    read_flags,
)

ARMS = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, kw_only=True)
class Settings(studies.ArmsSettings):
    """The flags."""

    arms: Path = flag(
        "YAML of the arms; this folder's utility.yaml has an example", ARMS, type=Path
    )
    embedder: str = flag("sentence-transformers model", "data/quickstart_embedder")
    epsilons: list[float] = flag(
        "targets, histograms included", [5.94], type=positive_float, nargs="+"
    )
    num_generators: int = flag("of each arm and epsilon, in pairs of one seed", 3)
    num_seeds: int = flag("synthetic sets of each kind, of each generator", 1)
    size: str = flag(
        "what the flags below are where they are left out; quick is shown",
        "quick", choices=("quick", "small", "paper"),
    )  # fmt: skip
    prompted_tokens: int = flag(
        "of the small base's pre-training on public instructions after their topics, where an arm "
        "has topics: a base that reads no prompts has none to learn by", 1_000_000,
    )  # fmt: skip
    max_seq_len: int = flag(
        "tokens; longer instructions are left out; models of every arm have 48 more, room for the "
        "keywords of a topic, which a loss over max_seq_len is divided by too", 40,
    )  # fmt: skip
    row_tokens: int | None = flag(
        "cut private and held-out instructions at a word, so that none has more than these; none "
        "is cut if left out",
        30, type=positive_int,
    )  # fmt: skip
    total_bs: int = flag("expected logical batch of DP training", 256)
    num_epochs: float = flag("of DP training", 1.0)
    clip: float = flag("clip norm", 0.5)
    lr: float = flag("learning rate of DP training; tuning has half of it", 1e-2)
    num_samples: int = flag("texts sampled from each generator", 1500)
    num_selected: int = flag("rows of a synthetic set", 400)
    num_bins: int = flag("bins of the DP histogram of a selection", 50)
    histogram_sigma: float = flag("noise of every count, of bins and of topics", 10.0)
    num_topics: int = flag("topics to learn and sample by", 30)
    num_other_topics: int = flag("topics of the clustering that no method has seen", 40)
    tuning_bs: int = flag("logical batch of tuning on a set", 16)


answer_early(__name__, Settings, __doc__)

import json
import math

import numpy as np
from prv_accountant import PRVAccountant
from prv_accountant.privacy_random_variables import (
    GaussianMechanism,
    PoissonSubsampledGaussianMechanism,
)
from scipy.optimize import brentq

from benchmarks.figures import markdown
from benchmarks.next_tokens import FILE as ACCURACY_FILE
from benchmarks.small_base import small_base, taught
from benchmarks.studies import (
    RECORD,
    RESERVED,
    Generator,
    begun_alike,
    cut_at_words,
    held_out_and_private,
    losses_by_model,
    mean_of,
    model_flags,
    public_and_rest,
    read_arms,
    read_generators,
    recorded,
    require_trainable,
    run_once,
    side_by_side,
    that_fit,
    words_of,
)
from evaluation.measures.manifold import overlap
from evaluation.measures.mauve import mauve
from privacy_checks.composition import composed_report
from resample_with_dp_histogram.clusters import fit_clusters
from resample_with_dp_histogram.embeddings import open_embeddings
from resample_with_dp_histogram.extract import INSTRUCTIONS_FILE, distinct_instructions
from resample_with_dp_histogram.selection import total_variation
from topics.folder import HISTOGRAM_FILE, read_topics
from utils.cli import UsageError, run_cli, say
from utils.files import json_lines, read_jsonl, write_atomic, write_json
from utils.folders import save_dataset
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian, calibrate_noise_multiplier
from utils.privacy.ledger import head_file
from utils.privacy.plan import num_steps
from utils.sampling.shards import read_samples
from utils.texts.prompts import TOPIC, TOPIC_TEMPLATE, UNCONDITIONAL
from utils.texts.text_inputs import FINISHED, read_entries
from utils.versions import versions_of

BEFORE, AFTER = "before", "after"
LOOSE, LOOSE_EPS_ERROR = "loose", 0.1
# MAUVE depends on its clusters, so a set's score is the mean over as many clusterings.
CLUSTERINGS, NEIGHBOURS = 5, 5
# Of the clustering that no method has seen; theirs have seeds from 0 on.
OTHER_SEED = 1_000_003
# Tokens that a prompt of keywords may add to an instruction.
TOPIC_ROOM = 48
VERSIONED = ("torch", "transformers", "peft", "prv-accountant", "faiss-cpu")
# Figures of a set, in the order of the table.
MEASURES = ("mauve", "coverage", "topics", "loss", "accuracy", "tokens")
# Two cores end this size within two hours for one generator of each of four arms.
SMALL = {
    "model_name": "data/quickstart_model", "max_seq_len": 64, "row_tokens": None, "clip": 1.0,
    "lr": 2e-3,
}  # fmt: skip
# Of the paper's section 5.
PAPER = SMALL | {
    "max_seq_len": 1024, "num_test": 5000, "total_bs": 4096, "num_epochs": 10.0, "delta": 5e-7,
    "clip": 0.5, "lr": 1e-3, "num_samples": 1_000_000, "num_selected": 180_000, "num_bins": 1000,
    "num_topics": 500, "num_other_topics": 700, "tuning_bs": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where the rows of synthetic sets come from.

    Attributes:
        name: a file name.
        generator: None for the base as it is, and for the private rows themselves.
        kinds: how sets are taken that a model is tuned on.
        budget: tokens of its pool, in a generator's, once all are sampled.
    """

    name: str
    generator: Generator | None = None
    kinds: tuple[str, ...] = (BEFORE, AFTER)
    budget: int | None = None

    @property
    def pool(self) -> str:
        """The name of its pool, and part of those of all that follows: another budget, others."""
        return f"{self.name}-{self.budget}" if self.budget else self.name

    @property
    def by_topic(self) -> bool:
        """Whether it learns and samples by topics."""
        return self.generator is not None and self.generator.flags.get("prompt_style") == TOPIC

    @property
    def seed(self) -> int:
        """What its training and sampling have in common with those of its pairs."""
        return self.generator.seed if self.generator else 0


# The untuned base, and private rows in the place of synthetic ones.
BASE, REAL = Source(RESERVED[0], kinds=()), Source(RESERVED[1], kinds=(BEFORE,))


@dataclass(frozen=True)
class SyntheticSet:
    """Rows to tune a model on."""

    source: Source
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.source.pool}-{self.kind}-{self.seed}"


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    if settings.size != "quick":
        defaults = SMALL if settings.size == "small" else PAPER
        settings = read_flags(Settings, __doc__, argv, **defaults)
    if min(settings.num_selected, settings.num_test) <= NEIGHBOURS:
        raise UsageError(
            f"--num_selected {settings.num_selected}, --num_test {settings.num_test}: coverage "
            f"looks at the {NEIGHBOURS} nearest rows of each; use more than these"
        )
    study = Study(settings)
    study.part_instructions()
    side_by_side(settings.jobs, study.sample, study.sampled)
    budget = study.share_budget()
    side_by_side(settings.jobs, study.make_pool, study.sampled)
    study.leave_out_small_pools()
    side_by_side(settings.jobs, study.tune, study.sets)
    study.score()
    found = study.findings(budget)
    print(table(found))
    settings.write(found)


class Study:
    """The steps, each over the commands of the toolkit, and where their outputs lie.

    Attributes:
        sources: all that sets are taken from.
        sampled: those of them that a pool is sampled from.
        sets: all that a model is tuned on.
    """

    def __init__(self, settings: Settings):
        self.settings = self._given = settings
        self.folder = settings.work_dir.resolve()
        sizes = {
            "total_bs": settings.total_bs, "num_epochs": settings.num_epochs,
            "clip": settings.clip, "lr": settings.lr,
        }  # fmt: skip
        generators = read_generators(
            settings.arms, settings.only, settings.epsilons, settings.num_generators, sizes
        )
        trained = [Source(each.name, each) for each in generators]
        for source, each in zip(trained, generators):
            require_trainable(each.arm, self._learning(source, each))
        self._take(trained)

    def _take(self, trained: list[Source]) -> None:
        """Take these and what has no generator."""
        self.sources, self.sampled = [BASE, REAL, *trained], [BASE, *trained]
        self.sets = [
            SyntheticSet(source, kind, seed)
            for source in self.sources
            for kind in source.kinds
            for seed in self._seeds(self.settings, source)
        ]

    @staticmethod
    def _seeds(settings: Settings, source: Source) -> range:
        """Of the sets of a source: those without a generator have one for each."""
        count = settings.num_seeds * (1 if source.generator else settings.num_generators)
        return range(source.seed * settings.num_seeds, source.seed * settings.num_seeds + count)

    # -------------------------------------------------------------- steps

    def part_instructions(self) -> None:
        """Part the instructions, make the base, and give rows their embeddings and topics."""
        self.settings = self._part(self.settings)
        self._save_data()

    def _part(self, settings: Settings) -> Settings:
        """Part the instructions once, and give the settings with the base that is used."""
        data, (public, rest) = self.folder / "data", public_and_rest(settings)
        if not public and self._by_topic:
            raise UsageError(
                "--num_public 0: topics are found in public rows; give some, or arms without topics"
            )
        # More generators and other arms may come, but none that another base is made for.
        record = begun_alike(
            replace(settings, epsilons=[], num_generators=1, num_seeds=1), [*public, *rest],
            prompts_taught=self._teaches,
        )  # fmt: skip
        if not settings.model_name:
            base = small_base(self.folder / "bases", public, settings.pretraining_tokens)
            settings = replace(settings, model_name=str(base))
        if not (data / "test.json").exists():
            if settings.row_tokens:
                rest = cut_at_words(settings.model_name, rest, settings.row_tokens)
            held_out, private = held_out_and_private(settings, that_fit(settings, rest))
            least = max(settings.num_other_topics, NEIGHBOURS + 1)
            if len(held_out) < least or len(private) < settings.num_selected:
                raise UsageError(
                    f"{len(held_out):,} held-out rows that no private one equals and "
                    f"{len(private):,} private ones are too few for --num_other_topics "
                    f"{settings.num_other_topics} and --num_selected {settings.num_selected}"
                )
            write_json(self.folder / RECORD, record)
            write_json(data / "public.json", public)
            write_json(data / "private.json", private)
            write_json(data / "test.json", held_out)
        return settings

    def _save_data(self) -> None:
        """Save and embed private and held-out rows, and give them topics where an arm asks."""
        data = self.folder / "data"
        self._save("rows", train=self._texts("private"), test=self._texts("test"))
        for name, kind in (("private", "--private"), ("test", "--synthetic")):
            self._embed(name, data / f"{name}.json", kind)
        if self._by_topic or self._teaches:
            topics = self.folder / "topics"
            self.run(
                "find topics", "-m", "topics.fit", f"--public={data / 'public.json'}",
                f"--model={self.settings.embedder}", f"--num_topics={self.settings.num_topics}",
                f"--output={topics}", makes=[topics],
            )  # fmt: skip
            if self._teaches:
                self._teach_prompts(topics)
        if self._by_topic:
            rows = data / "rows_with_topics"
            self.run(
                "assign topics", "-m", "topics.assign", f"--private={data / 'rows'}",
                f"--topics={topics}", f"--output={rows}", makes=[rows],
            )  # fmt: skip

    def _teach_prompts(self, folder: Path) -> None:
        """Have the small base read public instructions after the keywords of their topics."""
        data, topics = self.folder / "data" / "public.json", read_topics(folder)
        self._embed("public", data, "--synthetic")
        vectors = open_embeddings(self.folder / "embeddings" / "public", private=False).vectors
        numbers = topics.clusters.assign(vectors, str(data))
        prompted = [
            TOPIC_TEMPLATE.format(topic=topics.keywords[number]) + text
            for number, text in zip(numbers, self._texts("public"))
        ]
        base = taught(Path(self.settings.model_name), prompted, self.settings.prompted_tokens)
        self.settings = replace(self.settings, model_name=str(base))

    def sample(self, source: Source) -> None:
        """Train a generator, and sample from it."""
        settings, name = self.settings, source.name
        wanted = ["--instruction_file=utils/syn_instruct.txt"]
        if source.by_topic:
            histogram = self.folder / "topic_histograms" / name
            ledger = self._ledger("topic", name)
            self.run(
                f"count {name}", "-m", "topics.histogram", f"--output={histogram}",
                f"--assigned={self._dataset(source)}", f"--ledger={ledger}",
                f"--histogram_sigma={settings.histogram_sigma}",
                makes=[histogram, ledger, head_file(ledger)],
            )  # fmt: skip
            wanted = [f"--topic_histogram={histogram / HISTOGRAM_FILE}"]
        if source.generator:
            self._train(source, source.generator)
            wanted.append(f"--adapter_path={self._adapter(name)}")
        self.run(
            f"sample {name}", "inference.py", *self._model(source), "--top_p=0.95", *wanted,
            f"--num_samples={settings.num_samples}", f"--max_new_tokens={settings.max_seq_len - 1}",
            f"--seed={source.seed}", f"--job_sess={name}",
            f"--output_dir={self.folder / 'samples'}",
        )  # fmt: skip

    def share_budget(self) -> int:
        """Give every generator's pool the tokens of the generator with the fewest."""
        trained = [source for source in self.sampled if source.generator]
        budget = min(
            sum(each["num_tokens"] for each in self._samples(source)) for source in trained
        )
        self._take([replace(source, budget=budget) for source in trained])
        return budget

    def make_pool(self, source: Source) -> None:
        """Extract and embed sampled texts that ended by themselves, if there are any."""
        name, pool = source.pool, self.folder / "pools" / source.pool
        samples = self._samples(source)
        if source.budget is None:
            # The base seldom ends a text, so those that were cut are taken too.
            samples = [each | {"finish_reason": FINISHED} for each in samples]
        else:
            # Not the first ones, which may be of the first topics alone.
            order = np.random.default_rng(0).permutation(len(samples))
            tokens = np.cumsum([samples[row]["num_tokens"] for row in order])
            samples = [samples[row] for row in np.sort(order[tokens <= source.budget])]
        taken = self.folder / "taken" / f"{name}.jsonl"
        write_atomic(taken, json_lines(samples))
        if not samples or not distinct_instructions(read_entries(str(taken)))[0]:
            return
        self.run(
            f"extract {name}", "-m", "resample_with_dp_histogram.extract",
            f"--instructions={taken}", f"--output={pool}", makes=[pool],
        )  # fmt: skip
        self._embed(name, pool / INSTRUCTIONS_FILE, "--synthetic")

    def leave_out_small_pools(self) -> None:
        """Leave out the sets of pools that are no larger than a set, and say which these are.

        Raises:
            UsageError: that of the base is, or those of all generators are.
        """
        least, small = self.settings.num_selected, set()
        for source in self.sampled:
            if (size := len(self._pool(source))) <= least:
                small.add(source.name)
                say(f"{source.name} has no sets: {size:,} of its sampled texts are usable")
        if BASE.name in small or len(small) == len(self.sampled) - 1:
            raise UsageError(
                f"too few of the sampled texts are usable to take --num_selected {least:,} from; "
                "raise --num_samples"
            )
        self.sets = [each for each in self.sets if each.source.name not in small]

    def tune(self, chosen: SyntheticSet) -> None:
        """Tune the base model on a set."""
        texts = self._pool(chosen.source)
        self._save(chosen.name, train=[texts[row] for row in self.rows(chosen)])
        self.run(
            f"tune {chosen.name}", "train.py", *self._training(chosen.name, UNCONDITIONAL),
            f"--dataset_name={self.folder / 'data' / chosen.name}", "--num_epochs=1", "--eps=-1",
            "--loss_normalization=tokens", f"--total_bs={self.settings.tuning_bs}",
            f"--lr={self.settings.lr / 2}", f"--seed={chosen.seed}",
        )  # fmt: skip

    def rows(self, chosen: SyntheticSet) -> list[int]:
        """Which rows of its pool a set has."""
        settings, name = self.settings, chosen.source.pool
        if chosen.kind == BEFORE:
            random, pool = np.random.default_rng(chosen.seed), len(self._pool(chosen.source))
            return random.choice(pool, settings.num_selected, replace=False).tolist()
        output = self.folder / "selected" / chosen.name
        ledger = self._ledger("selection", chosen.name)
        self.run(
            f"select {chosen.name}", "-m", "resample_with_dp_histogram.resample",
            f"--private_embeddings={self.folder / 'embeddings' / 'private'}", f"--ledger={ledger}",
            f"--synthetic_embeddings={self.folder / 'embeddings' / name}",
            f"--synthetic_instructions={self.folder / 'pools' / name / INSTRUCTIONS_FILE}",
            f"--num_bins={settings.num_bins}", f"--histogram_sigma={settings.histogram_sigma}",
            f"--num_samples={settings.num_selected}", f"--seed={chosen.seed}",
            f"--output={output}", makes=[output, ledger, head_file(ledger)],
        )  # fmt: skip
        return [row["row"] for row in read_jsonl(output / "selected.jsonl")]

    def score(self) -> None:
        """Held-out losses of the base model, the generators and all tuned models."""
        tuned = [self._adapter(each.name) for each in self.sets]
        for style, dataset in ((UNCONDITIONAL, "rows"), (TOPIC, "rows_with_topics")):
            adapters = [
                self._adapter(source.name)
                for source in self.sources
                if source.generator and source.by_topic == (style == TOPIC)
            ]
            adapters += tuned if style == UNCONDITIONAL else []
            if adapters:
                self._score(
                    "evaluation.perplexity", "losses", adapters, *model_flags(self._sized, style),
                    f"--dataset_name={self.folder / 'data' / dataset}", "--public",
                    f"--num_rows={self.settings.num_test}",
                )  # fmt: skip
        self._score(
            "benchmarks.next_tokens", "accuracy", tuned, *self._model(BASE),
            f"--texts={self.folder / 'data' / 'test.json'}",
        )  # fmt: skip

    def _score(self, module: str, place: str, adapters: list[Path], *flags: str) -> None:
        """Score adapters that have not been scored."""
        known = self._scored(place)
        if missing := [str(each) for each in adapters if str(each) not in known]:
            output = self.folder / place / str(len(list((self.folder / place).glob("*"))))
            self.run(
                f"score {place} {output.name}", "-m", module, *flags, f"--output={output}",
                f"--perdevice_bs={self.settings.perdevice_bs}", "--adapter_path", *missing,
            )  # fmt: skip

    def _scored(self, place: str) -> dict:
        """Losses, or accuracies, by model."""
        found: dict = {}
        for folder in sorted((self.folder / place).glob("*")):
            if place == "losses" and (folder / "perplexity.json").exists():
                # Of the base, the loss without topics is the one to compare with.
                found = losses_by_model(folder) | found
            elif (folder / ACCURACY_FILE).exists():
                found |= json.loads((folder / ACCURACY_FILE).read_text())
        return found

    # -------------------------------------------------------------- what was found

    def findings(self, budget: int) -> dict:
        """All figures, a JSON-able dict.

        Args:
            budget: see `share_budget`.
        """
        settings = self.settings
        losses, accuracies = self._scored("losses"), self._scored("accuracy")
        real = open_embeddings(self.folder / "embeddings" / "test", private=False).vectors
        topics = fit_clusters(real, settings.num_other_topics, OTHER_SEED, "held-out rows")
        of_real = np.bincount(topics.assign(real, "held-out rows"), minlength=len(topics.offsets))
        generators, sets, epsilons = {}, [], dict[tuple, float | None]()
        for source in self.sources:
            if source.generator:
                report = self.folder / "outputs" / source.name / "privacy_report.json"
                generators[source.name] = {
                    "arm": source.generator.arm, "epsilon": source.generator.epsilon,
                    "seed": source.seed, "flags": source.generator.flags,
                    "loss": losses[str(self._adapter(source.name))],
                    "noise_multiplier": json.loads(report.read_text()).get("noise_multiplier"),
                    "tokens": sum(each["num_tokens"] for each in self._samples(source)),
                    "pool": len(self._pool(source)),
                }  # fmt: skip
        for chosen in [SyntheticSet(BASE, BEFORE, 0), *self.sets]:
            vectors = self._vectors(chosen.source)[self.rows(chosen)]
            rows, held_out = of_one_size(vectors, real, chosen.seed)
            of_set = np.bincount(topics.assign(vectors, chosen.name), minlength=len(of_real))
            model = str(self._adapter(chosen.name))
            is_base, generator = chosen.source is BASE, chosen.source.generator
            pool = len(self._pool(chosen.source))
            # Generators that differ in their seed alone cost the same, and composing takes seconds.
            alike = (generator and (generator.arm, generator.epsilon), chosen.kind)
            if alike not in epsilons:
                epsilons[alike] = self._epsilon(chosen)
            sets.append({
                "source": chosen.source.name,
                "arm": generator.arm if generator else chosen.source.name,
                "target": generator and generator.epsilon,
                "kind": chosen.kind, "generator": chosen.seed // settings.num_seeds,
                "seed": chosen.seed,
                "epsilon": epsilons[alike],
                "mauve": float(np.mean([mauve(rows, held_out, k) for k in range(CLUSTERINGS)])),
                "coverage": overlap(held_out, rows, NEIGHBOURS)["coverage"],
                "topics": total_variation(of_set, of_real),
                "loss": losses[settings.model_name if is_base else model]["value"],
                "accuracy": accuracies[settings.model_name if is_base else model],
                "tokens": budget / (pool if chosen.kind == BEFORE else len(vectors))
                if generator else None,
            })  # fmt: skip
        times = sorted((self.folder / "times").glob("*.json"))
        return {
            "sizes": {
                "private": len(self._texts("private")), "held out": len(real), "budget": budget,
                "topics": self._num_topics(),
            },
            "generators": generators,
            "sets": sets,
            "seconds": {path.stem: json.loads(path.read_text()) for path in times},
            "settings": recorded(self._given) | {"base": Path(settings.model_name).name},
            "versions": versions_of(VERSIONED),
        }  # fmt: skip

    def _num_topics(self) -> dict[str, int]:
        """How many topics each generator samples by."""
        folder, found = self.folder / "topic_histograms", {}
        for source in self.sources:
            if source.by_topic:
                record = json.loads((folder / source.name / HISTOGRAM_FILE).read_text())
                found[source.name] = len(record["topics"])
        return found

    def _epsilon(self, chosen: SyntheticSet) -> float | None:
        """What a set costs, composed; None for those without privacy."""
        source = chosen.source
        if source.generator is None or source.generator.epsilon is None:
            return None
        ledgers = [self._ledger("selection", chosen.name)] * (chosen.kind == AFTER)
        ledgers += [self._ledger("topic", source.name)] * source.by_topic
        report = composed_report(self.folder / "outputs" / source.name, ledgers)
        return report["epsilon"][ADD_REMOVE]["upper"]

    # -------------------------------------------------------------- commands and places

    @property
    def _by_topic(self) -> bool:
        return any(source.by_topic for source in self.sources)

    @property
    def _teaches(self) -> bool:
        # Whatever --only says, so that all arms of a file are on one base.
        arms = read_arms(self._given.arms).values()
        return not self._given.model_name and any(own.get("prompt_style") == TOPIC for own in arms)

    @property
    def _sized(self) -> Settings:
        """With room for the keywords of a topic before an instruction that fits."""
        return replace(self.settings, max_seq_len=self.settings.max_seq_len + TOPIC_ROOM)

    def _model(self, source: Source) -> list[str]:
        return model_flags(self._sized, TOPIC if source.by_topic else UNCONDITIONAL)

    def _training(self, job: str, style: str) -> list[str]:
        """The flags of a training run, but for its data and what it learns."""
        return [
            *model_flags(self._sized, style), f"--job_sess={job}",
            f"--output_dir={self.folder / 'outputs'}",
            f"--perdevice_bs={self.settings.perdevice_bs}", "--no_eval_at_start", "--resume=auto",
        ]  # fmt: skip

    def _train(self, source: Source, generator: Generator) -> None:
        """Train a generator."""
        words, flags = self._learning(source, generator), generator.flags
        if generator.epsilon and "accountant" in flags:
            rows, batch = len(self._texts("private")), int(flags["total_bs"])
            steps = num_steps(float(flags["num_epochs"]), rows, batch)
            noise = loose_noise_multiplier(
                generator.epsilon, self.settings.delta, batch / rows, steps, self._reserved(source)
            )
            words.append(f"--noise_multiplier={noise}")
        self.run(f"train {generator.name}", "train.py", *words)

    def _learning(self, source: Source, generator: Generator) -> list[str]:
        """The flags of a generator's training, whose guarantee leaves room for histograms."""
        flags, target = dict(generator.flags), {}
        if flags.pop("accountant", LOOSE) != LOOSE:
            raise UsageError(f"--arms: {generator.arm}: accountant may be {LOOSE} alone")
        if generator.epsilon:
            target = {
                "eps": generator.epsilon, "delta": self.settings.delta,
                "reserve_histogram_sigma": self._reserved(source),
            }  # fmt: skip
        style = flags.pop("prompt_style", UNCONDITIONAL)
        return [
            *self._training(generator.name, style), f"--dataset_name={self._dataset(source)}",
            f"--seed={generator.seed}", *words_of(target), *words_of(flags),
        ]  # fmt: skip

    def _reserved(self, source: Source) -> float:
        """The sigma of a histogram that costs what those of a set cost together.

        One is for a selection, and maybe one of topics: two of one sigma cost what one does of
        sigma over the root of 2.
        """
        return self.settings.histogram_sigma / math.sqrt(1 + source.by_topic)

    def _embed(self, name: str, texts: Path, kind: str) -> None:
        self.run(
            f"embed {name}", "-m", "resample_with_dp_histogram.embed", kind,
            f"--instructions={texts}", f"--model={self.settings.embedder}",
            f"--output={self.folder / 'embeddings' / name}",
        )  # fmt: skip

    def run(self, name: str, *command: str, makes: Sequence[Path] = ()) -> None:
        """`run_once` in the folder of the study."""
        run_once(self.folder, name, *command, makes=makes)

    def _save(self, name: str, **splits: list[str]) -> None:
        """Write a data set of texts, by split."""
        folder = self.folder / "data" / name
        if not folder.exists():
            rows = {
                split: [{"instruction": text} for text in texts] for split, texts in splits.items()
            }
            save_dataset(folder, rows, ["instruction"], {"rows": name})

    def _dataset(self, source: Source) -> Path:
        return self.folder / "data" / ("rows_with_topics" if source.by_topic else "rows")

    def _ledger(self, kind: str, name: str) -> Path:
        # A user makes one histogram of a kind, so each has a ledger of its own, which begins anew
        # where a stop came before its output.
        return self.folder / f"{kind}_ledgers" / f"{name}.jsonl"

    def _adapter(self, name: str) -> Path:
        return self.folder / "outputs" / name / "adapter"

    def _texts(self, name: str) -> list[str]:
        return json.loads((self.folder / "data" / f"{name}.json").read_text())

    def _samples(self, source: Source) -> list[dict]:
        return read_samples(self.folder / "samples" / source.name)

    def _pool(self, source: Source) -> list[str]:
        if source is REAL:
            return self._texts("private")
        file = self.folder / "pools" / source.pool / INSTRUCTIONS_FILE
        return [row["instruction"] for row in read_jsonl(file)] if file.exists() else []

    def _vectors(self, source: Source) -> np.ndarray:
        is_private = source is REAL
        folder = self.folder / "embeddings" / ("private" if is_private else source.pool)
        return open_embeddings(folder, is_private).vectors


def loose_noise_multiplier(
    epsilon: float, delta: float, rate: float, steps: int, histogram_sigma: float
) -> float:
    """The noise multiplier at which an accountant with a wide error says `epsilon`.

    Training and a histogram composed, from PRV's upper bound at `LOOSE_EPS_ERROR`.
    """

    def excess(sigma: float) -> float:
        accountant = PRVAccountant(
            [
                PoissonSubsampledGaussianMechanism(rate, sigma),
                GaussianMechanism(histogram_sigma),
            ],
            max_self_compositions=[steps, 1],
            eps_error=LOOSE_EPS_ERROR,
            delta_error=delta / 1000,
        )
        return accountant.compute_epsilon(delta, [steps, 1])[2] - epsilon

    histogram = SampledGaussian(1.0, histogram_sigma, 1)
    tight = calibrate_noise_multiplier(epsilon, delta, rate, steps, [histogram])
    return round(brentq(excess, tight - 0.001, 1.2 * tight, xtol=1e-3), 3)


def of_one_size(one: np.ndarray, other: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Both, the one with more rows cut to a random choice of as many as the other one has."""
    size, random = min(len(one), len(other)), np.random.default_rng(seed)
    first, second = (
        each if len(each) == size else each[random.choice(len(each), size, replace=False)]
        for each in (one, other)
    )
    return first, second


def by_generator(sets: list[dict], measure: str) -> dict[int, float]:
    """A figure of each generator by its seed, the mean over its sets."""
    values: dict[int, list[float]] = {}
    for each in sets:
        if each[measure] is not None:
            values.setdefault(each["generator"], []).append(each[measure])
    return {seed: float(np.mean(found)) for seed, found in values.items()}


def table(found: dict) -> str:
    """Markdown: a line for each kind of set, with 95% t intervals over generators.

    `pairs` is MAUVE less that of the first arm at the same epsilon after selection, generator by
    generator of one seed, and in how many of the pairs it is more; empty where that has no sets.
    """
    groups: dict[tuple, list[dict]] = {}
    for each in found["sets"]:
        groups.setdefault((each["arm"], each["target"], each["kind"]), []).append(each)
    firsts = {each["epsilon"]: each["arm"] for each in reversed(found["generators"].values())}
    rows = []
    for (arm, target, kind), sets in groups.items():
        costs = [each["epsilon"] for each in sets if each["epsilon"] is not None]
        cells = [arm, f"{kind} selection", f"{max(costs):.3f}" if costs else ""]
        for measure in MEASURES:
            values = list(by_generator(sets, measure).values())
            cells.append(mean_of(values) if values else "")
        first = (firsts.get(target), target, AFTER)
        own, reference = (by_generator(each, "mauve") for each in (sets, groups.get(first, [])))
        pairs = [own[seed] - reference[seed] for seed in own if seed in reference]
        is_first = (arm, target, kind) == first or arm in RESERVED
        more = sum(pair > 0 for pair in pairs)
        cells.append(
            "" if is_first or not pairs else f"{mean_of(pairs, '+')}, {more} of {len(pairs)}"
        )
        rows.append(cells)
    headings = [
        "learnt from", "set", "epsilon", "MAUVE", "coverage", "distance of other topics",
        "held-out loss", "next token right", "sampled tokens a row", "MAUVE in pairs",
    ]  # fmt: skip
    return markdown(headings, rows)


if __name__ == "__main__":
    run_cli(main)
