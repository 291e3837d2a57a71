"""A detector on a plain vision transformer, from its weight file to its predictions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
import yaml

import main
from datasets.shapes import ShapesConfig, generate
from engine import checkpoint
from models import BackboneConfig, DINOConfig
from tools import export
from tools.predictor import Predictor

SMALL, LARGE = "test_vit", "vit_small_patch14_dinov2"
STRIDES = {SMALL: [8, 16, 32], LARGE: [7, 14, 28]}
CLIP = "vit_base_patch16_clip_224.openai"
"""Its pixel statistics are its own."""
ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))


def write_run(directory: Path, weights: Path, model: str = SMALL, **backbone: object) -> Path:
    data = directory / "data"
    generate(data, ShapesConfig(train_images=4, val_images=2, image_size=64, max_object_size=40, seed=3), 1)
    values = {
        "model": {
            "backbone": {"model": model, "pretrained": str(weights), "strides": STRIDES[model], **backbone},
            "embed_dim": 32,
            "num_heads": 4,
            "num_levels": 3,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "ffn_dim": 32,
            "num_queries": 10,
            "denoising": {"queries": 6},
            "gradient_checkpointing": True,
        },
        "data": {
            **{
                split: {
                    "images": f"{data}/images/{split}",
                    "annotations": f"{data}/annotations/instances_{split}.json",
                }
                for split in ("train", "val")
            },
            "batch_size": 2,
            "num_workers": 0,
        },
        "optimizer": {"lr": 1e-3, "layer_decay": 0.7},
        "schedule": {"name": "cosine", "steps": 3},
        "trainer": {"device": "cpu", "eval_every_epochs": None, "log_every": 1},
        "output_dir": str(directory / "run"),
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, pytest.param(LARGE, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("trained", [False, True])
def test_it_trains_and_predicts(model: str, trained: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    source = timm.create_model(model)
    depth, source = len(source.blocks), source.state_dict()
    torch.save(source, tmp_path / "weights.pth")
    frozen = 0 if trained else depth
    main.run(["--cfg", str(write_run(tmp_path, tmp_path / "weights.pth", model, frozen_stages=frozen))])
    lines = capsys.readouterr().out
    assert (f"learning rates: {depth + 3} groups" in lines) == trained
    last = tmp_path / "run" / checkpoint.LAST
    weights = checkpoint.load(last).state["weights"]
    moved = {
        name: not torch.equal(weights[f"backbone.body.model.{name}"], value)
        for name, value in source.items()
        if f"backbone.body.model.{name}" in weights and weights[f"backbone.body.model.{name}"].shape == value.shape
    }
    assert len(moved) > 12 * depth
    assert any(moved.values()) == trained
    assert moved["blocks.0.attn.qkv.weight"] == moved["patch_embed.proj.weight"] == trained
    detector = Predictor(last)
    own = timm.get_pretrained_cfg(model)
    assert detector.config.data.pixel_statistics == (own.mean, own.std)
    seen = []
    detector.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert len(detector([torch.full((3, 97, 161), 128 / 255)])[0].scores)
    # A grey photograph, as training would have normalised it.
    expected = [(128 / 255 - mean) / std for mean, std in zip(own.mean, own.std, strict=True)]
    assert seen[0][0, :, 48, 80].tolist() == pytest.approx(expected, abs=1e-5)
    if model == SMALL:  # test_patches_of_16_are_exported_for_any_size
        return
    kind: export.Format = "onnx" if trained else "torch_export"
    if not trained or ONNX:
        assert export.export(last, kind, tmp_path / f"detector.{export.ENDINGS[kind]}") < 1e-4


@pytest.mark.thorough
def test_patches_of_16_are_exported_for_any_size() -> None:
    """What training recomputes is in no exported graph; sizes that are no multiples of a patch are free, too."""
    backbone = BackboneConfig(model="test_vit", pretrained=False, norm="batch", frozen_stages=0)
    sizes = {"embed_dim": 32, "num_heads": 4, "ffn_dim": 32, "num_queries": 10}
    config = DINOConfig(
        backbone=backbone, num_levels=3, encoder_layers=1, decoder_layers=1, gradient_checkpointing=True, **sizes
    )
    torch.manual_seed(0)
    deployed = export.Deployed(config.build(3), (0.5,) * 3, (0.5,) * 3).eval()
    assert export.check(deployed, export.export_program(deployed).module()) < 1e-4


def test_wrong_weights_are_refused_before_any_data_is_read(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    path = write_run(tmp_path, tmp_path / "weights.pth")
    for lost in (tmp_path / "data" / "annotations").iterdir():
        lost.unlink()
    with pytest.raises(ValueError, match=rf"weights\.pth: does not fit backbone {SMALL}: \d+ of \d+ entries absent"):
        main.run(["--cfg", str(path)])
    with pytest.raises(ValueError, match=r"offers \[4, 8, 16, 32\], not \[7\]"):
        main.run(["--cfg", str(path), "model.backbone.strides=[7]"])


def test_predictions_see_what_training_saw(tmp_path: Path) -> None:
    """The statistics of training, evaluation, prediction and export are the same values."""
    path = write_run(tmp_path, tmp_path / "none.pth")
    scratch = (
        "{model: vit_base_patch16_clip_224.openai, pretrained: false, norm: batch, frozen_stages: 0, strides: [16]}"
    )
    cfg = main.read_inputs(main.parse_arguments(["--cfg", str(path), f"model.backbone={scratch}"]))[0]
    mean, std = timm.get_pretrained_cfg(CLIP).mean, timm.get_pretrained_cfg(CLIP).std
    assert cfg.data.pixel_statistics == (mean, std) != ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    train_set, _ = cfg.data.build_datasets()
    batch = next(iter(cfg.data.build_train_loader(train_set, seed=0).iterate(0, 0)))[0]
    low, high = (-torch.tensor(mean) / torch.tensor(std), (1 - torch.tensor(mean)) / torch.tensor(std))
    assert (batch.images.pixels.amin(dim=(0, 2, 3)) >= low - 1e-5).all()
    assert (batch.images.pixels.amax(dim=(0, 2, 3)) <= high + 1e-5).all()
    deployed = export.deploy(torch.nn.Identity(), cfg)
    torch.testing.assert_close(deployed.mean.flatten() / 255, torch.tensor(mean))
