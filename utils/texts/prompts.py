"""Prompt styles, and the instruction files that sampling reads."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from string import ascii_letters
from types import FrameType
from typing import TYPE_CHECKING

from utils.cli import UsageError, in_one_line
from utils.files import open_text, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNCONDITIONAL = "uncond_generation"
TOPIC = "topic_generation"
CHAT_TEMPLATE = "chat_template"
# Styles that train instructions themselves; all others train the answers to them.
INSTRUCTION_STYLES = (UNCONDITIONAL, TOPIC)
TOPIC_TEMPLATE = "Topic: {topic}\nInstruction:\n"
TEMPLATES = {
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: {instruction} ASSISTANT:"
    ),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
    "llama2": "[INST] {instruction} [/INST]",
    "mistral": "[INST] {instruction} [/INST]",
}
# Computing time that a chat template may take for one prompt; a common one takes a millisecond.
TEMPLATE_SECONDS = 10.0
# A text that every template must keep.
PROBE = "Name 3 rivers."
# What stands between a prompt and its answer; the sampled text is stripped of it.
_ANSWER_SEPARATORS = {"alpaca": "\n", CHAT_TEMPLATE: ""}
# Templates whose markers are special tokens in some vocabularies. In all the others a special
# token that a user typed as text (such as "</s>") stays text.
_STYLES_WITH_SPECIAL_TOKENS = ("llama2", "mistral", CHAT_TEMPLATE)
PROMPT_STYLES = (*INSTRUCTION_STYLES, *TEMPLATES, CHAT_TEMPLATE)


def columns_of(style: str) -> tuple[str, ...]:
    """The columns of a row that a style trains: what its prompt is made of, and what has loss."""
    if style == UNCONDITIONAL:
        return ("instruction",)
    return ("topic", "instruction") if style == TOPIC else ("instruction", "answer")


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", style: str, text: str) -> list[int]:
    """Token ids that sampling conditions on, the same ones that training saw before the answer.

    Args:
        style: one of `PROMPT_STYLES`. `uncond_generation` ignores `text` and gives the
            beginning-of-sequence token, or the end-of-sequence token where a vocabulary has none;
            `topic_generation` begins with it, too.
        text: an instruction; for `topic_generation`, the keywords of a topic.
    """
    bos = tokenizer.bos_token_id
    beginning = [tokenizer.eos_token_id if bos is None else bos]
    if style == UNCONDITIONAL:
        return beginning
    prompt = _prompt_text(tokenizer, style, text)
    if style == TOPIC:
        return beginning + _encode_plain(tokenizer, style, [prompt])[0]
    return _encode(tokenizer, style, [prompt])[0]


def training_ids(
    tokenizer: "PreTrainedTokenizerBase",
    style: str,
    texts: list[str],
    answers: list[str] | None = None,
    *,
    max_seq_len: int,
) -> list[tuple[list[int], int]]:
    """Training examples: the token ids of each and the index of its first token with loss.

    Every token from that index on carries loss, the end-of-sequence token included; an example
    longer than `max_seq_len` tokens is cut, and then has no end-of-sequence token.

    Args:
        texts: the first of `columns_of(style)`.
        answers: the second, one for each text; `uncond_generation` has none, and trains the texts.
    """
    if style in INSTRUCTION_STYLES:
        topics, written = ([""] * len(texts), texts) if style == UNCONDITIONAL else (texts, answers)
        assert written is not None
        of_topic = {topic: prompt_ids(tokenizer, style, topic) for topic in set(topics)}
        prompts = [of_topic[topic] for topic in topics]
        # Encoded by themselves: no token holds a part of both, and an instruction has the same
        # tokens with a topic and without.
        encoded = _encode_plain(tokenizer, style, written)
        full = [prompt + ids for prompt, ids in zip(prompts, encoded)]
    else:
        assert answers is not None
        asked = [_prompt_text(tokenizer, style, text) for text in texts]
        separator = _ANSWER_SEPARATORS.get(style, " ")
        prompts = _encode(tokenizer, style, asked)
        pairs = [text + separator + answer for text, answer in zip(asked, answers)]
        full = _encode(tokenizer, style, pairs)
    return [
        ((ids + [tokenizer.eos_token_id])[:max_seq_len], min(_shared(prompt, ids), max_seq_len))
        for prompt, ids in zip(prompts, full)
    ]


def _shared(prompt: list[int], full: list[int]) -> int:
    """Length of the longest common prefix.

    A tokenizer may merge the last character of a prompt with the first of the answer, and that
    token is then the answer's.
    """
    for position, (left, right) in enumerate(zip(prompt, full)):
        if left != right:
            return position
    return min(len(prompt), len(full))


def _prompt_text(tokenizer: "PreTrainedTokenizerBase", style: str, text: str) -> str:
    if style == CHAT_TEMPLATE:
        if not tokenizer.chat_template:
            raise UsageError(
                "--prompt_style chat_template: this tokenizer has no chat template; "
                f"choose one of {', '.join(TEMPLATES)}"
            )
        return _rendered(tokenizer, [{"role": "user", "content": text}])
    if style == TOPIC:
        return TOPIC_TEMPLATE.format(topic=text)
    return TEMPLATES[style].format(instruction=text)


def _rendered(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError  # slow to import, and seldom needed

    try:
        with _time_limit(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except UsageError:
        raise
    # A template is a program, so it fails in as many ways.
    except (
        TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        reason = in_one_line(error, 160)
        raise UsageError(
            f"the tokenizer's chat template fails on a question: {reason}; use another "
            "--prompt_style, or repair the template"
        ) from None


def is_dated(tokenizer: "PreTrainedTokenizerBase", style: str) -> bool:
    """Whether prompts of a style hold the day on which they are made."""
    return style == CHAT_TEMPLATE and "strftime_now" in str(tokenizer.chat_template)


def fix_date(tokenizer: "PreTrainedTokenizerBase", day: str) -> None:
    """Have the tokenizer's chat template always see the beginning of one day.

    Args:
        tokenizer: changed; it keeps the day where it is saved.
        day: such as 2026-11-26.
    """
    midnight = date.fromisoformat(day)
    directives = [f"%{dash}{letter}" for dash in ("-", "") for letter in ascii_letters]
    values = {each: midnight.strftime(each) for each in directives}
    # A macro of the same name comes before the function that transformers gives to templates.
    macro = (
        "{%- macro strftime_now(format) -%}{%- set made = namespace(text=format) -%}"
        f"{{%- for name, value in {values}.items() -%}}"
        "{%- set made.text = made.text | replace(name, value) -%}"
        "{%- endfor -%}{{ made.text }}{%- endmacro +%}"
    )
    tokenizer.chat_template = macro + tokenizer.get_chat_template()


def check_style(tokenizer: "PreTrainedTokenizerBase", style: str) -> list[str]:
    """Refuse a style whose prompts lose the instruction.

    Returns:
        Warnings, one line each.

    Raises:
        UsageError: the tokenizer's chat template is missing, fails, or drops a probe text.
    """
    ids = prompt_ids(tokenizer, style, PROBE)
    if style != UNCONDITIONAL and PROBE not in _prompt_text(tokenizer, style, PROBE):
        raise UsageError(
            f"the tokenizer's chat template drops the instruction: a prompt of {PROBE!r} does not "
            "hold it; use another --prompt_style, or a template that takes content as a text"
        )
    bos = tokenizer.bos_token_id
    if bos is None or bos in ids:
        return []
    own = "the template" if style == CHAT_TEMPLATE else "the post_processor of tokenizer.json"
    return [
        f"the tokenizer has a beginning-of-sequence token, {tokenizer.bos_token!r}, and prompts of "
        f"--prompt_style {style} do not get it; if the base was trained with one, put it into {own}"
    ]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Refuse a template that takes so much computing time for one prompt, as one does that loops.

    Raises:
        UsageError: it does.
    """
    # Signals reach the main thread alone. The clock is the process's own, which no test sets.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def refuse(_number: int, _frame: FrameType | None) -> None:
        raise UsageError(
            f"the tokenizer's chat template took more than {seconds:g} s for one prompt: it loops; "
            "use another --prompt_style, or repair the template"
        )

    before = signal.signal(signal.SIGVTALRM, refuse)
    # Again and again: what is raised while a weak reference is cleared is dropped.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _encode(tokenizer: "PreTrainedTokenizerBase", style: str, texts: list[str]) -> list[list[int]]:
    """Ids of texts, with BOS where this tokenizer puts one (chat templates have their own)."""
    bos = tokenizer.bos_token_id
    adds_bos = style != CHAT_TEMPLATE and bos in tokenizer("")["input_ids"]
    return [[bos] * adds_bos + ids for ids in _encode_plain(tokenizer, style, texts)]


def _encode_plain(
    tokenizer: "PreTrainedTokenizerBase", style: str, texts: list[str]
) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=style not in _STYLES_WITH_SPECIAL_TOKENS,
        return_attention_mask=False,
    )["input_ids"]


@dataclass(frozen=True)
class Instruction:
    """A block of an instruction file, or a topic: a text, and how many samples to draw for it.

    Attributes:
        topic: the number of the topic whose keywords the text is.
    """

    text: str
    count: int
    topic: int | None = None


BEGIN, END = "### BOI ###", "### EOI ###"


def read_instruction_file(path: str | os.PathLike) -> list[Instruction]:
    """Read blocks of a line `### BOI ### COUNT`, the text, and a line `### EOI ###`.

    Raises:
        UsageError: no such file, not UTF-8, no block, a block without end, or a COUNT that is not
            a whole number.
    """
    try:
        # Not splitlines: a Unicode line separator inside a text is part of it.
        with open_text(path) as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        made_by = (
            "; make it with: python data/prepare_alpaca_eval.py"
            if Path(path).name == "alpaca_eval_instructions.txt"
            else ""
        )
        raise UsageError(f"no instruction file {str(path)!r}{made_by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read instruction file {str(path)!r}: {error}") from None
    blocks: list[Instruction] = []
    begun: str | None = None
    text: list[str] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if line.startswith(BEGIN):
            if begun is not None:
                raise UsageError(f"{where}: a block begins inside another; end it with {END!r}")
            begun, text = line.removeprefix(BEGIN).strip(), []
            if not (begun.isascii() and begun.isdigit()) or int(begun) == 0:
                raise UsageError(f"{where}: {BEGIN!r} takes a count of 1 or more, found {begun!r}")
        elif line.rstrip() == END:
            if begun is None:
                raise UsageError(f"{where}: {END!r} ends no block")
            blocks.append(Instruction("\n".join(text), int(begun)))
            begun = None
        elif begun is not None:
            text.append(line)
        elif line.strip():
            raise UsageError(f"{where}: text outside a block; begin it with a line '{BEGIN} COUNT'")
    if begun is not None:
        raise UsageError(f"{path}: the last block has no line {END!r}")
    if not blocks:
        raise UsageError(f"{path} holds no instruction; a block begins with '{BEGIN} COUNT'")
    return blocks


def write_instruction_file(path: str | os.PathLike, texts: Iterable[str]) -> None:
    """Write `texts`, each once, as an instruction file.

    Raises:
        UsageError: a text holds a line that would begin or end a block.
    """
    blocks = []
    for text in texts:
        if any(line.startswith(BEGIN) or line.rstrip() == END for line in text.splitlines()):
            raise UsageError(f"an instruction holds a line {BEGIN!r} or {END!r}: {text[:60]!r}")
        blocks.append(f"{BEGIN} 1\n{text}\n{END}\n")
    write_atomic(path, "".join(blocks))
