"""Parsers that say what is wrong in one line, and the types of flags."""

import argparse
import math
import re
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from utils.cli import EXIT_USAGE, say

Settings = TypeVar("Settings")


class JobSettings(Protocol):
    """What the settings of training and of sampling share: where the job is written."""

    @property
    def output_dir(self) -> str: ...

    @property
    def job_sess(self) -> str: ...


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of a script's docstring."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line, without the screen of usage before it."""

    def error(self, message: str) -> NoReturn:
        say(f"error: {message}; --help explains every flag")
        self.exit(EXIT_USAGE)


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser that takes full flag names only, so that a typing error is never guessed at."""
    return Parser(description=docstring, formatter_class=HelpFormatter, allow_abbrev=False)


def parse(
    parser: argparse.ArgumentParser, settings: type[Settings], argv: list[str] | None
) -> Settings:
    """The flags in `argv` as a frozen dataclass that has a field for each of them.

    Args:
        settings: the dataclass; its fields have the flags' names.
        argv: those of the process if None.

    Raises:
        TypeError: a flag has no field, or a field no flag.
    """
    return settings(**vars(parser.parse_args(argv)))


def to_argv(parser: argparse.ArgumentParser, settings: object) -> list[str]:
    """Flags that make `parser` give `settings` again; those at their default are left out."""
    argv: list[str] = []
    for action in parser._actions:
        value = getattr(settings, action.dest, action.default)
        if action.dest == "help" or (value == action.default and not action.required):
            continue
        flag = action.option_strings[0]
        if action.nargs == 0:
            argv.append(flag)
        elif action.nargs == "+":
            argv += [flag, *map(str, value)]
        else:
            text = f"{value:.15g}" if isinstance(value, float) else str(value)
            # A value that begins with a dash would be read as a flag.
            argv += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return argv


def run_folder(settings: JobSettings) -> Path:
    """Where the run is written."""
    return Path(settings.output_dir) / settings.job_sess


def job_name(text: str) -> str:
    """A name that is one folder, and no hidden one."""
    if not re.fullmatch(r"[^\s./\\][^/\\\x00-\x1f]{0,199}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a folder name: no slash, no leading dot or space, at most 200 long"
        )
    return text


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    return _int_from(1, text)


def batch_size(text: str) -> int | str:
    """A whole number of 1 or more, or `auto`."""
    return text if text == "auto" else positive_int(text)


def natural_int(text: str) -> int:
    """A whole number of 0 or more."""
    return _int_from(0, text)


def _int_from(lowest: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {lowest} or more")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
