"""Weights as safetensors are read wherever a checkpoint's weights are, and torch.hub loads detectors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import config
import main
from engine import checkpoint
from engine.runs import session
from engine.runs.transfer import initialise_from
from tools import export, fork
from tools.predictor import Predictor, load_model

ROOT = Path(__file__).parents[2]
PICTURE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    assert export.main(["--resume", str(tiny_checkpoint), "--format", "safetensors", "--out", str(path)]) == 0
    return path


def same(first: Predictor, second: Predictor) -> bool:
    found = [detector([PICTURE], threshold=0.0)[0] for detector in (first, second)]
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_predictions_configuration_and_classes_are_the_checkpoints(tiny_checkpoint: Path, weights: Path) -> None:
    before, after = Predictor(tiny_checkpoint), Predictor(weights)
    assert same(before, after)
    assert config.to_dict(before.config) == config.to_dict(after.config)
    assert before.categories == after.categories
    assert load_file(weights).keys() == checkpoint.load(tiny_checkpoint).state["weights"].keys()


def test_averaged_weights_are_what_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = checkpoint.load(tiny_checkpoint).state
    averaged = {name: value * 2 for name, value in state["weights"].items()}
    torch.save({**state, "ema": {"weights": averaged}}, tmp_path / "averaged.pth")
    export.export(tmp_path / "averaged.pth", "safetensors", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value) for name, value in averaged.items())


def test_they_start_a_run_by_class_name_but_none_goes_on_with_them(
    tiny_checkpoint: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, _ = load_model(tiny_checkpoint)
    fresh = config.from_dict(checkpoint.load(weights).state["config"]).model.build(2)
    transfer = initialise_from(fresh, weights, [[1, "bee"], [2, "fox"]], by_class=fresh.class_parts)
    assert transfer.kept_classes == ["bee"]
    assert len(transfer.copied) > 100
    head = next(name for name in transfer.by_class if name.endswith("class_head.weight"))
    assert torch.equal(fresh.state_dict()[head][0], model.state_dict()[head][1])
    options = [str(weights), f"output_dir={tmp_path}/run"]
    assert session.exit_code(lambda: main.run(["--resume", *options])) == 2
    assert fork.main([str(weights), "--swap", "seed=1", "--steps", "1", "--out", f"{tmp_path}/run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(
        "holds weights alone, no training to go on with: start one from them with --init" in line for line in lines
    )
    assert not (tmp_path / "run").exists()


def test_of_another_program_the_tensors_alone_are_read(weights: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(weights), plain)
    fresh = config.from_dict(checkpoint.load(weights).state["config"]).model.build(3)
    assert not initialise_from(fresh, plain, [[1, "a"], [2, "b"], [3, "c"]], by_class=()).fresh
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        Predictor(plain)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files_are_one_line(weights: Path, tmp_path: Path, damage: str) -> None:
    content = weights.read_bytes()
    broken = {"cut": content[: len(content) // 2], "noise": b"\xff" * 500, "empty": b""}[damage]
    (tmp_path / "x.safetensors").write_bytes(broken)
    with pytest.raises(ValueError, match=r"x\.safetensors: cannot be read as a checkpoint \(damaged: ") as error:
        Predictor(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"a safetensors file ends in \.safetensors"):
        export.export(weights, "safetensors", tmp_path / "x.pth")


def test_torch_hub_loads_from_a_folder(
    tiny_checkpoint: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tiny_checkpoint, weights):
        found = torch.hub.load(str(ROOT), "align_dino_r50", source="local", checkpoint=str(path), device="cpu")
        assert same(found, Predictor(path))
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        torch.hub.load(str(ROOT), "detector", source="local", checkpoint="gone.pth")
    untrained = torch.hub.load(str(ROOT), "align_dino_r50", source="local", num_classes=3)
    assert untrained.num_classes == 3
    assert untrained.config.backbone.model.startswith("resnet50")
