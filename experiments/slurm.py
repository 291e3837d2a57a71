"""A sweep as a SLURM job array: each element is one run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.launch import SHUTDOWN_TIMEOUT, Launch, command
from experiments.plan import STATE_DIRECTORY, Plan, PlannedRun

SECONDS_TO_SAVE = 120
"""Before the time limit, the run is asked to write a checkpoint and stop."""
SECONDS_TO_END = 20
"""Of these, left to torchrun and the script for noting how the run ended."""


def script(plan: Plan, runs: Sequence[PlannedRun], launch: Launch, directory: Path, limit: str) -> str:
    """The text of a job-array script.

    A run that reaches the time limit or is preempted is asked to stop, saves a checkpoint, and is put back into the
    queue; it goes on from there. The outcome of each run is noted where a sweep notes it.

    Args:
        plan: the sweep.
        runs: those to submit, one array element each.
        launch: ``processes`` is the number of GPUs of each run, ``jobs`` the most runs at a time.
        directory: to run in.
        limit: of time, as sbatch reads it.
    """
    commands = []
    for run in runs:
        words = command(plan, run, Launch(launch.main), for_people=True)[1:]
        commands.append(f"  {shlex.quote(shlex.join(words))}")
    names = "\n".join(f"  {shlex.quote(run.name)}" for run in runs)
    quoted = "\n".join(commands)
    out = directory / plan.out
    state = shlex.quote(str(out / STATE_DIRECTORY))
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
set -u
cd {shlex.quote(str(directory))} || exit 2

names=(
{names}
)
arguments=(
{quoted}
)

name=${{names[$SLURM_ARRAY_TASK_ID]}}
mkdir -p {state}
# How long torchrun waits for its processes before it kills them (30 s, whatever is written here, before torch 2.12).
export {SHUTDOWN_TIMEOUT}={SECONDS_TO_SAVE - SECONDS_TO_END}
stopped=false
# The ampersand inside makes the program itself the child, not a shell that would keep the signal from it.
eval "torchrun --standalone --nproc-per-node {launch.processes} ${{arguments[$SLURM_ARRAY_TASK_ID]}} &"
child=$!
trap 'stopped=true; kill -TERM "$child"' TERM
wait "$child"; code=$?
# A trapped signal ends the first wait; the run itself ends once its checkpoint is written.
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
# torchrun ends with 1 when it was told to stop, as it does when the run has failed.
printf '{{"exit_code": %d, "stopped": %s}}\\n' "$code" "$stopped" > {state}/"$name.json"
if [ "$stopped" = true ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"; fi
exit "$code"
"""
