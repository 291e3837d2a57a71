"""Golden curves: what twenty steps of small runs give, so that a refactoring can show that it changes nothing.

    python tests/golden/record.py            # make all of them again, after a change of behaviour
    python tests/golden/record.py NAME …     # or some

A run is a YAML file here. Its record, ``NAME.json``, holds each step's loss terms and gradient norm, and the norm of
the averaged weights at the end. ``state_dicts.json`` holds the tensors of every model in ``configs/``, on which
checkpoints, importing and fine-tuning rest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import config
from datasets.shapes import ShapesConfig, generate
from engine.averaging import AveragedWeights
from engine.optimizer import set_learning_rate
from engine.step import OptimizerStep, configure_device, seed_step
from structures import BatchSize

GOLDEN = Path(__file__).resolve().parent
ROOT = GOLDEN.parents[1]
STEPS = 20
STATE_DICTS = GOLDEN / "state_dicts.json"


def runs() -> list[str]:
    """Names of the golden runs."""
    return sorted(path.stem for path in GOLDEN.glob("*.yaml") if path.stem != "base")


def published_configs() -> list[str]:
    """Names of the configurations that users start from."""
    return sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "coco")


def make_data(directory: Path) -> None:
    """Write the images of the golden runs."""
    generate(directory, ShapesConfig(train_images=16, val_images=2, image_size=96, max_object_size=60, seed=5), 1)


def curve(name: str, data: Path) -> dict[str, Any]:
    """Train ``STEPS`` steps of a run; returns its record."""
    paths = [
        f"data.{split}.{key}={data}/{place}"
        for split in ("train", "val")
        for key, place in (("images", f"images/{split}"), ("annotations", f"annotations/instances_{split}.json"))
    ]
    cfg = config.load(GOLDEN / f"{name}.yaml", paths)
    device = torch.device("cpu")
    configure_device(device)
    train_set, _ = cfg.data.build_datasets()
    parts = cfg.trainer.accumulation_steps
    loader = cfg.data.build_train_loader(train_set, seed=cfg.seed, accumulation_steps=parts)
    torch.manual_seed(cfg.seed)
    model = cfg.model.build(len(train_set.categories))
    _leave_pixel_centres(model)
    optimizer = cfg.optimizer.build(model)
    step = OptimizerStep(model, cfg.criterion, optimizer, device=device, clip_norm=cfg.optimizer.clip_norm)
    average = None if cfg.trainer.ema_decay is None else AveragedWeights(model, cfg.trainer.ema_decay)
    steps: list[dict[str, float]] = []
    for index in range(STEPS):
        epoch, position = divmod(index, loader.steps_per_epoch)
        batches = next(loader.iterate(epoch, position))
        set_learning_rate(optimizer, cfg.schedule.factor(index, loader.steps_per_epoch))
        seed_step(cfg.seed, 0, index)
        targets = sum(sum(batch.targets.counts) for batch in batches)
        norm, losses = step.backward(batches, BatchSize(max(1, targets), cfg.data.batch_size))
        step.update(norm)
        if average is not None:
            average.update(model)
        terms = {term: sum(float(loss.terms[term]) for loss in losses) for term in losses[0].terms}
        steps.append({"grad_norm": float(norm), **terms})
    evaluated = model if average is None else average.model
    total = sum(float(parameter.detach().double().square().sum()) for parameter in evaluated.parameters())
    dropout = dropout_stream(cfg.model.dropout) if cfg.model.dropout else []
    return {"steps": steps, "weights_norm": total**0.5, "dropout": dropout}


def dropout_stream(probability: float) -> list[int]:
    """What this processor drops of 64 values: vector units of another width may draw in another order."""
    torch.manual_seed(0)
    return torch.nn.functional.dropout(torch.ones(64), probability).eq(0).nonzero().flatten().tolist()


def _leave_pixel_centres(model: torch.nn.Module) -> None:
    """Move sampling points by a part of a pixel.

    As published they start on pixel centres, where bilinear interpolation has no derivative and rounding, which
    differs from one processor to another, picks the side.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sampling_offsets.bias"):
                parameter.add_(0.37)


def state_dicts() -> dict[str, Any]:
    """Tensors, ``name shape``, of the model of every configuration; or the name of the one that has the same."""
    found: dict[str, Any] = {}
    for name in published_configs():
        with torch.device("meta"):
            model = config.load(ROOT / "configs" / f"{name}.yaml").model.build(80, load_backbone=False)
        tensors = [f"{key} {list(value.shape)}" for key, value in model.state_dict().items()]
        twin = next((other for other, known in found.items() if known == tensors), None)
        found[name] = tensors if twin is None else twin
    return found


def main(names: list[str]) -> None:
    """Write the records of the named runs; of all, and the names of all tensors, if none is named."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as data:
        make_data(Path(data))
        for name in names or runs():
            (GOLDEN / f"{name}.json").write_text(json.dumps(curve(name, Path(data)), indent=0) + "\n")
    if not names:
        STATE_DICTS.write_text(json.dumps(state_dicts(), indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
