"""Pictures of a run, as far as numbers can say it; the pictures themselves are looked at by people."""

import json
import logging
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image

from engine import dispensable, lettering
from engine.lettering import lettered
from engine.pictures import AnnotatedImage, _smooth, draw_curves, draw_predictions
from engine.run_log import Records
from structures import Detections


def test_smoothing_neither_lags_behind_nor_moves_a_straight_line() -> None:
    ramp = [0.5 * i for i in range(100)]
    assert _smooth(ramp) == pytest.approx(ramp)
    generator = random.Random(0)
    noisy = [value + generator.gauss(0, 1) for value in ramp]
    before, after = (
        sum((value - true) ** 2 for value, true in zip(values, ramp, strict=True)) for values in (noisy, _smooth(noisy))
    )
    assert after < before / 3
    assert (_smooth([]), _smooth([2.0])) == ([], [2.0])


@pytest.mark.usefixtures("with_curves")
def test_curves_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    """Steps that were taken twice are drawn once; a run without evaluations, or without anything, is drawn too."""
    records = [{"kind": "train", "step": step, "loss": 9.0 - step, "lr": 1e-4} for step in (1, 2, 3, 2, 3, 4)]
    sizes = set()
    for count in (0, 1, 6):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:count]))
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        sizes.add(tuple(decode_image(tmp_path / "curves.png").shape))
    assert len(sizes) == 1


def picture_of(path: Path, names: list[str]) -> np.ndarray:
    """The picture of one grey image with an object of each class."""
    boxes = torch.tensor([[10.0, 10.0 + 20 * i, 190.0, 28.0 + 20 * i] for i in range(len(names))])
    labels = torch.arange(len(names))
    found = Detections(torch.full((len(names),), 0.9), labels, boxes)
    pixels = np.full((20 * len(names) + 20, 200, 3), 128, dtype=np.uint8)
    draw_predictions(path, [AnnotatedImage(pixels, labels, boxes, found)], names)
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_class_names_are_drawn_as_they_are_in_any_script(tmp_path: Path) -> None:
    """No formula, no warning of a missing letter; what no font has is named by its number."""
    names = ["$5_$", "$10", "$a_b$ $", "Größe", "пешеход", "two\nlines", "", "\\frac{", "\U0001d504\U0001d505"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = picture_of(tmp_path / "names.png", names)
        other = picture_of(tmp_path / "others.png", ["5_", *names[1:]])
    assert not np.array_equal(first, other)


def test_names_that_no_font_has_are_numbers_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of two letters that Unicode leaves to private use, no font has a sign."""
    names = ["cat", "\U000f1234\U000f4321", "Größe", "\U0001d504"]
    with caplog.at_level(logging.WARNING):
        plain, private, sharp, fraktur = lettered(names)
        assert lettered(names)[1] == private
    assert (plain.text, private.text, sharp.text) == ("cat", "class 1", "Größe")
    assert plain.font == sharp.font == private.font
    assert fraktur.text in (
        "\U0001d504",
        "class 3",
    )  # matplotlib brings a font that has it, but not the digits beside it
    (record,) = caplog.records
    assert "class 1, '" in record.getMessage()


def test_another_font_is_taken_where_it_has_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"first": set("abc 0123456789.class"), "second": set("abcxyz 0123456789.")}
    monkeypatch.setattr(lettering, "_font_files", lambda: list(have))
    monkeypatch.setattr(lettering, "_has", lambda file, text: set(text) <= have[file])
    assert lettered(["ab", "xa", "é"]) == [("ab", "first"), ("xa", "second"), ("class 2", "first")]


def test_pictures_without_any_font_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "_font_files", list)
    assert lettered(["a picture without fonts"]) == [("class 0", None)]
    picture_of(tmp_path / "names.png", ["another without fonts"])


def test_what_is_dispensable_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispensable, "_said", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with dispensable.dispensable("curves.png"):
                raise KeyError("a bug")
            with dispensable.dispensable("another.png"):
                pass
    (record,) = caplog.records
    assert record.getMessage() == "curves.png could not be written, the run goes on without (KeyError: 'a bug')"


def test_records_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, or not able to write: metrics.jsonl is written all the same."""
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    records = Records(tmp_path, 0, ["tensorboard"])
    records.write("train", 1, {"loss": 1.0})
    records.picture(tmp_path / "none.png", 1)
    records.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
