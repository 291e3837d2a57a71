"""Pictures of what a detector does at every threshold: precision and recall, F1 over confidence, and confusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.average_precision import RECALLS, MatchedDataset, class_precision, match_dataset
from analysis.error_types import CLASSIFICATION, CORRECT, FOREGROUND, above, classify_errors
from analysis.matching import IOU_THRESHOLDS, Floats, ImageDetections, ImageObjects, Integers
from analysis.style import COLOURS, COLUMN, LINE_STYLES, drawing
from engine.lettering import lettered

SHOWN_CLASSES = 24
"""The most classes in a picture: those with most objects."""


def draw_all(
    directory: Path, objects: Sequence[ImageObjects], detections: Sequence[ImageDetections], classes: Sequence[str]
) -> list[Path]:
    """Write precision_recall.png, f1_confidence.png and confusion.png.

    Args:
        directory: to write to.
        objects: of each image.
        detections: of each image.
        classes: names by label.
    """
    names = [one.text for one in lettered(classes)]
    matched = match_dataset(objects, detections, len(names))
    paths = [directory / f"{name}.png" for name in ("precision_recall", "f1_confidence", "confusion")]
    draw_precision_recall(paths[0], matched, names)
    threshold = draw_f1(paths[1], matched)
    draw_confusion(paths[2], confusion(objects, detections, len(names), threshold), names, threshold)
    return paths


def draw_precision_recall(path: Path, matched: MatchedDataset, names: Sequence[str]) -> None:
    """Draw precision over recall of all classes at three IoUs, and of each class (the most frequent) at IoU 0.5."""
    curves = {label: p for label, found in enumerate(matched.classes) if (p := class_precision(found)) is not None}
    frequent = sorted(curves, key=lambda label: -int(matched.classes[label].objects.sum()))[: len(COLOURS)]
    with drawing(path, 1, 2, 2 * COLUMN, 2.6, sharey=True) as (_, axes):
        mean = np.mean(list(curves.values()), axis=0) if curves else np.zeros((len(IOU_THRESHOLDS), len(RECALLS)))
        means = {"IoU 0.50": mean[0], "IoU 0.75": mean[5], "IoU 0.50 to 0.95": mean.mean(axis=0)}
        for place, (name, curve) in enumerate(means.items()):
            axes[0, 0].plot(RECALLS, curve, LINE_STYLES[place], color=COLOURS[place], label=_with_mean(name, curve))
        for place, label in enumerate(frequent):
            curve = curves[label][0]
            axes[0, 1].plot(RECALLS, curve, color=COLOURS[place], label=_with_mean(names[label], curve))
        axes[0, 0].set(title="mean over classes", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
        axes[0, 1].set(title="classes at IoU 0.50", xlabel="recall", xlim=(0, 1))
        for axis in axes[0]:
            if axis.lines:
                axis.legend(loc="best")


def operating_curve(matched: MatchedDataset) -> tuple[Floats, Floats, Floats]:
    """Scores in descending order, and precision and recall at IoU 0.5 of all detections from each score upwards."""
    scores = np.concatenate([found.scores for found in matched.classes])
    order = np.argsort(-scores, kind="stable")
    correct, counted = (
        np.concatenate(parts)[order].cumsum()
        for parts in (
            [found.correct[0] for found in matched.classes],
            [found.counted[0] for found in matched.classes],
        )
    )
    total = max(sum(int(found.objects.sum()) for found in matched.classes), 1)
    # Detections of equal score come together: a threshold cannot part them.
    last = np.flatnonzero(np.diff(scores[order], append=-1.0))
    return scores[order][last], (correct / np.maximum(counted, 1))[last], (correct / total)[last]


def draw_f1(path: Path, matched: MatchedDataset) -> float:
    """Draw F1, precision and recall over the threshold, and return that of the highest F1."""
    scores, precision, recall = operating_curve(matched)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1.argmax()) if len(f1) else -1
    threshold = float(scores[best]) if len(f1) else 0.5
    with drawing(path, 1, 1, COLUMN, 2.6) as (_, axes):
        axis = axes[0, 0]
        for place, (label, values) in enumerate((("F1", f1), ("precision", precision), ("recall", recall))):
            axis.plot(scores, values, LINE_STYLES[place], color=COLOURS[place], label=label)
        if len(f1):
            axis.axvline(threshold, color="black", linewidth=0.6)
            axis.set_title(f"F1 is highest, {f1[best]:.3f}, at a score of {threshold:.3f}")
        axis.set(xlabel="least score", ylabel="all classes, IoU 0.50", xlim=(0, 1), ylim=(0, 1.01))
        axis.legend(loc="best")
    return threshold


def confusion(
    objects: Sequence[ImageObjects], detections: Sequence[ImageDetections], num_classes: int, threshold: float
) -> Integers:
    """[C + 1, C + 1] how often an object of a class (row) is found as a class (column), at IoU 0.5.

    The last column counts objects that are not found at all; the last row detections with no object of their own: of
    background, badly placed, or of an object that is found already.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    for truth, found in zip(objects, detections, strict=True):
        image = above(classify_errors(truth, found), threshold)
        placed = np.flatnonzero((image.kind == CORRECT) | (image.kind == CLASSIFICATION))
        # Of several detections of an object the one of its class counts, else the most confident.
        placed = placed[np.argsort(image.kind[placed] != CORRECT, kind="stable")]
        targets, first = np.unique(image.target[placed], return_index=True)
        np.add.at(counts, (image.labels[targets], image.detections.labels[placed[first]]), 1)
        counts[-1, :-1] += np.bincount(np.delete(image.detections.labels, placed[first]), minlength=num_classes)
        counts[:-1, -1] += np.bincount(np.delete(image.labels, targets), minlength=num_classes)
    return counts


def draw_confusion(path: Path, counts: Integers, names: Sequence[str], threshold: float) -> None:
    """Draw the matrix of :func:`confusion`, each row as shares of it; of many classes those with most objects."""
    shown = np.sort(np.argsort(-counts[:-1].sum(axis=1), kind="stable")[:SHOWN_CLASSES])
    part = counts[np.ix_([*shown, len(names)], [*shown, len(names)])]
    shares = part / np.maximum(counts[[*shown, len(names)]].sum(axis=1, keepdims=True), 1)
    side = max(COLUMN, 0.32 * len(part) + 1.4)
    with drawing(path, 1, 1, side, side) as (_, axes):
        axis: Any = axes[0, 0]
        axis.grid(visible=False)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(part):
            if count:
                colour = "white" if shares[row, column] > 0.6 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=5.5)
        labels = [names[label] for label in shown]
        axis.set_xticks(range(len(part)), [*labels, "not found"], rotation=90)
        axis.set_yticks(range(len(part)), [*labels, "no object"])
        axis.set(xlabel="found as", ylabel="annotated", title=f"IoU {FOREGROUND:.2f}, score ≥ {threshold:.3f}")


def _with_mean(label: str, curve: Floats) -> str:
    return f"{label} ({100 * float(curve.mean()):.1f})"
