"""Whatever a checkpoint file holds: it is read and used, or refused in one line; nothing else in the run is touched."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_training import Options, build, train

from engine import checkpoint
from engine.checkpoint import LAST, CheckpointError
from engine.trainer import Trainer

many = fuzzing(120)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps with everything on."""
    directory = tmp_path_factory.mktemp("run")
    train(Options(directory=str(directory), steps=2, precision="fp16", batch_norm=True))
    return directory


@pytest.fixture(scope="module")
def trainer(run: Path) -> Trainer:
    """Of the same run, to put checkpoints into."""
    return build(Options(directory=str(run), steps=2, precision="fp16", batch_norm=True))


@pytest.fixture(scope="module")
def trainer_state(run: Path) -> dict[str, Any]:
    """What the run's last checkpoint holds."""
    return checkpoint.load(run / LAST).state


def check(path: Path, use: Callable[[checkpoint.Loaded], Any]) -> None:
    """Success, or one line that names the file."""
    message = str(path)
    try:
        use(checkpoint.load(path))
    except ValueError as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    assert str(path) in message


@many
@given(data=st.data())
def test_bytes_changed(run: Path, trainer: Trainer, data: st.DataObject) -> None:
    whole = (run / LAST).read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    # The directory of the archive, where all lengths and offsets are, is at its end.
    at = data.draw(st.sampled_from([at, max(0, len(whole) - at % 4000), at % 2000]))
    kind = data.draw(st.sampled_from(["cut", "flip", "junk", "zeros", "drop", "repeat"]))
    length = data.draw(st.integers(1, 64))
    changed = {
        "cut": whole[:at],
        "flip": whole[:at] + bytes(byte ^ 1 << length % 8 for byte in whole[at : at + 1]) + whole[at + 1 :],
        "junk": whole[:at] + data.draw(st.binary(min_size=1, max_size=length)) + whole[at + length :],
        "zeros": whole[:at] + bytes(length) + whole[at + length :],
        "drop": whole[:at] + whole[at + length :],
        "repeat": whole[: at + length] + whole[at:],
    }[kind]
    path = run / "changed.pth"
    path.write_bytes(changed)
    check(path, trainer.load_state_dict)
    assert (run / LAST).read_bytes() == whole


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested dictionaries and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


@many
@given(data=st.data())
def test_entries_changed(run: Path, trainer: Trainer, trainer_state: dict[str, Any], data: st.DataObject) -> None:
    """Well-formed files with another content, as another version or program may write them."""
    state = copy.deepcopy(trainer_state)
    *parents, last = data.draw(st.sampled_from([place for place in places(state) if place]))
    holder = state
    for key in parents:
        holder = holder[key]
    other = st.sampled_from([None, -1, 2**70, 0.5, "x", [], {}, [1], {"x": 1}, torch.zeros(0), torch.zeros(3, 3)])
    if data.draw(st.booleans()):
        holder[last] = data.draw(other)
    else:
        del holder[last]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = run / "changed.pth"
    path.write_bytes(buffer.getvalue())
    check(path, trainer.load_state_dict)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", torch.zeros(0)), ("format", torch.zeros(3, 3)), ("categories", [[1, torch.zeros(3, 3)]] * 3)],
)
def test_tensors_where_there_should_be_none(
    run: Path, trainer: Trainer, trainer_state: dict[str, Any], key: str, value: Any
) -> None:
    torch.save({**trainer_state, key: value}, run / "changed.pth")
    check(run / "changed.pth", trainer.load_state_dict)


def test_a_changed_name_in_the_archive_is_shown_on_one_line(run: Path, trainer: Trainer) -> None:
    """Names stand at each entry and in the directory at the end; a line break comes into the latter."""
    whole = (run / LAST).read_bytes()
    at = whole.rindex(b"/data/3") + len(b"/data/3")
    (run / "changed.pth").write_bytes(whole[: at - 1] + b"\n" + whole[at:])
    with pytest.raises(CheckpointError, match=r"damaged at 'archive/data/.*n"):
        checkpoint.load(run / "changed.pth")
    check(run / "changed.pth", trainer.load_state_dict)


def test_a_folder_is_no_checkpoint(run: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"is a directory, name a file in it; usable beside it: .*{LAST}"):
        checkpoint.load(run)
