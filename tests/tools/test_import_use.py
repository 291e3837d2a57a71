"""Imported checkpoints are evaluated with nothing but their paths, and are the start of a fine-tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import published_weights
import pytest
import torch
from PIL import Image

import main
from engine.runs.transfer import initialise_from
from tools import import_checkpoint
from tools.checkpoint_layouts import COCO
from tools.predictor import Predictor


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINO of random weights, as published and then imported."""
    directory = tmp_path_factory.mktemp("imported")
    description = published_weights.describe("dino_4scale_r50")
    content = {
        "model": published_weights.state_dict(description),
        "args": argparse.Namespace(**description["settings"]),
    }
    torch.save(content, directory / "dino.pth")
    assert import_checkpoint.main([str(directory / "dino.pth"), "--out", str(directory / "checkpoint.pth")]) == 0
    (directory / "dino.pth").unlink()
    return directory / "checkpoint.pth"


def write_images(directory: Path) -> list[Path]:
    """The two images of the fixtures as 8-bit pictures."""
    padded, sizes = published_weights.images()
    paths = []
    for index, (height, width) in enumerate(sizes.tolist()):
        pixels = ((padded[index, :, :height, :width] + 3) / 6 * 255).round().byte()
        paths.append(directory / f"{index}.png")
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(paths[-1])
    return paths


def test_evaluation_needs_only_paths_and_speaks_of_the_right_categories(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_images(tmp_path)
    # What the model finds becomes the truth, with category ids: everything above one score, so that AP must be 100.
    overrides = ["data.val.transforms=[]"]
    found = Predictor(imported, device="cpu", overrides=overrides)(paths)
    threshold = float(torch.cat([detections.scores for detections in found]).topk(30).values[-1])
    annotations = []
    for image_id, detections in enumerate(found, 1):
        for score, label, (x0, y0, x1, y1) in zip(*(part.tolist() for part in detections), strict=True):
            if score >= threshold:
                box = [x0, y0, x1 - x0, y1 - y0]
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": COCO[label].id, "iscrowd": 0}
                annotations.append({**entry, "bbox": box, "area": box[2] * box[3]})
    assert any(entry["category_id"] > 12 for entry in annotations)  # beyond the first gap in COCO's ids
    content = {
        "images": [
            {"id": i, "file_name": path.name, "width": Image.open(path).width, "height": Image.open(path).height}
            for i, path in enumerate(paths, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": category.id, "name": category.name} for category in COCO],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    arguments = ["--eval", "--resume", str(imported), f"data.val.images={tmp_path}", *overrides]
    capsys.readouterr()
    main.run([*arguments, f"data.val.annotations={tmp_path / 'val.json'}", "data.num_workers=0", "trainer.device=cpu"])
    printed = capsys.readouterr().out
    assert "AP 100.00" in printed
    names = {category.id: category.name for category in COCO}
    for category_id in {entry["category_id"] for entry in annotations}:
        assert f"AP of {names[category_id]}: 100.00" in printed


def test_fine_tuning_remakes_the_class_rows_alone(imported: Path) -> None:
    saved = torch.load(imported, weights_only=True)
    config = import_checkpoint.configuration.from_dict(saved["config"])
    model = config.model.build(2, load_backbone=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transfer = initialise_from(model, imported, [[1, "platelet"], [2, "dog"]], by_class=model.class_parts)
    by_class = {
        "heads.0.class_head.weight",
        "heads.0.class_head.bias",
        "query_selection.heads.class_head.weight",
        "query_selection.heads.class_head.bias",
        "denoising.label_embedding.weight",
    }
    assert set(transfer.by_class) == by_class
    assert (transfer.kept_classes, transfer.new_classes) == (["dog"], ["platelet"])
    assert not transfer.fresh
    assert not transfer.unused
    dog = [category.name for category in COCO].index("dog")
    for name, value in model.state_dict().items():
        if name in by_class:
            assert torch.equal(value[1], saved["weights"][name][dog])
            assert torch.equal(value[0], before[name][0])
        else:
            assert torch.equal(value, saved["weights"][name])
