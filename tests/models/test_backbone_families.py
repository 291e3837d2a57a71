"""One small model of every family of timm: what can be used takes any size and can be frozen, what cannot says so."""

from __future__ import annotations

import pytest
import timm
import torch

from models import BackboneConfig
from models.parts.any_size import accept_any_size
from models.parts.timm_models import Outline, frozen_parameters, names_in_whole, outline

SIZES = (97, 161), (224, 320)
QUICK = ["resnet18", "test_efficientnet", "test_vit", "efficientvim_m1"]
USABLE = [
    "convmixer_768_32",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "ghostnet_050",
    "hardcorenas_a",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "legacy_seresnet18",
    "lowformer_b0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nextvit_small",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m0_9",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "sam2_hiera_tiny",
    "samvit_base_patch16_224",
    "selecsls42",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window16_256",
    "test_byobnet",
    "test_convnext",
    "test_mambaout",
    "test_nfnet",
    "tf_efficientnet_lite0",
    "tiny_vit_5m_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_tiny_r_s16_p8_224",
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
    "gcvit_xxtiny": "takes only images of 224 × 224 pixels",
    "gmlp_ti16_224": "takes only images of 224 × 224 pixels",
    "hiera_tiny_224": "takes only images of 224 × 224 pixels",
    "inception_v4": "gives maps of other strides than it states",
    "levit_128s": "takes only images of 224 × 224 pixels",
    "mvitv2_tiny": "takes only images of 224 × 224 pixels",
    "pit_ti_224": "takes only images of 224 × 224 pixels",
    "test_coatnet": "takes only images of 160 × 160 pixels",
    "test_vit_relpos": "takes only images of 160 × 160 pixels",
    "tnt_s_legacy_patch16_224": "takes only images of 224 × 224 pixels",
    "visformer_tiny": "takes only images of 224 × 224 pixels",
}


def levels(found: Outline) -> tuple[int, ...]:
    """All strides that a backbone offers from 4 to 64."""
    own = [stage.stride for stage in found.stages]
    offered = [own[0] / 4, own[0] / 2, own[0], own[0] * 2] if found.is_plain else own
    return tuple(sorted({int(stride) for stride in offered if stride == int(stride) and 4 <= stride <= 64}))


def used_for_map(name: str, found: Outline, index: int) -> set[str]:
    """The parameters that a stage's map depends on, by its gradient."""
    body = timm.create_model(name, features_only=True, out_indices=(index,), **found.options)
    accept_any_size(body)
    side = -(-64 // found.size_multiple) * found.size_multiple
    (feature,) = body(torch.randn(2, 3, side, side))
    names = names_in_whole(body, found.whole)
    feature.square().sum().backward()
    return {names[key] for key, parameter in body.named_parameters() if parameter.grad is not None}


def check_maps_and_gradients(config: BackboneConfig, size: tuple[int, int]) -> None:
    """The strides that were promised, and a gradient for all that is trained and for nothing else."""
    config.check()
    backbone = config.build().train()
    assert set(backbone.layer_depths()) == {key for key, _ in backbone.named_parameters()}
    features = backbone(torch.randn(2, 3, *size))
    assert [feature.shape[1] for feature in features] == list(backbone.channels)
    for stride, feature in zip(config.strides, features, strict=True):
        assert all(abs(n - side / stride) <= 1 for n, side in zip(feature.shape[2:], size, strict=True)), stride
    sum(feature.square().mean() for feature in features).backward()
    assert any(parameter.requires_grad for parameter in backbone.body.parameters())
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key


def check(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    found, path = outline(name), str(tmp_path / "weights.pth")
    torch.save(timm.create_model(name).state_dict(), path)
    strides = levels(found)
    check_maps_and_gradients(BackboneConfig(model=name, pretrained=path, strides=strides[:2]), SIZES[0])
    config = BackboneConfig(model=name, pretrained=False, norm="batch", frozen_stages=0, strides=strides)
    check_maps_and_gradients(config, SIZES[1])
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(ValueError, match=f"does not fit backbone {name}") as raised:
        BackboneConfig(model=name, pretrained=path, strides=strides).check()
    assert "\n" not in str(raised.value)
    if name not in BRANCHED:
        first = next(index for index, stage in enumerate(found.stages) if stage.stride >= 4)
        assert frozen_parameters(name, False, 1) == used_for_map(name, found, first)
        assert frozen_parameters(name, False, "stem") < frozen_parameters(name, False, 1)


@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_kind(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", USABLE)
def test_every_family(name, tmp_path):
    check(name, tmp_path)


def test_branches_are_frozen_by_their_number():
    frozen = frozen_parameters("hrnet_w18_small", False, 1)
    assert {name.partition(".")[0] for name in frozen} == {"conv1", "bn1", "conv2", "bn2", "layer1", "transition1"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=REFUSED[name]) as raised:
        BackboneConfig(model=name, pretrained=False, norm="batch", frozen_stages=0).check()
    assert "\n" not in str(raised.value)


def test_norms_of_stages_that_no_map_needs_are_not_trained():
    config = BackboneConfig(model="test_efficientnet", pretrained=False, norm="group", frozen_stages=0, strides=(8, 16))
    check_maps_and_gradients(config, SIZES[1])
