"""What an error says, on one line."""

from __future__ import annotations


def describe_error(error: BaseException) -> str:
    """The text of an error on one line: file and reason where a file was at fault, its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
