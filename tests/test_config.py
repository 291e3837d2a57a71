"""Configuration: reading, merging, strict decoding, and errors a person can act on."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import torch
import yaml

import config
from config import Config, ConfigError
from losses import GroupSupervision
from matchers import FocalCost, Hungarian, Mixed

ROOT = Path(__file__).parents[1]
# Sweep files and forms of losses are no whole configurations: their own tests hold them.
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in ("sweeps", "losses"))
RUNNABLE = [path for path in CONFIGS if path.name != "coco.yaml"]

DATA = """
data:
  train: {images: a, annotations: b}
  val: {images: c, annotations: d}
"""


def write(tmp_path: Path, text: str, name: str = "run.yaml", data: bool = True) -> Path:
    path = tmp_path / name
    path.write_text((DATA if data else "") + text)
    return path


def test_dump_and_load_are_inverse(tmp_path):
    cfg = config.load(ROOT / "configs" / "align_dino.yaml", ["optimizer.lr=3e-5", "seed=7"])
    path = write(tmp_path, config.dump(cfg), data=False)
    assert config.load(path) == cfg
    assert config.from_dict(config.to_dict(cfg)) == cfg


def test_of_several_bases_later_ones_win_and_one_may_be_an_override(tmp_path):
    write(tmp_path, "optimizer: {lr: 1e-3, weight_decay: 0.5}\nseed: 1", "first.yaml")
    write(tmp_path, "optimizer: {lr: 2e-3}", "second.yaml", data=False)
    over = write(tmp_path, "seed: 3", "over.yaml", data=False)
    path = write(tmp_path, "base: [first.yaml, second.yaml]\noutput_dir: here", data=False)
    found = config.load(path, ["seed=2", f"base={over}", "optimizer.weight_decay=0.25"])
    assert (found.optimizer.lr, found.optimizer.weight_decay, found.seed, found.output_dir) == (2e-3, 0.25, 3, "here")
    with pytest.raises(config.ConfigError, match=r"over\.yaml: seed: expected an integer"):
        config.load(path, [f"base={write(tmp_path, 'seed: x', 'over.yaml', data=False)}"])
    with pytest.raises(config.ConfigError, match="'base' must be a file name or a list of them"):
        config.load(write(tmp_path, "base: [[first.yaml]]", "bad.yaml", data=False))


def test_base_files_merge_and_lists_replace(tmp_path):
    write(tmp_path, "optimizer: {lr: 1e-3, weight_decay: 0.5}\nmodel: {backbone: {strides: [4, 8]}}", "base.yaml")
    path = write(tmp_path, "base: base.yaml\noptimizer: {lr: 2e-3}\nmodel: {backbone: {strides: [16]}}", data=False)
    cfg = config.load(path)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (0.002, 0.5)
    assert cfg.model.backbone.strides == (16,)


def test_changing_the_name_resets_siblings_and_keeping_it_does_not(tmp_path):
    path = write(tmp_path, "criterion: {classification: {name: focal, alpha: 0.4, gamma: 3.0}}")
    kept = config.load(path, ["criterion.classification.alpha=0.3"]).criterion.classification
    assert (kept.name, kept.alpha, kept.gamma) == ("focal", 0.3, 3.0)
    kept = config.load(path, ["criterion.classification={name: focal, alpha: 0.3}"]).criterion.classification
    assert (kept.alpha, kept.gamma) == (0.3, 3.0)
    for override in ("criterion.classification.name=ia_bce", "criterion.classification=ia_bce"):
        other = config.load(path, [override]).criterion.classification
        assert (other.name, other.alpha, other.gamma) == ("ia_bce", 0.25, 2.0)
    named = config.load(path, ["criterion.classification=ia_bce", "criterion.classification.gamma=1"])
    assert (named.criterion.classification.name, named.criterion.classification.gamma) == ("ia_bce", 1.0)


def test_numbers_in_every_notation(tmp_path):
    for text, value in (("1e-4", 1e-4), ("1.5E+2", 150.0), ("2", 2.0), (".5e1", 5.0)):
        assert config.load(write(tmp_path, f"optimizer: {{weight_decay: {text}}}")).optimizer.weight_decay == value
    assert config.load(write(tmp_path, ""), ["optimizer.lr=2e-4"]).optimizer.lr == 2e-4


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("optimizer: {weight_dacay: 1}", [], r"run\.yaml: optimizer\.weight_dacay: unknown key .* mean 'weight_decay'"),
        ("optimzer: {lr: 1}", [], r"run\.yaml: optimzer: unknown key 'optimzer', did you mean 'optimizer'"),
        ("seed: 1\nseed: 2", [], r"run\.yaml: line \d+: duplicate key 'seed'"),
        ("seed: yes please", [], r"run\.yaml: seed: expected an integer, found 'yes please'"),
        ("seed: 1.5", [], "seed: expected an integer, found 1.5"),
        ("seed: true", [], "seed: expected an integer, found True"),
        ("optimizer: {lr: null}", [], "optimizer.lr: must not be null, expected a number"),
        ("optimizer: 3", [], "optimizer: expected a mapping"),
        ("optimizer: {lr: -1}", [], r"run\.yaml: optimizer: lr must be positive"),
        ("optimizer: {lr: .nan}", [], r"optimizer\.lr: expected a finite number, found nan"),
        ("", ["optimizer.lr=.inf"], "expected a finite number, found inf"),
        ("? [1, 2]\n: 3", [], r"run\.yaml: line \d+: a key must be a word, found a list or mapping"),
        ("", ["seed=12:30"], "seed: expected an integer, found '12:30'"),
        ("", ["output_dir=20251125"], "expected a string, found 20251125: write it in quotes, .* '\"20251125\"'"),
        ("seed: 99999999999999999999", [], r"^seed must lie within 64 bits"),
        ("optimizer: {lr: " + "9" * 400 + "}", [], r"run\.yaml: optimizer\.lr: expected a finite number"),
        ("", ["criterion.classification={name: [1]}"], r"unknown name \[1\], known: focal"),
        ("optimizer: &a {lr: *a}", [], r"run\.yaml: (optimizer\.lr: expected a number|.*themselves|not valid YAML)"),
        ("seed: !!int x", [], r"run\.yaml: invalid literal"),
        ("<<: 3", [], r"run\.yaml: not valid YAML: .* merging"),
        ("seed: " + "[" * 5000, [], r"run\.yaml: not valid YAML"),
        ("", ["model={[1]: 2}"], "not valid YAML"),
        ("optimizer: {betas: [0.9]}", [], "optimizer.betas: expected 2 values, found 1"),
        ("criterion: {classification: {name: focale}}", [], "unknown name 'focale', did you mean 'focal'"),
        ("", ["criterion.matcher.candidats=3"], "candidats=3: criterion.matcher.candidats: unknown key"),
        ("", ["seed"], "override 'seed': expected key.path=value"),
        ("", ["seed=[1"], "not valid YAML"),
        ("- a", [], "not valid YAML|expected a mapping"),
        ("criterion: {matcher: {name: mixed, candidates: [2, 1]}}", [], "lists 2 numbers, but 7 layers are supervised"),
        (
            "criterion: {groups: {one_to_many: {weight: 2}}}",
            [],
            r"^criterion\.groups: the detector has no group 'one_to_many', but encoder, decoder, denoising$",
        ),
        (
            "criterion: {groups: {denoising: {weight: 2}}}\nmodel: {denoising: null}",
            [],
            r"criterion\.groups: the detector has no group 'denoising', but encoder, decoder$",
        ),
        (
            "criterion: {groups: {denoising: {matcher: hungarian}}}",
            [],
            r"criterion\.groups\.denoising\.matcher: the matches of this group are known beforehand$",
        ),
        ("", ["criterion.groups={encoder: {weight: -1}}"], "a weight must not be negative, found -1"),
        ("", ["criterion.groups.encoder.wait=1"], r"criterion\.groups\.encoder\.wait: unknown key"),
        (
            "",
            ["criterion.groups.encoder.matcher=mixd"],
            r"encoder\.matcher.*: unknown name 'mixd', did you mean 'mixed'",
        ),
        (
            "criterion: {matcher: {name: mixed, candidates: [1, 1, 1, 1, 1, 1, 1]}}",
            ["criterion.groups.encoder.matcher=hungarian"],
            "lists 7 numbers, but 6 layers are supervised by it: 6 of decoder",
        ),
        ("criterion: {classification: cross_entropy}", [], 'has no logit for "no object"'),
        (
            "criterion: {matcher: {cost: softmax}}",
            [],
            "criterion: the matching cost softmax is not for its scores",
        ),
        ("criterion: {groups: {decoder: {matcher: {name: mixed, cost: softmax}}}}", [], "matching cost softmax is not"),
        ("op_backend: gpu", [], "op_backend: expected one of auto, reference, cpu, cuda, found 'gpu'"),
        ("base: nowhere.yaml", [], r"nowhere\.yaml: cannot be read"),
        ("base: run.yaml", [], "circle"),
    ],
)
def test_errors_name_source_key_and_what_is_known(tmp_path, text, overrides, words):
    with pytest.raises(ConfigError, match=words) as caught:
        config.load(write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=010", "seed", 10),
        ("seed=-7", "seed", -7),
        ("seed=0x1F", "seed", 31),
        ("output_dir=runs/a #1", "output_dir", "runs/a #1"),
        ("output_dir=#1", "output_dir", "#1"),
        ("output_dir=a: b: c", "output_dir", "a: b: c"),
        ("output_dir=@home", "output_dir", "@home"),
        ("output_dir=2025-11-25", "output_dir", "2025-11-25"),
        ("output_dir=no", "output_dir", "no"),
        ("output_dir='20251125'", "output_dir", "20251125"),
        ("trainer={compile: yes}", "trainer.compile", True),
        ("trainer.compile=Off", "trainer.compile", False),
        ("optimizer={lr: 1e-3}", "optimizer.lr", 1e-3),
        ("optimizer.betas=[.5, 1_0]", None, None),
    ],
)
def test_overrides_mean_what_is_written(tmp_path, override, key, value):
    """Not what YAML 1.1 makes of octal and sexagesimal numbers, dates and comments."""
    if key is None:
        with pytest.raises(ConfigError, match="expected a number, found '1_0'"):
            config.load(write(tmp_path, ""), [override])
        return
    found = config.load(write(tmp_path, ""), [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_home_folders_and_merge_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    text = """
data:
  train: &train {images: ~/pictures, annotations: "b"}
  val: {<<: *train, annotations: d}
output_dir: ~/runs/a
"""
    cfg = config.load(write(tmp_path, text, data=False))
    assert (cfg.data.train.images, cfg.data.val.images) == ("/home/somebody/pictures",) * 2
    assert (cfg.data.train.annotations, cfg.data.val.annotations) == ("b", "d")
    assert cfg.output_dir == "/home/somebody/runs/a"
    assert config.load(write(tmp_path, config.dump(cfg), data=False)) == cfg


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(config.ConfigError, match=r"run\.yaml: not a text file"):
        config.load(tmp_path / "run.yaml")


GROUPS = """
criterion:
  groups:
    encoder: {weight: 0}
    decoder: {matcher: {name: mixed, candidates: 3, cost: {bbox: 1.0}}}
    denoising: {weight: 2}
"""


def test_supervision_of_single_groups(tmp_path):
    path = write(tmp_path, GROUPS)
    groups = config.load(path).criterion.groups
    assert groups == {
        "encoder": GroupSupervision(weight=0.0),
        "decoder": GroupSupervision(matcher=Mixed(candidates=3, cost=FocalCost(bbox=1.0))),
        "denoising": GroupSupervision(weight=2.0),
    }
    again = write(tmp_path, config.dump(config.load(path)), "again.yaml", data=False)
    assert config.load(again) == config.load(path)
    changed = config.load(path, ["criterion.groups.denoising.weight=0.5", "criterion.groups.encoder.matcher=mixed"])
    assert changed.criterion.groups == {
        **groups,
        "encoder": GroupSupervision(weight=0.0, matcher=Mixed()),
        "denoising": GroupSupervision(weight=0.5),
    }
    h_detr = ["model=h_detr", "criterion.groups={one_to_many: {matcher: {name: mixed, candidates: 6}, weight: 2}}"]
    own = config.load(write(tmp_path, ""), h_detr).criterion.groups
    assert own == {"one_to_many": GroupSupervision(matcher=Mixed(candidates=6), weight=2.0)}


def test_a_changed_name_resets_its_siblings_below_a_group_too(tmp_path):
    path = write(tmp_path, GROUPS)
    kept = config.load(path, ["criterion.groups.decoder.matcher.candidates=4"]).criterion.groups["decoder"].matcher
    assert kept == Mixed(candidates=4, cost=FocalCost(bbox=1.0))
    for override in ("criterion.groups.decoder.matcher.name=hungarian", "criterion.groups.decoder.matcher=hungarian"):
        assert config.load(path, [override]).criterion.groups["decoder"].matcher == Hungarian()


def test_missing_data_says_what_is_required(tmp_path):
    with pytest.raises(ConfigError, match=r"data.*is required"):
        config.load(write(tmp_path, "seed: 1", data=False))


@pytest.mark.parametrize("path", RUNNABLE, ids=[str(p.relative_to(ROOT / "configs")) for p in RUNNABLE])
def test_every_yaml_loads_and_builds(path):
    cfg = config.load(
        path, ["model.backbone.pretrained=false", "model.backbone.norm=batch", "model.backbone.frozen_stages=0"]
    )
    model = cfg.model.build(num_classes=3)
    cfg.optimizer.build(model)
    assert sum(p.numel() for p in model.parameters()) > 1e5
    assert cfg.data.train.annotations != cfg.data.val.annotations


@pytest.mark.parametrize("path", CONFIGS, ids=[str(p.relative_to(ROOT / "configs")) for p in CONFIGS])
def test_every_yaml_says_what_it_is(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header, "a header comment is missing"
    if path in RUNNABLE:
        text = "\n".join(header)
        for word in ("source:", "expected:", "run time:", "command:"):
            assert word in text


@pytest.mark.parametrize(
    ("align", "baseline"),
    [
        ("align_dino", "dino_r50_12ep"),
        ("align_dab_detr_r50_50ep", "dab_detr_r50_50ep"),
        ("align_deformable_detr_two_stage_r50_50ep", "deformable_detr_two_stage_r50_50ep"),
        ("align_h_detr_r50_12ep", "h_detr_r50_12ep"),
    ],
)
def test_align_detr_differs_from_its_baseline_in_the_three_switches_only(align, baseline):
    def flatten(values, prefix=""):
        if not isinstance(values, dict):
            return {prefix: values}
        return {k: v for key, item in values.items() for k, v in flatten(item, f"{prefix}.{key}").items()}

    base, other = (
        flatten(config.to_dict(config.load(ROOT / "configs" / f"{name}.yaml"))) for name in (baseline, align)
    )
    different = {key for key in base.keys() | other.keys() if base.get(key) != other.get(key)}
    assert {".".join(key.split(".")[1:3]) for key in different} == {
        "criterion.classification",
        "criterion.matcher",
        "criterion.prime_sample_tau",
        "output_dir",
    }
    own = yaml.safe_load((ROOT / "configs" / f"{align}.yaml").read_text())
    assert set(own) == {"base", "output_dir", "criterion"}


@pytest.mark.parametrize(("epochs", "drop"), [(12, 82_500), (24, 150_000)])
def test_the_recipe_of_align_detrs_authors(epochs, drop):
    """What docs/fidelity.md says of their configuration, in our keys; the rest is DINO's."""
    cfg = config.load(ROOT / "configs" / f"align_detr_published_{epochs}ep.yaml")
    assert cfg.schedule.total_steps(7_329) == epochs * 7_500
    assert [cfg.schedule.factor(step, 7_329) for step in (drop - 1, drop)] == [1.0, 0.1]
    assert (cfg.model.backbone.frozen_stages, cfg.model.shared_heads, cfg.optimizer.no_decay) == (
        "stem",
        False,
        "norms",
    )
    assert (cfg.model.position_encoding.temperature, cfg.model.position_encoding.offset) == (10_000, -0.5)
    assert (cfg.data.skip_empty, cfg.data.one_orientation, cfg.data.batch_size) == (True, 2, 16)
    # The numbers of their model, of which those that they train (docs: heads of each layer, stem frozen).
    with torch.device("meta"):
        model = cfg.model.build(80, load_backbone=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 47_640_908
    groups = cfg.optimizer.build(model).param_groups
    exempt = sum(p.numel() for group in groups for p in group["params"] if group["weight_decay"] == 0)
    norms = (m for m in model.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm)))
    assert exempt == sum(p.numel() for m in norms for p in m.parameters()) > 0


def schema(kind: typing.Any, found: set[type] | None = None) -> set[type]:
    """All dataclasses below a configuration class."""
    found = set() if found is None else found
    for option in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(option) and option not in found:
            found.add(option)
            for hint in typing.get_type_hints(option).values():
                schema(hint, found)
        elif option is not kind:
            schema(option, found)
    return found


@pytest.mark.parametrize("kind", sorted(schema(Config), key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_every_field_has_a_docstring(kind):
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert ast.get_docstring(tree)
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            if ast.unparse(statement.target) == "name":
                continue  # the class says what it picks
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert documented, f"{kind.__name__}.{ast.unparse(statement.target)} has no docstring"


def test_pixel_statistics_are_the_backbones_own_unless_given(tmp_path):
    path = write(tmp_path, "model: {backbone: {model: tf_efficientnet_lite0}}")
    cfg = config.load(path)
    assert cfg.data.pixel_statistics == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    given = config.load(path, ["data.mean=[0.1, 0.2, 0.3]"])
    assert given.data.pixel_statistics == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    # What is resolved once stays: another backbone's would be wrong for the weights of a checkpoint.
    other = config.from_dict(config.to_dict(cfg), ["model.backbone.model=resnet50"])
    assert other.data.pixel_statistics == cfg.data.pixel_statistics
    assert config.load(path, ["model.backbone.model=resnet50"]).data.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ConfigError, match="timm has no model 'resnet_50'"):
        config.load(path, ["model.backbone.model=resnet_50"])
