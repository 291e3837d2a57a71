"""Training over two machines, which are network namespaces of this one: joined by a cable, each without anything else.

Needs root and iproute2; what is sent stays within the two namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny_training
import torch
from test_exactness import last
from test_survival import steps_taken
from tiny_training import Options, train

pytestmark = pytest.mark.slow


class Host:
    """A namespace with an address of its own."""

    def __init__(self, number: int) -> None:
        self.number, self.name, self.cable = (
            number,
            f"detr-{os.getpid()}-{number}",
            f"detr{os.getpid() % 10**7}{number}",
        )
        self.address = f"10.213.77.{number}"
        self.log = Path()

    def ip(self, *arguments: str) -> None:
        """Configure its network."""
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, capture_output=True)

    def start(self, directory: Path, options: Options, *arguments: str) -> subprocess.Popen[bytes]:
        """torchrun as docs/scaling.md has it, on this host."""
        self.log = directory / f"host{self.number}.log"
        program = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        program += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.213.77.1:29400"]
        # torchrun asks whether its own name has the endpoint's address; here it has not.
        program += ["--rdzv-conf", f"is_host={int(self.number == 1)}", "--local-addr", self.address, *arguments]
        program += [tiny_training.__file__, json.dumps(asdict(options))]
        variables = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.cable,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(program, env={**os.environ, **variables}, stdout=log, stderr=log)

    def kill(self) -> None:
        """All its processes at once."""
        found = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True).stdout
        for pid in found.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two machines; skips where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("two machines need iproute2's ip")
    first, second = pair = Host(1), Host(2)
    try:
        for host in pair:
            made = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"two machines need root: {made.stderr.strip()}")
        cable = ["ip", "link", "add", first.cable, "netns", first.name, "type", "veth"]
        joined = subprocess.run([*cable, "peer", "name", second.cable, "netns", second.name], capture_output=True)
        if joined.returncode:
            pytest.skip(f"two machines need a kernel with veth: {joined.stderr.decode().strip()}")
        for host in pair:
            host.ip("address", "add", f"{host.address}/24", "dev", host.cable)
            host.ip("link", "set", host.cable, "up")
            host.ip("link", "set", "lo", "up")
        yield pair
    finally:
        for host in pair:
            if Path("/run/netns", host.name).exists():
                host.kill()
                subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def wait_for_step(directory: Path, step: int, hosts: tuple[Host, Host]) -> None:
    deadline = time.monotonic() + 120
    while steps_taken(directory) < step:
        assert time.monotonic() < deadline, [host.log.read_text()[-2000:] for host in hosts]
        time.sleep(0.05)


def test_two_machines_equal_one(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    together = Options(directory=str(tmp_path / "two"), dropout=0.0)
    started = [host.start(tmp_path, together) for host in hosts]
    assert [process.wait(120) for process in started] == [0, 0], [host.log.read_text() for host in hosts]
    alone = replace(together, directory=str(tmp_path / "one"))
    train(alone)
    found, expected = last(together.directory), last(alone.directory)
    assert found["position"] == expected["position"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_a_machine_that_is_cut_off_ends_the_other_in_time(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    """Nothing tells the other but time: the connection is silent."""
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=100_000, delay=0.05, collective_timeout=10, checkpoint_every=3)
    started = [host.start(tmp_path, options) for host in hosts]
    wait_for_step(directory, 4, hosts)
    hosts[1].ip("link", "set", hosts[1].cable, "down")
    assert started[0].wait(120) == 1
    assert "error: lost contact with another process, whose own error says why" in hosts[0].log.read_text()
    assert last(directory)["position"]["step"] >= 3


@pytest.mark.thorough
def test_a_machine_that_dies_and_comes_back_goes_on(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    """The other waits for it, and both go on from the last checkpoint."""
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=60, delay=0.05, checkpoint_every=3)
    again = ("--max-restarts", "3")
    first, _ = (host.start(tmp_path, options, *again) for host in hosts)
    wait_for_step(directory, 7, hosts)
    hosts[1].kill()
    second = hosts[1].start(tmp_path, options, *again)
    assert [first.wait(240), second.wait(60)] == [0, 0], [host.log.read_text()[-3000:] for host in hosts]
    assert last(directory)["position"]["step"] == 60
