"""What tools.predict writes: pictures with boxes, and detections as COCO's JSON, CSV and YOLO's text files."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.lettering import lettered
from engine.pictures import COLOURS
from engine.whole_files import replacing
from structures import Detections
from tools.predictor import Predictor
from tools.video import Writer

RESULTS = "detections.json"
COLUMNS = ("file_name", "frame", "image_id", "class", "category_id", "score", "x", "y", "width", "height")


def as_csv(results: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> str:
    """One line for each detection, below the names of ``COLUMNS``; boxes in pixels, ``frame`` of videos only.

    Args:
        results: COCO entries.
        names: of the categories, by id.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in results:
        where = entry["file_name"], entry.get("frame", ""), entry["image_id"]
        writer.writerow([*where, names[entry["category_id"]], entry["category_id"], entry["score"], *entry["bbox"]])
    return text.getvalue()


def as_yolo(results: Sequence[Mapping[str, Any]], size: tuple[int, int], category_ids: Sequence[int]) -> str:
    """One line for each detection of an image: label, centre, width and height as shares of the image, score.

    Args:
        results: COCO entries of one image.
        size: (height, width) of the image.
        category_ids: of each label, counted from 0.
    """
    height, width = size
    lines = []
    for entry in results:
        x, y, w, h = entry["bbox"]
        shares = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
        numbers = " ".join(f"{share:.6f}" for share in shares)
        lines.append(f"{category_ids.index(entry['category_id'])} {numbers} {entry['score']:.5f}\n")
    return "".join(lines)


def draw(pixels: Tensor, detections: Detections, class_names: Sequence[str]) -> Image.Image:
    """The picture with boxes, class names and scores, the best on top.

    Args:
        pixels: [3, H, W] uint8 RGB.
        detections: in its pixels.
        class_names: indexed by label.
    """
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    canvas = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 400))
    size = max(11, round(max(picture.size) / 60))
    names = lettered(class_names)
    files = {name.font for name in names}
    fonts = {file: ImageFont.truetype(file, size) if file else ImageFont.load_default(size) for file in files}
    worst_first = list(reversed(list(zip(*(part.tolist() for part in detections), strict=True))))
    for _, label, box in worst_first:
        canvas.rectangle(box, outline=COLOURS[label % len(COLOURS)], width=width)
    # Texts after all boxes, so that no line crosses them.
    for score, label, box in worst_first:
        text, font = f"{names[label].text} {score:.2f}", fonts[names[label].font]
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        # Above the box where there is room, else inside it, and never beyond the right border.
        x = max(0, min(box[0], picture.width - right - 2))
        y = box[1] - bottom - 2 if box[1] >= bottom + 2 else box[1] + width
        canvas.rectangle((x + left, y + top - 1, x + right + 2, y + bottom + 1), fill=COLOURS[label % len(COLOURS)])
        canvas.text((x + 1, y), text, fill="black", font=font)
    return picture


def coco_results(
    detections: Detections, image_id: int, file_name: str, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The entries of one image."""
    results = []
    for score, label, (x0, y0, x1, y1) in zip(*(part.tolist() for part in detections), strict=True):
        box = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        entry = {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": round(score, 5)}
        results.append({**entry, "file_name": file_name})
    return results


def output_path(
    out: Path, name: Path, taken: set[Path], endings: Sequence[str] = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
) -> Path:
    """A name in ``out`` that nothing else in ``taken`` has; with the first ending where its own is not one to write."""
    suffix = name.suffix if name.suffix.lower() in endings else endings[0]
    candidate, number = out / name.with_suffix(suffix), 1
    while candidate in taken:
        number += 1
        candidate = out / name.with_name(f"{name.stem}_{number}{suffix}")
    taken.add(candidate)
    return candidate


class Output:
    """Writes what is found, below a folder in which nothing of others is replaced."""

    def __init__(self, options: argparse.Namespace, predictor: Predictor) -> None:
        self.out, self.pictures, self.also = options.out, not options.no_pictures, options.also
        self.threshold: float = options.threshold
        self.names, self.category_ids = predictor.class_names, [category.id for category in predictor.categories]
        self.results: list[dict[str, Any]] = []
        self.out.mkdir(parents=True, exist_ok=True)
        # Without the file that says what was found these pictures are not of an earlier call.
        earlier = (self.out / RESULTS).exists()
        self.taken: set[Path] = set() if earlier else {path for path in self.out.rglob("*") if path.is_file()}

    def target(self, name: Path, *endings: str) -> Path:
        """The file to write for a picture or video of this name; its folder is there."""
        path = output_path(self.out, name, self.taken, *([endings] if endings else []))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(
        self,
        found: Detections,
        pixels: Tensor,
        image_id: int,
        name: Path,
        frame: int | None = None,
        writer: Writer | None = None,
    ) -> None:
        """Add the detections of an image or frame to the results, and write them where it has a file of its own.

        The picture with boxes goes to the writer of a video, or without one to a file.
        """
        entries = coco_results(found, image_id, name.as_posix(), self.category_ids)
        self.results += entries if frame is None else [{**entry, "frame": frame} for entry in entries]
        if "yolo" in self.also:
            own = name if frame is None else name.with_suffix("") / f"{frame:06d}.txt"
            path = self.target(Path("labels") / own.with_suffix(".txt"), ".txt")
            size = int(pixels.shape[1]), int(pixels.shape[2])
            path.write_text(as_yolo(entries, size, self.category_ids), encoding="utf-8")
        if self.pictures and writer is not None:
            writer.add(draw(pixels, found, self.names))
        elif self.pictures:
            target = self.target(name)
            with replacing(target) as temporary:  # where a link stands, not what it points to is replaced
                kind = Image.registered_extensions()[target.suffix.lower()]
                draw(pixels, found, self.names).save(temporary, kind)

    def close(self) -> None:
        """Write what was found."""
        texts = {RESULTS: json.dumps(self.results)}
        if "csv" in self.also:
            by_id = dict(zip(self.category_ids, self.names, strict=True))
            texts["detections.csv"] = as_csv(self.results, by_id)
        for name, text in texts.items():
            with replacing(self.out / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
