"""Flags from a YAML file, by the same names and with the same values as on the command line."""

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from utils.cli import UsageError, in_one_line, say
from utils.command_line.parser import Parser, Settings, flag, parser_of
from utils.files import open_text, write_atomic


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
