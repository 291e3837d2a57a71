"""The example of docs/using.md: a loss of this family in somebody else's detector."""


def test_example():
    import torch

    from losses import IABCE, box_losses

    logits = torch.randn(300, 80, requires_grad=True)  # your detector's: 300 queries or anchors, 80 classes
    boxes = torch.rand(300, 4, requires_grad=True)  # cxcywh
    rows, labels = torch.tensor([17, 42]), torch.tensor([3, 56])  # what your matcher says: row 17 is of class 3, …
    target_boxes, iou = torch.rand(2, 4), torch.tensor([0.8, 0.6])

    l1, giou = box_losses(boxes[rows], target_boxes)
    loss = IABCE(alpha=0.25, gamma=2.0)(logits, rows, labels, iou).sum() + 5 * l1.sum() + 2 * giou.sum()
    (loss / len(rows)).backward()

    assert logits.grad is not None
    assert boxes.grad is not None
    assert logits.grad.count_nonzero() == logits.numel()
    assert boxes.grad.count_nonzero(dim=1).nonzero().flatten().tolist() == [17, 42]
