"""Planned runs and the manifest of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.plan import extend, flatten, make_plan, read_manifest, short_keys, write_manifest
from experiments.sweep_file import Sweep


def decode(cfg, overrides):
    """Takes what it gets, except for negative values."""
    values = dict(text.split("=", 1) for text in overrides)
    for key, value in values.items():
        if value.startswith("-"):
            raise ValueError(f"{key} must not be negative")
    return {key: float(value) if value.replace(".", "").isdigit() else value for key, value in values.items()}


def plan(out="out", **sweep):
    return make_plan(Sweep(cfg=Path("run.yaml"), **sweep), Path(out), decode)


def test_runs_and_names_one_seed_after_the_other():
    runs = plan(grid={"c.alpha": ["0", "0.5"], "seed": ["0", "1"]}).runs
    assert [run.name for run in runs] == ["alpha-0_seed-0", "alpha-0.5_seed-0", "alpha-0_seed-1", "alpha-0.5_seed-1"]
    assert runs[1].overrides == ("c.alpha=0.5", "seed=0")


def test_variants_are_crossed_with_the_grid_and_named_by_both():
    runs = plan(
        overrides={"x": "9", "y": "1"}, variants={"focal": {}, "ia_bce+m": {"y": "2"}}, grid={"seed": ["3"]}
    ).runs
    assert [(run.name, run.variant) for run in runs] == [("focal_seed-3", "focal"), ("ia_bce+m_seed-3", "ia_bce+m")]
    assert runs[1].overrides == ("x=9", "y=2", "seed=3")


def test_values_that_make_no_names_are_told_apart():
    runs = plan(grid={"m": ["{a: 1}", "[a, 1]", "/tmp/a b"]}).runs
    assert len({run.name for run in runs}) == 3
    assert all("/" not in run.name and " " not in run.name for run in runs)


def test_every_combination_is_validated_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="run lr--1_seed-0: lr must not be negative"):
        plan(out=tmp_path / "out", grid={"lr": ["1", "-1"], "seed": ["0"]})
    assert not (tmp_path / "out").exists()


def test_two_runs_of_the_same_configuration_are_refused():
    with pytest.raises(ValueError, match=r"runs lr-1 and lr-1\.0 have the same configuration"):
        plan(grid={"lr": ["1", "1.0"]})
    # The number of workers does not change what is learned.
    with pytest.raises(ValueError, match="have the same configuration"):
        plan(grid={"data.num_workers": ["1", "2"]})


def test_short_keys_are_the_shortest_unambiguous_endings():
    keys = ["a.x.alpha", "b.x.alpha", "c.beta", "alpha"]
    assert short_keys(keys) == {"a.x.alpha": "a.x.alpha", "b.x.alpha": "b.x.alpha", "c.beta": "beta", "alpha": "alpha"}


def test_flatten_keeps_lists_and_empty_mappings():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [{"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [{"e": 2}]}


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    written = plan(out=tmp_path / "out", baseline="focal", variants={"focal": {}}, grid={"seed": ["0"]})
    write_manifest(written)
    assert read_manifest(tmp_path / "out") == written
    assert read_manifest(tmp_path) is None
    (tmp_path / "out" / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sweep\.json: damaged"):
        read_manifest(tmp_path / "out")


def test_a_sweep_may_grow_but_not_change(tmp_path, monkeypatch):
    old = plan(grid={"seed": ["0", "1"]})
    new = plan(grid={"seed": ["1", "2"]}, baseline="seed=1")
    grown = extend(old, new, decode)
    assert [run.name for run in grown.runs] == ["seed-0", "seed-1", "seed-2"]
    assert grown.baseline == "seed=1"
    with pytest.raises(ValueError, match="holds a run seed-0 with other overrides"):
        extend(old, plan(overrides={"lr": "2"}, grid={"seed": ["0"]}), decode)
    with pytest.raises(ValueError, match=r"holds a sweep over run\.yaml, not other\.yaml"):
        extend(old, new._replace(cfg=Path("other.yaml")), decode)
    # The same file, said in another way.
    monkeypatch.chdir(tmp_path)
    assert extend(old, new._replace(cfg=tmp_path / "run.yaml"), decode) == grown


def test_a_run_is_known_by_its_configuration_and_keeps_its_name():
    old = plan(grid={"c.alpha": ["0", "0.5"]}, overrides={"seed": "0"})
    assert [run.name for run in old.runs] == ["alpha-0", "alpha-0.5"]
    new = plan(grid={"seed": ["0", "1"], "c.alpha": ["0", "0.50"]})
    grown = extend(old, new, decode)
    assert grown.runs[:2] == old.runs
    assert [run.name for run in grown.runs[2:]] == ["seed-1_alpha-0", "seed-1_alpha-0.50"]
    assert extend(grown, new, decode) == grown
