"""Exported detectors compute what the model computes, at batch and image sizes that the export never saw."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from models import postprocess
from structures import Prediction
from tools import export
from tools.detector import load_model

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))


def test_selection_is_that_of_the_post_processing() -> None:
    generator = torch.Generator().manual_seed(1)
    prediction = Prediction(
        torch.randn(2, 11, 5, generator=generator), torch.rand(2, 11, 4, generator=generator) * 0.8 + 0.1
    )
    sizes = torch.tensor([[30, 50], [64, 20]])
    scores, labels, boxes = export.select_best(prediction, sizes, 20)
    for image, found in enumerate(postprocess(prediction, sizes, 20)):
        assert torch.equal(scores[image], found.scores)
        assert torch.equal(labels[image], found.labels)
        torch.testing.assert_close(boxes[image], found.boxes_xyxy)
    assert export.select_best(prediction, sizes, 300)[0].shape == (2, 55)


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


@pytest.fixture(scope="module")
def program(tiny_checkpoint: Path) -> torch.export.ExportedProgram:
    """The traced detector, once for all formats."""
    model, config, _ = load_model(tiny_checkpoint)
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
    assert export.main(["--resume", str(tiny_checkpoint), "--format", kind, "--out", str(out)]) == 0
    assert f"wrote {out}; differs from the model by" in capsys.readouterr().out
    # `main` has compared batches of one and three; once more, with sizes that are no multiples of anything.
    model, config, _ = load_model(tiny_checkpoint)
    images, sizes = export.example(2, 131, 117, seed=5)
    with torch.inference_mode():
        expected = export.deploy(model, config)(images, sizes)
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
