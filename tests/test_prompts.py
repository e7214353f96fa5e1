"""Prompt styles and instruction files."""

import contextlib
import signal
import time
from datetime import date

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from privacy_checks.tiny_model import byte_tokenizer
from utils.cli import UsageError
from utils.texts import prompts
from utils.texts.prompts import (
    PROMPT_STYLES,
    TEMPLATES,
    TOPIC,
    TOPIC_TEMPLATE,
    UNCONDITIONAL,
    Instruction,
    check_style,
    fix_date,
    is_dated,
    prompt_ids,
    read_instruction_file,
    training_ids,
    write_instruction_file,
)

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def training_example(tokenizer, style, instruction, answer=None, *, max_seq_len):
    """The token ids and the first index with loss of one example."""
    answers = None if answer is None else [answer]
    (example,) = training_ids(tokenizer, style, [instruction], answers, max_seq_len=max_seq_len)
    return example


@pytest.mark.parametrize("style", [s for s in PROMPT_STYLES if s != UNCONDITIONAL])
def test_training_continues_the_very_prompt_that_sampling_uses(tokenizer, style):
    prompt = prompt_ids(tokenizer, style, "Why?")
    ids, loss_start = training_example(tokenizer, style, "Why?", "Because.", max_seq_len=1000)
    assert ids[:loss_start] == prompt
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[loss_start:-1]).strip() == "Because."


def test_unconditional_examples_carry_loss_on_every_token(tokenizer):
    ids, loss_start = training_example(tokenizer, UNCONDITIONAL, "hi", max_seq_len=10)
    assert (ids[0], ids[-1], loss_start, len(ids)) == (1, 2, 1, 4)
    assert prompt_ids(tokenizer, UNCONDITIONAL, "ignored") == [1]
    tokenizer.bos_token = None
    assert prompt_ids(tokenizer, UNCONDITIONAL, "ignored") == [2]


KEYWORDS = "rivers, lakes"
INSTRUCTIONS = ["Write about them.", "write", " a", "\n\nb", "rivers, lakes", ""]


def byte_level(**bpe):
    """A trained byte-level BPE, which splits at words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **bpe
    )


def across_words(**bpe):
    """A BPE that merges whatever stands next to each other, line breaks and words alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, trainers.BpeTrainer(**bpe)


def pieces(**unigram):
    """A unigram model with a mark at the beginning of words, also of the first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(unk_token="<unk>", **unigram)


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("kind", [byte_level, across_words, pieces])
def test_no_token_of_a_topic_carries_loss_and_no_other_lacks_it(kind, bos):
    made, trainer = kind(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    whole = [TOPIC_TEMPLATE.format(topic=KEYWORDS) + text for text in INSTRUCTIONS]
    made.train_from_iterator(whole * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token="</s>", unk_token="<unk>"
    )
    prompt = prompt_ids(tokenizer, TOPIC, KEYWORDS)
    joint = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole]
    if kind is across_words:  # the seam would be inside a token
        assert any(ids[: len(prompt) - 1] != prompt[1:] for ids in joint)
    examples = training_ids(
        tokenizer, TOPIC, [KEYWORDS] * len(INSTRUCTIONS), INSTRUCTIONS, max_seq_len=200
    )
    alone = training_ids(tokenizer, UNCONDITIONAL, INSTRUCTIONS, max_seq_len=200)
    for (ids, start), (without, first) in zip(examples, alone):
        assert ids[:start] == prompt
        assert ids[start:] == without[first:]
    assert prompt[0] == (tokenizer.eos_token_id if bos is None else tokenizer.bos_token_id)
    text = tokenizer.decode(prompt[1:]).replace(" ", "").replace("\n", "")
    assert text in ("Topic:rivers,lakesInstruction:", "topic:rivers,lakesinstruction:")


def test_long_examples_are_cut_and_lose_their_end(tokenizer):
    ids, _ = training_example(tokenizer, UNCONDITIONAL, "x" * 50, max_seq_len=20)
    assert len(ids) == 20
    assert 2 not in ids
    ids, loss_start = training_example(tokenizer, "vicuna", "x" * 50, "answer", max_seq_len=20)
    assert (len(ids), loss_start) == (20, 20)  # nothing of the answer is left


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_an_example_does_not_depend_on_what_it_is_tokenised_with(tokenizer, style):
    texts = ["Why?", "", "x" * 40, "é</s>"]
    answers = None if style == UNCONDITIONAL else ["Because.", "y", "", "z" * 90]
    together = training_ids(tokenizer, style, texts, answers, max_seq_len=60)
    alone = [
        training_example(tokenizer, style, text, answers and answers[i], max_seq_len=60)
        for i, text in enumerate(texts)
    ]
    assert together == alone


def test_special_tokens_that_a_user_typed_stay_text(tokenizer):
    for style in (UNCONDITIONAL, TOPIC, "vicuna", "alpaca"):
        ids, _ = training_example(tokenizer, style, "a</s>b<s>", "c</s>", max_seq_len=1000)
        assert ids.count(2) == 1
        assert ids[-1] == 2


def test_vicuna_is_the_published_sentence():
    assert TEMPLATES["vicuna"].startswith("A chat between a curious user and an artificial")
    assert TEMPLATES["vicuna"].endswith("USER: {instruction} ASSISTANT:")


def test_a_template_takes_braces_and_percent_signs_literally(tokenizer):
    text = "{instruction} {0} %s {{x}}"
    assert text in tokenizer.decode(prompt_ids(tokenizer, "alpaca", text))


def test_chat_template_needs_one():
    with pytest.raises(UsageError, match="no chat template"):
        prompt_ids(byte_tokenizer(), "chat_template", "hi")


DATED = (
    "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y %H:%M:%S') }}\n{% endif %}"
)


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer, text="hi"):
    return tokenizer.decode(prompt_ids(tokenizer, "chat_template", text))


def test_a_fixed_date_is_all_that_a_dated_template_sees(tmp_path):
    tokenizer = with_template(DATED + CHAT)
    assert is_dated(tokenizer, "chat_template")
    assert not is_dated(tokenizer, "vicuna")
    assert not is_dated(with_template(CHAT), "chat_template")
    fix_date(tokenizer, "2024-02-09")
    assert rendered(tokenizer) == "Today: 09 Feb 2024 00:00:00\n<user>hi<assistant>"
    # It is saved with it, as for an engine that loads the tokenizer by itself.
    tokenizer.save_pretrained(tmp_path)
    assert rendered(type(tokenizer).from_pretrained(tmp_path)).startswith("Today: 09 Feb 2024")


@pytest.mark.parametrize(
    "format",
    ["%A %-d %B %Y", "%Y-%m-%d", "%F", "the %j.", "%d%%", "%B %d, %Y, %I %p", "%-m/%-d/%y"],
)
def test_a_fixed_date_is_written_as_the_system_writes_it(format):
    tokenizer = with_template("{{ strftime_now('" + format + "') }}")
    fix_date(tokenizer, "2024-02-09")
    assert rendered(tokenizer).rstrip("%") == date(2024, 2, 9).strftime(format).rstrip("%")


def test_a_fixed_date_leaves_white_space_alone():
    body = "\n {{ messages[0].content }}{{ strftime_now('') }}"
    before, tokenizer = rendered(with_template(body)), with_template(body)
    fix_date(tokenizer, "2024-02-09")
    assert rendered(tokenizer) == before


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
         "drops the instruction"),
        ("You are helpful.", "drops the instruction"),
        ("{{ raise_exception('system first') }}", "fails on a question: system first; use another"),
        ("{{ messages[0]['content'", "fails on a question"),
        ("{{ messages[7].content.text }}", "fails on a question"),
        ("{{ 1 // 0 }}", "fails on a question"),
        ("{{ messages[0].content + 1 }}", "fails on a question"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on a question"),
        (None, "no chat template"),
    ],
)  # fmt: skip
def test_a_template_that_loses_the_instruction_is_refused(template, message):
    with pytest.raises(UsageError, match=message) as refused:
        check_style(with_template(template), "chat_template")
    assert "\n" not in str(refused.value)


def test_a_beginning_that_no_prompt_gets_is_warned_of():
    tokenizer = with_template(CHAT)
    assert check_style(tokenizer, UNCONDITIONAL) == []
    (warning,) = check_style(tokenizer, "vicuna")
    assert "'<s>'" in warning
    assert "put it into the post_processor of tokenizer.json" in warning
    (warning,) = check_style(tokenizer, "chat_template")
    assert "put it into the template" in warning
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    assert check_style(tokenizer, "chat_template") == []
    tokenizer.bos_token = None
    assert check_style(tokenizer, "vicuna") == []


def test_instruction_files_go_there_and_back(tmp_path):
    path = tmp_path / "a file.txt"
    texts = ["one", "two\nlines\n\nand more", " spaced ", "ünïcode"]
    write_instruction_file(path, texts)
    assert read_instruction_file(path) == [Instruction(text, 1) for text in texts]


def test_counts_and_blank_lines_between_blocks(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("\n### BOI ### 3\nhello\n### EOI ###\n\n### BOI ### 1\nx\n### EOI ###\n")
    assert read_instruction_file(path) == [Instruction("hello", 3), Instruction("x", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no instruction"),
        ("hello\n", "line 1: text outside a block"),
        ("### BOI ### two\nx\n### EOI ###\n", "takes a count of 1 or more, found 'two'"),
        ("### BOI ### 0\nx\n### EOI ###\n", "found '0'"),
        ("### BOI ### 1\nx\n", "has no line"),
        ("### BOI ### 1\n### BOI ### 1\nx\n### EOI ###\n", "line 2: a block begins inside"),
        ("### EOI ###\n", "line 1: '### EOI ###' ends no block"),
    ],
)
def test_broken_instruction_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "f.txt"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_instruction_file(path)


def test_a_missing_alpaca_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UsageError, match=r"python data/prepare_alpaca_eval.py"):
        read_instruction_file(tmp_path / "alpaca_eval_instructions.txt")


def test_marker_lines_in_a_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match="BOI"):
        write_instruction_file(tmp_path / "f.txt", ["a\n### EOI ###"])
    assert not (tmp_path / "f.txt").exists()


def test_unicode_line_separators_are_part_of_a_text(tmp_path):
    text = "one\u2028two\x0bthree\x85four"
    write_instruction_file(tmp_path / "file.txt", [text])
    assert read_instruction_file(tmp_path / "file.txt") == [Instruction(text, 1)]


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_refusal_that_is_dropped_comes_again():
    """As one that is raised in the callback of a weak reference."""

    def loop():
        began = time.process_time()
        while time.process_time() - began < 10:
            pass

    def dropped_once():
        with prompts._time_limit(0.05):
            with contextlib.suppress(UsageError):
                loop()
            loop()

    with pytest.raises(UsageError, match="it loops"):
        dropped_once()


def test_a_template_that_loops_is_stopped(monkeypatch):
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LOOP
    began = time.monotonic()
    with pytest.raises(UsageError, match="chat template took more than 0.3 s .* it loops"):
        prompt_ids(tokenizer, "chat_template", "hi")
    assert time.monotonic() - began < 30
    # The clock is off again, and a sound template has all the time it needs.
    tokenizer.chat_template = CHAT
    for _ in range(3):
        prompt_ids(tokenizer, "chat_template", "hi")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
