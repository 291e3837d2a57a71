"""Start and end of a run: which checkpoint it goes on from, whose directory it writes, what its exit code says.

Exit codes: 0 done; 1 unexpected error, or contact with another process lost; 2 something a user can mend, in one
line; 3 stopped because a loss or gradient was not finite; 129, 130 or 143 stopped by SIGHUP, SIGINT or SIGTERM, in good
order (130 also at once, by a second Ctrl-C).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from engine import checkpoint, distributed
from engine.runs.faults import DivergedError
from engine.runs.run_directory import RunDirectory, launched_by
from engine.runs.signals import Interrupted, kill_children
from ops.errors import describe_error

log = logging.getLogger(__name__)

AUTO = "auto"
"""Value of ``--resume``: go on from the output directory's last checkpoint, or start afresh where there is none."""


class OpenedRun(NamedTuple):
    """A run directory that is claimed, and the checkpoint to go on from."""

    directory: RunDirectory | None
    """On the process that writes; None on the others."""
    loaded: checkpoint.Loaded | None
    """None to start afresh."""


def open_run(output_dir: Path, resume: str | None, explicit: checkpoint.Loaded | None = None) -> OpenedRun:
    """Claim the output directory and find the checkpoint to go on from; called by all processes together.

    When torchrun has started the processes again after a failure, the run goes on from its own last checkpoint,
    whatever it was first started from. Its own: a directory that it was refused at first is refused again.

    Args:
        output_dir: of the run.
        resume: ``auto``, the path of a checkpoint, or None to start afresh.
        explicit: the checkpoint at that path, already read.

    Raises:
        ValueError: if the directory is not writable, in use, or holds another run; or if its checkpoints are unusable.
    """
    # Of all machines: after a restart the first process may be on another one.
    launchers = sorted(set(distributed.gather(distributed.launcher())))
    inside = explicit is not None and explicit.path.resolve().parent == output_dir.resolve()
    directory = None
    found: Path | None = None
    with distributed.agreed_errors():
        if distributed.is_main():
            search = resume == AUTO or (distributed.restart_count() > 0 and launched_by(output_dir, launchers))
            directory = RunDirectory(output_dir, resuming=search or inside, launchers=launchers)
            if search:
                latest, problems = checkpoint.find_latest(output_dir)
                found = None if latest is None else latest.path
                for problem in problems:
                    print(f"warning: {problem}", file=sys.stderr)
    # All go on from the file that the first process chose.
    found = distributed.gather(found)[0]
    if found is None:
        return OpenedRun(directory, explicit)
    with distributed.agreed_errors():
        loaded = checkpoint.load(found)
    return OpenedRun(directory, loaded)


def exit_code(run: Callable[[], None]) -> int:
    """Run, and say how it ended: one line on stderr for what is not a programming error, and the exit code.

    Errors of users and lost contacts leave no traceback, unless the environment sets ALIGN_DETR_TRACEBACK=1; unexpected
    errors keep theirs.
    """
    try:
        run()
    except Interrupted as stop:
        log.info("%s; go on with --resume auto", stop)
        return stop.exit_code
    except KeyboardInterrupt:
        return _complain("interrupted", 130, same_everywhere=True)
    except DivergedError as error:
        return _complain(str(error), 3, same_everywhere=True)
    except distributed.UserError as error:
        return _complain(str(error), 2, same_everywhere=True)
    except (ValueError, OSError) as error:
        if os.environ.get("ALIGN_DETR_TRACEBACK"):
            raise
        return _complain(describe_error(error), 2)
    except torch.OutOfMemoryError as error:
        reason = describe_error(error).partition(". ")[0]
        return _complain(
            f"{reason}: raise trainer.accumulation_steps, lower data.batch_size or the image size, or recompute "
            "activations (model.gradient_checkpointing=true)",
            2,
        )
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        reason = describe_error(error)
        return _complain(f"lost contact with another process, whose own error says why ({reason})", 1)
    finally:
        kill_children()
    return 0


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    Processes that were connected leave without finalising interpreter and libraries: gloo's threads can hang or abort
    them there, and a complete run would count as a failed one. Everything is on disk by then, and workers are gone.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the terminal is gone, or who read the pipe: finalising would complain, with another exit code
        os._exit(code)
    if distributed.has_connected():
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def _complain(message: str, code: int, *, same_everywhere: bool = False) -> int:
    """Print one line, and keep it in log.txt; what all processes know is said by the first only."""
    if distributed.is_main() or (not same_everywhere and distributed.speaks_for_errors()):
        where = "" if distributed.is_main() else f" (rank {distributed.rank()})"
        with suppress(OSError):
            print(f"error{where}: {message}", file=sys.stderr, flush=True)
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, f"error: {message}", (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
    return code
