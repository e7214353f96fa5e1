"""Keywords that name topics: class-based tf-idf of clean words."""

import re
import unicodedata

import numpy as np

MOST_KEYWORDS, LEAST_KEYWORDS = 5, 3
# The vocabulary; more words than this many topics can use.
MOST_WORDS = 20_000
# Letters and digits that begin with a letter, so that no keyword can be, or hold, a control
# character, a mark that turns lines round, punctuation, or a token of a chat template. A word next
# to an underscore is part of a name, and one of more than 30 letters is no word. The fillers of
# Hangul are letters that nobody sees.
WORD = r"\b[^\W\d_\u115f\u1160][^\W_\u115f\u1160]{1,29}\b"
# <|im_start|>, </s>, <start_of_turn>, <<SYS>>; [INST], [/INST]; ### BOI ###, ### Instruction:
TEMPLATE_TOKENS = re.compile(
    r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,40}\]|#{2,}\s*[^#\n]{1,40}?\s*(?:#{2,}|:)"
)


def plain_words(text: str) -> str:
    """A text in small letters, compatible forms unified, without tokens of chat templates."""
    return TEMPLATE_TOKENS.sub(" ", unicodedata.normalize("NFKC", text)).lower()


def name_topics(texts: list[str], topics: np.ndarray, num_topics: int) -> list[list[str]]:
    """The words that set each topic apart: class-based tf-idf (Grootendorst 2022, "BERTopic").

    A word w weighs tf(w, c) log(1 + A / f(w)) in topic c: tf is its share of the topic's words, f
    its number in all texts, A the average number of words of a topic. Each word names the topic
    alone in which it weighs most, so no two topics share one. English stop words name none.

    Args:
        topics: int [texts], the topic of each text; each topic has one.

    Returns:
        For each topic up to MOST_KEYWORDS words, the heaviest first; those beyond LEAST_KEYWORDS
        occur twice or more. "topic N", with N from 0, stands for a topic without a word.
    """
    # It takes a second to import.
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(
        preprocessor=plain_words,
        token_pattern=WORD,
        stop_words="english",
        max_features=MOST_WORDS,
    )
    try:
        of_texts = vectorizer.fit_transform(texts)
    except ValueError:  # no text has a word
        return [[f"topic {topic}"] for topic in range(num_topics)]
    words = vectorizer.get_feature_names_out()
    by_topic = np.zeros((num_topics, of_texts.shape[1]))
    for topic in range(num_topics):
        by_topic[topic] = of_texts[topics == topic].sum(axis=0)
    totals = by_topic.sum(axis=1, keepdims=True)
    shares = by_topic / np.maximum(totals, 1)
    weights = shares * np.log1p(totals.mean() / by_topic.sum(axis=0))
    owners = weights.argmax(axis=0)
    names = []
    for topic in range(num_topics):
        own = np.flatnonzero(owners == topic)
        # The words are in alphabetical order, which decides between equal weights.
        own = own[np.argsort(-weights[topic, own], kind="stable")][:MOST_KEYWORDS]
        kept = [
            str(words[word])
            for place, word in enumerate(own)
            if place < LEAST_KEYWORDS or by_topic[topic, word] > 1
        ]
        names.append(kept or [f"topic {topic}"])
    return names
