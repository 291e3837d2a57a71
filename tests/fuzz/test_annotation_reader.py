"""Whatever an annotation file holds: one line or success, and piece by piece the same as in one go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing, mutated

from datasets.annotations import pack_annotations, read_categories
from engine.coco_metrics import read_ground_truth
from ops import coco_file
from ops.coco_columns import AnnotationColumns, annotation_columns
from ops.coco_file import from_content, read_coco_file

PIECES = (16, 100, 700, 2**23)
"""Bytes of a piece: smaller than an entry, of about one, of several, larger than the file."""


def annotation(number: int, **fields: Any) -> dict[str, Any]:
    box = [1.5 * number, 2, 10 + number, 12.25]
    usual = {"id": number, "image_id": 1 + number % 2, "category_id": 3 + number % 2, "bbox": box, "area": 99.5}
    return {"segmentation": [[1.0, 2.5] * 4], "iscrowd": number % 2, **usual, **fields}


def content(**fields: Any) -> dict[str, Any]:
    images = [{"id": i, "file_name": f"fö{i}.jpg", "width": 64, "height": 48, "url": "http://x/{},["} for i in (1, 2)]
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": 'd"og\\'}]
    annotations = [annotation(number) for number in range(8)]
    return {"info": {"images": [1, {"annotations": []}]}, "images": images, "annotations": annotations, **fields} | {
        "categories": categories
    }


ODD = (
    annotation(1, iscrowd="false"),
    annotation(2, segmentation={"counts": "a},{b]", "size": [4, 4]}),
    annotation(3, attributes=[{"a": 1}, {"b": [{}, {}]}], image_id=1.0),
    annotation(4, id=None, bbox=["1", 2, 3, 4]),
    annotation(5, bbox=[float("nan"), 1, 2, 3], category_id=True),
    annotation(6, id=2**80, image_id="1", area=0),
)
CONTENTS = (content(), content(annotations=[*ODD, annotation(7)]), content(annotations=[]))
ORIGINALS = (
    *(json.dumps(value, ensure_ascii=False).encode() for value in CONTENTS),
    *(json.dumps(value, ensure_ascii=False, indent=1).encode() for value in CONTENTS),
    json.dumps(dict(reversed(content().items()))).encode("utf-8-sig"),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("annotations") / "file.json"


def outcome(action: Any, *arguments: Any) -> Any:
    """What an action returns, or its message, which is one line."""
    try:
        return action(*arguments)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    return message


def assert_same(left: AnnotationColumns, right: AnnotationColumns) -> None:
    for one, other in zip(left[:-1], right[:-1], strict=True):
        np.testing.assert_array_equal(one, other)
    assert left.shown == right.shown


@fuzzing(500)
@given(mutated(ORIGINALS), st.sampled_from(PIECES))
def test_files_are_read_as_a_whole_would_be_or_refused_in_one_line(path: Path, data: bytes, piece: int) -> None:
    path.write_bytes(data)
    try:
        whole = from_content(json.loads(data.decode("utf-8-sig"), object_hook=coco_file._without_segmentation))
    except (ValueError, RecursionError):
        whole = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_file, "PIECE", piece)
        found = outcome(read_coco_file, path)
    assert path.read_bytes() == data
    if isinstance(found, str):
        assert whole is None
        assert str(path) in found
        return
    assert whole is not None
    assert_same(found.annotations, whole.annotations)
    assert (found.images, repr(found.categories)) == (whole.images, repr(whole.categories))
    categories = outcome(read_categories, found, path)
    if not isinstance(categories, str):
        outcome(pack_annotations, found, path, categories)
    outcome(read_ground_truth, path)


@fuzzing(100)
@given(st.lists(st.sampled_from([annotation(number) for number in range(4)] + list(ODD)), max_size=6), st.randoms())
def test_columns_do_not_depend_on_what_stands_beside_an_entry(entries: list[dict[str, Any]], random: Any) -> None:
    """The truth: each entry on its own."""
    together = annotation_columns(entries)
    for index, entry in enumerate(entries):
        (one,) = [annotation_columns([entry])]
        for column, single in zip(together[:-1], one[:-1], strict=True):
            np.testing.assert_array_equal(column[index], single[0])


@pytest.mark.parametrize("piece", PIECES)
def test_an_entry_without_its_id_is_called_the_same_in_any_piece(path: Path, piece: int) -> None:
    path.write_bytes(ORIGINALS[0].replace(b'"id": 6', b'"d": 6'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_file, "PIECE", piece)
        assert read_coco_file(path).annotations.shown == {6: "annotation None"}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("change", [(b"}, {", b"} }, {"), (b'"annotations": [', b'"annotations":[ [')])
def test_brackets_of_the_wrong_kind_are_not_skipped(path: Path, change: tuple[bytes, bytes], piece: int) -> None:
    path.write_bytes(ORIGINALS[0].replace(*change, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_file, "PIECE", piece)
        assert "is not a JSON file" in outcome(read_coco_file, path)
