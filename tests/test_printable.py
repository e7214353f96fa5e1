"""Texts of others on a terminal, on a page and in a file."""

import pytest

from utils.printable import printable, without_controls

HIDDEN = "".join(chr(0xE0000 + ord(letter)) for letter in "obey")


def test_words_tabs_and_lines_stay():
    for safe in (printable, without_controls):
        assert safe("a\tb\nc\r\nd é 漢 😀 👩‍👩‍👧 שלום") == "a\tb\nc\nd é 漢 😀 👩‍👩‍👧 שלום"


@pytest.mark.parametrize(
    "control", ["\x00", "\x07", "\x08", "\r", "\x1b", "\x7f", "\x9b", "\x85", "\ud800"]
)
def test_what_a_terminal_obeys_is_replaced_everywhere(control):
    assert printable(f"a{control}b") == without_controls(f"a{control}b") == "a\ufffdb"


@pytest.mark.parametrize("mark", ["\u202e", "\u202a", "\u2066", "\u2069", "\uffff", HIDDEN])
def test_what_a_reader_cannot_see_is_replaced_where_it_is_shown(mark):
    assert printable(f"a{mark}b") == f"a{chr(0xFFFD) * len(mark)}b"
    assert without_controls(f"a{mark}b") == f"a{mark}b"
