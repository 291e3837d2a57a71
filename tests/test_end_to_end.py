"""The parts together: learning by heart, every switch of the criterion, and evaluation whatever the batch size."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import config
from datasets.shapes import ShapesConfig, generate
from engine.evaluator import Evaluator
from schema import plain
from structures import Batch, DetectorOutputs, Prediction, QueryGroup, Targets

sys.path.append(str(Path(__file__).resolve().parent / "models"))
from family import FAMILY, criterion_for, forms

MODEL = {
    "backbone": {"model": "resnet10t", "pretrained": False, "norm": "group", "frozen_stages": 0},
    "embed_dim": 64,
    "num_heads": 4,
    "num_levels": 3,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 128,
    "num_queries": 30,
    "denoising": {"queries": 10},
}
ALIGN = {"classification": "ia_bce", "matcher": "mixed", "prime_sample_tau": 1.5}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes")
    generate(directory, ShapesConfig(train_images=2, val_images=5, image_size=96, max_object_size=60, seed=3), 1)
    return directory


def settings(shapes: Path, **parts: Any) -> config.Config:
    def split(name: str) -> dict[str, str]:
        return {"images": f"{shapes}/images/{name}", "annotations": f"{shapes}/annotations/instances_{name}.json"}

    values = {
        "model": MODEL,
        "criterion": ALIGN,
        "data": {"train": split("train"), "val": split("train"), "batch_size": 2, "num_workers": 0},
        "optimizer": {"lr": 1e-3, "lr_scales": {}, "clip_norm": 1.0},
    }
    return config.from_dict({**values, **parts})


def first_batch(cfg: config.Config) -> Batch:
    train_set, _ = cfg.data.build_datasets()
    return next(iter(cfg.data.build_train_loader(train_set, seed=0).iterate(0, 0)))[0]


def evaluate(cfg: config.Config, model: torch.nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    _, val_set = cfg.data.build_datasets()
    evaluator = Evaluator(cfg.data.val.annotations, val_set.categories)
    with torch.no_grad():
        for batch in cfg.data.build_val_loader(val_set):
            evaluator.update(batch.image_ids, model.postprocess(model(batch.images), batch.original_sizes))
    return evaluator.compute(), evaluator.results()


@pytest.mark.slow
@pytest.mark.parametrize("name", forms("detr", "dino"))
def test_two_images_are_learnt_by_heart(name, tmp_path):
    """At least 95 AP on what was trained: detector, criterion, decoding and evaluation agree about what a box is."""
    shapes = ShapesConfig(
        train_images=2,
        val_images=1,
        image_size=64,
        min_object_size=20,
        max_object_size=40,
        max_objects=2,
        empty_share=0.0,
        seed=3,
    )
    generate(tmp_path, shapes, 1)
    detector = plain(FAMILY[name])
    cfg = settings(tmp_path, model=detector, criterion=plain(criterion_for(FAMILY[name])))
    torch.manual_seed(0)
    batch = first_batch(cfg)
    assert min(batch.targets.counts) > 0
    model = cfg.model.build(6).train()
    optimizer, steps = cfg.optimizer.build(model), 400 if name == "h_detr" else 250
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1, (step + 1) / 20, (steps - step) / (0.4 * steps))
        loss = cfg.criterion(model(batch.images, batch.targets), batch.targets).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics, _ = evaluate(cfg, model.eval())
    assert metrics["AP"] >= 95


def test_evaluation_does_not_depend_on_its_batch_size(shapes):
    """Images of different sizes, one of them in a size of its own."""
    import json

    from PIL import Image

    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    for entry, size in zip(content["images"], [(96, 96), (96, 72), (96, 96), (96, 72), (64, 80)], strict=True):
        path = shapes / "images" / "val" / entry["file_name"]
        Image.open(path).resize(size).save(path)
        entry["width"], entry["height"] = size
    annotations = shapes / "annotations" / "mixed.json"
    annotations.write_text(json.dumps(content))
    torch.manual_seed(0)
    model = settings(shapes).model.build(6).eval()
    found = []
    for size in (1, 3):
        data = {
            "train": {"images": f"{shapes}/images/train", "annotations": f"{shapes}/annotations/instances_train.json"},
            "val": {"images": f"{shapes}/images/val", "annotations": str(annotations)},
            "eval_batch_size": size,
            "num_workers": 0,
        }
        found.append(evaluate(settings(shapes, data=data), model)[1])
    assert len(found[0]) == len(found[1]) == 5 * 30 * 6
    for one, other in zip(*found, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    by_score = [sorted(round(row["bbox"][0], 1) for row in rows) for rows in found]
    assert by_score[0] == pytest.approx(by_score[1], abs=0.11)


def leaves(value: Any, path: str = "criterion") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(part, f"{path}.{key}")]
    if dataclasses.is_dataclass(value):
        return [
            leaf
            for f in dataclasses.fields(value)
            if f.name != "name"
            for leaf in leaves(getattr(value, f.name), f"{path}.{f.name}")
        ]
    return [(path, value)]


OTHER = {
    "overlap": "diou",
    "matched_focal": "distance",
    "smallest_iou": "0.6",
    "smallest_target": "0.6",
    "mean_over_queries": "5",
    "prime_sample_terms": "[class]",
    "class_weights": "[1, 2, 1, 4, 3, 2]",
}
"""Values for keys that are no plain numbers, or whose range is narrow."""
ELSEWHERE = {"unlabelled", "negative_detached"}
"""Keys that need other targets, or change gradients only: tests/losses holds them."""


def other_value(path: str, value: Any) -> str:
    key = path.rpartition(".")[2]
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int):
        return str(value + 2)
    assert isinstance(value, float), f"{path}: how should {value!r} be changed?"
    return str(value * 1.7 + 0.1) if value else "3.0"


def random_outputs(targets: Targets, seed: int) -> DetectorOutputs:
    """Predictions around the targets, good enough that every term of the matching cost has a say."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.stack([image[torch.arange(30) % len(image)] for _, image in targets.split()])
    shift = torch.randn(2, 2, 30, 4, generator=generator)
    logits = torch.randn(2, 2, 30, 6, generator=generator)
    decoder = Prediction(logits, (boxes * (1 + 0.25 * shift) + 0.04 * shift.abs()).clamp(0.01, 0.99))
    encoder = Prediction(logits[:1] + 0.5, decoder.boxes[1:])
    return DetectorOutputs({"encoder": QueryGroup(encoder), "decoder": QueryGroup(decoder)})


@pytest.mark.parametrize(
    "criterion",
    [
        ALIGN,
        {**ALIGN, "matcher": {"name": "mixed", "cost": "position_modulated"}},
        {**ALIGN, "groups": {"encoder": {"matcher": {"name": "mixed", "candidates": 3}, "weight": 0.5}}},
    ],
    ids=["align", "position_modulated", "groups"],
)
def test_an_override_of_every_criterion_key_changes_the_loss(shapes, criterion):
    base = settings(shapes, criterion=criterion)
    targets = first_batch(base).targets
    values = config.to_dict(base)
    keys = leaves(base.criterion)
    assert len(keys) >= 12

    def losses(criterion: Any) -> torch.Tensor:
        return torch.stack([criterion(random_outputs(targets, seed), targets).total for seed in range(8)])

    reference = losses(base.criterion)
    for path, value in keys:
        if path.rpartition(".")[2] in ELSEWHERE:
            continue
        changed = config.from_dict(values, [f"{path}={other_value(path, value)}"])
        assert not torch.allclose(losses(changed.criterion), reference, rtol=1e-6, atol=0), f"{path} has no effect"
