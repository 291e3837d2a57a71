"""The first page: what it shows runs, what it names is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from datasets.shapes import ShapesConfig, generate

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(heading: str) -> list[str]:
    """The blocks of code of a section."""
    section = PAGE[PAGE.index(f"## {heading}\n") :].partition("\n## ")[0]
    return re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_without_the_engine():
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    exec(blocks("Without the engine")[0], namespace)
    detector = namespace["detector"]
    assert isinstance(detector, torch.nn.Module)
    assert all(parameter.grad is not None for parameter in detector.parameters())


@pytest.mark.slow
def test_change_one_thing(tmp_path: Path):
    """In a copy of the sources: the loss is written, named, trained with, and compared."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in ROOT.iterdir():
        if entry.suffix in (".py", ".toml"):
            shutil.copy(entry, copy)
        elif (entry / "__init__.py").exists() or entry.name in ("configs", "tools"):
            shutil.copytree(entry, copy / entry.name)
    generate(copy / "data/shapes", ShapesConfig(train_images=8, val_images=2, image_size=64, max_object_size=40), 1)
    loss, then = blocks("Change one thing")
    (copy / "losses/mine.py").write_text(loss)
    short = " schedule.steps=2 schedule.warmup_steps=0 data.batch_size=2 trainer.device=cpu"
    train = " main.py --cfg configs/quickstart.yaml output_dir=runs/quickstart" + short
    commands = [sys.executable + train]
    for line in then.splitlines():
        line = line.replace(".venv/bin/python", sys.executable)
        commands.append(line + short if "main.py" in line else line)
    assert len(commands) == 4
    printed = ""
    for line in commands:
        done = subprocess.run(["bash", "-c", line], cwd=copy, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    assert "mine" in printed


def test_everything_it_names_is_there():
    names = set(re.findall(r"(?:`|\()((?:[\w.-]+/)*[\w-]+\.(?:py|md|png|yaml))[`)]", PAGE))
    names |= set(re.findall(r"configs/[\w/]+\.yaml", PAGE))
    assert len(names) > 12
    made = {"losses/mine.py", "runs/quickstart/predictions.png"}
    assert [name for name in sorted(names - made) if not (ROOT / name).exists()] == []
    modules = re.findall(r"-m (tools\.\w+)", PAGE)
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules)


def test_pages_are_listed_once_and_links_lead_somewhere():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
    assert sorted(re.findall(r"^\| \[([\w.]+)\]", index, re.MULTILINE)) == pages
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[\w-]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_version_is_in_one_place():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    shown = subprocess.run(
        [sys.executable, "main.py", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert shown.stdout == f"align-detr {version}\n"
