"""Grids of overrides."""

from __future__ import annotations

import pytest

from experiments.grid import combinations, parse_axis, parse_grid


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=0,0.25,0.5", ["0", "0.25", "0.5"]),
        ("seed=0..2", ["0", "1", "2"]),
        ("seed=-1..1,7", ["-1", "0", "1", "7"]),
        ("lr=1e-4", ["1e-4"]),
        ("m={name: mixed, candidates: 2},hungarian", ["{name: mixed, candidates: 2}", "hungarian"]),
        ("s=[8, 16],[16, 32]", ["[8, 16]", "[16, 32]"]),
        ("name='a, b',c", ["'a, b'", "c"]),
        ("tau=null,1.5", ["null", "1.5"]),
        ("path=../data", ["../data"]),
    ],
)
def test_values_of_an_axis(text, values):
    assert parse_axis(text)[1] == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed", "expected key.path=value"),
        ("=1", "expected key.path=value"),
        ("a..b=1", "expected key.path=value"),
        ("seed=", "a value is empty"),
        ("seed=1,,2", "a value is empty"),
        ("seed=2..0", r"the range 2\.\.0 holds nothing"),
        ("seed=0..99999", "more than 10000 values"),
        ("seed=1,1", "the value 1 is given twice"),
        ("seed=0..2,1", "the value 1 is given twice"),
        ("m={name: mixed,hungarian", "'}' is missing"),
    ],
)
def test_malformed_axes_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_axis(text)


def test_the_last_key_varies_fastest():
    grid = parse_grid(["a=1,2", "seed=0..1"])
    assert [tuple(choice.values()) for choice in combinations(grid)] == [
        ("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")
    ]  # fmt: skip
    assert combinations({}) == [{}]


def test_a_key_given_twice_an_axis_without_values_and_too_many_combinations():
    with pytest.raises(ValueError, match="seed is given twice"):
        parse_grid(["seed=1", "seed=2"])
    with pytest.raises(ValueError, match="the grid is empty"):
        combinations({"a": []})
    with pytest.raises(ValueError, match="125000 combinations"):
        combinations({key: [str(i) for i in range(50)] for key in "abc"})
