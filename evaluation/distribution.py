"""How close synthetic texts, and those selected of them, are to real ones, and how diverse.

    python -m evaluation.distribution --real data/quickstart_instructions --split test \\
        --synthetic resampling/synthetic/instructions.jsonl \\
        --selected resampling/selected/selected.jsonl --model data/quickstart_embedder \\
        --output evaluation_outputs/mine

MAUVE, precision and recall, density and coverage compare embeddings of equally many texts of each
set, words are compared in equal numbers, and everything is repeated over seeds. The control is the
same with other real texts in the place of the synthetic ones: no generator can be asked for more.
Take real texts that were not trained on.

Whatever has seen the real texts is private and goes under OUTPUT/private; what the synthetic and
the selected texts show alone goes to OUTPUT itself and may be released. With --public the real
texts are public, and there is one result. Embeddings stay in memory.
"""

from dataclasses import dataclass
from pathlib import Path

from resample_with_dp_histogram.embeddings import DEFAULT_MODEL
from utils.command_line.parser import answer_early, flag, read_flags
from utils.texts.text_inputs import FORMATS, read_instructions


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of this evaluation."""

    real: str = flag(f"real texts: {FORMATS}", required=True, metavar="PATH")
    split: str | None = flag("the split to read where --real is a saved DatasetDict")
    synthetic: str = flag("synthetic texts, in such a format", required=True, metavar="PATH")
    selected: str | None = flag("those of them that resampling selected", metavar="PATH")
    model: str = flag("a sentence-transformers hub id or folder", DEFAULT_MODEL)
    num_rows: int = flag(
        "texts of each set that a seed compares, drawn from twice as many; fewer where a set has "
        "fewer, or the real one fewer than twice as many",
        1000,
    )
    num_seeds: int = flag("draws of texts and clusters, 2 or more", 5)
    public: bool = flag("the real texts are public, so all figures are too", False)
    output: Path = flag("folder for the figures", type=Path, required=True, metavar="DIR")


answer_early(__name__, Settings, __doc__)

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from evaluation.measures import lexical
from evaluation.measures.intervals import SEEDS, mean_and_spread
from evaluation.measures.manifold import mean_similarity, nearest_similarity, overlap
from evaluation.measures.mauve import mauve
from evaluation.results import (
    LENGTHS,
    Chart,
    Result,
    Score,
    require_new_result,
    table,
    write_result,
)
from resample_with_dp_histogram import embed
from utils.cli import UsageError, run_cli, say
from utils.progress import Progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOOL = "distribution"
REAL, SYNTHETIC, SELECTED = SETS = ("real", "synthetic", "selected")
# Real texts that the others are compared with; those in the part of REAL are the control.
REFERENCE = "reference"
NEIGHBOURS = 5
# Half of the rows may be neighbours of one another before the figures mean nothing at all.
LEAST_ROWS = 2 * NEIGHBOURS
MAUVE, SHARED = "MAUVE", "words that the real texts have, share"
DIVERGENCE = "distance of word frequencies (Jensen-Shannon)"
# With other texts, and which way is better.
COMPARISONS = {
    MAUVE: "higher", "density": "", "precision": "higher", "recall": "higher", "coverage": "higher",
    SHARED: "higher", DIVERGENCE: "lower",
}  # fmt: skip
# Between 0 and 1, and so are the ends of their intervals.
SHARES = {*COMPARISONS, "distinct-1", "distinct-2", "distinct-3"} - {"density"}

COMPARISON_NOTES = [
    f"Precision: share of the texts near real ones; recall: share of the real texts near them "
    f"(k = {NEIGHBOURS}). Density above the control means that texts crowd where real ones are; "
    "coverage is the share of real texts with one nearby.",
    "Distance of word frequencies: 0 if every word is as frequent, 1 if no word is shared.",
]


@dataclass(frozen=True)
class TextSet:
    """The texts of one file, and those of them that seeds draw from.

    Attributes:
        lengths: words of every text.
        figures: of all texts, by name.
        words: of each drawn text, in their order.
        vectors: float16 [drawn texts, dimensions], unit vectors.
    """

    lengths: list[int]
    figures: dict[str, float]
    words: list[list[str]]
    vectors: np.ndarray


@dataclass(frozen=True)
class Sample:
    """What one seed draws of a set: words of each text, and float16 unit vectors in its order."""

    words: list[list[str]]
    vectors: np.ndarray


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    if settings.num_seeds < 2:
        raise UsageError("--num_seeds 1: the spread over seeds needs 2 or more; 5 is the default")
    if settings.num_rows < LEAST_ROWS:
        raise UsageError(f"--num_rows {settings.num_rows}: {LEAST_ROWS} or more are needed")
    require_new_result(settings.output, TOOL)
    texts = {REAL: texts_with_words(REAL, settings.real, settings.split)}
    for name, path in ((SYNTHETIC, settings.synthetic), (SELECTED, settings.selected)):
        if path is not None:
            texts[name] = texts_with_words(name, path, None)
    most = settings.num_rows
    size = common_size(texts, most)
    if size < most:
        counts = ", ".join(f"{name} {len(found):,}" for name, found in texts.items())
        say(f"{size:,} texts of each set are compared, not --num_rows {most:,}: {counts}")
    model = embed.load_model(settings.model)
    sets = {name: text_set(name, found, most, model) for name, found in texts.items()}
    results = [evaluate(sets, size, settings.num_seeds, private=not settings.public)]
    if not settings.public:
        # What nothing of the real texts enters: not even their number, which may decide the size.
        del sets[REAL], texts[REAL]
        size = common_size(texts, most)
        results.append(evaluate(sets, size, settings.num_seeds, private=False))
    for result in results:
        write_result(settings.output, result, vars(settings))
    print("\n\n".join(map(table, results)))


def texts_with_words(name: str, path: str, split: str | None) -> list[str]:
    """The texts of a file that have a word; says how many have none.

    Raises:
        UsageError: too few are left.
    """
    texts = read_instructions(path, split)
    kept = [text for text in texts if lexical.words(text)]
    if len(kept) < len(texts):
        say(f"--{name} {path}: {len(texts) - len(kept):,} texts without a word left out")
    needed = halves(name) * LEAST_ROWS
    if len(kept) < needed:
        why = ", since one half of them is the control of the other" if name == REAL else ""
        raise UsageError(
            f"--{name} {path!r} has {len(kept)} texts with a word; {needed} or more are needed{why}"
        )
    return kept


def halves(name: str) -> int:
    """Samples that a seed draws from a set: of the real one, a reference and its control."""
    return 2 if name == REAL else 1


def common_size(texts: dict[str, list[str]], num_rows: int) -> int:
    """How many texts every set can give to a sample, and at most `num_rows`."""
    return min(num_rows, *(len(found) // halves(name) for name, found in texts.items()))


def text_set(name: str, texts: list[str], num_rows: int, model: "SentenceTransformer") -> TextSet:
    """Describe a set and embed twice `num_rows` of its texts; depends on no other set.

    Raises:
        UsageError: the model gives a text no direction.
    """
    lengths, vocabulary = lexical.lengths_and_vocabulary(texts)
    drawn = np.random.default_rng(SETS.index(name)).permutation(len(texts))[: 2 * num_rows]
    say(f"embedding {len(drawn):,} of {len(texts):,} {name} texts")
    chosen = [texts[row] for row in drawn]
    where = f"the embedding of --{name}'s texts with a word"
    return TextSet(
        lengths,
        lexical.length_figures(lengths)
        | {
            "distinct words": vocabulary,
            "exact duplicates, share": lexical.duplicate_share(texts),
        },
        [lexical.words(text) for text in chosen],
        embed.embed_in_memory(chosen, drawn, model, where),
    )


def evaluate(sets: dict[str, TextSet], size: int, num_seeds: int, private: bool) -> Result:
    """Compare the sets with the real one, if it is among them, and describe each.

    Args:
        sets: by their names; a result may be released if all are covered by a guarantee.
        size: texts in each sample.
        private: whether the result may not be released.
    """
    per_seed = [
        figures_of(samples(sets, size, seed), seed)
        for seed in Progress(range(num_seeds), "compare", unit="seed")
    ]
    # Each seed draws all of such a set: there is no spread over draws.
    whole = {name for name, found in sets.items() if len(found.words) == size}
    scores = []
    for name, subjects in per_seed[0].items():
        # Texts may be so short that a seed finds no n-gram in common numbers.
        if all(name in found for found in per_seed):
            values = {s: [found[name][s] for found in per_seed] for s in subjects}
            # What a set is compared with is drawn anew in any case.
            fixed = set() if name in COMPARISONS else whole
            scores += scores_of(name, values, dict.fromkeys(sets, size), fixed)
    for name in sets[SYNTHETIC].figures:
        values = {s: [found.figures[name]] for s, found in sets.items()}
        counts = {s: len(found.lengths) for s, found in sets.items()}
        scores += scores_of(name, values, counts, set(sets))
    compared = REAL in sets
    texts = ", ".join(f"{name} {len(found.lengths):,}" for name, found in sets.items())
    return Result(
        tool=TOOL,
        title="How close the synthetic texts are to the real ones"
        if compared
        else "How diverse the synthetic texts are",
        private=private,
        interval=SEEDS,
        control="other real texts in the place of the synthetic ones" if compared else "",
        scores=scores,
        charts=[
            Chart(
                LENGTHS, "words", "share of the texts at most as long",
                {name: lexical.length_line(found.lengths) for name, found in sets.items()},
            )
        ],
        notes=[
            f"{size:,} texts of each set in each of {num_seeds} draws, and equally many words or "
            "n-grams of them: these figures depend on the number, so compare them at equal ones. "
            "Draws of a set overlap, so the spread is of this measurement, not of new texts.",
            "Figures without an interval, and the chart, are of all texts with a word: "
            f"{texts}.",
        ] + COMPARISON_NOTES * compared,
    )  # fmt: skip


def scores_of(
    name: str, values: dict[str, list[float]], counts: dict[str, int], fixed: set[str]
) -> list[Score]:
    """A figure of every set, with its mean, and its spread over draws.

    Args:
        values: by set; the real one's are the control of the others.
        counts: texts that it is of, by set.
        fixed: sets whose draws are one and the same, so that they have no spread.
    """
    control = float(np.mean(values[REAL])) if REAL in values else None
    scores = []
    for subject, found in values.items():
        if subject != REAL:
            mean, *ends = mean_and_spread(found)
            low, high = (None, None) if subject in fixed else ends
            if name in SHARES and low is not None and high is not None:
                low, high = max(0.0, low), min(1.0, high)
            better = COMPARISONS.get(name, "")
            scores.append(Score(name, subject, mean, low, high, control, better, counts[subject]))
    return scores


def samples(sets: dict[str, TextSet], size: int, seed: int) -> dict[str, Sample]:
    """Draw `size` texts of each set; of the real one twice, with no text in both."""
    found = {}
    for name, texts in sets.items():
        # Streams of their own: one file given twice is compared as two samples of it.
        rows = np.random.default_rng([seed, SETS.index(name)]).permutation(len(texts.words))
        for part, role in enumerate([name, REFERENCE][: halves(name)]):
            chosen = rows[part * size : (part + 1) * size]
            found[role] = Sample([texts.words[row] for row in chosen], texts.vectors[chosen])
    return found


def figures_of(samples: dict[str, Sample], seed: int) -> dict[str, dict[str, float]]:
    """Figures of one seed, by name and set; with a reference in `samples`, also comparisons."""
    figures: dict[str, dict[str, float]] = defaultdict(dict)
    reference = samples.get(REFERENCE)
    words = {name: sample.words for name, sample in samples.items()}
    grams = {n: lexical.equally_many_ngrams(words, n) for n in (1, 2, 3)}
    for name, sample in samples.items():
        if name == REFERENCE:
            continue
        if reference:
            figures[MAUVE][name] = mauve(reference.vectors, sample.vectors, seed)
            for figure, value in overlap(reference.vectors, sample.vectors, NEIGHBOURS).items():
                figures[figure][name] = value
            unigrams = grams[1][name], grams[1][REFERENCE]
            figures[SHARED][name] = lexical.shared_vocabulary(*unigrams)
            figures[DIVERGENCE][name] = lexical.jensen_shannon_distance(*unigrams)
        for n, of_sets in grams.items():
            # Where a set has texts of a word or two alone, nobody's longer n-grams are compared.
            if of_sets[name]:
                figures[f"distinct-{n}"][name] = lexical.distinct_share(of_sets[name])
        figures["similarity of two texts"][name] = mean_similarity(sample.vectors)
        figures["similarity to the nearest other text"][name] = nearest_similarity(sample.vectors)
    return figures


if __name__ == "__main__":
    run_cli(main)
