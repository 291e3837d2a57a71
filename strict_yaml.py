"""YAML as configurations and sweeps are written: its 1.2 core schema, files with bases, errors in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from schema import expand_home


class ConfigError(ValueError):
    """A configuration that a user has to correct; the message names file, key and what is known instead."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever was quoted in it


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core schema, with duplicate keys refused and merge keys (``<<``) allowed.

    YAML 1.1, which PyYAML reads, takes ``010`` for 8, ``12:30`` for 750, ``no`` for false and ``2025-11-25`` for
    a date.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1}: a key must be a word, found a list or mapping")
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: duplicate key '{key.value}'")
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


class Dumper(yaml.SafeDumper):
    """Quotes what the loader, or YAML 1.1, would take for something else than text."""


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
for _kind, _pattern in {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,15}",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": "<<",
}.items():
    for _class in (StrictLoader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), None)


def read_chain(path: Path, below: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Read a file and those that its ``base`` names, the deepest base first; of several bases, later ones win.

    Args:
        path: YAML file with a mapping of keys; bases are relative to it.
        below: files that have this one as their base.

    Raises:
        ConfigError: one of them cannot be read, or is its own base.
    """
    if path.resolve() in below:
        raise ConfigError(f"{path}: 'base' files form a circle")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except (ValueError, LookupError) as error:  # ConfigError among them; the others from `!!int x` and the like
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested without end") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    base = values.pop("base", None)
    for name in base if isinstance(base, list) else [] if base is None else [base]:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: 'base' must be a file name or a list of them, relative to this file")
        try:
            below_this = path.parent / expand_home(name)
        except ValueError as error:
            raise ConfigError(f"{path}: base: {error}") from error
        yield from read_chain(below_this, (*below, path.resolve()))
    yield path, values


def read_value(text: str, source: str) -> Any:
    """Read the right-hand side of ``key=value``: YAML, or a word that is meant as it stands.

    Args:
        text: the value.
        source: names it in messages.

    Raises:
        ConfigError: it begins like a list, mapping or quotation, and is none.
    """
    try:
        node = yaml.compose(text, StrictLoader)
        if node is not None and not (isinstance(node, yaml.ScalarNode) and node.style is None):
            return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        if text.lstrip()[:1] in tuple("[{\"'&*!|>"):
            raise ConfigError(f"{source}: the value is not valid YAML") from error
    # Of one word, all is meant: the shell has taken quotes away, and `runs/a #1` has no comment.
    word, loader = text.strip(), StrictLoader("")
    try:
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, word, (True, False)), word))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
