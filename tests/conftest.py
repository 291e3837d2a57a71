"""Putting back what a training changes in its process, for all tests that train."""

import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def keeping_process_state() -> Callable[[], AbstractContextManager[None]]:
    """For fixtures that train for several tests: what they leave would be taken for how it was before."""
    return process_state_kept


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Put back signal handlers, loggers, environment and random states at the end."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    }
    root = logging.getLogger()
    log_handlers, level = root.handlers[:], root.level
    deterministic = torch.get_deterministic_debug_mode()
    environment = dict(os.environ)
    random_states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.handlers[:], root.level = log_handlers, level
        torch.set_deterministic_debug_mode(deterministic)
        torch.set_rng_state(random_states[0])
        np.random.set_state(random_states[1])
        random.setstate(random_states[2])
