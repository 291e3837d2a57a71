"""Files as they come out of a bad transfer, an editor or a script: real ones with a few changes."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\n",
        b"\r\n",
        b" ",
    ),
    *(b"0", b"-1", b"1e999", b"NaN", b"Infinity", b"null", b"true", b'"0"', b"9" * 30, b"[[[[", b'{"a": [{}, {}]}'),
    *(b'"images": [', b'"annotations": [', b"<object>", b"</object>", b"<!--", b"&amp;", b"&x;", b"0 .5 .5 .1 .1\n"),
    *(b"yes", b"'", b"- ", b"? ", b"*x", b"&x ", b"!!python/object:os.system ", b"..", b"/", b"\xc3\xa9"),
)


def fuzzing(cases: int) -> settings:
    """So many cases; with ALIGN_DETR_FUZZ=N, N times as many."""
    return settings(
        max_examples=cases * int(os.environ.get("ALIGN_DETR_FUZZ", 1)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@st.composite
def mutated(draw: st.DrawFn, originals: tuple[bytes, ...]) -> bytes:
    """One of the originals with up to four cuts, repetitions, exchanges and insertions."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 1, 2, 5, 20, 100, 10_000))))
        kind = draw(st.sampled_from(("cut", "repeat", "insert", "exchange", "byte")))
        if kind == "cut":
            data = data[:start] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[start:]
        elif kind == "byte":
            data = data[:start] + bytes([draw(st.integers(0, 255))]) + data[start + 1 :]
        else:
            data = data[:start] + draw(st.sampled_from(TOKENS)) + data[start if kind == "insert" else end :]
    return data
