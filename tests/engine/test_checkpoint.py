"""Checkpoint files: replaced as a whole, read without executing anything, refused in one line."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import checkpoint
from engine.checkpoint import CheckpointError


def state(step: int = 1) -> dict[str, Any]:
    return {"weights": {"w": torch.arange(1000.0) + step}, "position": {"step": step}}


def step_of(path: Path) -> int:
    return int(checkpoint.load(path).state["position"]["step"])


def test_last_previous_and_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, state(step), best=step == 2)
    names = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)
    assert [step_of(tmp_path / name) for name in names] == [3, 2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_best_is_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on file systems without links; and what happens to the last one later does not reach it."""

    def no_links(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.write(tmp_path, state(1), best=True)
    checkpoint.write(tmp_path, state(2))
    assert step_of(tmp_path / checkpoint.BEST) == 1


@pytest.mark.parametrize("at", ["link", "replace", "fsync"])
def test_failure_at_any_point_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    checkpoint.write(tmp_path, state(1), best=True)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, at, fail)
    if at == "link":
        monkeypatch.setattr(checkpoint.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.write(tmp_path, state(2), best=True)
    monkeypatch.undo()
    found, _ = checkpoint.find_latest(tmp_path)
    assert found is not None
    assert found.state["position"]["step"] == 1
    assert step_of(tmp_path / checkpoint.BEST) == 1
    checkpoint.write(tmp_path, state(3))
    assert step_of(tmp_path / checkpoint.LAST) == 3


def test_write_to_a_full_device_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full refuses every write, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    (tmp_path / f".{checkpoint.LAST}.writing").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"cannot write a checkpoint: No space left on device \(there is no earlier one\)"
    ):
        checkpoint.write(tmp_path, state())
    assert list(tmp_path.iterdir()) == []


def test_truncated_anywhere_is_one_line_that_names_what_is_usable(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(1))
    checkpoint.write(tmp_path, state(2))
    path = tmp_path / checkpoint.LAST
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: cannot be read as a checkpoint (")
        assert message.endswith(f"; usable beside it: {tmp_path / checkpoint.PREVIOUS}")
        assert "\n" not in message
        found, problems = checkpoint.find_latest(tmp_path)
        assert found is not None
        assert found.path.name == checkpoint.PREVIOUS
        assert len(problems) == 1


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(1))
    path = tmp_path / checkpoint.LAST
    content = bytearray(path.read_bytes())
    index = content.index(torch.arange(1000.0).add(1).numpy().tobytes()[:64])
    content[index + 17] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged at .*there is no usable one beside it"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.find_latest(tmp_path)


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o700)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path: Path, archive: bool) -> None:
    mark, path = tmp_path / "executed", tmp_path / "foreign.pth"
    content = {"format": checkpoint.FORMAT, "weights": {}, "harm": Harmful(mark)}
    if archive:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"foreign.pth: cannot be read as a checkpoint \(.+\); there is no usable"
    ):
        checkpoint.load(path)
    assert not mark.exists()


def test_foreign_newer_and_absent_files(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "foreign.pth")
    torch.save({"format": 99, "weights": {}}, tmp_path / "newer.pth")
    (tmp_path / "text.pth").write_text("hello\n")
    for name, expected in {
        "foreign": r"not a checkpoint of this program \(for its weights only: --init-from\)",
        "newer": "has checkpoint format 99, this program reads 1",
        "absent": "there is no such checkpoint",
        "text": "truncated or no checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}.pth: .*{expected}"):
            checkpoint.load(tmp_path / f"{name}.pth")
    assert checkpoint.find_latest(tmp_path) == (None, [])


def test_checkpoint_for_another_model() -> None:
    path = Path("other.pth")
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    weights = dict(model.state_dict())
    weights["2.weight"] = weights.pop("1.bias")
    weights["0.weight"] = torch.zeros(5, 2)
    expected = (
        r"other.pth: is for another model: it lacks 1 tensors \(1.bias, …\); it has 1 others \(2.weight, …\); "
        r"1 have another shape \(0.weight: \[5, 2\] instead of \[3, 2\], …\)"
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.load_weights(model, weights, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_checkpoint_for_other_classes() -> None:
    path, saved = Path("a.pth"), [[1, "cat"], [5, "dog"]]
    checkpoint.check_categories(saved, [(1, "cat"), (5, "dog")], path)
    with pytest.raises(CheckpointError, match="it has 2 classes, the annotations have 1"):
        checkpoint.check_categories(saved, [(1, "cat")], path)
    with pytest.raises(CheckpointError, match=r"its class 'dog' \(id 5\) is 'cow' \(id 5\) in the annotations"):
        checkpoint.check_categories(saved, [(1, "cat"), (5, "cow")], path)
