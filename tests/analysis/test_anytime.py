"""The interval that may be looked at after every difference: against integrals, and by simulation of its error rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy.stats import norm, t

from analysis.anytime import EFFECT_SCALE, anytime_interval, forecast, judge
from analysis.bootstrap import Interval

CONFIDENCE = 0.9
SEQUENCES, LONGEST = 400, 20
SMALLEST = 1.0


@pytest.mark.parametrize("differences", [(0.3, 1.1, 0.8), (2.0, -1.0, 0.5, 4.0)])
def test_at_its_bounds_the_mixture_is_so_many_times_as_likely(differences):
    """By sums over a grid of effects and spreads, in place of the closed form."""
    interval = anytime_interval(differences, CONFIDENCE)
    assert interval.difference == pytest.approx(np.mean(differences))
    effect, log_spread = np.linspace(-25, 25, 801)[:, None], np.linspace(-7, 9, 801)
    spread = np.exp(log_spread)  # dσ/σ = d log σ
    prior = norm.pdf(effect, 0, EFFECT_SCALE)
    for bound in (interval.low, interval.high):
        x = np.array(differences)[:, None, None] - bound
        mixed = (norm.pdf(x, effect * spread, spread).prod(axis=0) * prior).sum() * (50 / 800)
        plain = norm.pdf(x[:, 0], 0, spread).prod(axis=0).sum()
        assert mixed / plain == pytest.approx(1 / (1 - CONFIDENCE), rel=1e-3)


def naive(differences: np.ndarray, confidence: float) -> Interval:
    """Student's interval, which holds once."""
    n, mean = len(differences), float(np.mean(differences))
    half = t.ppf((1 + confidence) / 2, n - 1) * np.std(differences, ddof=1) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def verdicts(
    effect: float, spread: float, make: Callable[..., Interval] = anytime_interval
) -> Iterator[tuple[str, int]]:
    """Verdict of each of many ablations that look after every seed and stop at the first verdict, and its seeds."""
    for row in np.random.default_rng().normal(effect, spread, (SEQUENCES, LONGEST)):
        verdict = "undecided"
        for n in range(2, LONGEST + 1):
            verdict = judge(make(row[:n], CONFIDENCE), SMALLEST)
            if verdict != "undecided":
                break
        yield verdict, n


def share(found: Iterator[tuple[str, int]], *wanted: str) -> float:
    return sum(verdict in wanted for verdict, _ in found) / SEQUENCES


SLACK = 4 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / SEQUENCES)


@pytest.mark.parametrize("spread", [0.2, 3.0, 50.0])
def test_without_an_effect_wrong_verdicts_are_no_more_frequent_than_declared(spread):
    assert share(verdicts(0.0, spread), "helps", "hurts") <= 1 - CONFIDENCE + SLACK
    # Were Student's interval looked at as often, it would be wrong far more often: the test can fail.
    if spread >= 3:
        assert share(verdicts(0.0, spread, naive), "helps", "hurts") > 2 * (1 - CONFIDENCE) + SLACK


def test_an_effect_just_as_large_as_matters_is_not_called_too_small():
    assert share(verdicts(SMALLEST, 0.4), "too small to matter", "hurts") <= 1 - CONFIDENCE + SLACK


def test_effects_are_found_and_small_ones_are_called_small():
    assert share(verdicts(2.0, 1.0), "helps") > 0.9
    assert share(verdicts(-2.0, 1.0), "hurts") > 0.9
    assert share(verdicts(0.0, 0.3), "too small to matter") > 0.9
    assert share(verdicts(0.5, 4.0), "undecided") > 0.5


def test_two_differences_settle_nothing_and_three_may():
    assert anytime_interval([1.0, 1.0], 0.95)[1:] == (-math.inf, math.inf)
    assert anytime_interval([1.0, 1.0, 1.0], 0.95)[1:] == (1.0, 1.0)
    assert math.isnan(anytime_interval([], 0.95).difference)
    low, high = anytime_interval([4.9, 5.0, 5.1], 0.95)[1:]
    assert 0 < low < 5 < high


def test_a_forecast_is_the_first_number_that_decides_if_things_stay_as_they_are():
    differences = [0.0, 3.0] * 2
    more = forecast(differences, 0.95, SMALLEST)
    assert more
    # Of an even number, mean and spread can be kept exactly.
    decides = [judge(anytime_interval([0.0, 3.0] * (n // 2), 0.95), SMALLEST) for n in range(4, 4 + more + 2, 2)]
    assert decides[-1] == "helps"
    assert set(decides[:-2]) == {"undecided"}
    assert forecast([1.0], 0.95, SMALLEST) is None
    assert forecast([-1e6, 1e6], 0.95, SMALLEST) is None
