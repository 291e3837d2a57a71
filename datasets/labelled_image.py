"""An image with its boxes, as transforms change it: torchvision's ``tv_tensors`` and functionals underneath."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Image

from ops.boxes import xyxy_to_cxcywh


class LabelledImage(NamedTuple):
    """What transforms take and return."""

    image: Image
    """[3, H, W] uint8 RGB."""
    boxes: BoundingBoxes
    """[n, 4] float32 xyxy in pixels of ``image``; may reach beyond it until the end."""
    labels: Tensor
    """[n] int64."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.image.shape[-2:]
        return int(height), int(width)

    def keep(self, mask: Tensor) -> LabelledImage:
        """Without the boxes where ``mask`` [n] is False."""
        boxes = BoundingBoxes(self.boxes.as_subclass(Tensor)[mask], format="XYXY", canvas_size=self.size)
        return LabelledImage(self.image, boxes, self.labels[mask])


def resize(sample: LabelledImage, size: tuple[int, int]) -> LabelledImage:
    if size == sample.size:
        return sample
    image = F.resize(sample.image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return LabelledImage(image, F.resize(sample.boxes, list(size)), sample.labels)


def crop(sample: LabelledImage, top: int, left: int, height: int, width: int) -> LabelledImage:
    """Cuts out a window; boxes that lose all their area are dropped, the others clipped."""
    cut = LabelledImage(
        F.crop(sample.image, top, left, height, width), F.crop(sample.boxes, top, left, height, width), sample.labels
    )
    return drop_lost_boxes(cut)


def drop_lost_boxes(sample: LabelledImage) -> LabelledImage:
    """Clips boxes to the image and drops those without area."""
    boxes = F.clamp_bounding_boxes(sample.boxes).as_subclass(Tensor)
    clipped = LabelledImage(sample.image, BoundingBoxes(boxes, format="XYXY", canvas_size=sample.size), sample.labels)
    return clipped.keep((boxes[:, 2:] > boxes[:, :2]).all(dim=1))


def relative_boxes(sample: LabelledImage) -> Tensor:
    """[n, 4] float32 cxcywh in [0, 1] of the image."""
    height, width = sample.size
    boxes = xyxy_to_cxcywh(sample.boxes.as_subclass(Tensor))
    return boxes / boxes.new_tensor([width, height, width, height])
