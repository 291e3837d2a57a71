import pytest
import torch
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss

from losses import box_losses
from ops.boxes import cxcywh_to_xyxy, paired_giou
from tests.losses.criterion_cases import random_boxes

KINDS = ("giou", "diou", "ciou")


def pairs(count=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return random_boxes(generator, count, dtype=dtype), random_boxes(generator, count, dtype=dtype)


def test_values_and_gradients():
    boxes, targets = pairs()
    corners, target_corners = cxcywh_to_xyxy(boxes.requires_grad_()), cxcywh_to_xyxy(targets)
    expected = {
        "giou": 1 - paired_giou(boxes, targets),
        "diou": distance_box_iou_loss(corners, target_corners),
        "ciou": complete_box_iou_loss(corners, target_corners),
    }
    for kind in KINDS:
        distance, overlap = box_losses(boxes, targets, kind)
        torch.testing.assert_close(distance, (boxes - targets).abs().sum(-1))
        torch.testing.assert_close(overlap, expected[kind])
        (gradient,) = torch.autograd.grad(overlap.sum(), boxes)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected[kind].sum(), boxes, retain_graph=True)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_boxes_cost_nothing(kind):
    boxes, _ = pairs()
    distance, overlap = box_losses(boxes, boxes, kind)
    assert distance.abs().max() == 0
    assert overlap.abs().max() < 0.02, "up to the epsilon in the divisor"


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_computes_in_float32_and_stays_finite(kind):
    boxes, targets = pairs(dtype=torch.float32)
    boxes = torch.cat((boxes.half(), torch.zeros(1, 4, dtype=torch.half))).requires_grad_()
    targets = torch.cat((targets, torch.tensor([[0.5, 0.5, 0.1, 0.1]])))
    distance, overlap = box_losses(boxes, targets, kind)
    assert distance.dtype == overlap.dtype == torch.float32
    (distance + overlap).sum().backward()
    assert boxes.grad.isfinite().all()
