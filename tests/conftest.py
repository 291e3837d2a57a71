"""What holds for all tests: they compare numbers, so that inference is in the precision of training everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def processor_without_bf16() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.inference.computes_bf16", lambda: False)
        yield
