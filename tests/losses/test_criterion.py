"""What the criterion must not depend on, and what it refuses."""

from __future__ import annotations

import contextlib

import pytest
import torch

from losses import IABCE, Align, Criterion, Focal, LossWeights
from matchers import FocalCost, Hungarian, Mixed, NonFinitePredictionError
from structures import DetectorOutputs, Matches, Targets
from tests.losses.criterion_cases import leaves_of, make_outputs, map_predictions, replace_group
from tests.losses.criterion_configs import ALIGN_DETR, every_config


def gradients(config, outputs, targets, num_targets=None):
    return torch.autograd.grad(config(outputs, targets, num_targets).total, leaves_of(outputs))


def select_images(outputs: DetectorOutputs, targets: Targets, images: list[int]) -> tuple[DetectorOutputs, Targets]:
    """The same predictions for some of the images, in the order given."""
    split = targets.split()
    chosen = Targets(
        torch.cat([split[b][0] for b in images]),
        torch.cat([split[b][1] for b in images]),
        tuple(targets.counts[b] for b in images),
    )
    old_first = [sum(targets.counts[:b]) for b in range(len(targets.counts))]
    new_first = [sum(chosen.counts[:b]) for b in range(len(images))]
    noised = outputs.groups["denoising"]
    rows = []
    for layer, image, query, target in zip(*(index.tolist() for index in noised.matches), strict=True):
        rows += [(layer, new, query, target - old_first[image] + new_first[new])
                 for new, old in enumerate(images) if old == image]  # fmt: skip
    matches = Matches(*torch.tensor(rows, dtype=torch.long).reshape(-1, 4).unbind(1))
    own = {"matches": matches, "image_scale": noised.image_scale[images], "valid": noised.valid[images]}
    return replace_group(map_predictions(outputs, lambda part: part[:, images]), "denoising", **own), chosen


def assert_same(result, expected):
    torch.testing.assert_close(result.total, expected.total)
    assert result.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        torch.testing.assert_close(result.terms[name], value)


def test_defaults_are_dino():
    config = Criterion()
    assert config.classification == Focal(alpha=0.25, gamma=2.0)
    assert config.matcher == Hungarian()
    assert config.prime_sample_tau is None
    assert config.weights == LossWeights(classification=1.0, bbox=5.0, giou=2.0)
    assert config.matcher.cost == FocalCost(classification=2.0, bbox=5.0, giou=2.0, alpha=0.25, gamma=2.0)
    assert config.groups == {}


@every_config
def test_terms_and_their_weighted_sum(config):
    outputs, targets = make_outputs(0, (3, 2))
    result = config(outputs, targets)
    layers = ["encoder", *(f"{kind}.{i}" for kind in ("decoder", "denoising") for i in range(3))]
    assert set(result.terms) == {f"{layer}/{term}" for layer in layers for term in ("class", "bbox", config.overlap)}
    weights = {"class": 1.0, "bbox": 5.0, config.overlap: 2.0}
    total = sum(weights[name.split("/")[1]] * value for name, value in result.terms.items())
    torch.testing.assert_close(result.total.detach(), total)
    assert all(value.shape == () and not value.requires_grad for value in result.terms.values())


@pytest.mark.parametrize("field", ["classification", "bbox", "giou"])
def test_each_weight_scales_its_terms(field):
    outputs, targets = make_outputs(1, (3, 2))
    only = LossWeights(**{name: 3.0 * (name == field) for name in ("classification", "bbox", "giou")})
    result = Criterion(weights=only)(outputs, targets)
    term = {"classification": "class"}.get(field, field)
    expected = 3 * sum(value for name, value in result.terms.items() if name.endswith(f"/{term}"))
    torch.testing.assert_close(result.total.detach(), expected)


@every_config
def test_permuting_images(config):
    outputs, targets = make_outputs(2, (3, 0, 5, 1))
    assert_same(config(*select_images(outputs, targets, [2, 0, 3, 1])), config(outputs, targets))


@every_config
def test_permuting_targets(config):
    outputs, targets = make_outputs(3, (4, 3))
    order = torch.tensor([2, 0, 3, 1, 6, 5, 4])
    inverse = order.argsort()
    matches = outputs.groups["denoising"].matches
    matches = matches._replace(target=inverse[matches.target])
    shuffled = Targets(targets.labels[order], targets.boxes[order], targets.counts)
    result = config(replace_group(outputs, "denoising", matches=matches), shuffled)
    assert_same(result, config(outputs, targets))


@every_config
def test_permuting_queries(config):
    outputs, targets = make_outputs(4, (4, 3))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    found = DetectorOutputs({name: outputs.groups[name] for name in ("encoder", "decoder")})
    shuffled = map_predictions(found, lambda part: part[:, :, order])
    shuffled = DetectorOutputs({**shuffled.groups, "denoising": outputs.groups["denoising"]})
    assert_same(config(shuffled, targets), config(outputs, targets))


@every_config
@pytest.mark.parametrize("filler", [0.0, 50.0, float("nan")])
def test_padding_of_denoising_queries_is_not_supervised(config, filler):
    outputs, targets = make_outputs(5, (2, 5))
    expected, expected_gradients = config(outputs, targets), gradients(config, outputs, targets)
    noised = outputs.groups["denoising"]
    pad = ~noised.valid
    assert pad.any()
    with torch.no_grad():
        for part in noised.prediction:
            part[:, pad] = filler
    assert_same(config(outputs, targets), expected)
    for mine, reference in zip(gradients(config, outputs, targets), expected_gradients, strict=True):
        torch.testing.assert_close(mine, reference)
    assert all(part.grad is None for part in noised.prediction)
    for gradient in gradients(config, outputs, targets)[-2:]:
        assert gradient[:, pad].abs().max() == 0


@every_config
@pytest.mark.parametrize("parts", [[[0], [1, 2], [3]], [[0, 1, 2], [3]]], ids=str)
def test_splitting_the_batch(config, parts):
    """Over processes or accumulation steps, with unequal target counts and one normaliser for all."""
    outputs, targets = make_outputs(6, (3, 0, 5, 1))
    whole = config(outputs, targets)
    for total in (9.0, torch.tensor(9.0), torch.tensor(9)):
        results = [config(*select_images(outputs, targets, images), total) for images in parts]
        torch.testing.assert_close(sum(result.total for result in results), whole.total)
        for name, value in whole.terms.items():
            torch.testing.assert_close(sum(result.terms[name] for result in results), value)
    accumulated = [
        sum(gradient)
        for gradient in zip(
            *(
                torch.autograd.grad(config(*select_images(outputs, targets, images), 9.0).total, leaves_of(outputs))
                for images in parts
            ),
            strict=True,
        )
    ]
    for mine, expected in zip(accumulated, gradients(config, outputs, targets), strict=True):
        torch.testing.assert_close(mine, expected)


@every_config
def test_number_of_targets_divides_and_is_at_least_one(config):
    outputs, targets = make_outputs(7, (3, 2))
    base = config(outputs, targets).total
    torch.testing.assert_close(config(outputs, targets, 10.0).total, base / 2)
    torch.testing.assert_close(config(outputs, targets, torch.tensor(10)).total, base / 2)
    for few in (0, 0.25, torch.tensor(0.0)):
        torch.testing.assert_close(config(outputs, targets, few).total, base * 5)


def test_denoising_is_divided_by_the_groups_of_its_image():
    outputs, targets = make_outputs(8, (2, 3))
    scale = outputs.groups["denoising"].image_scale
    base = ALIGN_DETR(outputs, targets)
    halved = ALIGN_DETR(replace_group(outputs, "denoising", image_scale=scale / 2), targets)
    for name, value in base.terms.items():
        torch.testing.assert_close(halved.terms[name], value / 2 if name.startswith("denoising") else value)


def test_denoising_queries_are_not_ranked():
    outputs, targets = make_outputs(9, (2, 3))
    sharp = Criterion(classification=Align(), matcher=Mixed(), prime_sample_tau=0.1)(outputs, targets)
    equal = Criterion(classification=Align(), matcher=Mixed())(outputs, targets)
    for name, value in equal.terms.items():
        same = name.startswith(("denoising", "decoder.2"))  # the last layer has one candidate
        assert torch.equal(sharp.terms[name], value) == same, name


@every_config
@pytest.mark.parametrize("counts", [(0, 0), (0,)])
def test_without_targets_boxes_cost_nothing_and_every_gradient_exists(config, counts):
    outputs, targets = make_outputs(10, counts)
    result = config(outputs, targets)
    result.total.backward()
    for name, value in result.terms.items():
        if name.startswith("denoising") or not name.endswith("/class"):
            assert value == 0, name
        else:
            assert value > 0, name
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves_of(outputs))


def test_a_decoder_alone():
    outputs, targets = make_outputs(11, (2, 1), encoder_queries=0, denoising=False)
    result = ALIGN_DETR(outputs, targets)
    assert {name.split("/")[0] for name in result.terms} == {"decoder.0", "decoder.1", "decoder.2"}


def test_targets_are_never_modified():
    outputs, targets = make_outputs(12, (3, 4))
    labels, boxes = targets.labels.clone(), targets.boxes.clone()
    ALIGN_DETR(outputs, targets).total.backward()
    assert torch.equal(targets.labels, labels)
    assert torch.equal(targets.boxes, boxes)


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_computes_in_float32(config, dtype):
    outputs, targets = make_outputs(13, (3, 4))
    half = map_predictions(outputs, lambda part: part.detach().to(dtype))
    widened = map_predictions(half, torch.Tensor.float)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = config(half, targets)
    assert result.total.dtype == torch.float32
    assert_same(result, config(widened, targets))


@every_config
@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_extreme_logits(config, value):
    outputs, targets = make_outputs(14, (3, 0, 4))
    with torch.no_grad():
        for group in outputs.groups.values():
            group.prediction.logits.fill_(value)
            group.prediction.logits[..., ::2] = -value
    result = config(outputs, targets)
    assert result.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(config, outputs, targets))


@pytest.mark.parametrize("supervision", ["decoder", "encoder", "denoising"])
def test_non_finite_predictions_are_located(supervision):
    outputs, targets = make_outputs(15, (3, 4))
    with torch.no_grad():
        if supervision == "decoder":
            outputs.groups["decoder"].prediction.boxes[1, 1, 2, 0] = float("nan")
        elif supervision == "encoder":
            outputs.groups["encoder"].prediction.logits[0, 1, 3, 2] = float("inf")
        else:
            outputs.groups["denoising"].prediction.logits[1, 1, 0, 0] = float("nan")
    layer = 0 if supervision == "encoder" else 1
    with pytest.raises(NonFinitePredictionError, match=rf"{supervision} layer {layer} for image 1"):
        ALIGN_DETR(outputs, targets)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match="prime_sample_tau"):
        Criterion(prime_sample_tau=tau)


def test_weights_must_not_be_negative():
    with pytest.raises(ValueError, match="weights"):
        LossWeights(bbox=-1.0)


def test_candidates_are_checked_against_the_model():
    config = Criterion(matcher=Mixed(candidates=(2, 2, 2, 1)))
    config.check({"encoder": 1, "decoder": 3})
    with pytest.raises(ValueError, match=r"lists 4 numbers, but 6 layers are supervised by it: 6 of decoder$"):
        config.check({"decoder": 6})


@pytest.mark.parametrize(
    "changed",
    [
        Criterion(classification=IABCE(alpha=0.5), matcher=Mixed(), prime_sample_tau=1.5),
        Criterion(classification=IABCE(gamma=1.0), matcher=Mixed(), prime_sample_tau=1.5),
        Criterion(classification=Focal(), matcher=Mixed(), prime_sample_tau=1.5),
        Criterion(classification=IABCE(), matcher=Mixed(candidates=3), prime_sample_tau=1.5),
        Criterion(classification=IABCE(), matcher=Hungarian(), prime_sample_tau=1.5),
        Criterion(classification=IABCE(), matcher=Mixed(), prime_sample_tau=3.0),
        Criterion(classification=IABCE(), matcher=Mixed(), prime_sample_tau=None),
        Criterion(classification=IABCE(), matcher=Mixed(), prime_sample_tau=1.5, overlap="diou"),
    ],
    ids=repr,
)
def test_every_setting_changes_the_loss(changed):
    outputs, targets = make_outputs(18, (3, 4))
    assert changed(outputs, targets).total.item() != pytest.approx(ALIGN_DETR(outputs, targets).total.item(), rel=1e-4)


def test_backward_twice_through_a_retained_graph():
    outputs, targets = make_outputs(19, (3, 4))
    total = ALIGN_DETR(outputs, targets).total
    first = torch.autograd.grad(total, leaves_of(outputs), retain_graph=True)
    second = torch.autograd.grad(total, leaves_of(outputs))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients():
    outputs, targets = make_outputs(20, (3, 4))
    for context in (torch.no_grad(), torch.inference_mode(), contextlib.nullcontext()):
        with context:
            total = ALIGN_DETR(outputs, targets).total
        assert total.item() == pytest.approx(ALIGN_DETR(outputs, targets).total.item(), rel=1e-6)
