"""Run a grid of settings.

    python -m tools.sweep --cfg configs/align_dino.yaml KEY=a,b,c seed=0..2 --out runs/NAME
    python -m tools.sweep --sweep configs/sweeps/components_shapes.yaml --out runs/NAME

Everything is validated before the first run starts. Called again, it finishes what is missing and repeats nothing.
Without a grid, it goes on with the sweep in --out. `python -m tools.compare` makes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config
from experiments.comparison import check_baseline
from experiments.grid import parse_grid
from experiments.launch import Launch, Launcher, claimed, describe, shell_line
from experiments.plan import (
    MANIFEST,
    Plan,
    extend,
    make_plan,
    read_manifest,
    resolve_all,
    without_machine,
    write_manifest,
)
from experiments.runs import read_run
from experiments.slurm import queue_again, script
from experiments.sweep_file import Sweep, read_sweep
from tools import console

MAIN = Path(__file__).resolve().parents[1] / "main.py"


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("sweep", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cfg", type=Path, help="configuration that all runs vary")
    what.add_argument("--sweep", type=Path, help="sweep file (configs/sweeps/*.yaml): configuration, variants, grid")
    parser.add_argument("axes", nargs="*", metavar="KEY=VALUES", help="a,b,c or 0..2; a single value is for all runs")
    parser.add_argument("--out", type=Path, required=True, help="directory of the sweep, with one directory a run")
    parser.add_argument("--baseline", help="variant or key=value that compare takes as the baseline; '' for none")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="validate, show the runs and their state, start nothing")
    mode.add_argument("--list", action="store_true", help="print the command of each run that is not done, one a line")
    mode.add_argument("--slurm", action="store_true", help="write a job-array script for what is not done")
    mode.add_argument("--run", metavar="NAME", help="run only this one, as the elements of a job array do")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="processes of each run (torchrun)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time")
    parser.add_argument("--time-limit", default="24:00:00", help="limit of each array element (%(default)s)")
    return parser


def decode(cfg: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of a file with overrides."""
    return config.to_dict(config.load(cfg, overrides))


def plan_of(args: argparse.Namespace) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """Plan the runs that the command line and the directory describe, all of them valid, with their configurations.

    Raises:
        ValueError: something about them is wrong.
    """
    existing = read_manifest(args.out)
    grid = parse_grid(args.axes)
    if args.sweep is not None:
        sweep = read_sweep(args.sweep).updated(grid)
    elif args.cfg is not None:
        if not grid:
            raise ValueError("the grid is empty: give at least one KEY=VALUES, such as seed=0..2")
        sweep = Sweep(cfg=args.cfg).updated(grid)
    elif existing is not None and not grid:
        sweep = None
    else:
        raise ValueError(
            f"--cfg or --sweep is needed: {args.out} holds no {MANIFEST} to go on with"
            if existing is None
            else "to add runs to a sweep, give its --cfg or --sweep as well"
        )
    if sweep is None:
        assert existing is not None
        plan = existing
    else:
        plan = make_plan(sweep, args.out, decode)
        plan = plan if existing is None else extend(existing, plan, decode)
    resolved = resolve_all(plan, decode)
    if args.baseline is not None:
        plan = plan._replace(baseline=args.baseline or None)
    if args.baseline is not None or sweep is not None:
        check_baseline(plan, resolved)
    return plan, resolved


def check_directories(plan: Plan, resolved: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if a run directory holds a run of another configuration."""
    for name, values in resolved.items():
        found = read_run(plan.out / name).config
        if not found:
            continue
        old, new = without_machine(found), without_machine(values)
        different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if different:
            key = different[0]
            raise ValueError(
                f"{plan.out / name} holds a run with {key}={old.get(key)}, the sweep wants {new.get(key)}: "
                "choose another --out, or remove that run"
            )


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_intermixed_args(arguments)
    if min(args.jobs, args.nproc_per_node) < 1:
        raise ValueError("--jobs and --nproc-per-node must be at least 1")
    plan, resolved = plan_of(args)
    check_directories(plan, resolved)
    return _act(plan, args)


def _act(plan: Plan, args: argparse.Namespace) -> int:
    here = Path.cwd()
    main_file = MAIN.relative_to(here) if MAIN.is_relative_to(here) else MAIN
    launch = Launch(main_file, args.nproc_per_node, args.jobs)
    states = [read_run(plan.directory(run)).state for run in plan.runs]
    missing = [run for run, state in zip(plan.runs, states, strict=True) if state not in ("done", "running")]
    if args.dry_run:
        print(*describe(plan), f"{len(plan.runs)} runs, {states.count('done')} done", sep="\n")
        return 0
    if args.list:
        print("".join(f"{shell_line(plan, run, launch)}\n" for run in missing), end="")
        return 0
    chosen = [run for run in plan.runs if args.run in (None, run.name)]
    if not chosen:
        raise ValueError(f"--run {args.run}: {plan.out} has no such run (--dry-run shows them all)")
    known = read_manifest(plan.out)
    # Elements of a job array leave it alone, unless the sweep has grown since it was written.
    if args.run is None or known is None or chosen[0] not in known.runs:
        write_manifest(plan)
    if args.slurm:
        if not missing:
            print("all runs are done or running: there is nothing to submit")
            return 0
        path = plan.out / "sweep.sbatch"
        path.write_text(script(plan, missing, launch, here, args.time_limit), encoding="utf-8")
        print(f"wrote {path} for {len(missing)} runs: sbatch {path}")
        return 0
    launcher = Launcher(plan, launch, lambda text: print(text, flush=True))
    if args.run is None:
        with claimed(plan):
            code = launcher.run(chosen)
    else:
        code = launcher.run(chosen)
        if code > 128:
            queue_again()
    for run in launcher.failed:
        message = read_run(plan.directory(run), plan.outcome_file(run)).message
        with contextlib.suppress(OSError):
            print(f"failed: {run.name}: {message}", file=sys.stderr)
    launcher.say(f"compare: python -m tools.compare {plan.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
