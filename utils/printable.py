"""Texts of models and servers, made safe for a terminal, a page and a file."""

import re

# But for tab and newline; and halves of surrogate pairs, which no file can hold.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
# Marks that override the direction of text, invisible tags, and what is no character.
_DECEIVING = "\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ufffe\uffff"
_REPLACEMENT = "\ufffd"


def without_controls(text: str) -> str:
    """`text` with U+FFFD for every control character but tab and newline.

    The least that keeps a terminal from obeying it: what else it says is as it was.
    """
    return re.sub(f"[{_CONTROLS}]", _REPLACEMENT, text.replace("\r\n", "\n"))


def printable(text: str) -> str:
    """`text` as it may be shown: without controls, and without what a reader cannot see.

    That is marks that turn its lines round, and tag characters, which hide words in it. Each
    becomes U+FFFD.
    """
    return re.sub(f"[{_CONTROLS}{_DECEIVING}]", _REPLACEMENT, text.replace("\r\n", "\n"))
