"""How heavy the page of tools.explore is: python -m benchmarks.explorer [--images 5000] [--detections 300]

Synthetic detections of any number, written as a page; then, in a Chromium without network, the time from opening it to
the first drawing of plane and pictures, and the time that a move of the threshold takes to draw everything anew.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from analysis.detections_file import ImageInfo
from analysis.matching import ImageDetections, ImageObjects
from tools.explore import Explored, write_page

SIZE = (480, 640)
CLASSES = 80
MOVE = """async step => {
    const range = document.getElementById('threshold0');
    const start = performance.now();
    range.value = step;
    range.dispatchEvent(new Event('input'));
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    return performance.now() - start;
}"""


def synthetic(images: int, detections: int, seed: int) -> tuple[list[ImageInfo], list[ImageDetections]]:
    """Seven objects in each image, the same for every seed; most detections are near one of them, few are confident."""
    infos, found = [], []
    sides = np.array(SIZE[::-1] * 2, dtype=np.float64)
    for image in range(images):
        rng = np.random.default_rng(image)
        corners = rng.uniform(0, 0.7, (7, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.03, 0.3, (7, 2))], axis=1) * sides
        labels = rng.integers(CLASSES, size=7)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        infos.append(ImageInfo(image, ImageObjects(labels, boxes, areas, np.zeros(7, dtype=bool))))
        rng = np.random.default_rng((seed, image))
        of = rng.integers(7, size=detections)
        moved = boxes[of] + rng.normal(0, 1, (detections, 4)) * rng.choice([4, 30, 150], (detections, 1))
        moved = np.concatenate([np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1)
        named = np.where(rng.random(detections) < 0.7, labels[of], rng.integers(CLASSES, size=detections))
        found.append(ImageDetections(rng.beta(0.3, 4, detections), named, moved.clip(0, sides)))
    return infos, found


def write(out: Path, images: int, detections: int, detectors: int) -> None:
    """Write a page of synthetic detections with one picture for all images."""
    made = [synthetic(images, detections, seed) for seed in range(detectors)]
    explored = [Explored(f"detector {i}", "synthetic", found, None) for i, (_, found) in enumerate(made)]
    pictures: list[dict[str, Any]] = [{"name": f"{i:012d}.jpg", "size": SIZE, "readable": True} for i in range(images)]
    names = [f"class {label}" for label in range(CLASSES)]
    write_page(out, "synthetic", names, made[0][0], pictures, explored)
    (out / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(256, size=(24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((512, 384)).save(out / "pictures" / "000000.jpg", quality=80)
    for i in range(1, images):
        shutil.copyfile(out / "pictures" / "000000.jpg", out / "pictures" / f"{i:06d}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=300, help="of each image (%(default)s)")
    parser.add_argument("--detectors", type=int, default=2)
    parser.add_argument("--out", type=Path, help="keep the page here")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        out = args.out or Path(temporary)
        start = time.perf_counter()
        write(out, args.images, args.detections, args.detectors)
        print(f"written in {time.perf_counter() - start:.0f} s")
        data = sum(path.stat().st_size for path in out.rglob("*") if path.parent.name != "pictures" and path.is_file())
        print(f"{data / 1e6:.1f} MB beside the pictures")
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for attempt in range(3):
            page = browser.new_page(viewport={"width": 1280, "height": 860}, offline=True)
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto((out / "index.html").resolve().as_uri())
            page.wait_for_function("performance.getEntriesByName('drawn').length")
            drawn = page.evaluate("performance.getEntriesByName('drawn')[0].startTime")
            busy = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
            page.wait_for_function("performance.getEntriesByName('complete').length")
            boxes = page.evaluate("performance.getEntriesByName('complete')[0].startTime")
            moves = [page.evaluate(MOVE, step) for step in (40, 60, 80, 100, 120)]
            cpu = f"{busy['TaskDuration']:.2f} s of its thread's processor time"
            print(f"opening {attempt + 1}: drawn after {drawn / 1000:.2f} s, {cpu}; boxes after {boxes / 1000:.2f} s")
            print(f"    the threshold moves in {np.median(moves):.0f} ms")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
