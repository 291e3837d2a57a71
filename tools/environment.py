"""Print what a report of a fault should say about the machine: python -m tools.environment.

Paste it whole: versions, git state, devices, and which implementations of the op work here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.coco_metrics import choose_backend
from engine.runs.environment import describe_environment
from ops.ms_deform_attn import available_backends, describe_backend
from tools import console

OMITTED = ("started", "command", "seed", "launch", "processes")
"""What is about a run."""


@console.command
def main() -> int:
    """Run the command."""
    console.parser("environment", __doc__).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {key: value for key, value in describe_environment(0, device).items() if key not in OMITTED}
    found["op_backend"] = describe_backend(device)
    found["op_backends"] = {name: problem or "works" for name, problem in available_backends().items()}
    found["metric_backend"] = choose_backend("auto")
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
