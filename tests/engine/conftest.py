"""Keeps what a test of the engine changes globally from reaching the next one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Sums over threads are rounded otherwise: bits are only comparable with the same number everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _draw_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take longer than all else in a run of a dozen steps; tests that want them ask for ``with_curves``."""
    if "with_curves" not in request.fixturenames:
        monkeypatch.setattr("engine.trainer.draw_curves", lambda metrics, path, classes: None)


@pytest.fixture
def with_curves() -> None:
    """Keeps the drawing of curves on."""


@pytest.fixture(autouse=True)
def _restore_process_state(keeping_process_state: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with keeping_process_state():
        yield
