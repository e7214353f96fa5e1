"""The histogram of topics that sampling follows, as `topics.histogram` writes it. No torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from utils.cli import UsageError
from utils.files import required_object

# What keywords are never made of: marks of chat templates, of code, and of instruction files.
_MARKS = re.compile(r"[<>\[\]{}|\\]|###")
LONGEST_KEYWORDS = 300  # characters
MOST_COUNTED = 2**53  # above it floats lose rows, and sums of them may have no end


@dataclass(frozen=True)
class Topic:
    """A topic of a histogram.

    Attributes:
        keywords: joined by a comma and a space: what a prompt is made of.
        count: of private rows or units, with noise; 0 or more.
    """

    number: int
    keywords: str
    count: float


def read_topic_histogram(path: str) -> list[Topic]:
    """The topics of a `topic_histogram.json`, in its order.

    Raises:
        UsageError: no such file, no topic with a count above 0, or a topic that is not one; names
            it.
    """
    remedy = "make it with python -m topics.histogram"
    if not Path(path).is_file():
        raise UsageError(f"no topic histogram {path!r}; {remedy}")
    listed = required_object(path, remedy).get("topics")
    if not isinstance(listed, list):
        raise UsageError(f"{path} has no list of topics; {remedy}")
    topics = [_topic(entry, f"{path}, topic {place}") for place, entry in enumerate(listed)]
    if len({topic.number for topic in topics}) < len(topics):
        raise UsageError(f"{path} has a topic twice; {remedy}")
    if not any(topic.count for topic in topics):
        raise UsageError(f"{path} has no topic with a count above 0, so nothing can be drawn of it")
    return topics


def _topic(entry: object, place: str) -> Topic:
    """An entry of the list.

    Args:
        place: of the entry, from 0, for a message.
    """
    entry = entry if isinstance(entry, dict) else {}
    number, keywords, count = (entry.get(name) for name in ("topic", "keywords", "count"))
    if type(number) is not int or number < 0:
        raise UsageError(f"{place} has no number of 0 or more as `topic`")
    if not isinstance(count, int | float) or not 0 <= count < MOST_COUNTED:
        raise UsageError(
            f"{place} has no `count` of 0 or more, found {str(count)[:40]!r}, or one beyond 2^53; "
            "make the file again"
        )
    return Topic(number, require_keywords(keywords, place), float(count))


def require_keywords(keywords: object, place: str) -> str:
    """Keywords that may be a prompt, as they are.

    Args:
        place: of their topic, for a message.

    Raises:
        UsageError: they are none, or have what no keyword of `topics.fit` has.
    """
    if not isinstance(keywords, str) or not 0 < len(keywords.strip()) <= LONGEST_KEYWORDS:
        raise UsageError(f"{place} has no `keywords`: a text of 1 to {LONGEST_KEYWORDS} characters")
    if not keywords.isprintable() or _MARKS.search(keywords):
        raise UsageError(
            f"{place} has keywords with a control character or a mark of templates such as '<|' or "
            f"'###', which topics.fit never writes: {keywords[:60]!r}; make the file again"
        )
    return keywords
