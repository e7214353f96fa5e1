"""Parsers that say what is wrong in one line, and the types of flags."""

import argparse
import math
import re
from dataclasses import field, fields
from typing import Any, NoReturn, TypeVar

from utils.cli import EXIT_USAGE, end_on_stops, say

Settings = TypeVar("Settings")


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


def flag(help: str, default: Any = None, *, name: str = "", group: str = "", **options: Any) -> Any:
    """A field of settings, and the flag that sets it.

    A whole number is 1 or more and another number above 0, unless `type` says otherwise; a
    default of False makes a switch.

    Args:
        help: what it means, with its unit.
        default: its value where the flag is left out.
        name: of the flag, where it is not the field's; without dashes, it is an argument.
        group: the heading under which --help shows it.
        options: what else `add_argument` is to know.
    """
    if default is False:
        options |= {"action": "store_true"}
    else:
        kind = {int: positive_int, float: positive_float}.get(type(default), str)
        options = {"type": kind, "default": default} | options
    return field(metadata={"name": name, "group": group, "options": {"help": help} | options})


def parser_of(settings: type[Any], docstring: str | None) -> argparse.ArgumentParser:
    """The parser of a dataclass whose fields are `flag`s."""
    parser = make_parser(docstring or "")
    groups: dict[str, Any] = {"": parser}
    for each in fields(settings):
        group, name = each.metadata["group"], each.metadata["name"] or f"--{each.name}"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        options = each.metadata["options"]
        if name != f"--{each.name}" and name.startswith("-"):
            options = options | {"dest": each.name}
        groups[group].add_argument(name, **options)
    return parser


def read_flags(
    settings: type[Settings], docstring: str | None, argv: list[str] | None, **defaults: Any
) -> Settings:
    """The flags in `argv` as a frozen dataclass of `flag`s.

    Args:
        docstring: of the command, for --help.
        argv: those of the process if None.
        defaults: take the place of the fields' own.
    """
    parser = parser_of(settings, docstring)
    parser.set_defaults(**defaults)
    return settings(**vars(parser.parse_args(argv)))


def answer_early(module: str, settings: type[Any], docstring: str | None, **defaults: Any) -> None:
    """Answer --help and refuse wrong flags before the imports of a script, which take seconds.

    From here until `run_cli` a Ctrl-C ends it in one line.

    Args:
        module: the script's `__name__`; nothing is done where it is imported.
        settings, docstring, defaults: see `read_flags`.
    """
    if module == "__main__":
        end_on_stops()
        read_flags(settings, docstring, None, **defaults)


def to_argv(parser: argparse.ArgumentParser, settings: object) -> list[str]:
    """Flags that make `parser` give `settings` again; those at their default are left out."""
    argv: list[str] = []
    for action in parser._actions:
        value = getattr(settings, action.dest, action.default)
        if action.dest == "help" or (value == action.default and not action.required):
            continue
        flag = next(iter(action.option_strings), None)
        if flag is None:  # what stands before the flags
            argv = [*map(str, value), *argv]
        elif action.nargs == 0:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        else:
            text = f"{value:.15g}" if isinstance(value, float) else str(value)
            # A value that begins with a dash would be read as a flag.
            argv += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return argv


def command_line(module: str, flags: type, settings: object) -> list[str]:
    """The words of a command that does the same again, for its record.

    Args:
        module: which python runs.
        flags: the dataclass that makes its parser.
        settings: its values.
    """
    return ["python", "-m", module, *to_argv(parser_of(flags, ""), settings)]


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


def average_rule(text: str) -> str:
    """ema:B or tail:F as it is, once it is known to be that."""
    kind, _, share = text.partition(":")
    known = re.fullmatch(r"0?\.[0-9]+|1(\.0*)?", share) is not None and float(share) > 0
    if not (known and (kind == "tail" or (kind == "ema" and float(share) < 1))):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither ema:B with B below 1, such as ema:0.9, nor tail:F with F of at "
            "most 1, such as tail:0.5"
        )
    return text


def probability(text: str) -> float | str:
    """A number, or `auto`."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def natural_int(text: str) -> int:
    """A whole number of 0 or more."""
    return _int_from(0, text)


def port(text: str) -> int:
    """A whole number from 1 to 65535."""
    value = positive_int(text)
    if value > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: they end at 65535")
    return value


def _int_from(lowest: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {lowest} or more")
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below 2^63")
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
