"""The criterion against the slow, obvious one: every loss, every supervision, values and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import Criterion
from matchers import FocalCost, Hungarian, Mixed, SoftmaxCost, match_groups
from structures import DetectorOutputs, Targets
from tests.losses import criterion_oracle as oracle
from tests.losses.criterion_cases import leaves_of, make_outputs, map_predictions
from tests.losses.loss_cases import LOSSES


def criterion_of(loss, targets, matcher, tau):
    """A criterion whose cost fits the loss; if the last logit means "no object", no target keeps it as its label."""
    cost = SoftmaxCost() if loss.no_object else FocalCost()
    if loss.no_object:
        targets.labels.clamp_(max=0 if len(targets.labels) == 0 else max(0, int(targets.labels.max()) - 1))
    return Criterion(classification=loss, matcher=dataclasses.replace(matcher, cost=cost), prime_sample_tau=tau)


def layers_to_match(outputs: DetectorOutputs) -> dict[str, int]:
    return {name: len(group.prediction.logits) for name, group in outputs.groups.items() if group.matches is None}


def gradients(total: torch.Tensor, outputs: DetectorOutputs) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, leaves_of(outputs), allow_unused=True, materialize_grads=True))


def pairs_found(config: Criterion, outputs: DetectorOutputs, targets: Targets) -> dict:
    """What the matcher finds, in the oracle's form."""
    layers = layers_to_match(outputs)
    candidates = config.matcher.candidates_by_layer(layers)
    found: dict = {}
    offsets = [sum(targets.counts[:b]) for b in range(len(targets.counts))]
    matched = match_groups(outputs.groups, dict.fromkeys(layers, config.matcher), candidates, targets)
    for name, matches in matched.items():
        for layer in range(layers[name]):
            for image in range(len(targets.counts)):
                found["encoder" if name == "encoder" else f"decoder.{layer}", image] = []
        for layer, image, query, target in zip(*(index.tolist() for index in matches), strict=True):
            key = "encoder" if name == "encoder" else f"decoder.{layer}"
            found[key, image].append((query, target - offsets[image]))
    return found


def assert_equal_to_oracle(config, outputs, targets, rtol, *, given_pairs=False, num_targets=None):
    candidates = config.matcher.candidates_by_layer(layers_to_match(outputs))
    ours = config(outputs, targets, num_targets)
    total, terms = oracle.criterion(
        outputs,
        targets,
        config.classification.name,
        [k for layers in candidates.values() for k in layers],
        config.prime_sample_tau,
        num_targets,
        pairs_found(config, outputs, targets) if given_pairs else None,
    )
    assert ours.terms.keys() == terms.keys()
    for name, expected in terms.items():
        assert ours.terms[name].item() == pytest.approx(expected.item(), rel=rtol, abs=rtol), name
    torch.testing.assert_close(ours.total, total, rtol=rtol, atol=0)
    for mine, expected in zip(gradients(ours.total, outputs), gradients(total, outputs), strict=True):
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("tau", [None, 1.5])
@pytest.mark.parametrize("matcher", [Hungarian(), Mixed(candidates=3)], ids=lambda matcher: matcher.name)
def test_every_loss(loss, tau, matcher):
    outputs, targets = make_outputs(1, (3, 0, 5), dtype=torch.float64)
    config = criterion_of(loss, targets, matcher, tau)
    assert_equal_to_oracle(config, outputs, targets, 1e-10, given_pairs=loss.no_object)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_float32_is_as_close_as_float32_allows(loss):
    exact, targets = make_outputs(2, (4, 1, 7), num_queries=60, num_classes=20, dtype=torch.float64)
    config = criterion_of(loss, targets, Mixed(candidates=2), 1.5)
    single = map_predictions(exact, lambda part: part.detach().float().requires_grad_())
    ours, expected = config(single, targets), config(exact, targets)
    assert ours.total.dtype == torch.float32
    assert ours.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    for mine, reference in zip(gradients(ours.total, single), gradients(expected.total, exact), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6 * reference.abs().max().item())


@st.composite
def problems(draw):
    counts = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    num_layers = draw(st.integers(1, 3))
    num_queries = draw(st.integers(1, 12))
    encoder_queries = draw(st.sampled_from([0, num_queries, 7]))
    layers = num_layers + (encoder_queries > 0)
    candidates = draw(st.one_of(st.integers(1, 5), st.tuples(*[st.integers(1, 5)] * layers)))
    outputs, targets = make_outputs(
        draw(st.integers(0, 2**31)),
        counts,
        num_layers=num_layers,
        num_queries=num_queries,
        encoder_queries=encoder_queries,
        num_classes=draw(st.integers(1, 4)),
        denoising=draw(st.booleans()),
        dtype=torch.float64,
    )
    if draw(st.booleans()):  # exact duplicates: of queries, and of targets
        with torch.no_grad():
            for name in layers_to_match(outputs):
                for part in outputs.groups[name].prediction:
                    part[..., 1::2, :] = part[..., : part.shape[-2] // 2 * 2 : 2, :]
            if len(targets.labels) > 1:
                targets.labels[1:2], targets.boxes[1:2] = targets.labels[:1], targets.boxes[:1]
    return outputs, targets, Mixed(candidates=candidates)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(LOSSES), st.sampled_from([None, 0.5, 3.0]), st.sampled_from([None, 2.0, 37.0]))
def test_any_shape(problem, loss, tau, num_targets):
    """Empty images, more targets than queries, duplicates, other query counts in the encoder; matches as found."""
    outputs, targets, matcher = problem
    config = criterion_of(loss, targets, matcher, tau)
    assert_equal_to_oracle(config, outputs, targets, 1e-9, given_pairs=True, num_targets=num_targets)
