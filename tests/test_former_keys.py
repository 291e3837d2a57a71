"""Keys of earlier versions mean what they meant: in YAML, on the command line, inside a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import config
from config import Config, ConfigError
from former_keys import modernise
from matchers import FocalCost, Hungarian, Mixed, PositionModulatedCost

DATA = {"train": {"images": "a", "annotations": "b"}, "val": {"images": "c", "annotations": "d"}}
PUBLISHED = {"padded_query_positions": True, "suppress_invalid_proposals": False, "prediction_eps": 1e-5}
MODULATION = "criterion.matcher.cost.position_modulation"


def from_yaml(path: Path, values: dict[str, Any], overrides: list[str] | None = None) -> Config:
    (path / "run.yaml").write_text(yaml.safe_dump({"data": DATA, **values}))
    return config.load(path / "run.yaml", overrides or [])


def from_overrides(path: Path, values: dict[str, Any]) -> Config:
    def flatten(part: Any, prefix: str) -> list[str]:
        if not isinstance(part, dict):
            return [f"{prefix}={part}"]
        return [text for key, value in part.items() for text in flatten(value, f"{prefix}.{key}" if prefix else key)]

    return from_yaml(path, {}, flatten(values, ""))


def from_checkpoint(path: Path, values: dict[str, Any]) -> Config:
    """As an earlier version saved it: resolved, so every key is there, and the cost has no name."""
    resolved = config.to_dict(from_yaml(path, {}))
    model, cost = resolved["model"], resolved["criterion"]["matcher"]["cost"]
    model.update(model.pop("published"), **values.get("model", {}))
    assert cost.pop("name") == "focal"
    cost["position_modulation"] = 0.0
    cost |= values.get("criterion", {}).get("matcher", {}).get("cost", {})
    torch.save({"config": resolved}, path / "checkpoint.pth")
    return config.from_dict(torch.load(path / "checkpoint.pth", weights_only=True)["config"])


every_way = pytest.mark.parametrize(
    "read", [from_yaml, from_overrides, from_checkpoint], ids=lambda read: read.__name__
)


@every_way
@pytest.mark.parametrize("key", PUBLISHED)
def test_details_of_published_models_have_moved(read, key, tmp_path):
    defaults = from_yaml(tmp_path, {}).model.published
    assert getattr(defaults, key) != PUBLISHED[key]
    found = read(tmp_path, {"model": {key: PUBLISHED[key]}}).model.published
    for other in PUBLISHED:
        assert getattr(found, other) == (PUBLISHED[key] if other == key else getattr(defaults, other))


@every_way
def test_all_of_them_together(read, tmp_path):
    found = read(tmp_path, {"model": dict(PUBLISHED)})
    assert found == from_yaml(tmp_path, {"model": {"published": PUBLISHED}})


@every_way
@pytest.mark.parametrize(
    ("modulation", "expected"), [(0, FocalCost), (0.0, FocalCost), (0.5, PositionModulatedCost)], ids=str
)
def test_position_modulation_was_a_number_and_is_a_cost(read, modulation, expected, tmp_path):
    cost = {"classification": 3.0, "gamma": 1.5, "position_modulation": modulation}
    found = read(tmp_path, {"criterion": {"matcher": {"cost": cost}}})
    beta = {"beta": 0.5} if modulation else {}
    assert found.criterion.matcher == Hungarian(cost=expected(classification=3.0, gamma=1.5, **beta))


def test_position_modulation_of_a_named_matcher(tmp_path):
    matcher = {"name": "mixed", "candidates": 4, "cost": {"bbox": 1.0, "position_modulation": 1.5}}
    found = from_yaml(tmp_path, {"criterion": {"matcher": matcher}}).criterion.matcher
    assert found == Mixed(candidates=4, cost=PositionModulatedCost(bbox=1.0, beta=1.5))


@pytest.mark.parametrize("former", [True, False])
def test_switched_on_by_an_override_the_other_fields_of_the_cost_stay(former, tmp_path):
    cost: dict[str, Any] = {"classification": 3.0, "gamma": 1.5}
    if former:
        cost["position_modulation"] = 0.0
    found = from_yaml(tmp_path, {"criterion": {"matcher": {"cost": cost}}}, [f"{MODULATION}=0.5"])
    assert found.criterion.matcher.cost == PositionModulatedCost(classification=3.0, gamma=1.5, beta=0.5)


def test_switched_off_by_an_override_the_other_fields_of_the_cost_stay(tmp_path):
    cost = {"classification": 3.0, "gamma": 1.5, "position_modulation": 0.5}
    found = from_yaml(tmp_path, {"criterion": {"matcher": {"cost": cost}}}, [f"{MODULATION}=0"])
    assert found.criterion.matcher.cost == FocalCost(classification=3.0, gamma=1.5)
    again = from_yaml(tmp_path, {"criterion": {"matcher": {"cost": cost}}}, [f"{MODULATION}=0", f"{MODULATION}=2"])
    assert again.criterion.matcher.cost == PositionModulatedCost(classification=3.0, gamma=1.5, beta=2.0)


def test_a_base_file_of_former_keys_under_one_of_today(tmp_path):
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(
            {
                "data": DATA,
                "model": {"prediction_eps": 1e-5, "padded_query_positions": True},
                "criterion": {"matcher": {"cost": {"position_modulation": 0.5, "giou": 4.0}}},
            }
        )
    )
    today = {"model": {"published": {"prediction_eps": 1e-2}}, "criterion": {"matcher": {"cost": {"beta": 0.25}}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **today}))
    found = config.load(tmp_path / "run.yaml")
    assert (found.model.published.prediction_eps, found.model.published.padded_query_positions) == (1e-2, True)
    assert found.criterion.matcher.cost == PositionModulatedCost(beta=0.25, giou=4.0)


def test_what_is_written_today_knows_no_former_key(tmp_path):
    found = from_yaml(
        tmp_path, {"model": dict(PUBLISHED), "criterion": {"matcher": {"cost": {"position_modulation": 1}}}}
    )
    text = config.dump(found)
    assert "position_modulation" not in text
    assert not PUBLISHED.keys() & yaml.safe_load(text)["model"].keys()
    assert config.from_dict(config.to_dict(found)) == found


@pytest.mark.parametrize(
    ("values", "overrides", "words"),
    [
        (
            {"model": {"prediction_eps": "small"}},
            [],
            r"run\.yaml: model\.published\.prediction_eps: expected a .*number",
        ),
        ({}, ["model.prediction_eps=2"], r"model\.prediction_eps=2: model\.published: prediction_eps must lie between"),
        ({}, ["model.suppress_invalid_proposal=true"], "unknown key"),
        ({}, [f"{MODULATION}=many"], r"position_modulation=many.*: criterion\.matcher\.cost\.beta: expected a"),
        ({}, [f"{MODULATION}=-1"], "beta must not be negative"),
        ({}, ["criterion.matcher.cost.position_modulated=1"], "unknown key"),
    ],
)
def test_errors_are_still_one_line_that_names_the_source(values, overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as caught:
        from_yaml(tmp_path, values, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{}, {"model": None}, {"model": "dino"}, {"criterion": {"matcher": "mixed"}}, {"a": [1]}]
)
def test_values_that_need_no_change_stay(values):
    before = copy.deepcopy(values)
    assert modernise(values) == values == before


def test_what_is_given_is_not_modified():
    values = {"model": dict(PUBLISHED), "criterion": {"matcher": {"cost": {"position_modulation": 0.5}}}}
    before = copy.deepcopy(values)
    assert modernise(values) != values
    assert values == before


@pytest.mark.parametrize("today", [True, False])
def test_another_matcher_in_the_same_breath_starts_from_its_own_defaults(today, tmp_path):
    """As a changed name always did."""
    base = {"classification": 3.0, **({"name": "position_modulated", "beta": 2.0} if today else {})}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": DATA, "criterion": {"matcher": {"cost": base}}}))
    matcher = {"name": "mixed", "cost": {"position_modulation": 0.5}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "criterion": {"matcher": matcher}}))
    assert config.load(tmp_path / "run.yaml").criterion.matcher == Mixed(cost=PositionModulatedCost(beta=0.5))
    overrides = ["criterion.matcher.name=hungarian", f"{MODULATION}=2"]
    found = config.load(tmp_path / "run.yaml", overrides).criterion.matcher
    assert found == Hungarian(cost=PositionModulatedCost(beta=2.0))


def test_over_todays_keys(tmp_path):
    cost = {"name": "position_modulated", "beta": 0.25, "bbox": 1.0}
    values = {"criterion": {"matcher": {"cost": cost}}}
    assert from_yaml(tmp_path, values, [f"{MODULATION}=2"]).criterion.matcher.cost == PositionModulatedCost(
        beta=2.0, bbox=1.0
    )
    assert from_yaml(tmp_path, values, [f"{MODULATION}=0"]).criterion.matcher.cost == FocalCost(bbox=1.0)
