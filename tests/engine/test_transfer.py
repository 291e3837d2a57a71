"""Starting from the weights of another run."""

from pathlib import Path

import pytest
import torch
from tiny_training import TinyDetector
from torch import nn

from engine.checkpoint import CheckpointError
from engine.runs.transfer import initialise_from

OLD = [[1, "cat"], [2, "dog"], [7, "cow"]]
BY_CLASS = ("class_head", "label_embedding")


class Net(nn.Module):
    """What matters of a detector: class rows, a row beyond the classes, and the rest."""

    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)
        self.neck = nn.Linear(width, width)
        self.class_head = nn.ModuleList([nn.Linear(width, classes)])
        self.label_embedding = nn.Embedding(classes + 1, width)


def save(path: Path, model: nn.Module, averaged: bool = False) -> Path:
    weights = model.state_dict()
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    content = {"format": 1, "weights": weights, "ema": {"weights": zeros} if averaged else None, "categories": OLD}
    torch.save(content, path)
    return path


def test_same_classes_take_over_everything(tmp_path: Path) -> None:
    old, new = Net(3), Net(3)
    result = initialise_from(new, save(tmp_path / "a.pth", old), OLD, by_class=BY_CLASS)
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())
    assert len(result.copied) == len(new.state_dict())
    assert result.kept_classes == ["cat", "dog", "cow"]
    assert not result.new_classes + result.fresh + result.unused + result.by_class


def test_rows_follow_the_names_of_classes(tmp_path: Path) -> None:
    old, new = Net(3), Net(4)
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    categories = [[3, "cow"], [4, "hen"], [5, "cat"], [9, "pig"]]
    result = initialise_from(new, save(tmp_path / "a.pth", old), categories, by_class=BY_CLASS)
    for name in ("class_head.0.weight", "class_head.0.bias", "label_embedding.weight"):
        was, now = old.state_dict()[name], new.state_dict()[name]
        assert torch.equal(now[0], was[2])
        assert torch.equal(now[2], was[0])
        assert torch.equal(now[1], fresh[name][1])
        assert torch.equal(now[3], fresh[name][3])
    assert torch.equal(new.label_embedding.weight[4], old.label_embedding.weight[3]), "the row beyond the classes"
    assert torch.equal(new.body.weight, old.body.weight)
    assert (result.kept_classes, result.new_classes) == (["cow", "cat"], ["hen", "pig"])
    assert "classes made anew: hen, pig" in result.report()


def test_equal_shapes_with_other_classes_are_not_taken_as_they_are(tmp_path: Path) -> None:
    old, new = Net(3), Net(3)
    before = new.class_head[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    initialise_from(new, save(tmp_path / "a.pth", old), [[1, "a"], [2, "b"], [3, "dog"]], by_class=BY_CLASS)
    after = new.state_dict()["class_head.0.weight"]
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[2], old.state_dict()["class_head.0.weight"][1])


def test_only_the_named_modules_have_rows_of_classes(tmp_path: Path) -> None:
    """Whatever else happens to have as many rows as there are classes is taken as it is."""
    old, new = Net(3), Net(3)
    fresh = new.label_embedding.weight.detach().clone()
    result = initialise_from(
        new, save(tmp_path / "a.pth", old), [[1, "cow"], [2, "dog"], [3, "hen"]], by_class=("label_embedding",)
    )
    assert result.by_class == ["label_embedding.weight"]
    assert torch.equal(new.state_dict()["class_head.0.weight"], old.state_dict()["class_head.0.weight"])
    assert torch.equal(new.label_embedding.weight[0], old.label_embedding.weight[2])
    assert torch.equal(new.label_embedding.weight[2], fresh[2])


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    new = Net(3)
    initialise_from(new, save(tmp_path / "a.pth", Net(3), averaged=True), OLD, by_class=BY_CLASS)
    assert not bool(new.body.weight.any())


def test_plain_state_dicts_and_partial_fits(tmp_path: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__(3)
            self.neck = nn.Linear(4, 8)
            self.extra = nn.Linear(1, 1)

    torch.save({"model": Other().state_dict()}, tmp_path / "plain.pth")
    result = initialise_from(Net(3), tmp_path / "plain.pth", OLD, by_class=BY_CLASS)
    assert result.fresh == ["neck.weight", "neck.bias"]
    assert sorted(result.unused) == ["extra.bias", "extra.weight", "neck.bias", "neck.weight"]


def test_a_required_part_must_be_there_as_a_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", Net(3))
    other = Net(3)
    other.neck = nn.Linear(4, 8)
    assert initialise_from(other, path, OLD, by_class=BY_CLASS, required="body").fresh == ["neck.weight", "neck.bias"]
    with pytest.raises(CheckpointError, match=r"2 tensors of neck are absent or of another shape \(neck.weight, …\)"):
        initialise_from(other, path, OLD, by_class=BY_CLASS, required="neck")


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"only \d of 9 tensors fit|only \d of \d tensors fit"):
        initialise_from(TinyDetector(), save(tmp_path / "a.pth", Net(3)), OLD, by_class=BY_CLASS)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        initialise_from(Net(3), tmp_path / "list.pth", OLD, by_class=BY_CLASS)
