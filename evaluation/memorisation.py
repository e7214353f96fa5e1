"""What synthetic texts and a model give away of the training set, next to what is coincidence.

    python -m evaluation.memorisation --synthetic resampling/synthetic/instructions.jsonl \\
        --private data/quickstart_instructions --held_out data/quickstart_instructions \\
        --embedding_model data/quickstart_embedder --output evaluation_outputs/mine

The first figure is the share of the synthetic texts that are copies or near copies of any private
row. Held-out rows are of the same source as the private ones and were never trained on, so whatever
synthetic texts share with as many of them is coincidence. Measured are copies, runs of words in
common, nearest neighbours among embeddings, strings that look like personal data, and, with --run,
how well the model of a run with --num_canaries knows their secrets.

Figures that private or held-out rows went into go under OUTPUT/private. Counts of personal data in
the synthetic texts, and canaries where the run has a guarantee, go to OUTPUT. What was found is
counted and never written.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from resample_with_dp_histogram.embeddings import DEFAULT_MODEL
from utils.command_line.parser import answer_early, flag, natural_int, read_flags
from utils.texts.text_inputs import FORMATS, read_instructions

# Headings of --help.
NEAREST, CANARIES = "nearest neighbours", "canaries"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of this evaluation."""

    synthetic: str = flag(f"synthetic texts: {FORMATS}", required=True, metavar="PATH")
    private: str = flag("the rows that were trained on", required=True, metavar="PATH")
    held_out: str = flag("rows of the same source that were not", required=True, metavar="PATH")
    selected: str | None = flag("texts selected from the synthetic ones", metavar="PATH")
    split: str = flag("the split to read of a saved DatasetDict", "train")
    held_out_split: str = flag("the split of --held_out", "test")
    output: Path = flag("folder for the figures", type=Path, required=True, metavar="DIR")
    seed: int = flag("of what is drawn: parts, and texts to embed", 0, type=natural_int)
    embedding_model: str = flag(
        "a sentence-transformers hub id or folder", DEFAULT_MODEL, group=NEAREST
    )
    no_embeddings: bool = flag("leave nearest neighbours out", False, group=NEAREST)
    max_embedded: int = flag(
        "texts of each set that are embedded, drawn at random", 10_000, group=NEAREST
    )
    run: Path | None = flag(
        "a run that was trained with --num_canaries", type=Path, metavar="RUN", group=CANARIES
    )
    model_name: str | None = flag(
        "its base model; the one that the run names if left out", group=CANARIES
    )
    num_candidates: int = flag(
        "secrets that were not inserted, among which canaries are ranked", 1000, group=CANARIES
    )


answer_early(__name__, Settings, __doc__)

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluation.measures.copies import LEAST_WORDS, NEAR, near_copies
from evaluation.measures.exposure import exposure_by_chance, exposures, secrets_found
from evaluation.measures.intervals import (
    BOOTSTRAP,
    CONFIDENCE,
    EXACT,
    RESAMPLES,
    bootstrap,
    share_interval,
)
from evaluation.measures.overlap import (
    Reference,
    exact_matches,
    keys,
    make_reference,
    nearest,
    shared_runs,
)
from evaluation.measures.personal_data import KINDS, find
from evaluation.perplexity import example_losses
from evaluation.results import (
    PER_TEXTS,
    Chart,
    Result,
    Score,
    require_new_result,
    table,
    write_result,
)
from resample_with_dp_histogram.embed import embed_in_memory, load_model
from utils.cli import UsageError, run_cli, say
from utils.files import required_object
from utils.models.adapter_info import read_adapter_info
from utils.models.loading import load_tokenizer, quiet_libraries, resolve_dtype
from utils.models.lora import load_adapted
from utils.runs.run_folder import BACKUP, arguments_of, model_name_of
from utils.texts.canaries import canary, secrets
from utils.texts.prompts import fix_date
from utils.texts.text_filters import comparison_form
from utils.texts.tokens import tokenised

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOOL = "memorisation"
NGRAMS = (5, 8, 13)
SYNTHETIC, MORE = "synthetic texts", ": more than by chance"
# Nearest rows of which a training row and a held-out one are sought: one in 2^15 texts lacks one.
NEIGHBOURS = 16
# Padded tokens of canaries on the device at once.
TOKENS_AT_ONCE = 8192
RELEASED_INTERVAL = f"{BOOTSTRAP}; {EXACT}"
INTERVAL = (
    f"{RELEASED_INTERVAL}; of shared rows, the figure less what it is where {RESAMPLES:,} times "
    f"rows drawn from both sets pass for the training rows, at {CONFIDENCE:.0%}"
)
CONTROL = "the same of as many held-out rows"
CANARY_CONTROL = "for canaries: as many others that were not inserted"


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    require_new_result(settings.output, TOOL)
    if settings.model_name and not settings.run:
        raise UsageError("--model_name needs --run, whose canaries it is for")
    run = read_run(settings.run, settings.model_name) if settings.run else None
    synthetic = read_instructions(settings.synthetic, settings.split)
    training = read_instructions(settings.private, settings.split)
    held_out = read_instructions(settings.held_out, settings.held_out_split)
    if training == held_out:
        raise UsageError("--private and --held_out are the same rows: nothing would be a control")
    sets = {SYNTHETIC: synthetic}
    if settings.selected:
        sets["selected texts"] = read_instructions(settings.selected, settings.split)
    encoder = None if settings.no_embeddings else load_model(settings.embedding_model)

    reference = make_reference(training, held_out, settings.seed)
    texts, forms = distinct(synthetic)
    notes = [
        f"a near copy has {LEAST_WORDS} words or more, and {NEAR:.0%} of the words of text and row "
        "stand in both in one order",
        f"{len(texts):,} distinct synthetic texts (of {len(synthetic):,}), {len(training):,} "
        f"private and {len(held_out):,} held-out rows, compared in parts of {reference.size:,} "
        f"rows: figures {in_parts(reference)!r} are means over the parts of a set, and tell a leak "
        "from chance; how much was copied the figures of any private row tell",
        "a leak is a figure that is more than by chance with its whole interval; the more rows are "
        "held out, the smaller the leak that shows",
    ]
    say("looking for copies and common runs of words")
    sides = training, held_out
    scores = copy_scores([comparison_form(text) for text in synthetic], sides, reference)
    overlap, chart, run_notes = overlap_scores(texts, forms, reference)
    scores += overlap
    notes += run_notes + [copies_note(forms, training, held_out)]
    if encoder:
        scores += neighbour_scores(texts, sides, encoder, settings.max_embedded, settings.seed)
    say("looking for personal data")
    found_in = {name: personal_data(rows) for name, rows in sets.items()}
    found_in_training = personal_data(training)
    scores += verbatim_scores(found_in[SYNTHETIC], found_in_training, reference)
    released = [score for each in found_in.items() for score in personal_data_scores(*each)]
    controls = dict(zip(KINDS, personal_data_counts(personal_data(held_out)).mean(axis=0) * 1000))
    for score in personal_data_scores("training rows", found_in_training) + released:
        control = controls[score.name.removesuffix(PER_TEXTS)]
        scores.append(replace(score, control=float(control)))
    released_notes = ["what has no fixed form, such as names, is not counted as personal data"]
    if run:
        found, found_notes = canary_scores(run, synthetic, settings.num_candidates)
        # Without a guarantee the model, and what it says of canaries, is as private as the data.
        if run.has_guarantee:
            released, released_notes = released + found, released_notes + found_notes
        else:
            scores, notes = scores + found, notes + found_notes
    title, control, released_control = "Personal data", CONTROL, ""
    if run and run.has_guarantee:
        title, released_control = "Personal data and canaries", CANARY_CONTROL
    elif run:
        control = f"{CONTROL}; {CANARY_CONTROL}"
    shared = "What is shared with the training set"
    for result in (
        Result(TOOL, shared, True, INTERVAL, scores, control, [chart], notes),
        Result(
            TOOL,
            title,
            False,
            RELEASED_INTERVAL,
            released,
            released_control,
            notes=released_notes,
        ),
    ):
        write_result(settings.output, result, vars(settings))
        print(table(result) + "\n")


def distinct(texts: list[str]) -> tuple[list[str], list[str]]:
    """The texts that differ in their words, each once, and their comparison forms.

    A text that was sampled many times would count one coincidence as often. Texts without a word
    are left out.

    Raises:
        UsageError: no text has a word.
    """
    forms = [comparison_form(text) for text in texts]
    _, first = np.unique(keys(forms), return_index=True)
    chosen = [place for place in np.sort(first).tolist() if forms[place]]
    if not chosen:
        raise UsageError("--synthetic: no text has a word")
    return [texts[place] for place in chosen], [forms[place] for place in chosen]


def more_than_by_chance(
    statistic: Callable[[np.ndarray], float], is_training: np.ndarray
) -> tuple[float, float, float]:
    """A figure that is 0 without a leak, and its interval from the permutation test of that.

    Rows that were not trained on are exchangeable with those that were, given texts that know
    neither. So which of them are named the training rows does not matter, whatever the texts are.

    Args:
        statistic: the figure, by what is named a training row or part.
        is_training: bool [rows or parts], the truth.

    Returns:
        The figure, and both ends of it less what chance makes of it. The lower end is above 0
        only if fewer than one in 40 namings give as large a figure (Fisher 1935, "The Design of
        Experiments", section 21).
    """
    random = np.random.default_rng(0)
    value = statistic(is_training)
    others = [statistic(random.permutation(is_training)) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    # Sums in another order differ in their last bits, which must not count as more.
    low, high = np.round(value - np.quantile(others, [1 - tail, tail]), 12)
    return value, float(low), float(high)


def compared(
    name: str, subject: str, parts: np.ndarray, reference: Reference, n: int
) -> list[Score]:
    """A figure with its control, and by how much it is above: the leak, if any.

    Args:
        parts: the figure of each part, float64 [parts].
        n: texts or strings that it is of.
    """

    def difference(is_training: np.ndarray) -> float:
        return float(parts[is_training].mean() - parts[~is_training].mean())

    value, control = (
        float(parts[side].mean()) for side in (reference.is_training, ~reference.is_training)
    )
    more = more_than_by_chance(difference, reference.is_training)
    return [
        Score(name, subject, value, control=control, better="lower", n=n),
        Score(name + MORE, subject, *more, 0.0, "lower", n),
    ]


# ------------------------------------------------------------------------ shared rows


def in_parts(reference: Reference) -> str:
    """The subject of figures that are means over parts."""
    return f"{SYNTHETIC}, by parts of {reference.size:,} rows"


def copy_scores(
    forms: list[str], sides: tuple[list[str], list[str]], reference: Reference
) -> list[Score]:
    """How many of the synthetic texts are copies of any private row, or of some of either set.

    Args:
        forms: of all synthetic texts, one for each time that it stands there; those without a word
            are left out.
        sides: training and held-out rows.
    """
    counts = Counter(form for form in forms if form)
    known, times = list(counts), np.array(list(counts.values()))
    training, held_out = ({comparison_form(row) for row in rows} - {""} for rows in sides)
    rows = sorted(training | held_out)
    texts, places = near_copies(known, rows)
    is_training = np.array([row in training for row in rows])
    is_near = np.zeros(len(known), dtype=bool)
    is_near[texts[is_training[places]]] = True
    is_equal = np.array([form in training for form in known])
    lengths = np.array([form.count(" ") + 1 for form in known])
    found_as: list[tuple[str, np.ndarray, int]] = [
        ("copies or near copies of any private row, share", is_near, 1),
        ("copies of any private row but for case and punctuation, share", is_equal, 1),
    ]
    own = [row for row in rows if row in training]
    runs = list(islice(shared_runs(known, own, np.ones(len(own), np.uint64)), max(NGRAMS)))
    for length in NGRAMS:
        found = runs[length - 1] if length <= len(runs) else np.zeros(len(known))
        name = f"texts that share {length} words in a row with any private row, of those as long"
        if lengths.max() >= length:
            found_as.append((f"{name}, share", found > 0, length))
    of_any = f"{SYNTHETIC}, all {len(sides[0]):,} private rows"
    scores = []
    for name, is_found, least in found_as:
        values = np.repeat(is_found, times * (lengths >= least)).astype(float)
        interval = share_interval(values)
        scores.append(Score(name, of_any, float(values.mean()), *interval, n=len(values)))

    row_forms = [comparison_form(row) for row in reference.texts]
    parts = exact_matches(keys(rows), keys(row_forms), reference.parts)
    found_in = np.zeros(len(known), dtype=np.uint64)
    np.bitwise_or.at(found_in, texts, parts[places])
    number = min(reference.num_training, reference.num_held_out)

    def shares(is_training: np.ndarray) -> tuple[float, float]:
        """Of texts found in as many parts of what is named the training rows, and of the others."""
        both = []
        for named in (is_training, ~is_training):
            some = np.bitwise_or.reduce(reference.bits[named][:number])
            both.append(float(((found_in & some) > 0) @ times / times.sum()))
        return both[0], both[1]

    name = "copies or near copies of as many rows of either set, share"
    of_some = f"{SYNTHETIC}, {number * reference.size:,} rows of either set"
    value, control = shares(reference.is_training)
    more = more_than_by_chance(lambda named: np.subtract(*shares(named)), reference.is_training)
    n = int(times.sum())
    return [
        *scores,
        Score(name, of_some, value, control=control, better="lower", n=n),
        Score(name + MORE, of_some, *more, 0.0, "lower", n),
    ]


def overlap_scores(
    texts: list[str], forms: list[str], reference: Reference
) -> tuple[list[Score], Chart, list[str]]:
    """Copies and common runs of words, with the distribution of the latter and notes."""
    row_forms = [comparison_form(text) for text in reference.texts]
    subject = in_parts(reference)
    scores, notes = [], []
    for name, ours, rows in (
        ("exact copies of a row, share", texts, reference.texts),
        ("copies of a row but for case and punctuation, share", forms, row_forms),
    ):
        found_in = exact_matches(keys(ours), keys(rows), reference.parts)
        scores += compared(name, subject, reference.shares(found_in), reference, len(texts))

    # By length, the share of texts that have a run of it in common with each part: all at 0 words.
    runs = shared_runs(forms, row_forms, reference.parts)
    curve = np.array([np.ones(len(reference.bits)), *map(reference.shares, runs)])
    lengths = np.array([form.count(" ") + 1 for form in forms])
    for length in NGRAMS:
        as_long = int((lengths >= length).sum())
        if as_long == 0:
            notes.append(f"no synthetic text has {length} words")
            continue
        name = f"texts that share {length} words in a row, of those as long, share"
        parts = curve[length : length + 1].sum(axis=0) * len(texts) / as_long
        scores += compared(name, subject, parts, reference, as_long)
    name = "longest run of words shared with a row"
    for of_texts, parts in (
        ("mean over texts (words)", curve[1:].sum(axis=0)),
        ("longest of all (words)", (curve[1:] > 0).sum(axis=0)),
    ):
        scores += compared(f"{name}, {of_texts}", subject, parts, reference, len(texts))
    lines = {
        name: [[length, share] for length, share in enumerate(curve[:, side].mean(axis=1).tolist())]
        for name, side in (
            ("training rows", reference.is_training), ("held-out rows", ~reference.is_training),
        )
    }  # fmt: skip
    title = f"Runs of words that synthetic texts share with {reference.size:,} rows"
    chart = Chart(title, "words in a row", "share of synthetic texts", lines, "step")
    return scores, chart, notes


def neighbour_scores(
    texts: list[str],
    sides: tuple[list[str], list[str]],
    encoder: "SentenceTransformer",
    most: int,
    seed: int,
) -> list[Score]:
    """Nearest rows of as many training and held-out ones, by embeddings that are never written.

    Args:
        sides: training and held-out rows.
        most: texts or rows of each set that are embedded.
        seed: of which ones.
    """
    random = np.random.default_rng(seed)

    def embed_some(rows: list[str], count: int, name: str) -> np.ndarray:
        chosen = [rows[row] for row in random.permutation(len(rows))[:count]]
        say(f"embedding {len(chosen):,} {name}")
        places, where = np.arange(len(chosen)), f"--embedding_model, {name}"
        return embed_in_memory(chosen, places, encoder, where)

    vectors = embed_some(texts, most, "synthetic texts")
    count = min(most, *map(len, sides))
    names = "private rows", "held-out rows"
    embedded = [embed_some(rows, count, name) for rows, name in zip(sides, names)]
    similarities, places = nearest(vectors, np.concatenate(embedded), NEIGHBOURS)

    def to_nearest(is_wanted: np.ndarray) -> np.ndarray:
        """The similarity of each text to the first of its neighbours that is wanted."""
        wanted = is_wanted[places]
        wanted[:, -1] = True
        return np.take_along_axis(similarities, wanted.argmax(axis=1)[:, None], axis=1)[:, 0]

    def similarity_gained(is_training: np.ndarray) -> float:
        return float((to_nearest(is_training) - to_nearest(~is_training)).mean())

    def share_above_half(is_training: np.ndarray) -> float:
        return float(np.sign(to_nearest(is_training) - to_nearest(~is_training)).mean() / 2)

    is_training = np.arange(2 * count) < count
    subject = f"{len(vectors):,} synthetic texts, {count:,} rows of either set"
    name = "cosine similarity to the nearest row, mean"
    value, control = (float(to_nearest(side).mean()) for side in (is_training, ~is_training))
    gained = more_than_by_chance(similarity_gained, is_training)
    share, low, high = more_than_by_chance(share_above_half, is_training)
    nearer = "nearer to a training row than to any held-out row, share"
    return [
        Score(name, subject, value, control=control, better="lower", n=len(vectors)),
        Score(name + MORE, subject, *gained, 0.0, "lower", len(vectors)),
        Score(nearer, subject, 0.5 + share, 0.5 + low, 0.5 + high, 0.5, "lower", len(vectors)),
    ]


def copies_note(forms: list[str], training: list[str], held_out: list[str]) -> str:
    """How many texts are copies of any row, of those outside the parts too."""
    ours = keys(forms)
    copied, by_chance = (
        np.isin(ours, keys([comparison_form(row) for row in rows])).sum()
        for rows in (training, held_out)
    )
    return (
        f"but for case and punctuation, {copied:,} synthetic texts are copies of one of all "
        f"{len(training):,} private rows, {by_chance:,} of one of all {len(held_out):,} held-out "
        "ones"
    )


# ------------------------------------------------------------------------ personal data


# The kind and the string of each that was found in a text.
Found = tuple[tuple[int, str], ...]


def personal_data(texts: list[str]) -> list[Found]:
    """What looks like personal data in each text."""
    return [tuple(find(text)) for text in texts]


def personal_data_counts(found: list[Found]) -> np.ndarray:
    """Strings of every kind in every text, float64 [texts, kinds]."""
    counts = np.zeros((len(found), len(KINDS)))
    for strings, row in zip(found, counts):
        for kind, _ in strings:
            row[kind] += 1
    return counts


def personal_data_scores(subject: str, found: list[Found]) -> list[Score]:
    """Strings of each kind per 1,000 texts."""
    scores = []
    for kind, column in zip(KINDS, personal_data_counts(found).T):
        value, n = float((column * 1000).mean()), len(column)
        low, high = bootstrap(column * 1000, statistic=np.mean)
        if not column.any():  # then of how many texts one may be expected at most
            low, high = (1000 * end for end in share_interval(column))
        scores.append(Score(kind + PER_TEXTS, subject, value, low, high, None, "lower", n))
    return scores


def verbatim_scores(
    synthetic: list[Found], training: list[Found], reference: Reference
) -> list[Score]:
    """How many of the strings in synthetic texts stand in rows too; none if there are none."""
    found_in = {string: 0 for strings in synthetic for _, string in strings}
    if not found_in:
        return []
    known = {string for strings in training for _, string in strings}
    for text, part in zip(reference.texts, reference.parts.tolist()):
        for _, string in find(text):
            if string in found_in:
                found_in[string] |= part
    parts = reference.shares(np.array(list(found_in.values()), dtype=np.uint64))
    copied = np.array([string in known for string in found_in], dtype=float)
    name, subject = "personal data that stands in", f"{len(found_in):,} strings of {SYNTHETIC}"
    of_any = Score(
        f"{name} any private row verbatim, share", subject, float(copied.mean()),
        *share_interval(copied), n=len(copied),
    )  # fmt: skip
    by_parts = f"{subject}, by parts of {reference.size:,} rows"
    name = f"{name} a row verbatim, share"
    return [of_any, *compared(name, by_parts, parts, reference, len(found_in))]


# ------------------------------------------------------------------------ canaries


@dataclass(frozen=True)
class CanaryRun:
    """A finished run with canaries.

    Attributes:
        arguments: what it was trained with.
        has_guarantee: whether what its model says may be released.
    """

    folder: Path
    model_name: str
    arguments: dict
    has_guarantee: bool


def read_run(folder: Path, model_name: str | None) -> CanaryRun:
    """Read what a run says of its canaries.

    Raises:
        UsageError: no run, none that is finished, or one without canaries.
    """
    arguments = arguments_of(folder)
    if not arguments.get("num_canaries"):
        raise UsageError(
            f"--run {str(folder)!r} was trained without --num_canaries; leave --run out"
        )
    read_adapter_info(folder / "adapter")
    report = folder / "privacy_report.json"
    has_guarantee = report.is_file() and required_object(report, BACKUP, "guarantee")["guarantee"]
    return CanaryRun(folder, model_name or model_name_of(folder), arguments, has_guarantee)


def canary_scores(
    run: CanaryRun, synthetic: list[str], num_candidates: int
) -> tuple[list[Score], list[str]]:
    """Exposure of the run's canaries and their secrets in synthetic texts; and a note.

    Raises:
        UsageError: the model's losses are not finite.
    """
    count = run.arguments["num_canaries"]
    drawn = list(islice(secrets(run.arguments["seed"]), 2 * count + num_candidates))
    losses = secret_losses(run, drawn)
    if not np.isfinite(losses).all():
        raise UsageError(f"the model of {run.folder} gives canaries losses that are not finite")
    inserted, others, candidates = losses[:count], losses[count : 2 * count], losses[2 * count :]
    found = secrets_found(synthetic, drawn[: 2 * count])
    repeats = run.arguments["canary_repeats"]
    subject = f"{count:,} canaries, each {repeats:,} times in training"
    exposed, by_chance = (exposures(each, candidates) for each in (inserted, others))
    share = "canaries whose secret stands in a synthetic text, share"
    scores = []
    for name, values, controls, ends in (
        ("exposure of a canary, mean (bits)", exposed, by_chance,
         bootstrap(exposed, statistic=np.mean)),
        (share, found[:count], found[count:], share_interval(found[:count])),
    ):  # fmt: skip
        control, value = float(controls.mean()), float(values.mean())
        scores.append(Score(name, subject, value, *ends, control, "lower", count))
    note = (
        f"canaries are ranked among {num_candidates:,} other secrets, so exposure is at most "
        f"{np.log2(num_candidates + 1):.2f} bits; {exposure_by_chance(num_candidates):.2f} is the "
        "mean by chance (1 / ln 2 = 1.44 for many secrets)"
    )
    return scores, [note]


def secret_losses(run: CanaryRun, drawn: list[str]) -> np.ndarray:
    """The summed token loss of every secret's row under the run's model, float64 [secrets]."""
    arguments = run.arguments
    rows = [canary(secret, arguments["prompt_style"]) for secret in drawn]
    quiet_libraries()
    tokenizer = load_tokenizer(run.model_name)
    if day := read_adapter_info(run.folder / "adapter").get("prompt_date"):
        fix_date(tokenizer, day)
    data = tokenised(rows, tokenizer, arguments["prompt_style"], arguments["max_seq_len"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(arguments["dtype"], device)
    model = load_adapted(run.model_name, run.folder / "adapter", dtype, merge=True).to(device)
    budget = max(TOKENS_AT_ONCE, int(data.lengths.max()))
    return example_losses(model, data, budget, "canaries")[0]


if __name__ == "__main__":
    run_cli(main)
