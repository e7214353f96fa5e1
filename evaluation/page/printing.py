"""What may be printed: nothing of the machine, no key, no character that a page cannot hold."""

import re
from pathlib import Path

from markupsafe import Markup, escape

from utils.printable import printable

_SECRET = re.compile(r"(?i)\b(?:sk|hf|ghp|xox[bp])[-_][\w-]{8,}")
_SECRET_FLAG = re.compile(r"(?i)(--\w*(?:api_?key|token|secret|password))(=|\s+)\S+")
# A path that leaves the current folder, where a word begins.
_ELSEWHERE = re.compile(
    r"(?<![^\s='\"(,:\[])(?:~[\w.-]*|\.\.)?/(?!/)(?:[^\s'\"(),:;]*/)?([^\s'\"(),:;/]+)/?"
)


class Verbatim(str):
    """A text to show as it is, such as a sample: what looks like a path in it is none."""


def portable(text: object) -> str:
    """`text` without what it says of this machine, or a key.

    Paths below the current folder become relative to it; of others the last part stays.
    """
    text = str(text).replace(f"{Path.cwd()}/", "")
    text = _SECRET_FLAG.sub(r"\1\2[secret]", _SECRET.sub("[secret]", text))
    return _ELSEWHERE.sub(r"…/\1", text)


def portable_word(word: object) -> str:
    """`portable` of one word of a command line, or of a path: either may hold spaces."""
    flag, equals, value = str(word).rpartition("=") if str(word).startswith("-") else ("", "", word)
    value = str(value).replace(f"{Path.cwd()}/", "")
    if re.match(r"(~[\w.-]*|\.\.)?/", value):
        value = f"…/{Path(value).name}"
    return portable(f"{flag}{equals}{value}")


def plain(value: object) -> str:
    """A value that a template prints, as a text that may stand on a page."""
    if isinstance(value, Verbatim):
        return printable(value)
    if isinstance(value, int):
        return f"{value:,}"
    return printable(portable_word(value) if isinstance(value, Path) else portable(value))


def markdown(text: str) -> Markup:
    """`text` with every character escaped that Markdown or HTML would act on."""
    text = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]~$])", r"\\\1", text)
    # Inside a word an underscore means nothing.
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    # At its start these would make headings, rules and lists.
    text = re.sub(r"^([#+=-]|\d+(?=[.)](\s|$)))", _escaped_start, text)
    return Markup(re.sub(r"\s*\n\s*", "<br>", text))


def _escaped_start(mark: re.Match) -> str:
    """A mark that begins a block in Markdown, as text."""
    return f"{mark[0]}\\" if mark[0].isdigit() else f"\\{mark[0]}"


def one_line(text: Markup) -> Markup:
    """A paragraph of a template, whose source is wrapped, in one line."""
    return Markup(re.sub(r"\s*\n\s*", " ", escape(text).strip()))


def counted(numbers: dict[str, int]) -> str:
    """How many there are of each, for a sentence."""
    return ", ".join(f"{number:,} {what}" for what, number in numbers.items())


def percent(share: float) -> str:
    """A share in hundredths, to three digits."""
    return f"{100 * share:.3g}%"
