"""A sweep as a SLURM job array: each element is one run, started by `python -m tools.sweep --run NAME`."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from experiments.launch import SHUTDOWN_TIMEOUT, Launch
from experiments.plan import STATE_DIRECTORY, Plan, PlannedRun

SECONDS_TO_SAVE = 120
"""Time before the limit at which a run is asked to write a checkpoint and stop."""
SECONDS_TO_END = 20
"""Part of it that is left to torchrun and the launcher for noting how the run ended."""


def script(plan: Plan, runs: Sequence[PlannedRun], launch: Launch, directory: Path, limit: str) -> str:
    """Write a job-array script.

    An element that reaches the time limit or is preempted is asked to stop, saves a checkpoint, and is put back into
    the queue (:func:`queue_again`); the run goes on from there.

    Args:
        plan: the sweep.
        runs: those to submit, one array element each.
        launch: ``processes`` is the number of GPUs of each run, ``jobs`` the most runs at a time.
        directory: to run in.
        limit: time limit of an element, as sbatch reads it.
    """
    out = directory / plan.out
    # sbatch reads quotes as a shell does, and takes per cent for the beginning of a pattern.
    log = shlex.quote(f"{str(out / STATE_DIRECTORY).replace('%', '%%')}/slurm-%a.log")
    return f"""#!/bin/bash
# {len(runs)} runs of {plan.out}; submit with: sbatch {shlex.quote(str(plan.out / "sweep.sbatch"))}
#SBATCH --job-name={shlex.quote(out.resolve().name)}
#SBATCH --array=0-{len(runs) - 1}%{launch.jobs if launch.jobs > 1 else len(runs)}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={launch.processes}
#SBATCH --cpus-per-task={6 * launch.processes}
#SBATCH --time={limit}
#SBATCH --requeue
#SBATCH --signal=B:TERM@{SECONDS_TO_SAVE}
#SBATCH --open-mode=append
#SBATCH --output={log}
cd {shlex.quote(str(directory))} || exit 2
names=({" ".join(shlex.quote(run.name) for run in runs)})
# How long torchrun waits for its processes before it kills them (30 s, whatever is written here, before torch 2.12).
export {SHUTDOWN_TIMEOUT}="${{{SHUTDOWN_TIMEOUT}:-{SECONDS_TO_SAVE - SECONDS_TO_END}}}"
# In place of the shell, so that the signal before the time limit reaches it.
exec python -m tools.sweep --out {shlex.quote(str(plan.out))} --nproc-per-node {launch.processes} \\
    --run "${{names[$SLURM_ARRAY_TASK_ID]}}"
"""


def queue_again() -> None:
    """Put this element of a job array back into the queue; elsewhere nothing happens."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        element = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        subprocess.run(["scontrol", "requeue", element], check=False)
