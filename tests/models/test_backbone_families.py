"""One small model of every family of timm: what can be used takes any size and can be frozen, what cannot says so."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import timm
import torch

from models import BackboneConfig
from models.parts.backbone_weights import names_in_whole
from models.parts.timm_models import Outline, frozen_parameters, outline

SIZES = (97, 161), (224, 320)
QUICK = ["resnet18", "efficientnet_b0", "vit_tiny_patch16_224"]
USABLE = [
    "convmixer_768_32",
    "convnext_atto",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "dla34",
    "dpn48b",
    "edgenext_xx_small",
    "efficientnet_b0",
    "efficientvit_b0",
    "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "hrnet_w18_small",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "pvt_v2_b0",
    "regnetx_002",
    "repvgg_a0",
    "resnetv2_18",
    "swin_tiny_patch4_window7_224",
    "test_mambaout",
    "tf_efficientnet_lite0",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "xcit_nano_12_p16_224",
]
BRANCHED = {"hrnet_w18_small"}
"""Networks whose maps all come from their last stage."""
REFUSED = {
    "beit_base_patch16_224": "takes only images of 224 × 224 pixels",
    "botnet26t_256": "takes only images of 256 × 256 pixels",
    "cait_xxs24_224": "takes only images of 224 × 224 pixels",
    "coat_lite_tiny": "takes only images of 224 × 224 pixels",
    "convit_tiny": "takes only images of 224 × 224 pixels",
    "crossvit_9_240": "gives maps of other strides than it states",
    "efficientformer_l1": "takes only images of 224 × 224 pixels",
    "efficientformerv2_s0": "takes only images of 224 × 224 pixels",
}


def levels(found: Outline) -> tuple[int, ...]:
    """All strides that a backbone offers from 4 to 64."""
    own = [stage.stride for stage in found.stages]
    offered = [own[0] / 4, own[0] / 2, own[0], own[0] * 2] if found.is_plain else own
    return tuple(sorted({int(stride) for stride in offered if stride == int(stride) and 4 <= stride <= 64}))


def used_for_map(name: str, found: Outline, index: int) -> set[str]:
    """The parameters that a stage's map depends on, by its gradient."""
    body = timm.create_model(name, features_only=True, out_indices=(index,), **found.options)
    side = max(64, found.size_multiple)
    (feature,) = body(torch.randn(2, 3, side, side))
    names = names_in_whole(body, found.whole)
    parameters = {name: parameter for name, parameter in body.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(feature.square().sum(), list(parameters.values()), allow_unused=True)
    return {names[key] for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def check_frozen_parts(name: str) -> None:
    """What is frozen is what the stage's map depends on, and nothing that only later maps need."""
    found = outline(name)
    ends = [index for index, stage in enumerate(found.stages) if stage.stride >= 4]
    everything = used_for_map(name, found, len(found.stages) - 1)
    for number in (1, 2):
        frozen, used = frozen_parameters(found, number), used_for_map(name, found, ends[number - 1])
        assert used <= frozen, f"stage {number}: {sorted(used - frozen)[:3]} would be trained"
        assert not frozen & (everything - used), f"stage {number}: {sorted(frozen & (everything - used))[:3]} is later"
    assert frozen_parameters(found, "stem") < frozen_parameters(found, 1)


def check_sizes_and_gradients(name: str, path: str, sizes: Sequence[tuple[int, int]]) -> None:
    """Weights from a file under the model's own names, frozen to the first stage, forward and backward."""
    found = outline(name)
    config = BackboneConfig(model=name, pretrained=path, strides=levels(found))
    config.check()
    backbone = config.build().train()
    assert set(backbone.layer_depths()) == {key for key, _ in backbone.named_parameters()}
    for size in sizes:
        backbone.zero_grad()
        features = backbone(torch.randn(1, 3, *size))
        assert [feature.shape[1] for feature in features] == list(backbone.channels)
        for stride, feature in zip(config.strides, features, strict=True):
            assert all(abs(n - side / stride) <= 1 for n, side in zip(feature.shape[2:], size, strict=True)), stride
        sum(feature.square().mean() for feature in features).backward()
        trained = [p for p in backbone.parameters() if p.requires_grad and p.grad is not None]
        assert trained
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert all(p.grad is None for p in backbone.parameters() if not p.requires_grad)


def check(name: str, tmp_path, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    torch.manual_seed(0)
    path = str(tmp_path / "weights.pth")
    torch.save(timm.create_model(name).state_dict(), path)
    check_sizes_and_gradients(name, path, sizes)
    if name not in BRANCHED:
        check_frozen_parts(name)


@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_kind(name, tmp_path):
    check(name, tmp_path, SIZES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", USABLE)
def test_every_family(name, tmp_path):
    check(name, tmp_path)


def test_branches_are_frozen_by_their_number():
    frozen = frozen_parameters(outline("hrnet_w18_small"), 1)
    assert {name.partition(".")[0] for name in frozen} == {"conv1", "bn1", "conv2", "bn2", "layer1", "transition1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=REFUSED[name]) as raised:
        BackboneConfig(model=name, pretrained=False, norm="batch", frozen_stages=0).check()
    assert "\n" not in str(raised.value)
