"""What all commands share: the parser of their options, functions that these name, errors in one line, terminals."""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from ops.errors import describe_error
from schema import expand_home

P = ParamSpec("P")


class Parser(argparse.ArgumentParser):
    """Knows the ``~`` of paths, which a shell leaves in ``--out=~/found``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, home_path)


def home_path(text: str) -> Path:
    """Return the path that an option names.

    Raises:
        argparse.ArgumentTypeError: there is no home directory.
    """
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser(name: str, description: str | None) -> Parser:
    """Make the parser of ``python -m tools.NAME``, whose help is the module's docstring, without its backticks."""
    return Parser(
        prog=f"python -m tools.{name}",
        description=(description or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def named_function(name: str) -> Callable[..., Any]:
    """Return the function that MODULE:FUNCTION names; modules are also found in the working directory.

    Raises:
        ValueError: there is no such module, or nothing in it of this name can be called.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{name}: the module {module} cannot be imported ({error})") from error
    if not callable(found):
        raise ValueError(f"{name}: the module {module} has no function '{function}'; expected MODULE:FUNCTION")
    return found


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate what runs a command and returns its exit code: a user's error is one line, and exit code 2; Ctrl-C 130.

    A character that the terminal lacks is printed as an escape from then on, instead of ending the command.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            print(f"error: {describe_error(error)}", file=sys.stderr)
            return 2

    return guarded
