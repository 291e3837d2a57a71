"""What the tests of a loss share: made-up detections, the loss under test, and what they find."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PlainLoss = Callable[..., Tensor]
"""``loss(logits [B, Q, C], boxes [B, Q, 4], targets) → scalar``."""
QUERIES = 12
COUNTS = (3, 1)
"""Targets of the images that most tests use."""
MATCHED, OTHER = (0, 0), (0, QUERIES - 1)
"""(image, query) that lies on a target, and that lies on none."""
SILENT = -40.0
"""A logit whose score and loss are nothing."""


@dataclass(frozen=True)
class Finding:
    """The result of one test."""

    test: str
    """Name of the test."""
    verdict: Literal["ok", "note", "fault"]
    """A note is worth knowing, and may be meant; a fault is nothing that a loss should do."""
    sentence: str
    """What was seen."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The same as values."""


class Problem(NamedTuple):
    """Predictions for B images and their targets; query i of an image lies on its target i, the last on none."""

    logits: Tensor
    """[B, Q, C]."""
    boxes: Tensor
    """[B, Q, 4] cxcywh in [0, 1]."""
    targets: list[dict[str, Tensor]]
    """``labels`` [n] and ``boxes`` [n, 4] of each image."""

    @property
    def num_targets(self) -> int:
        """Of all images."""
        return sum(len(target["labels"]) for target in self.targets)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.logits, self.boxes, *(value for target in self.targets for value in target.values())]

    def images(self, chosen: Sequence[int]) -> Problem:
        """Some of the images, in this order."""
        index = torch.tensor(chosen)
        return Problem(self.logits[index], self.boxes[index], [self.targets[i] for i in chosen])

    def beside(self, other: Problem) -> Problem:
        """These images, followed by others."""
        logits, boxes = torch.cat((self.logits, other.logits)), torch.cat((self.boxes, other.boxes))
        return Problem(logits, boxes, self.targets + other.targets)

    def with_queries(self, other: Problem) -> Problem:
        """These images with the queries of others appended."""
        logits, boxes = torch.cat((self.logits, other.logits), 1), torch.cat((self.boxes, other.boxes), 1)
        return Problem(logits, boxes, self.targets)

    def to(self, dtype: torch.dtype) -> Problem:
        """Copies, of another floating type; labels stay."""
        targets = [{"labels": t["labels"].clone(), "boxes": t["boxes"].to(dtype, copy=True)} for t in self.targets]
        return Problem(self.logits.to(dtype, copy=True), self.boxes.to(dtype, copy=True), targets)


def make_problem(counts: Sequence[int], classes: int, seed: int = 0, queries: int = QUERIES) -> Problem:
    """A float64 problem of images with so many targets; labels leave the last of several logits free."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    logits = uniform(-4, -1, len(counts), queries, classes)
    boxes = torch.cat((uniform(0.1, 0.9, len(counts), queries, 2), uniform(0.02, 0.1, len(counts), queries, 2)), -1)
    targets = []
    for b, count in enumerate(counts):
        labels = torch.randint(0, max(1, classes - 1), (count,), generator=generator)
        target_boxes = torch.cat((uniform(0.2, 0.8, count, 2), uniform(0.1, 0.3, count, 2)), -1)
        taken = min(count, queries)
        boxes[b, :taken] = target_boxes[:taken] * uniform(0.9, 1.1, taken, 4)
        logits[b, torch.arange(taken), labels[:taken]] += uniform(1, 4, taken)
        targets.append({"labels": labels, "boxes": target_boxes})
    return Problem(logits, boxes, targets)


class Loss(NamedTuple):
    """A loss under test."""

    function: PlainLoss
    """The loss itself."""
    fields: Mapping[str, Sequence[Any]]
    """Keyword arguments and values to try."""
    logits: int
    """C."""
    no_object: bool
    """Whether the last logit means that there is no object."""

    def __call__(self, problem: Problem, **fields: Any) -> Tensor:
        return self.function(problem.logits, problem.boxes, problem.targets, **fields)

    def value(self, problem: Problem, **fields: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return float(self(problem, **fields))

    def gradients(self, problem: Problem, **fields: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients of logits and boxes; 0 where there is none."""
        leaves = [problem.logits.detach().requires_grad_(), problem.boxes.detach().requires_grad_()]
        loss = self(problem._replace(logits=leaves[0], boxes=leaves[1]), **fields)
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
        logits, boxes = (torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))
        return loss.detach(), logits, boxes

    def takes(self, name: str) -> bool:
        """Whether it has an argument of this name."""
        return name in inspect.signature(self.function).parameters

    def problem(self, counts: Sequence[int] = COUNTS, seed: int = 0) -> Problem:
        """A problem of so many logits."""
        return make_problem(counts, self.logits, seed)

    def silent(self, like: Problem) -> Problem:
        """As many queries that see nothing, in a corner where no target is."""
        logits = torch.full_like(like.logits, SILENT)
        if self.no_object:
            logits[..., -1] = -SILENT
        corner = like.boxes.new_tensor([0.005, 0.005, 0.01, 0.01])
        return Problem(logits, corner.expand_as(like.boxes).clone(), like.targets)


class Meter(TorchDispatchMode):
    """Counts the elements of all tensors that are computed inside, and those of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.total, self.largest = self.total + sum(sizes), max(self.largest, *sizes, 0)
        return result


class Constants(TorchFunctionMode):
    """Holds constant what a loss cuts out of the gradient: recorded on a first call, given again on the next.

    Finite differences then see what autograd sees. Cut out are results of ``detach``, and with ``unrecorded`` whatever
    is computed without recording gradients.
    """

    def __init__(self, unrecorded: bool) -> None:
        super().__init__()
        self.unrecorded, self.values, self.next, self.replaying = unrecorded, list[Any](), 0, False

    def rewind(self) -> None:
        """From here on, give the recorded values, from the first."""
        self.next, self.replaying = 0, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cut = func is Tensor.detach or (self.unrecorded and not torch.is_grad_enabled())
        if not cut or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        if self.replaying:
            result, self.next = self.values[self.next], self.next + 1
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
        if self.replaying:
            return copied
        self.values.append(copied)
        return result
