"""Runs of ``tiny_training`` in processes of their own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure  # noqa: F401 - imported when needed, but here for the server that processes are forked from
import tiny_training
import torch
import torch._dynamo  # the same
import torch.utils.tensorboard  # the same
from tiny_training import Options


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code; minus the signal's number if a signal killed it."""
    output: str
    errors: str


class Started(NamedTuple):
    """A process that runs, and where its output goes."""

    process: multiprocessing.process.BaseProcess
    output: Path
    errors: Path

    def wait(self, timeout: float = 240) -> Ended:
        """Wait for its end; kill it and fail if it does not come in time."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.errors.read_text()[-2000:]}")
        return Ended(self.process.exitcode, self.output.read_text(), self.errors.read_text())


def start_processes(work: list[Options] | Callable[[], None], processes: int = 1) -> list[Started]:
    """Start runs, or a function of a module, in processes of their own.

    They are forked from a server that has imported everything already: otherwise imports would take most of the time.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_processes"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    started = []
    for rank in range(processes):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output, errors = folder / f"{rank}.out", folder / f"{rank}.err"
        process = context.Process(target=_run_process, args=(work, environment, output, errors), daemon=True)
        process.start()
        started.append(Started(process, output, errors))
    return started


def _run_process(
    work: list[Options] | Callable[[], None], environment: dict[str, str], output: Path, errors: Path
) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    os._exit(tiny_training.exit_code(work))


def run_processes(work: list[Options] | Callable[[], None], processes: int = 1) -> list[Ended]:
    """Start, and wait for the end."""
    return [started.wait() for started in start_processes(work, processes)]
