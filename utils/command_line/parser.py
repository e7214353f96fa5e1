"""Parsers that say what is wrong in one line, and the types of flags."""

import argparse
import math
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from utils.cli import EXIT_USAGE, UsageError, in_one_line, say
from utils.files import open_text, write_atomic

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
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        else:
            text = f"{value:.15g}" if isinstance(value, float) else str(value)
            # A value that begins with a dash would be read as a flag.
            argv += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return argv


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


def probability(text: str) -> float | str:
    """A number, or `auto`."""
    return text if text == "auto" else float(text)


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


@dataclass(frozen=True, kw_only=True)
class ConfigSettings:
    """The flag of a command whose flags may also stand in a file."""

    config: Path | None = flag(
        "YAML file of flags by their names, such as `eps: 6`; a flag that is given as well wins",
        type=Path,
        metavar="FILE.yaml",
    )


def read_config_and_flags(
    settings: type[Settings], docstring: str | None, argv: list[str] | None
) -> Settings:
    """`read_flags` for a `ConfigSettings`: flags that are left out come from the file of --config.

    Raises:
        UsageError: the file cannot be read, or an entry is no flag or no value of it.
    """
    argv = sys.argv[1:] if argv is None else argv
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(argv)[0].config
    parser = parser_of(settings, docstring)
    for action, value in _read_config(file, parser) if file else []:
        action.default, action.required = value, False
    return settings(**vars(parser.parse_args(argv)))


def _read_config(
    file: str, parser: argparse.ArgumentParser
) -> list[tuple[argparse.Action, object]]:
    """What a YAML file says of the flags of a parser; an entry without a value says nothing."""
    where = f"--config {file}"
    try:
        with open_text(file) as text:
            # Nodes and no values: a flag's own type reads what is written, so that 1e-5 is a
            # number and 010 is ten.
            root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}; name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is not YAML: {in_one_line(error, 200)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{where} holds no flags; write one `NAME: VALUE` a line, such as eps: 6")
    flags = {action.option_strings[-1].lstrip("-"): action for action in parser._actions}
    del flags["help"], flags["config"]
    found: dict[str, tuple[argparse.Action, object]] = {}
    for key, node in root.value:
        name, place = str(key.value), f"{where}, line {key.start_mark.line + 1}"
        if name not in flags:
            raise UsageError(f"{place}: {name!r} is not a flag; --help has their names")
        if name in found:
            raise UsageError(f"{place}: {name!r} is there for the second time; leave one out")
        if node.tag.endswith(":null"):
            continue
        try:
            found[name] = flags[name], _value_of(node, flags[name], parser)
        except argparse.ArgumentError as error:
            raise UsageError(f"{place}: {name}: {error.message}") from None
    return list(found.values())


def _value_of(node: yaml.Node, action: argparse.Action, parser: argparse.ArgumentParser) -> object:
    """What a flag makes of an entry of a YAML file.

    Raises:
        ArgumentError: it makes nothing of it.
    """
    is_list = isinstance(node, yaml.SequenceNode)
    words = [each.value for each in node.value] if is_list else [node.value]
    if isinstance(node, yaml.MappingNode) or not all(isinstance(word, str) for word in words):
        raise argparse.ArgumentError(action, "it takes a value, or a list of them")
    is_switch = action.nargs == 0
    if is_switch != node.tag.endswith(":bool"):
        kind = "true or false" if is_switch else "a value, which in quotes may be this word"
        raise argparse.ArgumentError(action, f"it takes {kind}, found {node.value}")
    if is_switch:
        return bool(yaml.safe_load(words[0]))
    most = action.nargs or 1
    if not words or (most != "+" and len(words) != most):
        number = "one or more" if most == "+" else most
        raise argparse.ArgumentError(action, f"it takes {number} of them, found {len(words)}")
    return parser._get_values(action, words)


def write_config(path: Path, settings: ConfigSettings) -> None:
    """Write the flags as they are now, so that --config of this file gives `settings` again."""
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    known = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if name != "config" and value is not None
    }
    write_atomic(path, yaml.safe_dump(known, sort_keys=False, allow_unicode=True))
    say(f"all flags are in {path}")
