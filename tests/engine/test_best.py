"""The best evaluation, and the end of a training that gets no better."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_training
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import Options

from engine import checkpoint
from engine.best import Best, restored, updated
from engine.trainer import Trainer
from engine.trainer_config import TrainerConfig

VALUES = st.one_of(st.none(), st.floats(0, 100), st.just(math.nan))


@settings(deadline=None)
@given(
    st.lists(VALUES, min_size=1, max_size=12),
    st.sampled_from(["AP75", "per_class/dog", "loss", "terms/decoder.0/class"]),
)
def test_the_best_is_the_first_of_the_highest_or_of_a_loss_the_lowest(values: list[Any], metric: str) -> None:
    best: Best | None = None
    for step, value in enumerate(values):
        nested = {metric: value} if "/" not in metric else {metric.split("/")[0]: {metric.split("/", 1)[1]: value}}
        best, gained = updated(best, metric, {"AP": 1.0, **nested}, step)
        assert gained == (best["step"] == step)
    sign = -1 if metric.startswith(("loss", "terms")) else 1
    ranked = [-math.inf if v is None or math.isnan(v) else sign * v for v in values]
    expected = ranked.index(max(ranked))
    assert best == {metric: sign * ranked[expected], "step": expected, "since": len(values) - 1 - expected}
    assert restored(best, metric) == best


def test_a_best_of_an_earlier_version_or_of_something_else() -> None:
    assert restored({"AP": 12.5, "step": 7}, "AP") == {"AP": 12.5, "step": 7, "since": 0}
    assert restored({"AP": 12.5, "step": 7}, "AP50") is None
    assert restored(None, "AP") is None
    with pytest.raises(ValueError, match=r"best_metric=terms/x is not measured, but AP, per_class/dog, …"):
        updated(None, "terms/x", {"AP": 1.0, "per_class": {"dog": 2.0}}, 1)


def run(options: Options, scores: dict[int, float], **config: Any) -> Trainer:
    """Train with evaluations that give the score of their step."""
    build = tiny_training.build

    def with_scores(given: Options) -> Trainer:
        trainer = build(given)
        trainer.config = dataclasses.replace(trainer.config, **config)
        trainer.evaluate = lambda model, stop: {"AP": 1.0, "AP50": scores[trainer.step]}
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_training, "build", with_scores)
        return tiny_training.train(options)


def test_training_ends_after_so_many_evaluations_without_gain_and_stays_ended(tmp_path: Path) -> None:
    scores = {2: 10.0, 4: 30.0, 6: 30.0, 8: 20.0, 10: 99.0, 12: 99.0}
    settings = {"best_metric": "AP50", "early_stopping": 2}
    directory = str(tmp_path / "stopped")
    trainer = run(Options(directory, eval_every_steps=2), scores, **settings)
    assert trainer.step == 8
    assert trainer.best == {"AP50": 30.0, "step": 4, "since": 2}
    assert checkpoint.load(tmp_path / "stopped" / checkpoint.BEST).state["position"]["step"] == 4
    again = run(Options(directory, eval_every_steps=2, resume="auto"), scores, **settings)
    assert again.step == 8
    longer = run(Options(directory, eval_every_steps=2, resume="auto"), scores, **{**settings, "early_stopping": 3})
    assert longer.step == 12
    assert longer.best == {"AP50": 99.0, "step": 10, "since": 1}


def test_an_interrupted_run_stops_where_the_whole_one_does(tmp_path: Path) -> None:
    scores = {2: 30.0, 4: 20.0, 6: 25.0, 8: 20.0, 10: 99.0, 12: 99.0}
    settings = {"best_metric": "AP50", "early_stopping": 3}
    whole = run(Options(str(tmp_path / "whole"), eval_every_steps=2), scores, **settings)
    part = run(Options(str(tmp_path / "part"), steps=4, eval_every_steps=2), scores, **settings)
    assert part.best == {"AP50": 30.0, "step": 2, "since": 1}
    part = run(Options(str(tmp_path / "part"), eval_every_steps=2, resume="auto"), scores, **settings)
    assert (part.step, part.best) == (whole.step, whole.best) == (8, {"AP50": 30.0, "step": 2, "since": 3})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"early_stopping": 0}, "early_stopping must be at least 1"),
        ({"best_metric": "mAP"}, "best_metric must be one of AP, AP50"),
        ({"best_metric": "loss"}, "needs validation_loss=true"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainerConfig(**settings)


def test_a_class_that_is_not_in_the_data_is_refused(tmp_path: Path) -> None:
    trainer = tiny_training.build(Options(str(tmp_path)))
    for given_ in ({"best_metric": "per_class/x"}, {"curve_classes": ("a", "x")}):
        with pytest.raises(ValueError, match="there is no class 'x' in the data"):
            Trainer(
                TrainerConfig(**given_),
                step=trainer.optimizer_step,
                schedule=trainer.schedule,
                loader=trainer.loader,
                evaluate=trainer.evaluate,
                directory=tmp_path,
                batch_size=8,
                seed=1,
                identity=trainer.identity,
            )
