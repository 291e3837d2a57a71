"""Whatever is written into a configuration: it is read, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing

import config
import strict_yaml
from config import Config, ConfigError

ROOT = Path(__file__).parents[2]
VALUES = config.to_dict(config.load(ROOT / "configs/align_dino.yaml"))
REAL = config.dump(config.from_dict(VALUES))
LINES = REAL.splitlines(keepends=True)
WORDS = (
    "null", "~", "true", "no", "010", "0o17", "0x1F", "12:30", "1e400", "-.inf", ".nan", "9" * 5000, "2025-11-25",
    "runs/a #1", "a: b", "[]", "{}", "{name: x}", "[1, [2]]", "*a", "&a [*a]", "!!int x", "!!bool x", "!!binary x",
    "<<", "|", ">-", "\"", "'", "%", "\t", "\x00", "\u2028", "é", "\ud800", "? [1]", "- a", "---", "...",
    "focal", "mixed",
)  # fmt: skip
many = fuzzing(120)


def keys(values: Any, prefix: str = "") -> list[str]:
    """Paths of a nested mapping."""
    if not isinstance(values, dict):
        return [prefix]
    own = [path for key, value in values.items() for path in keys(value, f"{prefix}.{key}" if prefix else key)]
    return [prefix, *own] if prefix else own


KEYS = keys(VALUES)
word = st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.integers().map(str), st.floats().map(repr))


def check(read: Any) -> None:
    """Success or one line."""
    message = "read"
    try:
        assert isinstance(read(), Config)
    except ConfigError as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 20_000


@many
@given(data=st.data())
def test_lines_changed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Lines of a real file dropped, doubled, moved, indented, cut, or with another value."""
    lines = list(LINES)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["drop", "double", "move", "indent", "cut", "value", "insert"]))
        line = lines[at]
        if kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "double":
            lines.insert(at, line)
        elif kind == "move":
            lines.insert(data.draw(st.integers(0, len(lines) - 1)), lines.pop(at))
        elif kind == "indent":
            lines[at] = " " * data.draw(st.integers(0, 6)) + line.lstrip()
        elif kind == "cut":
            lines[at] = line[: data.draw(st.integers(0, len(line)))]
        elif kind == "value":
            lines[at] = f"{line.partition(':')[0]}: {data.draw(word)}\n"
        else:
            lines.insert(at, data.draw(word) + "\n")
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")
    check(lambda: config.load(path))


@many
@given(at=st.integers(0, len(REAL) - 1), junk=st.binary(max_size=12), length=st.integers(0, 40))
def test_bytes_changed(tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    whole = REAL.encode()
    path.write_bytes(whole[:at] + junk + whole[at + length :])
    check(lambda: config.load(path))


@many
@given(override=st.builds(lambda key, value: f"{key}={value}", st.one_of(st.sampled_from(KEYS), word), word))
def test_overrides(override: str) -> None:
    check(lambda: config.from_dict(VALUES, [override]))


@many
@given(text=st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)))
def test_any_text_is_written_and_read_again(text: str) -> None:
    written = yaml.dump({text: [text]}, Dumper=strict_yaml.Dumper)
    assert yaml.load(written, strict_yaml.StrictLoader) == {text: [text]}
