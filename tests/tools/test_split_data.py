import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import split_data


def content(images=200, seed=0):
    """Videos of five images; class 3 is rare."""
    rng = random.Random(seed)
    annotations = []
    for image in range(images):
        for _ in range(rng.randrange(4)):
            annotations.append(
                {"id": len(annotations), "image_id": image, "category_id": rng.choice([1] * 15 + [2] * 4 + [3])}
            )
    entries = [{"id": i, "file_name": f"ä{i}.jpg", "video": i // 5} for i in range(images)]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    return {"info": {"year": 2026}, "images": entries, "annotations": annotations, "categories": categories}


def run(tmp_path, *arguments, data=None):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(data or content()))
    code = split_data.main([str(path), "--out", str(tmp_path / "out"), *arguments])
    return code, {
        p.stem.removeprefix("instances_"): json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")
    }


@pytest.mark.parametrize("grouping", [[], ["--group-by", "video"]])
def test_every_entry_is_in_one_split_and_every_class_in_its_share(tmp_path, grouping, capsys):
    whole = content()
    code, parts = run(tmp_path, "--splits", "train=0.7", "val=0.2", "test=0.1", *grouping)
    assert code == 0
    assert "instances_val.json: " in capsys.readouterr().out
    for key in ("images", "annotations"):
        assert sorted(e["id"] for part in parts.values() for e in part[key]) == [e["id"] for e in whole[key]]
    totals = Counter(a["category_id"] for a in whole["annotations"])
    slack = 0.03 if not grouping else 0.12
    for name, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        part = parts[name]
        assert part["info"] == whole["info"]
        assert part["categories"] == whole["categories"]
        own = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= own
        assert len(own) / 200 == pytest.approx(share, abs=slack)
        counts = Counter(a["category_id"] for a in part["annotations"])
        for category, total in totals.items():
            assert counts[category] / total == pytest.approx(share, abs=slack + 2 / total)
    if grouping:
        videos = [{image["video"] for image in part["images"]} for part in parts.values()]
        assert sum(map(len, videos)) == len(set.union(*videos)) == 40


def test_equal_seeds_split_equally_and_others_do_not(tmp_path):
    found = []
    for name, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        (tmp_path / name).mkdir()
        found.append(run(tmp_path / name, "--seed", seed)[1])
    assert found[0] == found[1]
    assert found[0] != found[2]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.dictionaries(st.sampled_from("abc"), st.integers(1, 3))), max_size=25),
    st.booleans(),
)
def test_whatever_is_dealt_is_dealt_once(groups, stratify):
    chosen = split_data.deal(groups, [0.6, 0.4], seed=1, stratify=stratify)
    assert len(chosen) == len(groups)
    assert set(chosen) <= {0, 1}
    images = sum(size for size, _ in groups)
    if not stratify:
        assert abs(sum(size for (size, _), s in zip(groups, chosen, strict=True) if s == 0) - 0.6 * images) <= 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--splits", "train"], "as train=0.8"),
        (["--splits", "train=0.5", "val=0.2"], "add up to 1"),
        (["--splits", "a/b=0.5", "val=0.5"], "as train=0.8"),
        (["--group-by", "site"], "has no field 'site'"),
    ],
)
def test_refusals_are_one_line(tmp_path, arguments, said, capsys):
    assert run(tmp_path, *arguments) == (2, {})
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_nothing_is_overwritten_and_what_is_no_coco_file_is_refused(tmp_path, capsys):
    assert run(tmp_path)[0] == 0
    assert run(tmp_path)[0] == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    for data in ([1], {"images": [{"file_name": "x"}]}, {"annotations": 3}):
        assert run(tmp_path / "other", data=data)[0] == 2
        assert "not a COCO file" in capsys.readouterr().err
    assert split_data.main([str(tmp_path / "gone.json")]) == 2
