"""Sweep files: strict, and what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.sweep_file import read_sweep


def write(tmp_path: Path, text: str, name: str = "sweep.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_everything_a_file_may_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    path = write(
        tmp_path / "sweeps",
        """
cfg: ../run.yaml
baseline: plain
overrides: {trainer.log_every: 10, criterion.prime_sample_tau: null}
variants:
  plain: {}
  mixed:
    criterion.matcher: {name: mixed, candidates: 2}
    optimizer.lr: 1e-4
grid: {seed: 0..2, a.b: [0.5, [1, 2], null]}
""",
    )
    sweep = read_sweep(path)
    assert sweep.cfg == Path("run.yaml")  # as a person in this directory would write it
    assert sweep.baseline == "plain"
    assert sweep.overrides == {"trainer.log_every": "10", "criterion.prime_sample_tau": "null"}
    assert sweep.variants == {
        "plain": {},
        "mixed": {"criterion.matcher": "{name: mixed, candidates: 2}", "optimizer.lr": "0.0001"},
    }
    assert sweep.grid == {"seed": ["0", "1", "2"], "a.b": ["0.5", "[1, 2]", "null"]}


def test_the_keys_of_a_base_are_replaced(tmp_path):
    write(tmp_path, "cfg: one.yaml\nvariants: {a: {}, b: {x: 1}}\ngrid: {seed: [0]}", "base.yaml")
    sweep = read_sweep(write(tmp_path, "base: base.yaml\ncfg: two.yaml\ngrid: {seed: [1, 2]}"))
    assert sweep.cfg.name == "two.yaml"
    assert list(sweep.variants) == ["a", "b"]
    assert sweep.grid == {"seed": ["1", "2"]}


def test_the_command_line_comes_on_top(tmp_path):
    sweep = read_sweep(write(tmp_path, "cfg: c\noverrides: {steps: 5}\nvariants: {a: {x: 1}}\ngrid: {seed: [0]}"))
    updated = sweep.updated({"seed": ["3", "4"], "steps": ["9"], "lr": ["1", "2"], "other": ["7"]})
    assert updated.grid == {"seed": ["3", "4"], "lr": ["1", "2"]}
    assert updated.overrides == {"steps": "9", "other": "7"}
    assert sweep.updated({"seed": ["5"]}).grid == {"seed": ["5"]}
    with pytest.raises(ValueError, match="x is set by the variant 'a'"):
        sweep.updated({"x": ["2"]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grid: {seed: [0]}", "'cfg', the configuration to vary, is missing"),
        ("cfg: a\nseeds: [0]", "unknown key 'seeds', known: base, cfg"),
        ("cfg: a", "there is nothing to run"),
        ("cfg: a\ngrid: {}", "there is nothing to run"),
        ("cfg: a\ngrid: {seed: []}", "grid.seed: the list is empty"),
        ("cfg: a\ngrid: {seed: 3}", "grid.seed: expected a list of values or a range"),
        ("cfg: a\ngrid: {seed: [1, 1]}", "the value 1 is given twice"),
        ("cfg: a\ngrid: [seed]", "grid: expected a mapping"),
        ("cfg: a\ngrid: {x: [1]}\nvariants: {v: {x: 2}}", "x is in the grid and in the variant 'v'"),
        ("cfg: a\nvariants: {v: {}}\nbaseline: w", "there is no variant 'w', known: v"),
        ("cfg: a\nvariants: {v: {}}\nbaseline: [v]", "baseline: expected the name of a variant"),
        ("cfg: a\nvariants: {v: {}, v: {x: 1}}", "line 2: duplicate key 'v'"),
        ("cfg: [a]\ngrid: {seed: [0]}", "cfg: expected one file name"),
        ("cfg: a\ngrid: {seed: [0]", "not valid YAML"),
        ("", "'cfg', the configuration to vary, is missing"),
        ("base: sweep.yaml", "circle"),
        ("base: nowhere.yaml", r"nowhere\.yaml: cannot be read"),
    ],
)
def test_errors_name_file_and_reason(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_sweep(write(tmp_path, text))
    assert ".yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_mean_what_they_mean_in_a_configuration(tmp_path):
    text = "cfg: a\noverrides: {a: no, b: 010, c: 12:30, d: 1e-5}\ngrid: {e: [on, 0o10]}"
    sweep = read_sweep(write(tmp_path, text))
    assert sweep.overrides == {"a": "no", "b": "10", "c": "12:30", "d": "1.0e-05"}
    assert sweep.grid == {"e": ["on", "8"]}
