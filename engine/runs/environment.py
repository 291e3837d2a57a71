"""What a run was made of: recorded once at every start, so that its numbers can be traced."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch

from engine import distributed

ROOT = Path(__file__).resolve().parents[2]
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
"""Of this project; pyproject.toml is where it is written."""

PACKAGES = (
    "torch", "torchvision", "timm", "huggingface_hub", "numpy", "scipy", "pycocotools", "hotcoco", "pillow",
)  # fmt: skip
TORCHRUN_VARIABLES = ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
          "TORCHELASTIC_MAX_RESTARTS", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
"""What torchrun tells its processes; its own command line it does not."""


def describe_environment(seed: int, device: torch.device) -> dict[str, Any]:
    """Seed, command, source revision, versions and devices, as plain values."""
    commit, dirty = _revision(ROOT)
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "seed": seed,
        "version": VERSION,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "processes": distributed.world_size(),
        "launch": {name: os.environ[name] for name in TORCHRUN_VARIABLES if name in os.environ},
        "devices": sorted(set(distributed.gather(_device_name(device)))),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()})"


def _revision(directory: Path) -> tuple[str | None, bool | None]:
    """Commit of the source and whether it has uncommitted changes; (None, None) outside a git checkout."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        return commit, bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(directory: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()
