"""Find topics in public or synthetic texts, and name them.

    python -m topics.fit --synthetic synthetic/mine/instructions.jsonl --num_topics 50 \\
        --output resampling/topics

Embeds the texts, clusters the embeddings (unit length, PCA to 90% of the variance, k-means), and
names each cluster by the words that set it apart and by the three texts nearest to its centre. No
private row is read, so topics cost nothing: --public takes texts that anyone may see, --synthetic
what was sampled from a model with a guarantee, whose run then belongs into the composed report.

Writes to OUTPUT, which may be released: topics.json, to be read, and clusters.npz, the centres.
`python -m topics.assign` gives private rows their topics.
"""

from dataclasses import dataclass
from pathlib import Path

from resample_with_dp_histogram.embeddings import DEFAULT_MODEL
from utils.cli import end_on_stops
from utils.command_line.parser import command_line, flag, natural_int, parser_of
from utils.texts.text_inputs import FORMATS

# Texts of each topic that topics.json shows.
NUM_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class _Flags:
    """The flags of `fit` that go without each other."""

    split: str | None = flag("the split to read where the texts are a saved DatasetDict")
    model: str = flag("a sentence-transformers hub id or folder", DEFAULT_MODEL)
    num_topics: int = flag("topics to find; one that no text is nearest to is left out", 50)
    output: Path = flag("folder, which must not exist", required=True, type=Path, metavar="TOPICS")
    seed: int = flag("of the clusters", 0, type=natural_int)


@dataclass(frozen=True, kw_only=True)
class Settings(_Flags):
    """All flags of `fit`: exactly one of these two is set."""

    public: str | None
    synthetic: str | None

    @property
    def source(self) -> str:
        """Where the texts are."""
        return str(self.public or self.synthetic)


def read_settings(argv: list[str] | None) -> Settings:
    """The flags. That one of two is required is what `flag` cannot say."""
    parser = parser_of(_Flags, __doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--public", metavar="FILE", help=f"texts that are public: {FORMATS}")
    kind.add_argument(
        "--synthetic", metavar="SAMPLES", help="texts of a model with a guarantee, in such a form"
    )
    return Settings(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    end_on_stops()
    read_settings(None)

from dataclasses import replace

import numpy as np

from resample_with_dp_histogram.clusters import Clusters, fit_clusters
from resample_with_dp_histogram.embed import embed_in_memory, load_model
from topics.folder import CLUSTERS_FILE, TOPICS_FILE, write_arrays
from topics.keywords import name_topics
from utils.cli import UsageError, run_cli, say
from utils.files import hashes_of, sha256_of, write_json
from utils.folders import claimed, require_new, whole_folder
from utils.models.loading import model_fingerprint
from utils.printable import printable
from utils.texts.text_inputs import files_of, read_instructions


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(argv)
    with claimed(settings.output):
        fit(settings)


def command_of(settings: Settings) -> list[str]:
    """The words of the command that `settings` are of."""
    kind = "--public" if settings.public else "--synthetic"
    return [*command_line("topics.fit", _Flags, settings), kind, settings.source]


def fit(settings: Settings) -> None:
    """Embed, cluster, name and write."""
    output, source = settings.output, settings.source
    require_new(output)
    texts = read_instructions(source, settings.split)
    if len(texts) < settings.num_topics:
        raise UsageError(
            f"--num_topics {settings.num_topics:,}: {source} holds {len(texts):,} texts; ask for "
            "fewer topics, or give more texts"
        )
    model = load_model(settings.model)
    vectors = embed_in_memory(texts, np.arange(len(texts)), model, source)
    clusters = fit_clusters(vectors, settings.num_topics, settings.seed, source)
    clusters, topics = largest_first(clusters, clusters.assign(vectors, source))
    sizes = np.bincount(topics)
    named = [
        {
            "topic": topic,
            "keywords": ", ".join(words),
            "num_texts": int(sizes[topic]),
            "examples": [printable(texts[row]) for row in nearest_texts(vectors, topics == topic)],
        }
        for topic, words in enumerate(name_topics(texts, topics, len(sizes)))
    ]
    with whole_folder(output) as folder:
        write_arrays(
            folder / CLUSTERS_FILE,
            weights=clusters.weights,
            offsets=clusters.offsets,
            num_components=np.array(clusters.num_components),
        )
        record = {
            "fitted_on": f"{'public' if settings.public else 'synthetic'} texts only",
            "num_texts": len(texts),
            "model": settings.model,
            "model_fingerprint": model_fingerprint(model),
            "seed": settings.seed,
            "topics": named,
            "commands": [command_of(settings)],
            "inputs_sha256": hashes_of(files_of(source, settings.split)),
            "outputs_sha256": {CLUSTERS_FILE: sha256_of(folder / CLUSTERS_FILE)},
        }
        write_json(folder / TOPICS_FILE, record)
    for each in named:
        say(f"{each['topic']:>4} {each['num_texts']:>8,}  {each['keywords']}")
    say(f"{len(named):,} topics are in {output / TOPICS_FILE}")


def largest_first(clusters: Clusters, topics: np.ndarray) -> tuple[Clusters, np.ndarray]:
    """Clusters that texts are nearest to, in the order of how many, and each text's among them.

    Args:
        topics: int [texts], of `Clusters.assign`.
    """
    sizes = np.bincount(topics, minlength=clusters.weights.shape[1])
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    places = np.empty(len(sizes), dtype=topics.dtype)
    places[order] = np.arange(len(order))
    kept = replace(clusters, weights=clusters.weights[:, order], offsets=clusters.offsets[order])
    return kept, places[topics]


def nearest_texts(vectors: np.ndarray, is_member: np.ndarray) -> np.ndarray:
    """The numbers of the texts of a topic that are nearest to the mean of all of them.

    Args:
        vectors: float16 [texts, dimensions], unit vectors.
        is_member: bool [texts].
    """
    rows = np.flatnonzero(is_member)
    members = vectors[rows].astype(np.float64)
    return rows[np.argsort(-(members @ members.mean(axis=0)), kind="stable")[:NUM_EXAMPLES]]


if __name__ == "__main__":
    run_cli(main)
