"""Tensors that are the same in every step, made once for each device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._pytree import tree_leaves

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

_MOST = 64
"""Results kept of one function: more than a training has image sizes in use at a time."""


def remembered(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Keep what a function of hashable arguments made of tensors; what is made to be traced is made anew."""
    kept: dict[Hashable, Any] = {}

    @functools.wraps(make)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Made:
        if torch.compiler.is_compiling():
            return make(*arguments, **named)
        key = (arguments, tuple(named.items()))
        if key not in kept:
            with torch.inference_mode(False), torch.no_grad():
                made = make(*arguments, **named)
            if any(type(leaf) is not torch.Tensor for leaf in tree_leaves(made)):  # a stand-in of a tracer
                return made
            if len(kept) >= _MOST:
                kept.clear()
            kept[key] = made
        return kept[key]

    return call
