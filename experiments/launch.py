"""Running the runs of a sweep as processes of their own, some at a time, with progress over the whole."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from engine.records import read_metrics
from engine.runs.run_directory import METRICS
from experiments.plan import STATE_DIRECTORY, Plan, PlannedRun
from experiments.progress import Length, seconds_left
from experiments.runs import State, read_run

POLL_SECONDS = 0.2
REPORT_SECONDS = 30.0
"""Between lines of progress."""
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""The variable that tells torchrun (of torch 2.12 or later) how many seconds to wait for its processes to stop."""
SECONDS_TO_STOP = 600
"""The default for runs that are started here: nobody has set a time limit, and a checkpoint may be large."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Launch(NamedTuple):
    """How to start the runs."""

    main: Path
    """The program, main.py."""
    processes: int = 1
    """Of each run; more than one are started by torchrun."""
    jobs: int = 1
    """Runs at the same time."""


def command(plan: Plan, run: PlannedRun, launch: Launch, *, for_people: bool = False) -> list[str]:
    """The command line of one run; it goes on where the run was interrupted.

    Args:
        plan: the sweep.
        run: one of its runs.
        launch: how it is started.
        for_people: with the names of programs instead of the path of this interpreter.
    """
    python = "python" if for_people else sys.executable
    start = [python]
    if launch.processes > 1:
        start = ["torchrun"] if for_people else [python, "-m", "torch.distributed.run"]
        # Its own rendezvous: several may run on one machine at a time.
        start += ["--standalone", "--nproc-per-node", str(launch.processes)]
    arguments = ["--cfg", str(plan.cfg), *run.overrides, f"output_dir={plan.directory(run)}", "--resume", "auto"]
    return [*start, str(launch.main), *arguments]


def shell_line(plan: Plan, run: PlannedRun, launch: Launch) -> str:
    """:func:`command` as one line of shell."""
    return shlex.join(command(plan, run, launch, for_people=True))


class _Job(NamedTuple):
    run: PlannedRun
    process: subprocess.Popen[bytes]
    began: float
    slot: int


class Launcher:
    """Starts what is missing of a sweep, and keeps going when a run fails."""

    def __init__(
        self,
        plan: Plan,
        launch: Launch,
        say: Callable[[str], None] = print,
        lengths: Mapping[str, Length | None] | None = None,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            plan: the sweep.
            launch: how its runs are started.
            say: is given lines of progress.
            lengths: planned length of the runs by their names; where one is missing, there is no ETA.
        """
        self.plan, self.launch, self._print = plan, launch, say
        self.lengths = lengths or {}
        self.failed: list[PlannedRun] = []
        self._stop = 0
        self._jobs: list[_Job] = []
        self._pending: list[PlannedRun] = []
        self._elsewhere: list[PlannedRun] = []
        self._reported = 0.0

    def say(self, text: str) -> None:
        """A line of progress; the sweep goes on where nobody listens any more, as after the end of a terminal."""
        with contextlib.suppress(OSError):
            self._print(text)

    def run(self) -> int:
        """Run everything that is not done yet.

        Returns:
            0 if all runs are done now, 1 if some have failed or are run by another process, 128 + the signal's number
            if it was stopped.

        Raises:
            ValueError: another process is working on this sweep.
        """
        lock = self._claim()
        # What is ignored stays so: with nohup, the sweep is to go on after the end of the terminal.
        heard = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            return self._run()
        finally:
            for job in self._jobs:
                job.process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(lock)

    def _claim(self) -> int:
        try:
            (self.plan.out / STATE_DIRECTORY).mkdir(parents=True, exist_ok=True)
            lock = os.open(self.plan.out / STATE_DIRECTORY / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"{self.plan.out} cannot be written: {error.strerror}") from error
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ValueError(f"{self.plan.out}: another process is working on this sweep") from error
        return lock

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the runs to stop in good order, once: another signal would keep torchrun from waiting for its own."""
        if not self._stop:
            self._stop = number
            for job in self._jobs:
                self._ask_to_stop(job)

    def _ask_to_stop(self, job: _Job) -> None:
        # The runs know no SIGHUP: they have no terminal to lose.
        job.process.send_signal(signal.SIGTERM if self._stop == signal.SIGHUP else self._stop)

    def _run(self) -> int:
        self._pending = [run for run in self.plan.runs if self._state(run) != "done"]
        self._done = len(self.plan.runs) - len(self._pending)
        if self._done:
            self.say(f"{self._done} of {len(self.plan.runs)} runs are done already")
        while (self._pending and not self._stop) or self._jobs:
            while self._pending and not self._stop and len(self._jobs) < self.launch.jobs:
                self._start(self._pending.pop(0))
            time.sleep(POLL_SECONDS)
            for job in [job for job in self._jobs if job.process.poll() is not None]:
                self._jobs.remove(job)
                self._finish(job)
            self._report()
        if self._stop:
            self.say(f"stopped by {signal.Signals(self._stop).name}; the same command goes on")
            return 128 + self._stop
        return 1 if self.failed or self._elsewhere else 0

    def _state(self, run: PlannedRun) -> State:
        return read_run(self.plan.directory(run), self.plan.outcome_file(run)).state

    def _start(self, run: PlannedRun) -> None:
        if self._state(run) == "running":
            self._elsewhere.append(run)
            self.say(f"{run.name}: left out, another process is running it; call again when it has ended")
            return
        slot = next(i for i in range(self.launch.jobs) if i not in {job.slot for job in self._jobs})
        number = self._done + len(self.failed) + len(self._elsewhere) + len(self._jobs) + 1
        self.plan.outcome_file(run).unlink(missing_ok=True)
        with self.plan.log_file(run).open("ab") as log:
            # In a session of its own, so that Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                command(self.plan, run, self.launch),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,
                preexec_fn=_end_with_parent if _LIBC is not None else None,
            )
        self._jobs.append(_Job(run, process, time.monotonic(), slot))
        if self._stop:  # between the start and the line above, when the signal's handler did not know of the run
            self._ask_to_stop(self._jobs[-1])
        self.say(f"[{number}/{len(self.plan.runs)}] {run.name}: started, log in {self.plan.log_file(run)}")

    def _environment(self, slot: int) -> dict[str, str]:
        """Runs side by side share the cores, and each has GPUs of its own."""
        environment = dict(os.environ)
        environment.setdefault(SHUTDOWN_TIMEOUT, str(SECONDS_TO_STOP))
        if self.launch.jobs > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.launch.jobs * self.launch.processes))))
            if visible := environment.get("CUDA_VISIBLE_DEVICES"):
                devices = visible.split(",")
                own = [devices[(slot * self.launch.processes + i) % len(devices)] for i in range(self.launch.processes)]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
        return environment

    def _finish(self, job: _Job) -> None:
        seconds = time.monotonic() - job.began
        code = job.process.returncode
        code = 128 - code if code < 0 else code
        stopped = bool(self._stop) and code != 0
        message = "" if code == 0 else last_words(self.plan.log_file(job.run))
        outcome = {"exit_code": code, "message": message, "seconds": round(seconds, 1), "stopped": stopped}
        self.plan.outcome_file(job.run).write_text(json.dumps(outcome) + "\n", encoding="utf-8")
        if stopped:
            self.say(f"{job.run.name}: stopped after {duration(seconds)}")
            return
        if code == 0:
            self._done += 1
            _, evals = read_metrics(self.plan.directory(job.run) / METRICS)
            result = f", AP {evals[-1]['AP']:.2f}" if evals and evals[-1].get("AP") is not None else ""
            words = f"done in {duration(seconds)}{result}"
        else:
            self.failed.append(job.run)
            words = f"FAILED after {duration(seconds)}: {message}"
        self.say(f"{job.run.name}: {words}; {self._summary()}")

    def _report(self) -> None:
        """A line of progress now and then."""
        if not self._jobs or time.monotonic() - max(self._reported, self._jobs[0].began) < REPORT_SECONDS:
            return
        self._reported = time.monotonic()
        parts = []
        for job in self._jobs:
            train, _ = read_metrics(self.plan.directory(job.run) / METRICS)
            at = f"epoch {train[-1]['epoch']:.2f}, loss {train[-1].get('loss') or float('nan'):.3f}" if train else "…"
            parts.append(f"{job.run.name} ({at})")
        self.say(f"running {', '.join(parts)}; {self._summary()}")

    def _summary(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        text = f"{self._done} of {len(self.plan.runs)} done{failed}"
        names = [job.run.name for job in self._jobs] + [run.name for run in self._pending]
        if not names:
            return text
        runs = {run.name: read_run(self.plan.directory(run)) for run in self.plan.runs}
        left = seconds_left(
            list(runs.values()), [(runs[name], self.lengths.get(name)) for name in names], self.launch.jobs
        )
        return f"{text}, ETA {'unknown' if left is None else duration(left)}"


def _end_with_parent() -> None:
    """In a new process, before its program starts: have it told to stop should the launcher be killed."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def last_words(log: Path) -> str:
    """The last error of a log, or its last line."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines[-200:] if line.strip()]
    errors = [line for line in lines if line.startswith("error") or "Error: " in line]
    return (errors or lines or [""])[-1].removeprefix("error: ")[:500]


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def describe(plan: Plan) -> Sequence[str]:
    """One line for each run, with its state."""
    width = max(len(run.name) for run in plan.runs)
    lines = []
    for run in plan.runs:
        found = read_run(plan.directory(run), plan.outcome_file(run))
        reason = f"  {found.message}" if found.message else ""
        lines.append(f"{run.name:<{width}}  {found.state:<10}  {' '.join(run.overrides)}{reason}")
    return lines
