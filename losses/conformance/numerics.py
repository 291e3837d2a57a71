"""Tests of the numbers of a loss: are they finite, are gradients those of the value, does every field count?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from losses.conformance.problem import MATCHED, OTHER, QUERIES, Constants, Finding, Loss, Problem, make_problem
from ops.errors import describe_error

STEP, TOLERANCE = 1e-6, 1e-5
"""Step of finite differences, and by how much of the largest gradient they may miss it."""
LARGEST_LOGIT = 1e4
ROLES = {"matched": MATCHED, "unmatched": OTHER}


def check_finite(loss: Loss) -> list[Finding]:
    """Where loss or gradient is infinite or NaN, and at which logit, in float32 and with every value of every field."""
    findings, problem = list[Finding](), loss.problem().to(torch.float32)
    settings: list[dict[str, Any]] = [{}, *({name: value} for name, values in loss.fields.items() for value in values)]
    for given in settings:
        setting = "".join(f", {name} = {value}" for name, value in given.items())
        for role, (image, query) in ROLES.items():
            entry = image, query, int(problem.targets[0]["labels"][0])
            for sign in (1, -1):

                def found(size: float, at: tuple[int, ...] = entry, sign: int = sign, given: Any = given) -> str:
                    logits = problem.logits.clone()
                    logits[at] = sign * size
                    return _not_finite(loss, problem._replace(logits=logits), given)

                if what := found(LARGEST_LOGIT):
                    first = sign * _first(found)
                    sentence = f"From a logit of {first:+.1f} of the {role} entry on, {what}{setting}."
                    findings.append(Finding("finite", "fault", sentence, {"entry": role, "logit": first, **given}))
        for title, case in _extreme_cases(loss):
            if what := _not_finite(loss, case.to(torch.float32), given):
                findings.append(Finding("finite", "fault", f"With {title}, {what}{setting}.", {"case": title, **given}))
    return findings or [Finding("finite", "ok", f"Loss and gradient are finite at logits up to ±{LARGEST_LOGIT:g}.")]


def _extreme_cases(loss: Loss) -> Iterator[tuple[str, Problem]]:
    problem = loss.problem()
    for size in (LARGEST_LOGIT, -LARGEST_LOGIT):
        yield f"all logits {size:+g}", problem._replace(logits=torch.full_like(problem.logits, size))
    exact, flat = problem.boxes.clone(), problem.boxes.new_tensor([1, 1, 0, 0])
    for b, target in enumerate(problem.targets):
        exact[b, : len(target["boxes"])] = target["boxes"]
    yield "predictions that are their targets (IoU 1)", problem._replace(boxes=exact)
    yield "predictions that meet no target (IoU 0)", problem._replace(boxes=torch.full_like(exact, 0.01))
    flat_targets = [{**t, "boxes": t["boxes"] * flat} for t in problem.targets]
    yield "predictions and targets of no size", Problem(problem.logits, problem.boxes * flat, flat_targets)
    yield "no targets", loss.problem((0, 0))
    yield "one image without targets", loss.problem((2, 0))
    yield "more targets than queries", loss.problem((QUERIES + 3, 1))
    yield "one query", make_problem((1, 1), loss.logits, queries=1)
    yield "as few classes as there can be", make_problem((2, 1), 1 + loss.no_object)


def _not_finite(loss: Loss, problem: Problem, fields: Mapping[str, Any]) -> str:
    """What is not finite, in words; empty if all is."""
    value, *gradients = loss.gradients(problem, **fields)
    bad = sum(int((~gradient.isfinite()).sum()) for gradient in gradients)
    parts = [] if value.isfinite() else [f"the loss is {float(value)}"]
    return " and ".join([*parts, f"{bad} entries of the gradient are not finite"] if bad else parts)


def _first(fails: Callable[[float], str]) -> float:
    """The smallest size from 1 to the largest at which it fails, to half a percent."""
    low, high = 1.0, LARGEST_LOGIT
    while high - low > 0.005 * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fails(middle) else (middle, high)
    return high


def check_gradients(loss: Loss) -> list[Finding]:
    """Gradients against central differences in float64: of the value, or of what is not cut out of its gradient."""
    problem, findings = loss.problem(), list[Finding]()
    value, *found = loss.gradients(problem)
    # A logit moved by so little is the same number in float32.
    if value.dtype != torch.float64 or loss(problem._replace(logits=problem.logits + 1e-12)).item() == value.item():
        return [Finding("gradients", "note", "Not compared: it does not compute in float64.")]
    for part, gradient in zip(("logits", "boxes"), found, strict=True):
        scale = max(gradient.abs().max().item(), 1e-3)
        for role, at in ROLES.items():
            off: dict[str, float] = {}
            for held in ("", "detach", "no_grad"):
                differences = (_difference(loss, problem, part, (*at, i), held) for i in range(len(gradient[at])))
                off[held] = max(abs(d - g) for d, g in zip(differences, gradient[at].tolist(), strict=True)) / scale
                if off[held] <= TOLERANCE:
                    break
            agrees = off[held] <= TOLERANCE
            least, constant = min(off.values()), held if agrees else None
            numbers = {"part": part, "role": role, "off": least, "held_constant": constant}
            if not agrees:
                sentence = f"Gradients of {role} {part} are off by {least:.1%} of the largest."
                findings.append(Finding("gradients", "fault", sentence, numbers))
            elif held:
                sentence = f"At {role} {part}, something that depends on them takes no gradient ({held})."
                findings.append(Finding("gradients", "note", sentence, numbers))
    if not found[0][MATCHED][problem.targets[0]["labels"][0]]:
        findings.append(Finding("gradients", "fault", "The logit of a matched entry takes no gradient."))
    return findings or [Finding("gradients", "ok", "Gradients are those of the value, as finite differences see it.")]


def _difference(loss: Loss, problem: Problem, part: str, at: tuple[int, ...], held: str) -> float:
    """Central difference of the loss along one entry, with what the loss cuts out of its gradient held constant."""

    def moved(step: float) -> torch.Tensor:
        tensor = getattr(problem, part).clone()
        tensor[at] += step
        return loss(problem._replace(**{part: tensor.requires_grad_()}))

    if not held:
        return (moved(STEP).item() - moved(-STEP).item()) / (2 * STEP)
    with Constants(unrecorded=held == "no_grad") as constants:
        moved(0.0)
        constants.rewind()
        above = moved(STEP).item()
        constants.rewind()
        return (above - moved(-STEP).item()) / (2 * STEP)


def check_dtypes(loss: Loss) -> list[Finding]:
    """The type of the loss for inputs of each type, and how exact it is."""
    findings = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        given, problem = str(dtype).removeprefix("torch."), loss.problem().to(dtype)
        exact = loss.value(problem.to(torch.float64))
        try:
            value = loss.gradients(problem)[0]
        except (RuntimeError, TypeError, ValueError) as error:
            findings.append(
                Finding("dtypes", "note", f"It raises for {given} predictions: {describe_error(error):.120}")
            )
            continue
        off = abs(float(value) - exact) / max(abs(exact), 1e-12)
        numbers = {"given": given, "returned": str(value.dtype), "off": off}
        if off > 1e-4 or (dtype == torch.float64 and value.dtype != dtype):
            sentence = f"Given {given}, it returns {value.dtype}, {off:.1%} off its value in float64."
            findings.append(Finding("dtypes", "fault" if off > 1e-2 else "note", sentence, numbers))
    return findings or [Finding("dtypes", "ok", "It computes in float32 or better, whatever it is given.")]


def check_fields(loss: Loss) -> list[Finding]:
    """Fields that change neither loss nor gradient."""
    findings, problems = list[Finding](), [loss.problem(), loss.problem((QUERIES, 2), 1)]
    for name, values in loss.fields.items():
        results = [[x for problem in problems for x in loss.gradients(problem, **{name: v})] for v in values]
        if all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True)):
            sentence = f"{name} = {', '.join(map(str, values))} all give the same loss and gradient."
            findings.append(Finding("fields", "fault", sentence, {"field": name}))
    return findings or [Finding("fields", "ok", f"Each of the {len(loss.fields)} fields given changes something.")]


NUMERICS = {"finite": check_finite, "gradients": check_gradients, "dtypes": check_dtypes, "fields": check_fields}
"""By name."""
