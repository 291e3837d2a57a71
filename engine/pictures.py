"""The two pictures of a run directory: predictions beside targets, and curves of losses and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.lettering import Lettered, lettered
from engine.loggers import flat
from engine.records import read_metrics
from engine.whole_files import replacing
from ops.boxes import cxcywh_to_xyxy
from structures import Batch, Detections

# Okabe and Ito's palette: distinguishable with the common forms of colour blindness.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


class AnnotatedImage(NamedTuple):
    """An image with what is in it and what was found; boxes in pixels of ``pixels``."""

    pixels: NDArray[np.uint8]
    """[h, w, 3] RGB."""
    target_labels: Tensor
    """[G] int64."""
    target_boxes_xyxy: Tensor
    """[G, 4]."""
    detections: Detections
    """Any number, best first."""


def annotated_images(
    batch: Batch, detections: Sequence[Detections], mean: Sequence[float], std: Sequence[float]
) -> list[AnnotatedImage]:
    """Undo normalisation and padding of a batch.

    Args:
        batch: as the model saw it.
        detections: one per image, in pixels of the original images, as the evaluator gets them.
        mean: per channel, as the images were normalised with.
        std: likewise.
    """
    result = []
    pixels = batch.images.pixels.detach().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    sizes, originals = batch.images.sizes.cpu(), batch.original_sizes.cpu()
    for i, (labels, boxes) in enumerate(batch.targets.to("cpu").split()):
        height, width = sizes[i].tolist()
        image = (pixels[i, :, :height, :width].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        corners = cxcywh_to_xyxy(boxes) * scale
        original = originals[i].flip(0).repeat(2).float()
        found = detections[i]
        found = Detections(found.scores.cpu(), found.labels.cpu(), found.boxes_xyxy.cpu() * (scale / original))
        result.append(AnnotatedImage(image, labels, corners, found))
    return result


def draw_predictions(
    path: Path | str, images: Sequence[AnnotatedImage], class_names: Sequence[str], threshold: float = 0.3
) -> None:
    """Draw targets (left of each pair) beside the detections above ``threshold`` (right).

    Args:
        path: PNG file to write; replaced as a whole or not at all.
        images: at least one.
        class_names: indexed by label.
        threshold: least score of a detection that is drawn.
    """
    names = lettered(class_names)
    pairs = 2 if len(images) > 1 else 1
    rows = -(-len(images) // pairs)
    figure, axes = _canvas(rows, 2 * pairs, 3.2)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, image in enumerate(images):
        left, right = axes.flat[2 * i], axes.flat[2 * i + 1]
        texts = [names[label].text for label in image.target_labels.tolist()]
        _draw_boxes(left, image.pixels, image.target_boxes_xyxy, image.target_labels, texts, names)
        left.set_title(f"targets ({len(texts)})", fontsize=8)
        keep = image.detections.scores >= threshold
        scores, labels, boxes = (part[keep] for part in image.detections)
        texts = [f"{names[c].text} {s:.2f}" for c, s in zip(labels.tolist(), scores.tolist(), strict=True)]
        _draw_boxes(right, image.pixels, boxes, labels, texts, names)
        right.set_title(f"predictions, score ≥ {threshold:g} ({len(texts)})", fontsize=8)
    _save(figure, path)


def draw_curves(metrics: Path | str, path: Path | str, classes: Sequence[str] = ()) -> None:
    """Draw losses, learning rate and the metrics of every evaluation over the steps of a ``metrics.jsonl``.

    Args:
        metrics: file of JSON lines, each with ``kind`` ("train" with ``loss``, or "eval" with ``AP``) and ``step``.
        path: PNG file to write.
        classes: names of those whose AP is drawn as well.
    """
    train, evals = read_metrics(Path(metrics))
    train = [record for record in train if record.get("loss") is not None]
    figure, axes = _canvas(2 if classes else 1, 3 if classes else 4, 3.2)
    loss, terms, rate, precision, *others = axes.flat
    steps = [r["step"] for r in train]
    values = [r["loss"] for r in train]
    loss.plot(steps, values, color=COLOURS[1], alpha=0.5, linewidth=0.8, label="logged")
    loss.plot(steps, _smooth(values), color=COLOURS[4], linewidth=1.4, label="smoothed")
    _series(loss, evals, {"validation, no denoising": "loss"}, "s--")
    loss.set(title="training loss", xlabel="step", ylabel="weighted sum of all terms")
    if values:
        loss.set_ylim(0, float(np.percentile(values, 98)) * 1.15)
    groups = [_terms_by_group(record) for record in train]
    names = list(dict.fromkeys(name for record in groups for name in record))
    layers, kinds = (list(dict.fromkeys(name.split()[k] for name in names)) for k in (0, 1))
    for name in names:
        look = ("-", "--", ":", "-.")[layers.index(name.split()[0]) % 4]
        colour = COLOURS[kinds.index(name.split()[1]) % len(COLOURS)]
        shown = [record.get(name, float("nan")) for record in groups]
        terms.plot(steps, _smooth(shown), look, color=colour, linewidth=1.2, label=name)
    terms.set(title="loss terms by group", xlabel="step", ylabel="mean over layers, unweighted", yscale="log")
    rate.plot(steps, [r.get("lr") for r in train], color=COLOURS[2], linewidth=1.4)
    rate.set(title="learning rate", xlabel="step", ylabel="learning rate")
    _series(precision, evals, {name: name for name in ("AP", "AP50", "AP75")})
    precision.set(title="validation", xlabel="step", ylabel="percent", ylim=(0, None))
    for axis in others:
        axis.set_axis_off()
    if classes:
        others[0].set_axis_on()
        _series(others[0], evals, {lettered([name])[0].text: f"per_class/{name}" for name in classes})
        others[0].set(title="AP of classes", xlabel="step", ylabel="percent", ylim=(0, None))
    for axis in axes.flat:
        if axis is terms and axis.lines:
            _make_room_above(axis)
            tight = {"handlelength": 1.5, "handletextpad": 0.4, "columnspacing": 0.7, "borderpad": 0.0}
            axis.legend(frameon=False, fontsize=5.5, ncols=len(kinds) or 1, loc="upper center", **tight)
        elif axis.lines and axis is not rate:
            axis.legend(frameon=False, fontsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _make_room_above(axis: Any) -> None:
    """Leave the upper third of an axis of powers to its legend, and write its numbers as people do."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.5)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def _series(axis: Any, evals: Sequence[dict[str, Any]], names: dict[str, str], style: str = "") -> None:
    """Plot numbers of evaluations, given by label as "per_class/dog"."""
    for place, (label, name) in enumerate(names.items()):
        known = [(record["step"], dict(flat(record)).get(name)) for record in evals]
        shown = [(step, value) for step, value in known if value is not None]
        look = style or ("o-", "s--", "^:", "D-.")[place % 4]
        colour = COLOURS[(5, 0, 2, 4, 1, 6, 7, 3)[place % 8]]
        if shown:
            axis.plot(*zip(*shown, strict=True), look, color=colour, markersize=3.5, linewidth=1.4, label=label)


def _terms_by_group(record: dict[str, Any]) -> dict[str, float]:
    """Mean over the layers of a group of each term: "decoder.5/giou" belongs to "decoder giou"."""
    found: dict[str, list[float]] = {}
    for name, value in record.get("terms", {}).items():
        layer, _, term = name.partition("/")
        if value is not None:
            found.setdefault(f"{layer.partition('.')[0]} {term}", []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides, as many on either: unlike a mean of the past, it does not lag behind."""
    most = max(2, len(values) // 20)
    reaches = [min(most, i, len(values) - 1 - i) for i in range(len(values))]
    return [float(np.mean(values[i - reach : i + reach + 1])) for i, reach in enumerate(reaches)]


def _canvas(rows: int, columns: int, size: float) -> tuple[Any, Any]:
    # The figure is made without pyplot, which would keep it in a global list and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * columns, size * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_boxes(
    axis: Any, pixels: NDArray[np.uint8], boxes: Tensor, labels: Tensor, texts: Sequence[str], names: Sequence[Lettered]
) -> None:
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

    axis.imshow(pixels)
    # Best first means that the worst are drawn first, so that the best stay on top.
    for box, label, text in reversed(list(zip(boxes.tolist(), labels.tolist(), texts, strict=True))):
        colour = COLOURS[label % len(COLOURS)]
        x0, y0, x1, y1 = box
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
        axis.text(
            max(x0, 0) + 1,
            max(y0, 0) + 1,
            text,
            fontproperties=FontProperties(fname=names[label].font, size=5),
            parse_math=False,
            va="top",
            color="black",
            clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.75},
        )


def _save(figure: Any, path: Path | str) -> None:
    """Write it so that nobody ever sees half a picture."""
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
