import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import annotations as annotation_reader
from datasets.annotations import (
    MAX_EXAMPLES,
    Category,
    pack_annotations,
    read_categories,
)
from engine.coco_metrics import read_ground_truth
from engine.evaluator import Evaluator
from ops.coco_file import from_content, read_coco_file
from structures import Detections

CATEGORIES = (Category(4, "cat"), Category(9, "dog"))


def image(image_id=1, **fields):
    return {"id": image_id, "file_name": f"{image_id}.jpg", "height": 100, "width": 200, **fields}


def box(annotation_id, bbox, image_id=1, category_id=4, **fields):
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": bbox, **fields}


def pack(annotations, images=None):
    content = {"images": images or [image()], "annotations": annotations, "categories": []}
    return pack_annotations(from_content(content), "file.json", CATEGORIES)


GOOD = [10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize(
    ("annotation", "finding"),
    [
        (box(1, [10, 20, 0, 40]), "zero or negative size"),
        (box(1, [10, 20, 30, -1]), "zero or negative size"),
        (box(1, [10, 20, 1e-30, 40]), "outside the image"),  # no width left in float32
        (box(1, [10, 20, math.nan, 40]), "NaN or infinity"),
        (box(1, [math.inf, 20, 30, 40]), "NaN or infinity"),
        (box(1, [10**400, 20, 30, 40]), "NaN or infinity"),
        (box(1, [10, 20, 30]), "not four numbers"),
        (box(1, [10, 20, 30, "40"]), "not four numbers"),
        (box(1, None), "not four numbers"),
        ({"id": 1, "image_id": 1, "category_id": 4}, "not four numbers"),
        (box(1, [200, 20, 30, 40]), "outside the image"),
        (box(1, [-50, 20, 50, 40]), "outside the image"),
        (box(1, [10, 150, 30, 40]), "outside the image"),
        (box(1, GOOD, iscrowd=1), "crowd"),
        (box(1, GOOD, category_id=5), "unknown category"),
        (box(1, GOOD, category_id=None), "category_id is no whole number"),
        (box(1, GOOD, category_id="4"), "category_id is no whole number"),
        (box(1, GOOD, image_id=2), "unknown image"),
        (box(1, GOOD, image_id="1"), "image_id is no whole number"),
        (box(1, GOOD, image_id=1.5), "image_id is no whole number"),
        ("a string", "not a mapping"),
    ],
)
def test_unusable_annotations_are_dropped_and_counted(annotation, finding):
    packed, report = pack([annotation, box(2, GOOD)])
    assert packed.boxes.tolist() == [[10, 20, 40, 60]]
    (line,) = report.lines()
    assert finding in line
    assert "dropped" in line
    assert line.startswith("1 x ")


@pytest.mark.parametrize(
    ("bbox", "clipped", "reported"),
    [
        ([-10, -20, 50, 60], [0, 0, 40, 40], True),
        ([190, 90, 50, 60], [190, 90, 200, 100], True),
        ([-0.5, 20, 30, 40], [0, 20, 29.5, 60], False),  # rounding of an annotation tool
        ([0, 0, 200, 100], [0, 0, 200, 100], False),
    ],
)
def test_boxes_beyond_the_image_are_clipped(bbox, clipped, reported):
    packed, report = pack([box(1, bbox)])
    assert packed.boxes.tolist() == [clipped]
    assert bool(report) == reported


def test_ids_may_be_zero_gapped_missing_or_repeated():
    images = [image(7), image(0), image(3)]
    annotations = [
        box(0, GOOD, 0),
        box(5, GOOD, 7),
        box(5, [1, 1, 5, 5], 7),
        box(None, GOOD, 3),
        box("x", [2, 2, 3, 3], 3),
    ]
    packed, report = pack(annotations, images)
    assert packed.image_ids.tolist() == [0, 3, 7]
    assert packed.box_ends.tolist() == [1, 3, 5]
    assert report.counts == {"annotation id given twice, kept": 1, "annotation without an integer id, kept": 2}


def test_exact_repetitions_are_kept_once():
    packed, report = pack([box(1, GOOD), box(2, GOOD), box(3, GOOD, category_id=9)])
    assert packed.labels.tolist() == [0, 1]
    assert report.counts == {"box given twice, kept once": 1}


def test_labels_follow_the_ids_not_the_order_in_the_file():
    content = {"images": [], "categories": [{"id": 9, "name": "dog"}, {"id": 4}]}
    assert read_categories(from_content(content), "f") == (Category(4, "4"), Category(9, "dog"))


def test_one_class():
    content = {"images": [image()], "annotations": [box(1, GOOD)], "categories": [{"id": 4, "name": "cat"}]}
    content = from_content(content)
    categories = read_categories(content, "f")
    packed, _ = pack_annotations(content, "f", categories)
    assert packed.labels.tolist() == [0]


def test_a_thousand_boxes_in_an_image():
    packed, report = pack([box(i, [i / 10, 1, 20, 30]) for i in range(1000)])
    boxes, labels = packed.targets(0)
    assert boxes.shape == (1000, 4)
    assert labels.shape == (1000,)
    assert not report


def test_images_without_annotations_are_kept():
    packed, _ = pack([box(1, GOOD, 2)], [image(1), image(2), image(3)])
    assert [len(packed.targets(index)[1]) for index in range(3)] == [0, 1, 0]


def test_unusable_image_entries_are_dropped_and_counted():
    images = [
        image(1),
        {"file_name": "a"},
        {"id": 2, "file_name": "\ud800"},
        "text",
        image(1),
        image(3, height=None),
        image(4, width=-5),
    ]
    packed, report = pack([], images)
    assert packed.image_ids.tolist() == [1, 3, 4]
    assert packed.sizes.tolist() == [[100, 200], [0, 0], [0, 0]]
    assert report.counts == {
        "image without an id, dropped": 2,
        "image without a file name, dropped": 1,
        "image listed twice, kept once": 1,
        "image without a usable width and height, taken from its file": 2,
    }


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([image(1), image(1, file_name="other.jpg")], "image id 1 is given to both"),
        ([image("seven")], "must be integers"),
        ([image(2**53)], "must be integers"),
        ([{"id": 1}], "no usable image"),
    ],
)
def test_contradictory_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message) as error:
        pack([], images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "no 'categories'"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "given twice"),
        ([{"name": "a"}], "no integer 'id'"),
        (["a"], "no integer 'id'"),
    ],
)
def test_unusable_categories_are_refused(categories, message):
    with pytest.raises(ValueError, match=message):
        read_categories(from_content({"images": [], "categories": categories}), "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("", "not a JSON file"),
        ("\x00\xff", "not a JSON file"),
        ("[1]", "no list of 'images'"),
        ("{}", "no list of 'images'"),
        ('{"images": [], "annotations": {}}', "'annotations' is not a list"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        read_coco_file(path)
    assert "\n" not in str(error.value)


def test_segmentations_are_not_kept(tmp_path):
    path = tmp_path / "a.json"
    content = {"images": [image()], "annotations": [box(1, GOOD, segmentation=[[1.0] * 1000])]}
    path.write_text(json.dumps(content))
    assert read_coco_file(path).annotations.boxes_xywh.tolist() == [GOOD]


def test_the_report_keeps_few_examples():
    _, report = pack([box(i, [10, 20, 0, 40]) for i in range(50)])
    (line,) = report.lines()
    assert line.startswith("50 x ")
    assert line.count("annotation ") == MAX_EXAMPLES


def test_selection_and_pickling_keep_every_field():
    images = [image(i, file_name=f"ordner/bild-{'ä' * i}.jpg") for i in range(5)]
    packed, _ = pack([box(i, [i, i, 10 + i, 10], i % 5) for i in range(12)], images)
    chosen = pickle.loads(pickle.dumps(packed.select(torch.tensor([1, 3, 4]))))
    assert chosen.image_ids.tolist() == [1, 3, 4]
    for new, old in enumerate((1, 3, 4)):
        assert chosen.file_name(new) == packed.file_name(old) == f"ordner/bild-{'ä' * old}.jpg"
        assert chosen.file_names()[new] == chosen.file_name(new)
        assert all(torch.equal(a, b) for a, b in zip(chosen.targets(new), packed.targets(old), strict=True))
    assert len(packed.select(torch.empty(0, dtype=torch.int64)).image_ids) == 0


def test_targets_are_copies():
    packed, _ = pack([box(1, GOOD)])
    boxes, labels = packed.targets(0)
    boxes.zero_()
    labels.fill_(7)
    assert packed.boxes.tolist() == [[10, 20, 40, 60]]
    assert packed.labels.tolist() == [0]


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**54) | st.floats() | st.sampled_from(["1", "", "x.jpg"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)
ids = st.integers(0, 3) | anything
numbers = st.floats(-50, 300) | st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e38, 1e308, 10**400])
annotations = st.fixed_dictionaries(
    {},
    optional={
        "id": ids,
        "image_id": ids,
        "category_id": st.sampled_from([4, 9]) | anything,
        "bbox": st.lists(numbers, min_size=4, max_size=4) | anything,
        "iscrowd": st.sampled_from([0, 1]) | anything,
    },
)
image_entries = st.fixed_dictionaries(
    {"id": st.integers(0, 3)}, optional={"file_name": st.just("x.jpg"), "height": ids, "width": st.just(200) | anything}
)


@settings(max_examples=150, deadline=None)
@given(st.lists(image_entries, max_size=4), st.lists(annotations | anything, max_size=6))
def test_whatever_the_file_holds_is_cleaned_or_refused_in_one_line(images, entries):
    refusal = ""
    try:
        packed, report = pack_annotations(from_content({"images": images, "annotations": entries}), "f", CATEGORIES)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return
    boxes, labels = packed.boxes, packed.labels
    assert torch.isfinite(boxes).all() or not all(packed.sizes.flatten().tolist())
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert ((labels >= 0) & (labels < 2)).all()
    assert len(boxes) == len(labels) == int(packed.box_ends[-1])
    assert len(boxes) <= len(entries)
    assert all("\n" not in line for line in report.lines())
    for index, (height, width) in enumerate(packed.sizes.tolist()):
        if height:
            own, _ = packed.targets(index)
            assert (own[:, [0, 2]] <= width).all()
            assert (own[:, [1, 3]] <= height).all()


@pytest.mark.parametrize(
    ("flag", "crowd", "finding"),
    [
        (None, False, ""),
        (False, False, ""),
        (0.0, False, ""),
        (1.0, True, ""),
        (True, True, ""),
        ("0", False, "iscrowd written as text"),
        ("false", False, "iscrowd written as text"),
        (" True ", True, "iscrowd written as text"),
        ("1", True, "iscrowd written as text"),
        ("perhaps", True, "iscrowd that is neither 0 nor 1"),
        (2, True, "iscrowd that is neither 0 nor 1"),
        ([0], True, "iscrowd that is neither 0 nor 1"),
    ],
)
def test_training_and_evaluation_read_a_flag_alike(tmp_path, flag, crowd, finding):
    content = {
        "images": [image()],
        "annotations": [box(1, GOOD, iscrowd=flag), box(2, [1, 1, 50, 50])],
        "categories": [{"id": 4, "name": "cat"}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    packed, report = pack_annotations(read_coco_file(path), path, CATEGORIES)
    assert len(packed.labels) == 2 - crowd
    assert [line for line in report.lines() if finding and finding in line] == [
        line for line in report.lines() if "crowd, dropped" not in line
    ]
    for source in (path, content):
        assert read_ground_truth(source).columns["iscrowd"].tolist() == [int(crowd), 0]


def test_whole_numbers_may_be_written_with_a_point():
    packed, report = pack(
        [box(1.0, GOOD, image_id=1.0, category_id=4.0)], [image(1.0, height=100.0, width=200.0, file_name="a.jpg")]
    )
    assert (packed.image_ids.tolist(), packed.sizes.tolist(), len(packed.labels)) == ([1], [[100, 200]], 1)
    assert not report


def test_ids_may_be_negative(tmp_path):
    content = {
        "images": [image(-7), image(3)],
        "annotations": [box(1, GOOD, -7, -1), box(2, GOOD, 3, 5)],
        "categories": [{"id": -1, "name": "ignore"}, {"id": 5, "name": "cat"}],
    }
    file = from_content(content)
    packed, report = pack_annotations(file, "f", read_categories(file, "f"))
    assert (packed.image_ids.tolist(), packed.labels.tolist()) == ([-7, 3], [0, 1])
    assert not report
    evaluator = Evaluator(content, read_categories(file, "f"))
    found = Detections(torch.ones(1), torch.tensor([0]), torch.tensor([[10.0, 20.0, 40.0, 60.0]]))
    evaluator.update([-7, 3], [found, found._replace(labels=torch.tensor([1]))])
    assert evaluator.compute()["per_class"] == {"ignore": pytest.approx(100), "cat": pytest.approx(100)}
    for number in (2**53, -(2**53), 2**70):
        with pytest.raises(ValueError, match="less than 53 bits"):
            read_categories(from_content({**content, "categories": [{"id": number}]}), "f")


@pytest.mark.parametrize("size", [{}, {"height": None, "width": None}])
def test_fractions_for_pixels_are_refused_or_reported(size):
    fractions = [box(i, [0.1 * i, 0.2, 0.3, 0.4]) for i in range(4)]
    with pytest.raises(ValueError, match=r"^file\.json: all 4 boxes end within the first pixel .* must be x, y, width"):
        pack(fractions, [image(**size)])
    _, report = pack([*fractions, box(9, GOOD)], [image(**size)])
    assert report.counts["box that ends within the first pixel (a fraction of the image's size?), kept"] == 4


def test_corners_for_sizes_are_reported():
    corners = [box(i, [10 + i, 20 + i, 120 + 10 * i, 90]) for i in range(4)]
    _, report = pack(corners)
    assert any("as x1, y1, x2, y2 it would fit" in line for line in report.lines())
    _, report = pack([*corners, box(9, [100, 50, 10, 10])])  # that one can only be a size
    assert not any("x1, y1" in line for line in report.lines())


def test_areas_of_zero_are_reported_and_not_used():
    content = {"images": [image()], "annotations": [box(1, GOOD, area=0), box(2, [1, 1, 3, 3], area="9")]}
    content["categories"] = [{"id": 4, "name": "cat"}]
    _, report = pack(content["annotations"])
    assert report.lines() == ["1 x area of zero or less, that of the box is used (annotation 1)"]
    assert read_ground_truth(content).columns["area"].tolist() == [1200, 9]


def test_doubtful_categories_and_files_are_reported():
    names = ["RBC", "RBC", None, "", 7, "\ufeffWBC"]
    content = {
        "images": [image(1), image(2, file_name="1.jpg")],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    file = from_content(content)
    categories = read_categories(file, "f")
    assert [category.name for category in categories] == ["RBC", "RBC", "2", "3", "4", "WBC"]
    assert pack_annotations(file, "f", categories)[1].lines() == [
        "3 x category whose name is empty or no text, named by its id (category 2, category 3, category 4)",
        "2 x category that shares its name with another, kept apart by its id (category 0: RBC, category 1: RBC)",
        "1 x file listed as two images, each with its own boxes (1.jpg: images 1 and 2)",
    ]


ODD_IMAGES = {
    "plain": {},
    "id missing": {"id": None},
    "id as 7.0": {"id": 7.0},
    "id listed twice": {"id": 3},
    "file listed twice": {"file_name": "b.jpg"},
    "no name": {"file_name": ""},
    "name that is a number": {"file_name": 5},
    "name in another script": {"file_name": "写真.jpg"},
    "half a letter": {"file_name": "\ud800.jpg"},
    "height missing": {"height": None},
    "height as 480.0": {"height": 480.0},
    "width of zero": {"width": 0},
    "width of 32 bits": {"width": 2**31},
}


@pytest.mark.parametrize("change", ODD_IMAGES.values(), ids=ODD_IMAGES.keys())
def test_images_are_read_alike_one_by_one_and_by_columns(change, monkeypatch):
    listed = [{"id": 9, "file_name": "a.jpg", "height": 480, "width": 640, **change}]
    listed += [
        {"id": number, "file_name": name, "height": 4, "width": 5} for number, name in ((3, "b.jpg"), (12, "c.jpg"))
    ]
    content = from_content({"images": listed, "annotations": [], "categories": [{"id": 1, "name": "x"}]}, "f")
    assert (annotation_reader._plain_images(content.images) is None) == bool(change)

    def read():
        report = annotation_reader.CleaningReport()
        try:
            images = annotation_reader._read_images(content.images, "f", report)
        except ValueError as error:
            return str(error)
        return images.ids.tolist(), images.sizes.tolist(), images.names, report.counts

    by_columns = read()
    monkeypatch.setattr(annotation_reader, "_plain_images", lambda entries: None)
    assert by_columns == read()
