import pytest
import torch
from torchvision.ops import box_convert, box_iou, complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou

from ops.boxes import AREA_EPSILON, cxcywh_to_xyxy, paired_ciou, paired_diou, paired_giou, paired_iou, xyxy_to_cxcywh


def some_boxes(seed, *shape, dtype=torch.float64):
    """Random cxcywh boxes, some far apart, some nested."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(*shape, 2, generator=generator, dtype=dtype)
    centre = 2 * torch.rand(*shape, 2, generator=generator, dtype=dtype)
    return torch.cat((centre, size), -1)


def corners(*boxes):
    return [box_convert(some, "cxcywh", "xyxy") for some in boxes]


def test_conversions_are_inverse_and_keep_leading_dimensions():
    boxes = some_boxes(0, 3, 5)
    assert cxcywh_to_xyxy(boxes).shape == (3, 5, 4)
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), corners(boxes)[0])
    torch.testing.assert_close(xyxy_to_cxcywh(corners(boxes)[0]), boxes)


def test_conversion_of_a_known_box():
    assert cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6])).tolist() == pytest.approx([0.4, 0.1, 0.6, 0.7])
    assert xyxy_to_cxcywh(torch.tensor([1.0, 2.0, 5.0, 10.0])).tolist() == [3, 6, 4, 8]


def test_paired_overlaps_are_the_diagonal_of_all_pairs():
    boxes, others = some_boxes(1, 50), some_boxes(2, 50)
    torch.testing.assert_close(paired_iou(boxes, others, epsilon=0), box_iou(*corners(boxes, others)).diag())
    expected = generalized_box_iou(*corners(boxes, others)).diag()
    torch.testing.assert_close(paired_giou(boxes, others, epsilon=0), expected)


def test_epsilon_is_added_to_the_divisors():
    unit, shifted = torch.tensor([0.5, 0.5, 1, 1]), torch.tensor([2.5, 0.5, 1, 1])
    half = torch.tensor([0.25, 0.5, 0.5, 1])
    assert paired_iou(unit, half, epsilon=1.0).item() == pytest.approx(0.5 / 2)
    assert paired_giou(unit, shifted, epsilon=1.0).item() == pytest.approx(-(3 - 2) / (3 + 1))
    assert paired_iou(unit, half).item() == pytest.approx(0.5 / (1 + AREA_EPSILON), rel=1e-7)


@pytest.mark.parametrize("overlap", [paired_iou, paired_giou, paired_diou, paired_ciou])
def test_empty_boxes_have_finite_overlaps_and_gradients(overlap):
    boxes = torch.zeros(2, 4, requires_grad=True)
    others = torch.tensor([[0.0, 0, 0, 0], [0.5, 0.5, 1, 1]])
    values = overlap(boxes, others)
    values.sum().backward()
    assert values.isfinite().all()
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("overlap", [paired_iou, paired_giou, paired_diou])
def test_gradients(overlap):
    boxes, others = some_boxes(3, 6).requires_grad_(), some_boxes(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(overlap, (boxes, others))


def test_distance_and_aspect_are_those_of_torchvision():
    boxes, others = some_boxes(5, 50).requires_grad_(), some_boxes(6, 50)
    for ours, theirs in ((paired_diou, distance_box_iou_loss), (paired_ciou, complete_box_iou_loss)):
        value, expected = 1 - ours(boxes, others), theirs(*corners(boxes, others))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value.sum(), boxes)[0], torch.autograd.grad(expected.sum(), boxes)[0]
        )
