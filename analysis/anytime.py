"""How many paired differences settle a question: an interval that holds at every number of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from analysis.bootstrap import Interval

Verdict = Literal["helps", "hurts", "too small to matter", "undecided"]

EFFECT_SCALE = 3.0
"""Standard deviation c of the mixture over effects in units of the spread of the differences. Any value is valid; runs
that share their random numbers differ by several times their spread where they differ at all. The fewest differences
that can settle anything are then three at 95% confidence."""
FARTHEST = 10_000
"""Differences beyond which no forecast is made."""


def anytime_interval(differences: Sequence[float], confidence: float) -> Interval:
    """Anytime-valid confidence interval of the mean of independent Gaussian differences of unknown variance.

    With probability ``confidence`` it holds the true mean after each of n = 2, 3, 4, … differences at once, so that one
    may look after every one of them and stop for whatever reason. For each mean m the statistic is the ratio of the
    densities of (x_1 − m, …, x_n − m), up to scale, under an effect μ/σ ~ N(0, c²) and under none, both with the right
    Haar prior 1/σ: with a = 1 + n·c² and T = n·(x̄ − m)² / Σ(x_i − x̄)²,

        M_n(m) = a^(−1/2) · ((1 + T) / (1 + T/a))^(n/2).

    At the true m it is a martingale that starts at 1, and by Ville's inequality exceeds 1/(1 − confidence) with
    probability 1 − confidence at most; the interval holds the m at which it does not. Source: Wang and Ramdas,
    "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance", arXiv 2310.03722, the
    Gaussian mixture in place of the flat one of Lai, "On confidence sequences" (Annals of Statistics 4, 1976).

    Assumes that differences are independent and Gaussian: one seed that fails to learn is not.

    Args:
        differences: one for each seed, in the order in which they came.
        confidence: between 0 and 1.

    Returns:
        Mean and bounds, infinite where nothing can be said yet.
    """
    if len(differences) < 2:
        return Interval(sum(differences) if differences else math.nan, -math.inf, math.inf)
    return _interval(float(np.mean(differences)), float(np.std(differences)), len(differences), confidence)


def _interval(mean: float, spread: float, n: int, confidence: float) -> Interval:
    """Solve M_n(m) ≤ 1/(1 − confidence) for m, given the standard deviation of the n differences themselves."""
    a = 1 + n * EFFECT_SCALE**2
    bound = (math.sqrt(a) / (1 - confidence)) ** (2 / n)
    half = math.inf if bound >= a else spread * math.sqrt((bound - 1) / (1 - bound / a))
    return Interval(mean, mean - half, mean + half)


def judge(interval: Interval, smallest: float) -> Verdict:
    """Say what an interval of a difference settles.

    Args:
        interval: of the mean difference.
        smallest: smallest effect of interest, positive. An interval between −smallest and smallest is too small to
            matter; otherwise one above 0 helps, one below 0 hurts.
    """
    if -smallest < interval.low and interval.high < smallest:
        return "too small to matter"
    return "helps" if interval.low > 0 else "hurts" if interval.high < 0 else "undecided"


def forecast(differences: Sequence[float], confidence: float, smallest: float) -> int | None:
    """Estimate how many differences more would settle the question, were mean and spread to stay as they are.

    None where they are fewer than two, or where more than ``FARTHEST`` would be needed.
    """
    if len(differences) < 2:
        return None
    mean, spread, n = float(np.mean(differences)), float(np.std(differences)), len(differences)
    for more in range(1, FARTHEST):
        if judge(_interval(mean, spread, n + more, confidence), smallest) != "undecided":
            return more
    return None
