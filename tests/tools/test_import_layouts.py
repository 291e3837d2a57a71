"""Every entry of the published models has its place, and files that do not fit are refused in one line."""

from __future__ import annotations

import argparse
import os
import zlib
from pathlib import Path
from typing import Any

import published_weights
import pytest
import torch
from torch import Tensor

from datasets import Category
from models.parts.position_encoding import SinePositionEncoding
from tools import import_checkpoint
from tools.checkpoint_layouts import COCO, convert
from tools.checkpoint_layouts.reading import read, select_weights

FULL = {
    "full_dino_4scale_r50": ("resnet50.tv_in1k", [8, 16, 32], 4, True),
    "full_dino_5scale_r50": ("resnet50.tv_in1k", [4, 8, 16, 32], 5, True),
    "full_dino_4scale_swin_l": ("swin_large_patch4_window12_384", [8, 16, 32], 4, True),
    "full_dino_5scale_swin_l": ("swin_large_patch4_window12_384", [4, 8, 16, 32], 5, True),
    "full_detrex_r50": ("resnet50.tv_in1k", [8, 16, 32], 4, False),
    "full_mmdetection_r50": ("resnet50.tv_in1k", [8, 16, 32], 4, False),
}


def hollow(case: str) -> dict[str, Tensor]:
    """Entries of the right names and shapes, each filled with one number, in no memory to speak of."""
    weights = {}
    description = published_weights.describe(case)
    for name, shape in published_weights.names_and_shapes(description).items():
        owner = published_weights.owner(name, description)
        weights[name] = torch.full((), zlib.crc32(owner.encode()) / 2**32).expand(shape)
    return weights


@pytest.mark.parametrize("case", FULL)
def test_every_entry_of_the_published_models_is_used_or_left_out(case: str) -> None:
    weights = hollow(case)
    conversion = convert({}, weights)
    # `configure` compares with the entries of the model that the configuration builds.
    config = import_checkpoint.configure(conversion, Path(case))
    used = {source for sources in conversion.sources.values() for source in sources}
    assert used | conversion.left_out.keys() == weights.keys()
    assert not used & conversion.left_out.keys()
    assert conversion.sources.keys() | conversion.filled.keys() == conversion.tensors.keys()
    backbone, strides, levels, shared = FULL[case]
    model: Any = config.model
    assert (model.backbone.model, list(model.backbone.strides), model.num_levels) == (backbone, strides, levels)
    assert (model.shared_heads, model.num_queries, model.ffn_dim) == (shared, 900, 2048)
    assert (model.encoder_layers, model.decoder_layers, model.num_points) == (6, 6, 4)
    assert conversion.categories == COCO
    allowed = ("the same as", "counts batches", "follows from the window size")
    assert all(reason.startswith(allowed) for reason in conversion.left_out.values())


@pytest.mark.parametrize(
    ("case", "expected"),
    {
        "detr_r50": {"name": "detr", "num_queries": 12, "detections_per_image": 100},
        "transformers_detr_r50": {"name": "detr", "num_queries": 12, "embed_dim": 64},
        "conditional_detr_r50": {"name": "conditional_detr", "num_queries": 12},
        "dab_detr_r50": {"name": "dab_detr", "num_queries": 12, "position_encoding": SinePositionEncoding()},
        "align_dab_detr_r50": {"name": "dab_detr", "num_queries": 12, "position_encoding": SinePositionEncoding()},
        "dn_detr_r50": {"name": "dn_detr", "num_queries": 12},
        "deformable_detr_r50": {"num_queries": 12, "box_refinement": False, "two_stage": False},
        "deformable_detr_refine_r50": {"num_queries": 12, "box_refinement": True, "two_stage": False},
        "deformable_detr_two_stage_r50": {"num_queries": 300, "box_refinement": True, "two_stage": True},
        "transformers_deformable_detr_two_stage_r50": {"name": "deformable_detr", "two_stage": True},
        "h_detr_r50": {"name": "h_detr", "look_forward_twice": True},
    }.items(),
)
def test_detectors_are_told_apart_and_every_entry_is_used_or_left_out(case: str, expected: dict[str, Any]) -> None:
    weights = hollow(case)
    # H-DETR's two sets of queries are in one table.
    args = argparse.Namespace(num_queries_one2one=12) if case == "h_detr_r50" else None
    conversion = convert({"args": args}, weights)
    model: Any = import_checkpoint.configure(conversion, Path(case)).model
    used = {source for sources in conversion.sources.values() for source in sources}
    assert used | conversion.left_out.keys() == weights.keys()
    assert not used & conversion.left_out.keys()
    assert not conversion.filled
    assert {key: getattr(model, key) for key in expected} == expected
    assert (model.encoder_layers, model.decoder_layers, model.ffn_dim) == (2, 3, 96)
    assert model.backbone.strides == ((8, 16, 32) if hasattr(model, "num_levels") else (32,))
    if case == "h_detr_r50":
        assert (model.num_queries, model.one_to_many_queries) == (12, 18)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose rows hold their number."""
    return torch.arange(float(shape[0])).view(-1, *[1] * (len(shape) - 1)).expand(shape)


def test_rows_that_are_no_class() -> None:
    ids = [category.id for category in COCO]
    weights = hollow("detr_r50")
    weights["class_embed.bias"] = numbered((92,))
    assert convert({}, weights).tensors["heads.class_head.bias"].tolist() == [*ids, 91]  # "no object" comes last
    weights = hollow("dn_detr_r50")
    weights["label_enc.weight"] = numbered((92, 255))
    tensors = convert({}, weights).tensors
    assert tensors["denoising.label_embedding.weight"][:, 0].tolist() == ids
    assert tensors["denoising.no_label"].tolist() == [91.0] * 255
    weights = hollow("deformable_detr_two_stage_r50")
    for name in ("class_embed.3.bias", "transformer.decoder.class_embed.3.bias"):
        weights[name] = numbered((91,)) + 7
    conversion = convert({}, weights)
    assert conversion.tensors["query_selection.heads.class_head.bias"].tolist() == [7]
    assert "transformer.decoder.class_embed.3.bias: only the first row tells objects from background" in conversion.cut


def test_matrices_are_cut_and_joined() -> None:
    weights = hollow("detr_r50")
    for name in [name for name in weights if name.endswith("in_proj_bias")]:
        weights[name] = numbered((192,))
    tensors = convert({}, weights).tensors
    for name in ("encoder.layers.1.attention", "decoder.layers.2.cross_attention"):
        parts = [tensors[f"{name}.{part}_projection.bias"][0].item() for part in ("query", "key", "value")]
        assert parts == [0, 64, 128]
    assert tensors["decoder.layers.0.self_attention.query_key_projection.bias"].tolist() == list(range(128))
    assert tensors["decoder.layers.0.self_attention.value_projection.bias"][0] == 128
    weights = hollow("conditional_detr_r50")
    weights["transformer.decoder.layers.1.sa_kpos_proj.bias"] = numbered((256,))
    joined = convert({}, weights).tensors["decoder.layers.1.self_attention.position_projection.bias"]
    assert joined[256:].tolist() == list(range(256))
    assert joined[:256].unique().numel() == 1


def test_a_dilated_backbone_is_read_from_the_settings() -> None:
    conversion = convert({"args": argparse.Namespace(dilation=True)}, hollow("detr_r50"))
    backbone = import_checkpoint.configure(conversion, Path("x.pth")).model.backbone
    assert (backbone.dilation, backbone.strides) == (True, (16,))


def test_class_rows_of_dino_are_category_ids() -> None:
    weights = hollow("full_dino_4scale_r50")
    for name in [name for name in weights if name.endswith("class_embed.0.bias") or name == "label_enc.weight"]:
        weights[name] = (
            torch.arange(float(weights[name].shape[0]))
            .view(-1, *[1] * (weights[name].dim() - 1))
            .expand(weights[name].shape)
        )
    shared = {
        name: weights["class_embed.0.bias"] for name in weights if ".class_embed." in f".{name}" and "bias" in name
    }
    weights |= {name: value for name, value in shared.items() if "enc_out" not in name}
    conversion = convert({}, weights)
    assert conversion.tensors["heads.0.class_head.bias"].tolist() == [category.id for category in COCO]
    assert conversion.tensors["denoising.label_embedding.weight"][:, 0].tolist() == [c.id for c in COCO]
    assert len(conversion.cut) == 5


def test_other_categories_need_their_annotations() -> None:
    weights = hollow("full_dino_4scale_r50")
    rows = {name: value[:7] for name, value in weights.items() if "class_embed" in name}
    weights |= rows | {"label_enc.weight": weights["label_enc.weight"][:8]}
    with pytest.raises(ValueError, match=r"7 class rows, but category ids go up to 90; .*--categories"):
        convert({}, weights)
    conversion = convert({}, weights, [Category(2, "cell"), Category(6, "platelet")])
    assert conversion.tensors["heads.0.class_head.weight"].shape == (2, 256)
    with pytest.raises(ValueError, match="category ids go up to 7"):
        convert({}, weights, [Category(7, "too far")])


def test_mmdetection_says_its_classes_and_settings() -> None:
    weights = hollow("full_mmdetection_r50")
    for name in list(weights):
        if "cls_branches" in name or "label_embedding" in name:
            weights[name] = (
                torch.tensor([1.0, 2.0, 3.0])
                .view(-1, *[1] * (weights[name].dim() - 1))
                .expand(3, *weights[name].shape[1:])
            )
    settings = (
        "positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5, temperature=10000), "
        "data_preprocessor=dict(mean=[0.0, 51.0, 102.0], std=[255.0, 255.0, 25.5]), test_cfg=dict(max_per_img=77)"
    )
    meta = {"cfg": settings, "dataset_meta": {"classes": ("zebra", "ant", "bee")}}
    conversion = convert({"meta": meta}, weights)
    assert conversion.categories == (Category(1, "zebra"), Category(2, "ant"), Category(3, "bee"))
    assert conversion.model["position_encoding"] == {"temperature": 10000.0, "offset": -0.5}
    assert conversion.model["detections_per_image"] == 77
    assert conversion.data["mean"] == pytest.approx([0, 0.2, 0.4])
    assert conversion.data["std"] == pytest.approx([1, 1, 0.1])
    # With an annotation file, classes are recognised by name, whatever their order.
    conversion = convert({"meta": meta}, weights, [Category(5, "ant"), Category(6, "bee"), Category(9, "zebra")])
    assert conversion.tensors["query_selection.heads.class_head.bias"].tolist() == [2, 3, 1]
    with pytest.raises(ValueError, match="blue first"):
        convert({"meta": {"cfg": "bgr_to_rgb=False"}}, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.extra.weight": torch.zeros(1)}, r"1 entries are unknown to this layout \(transformer.extra"),
        ({"transformer.enc_output.bias": None}, "query_selection.projection.bias is not filled"),
        (
            {"transformer.decoder.norm.weight": torch.zeros(9)},
            r"decoder.norm.weight has shape \[9\] instead of \[256\]",
        ),
        ({"transformer.decoder.class_embed.3.bias": torch.ones(91)}, "should be the same, but differ"),
        ({"transformer.level_embed": None}, "no known layout"),
        ({"backbone.0.body.layer3.5.conv1.weight": None}, "1 entries do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    weights: dict[str, Any] = hollow("full_dino_4scale_r50") | change
    weights = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        import_checkpoint.configure(convert({}, weights), Path("x.pth"))


def test_unknown_entries_can_be_left_out_on_request() -> None:
    weights = hollow("full_dino_4scale_r50") | {"my_head.weight": torch.zeros(3)}
    conversion = convert({}, weights, ignore=[r"my_head\..*"])
    assert conversion.left_out["my_head.weight"] == "left out on request"


@pytest.mark.parametrize(
    ("name", "message"),
    [("layer1.0.conv1.weight", "backbone alone"), ("bbox_head.transformer.encoder.x", "mmdetection 2")],
)
def test_other_files_are_named_for_what_they_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert({}, {name: torch.zeros(1)})


def test_settings_that_this_model_does_not_have_are_refused() -> None:
    weights = hollow("full_dino_4scale_r50")
    with pytest.raises(ValueError, match="decoder_sa_type='ca_label', which is not supported"):
        convert({"args": argparse.Namespace(decoder_sa_type="ca_label")}, weights)
    conversion = convert({"args": argparse.Namespace(pe_temperatureH=40, pe_temperatureW=40, num_select=50)}, weights)
    assert conversion.model["position_encoding"]["temperature"] == 40
    assert conversion.model["detections_per_image"] == 50


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, touched = tmp_path / "bad.pth", tmp_path / "touched"
    torch.save({"model": {"a": torch.zeros(1)}, "args": Payload(touched)}, path)
    assert import_checkpoint.main([str(path), "--out", str(tmp_path / "out.pth")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "posix.system" in error
    assert "torch.save" in error
    assert not touched.exists()
    assert not (tmp_path / "out.pth").exists()


def test_settings_and_histories_of_trainers_are_read_past(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    numbers = torch.arange(3).numpy()
    torch.save({"model": {"a": torch.ones(2)}, "history": numbers, "args": argparse.Namespace(lr=1e-4)}, path)
    content = read(path)
    assert content["model"]["a"].tolist() == [1, 1]
    assert content["args"].lr == 1e-4


def test_weights_are_chosen_by_entry(tmp_path: Path) -> None:
    plain, averaged = {"module.a": torch.zeros(1)}, {"module.a": torch.ones(1)}
    content = {"model": plain, "ema_model": averaged, "epoch": 3}
    assert select_weights(content, None, tmp_path)[1]["a"] == 0
    assert select_weights(content, "ema_model", tmp_path) == ("ema_model", {"a": averaged["module.a"]})
    with pytest.raises(ValueError, match="no weights under 'ema', it has model, ema_model"):
        select_weights(content, "ema", tmp_path)
    with pytest.raises(ValueError, match="holds no weights; its keys are epoch"):
        select_weights({"epoch": 3}, None, tmp_path)
    assert select_weights({"a": torch.ones(1)}, None, tmp_path)[0] == ""


@pytest.mark.parametrize("kind", ["missing", "truncated", "text"])
def test_unreadable_files_are_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.pth"
    if kind == "truncated":
        torch.save({"model": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "text":
        path.write_text("not a checkpoint")
    assert import_checkpoint.main([str(path), "--out", str(tmp_path / "o.pth")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert error.count("\n") == 1
