"""A trained detector as a Python object: images in, detections out.

from tools.predictor import Predictor

predictor = Predictor("runs/k3/checkpoint_best.pth")
for found in predictor(["photo.jpg", array, picture, tensor], threshold=0.4):
    for score, label, box in zip(*found):
        print(predictor.class_names[label], f"{score:.2f}", box.tolist())
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import config as configuration
from config import Config
from datasets import Category
from datasets.coco import Sample
from datasets.collate import make_batch
from datasets.images import read_image
from datasets.transforms import ResizeExact, apply_transforms, final_size
from engine import checkpoint, distributed
from engine.host_memory import Growth, keep_free_memory
from engine.inference import prepare_inference
from engine.step import autocast
from ops.ms_deform_attn import set_default_backend
from structures import Detections

ImageInput = Path | str | NDArray[Any] | Image.Image | Tensor
"""A file, an array [H, W, 3] uint8 RGB (or [H, W] grey), a PIL image, or a tensor [3, H, W] RGB, uint8 or in [0, 1]."""


def load_model(
    path: Path | str, overrides: Sequence[str] = (), device: torch.device | str = "cpu"
) -> tuple[Any, Config, tuple[Category, ...]]:
    """The detector of a checkpoint, ready to predict, with its averaged weights where it has them.

    Args:
        path: checkpoint of training or of ``tools.import_checkpoint``.
        overrides: ``key.path=value`` laid over the checkpoint's configuration.
        device: where to put it.

    Raises:
        ValueError: the file is no checkpoint, or an override is wrong.
    """
    loaded = checkpoint.load(Path(path))
    state = loaded.state
    with checkpoint.understanding(loaded.path):
        config = configuration.from_dict(state["config"], overrides, str(loaded.path))
        categories = tuple(Category(int(number), str(name)) for number, name in state["categories"])
    model: nn.Module = config.model.build(len(categories), load_backbone=False)
    checkpoint.load_evaluated_weights(model, loaded)
    return model.eval().to(device), config, categories


class Predictor:
    """Finds objects in images of any size and kind."""

    def __init__(
        self,
        checkpoint_path: Path | str,
        *,
        device: str | None = None,
        batch_size: int = 4,
        overrides: Sequence[str] = (),
    ) -> None:
        """
        Args:
            checkpoint_path: checkpoint of training or of ``tools.import_checkpoint``.
            device: such as "cpu" or "cuda:0"; None: that of the configuration, by default the GPU where there is one.
            batch_size: the most images at once; as in evaluation, only those of equal size share a batch.
            overrides: ``key.path=value`` laid over the checkpoint's configuration.

        Raises:
            ValueError: the file is no checkpoint, an override is wrong, or there is no such device.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.model, self.config, self.categories = load_model(checkpoint_path, overrides)
        set_default_backend(self.config.op_backend)
        self.device = (
            torch.device(device) if device is not None else distributed.choose_device(self.config.trainer.device)
        )
        self.precision, self.remark = prepare_inference(self.model, self.config.trainer, self.device, "fp32")
        if self.device.type == "cpu":
            keep_free_memory()
        self._growth = Growth()

    @property
    def class_names(self) -> list[str]:
        """Indexed by label."""
        return [category.name for category in self.categories]

    def __call__(self, images: Sequence[ImageInput], threshold: float = 0.0, scale: float = 1.0) -> list[Detections]:
        """Detect.

        Args:
            images: any number, of any mixture of kinds and sizes.
            threshold: least score of a detection that is returned.
            scale: factor on the size at which images are looked at, which is that of evaluation.

        Returns:
            For each image its detections on the host, best first, boxes xyxy in pixels of that image.

        Raises:
            UnreadableImageError: a file cannot be read.
            ValueError: an array or tensor has the wrong shape, type or range.
        """
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        samples = [self._sample(to_pixels(image), scale) for image in images]
        for index, sample in enumerate(samples):
            by_size[tuple(sample.image.shape)].append(index)
        found: dict[int, Detections] = {}
        for indices in by_size.values():
            for start in range(0, len(indices), self.batch_size):
                chunk = indices[start : start + self.batch_size]
                found.update(zip(chunk, self._detect([samples[index] for index in chunk], threshold), strict=True))
        return [found[index] for index in range(len(samples))]

    def _sample(self, pixels: Tensor, scale: float) -> Sample:
        no_boxes, no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        transforms = self.config.data.val.transforms
        if scale != 1.0:
            height, width = (max(round(side * scale), 1) for side in final_size(transforms, size))
            transforms = (ResizeExact(height=height, width=width),)
        resized = apply_transforms(transforms, pixels, no_boxes, no_labels, seed=0)
        return Sample(resized.image.as_subclass(Tensor), no_boxes, no_labels, 0, size, 0)

    def _detect(self, samples: Sequence[Sample], threshold: float) -> Iterator[Detections]:
        data = self.config.data
        batch = make_batch(samples, *data.pixel_statistics, data.pad_multiple).to(self.device)
        with torch.inference_mode(), autocast(self.device, self.precision):
            detections = self.model.postprocess(self.model(batch.images), batch.original_sizes)
        self._growth.end_step()
        for found in detections:
            keep = found.scores >= threshold
            yield Detections(*(part[keep].cpu() for part in found))


def to_pixels(image: ImageInput) -> Tensor:
    """[3, H, W] uint8 RGB of an image of any kind.

    Raises:
        UnreadableImageError: a file cannot be read.
        ValueError: the shape, type or range is wrong.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"an array must be [H, W, 3] or [H, W] uint8, got {list(image.shape)} {image.dtype}")
        colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        pixels = torch.from_numpy(np.array(colour)).permute(2, 0, 1)
    elif image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a tensor must be [3, H, W], got {list(image.shape)}")
    elif image.is_floating_point():
        low, high = (float(bound) for bound in image.aminmax()) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"a floating-point tensor must hold values in [0, 1], not normalised; got {low:g} to {high:g}"
            )
        pixels = (image.detach().cpu().float() * 255).round().to(torch.uint8)
    elif image.dtype == torch.uint8:
        pixels = image.detach().cpu()
    else:
        raise ValueError(f"a tensor must be uint8 or floating-point, got {image.dtype}")
    if not pixels.numel():
        raise ValueError("the image has no pixels")
    return pixels
