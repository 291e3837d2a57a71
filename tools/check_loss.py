"""Test a detection loss: where it is not finite, what it divides by, whether one image changes another, and more.

    python -m tools.check_loss MODULE:FUNCTION [--fields '{"gamma": [0, 2]}'] [--json FILE]
    python -m tools.check_loss --cfg FILE [KEY=VALUE …]

The first tests a function ``loss(logits [B, Q, C], boxes [B, Q, 4], targets) → scalar``, whose arguments
`losses.conformance.check` describes. The second tests the criterion of a configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config
from losses.conformance import check, of_criterion
from tools import console


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; its help is this module's docstring."""
    parser = console.parser("check_loss", __doc__)
    parser.add_argument("subject", nargs="*", help="MODULE:FUNCTION; with --cfg, settings KEY=VALUE")
    parser.add_argument("--cfg", type=Path, help="configuration whose criterion is tested")
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON: arguments of the loss and values to try")
    parser.add_argument("--logits", type=int, default=4, help="logits of each query (%(default)s)")
    parser.add_argument(
        "--no-object", action="store_true", help='the scores are a softmax whose last logit means "no object"'
    )
    parser.add_argument("--json", type=Path, help="file to write the findings to, as JSON")
    options = parser.parse_args(arguments)
    if options.cfg is None and len(options.subject) != 1:
        parser.error("expected one MODULE:FUNCTION, or --cfg")
    return options


def _write(path: Path, findings: dict[str, Any]) -> None:
    if path.is_file() and path.stat().st_size:
        try:
            former = json.loads(path.read_bytes())
        except ValueError:
            former = None
        if not isinstance(former, dict) or former.keys() != findings.keys():
            raise ValueError(f"--json {path}: is there already and no report of this command; choose another name")
    path.write_text(json.dumps(findings, indent=1) + "\n")


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0: no faults, 1: faults, 2: there was nothing to test."""
    options = parse_arguments(arguments)
    if options.cfg is None:
        name, no_object = options.subject[0], options.no_object
        loss = console.named_function(name)
    else:
        criterion = config.load(options.cfg, options.subject).criterion
        name, no_object = f"{options.cfg} {' '.join(options.subject)}".strip(), criterion.classification.no_object
        loss = of_criterion(criterion)
    report = check(loss, name=name, fields=options.fields, num_logits=options.logits, no_object=no_object)
    print(report)
    if options.json is not None:
        _write(options.json, report.as_json())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
