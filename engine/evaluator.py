"""Evaluation of a detector with COCO's metrics, on one process or several."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine import distributed
from engine.coco_metrics import STATISTICS, BoxMetrics, MetricBackend, box_metrics, read_ground_truth
from engine.host_memory import Growth
from engine.loaders import Loader
from engine.whole_files import replacing
from structures import Batch, Detections, Images

log = logging.getLogger(__name__)


class Evaluator:
    """Collects detections image by image and compares them with the annotations as they are, crowds included."""

    def __init__(
        self,
        annotations: Path | str | dict[str, Any],
        categories: Sequence[tuple[int, str]],
        backend: MetricBackend = "auto",
    ) -> None:
        """
        Args:
            annotations: COCO file, or its content; only what it lists is evaluated.
            categories: (id, name) of each label.
            backend: the library that computes the metrics.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a COCO file, holds nothing to find, or has none of the categories.
        """
        self.ground_truth = read_ground_truth(annotations)
        self.categories = tuple((category_id, name) for category_id, name in categories)
        self.backend: MetricBackend = backend
        source = "the annotations" if isinstance(annotations, dict) else str(annotations)
        if self.ground_truth.columns["iscrowd"].all():
            raise ValueError(f"{source}: no objects to find, so that nothing can be evaluated")
        if not {category_id for category_id, _ in self.categories} & set(self.ground_truth.category_ids):
            raise ValueError(f"{source}: none of the model's categories {self.categories[:5]} is among its categories")
        absent = [name for number, name in self.categories if number not in self.ground_truth.category_ids]
        if absent:
            log.warning("%s: has no category %s, so that there is no AP for them", source, ", ".join(absent[:10]))
        self._category_ids = np.array([category_id for category_id, _ in self.categories], dtype=np.float64)
        self._found: dict[int, NDArray[np.float32]] = {}

    def reset(self) -> None:
        """Forgets all detections."""
        self._found.clear()

    def update(self, image_ids: Tensor | Iterable[int], detections: Sequence[Detections]) -> None:
        """Adds the detections of some images; an image that comes again replaces its former detections.

        Args:
            image_ids: [B] as in the annotation file.
            detections: of each image, in pixels of the original image.

        Raises:
            ValueError: an image is not in the annotation file.
        """
        ids = image_ids.tolist() if isinstance(image_ids, Tensor) else list(image_ids)
        for image_id, found in zip(ids, detections, strict=True):
            if image_id not in self.ground_truth.image_ids:
                raise ValueError(f"image {image_id} is not among the annotated ones")
            rows = torch.cat([found.boxes_xyxy, found.scores[:, None], found.labels[:, None]], dim=1)
            self._found[image_id] = rows.float().cpu().numpy()

    def compute(self) -> dict[str, Any]:
        """The metrics of what all processes have collected; every process must call this and gets the same.

        Returns:
            ``AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl`` in percent, and ``per_class``: the AP by
            category name. None where the annotations hold no object of that size or class. ``images`` is the number of
            images that were evaluated, with or without detections.
        """
        found = self._gathered()
        metrics: dict[str, Any] | None = None
        with distributed.agreed_errors():
            if distributed.is_main():
                metrics = self._summarise(box_metrics(self.ground_truth, self._rows(found), self.backend), len(found))
        return cast("dict[str, Any]", distributed.gather(metrics)[0])

    def results(self) -> list[dict[str, Any]]:
        """The detections of all processes in COCO's result format; every process must call this."""
        return [
            {
                "image_id": int(row[0]),
                "category_id": int(row[6]),
                "bbox": [round(float(value), 3) for value in row[1:5]],
                "score": round(float(row[5]), 6),
            }
            for row in self._rows(self._gathered())
        ]

    def save(self, path: Path) -> None:
        """Writes the detections of all processes; every process must call this, the first one writes.

        Args:
            path: NumPy archive of ``image_ids`` [n], ``category_ids`` [n], ``scores`` [n] and ``boxes_xywh`` [n, 4] in
                pixels of the original images; replaced as a whole or not at all.
        """
        found = self._gathered()
        with distributed.agreed_errors():
            if distributed.is_main():
                rows = self._rows(found)
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.savez_compressed(
                        file,
                        image_ids=rows[:, 0].astype(np.int64),
                        boxes_xywh=rows[:, 1:5].astype(np.float32),
                        scores=rows[:, 5].astype(np.float32),
                        category_ids=rows[:, 6].astype(np.int64),
                    )

    def _gathered(self) -> dict[int, NDArray[np.float32]]:
        """By image id, so that an image that several processes have seen counts once."""
        merged: dict[int, NDArray[np.float32]] = {}
        for part in reversed(distributed.gather(self._found)):
            merged.update(part)
        return merged

    def _rows(self, found: dict[int, NDArray[np.float32]]) -> NDArray[np.float64]:
        """[n, 7] image id, x, y, width, height, score, category id; in order of image ids."""
        rows = np.empty((sum(len(part) for part in found.values()), 7))
        start = 0
        for image_id in sorted(found):
            part = found[image_id]
            end = start + len(part)
            rows[start:end, 0] = image_id
            rows[start:end, 1:6] = part[:, :5]
            rows[start:end, 6] = self._category_ids[part[:, 5].astype(np.int64)]
            start = end
        rows[:, 3:5] -= rows[:, 1:3]
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            log.warning("left out %d detections with NaN or infinity", int((~finite).sum()))
        return rows[finite]

    def _summarise(self, metrics: BoxMetrics, images: int) -> dict[str, Any]:
        summary: dict[str, Any] = dict(zip(STATISTICS, map(_percent, metrics.statistics), strict=True))
        index_of = {category_id: k for k, category_id in enumerate(self.ground_truth.category_ids)}
        times = Counter(name for _, name in self.categories)
        per_class: dict[str, float | None] = {}
        for category_id, name in self.categories:
            unique = name if times[name] == 1 else f"{name} ({category_id})"
            if (k := index_of.get(category_id)) is None:
                per_class[unique] = None
                continue
            precision = metrics.precision[:, :, k, 0, -1]
            known = precision[precision > -1]
            per_class[unique] = _percent(float(known.mean()) if known.size else -1.0)
        return {**summary, "per_class": per_class, "images": images}


def _percent(fraction: float) -> float | None:
    return None if fraction < 0 else 100.0 * float(fraction)


class Evaluated(Protocol):
    """What evaluation needs of a model."""

    def __call__(self, images: Images) -> Any:
        """Outputs for padded images."""

    def postprocess(self, outputs: Any, original_sizes: Tensor) -> list[Detections]:
        """Detections in pixels of the original images."""


def evaluate(
    model: nn.Module,
    loader: Loader,
    evaluator: Evaluator,
    device: torch.device | str,
    amp_dtype: torch.dtype | None = None,
    *,
    on_batch: Callable[[int, Batch, list[Detections]], None] | None = None,
    on_outputs: Callable[[Batch, Any], None] | None = None,
    give_up: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs a model over a data set and returns ``Evaluator.compute()``.

    The model is put into evaluation mode and back into the mode it was in. Processes may have different numbers of
    batches: they meet only at the end.

    Args:
        model: called with ``Images``; has ``postprocess(outputs, original_sizes)``.
        loader: batches of this process.
        evaluator: is reset first.
        device: to run on.
        amp_dtype: of autocast; None leaves it as it is.
        on_batch: called with the number of batches done, the batch and its detections: progress, pictures.
        on_outputs: called with each batch and the model's outputs, on the device.
        give_up: asked after each batch whether to stop early; if any process does, all return no metrics at all.
    """
    device = torch.device(device)
    was_training = model.training
    detector = cast("Evaluated", model.eval())
    evaluator.reset()
    precision = torch.autocast(device.type, dtype=amp_dtype) if amp_dtype is not None else nullcontext()
    growth = Growth(first=1)  # what training has left is not what a batch needs
    try:
        with torch.inference_mode(), precision:
            for done, batch in enumerate(loader, start=1):
                moved = batch.to(device, non_blocking=True)
                outputs = detector(moved.images)
                detections = detector.postprocess(outputs, moved.original_sizes)
                if on_outputs is not None:
                    on_outputs(moved, outputs)
                evaluator.update(batch.image_ids, detections)
                if on_batch is not None:
                    on_batch(done, batch, detections)
                growth.end_step()
                if give_up():
                    break
    finally:
        model.train(was_training)
    (given_up,) = distributed.host_sum([int(give_up())])
    return {} if given_up else evaluator.compute()
