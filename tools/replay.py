"""Run a step again whose loss or gradient was not finite, and say where it began.

    python -m tools.replay runs/NAME/nonfinite_step….pth

Training left the file. The exit code is 1 if the step is not finite again, and 0 if it is finite now (with other
settings, another precision or another device).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config as configuration
from engine import checkpoint, distributed
from engine.runs.diagnosis import StepRecord
from engine.step import Precision, configure_device
from ops.ms_deform_attn import set_default_backend
from tools import console


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser("replay", __doc__)
    parser.add_argument("dump", type=Path, help="nonfinite_step….pth in the run directory")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="another precision than the run's")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the run's configuration")
    return parser.parse_intermixed_args(arguments)


def replay(args: argparse.Namespace) -> int:
    """Build the run's model with the weights of that step, run it, and print what is found."""
    content = checkpoint.read_file(args.dump)
    if not isinstance(content, dict):
        raise ValueError(f"{args.dump}: is not the dump of a non-finite step")
    record = StepRecord.from_content(content, args.dump)
    if args.precision is not None:
        scale = record.loss_scale if args.precision == "fp16" else 1.0
        record = record._replace(precision=cast("Precision", args.precision), loss_scale=scale)
    cfg = configuration.from_dict(content["config"], args.overrides, str(args.dump))
    device = distributed.choose_device(cast("Literal['auto', 'cpu', 'cuda']", args.device))
    configure_device(device, tf32=cfg.trainer.tf32, deterministic=cfg.trainer.deterministic)
    set_default_backend(cfg.op_backend)
    model = cfg.model.build(len(content["categories"]), load_backbone=False)
    checkpoint.load_weights(model, content["weights"], args.dump)
    diagnosis = record.run_again(model.to(device).train(), cfg.criterion, device)
    print(f"step {record.step} on rank {record.rank}, images {content['image_ids']}, {record.precision} on {device}")
    for name, value in diagnosis.terms.items():
        print(f"  {name}: {value:g}")
    print(diagnosis.describe())
    return int(not diagnosis.is_finite)


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return replay(parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
