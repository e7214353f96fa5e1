"""What may be printed: nothing of the machine, no key, no character that a page cannot hold."""

from pathlib import Path

import pytest

from evaluation.page.material import damage_named, portable, portable_word, printable
from utils.cli import UsageError


@pytest.mark.parametrize(
    ("text", "told"),
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
def test_paths_and_secrets_stay_here(text, told):
    assert portable(text.format(cwd=Path.cwd())) == told


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("/home/alice smith/my runs", "…/my runs"),
        ("--output_dir=/home/alice smith/out", "--output_dir=…/out"),
        ("{cwd}/a b/c", "a b/c"),
        ("--lr=0.1", "--lr=0.1"),
        ("yahma/llama-7b-hf", "yahma/llama-7b-hf"),
    ],
)
def test_words_of_a_command_may_hold_spaces(word, told):
    assert portable_word(word.format(cwd=Path.cwd())) == told


def test_a_page_can_hold_what_is_printable():
    assert printable("a\tb\nc\r\nd é 漢 😀") == "a\tb\nc\nd é 漢 😀"
    assert printable("\x00\x1b\x85\ud800\u202e\u2066\uffff") == "\ufffd" * 7
    printable("\ud83d").encode()


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), TypeError("x"), OSError("x")])
def test_damage_is_named_and_defects_are_not_hidden(error):
    with (
        pytest.raises(UsageError, match="^file is missing or not what train.py writes"),
        damage_named(Path("file"), "train.py"),
    ):
        raise error
    with pytest.raises(ZeroDivisionError), damage_named(Path("file"), "train.py"):
        raise ZeroDivisionError
