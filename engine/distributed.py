"""Processes of one run: their group, small values exchanged on the host, and errors that all of them agree on.

Values that decide what happens next (target counts, requests to stop, errors) are exchanged through the host (gloo)
also where gradients go through NCCL: an exchange then never waits for the device.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from ops.errors import describe_error

T = TypeVar("T")

_has_connected = False

DeviceChoice = Literal["auto", "cpu", "cuda"]


class UserError(ValueError):
    """A user's error that every process knows of and the first one reports."""


def rank() -> int:
    """This process among all of the run; 0 outside a distributed run."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes of the run, as torchrun set it up; 1 outside a distributed run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return rank() == 0


def restart_count() -> int:
    """How often torchrun has started this run anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launcher() -> str:
    """Which torchrun started this process: the same after its restarts, another for every launch.

    Run ids and ports are not: without options they are the same for all launches. A process and the time of its start
    are; the agent of torchrun is the parent of the processes of its machine.
    """
    parent = os.getppid()
    try:
        # Field 22, in ticks since the machine started; the second field may contain anything, in parentheses.
        started = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {platform.node()} {parent} {started}".strip()


def choose_device(choice: DeviceChoice = "auto") -> torch.device:
    """The device of this process.

    Raises:
        ValueError: if CUDA is asked for and absent, or has fewer devices than processes on this machine.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("trainer.device=cuda, but this machine has no CUDA device: set trainer.device=cpu")
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank()} of this machine has no CUDA device, there are {torch.cuda.device_count()}: "
            "lower --nproc-per-node, or set trainer.device=cpu"
        )
    return torch.device("cuda", local_rank())


def has_connected() -> bool:
    """Whether this process has ever been connected to others."""
    return _has_connected


def speaks_for_errors() -> bool:
    """Whether this process should print its own error.

    Before the processes are connected, all on a machine make the same mistake, and its first one says so.
    """
    return is_main() or _has_connected or local_rank() == 0


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Connect the processes that torchrun started; does nothing for a single one.

    Args:
        device: of this process; becomes the current CUDA device.
        timeout_seconds: after which a collective that some process does not join ends with an error.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, own_rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        # One store for all attempts of torchrun: without a prefix, restarted processes would look for each other where
        # those before them had listened. Otherwise each attempt has its own, and a machine that came back counts anew.
        store = dist.PrefixStore(f"attempt_{restart_count()}", store)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=timeout)
    global _has_connected
    _has_connected = True
    # Its destructor waits for threads of its own while it holds the interpreter's lock, which they need in order to let
    # go of the last tensors: ending processes have hung for good. The process ends soon anyway, so it is never called.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_connected() -> bool:
    """Whether there are other processes to exchange values with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def host_sum(values: Sequence[int]) -> list[int]:
    """Element-wise sum of a few integers over all processes."""
    if not is_connected():
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.int64)
    dist.all_reduce(tensor)
    return cast("list[int]", tensor.tolist())


def gather(value: T) -> list[T]:
    """The value of every process, in order of rank, on every process; for small plain values."""
    if not is_connected():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast("list[T]", values)


def share_buffers(model: nn.Module) -> None:
    """Give every process the floating-point buffers of the first one, such as running statistics.

    DistributedDataParallel does so only at the start of a forward pass in training: what that pass then adds is each
    process's own.
    """
    if not is_connected():
        return
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


@contextmanager
def agreed_errors() -> Iterator[None]:
    """Turn a user's error on any process into one :class:`UserError` on all of them.

    The body must not exchange anything between processes: one that failed would leave the others waiting.
    """
    problem: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    messages = gather(None if problem is None else describe_error(problem))
    texts = list(dict.fromkeys(message for message in messages if message is not None))
    if texts:
        raise UserError("; ".join(texts)) from problem


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or did not join in time."""
    text = str(error).lower()
    # A data-loading worker is no such process, though its end may read the same.
    if world_size() == 1 or "dataloader worker" in text:
        return False
    signs = ("connection closed by peer", "connection reset", "timed out waiting", "gloo", "nccl", "broken pipe")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)
