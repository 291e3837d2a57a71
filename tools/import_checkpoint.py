"""Turn a published checkpoint (of a detector's authors, detrex, mmdetection or transformers) into one of this project.

    python -m tools.import_checkpoint dino_4scale.pth --out runs/dino/checkpoint.pth
    python main.py --eval --resume runs/dino/checkpoint.pth data.val.images=… data.val.annotations=…

The layout is recognised. Every entry of the file is used, or listed as left out. The result holds the configuration
that the weights ask for. Nothing in the file is executed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config as configuration
from config import Config
from datasets import Category
from datasets.annotations import read_categories
from engine import checkpoint
from engine.whole_files import replacing
from models import DetectorConfig
from ops.coco_file import read_coco_file
from schema import plain
from strict_yaml import read_chain
from tools import console
from tools.checkpoint_layouts import Conversion, convert
from tools.checkpoint_layouts.reading import read, select_weights

_CONFIGS = Path(__file__).parents[1] / "configs"


def import_checkpoint(
    path: Path,
    entry: str | None = None,
    categories: Sequence[Category] | None = None,
    ignore: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> tuple[Conversion, Config]:
    """Read and convert a file.

    Args:
        path: the published checkpoint.
        entry: key of the weights in it, such as ``ema_model``; None takes the plain weights.
        categories: those the model was trained on, in the order of their ids; None: COCO's, or what the file says.
        ignore: patterns of entries to leave out although they are unknown.
        overrides: ``key.path=value`` laid over the inferred configuration.

    Raises:
        ValueError: in one line, why it cannot be imported.
    """
    content = read(path)
    key, weights = select_weights(content, entry, path)
    try:
        conversion = convert(content, weights, categories, ignore)
    except ValueError as error:
        raise ValueError(f"{path}{f' ({key})' if key else ''}: {error}") from error
    return conversion, configure(conversion, path, overrides)


def configure(conversion: Conversion, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that the weights ask for, checked against them.

    Raises:
        ValueError: the model it describes has other entries, or other shapes.
    """
    (published,) = _CONFIGS.glob(f"{conversion.model['name']}_r50_*ep.yaml")
    (_, coco), *_, (_, own) = read_chain(published)
    inferred = {
        "model": conversion.model,
        "criterion": own["criterion"],
        "data": {**coco["data"], **conversion.data},
        "output_dir": str(Path("runs") / path.stem),
    }
    config = configuration.from_dict(inferred, overrides, str(path))
    _check(config, conversion, path)
    return config


def _check(config: Config, conversion: Conversion, path: Path) -> None:
    """Compare with the model that the configuration builds, name by name and shape by shape."""
    with torch.device("meta"):
        model = config.model.build(len(conversion.categories), load_backbone=False)
    expected, found = model.state_dict(), conversion.tensors
    problems = [f"{name} is not filled" for name in expected if name not in found]
    sources = {name: " and ".join(conversion.sources.get(name, (name,))) for name in found}
    problems += [f"{sources[name]} has no place in the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{sources[name]} has shape {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"{path}: {len(problems)} entries do not fit the model: {'; '.join(problems[:3])}")


def save(path: Path, conversion: Conversion, config: Config) -> None:
    """Write a checkpoint of this project that can be evaluated and fine-tuned.

    Raises:
        OSError: it cannot be written.
    """
    weights: Mapping[str, Tensor] = {name: value.detach().clone() for name, value in conversion.tensors.items()}
    state: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "weights": weights,
        "ema": None,
        # Not a training run that could be gone on with: --init-from starts one from these weights.
        "position": {"step": 0, "steps_per_epoch": 0, "evaluated_step": 0},
        "config": configuration.to_dict(config),
        "categories": [[category.id, category.name] for category in conversion.categories],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def report(conversion: Conversion, config: Config) -> list[str]:
    """What was recognised and what became of the entries, in lines."""
    model = config.model
    used = len({source for sources in conversion.sources.values() for source in sources})
    lines = [
        f"layout: {conversion.layout}",
        f"model: {describe(model)}, {len(conversion.categories)} classes",
        f"entries: {used} used, {len(conversion.left_out)} left out, {len(conversion.filled)} not in the file",
    ]
    # Entries that were dropped because another holds the same are one line together.
    reasons = Counter(
        "the same as another entry" if why.startswith("the same") else why for why in conversion.left_out.values()
    )
    lines += [f"  left out: {number} entries: {why}" for why, number in reasons.items()]
    lines += [f"  filled: {number} entries: {why}" for why, number in Counter(conversion.filled.values()).items()]
    return lines + [f"  cut: {line}" for line in conversion.cut]


def describe(model: DetectorConfig) -> str:
    """What was inferred of a detector: the fields in which it differs from its defaults."""
    default = cast("Any", type(model))()
    own = {f.name: getattr(model, f.name) for f in fields(model) if getattr(model, f.name) != getattr(default, f.name)}
    backbone = own.pop("backbone", default.backbone)
    return ", ".join([model.name, backbone.model, *(f"{key} {plain(value)}" for key, value in own.items())])


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = console.parser("import_checkpoint", __doc__)
    parser.add_argument("checkpoint", type=Path, help="published checkpoint, .pth or .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--entry", help="weights to take where the file has several, such as ema_model")
    parser.add_argument("--categories", type=Path, help="annotation file with the classes, if they are not COCO's")
    parser.add_argument("--leave-out", action="append", default=[], metavar="PATTERN", help="unknown entries to drop")
    parser.add_argument("--list", action="store_true", help="print every entry that is left out, with the reason")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="overrides of the inferred configuration"
    )
    options = parser.parse_intermixed_args(arguments)
    categories = None
    if options.categories is not None:
        categories = read_categories(read_coco_file(options.categories), options.categories)
    conversion, config = import_checkpoint(
        options.checkpoint, options.entry, categories, options.leave_out, options.overrides
    )
    save(options.out, conversion, config)
    print("\n".join(report(conversion, config)))
    if options.list:
        print("\n".join(f"{name}: {reason}" for name, reason in conversion.left_out.items()))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
