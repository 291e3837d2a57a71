"""Branch a run: from one exact step on, train one branch for each value of a setting, on common random numbers.

    python -m tools.fork RUN_OR_CHECKPOINT --at STEP --swap criterion.classification=focal,vfl --steps N --out NAME

This goes on from the nearest checkpoint at or before STEP and then trains the branches side by side. They have the same
data, noise and dropout, and differ in nothing but the setting. The branch with nothing swapped is the original run, to
the bit. It writes a run directory for each branch (for python -m tools.compare), fork.jsonl and fork.png.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config as configuration
from config import Config
from engine import checkpoint
from engine.records import read_records
from engine.runs import session
from engine.runs.run_directory import LOG, RunDirectory
from engine.runs.signals import Interrupted
from experiments.fork import (
    FIGURE,
    RECORDS,
    Branch,
    append,
    choose_checkpoint,
    forget_unfinished,
    go_on,
    results,
    side_by_side,
    table,
)
from experiments.fork_figure import draw_fork
from experiments.grid import combinations, parse_grid
from experiments.intervals import Intervals
from experiments.plan import Plan, PlannedRun, make_plan, read_manifest, without_machine, write_manifest
from experiments.sweep_file import Sweep
from main import on_device, prepare
from tools import console
from tools.sweep import decode

TRUNK = ".fork"
"""Below --out: the run that leads to the fork, where no checkpoint lies there."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; its help is this module's docstring."""
    parser = console.parser("fork", __doc__)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="run directory, or a checkpoint")
    parser.add_argument("--at", type=int, metavar="STEP", help="step of the fork (default: the checkpoint's)")
    parser.add_argument("--swap", nargs="+", required=True, metavar="KEY=VALUES", help="a branch each: a,b,{name: c}")
    parser.add_argument("--steps", type=int, required=True, help="length of each branch")
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument(
        "--match-norms",
        action="store_true",
        help="scale loss weights so that gradients at the fork are as large as the baseline's",
    )
    parser.add_argument(
        "--parts-every", type=int, default=10, metavar="N", help="steps between measured shares (%(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=1000, help="resamples of the bootstrap over images (%(default)s)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all branches")
    return parser.parse_args(arguments)


def plan_branches(args: argparse.Namespace, base: Config) -> Plan:
    """Plan a branch for each combination of values, and the original as the baseline unless one of them is the same."""
    file = args.out / "fork.yaml"
    file.write_text(configuration.dump(base), encoding="utf-8")
    variants: dict[str, dict[str, str]] = {}
    baseline, original = "original", without_machine(configuration.to_dict(base))
    for chosen in combinations(parse_grid(args.swap)):
        name = next(iter(chosen.values())) if len(chosen) == 1 else ",".join(f"{k}={v}" for k, v in chosen.items())
        variants[name] = chosen
        if without_machine(decode(file, [f"{key}={value}" for key, value in chosen.items()])) == original:
            baseline = name
    if baseline not in variants:
        variants = {baseline: {}, **variants}
    return make_plan(Sweep(cfg=file, baseline=baseline, variants=variants), args.out, decode)


def build(plan: Plan, run: PlannedRun, start: Path, device: torch.device, *, resuming: bool | None) -> Branch:
    """A branch that goes on from a checkpoint, of its own where ``resuming``; None: it has no directory of its own."""
    out = plan.directory(run) if resuming is not None else plan.out / TRUNK
    cfg = configuration.load(plan.cfg, [*run.overrides, f"output_dir={out}"])
    # Each reads the file anew: an optimizer may keep the very tensors that it is given.
    directory = RunDirectory(out, resuming=resuming) if resuming is not None else None
    return Branch(prepare(cfg, device, directory, checkpoint.load(start)), cfg.criterion.match)


def start_of(directory: Path, step: int, fork_point: Path) -> Path:
    """The checkpoint from which a branch comes to ``step`` soonest, as it did before."""
    try:
        return choose_checkpoint(directory, step).path
    except ValueError:  # there is none of its own before that step
        return fork_point


def matched(plan: Plan, fork_point: Path, device: torch.device) -> Plan:
    """The plan with weights at which class and box terms of every branch are as hot at the fork as the baseline's."""
    heat = {run.variant: build(plan, run, fork_point, device, resuming=None).heat() for run in plan.runs}
    runs = []
    for run in plan.runs:
        pairs = zip(heat[plan.baseline].values(), heat[run.variant].values(), strict=True)
        classes, boxes = (wanted / own if own else 1.0 for wanted, own in pairs)
        weights = configuration.load(plan.cfg, run.overrides).criterion.weights
        scaled = {name: getattr(weights, name) * boxes for name in ("bbox", "giou")}
        scaled["classification"] = weights.classification * classes
        extra = [
            f"criterion.weights.{name}={value!r}" for name, value in scaled.items() if run.variant != plan.baseline
        ]
        runs.append(run._replace(overrides=(*run.overrides, *extra)))
    return plan._replace(runs=tuple(runs))


def fork(args: argparse.Namespace) -> None:
    """Find the checkpoint, go on from it to the fork, train the branches and compare them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tools.fork trains its branches in one process: start it with python, not with torchrun")
    if min(args.steps, args.parts_every) < 1 or args.samples < 0:
        raise ValueError("--steps and --parts-every must be at least 1, and --samples must not be negative")
    records = args.out / RECORDS
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "samples")}
    asked["source"] = str(args.source)
    former = read_records(records)
    if (records.exists() or read_manifest(args.out)) and (not former or former[0].get("asked") != asked):
        raise ValueError(f"{args.out} holds a sweep, or a fork with other options: choose another --out")
    loaded = choose_checkpoint(args.source, former[0]["step"] if former else args.at)
    position = loaded.state["position"]
    at = former[0]["step"] if former else position["step"] if args.at is None else args.at
    settings = [*args.set, "trainer.log_every=1", f"trainer.stop_after={at + args.steps}", f"output_dir={args.out}"]
    with checkpoint.understanding(loaded.path):
        base = configuration.from_dict(loaded.state["config"], settings, str(loaded.path))
    if base.schedule.total_steps(position["steps_per_epoch"]) < at + args.steps:
        raise ValueError(f"{loaded.path}: its schedule ends before step {at + args.steps}: lower --at or --steps")
    trunk = RunDirectory(args.out / TRUNK, resuming=bool(former))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", filename=args.out / LOG, force=True)
    plan = plan_branches(args, base)
    if not former:
        append(records, {"kind": "fork", "step": at, "asked": asked})
    with on_device(base) as device:
        latest, _ = checkpoint.find_latest(trunk.path)
        start = latest or loaded
        fork_point = start.path
        if (step := start.state["position"]["step"]) < at:
            print(f"going on from step {step} to the fork at {at} …", flush=True)
            unevaluated = ["trainer.eval_every_steps=null", "trainer.eval_every_epochs=null"]
            cfg = configuration.load(plan.cfg, [*unevaluated, f"output_dir={trunk.path}"])
            fork_point = go_on(prepare(cfg, device, trunk, start), at)
        train_branches(args, plan, fork_point, at, device)


def train_branches(args: argparse.Namespace, plan: Plan, fork_point: Path, at: int, device: torch.device) -> None:
    """Train what the records lack, and compare the branches."""
    records = args.out / RECORDS
    if (former := read_manifest(args.out)) is not None:
        plan = former  # with the weights that were matched
    elif args.match_norms:
        plan = matched(plan, fork_point, device)
    write_manifest(plan)
    runs = {str(run.variant): run for run in plan.runs}
    step = forget_unfinished(records, list(runs), at)
    known = {record.get("branch") for record in read_records(records)}
    branches = {}
    for name, run in runs.items():
        start = start_of(plan.directory(run), step, fork_point)
        branches[name] = build(plan, run, start, device, resuming=former is not None)
    for name, run in runs.items():
        if name not in known:
            about = {"source": str(args.source), "step": at, "baseline": run.variant == plan.baseline}
            identity = {key: branches[name].trainer.identity[key] for key in ("data", "environment")}
            append(records, {"kind": "branch", "branch": name, **about, "overrides": run.overrides, **identity})
    went = f", {step - at} of them taken before" if step > at else ""
    print(f"{len(branches)} branches of {args.steps} steps{went}: {', '.join(branches)}", flush=True)
    for record in side_by_side(branches, args.parts_every, at, step):
        append(records, record)
    report(plan, records, args.samples)


def report(plan: Plan, records: Path, samples: int) -> None:
    """Compare the branches: lines of kind ``result`` in the records, the figure, and a table on the screen."""
    baseline, intervals = str(plan.baseline), Intervals(samples, 0.95, logging.getLogger(__name__).info)
    taken = read_records(records)
    found = results({str(run.variant): plan.directory(run) for run in plan.runs}, taken, baseline, intervals)
    for result in found:
        append(records, result)
    draw_fork(records.with_name(FIGURE), taken, found, baseline)
    print(table(found, baseline), *intervals.problems, sep="\n")
    print(
        "gradient: its norm beside the baseline's, and its parts, at the fork; angles to the baseline's there and later"
    )
    print(f"wrote {records} and {FIGURE} beside it; python -m tools.compare {plan.out}")


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse_arguments(arguments)

    def run() -> None:
        try:
            fork(args)
        except Interrupted as stop:
            print(f"{stop}; the same command goes on with it", file=sys.stderr)
            raise

    return session.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
