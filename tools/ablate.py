"""Answer the question that a sweep file declares, with as many seeds as it takes.

    python -m tools.ablate --sweep FILE --out runs/NAME

The file's entry 'declared' states the hypothesis, the smallest effect of interest and the budget. Seeds are run one
after the other, and in each the baseline and its variants have the same random numbers. The command ends when every
variant is known to help, to hurt or to matter too little, or when the budget is spent. Its intervals allow for being
looked at after each seed. After a stop, the same command goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import schema
from experiments.declared import Declaration, decide, sentence, write_verdict
from experiments.grid import parse_grid
from experiments.launch import Launch, Launcher, claimed
from experiments.plan import PlannedRun, make_plan, resolve_all, write_manifest
from experiments.sweep_file import read_sweep
from tools import console
from tools.sweep import MAIN, check_directories, decode


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; its help is this module's docstring."""
    parser = console.parser("ablate", __doc__)
    parser.add_argument("--sweep", type=Path, required=True, help="sweep file with the entry 'declared'")
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs and the verdict")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings for all runs")
    return parser.parse_intermixed_args(arguments)


def ablate(args: argparse.Namespace) -> int:
    """Plan all seeds, run as many as it takes, and write the verdict; 1 where a run failed or was stopped."""
    sweep = read_sweep(args.sweep)
    if sweep.declared is None or sweep.grid or sweep.baseline is None or len(sweep.variants) < 2:
        raise ValueError(f"{args.sweep}: an ablation needs 'declared', 'baseline' and two 'variants', and no 'grid'")
    try:
        declared: Declaration = schema.decode(Declaration, None, sweep.declared, ())
    except schema.KeyPathError as error:
        raise ValueError(f"{args.sweep}: {'.'.join(('declared', *error.path))}: {error}") from error
    seeds = {"seed": [str(seed) for seed in range(declared.budget)]}
    plan = make_plan(sweep.updated({**parse_grid(args.overrides), **seeds}), args.out, decode)
    check_directories(plan, resolve_all(plan, decode))
    write_manifest(plan)

    def run_all(runs: Sequence[PlannedRun]) -> bool:
        return Launcher(plan, Launch(MAIN, jobs=args.jobs), say).run(runs) == 0

    with claimed(plan):
        findings = decide(plan, declared, run_all, say)
    if findings is None:
        say("stopped before the end, without a verdict; the same command goes on")
        return 1
    command = ["python", "-m", "tools.ablate", "--sweep", str(args.sweep), *args.overrides, "--out", str(args.out)]
    path = write_verdict(plan, declared, findings, shlex.join(command))
    for text in (declared.hypothesis, *(sentence(finding, plan.baseline, declared.metric) for finding in findings)):
        say(text)
    say(f"wrote {path}; compare: python -m tools.compare {args.out}")
    return 0


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return ablate(parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
