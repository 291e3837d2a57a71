"""Write the synthetic data set of shapes: python -m tools.make_shapes --out data/shapes."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.shapes import ShapesConfig, generate
from tools import console


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("make_shapes", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to, for example data/shapes")
    parser.add_argument(
        "--processes", type=int, default=None, help="processes that draw (default: one a core, at most 8)"
    )
    for field in fields(ShapesConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default, help="(%(default)s)"
        )
    return parser


@console.command
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    settings = {field.name: getattr(options, field.name) for field in fields(ShapesConfig)}
    start = time.perf_counter()
    config = ShapesConfig(**settings)
    if generate(options.out, config, options.processes):
        count = config.train_images + config.val_images
        print(f"wrote {count} images to {options.out} in {time.perf_counter() - start:.1f} s")
    else:
        print(f"{options.out} already holds this data set: nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
