"""What may be printed: nothing of the machine, no key, no markup of its own."""

from pathlib import Path

import pytest
from markupsafe import Markup

from evaluation.page.printing import (
    Verbatim,
    markdown,
    one_line,
    plain,
    portable,
    portable_word,
    printable,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("outputs/mine", "outputs/mine"),
        ("{cwd}/outputs/mine", "outputs/mine"),
        ("the histogram in /home/alice/work/ledger.jsonl", "the histogram in …/ledger.jsonl"),
        ("~/models/llama", "…/llama"),
        ("../../alice/x", "…/x"),
        ("~alice/x", "…/x"),
        ("--output_dir=/srv/alice/out --x", "--output_dir=…/out --x"),
        ("and/or 3/4 a / b", "and/or 3/4 a / b"),
        ("sk-abcdefgh12345678", "[secret]"),
        ("--hf_token abc --max_tokens 160", "--hf_token [secret] --max_tokens 160"),
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
    ],
)
def test_paths_and_secrets_stay_here(text, shown):
    assert portable(text.format(cwd=Path.cwd())) == shown


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/alice smith/my runs", "…/my runs"),
        ("--output_dir=/home/alice smith/out", "--output_dir=…/out"),
        ("{cwd}/a b/c", "a b/c"),
        ("--lr=0.1", "--lr=0.1"),
        ("yahma/llama-7b-hf", "yahma/llama-7b-hf"),
    ],
)
def test_words_of_a_command_may_hold_spaces(word, shown):
    assert portable_word(word.format(cwd=Path.cwd())) == shown


def test_a_page_can_hold_what_is_printable():
    assert printable("a\tb\nc\r\nd é 漢 😀") == "a\tb\nc\nd é 漢 😀"
    assert printable("\x00\x1b\x85\ud800\u202e\u2066\uffff") == "\ufffd" * 7
    printable("\ud83d").encode()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("at /home/alice/x", "at …/x"),
        (Path("/home/alice smith/my runs"), "…/my runs"),
        (Verbatim("see /etc/passwd\x00"), "see /etc/passwd\ufffd"),
        (12345, "12,345"),
        (0.5, "0.5"),
    ],
)
def test_a_value_is_portable_but_for_a_text_that_is_shown_as_it_is(value, shown):
    assert plain(value) == shown


def test_a_paragraph_becomes_one_line_and_stays_text():
    assert one_line(Markup("\n <b>one</b>\n  two  three\n")) == "<b>one</b> two  three"
    assert one_line("<b>\n") == "&lt;b&gt;"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b `c` *d* [e](f)", r"a\|b \`c\` \*d\* \[e\](f)"),
        ("snake_case _not_", r"snake_case \_not\_"),
        ("<script>&", "&lt;script&gt;&amp;"),
        ("# title", r"\# title"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("0.5", "0.5"),
        ("two\n\nlines", "two<br>lines"),
    ],
)
def test_markdown_is_escaped(text, escaped):
    assert markdown(text) == escaped
