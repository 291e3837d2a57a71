"""Weights of classes from how often each occurs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Balance = Literal["inverse_frequency", "inverse_root"]
"""1/n, or 1/√n, of the number n of targets of a class."""


def balanced_weights(balance: Balance, counts: Sequence[int]) -> tuple[float, ...]:
    """Weight of each class, such that the mean over all targets is 1; classes without targets have 1."""
    power = {"inverse_frequency": -1.0, "inverse_root": -0.5}[balance]
    total = sum(count ** (1 + power) for count in counts if count)
    return tuple(count**power * sum(counts) / total if count else 1.0 for count in counts)
