"""Running the runs of a sweep as processes of their own, some at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from experiments.plan import STATE_DIRECTORY, Plan, PlannedRun
from experiments.runs import read_run

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""The variable that tells torchrun (of torch 2.12 or later) how many seconds to wait for its processes to stop."""
SECONDS_TO_STOP = 600
"""Default of that variable for runs that are started here: there is no time limit, and a checkpoint may be large."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Launch(NamedTuple):
    """How to start the runs."""

    main: Path
    """The program, main.py."""
    processes: int = 1
    """Number of processes of each run; more than one are started by torchrun."""
    jobs: int = 1
    """Number of runs at the same time."""


def command(plan: Plan, run: PlannedRun, launch: Launch, *, for_people: bool = False) -> list[str]:
    """Make the command line of one run, which goes on where the run was interrupted.

    Args:
        plan: the sweep.
        run: one of its runs.
        launch: how it is started.
        for_people: with the names of programs instead of the path of this interpreter.
    """
    start = ["python"] if for_people else [sys.executable]
    if launch.processes > 1:
        start = ["torchrun"] if for_people else [*start, "-m", "torch.distributed.run"]
        # Its own rendezvous: several may run on one machine at a time.
        start += ["--standalone", "--nproc-per-node", str(launch.processes)]
    arguments = ["--cfg", str(plan.cfg), *run.overrides, f"output_dir={plan.directory(run)}", "--resume", "auto"]
    return [*start, str(launch.main), *arguments]


def shell_line(plan: Plan, run: PlannedRun, launch: Launch) -> str:
    """Write :func:`command` as one line of shell."""
    return shlex.join(command(plan, run, launch, for_people=True))


@contextlib.contextmanager
def claimed(plan: Plan) -> Iterator[None]:
    """Hold a sweep, so that no other process starts its runs.

    Raises:
        ValueError: another process is working on this sweep.
    """
    (plan.out / STATE_DIRECTORY).mkdir(parents=True, exist_ok=True)
    with (plan.out / STATE_DIRECTORY / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{plan.out}: another process is working on this sweep") from error
        yield


class Launcher:
    """Starts runs of a sweep, and keeps going when one fails."""

    def __init__(self, plan: Plan, launch: Launch, say: Callable[[str], None] = print) -> None:
        """Prepare; nothing is started yet.

        Args:
            plan: the sweep.
            launch: how its runs are started.
            say: is given lines of progress.
        """
        self.plan, self.launch, self._say = plan, launch, say
        self.failed: list[PlannedRun] = []
        self._stop = self._started = self._done = self._total = 0
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()  # of _running: a signal reaches every process, and each once
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()

    def say(self, text: str) -> None:
        """Print a line of progress; the sweep goes on where nobody listens any more, as after a terminal's end."""
        with contextlib.suppress(OSError):
            self._say(text)

    def run(self, runs: Sequence[PlannedRun]) -> int:
        """Run what is not done of these runs.

        Returns:
            0 if all are done now, 1 if some have failed or are run by another process, 128 + the signal's number if it
            was stopped.
        """
        missing = [run for run in runs if self._state(run) != "done"]
        self._total = len(runs)
        self._started = self._done = len(runs) - len(missing)
        if self._done:
            self.say(f"{self._done} of {self._total} runs are done already")
        for slot in range(self.launch.jobs):
            self._slots.put(slot)
        # What is ignored stays so: with nohup, the sweep is to go on after the end of the terminal.
        heard = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            with ThreadPoolExecutor(self.launch.jobs) as pool:
                list(pool.map(self._run, missing))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._stop:
            self.say(f"stopped by {signal.Signals(self._stop).name}; the same command goes on")
            return 128 + self._stop
        return 0 if self._done == self._total else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the runs to stop in good order, once: another signal would keep torchrun from waiting for its own."""
        if not self._stop:
            self._stop = number
            with self._lock:
                for process in self._running:
                    # The runs know no SIGHUP: they have no terminal to lose.
                    process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _state(self, run: PlannedRun) -> str:
        return read_run(self.plan.directory(run), self.plan.outcome_file(run)).state

    def _run(self, run: PlannedRun) -> None:
        """Run one and note how it ended."""
        if self._state(run) == "running":
            self.say(f"{run.name}: left out, another process is running it; call again when it has ended")
            return
        began, slot = time.monotonic(), self._slots.get()
        try:
            process = self._start(run, slot)
            if process is None:
                return
            code = process.wait()
            with self._lock:
                self._running.remove(process)
        finally:
            self._slots.put(slot)
        code = 128 - code if code < 0 else code
        stopped = bool(self._stop) and code != 0
        message = "" if code == 0 else last_words(self.plan.log_file(run))
        took = duration(time.monotonic() - began)
        outcome = {"exit_code": code, "message": message, "stopped": stopped}
        self.plan.outcome_file(run).write_text(json.dumps(outcome) + "\n", encoding="utf-8")
        if stopped:
            self.say(f"{run.name}: stopped after {took}")
        elif code:
            self.failed.append(run)
            self.say(f"{run.name}: FAILED after {took}: {message}")
        else:
            self._done += 1
            evals = read_run(self.plan.directory(run)).evals
            result = f", AP {evals[-1]['AP']:.2f}" if evals and evals[-1].get("AP") is not None else ""
            self.say(f"{run.name}: done in {took}{result}; {self._done} of {self._total} done")

    def _start(self, run: PlannedRun, slot: int) -> subprocess.Popen[bytes] | None:
        """Start a process, unless the sweep has been told to stop."""
        log = self.plan.log_file(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, log.open("ab") as output:
            if self._stop:
                return None
            self.plan.outcome_file(run).unlink(missing_ok=True)
            # In a session of its own, so that Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                command(self.plan, run, self.launch), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._environment(slot), start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            self._started += 1
            self.say(f"[{self._started}/{self._total}] {run.name}: started, log in {log}")
        return process

    def _environment(self, slot: int) -> dict[str, str]:
        """Share the cores out among runs side by side, and give each GPUs of its own."""
        environment, jobs, processes = dict(os.environ), self.launch.jobs, self.launch.processes
        environment.setdefault(SHUTDOWN_TIMEOUT, str(SECONDS_TO_STOP))
        if jobs > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (jobs * processes))))
            if visible := environment.get("CUDA_VISIBLE_DEVICES"):
                devices = visible.split(",")
                own = [devices[(slot * processes + i) % len(devices)] for i in range(processes)]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
        return environment


def last_words(log: Path) -> str:
    """Find the last error of a log, or its last line."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines[-200:] if line.strip()]
    errors = [line for line in lines if line.startswith("error") or "Error: " in line]
    return (errors or lines or [""])[-1].removeprefix("error: ")[:500]


def duration(seconds: float) -> str:
    """Write a time as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def describe(plan: Plan) -> Sequence[str]:
    """Make one line for each run, with its state."""
    width = max(len(run.name) for run in plan.runs)
    lines = []
    for run in plan.runs:
        found = read_run(plan.directory(run), plan.outcome_file(run))
        reason = f"  {found.message}" if found.message else ""
        lines.append(f"{run.name:<{width}}  {found.state:<10}  {' '.join(run.overrides)}{reason}")
    return lines
