"""Tests of what must not change a loss, of what divides it, and of what it costs."""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor

from losses.conformance.problem import COUNTS, MATCHED, QUERIES, Finding, Loss, Meter, Problem

EXACT = 1e-6
"""Relative tolerance of what must be equal."""
FEW, MANY = 8, 64
"""Targets of an image between which cost is compared."""
DIVISORS = {
    "nothing": (1.0, 1.0, 1.0),
    "the number of targets": (1.0, 1.0, 1 / 2),
    "the number of images": (1.0, 2 / 3, 2 / 3),
    "the number of queries of an image": (1 / 2, 1.0, 1.0),
    "the number of queries of all images": (1 / 2, 2 / 3, 2 / 3),
}
"""What multiplies the gradient of a query, for each divisor: twice the queries, a third image without targets, a third
image with as many targets as the two others."""


def check_order(loss: Loss) -> list[Finding]:
    """Whether the order of queries, targets or images matters, and whether inputs are modified."""
    problem = loss.problem((4, 2))
    kept, value, found = problem.to(torch.float64), loss.value(problem), list[Finding]()
    if not all(torch.equal(a, b) for a, b in zip(problem.tensors(), kept.tensors(), strict=True)):
        found.append(Finding("order", "fault", "It modifies what it is given."))
    turned = torch.arange(QUERIES).roll(5)
    reordered = {
        "queries": kept._replace(logits=kept.logits[:, turned], boxes=kept.boxes[:, turned]),
        "targets": kept._replace(targets=[{k: v.flip(0) for k, v in t.items()} for t in kept.targets]),
        "images": kept.images([1, 0]),
    }
    for name, other in reordered.items():
        if not math.isclose(change := loss.value(other) / value, 1, rel_tol=EXACT):
            sentence = f"Another order of the {name} multiplies it by {change:.4f}."
            found.append(Finding("order", "fault", sentence, {"order": name, "factor": change}))
    return found or [Finding("order", "ok", "The order of queries, targets and images does not matter.")]


def check_images(loss: Loss) -> list[Finding]:
    """Whether one image changes the gradients of another, beyond a common factor."""
    problem, findings = loss.problem(), list[Finding]()
    _, *alone = loss.gradients(problem.images([0]))
    for count in (COUNTS[1], QUERIES - 2, QUERIES + 3, 0):
        pair = problem.images([0]).beside(loss.problem((count,), seed=3))
        for order in ([0, 1], [1, 0]):
            _, *found = loss.gradients(pair.images(order))
            for part, own, gradient in zip(("logits", "boxes"), alone, found, strict=True):
                if own.any() and (off := _beyond_a_factor(gradient[order[0]], own[0])) > EXACT:
                    place = "after" if order[0] else "before"
                    sentence = (
                        f"Gradients of the {part} of an image change by {off:.1%} {place} one of {count} targets."
                    )
                    findings.append(Finding("images", "fault", sentence, {"part": part, "targets": count, "off": off}))
    return findings or [
        Finding("images", "ok", "An image changes the gradients of another by a common factor at most.")
    ]


def _beyond_a_factor(found: Tensor, own: Tensor) -> float:
    """Share of one gradient that is not a multiple of another."""
    found, own = found.flatten(), own.flatten()
    return float((found - own * (found @ own) / (own @ own)).norm() / found.norm().clamp(min=1e-12))


def check_splitting(loss: Loss) -> list[Finding]:
    """Whether the loss of a step follows from those of its parts."""
    problem = loss.problem((3, 1, 0, 5))
    whole, parts = loss.value(problem), [problem.images([0, 1]), problem.images([2]), problem.images([3])]
    given = {"num_targets": problem.num_targets, "num_images": len(problem.targets)}
    given = {name: value for name, value in given.items() if loss.takes(name)}
    ratio = sum(loss.value(part, **given) for part in parts) / whole
    if math.isclose(ratio, 1, rel_tol=EXACT):
        return [Finding("splitting", "ok", f"Parts add up to the whole{' if given its numbers' if given else ''}.")]
    if given:
        sentence = f"Parts, each given the {' and '.join(given)} of all, add up to {ratio:.4f} of the whole."
        return [Finding("splitting", "fault", sentence, {"ratio": ratio})]
    ratio = sum(loss.value(part) * len(part.targets) for part in parts) / len(problem.targets) / whole
    if math.isclose(ratio, 1, rel_tol=EXACT):
        return [Finding("splitting", "ok", "The mean of parts, weighed by their images, is the whole.")]
    sentence = (
        "It takes no global number of targets: accumulated over parts with 4, 0 and 5 targets, the mean over images is"
        f" {ratio:.4f} of the whole."
    )
    return [Finding("splitting", "note", sentence, {"ratio": ratio})]


def check_padding(loss: Loss) -> list[Finding]:
    """Whether queries that see nothing change the gradients of the others, beyond a common factor."""
    problem = loss.problem()
    silent = loss.silent(problem)
    _, *own = loss.gradients(problem)
    _, *found = loss.gradients(problem.with_queries(silent))
    for part, gradient, expected in zip(("logits", "boxes"), found, own, strict=True):
        if expected.any() and (off := _beyond_a_factor(gradient[:, :QUERIES], expected)) > EXACT:
            sentence = (
                f"Padding with queries that see nothing changes the gradients of the others' {part} by {off:.1%}."
            )
            return [Finding("padding", "fault", sentence, {"part": part, "off": off})]
    return [Finding("padding", "ok", "Queries that see nothing change the gradients of others by a factor at most.")]


def check_divisor(loss: Loss) -> list[Finding]:
    """By what the sum over the batch is divided: told by what makes the gradient of one matched query smaller."""
    problem = loss.problem()
    silent = loss.silent(problem)
    empty = silent.images([0])._replace(targets=[{k: v[:0] for k, v in problem.targets[0].items()}])
    full = loss.problem((problem.num_targets,), seed=5)
    grown = [problem.with_queries(silent), problem.beside(empty), problem.beside(full)]
    _, *base = loss.gradients(problem)
    found = [loss.gradients(more)[1:] for more in grown]
    findings = []
    for i, term in enumerate(("class", "box")):
        if not base[i][MATCHED].any():
            continue
        ratios = [float(gradients[i][MATCHED].norm() / base[i][MATCHED].norm()) for gradients in found]
        fits = (name for name, r in DIVISORS.items() if max(abs(a - b) for a, b in zip(ratios, r, strict=True)) < 1e-4)
        by = next(fits, None)
        sentence = f"The {term} term is divided by {by}."
        if by is None:
            sentence = (
                f"The {term} term is divided by something else: twice the queries, an image without targets and one"
                f" with as many as all multiply it by {', '.join(f'{ratio:.4f}' for ratio in ratios)}."
            )
        numbers = {"term": term, "divisor": by, "factors": ratios}
        findings.append(Finding("divisor", "note" if by in (None, "nothing") else "ok", sentence, numbers))
    return findings


def check_cost(loss: Loss) -> list[Finding]:
    """How elements computed, the largest tensor and time grow with the targets."""
    measured = []
    for count in (FEW, MANY):
        problem = loss.problem((count, count)).to(torch.float32)
        problem = Problem(problem.logits.repeat(1, 16, 1), problem.boxes.repeat(1, 16, 1), problem.targets)
        with Meter() as meter:
            loss.gradients(problem)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            loss.gradients(problem)
            seconds.append(time.perf_counter() - start)
        measured.append((meter.total, meter.largest, statistics.median(seconds)))
    elements, largest, seconds = ([values[i] for values in measured] for i in range(3))
    numbers = {"targets": [FEW, MANY], "elements": elements, "largest": largest, "seconds": seconds}
    growth = [many / few for few, many in (elements, largest, seconds)]
    steep = max(growth[:2]) > 2 * MANY / FEW
    sentence = (
        f"From {FEW} to {MANY} targets an image, elements computed grow by {growth[0]:.1f}, the largest tensor by"
        f" {growth[1]:.1f}, time by {growth[2]:.1f}{': more than in proportion' if steep else ''}."
    )
    return [Finding("cost", "note" if steep else "ok", sentence, numbers)]


INVARIANCES = {
    "order": check_order,
    "images": check_images,
    "splitting": check_splitting,
    "padding": check_padding,
    "divisor": check_divisor,
    "cost": check_cost,
}
"""By name."""
