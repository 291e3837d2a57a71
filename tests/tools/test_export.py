"""Exported detectors compute what the model computes, at batch and image sizes that the export never saw."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from structures import Images
from tools import export
from tools.predictor import load_model

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))


def test_detections_are_those_of_the_model_on_normalised_images(tiny_checkpoint: Path) -> None:
    """What is deployed normalises, pads with zeros, and selects as the post-processing does, in one tensor for all."""
    model, config, _ = load_model(tiny_checkpoint)
    images, sizes = export.example(2, 96, 128, seed=1)
    mean, std = (torch.tensor(value)[:, None, None] for value in (config.data.mean, config.data.std))
    pixels = torch.zeros_like(images)
    for image, (height, width) in enumerate(sizes.tolist()):
        pixels[image, :, :height, :width] = (images[image, :, :height, :width] / 255 - mean) / std
    with torch.inference_mode():
        scores, labels, boxes = export.deploy(model, config)(images, sizes)
        expected = model.postprocess(model(Images(pixels, sizes)), sizes)
    assert scores.shape == labels.shape == (2, config.model.detections_per_image)
    for image, found in enumerate(expected):
        torch.testing.assert_close(scores[image], found.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(boxes[image], found.boxes_xyxy, rtol=1e-4, atol=1e-3)
        assert torch.equal(labels[image], found.labels)


def test_padding_does_not_matter(tiny_checkpoint: Path) -> None:
    model, config, _ = load_model(tiny_checkpoint)
    deployed = export.deploy(model, config)
    images, sizes = export.example(2, 96, 128)
    painted = images.clone()
    painted[1, :, 96 - 13 :] = 255
    with torch.inference_mode():
        for plain, other in zip(deployed(images, sizes), deployed(painted, sizes), strict=True):
            assert torch.equal(plain, other)


def test_the_check_notices_a_difference(tiny_checkpoint: Path) -> None:
    model, config, _ = load_model(tiny_checkpoint)
    deployed = export.deploy(model, config)
    assert export.check(deployed, deployed) == 0

    def shifted(images: torch.Tensor, sizes: torch.Tensor) -> export.Outputs:
        scores, labels, boxes = deployed(images, sizes)
        return scores, labels, boxes + torch.tensor([0, 0, 0, 2.0])

    with pytest.raises(ValueError, match=r"differs from the model by \d"):
        export.check(deployed, shifted)


WITHOUT_DUPLICATES = "model.nms_iou=0.01"


@pytest.fixture(scope="module")
def program(tiny_checkpoint: Path) -> torch.export.ExportedProgram:
    """The traced detector, once for all formats."""
    model, config, _ = load_model(tiny_checkpoint, [WITHOUT_DUPLICATES])
    return export.export_program(export.deploy(model, config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "torch_export",
        pytest.param("onnx", marks=pytest.mark.skipif(not ONNX, reason="ONNX packages are not installed")),
    ],
)
def test_exported_detectors_agree_with_the_model(
    kind: export.Format,
    program: torch.export.ExportedProgram,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "export_program", lambda deployed: program)
    monkeypatch.setattr(export, "read", functools.cache(export.read))
    out = tmp_path / f"detector.{export.ENDINGS[kind]}"
    assert export.main(["--resume", str(tiny_checkpoint), "--format", kind, "--out", str(out), WITHOUT_DUPLICATES]) == 0
    assert f"wrote {out}; differs from the model by" in capsys.readouterr().out
    # `main` has compared batches of one and three; once more, with sizes that are no multiples of anything.
    model, config, _ = load_model(tiny_checkpoint, [WITHOUT_DUPLICATES])
    images, sizes = export.example(2, 131, 117, seed=5)
    with torch.inference_mode():
        expected = export.deploy(model, config)(images, sizes)
        assert expected[0].count_nonzero() < expected[0].numel(), "nothing was dropped"
        found = export.read(kind, out)(images, sizes)
    assert export.largest_difference(expected, found, sizes) < 1e-4


def test_the_ending_must_be_the_formats(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a torch_export file ends in \.pt2"):
        export.export(tiny_checkpoint, "torch_export", tmp_path / "detector.onnx")


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--resume", str(tmp_path / "none.pth")]) == 2
    error = capsys.readouterr().err
    assert "there is no such checkpoint" in error
    assert error.count("\n") == 1
