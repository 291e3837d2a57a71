"""What a run can do without: pictures, TensorBoard, fonts. Whatever goes wrong with them never ends it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ops.errors import describe_error

log = logging.getLogger(__name__)

_said: set[str] = set()


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Go on after the body whatever it raised; the first time for each ``what``, say so.

    Args:
        what: is then missing; the beginning of the sentence, such as "the curves".
    """
    try:
        yield
    except Exception as error:
        if what not in _said:
            _said.add(what)
            reason = f"{type(error).__name__}: {describe_error(error)}"[:300]
            log.warning("%s could not be written, the run goes on without (%s)", what, reason)
