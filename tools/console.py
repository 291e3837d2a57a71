"""Output of commands to terminals of every kind."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """From now on a character that the terminal lacks is printed as an escape, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
