"""Checkpoint files: written so that a crash at any moment leaves a good one, read so that nothing in them is executed.

A checkpoint is a dictionary of plain values and tensors: ``format``, ``weights``, ``ema``, ``optimizer``, ``scaler``,
``position``, ``best``, ``metrics``, ``counters``, ``seed``, ``config`` (resolved), ``categories`` ([id, name] in the
order of the labels), ``data`` (see :func:`check_data`) and ``environment``.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.weights_file import ENDING, read_weights
from engine.whole_files import replacing
from ops.errors import describe_error

FORMAT = 1
LAST = "checkpoint_last.pth"
PREVIOUS = "checkpoint_previous.pth"
BEST = "checkpoint_best.pth"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the reason and what is usable beside it."""


class Loaded(NamedTuple):
    """A checkpoint and where it came from."""

    path: Path
    state: dict[str, Any]


def write(directory: Path, state: Mapping[str, Any], *, best: bool = False) -> None:
    """Make ``state`` the last checkpoint, the former last one the previous one, and if asked also the best one.

    The file is written under a temporary name, synced to the disk and then renamed, so that at every moment either
    the last or the previous checkpoint is complete.

    Raises:
        OSError: if it cannot be written, for example on a full disk; the checkpoints are then as before.
    """
    last = directory / LAST
    try:
        with replacing(last) as temporary:
            with temporary.open("wb") as file:
                serialise({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            if best:
                _link_or_copy(temporary, directory / BEST)
            if last.exists():
                last.replace(directory / PREVIOUS)
    except OSError as error:
        reason = error.strerror or str(error)
        kept = [name for name in (LAST, PREVIOUS, BEST) if (directory / name).exists()]
        kept_text = f"{', '.join(kept)} kept" if kept else "there is no earlier one"
        raise OSError(error.errno, f"cannot write a checkpoint: {reason} ({kept_text})", str(directory)) from error
    _sync_directory(directory)


def serialise(content: Mapping[str, Any], file: IO[bytes]) -> None:
    """torch.save, but with the OSError of a write that failed, which torch reports as a RuntimeError without reason.

    ``file`` must be open: given a path, torch writes by itself and the reason is lost altogether.

    Raises:
        OSError: if it cannot be written, for example on a full disk.
    """
    try:
        torch.save(dict(content), file)
    except RuntimeError as error:
        # Closing the archive after a failed write raises once more and hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _link_or_copy(source: Path, target: Path) -> None:
    """Give the file a second name atomically; by copying where the file system knows no links."""
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> Any:
    """Whatever torch.save wrote to ``path``, on the host, without executing anything in it.

    Raises:
        CheckpointError: if the file is absent, truncated, damaged, or holds more than plain values and tensors.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint{_usable_beside(path)}")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory, name a file in it{_usable_beside(path / LAST, itself=True)}")
    problem = _damage(path)
    if problem is None:
        try:
            if path.suffix == ENDING:
                return read_weights(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            problem = error.strerror or str(error)
        except ValueError as error:
            problem = str(error) if path.suffix == ENDING else "truncated or no checkpoint"
        except pickle.UnpicklingError as error:
            harmful = "unsupported" in str(error).lower() or "weightsunpickler" in str(error).lower()
            problem = "holds objects other than plain values and tensors" if harmful else "truncated or no checkpoint"
        except Exception:  # whatever comes to the readers of archives and pickles; there is no common base class
            problem = "truncated or no checkpoint"
    raise CheckpointError(f"{path}: cannot be read as a checkpoint ({problem}){_usable_beside(path)}")


def load(path: Path) -> Loaded:
    """Read a checkpoint of this program.

    Raises:
        CheckpointError: if it cannot be read, or is something else.
    """
    state = read_file(path)
    if not isinstance(state, dict) or "format" not in state or "weights" not in state:
        raise CheckpointError(
            f"{path}: not a checkpoint of this program (for its weights only: --init-from){_usable_beside(path)}"
        )
    found = state["format"] if type(state["format"]) is int else type(state["format"]).__name__
    if found != FORMAT:
        problem = f"has checkpoint format {found}, this program reads {FORMAT}"
        raise CheckpointError(f"{path}: {problem}{_usable_beside(path)}")
    return Loaded(path, state)


def check_goes_on(loaded: Loaded) -> None:
    """Raise CheckpointError where there are weights alone but a training is to go on; say what they are good for."""
    if "optimizer" not in loaded.state:
        use = "start one from them with --init-from (and --cfg), or measure them with --eval"
        raise CheckpointError(f"{loaded.path}: holds weights alone, no training to go on with: {use}")


@contextmanager
def understanding(path: Path) -> Iterator[None]:
    """In the body, the content of a checkpoint is put to use, which may lack entries or hold something else in them.

    Raises:
        CheckpointError: in place of the error that such an entry causes.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {describe_error(error)}") from error
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path}: its content is not what this program writes ({text})") from error


def adopt_best(directory: Path, source: Path, step: int) -> bool:
    """Give a run that goes on from another one's checkpoint the best checkpoint so far; False if it cannot be had.

    Args:
        directory: of the run; a best checkpoint in it is replaced.
        source: the checkpoint the run goes on from, in another directory.
        step: at which the best metric was measured.
    """
    for candidate in (source.with_name(BEST), source):
        try:
            found = load(candidate).state["position"]["step"]
        except (CheckpointError, LookupError, TypeError):
            continue
        if found == step:
            _link_or_copy(candidate, directory / BEST)
            return True
    return False


def find_latest(directory: Path) -> tuple[Loaded | None, list[str]]:
    """The newest readable checkpoint of a run directory, None if it holds none, and what was wrong with newer ones.

    Raises:
        CheckpointError: if there are checkpoints, but none can be read.
    """
    problems: list[str] = []
    for name in (LAST, PREVIOUS, BEST):
        if (directory / name).exists():
            try:
                return load(directory / name), problems
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError(problems[0])
    return None, []


def load_evaluated_weights(model: nn.Module, loaded: Loaded) -> None:
    """Copy the weights that training evaluates into a model: the averaged ones, where the checkpoint holds any.

    Raises:
        CheckpointError: if the checkpoint is for another model.
    """
    averaged = loaded.state.get("ema")
    load_weights(model, loaded.state["weights"] if averaged is None else averaged["weights"], loaded.path)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a model of exactly the same parameters.

    Raises:
        CheckpointError: if the checkpoint is for another model; says how they differ.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    reshaped = [name for name in expected if name in weights and expected[name].shape != weights[name].shape]
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} tensors ({missing[0]}, …)")
    if unexpected:
        parts.append(f"it has {len(unexpected)} others ({unexpected[0]}, …)")
    if reshaped:
        name = reshaped[0]
        shapes = f"{list(weights[name].shape)} instead of {list(expected[name].shape)}"
        parts.append(f"{len(reshaped)} have another shape ({name}: {shapes}, …)")
    if parts:
        raise CheckpointError(f"{source}: is for another model: {'; '.join(parts)}")
    model.load_state_dict(dict(weights))


def check_categories(saved: Sequence[Sequence[Any]], current: Sequence[Sequence[Any]], source: Path) -> None:
    """Refuse a checkpoint whose classes are not those of the annotations.

    Args:
        saved: [id, name] of each class in the checkpoint.
        current: [id, name] of each class in the annotations.
        source: the checkpoint's file, for the message.

    Raises:
        CheckpointError: naming the counts, or the first class that differs.
    """
    old, new = [tuple(entry) for entry in saved], [tuple(entry) for entry in current]
    if old == new:
        return
    if len(old) != len(new):
        difference = f"it has {len(old)} classes, the annotations have {len(new)}"
    else:
        a, b = next((a, b) for a, b in zip(old, new, strict=True) if a != b)
        difference = " ".join(f"its class {a[1]!r} (id {a[0]}) is {b[1]!r} (id {b[0]}) in the annotations".split())
    raise CheckpointError(f"{source}: is for other classes: {difference} (to fine-tune on other classes: --init-from)")


def check_data(saved: Mapping[str, Any] | None, current: Mapping[str, Any], source: Path) -> None:
    """Refuse a checkpoint whose steps were made of other images, or of more or fewer: its position means nothing here.

    Args:
        saved: ``batch_size`` (of the global batch), ``one_orientation`` (images in a row; 1 where it is missing),
            ``images`` (in the training set) and ``image_ids`` (their hash, in order) in the checkpoint; None in older
            ones, which do not say.
        current: the same of this run.
        source: the checkpoint's file, for the message.

    Raises:
        CheckpointError: naming what differs.
    """
    if saved is None:
        return
    saved, current = ({"one_orientation": 1, **description} for description in (saved, current))
    if saved == current:
        return
    key = next((key for key in ("batch_size", "one_orientation") if saved[key] != current[key]), None)
    if key is not None:
        difference = f"with data.{key}={saved[key]}, this run has {current[key]}"
    elif saved["images"] != current["images"]:
        difference = f"on {saved['images']} images, this run has {current['images']}"
    else:
        difference = "on other images, or in another order of the file"
    raise CheckpointError(
        f"{source}: was trained {difference}: resume with the same data and data.batch_size, or use --init-from"
    )


def _damage(path: Path) -> str | None:
    """What is wrong with an archive's bytes, by its checksums (which torch.load does not compare)."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # decompression, encryption, sizes, names: all from bytes that are not as written
        return f"damaged: {describe_error(error)}"
    return None if damaged is None else f"damaged at {damaged!r:.80}"


def _usable_beside(path: Path, *, itself: bool = False) -> str:
    """End of an error message that lists the readable checkpoints in the same directory, others or also this one."""
    others = [other for other in sorted(path.parent.glob("checkpoint_*.pth")) if itself or other != path]
    usable = [str(other) for other in others if zipfile.is_zipfile(other) and _damage(other) is None]
    return f"; usable beside it: {', '.join(usable)}" if usable else "; there is no usable one beside it"
