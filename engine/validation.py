"""One evaluation of a run: metrics, progress, and a picture of some predictions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed
from engine.dispensable import dispensable
from engine.evaluator import Evaluator, evaluate
from engine.loaders import EvalLoader
from engine.pictures import AnnotatedImage, annotated_images, draw_predictions
from engine.step import DTYPES, Criterion, Precision, is_finite
from structures import Batch, BatchSize, Detections, DetectorOutputs, LossOutput

log = logging.getLogger(__name__)

PICTURED = 8
"""Images in the picture of predictions: the first that the first process evaluates."""
PROGRESS_SECONDS = 30.0

Evaluate = Callable[[nn.Module, Callable[[], bool]], dict[str, Any]]
"""Given a model, and a function that says whether to give up: metrics, ``AP`` in percent among them; the same on all
processes, and none if any gave up. The model is left in the mode it was in."""


class Validation:
    """Evaluates a model on the validation set as often as it is called."""

    def __init__(
        self,
        loader: EvalLoader,
        evaluator: Evaluator,
        *,
        device: torch.device,
        precision: Precision,
        mean: Sequence[float],
        std: Sequence[float],
        picture: Path | None = None,
        detections: Path | None = None,
        criterion: Criterion | None = None,
        size: BatchSize | None = None,
    ) -> None:
        """
        Args:
            loader: this process's batches of the validation set.
            evaluator: with the annotations.
            device: of the model.
            precision: of its forward pass.
            mean: per channel, as the images are normalised with.
            std: likewise.
            picture: PNG file for some predictions beside their targets; None draws none.
            detections: file for all detections, see ``Evaluator.save``; None writes none.
            criterion: computes the loss beside the metrics; None: no loss.
            size: targets and images of the whole set: the loss is that of one batch of all of it.
        """
        self.loader, self.evaluator = loader, evaluator
        self.device, self.amp_dtype = device, DTYPES.get(precision)
        self.mean, self.std = mean, std
        self.picture = picture if distributed.is_main() else None
        self.detections = detections
        self.criterion, self.size = criterion, size

    def __call__(self, model: nn.Module, give_up: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Metrics of the model, the same on every process; ``unreadable_images`` counts those that were left out.

        ``give_up`` is asked after each batch: if any process gives up, there are no metrics, and files stay as they
        were.
        """
        unreadable = self.loader.skipped.count
        pictured: list[AnnotatedImage] = []
        reported = time.monotonic()

        def on_batch(done: int, batch: Batch, detections: list[Detections]) -> None:
            nonlocal reported
            if self.picture is not None and len(pictured) < PICTURED:
                pictured.extend(annotated_images(batch, detections, self.mean, self.std))
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info("evaluated %d of %d batches", done, len(self.loader))

        losses: dict[str, Tensor] = {}

        def add_loss(batch: Batch, outputs: DetectorOutputs) -> None:
            assert self.criterion is not None
            try:
                loss = self.criterion(outputs, batch.targets, *(self.size or (None, None)))
            except ValueError:
                if is_finite(outputs):
                    raise
                loss = LossOutput(torch.tensor(float("nan")), {}, {})  # the metrics leave such predictions out
            for name, value in {"loss": loss.total, **loss.terms}.items():
                losses[name] = losses.get(name, 0.0) + value.double()

        metrics = evaluate(
            model,
            self.loader,
            self.evaluator,
            self.device,
            self.amp_dtype,
            on_batch=on_batch,
            on_outputs=None if self.criterion is None else add_loss,
            give_up=give_up,
        )
        if not metrics:
            return metrics
        if self.criterion is not None:
            parts = distributed.gather({name: float(value) for name, value in losses.items()})
            names = list(dict.fromkeys(name for part in parts for name in part))
            terms = {name: sum(part.get(name, 0.0) for part in parts) for name in names}
            metrics |= {"loss": terms.pop("loss", float("nan")), "terms": terms}
        (metrics["unreadable_images"],) = distributed.host_sum([self.loader.skipped.count - unreadable])
        if self.detections is not None:
            self.evaluator.save(self.detections)
        if self.picture is not None and pictured:
            with dispensable(self.picture.name):
                draw_predictions(self.picture, pictured[:PICTURED], [name for _, name in self.evaluator.categories])
        return metrics
