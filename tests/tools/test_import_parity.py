"""Published implementations and this one compute the same from the same weights.

The expected numbers come from the public code of each project, run in fp32 on the CPU with its own pure PyTorch
attention; see docs/fidelity.md.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import published_weights
import pytest
import torch
from torch import Tensor, nn

from engine import checkpoint
from structures import DetectorOutputs, Images
from tools import import_checkpoint
from tools.checkpoint_layouts import COCO, convert

TOLERANCE = 1e-4
CASES = (
    *("dino_4scale_r50", "dino_5scale_r50", "dino_4scale_swin", "detrex_r50", "aligndetr_r50", "mmdetection_r50"),
    *("detr_r50", "conditional_detr_r50", "dab_detr_r50", "dn_detr_r50"),
    *("deformable_detr_r50", "deformable_detr_refine_r50", "deformable_detr_two_stage_r50", "h_detr_r50"),
    *("transformers_detr_r50", "transformers_deformable_detr_two_stage_r50", "align_dab_detr_r50"),
)
IN_FILES = ("dino_4scale_r50", "detrex_r50", "mmdetection_r50", "dn_detr_r50")
# Rows of class heads: those of COCO's ids (and "no object"), or one for each category.
ROWS = {91: [category.id for category in COCO], 92: [*(category.id for category in COCO), 91], 80: list(range(80))}


@functools.lru_cache(maxsize=1)
def content(case: str) -> dict[str, Any]:
    """What is in a file as the project of this case writes it."""
    description = published_weights.describe(case)
    weights = published_weights.state_dict(description)
    if case.startswith("mmdetection"):
        return {"state_dict": weights, "meta": {"epoch": 12, "cfg": "", "dataset_meta": None}}
    if case.startswith(("detrex", "align", "transformers")):
        return {"model": weights, "iteration": 90000}
    return {"model": weights, "args": argparse.Namespace(**description["settings"]), "epoch": 11}


def build(case: str, overrides: Sequence[str] = ()) -> nn.Module:
    """The imported model, without files between."""
    whole = content(case)
    conversion = convert(whole, whole["state_dict" if case.startswith("mmdetection") else "model"])
    if case == "transformers_deformable_detr_two_stage_r50":  # a file of weights alone says nothing of their number
        overrides = ["model.num_queries=12", *overrides]
    config = import_checkpoint.configure(conversion, Path(case), overrides)
    model = config.model.build(len(conversion.categories), load_backbone=False)
    model.load_state_dict(conversion.tensors)
    return model.eval()


def build_from_file(case: str, directory: Path) -> nn.Module:
    """Through the command and back from the file it writes, as a user gets it."""
    published, imported = directory / f"{case}.pth", directory / "checkpoint.pth"
    torch.save(content(case), published)
    assert import_checkpoint.main([str(published), "--out", str(imported)]) == 0
    loaded = checkpoint.load(imported)
    config = import_checkpoint.configuration.from_dict(loaded.state["config"])
    model = config.model.build(len(loaded.state["categories"]), load_backbone=False)
    checkpoint.load_weights(model, loaded.state["weights"], imported)
    published.unlink()
    imported.unlink()
    return model.eval()


def assert_close(ours: Tensor, theirs: np.ndarray, what: str) -> None:
    error = float(np.abs(ours.numpy() - theirs).max())
    assert error < TOLERANCE, f"{what}: {error:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_the_published_implementation(case: str, tmp_path: Path) -> None:
    expected = np.load(published_weights.FIXTURES / f"{case}.npz")
    model = build_from_file(case, tmp_path) if case in IN_FILES else build(case)
    ids = ROWS[expected["decoder_logits"].shape[-1]]
    inputs = Images(*published_weights.images())
    if case == "align_dab_detr_r50":  # whose decoder looks at padding, so it is shown none
        inputs = Images(inputs.pixels, torch.tensor([inputs.pixels.shape[-2:]] * 2))
    original_sizes = 3 * inputs.sizes
    with torch.inference_mode():
        outputs: DetectorOutputs = model(inputs)
        detections = model.postprocess(outputs, original_sizes)  # type: ignore[operator]
    assert ("encoder" in outputs.groups) == ("encoder_logits" in expected)
    if "encoder_logits" in expected:
        proposals, theirs = outputs.groups["encoder"].prediction, expected["encoder_logits"]
        assert_close(proposals.logits[0], theirs[..., ids] if theirs.shape[-1] > 1 else theirs, "encoder logits")
        assert_close(proposals.boxes[0], expected["encoder_boxes"], "encoder boxes")
    decoder = outputs.groups["decoder"].prediction
    # The package transformers gives the last layer alone.
    first = len(decoder.logits) - len(expected["decoder_logits"])
    assert first == (2 if case.startswith("transformers") else 0)
    for layer in range(len(expected["decoder_logits"])):
        theirs = expected["decoder_logits"][layer][..., ids]
        assert_close(decoder.logits[first + layer], theirs, f"logits of layer {layer}")
        assert_close(decoder.boxes[first + layer], expected["decoder_boxes"][layer], f"boxes of layer {layer}")
    count = expected["scores"].shape[1]
    for image, found in enumerate(detections):
        assert_close(found.scores[:count], expected["scores"][image], "scores of detections")
        assert [ids[label] for label in found.labels[:count]] == expected["labels"][image].tolist()
        relative = 1 / original_sizes[image].flip(0).repeat(2)
        assert_close(
            found.boxes_xyxy[:count] * relative, expected["boxes"][image] * relative.numpy(), "boxes of detections"
        )


@pytest.mark.parametrize("case", ["detrex_r50", "aligndetr_r50"])
def test_detrex_on_one_image_as_it_evaluates(case: str) -> None:
    # Its evaluation knows no padding; its training does, which the batch of two above stands for.
    expected = np.load(published_weights.FIXTURES / f"{case}.npz")
    model = build(case)
    images, sizes = published_weights.images()
    height, width = sizes[0].tolist()
    with torch.inference_mode():
        outputs: DetectorOutputs = model(Images(images[:1, :, :height, :width], sizes[:1]))
    assert_close(outputs.result.logits, expected["alone_logits"], "logits")
    assert_close(outputs.result.boxes, expected["alone_boxes"], "boxes")


@pytest.mark.parametrize(
    ("case", "override"),
    [
        ("mmdetection_r50", "model.published.prediction_eps=1e-3"),
        ("mmdetection_r50", "model.published.suppress_invalid_proposals=true"),
        ("detrex_r50", "model.position_encoding.offset=0"),
        ("detrex_r50", "model.position_encoding.temperature=20"),
        ("detrex_r50", "model.published.padded_query_positions=false"),
    ],
)
def test_each_key_that_tells_implementations_apart_matters(case: str, override: str) -> None:
    expected = np.load(published_weights.FIXTURES / f"{case}.npz")
    model = build(case, [override])
    with torch.inference_mode():
        outputs: DetectorOutputs = model(Images(*published_weights.images()))
    assert np.abs(outputs.groups["decoder"].prediction.boxes.numpy() - expected["decoder_boxes"]).max() > 10 * TOLERANCE
