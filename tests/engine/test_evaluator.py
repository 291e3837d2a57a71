import contextlib
import io
import json
import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from engine import evaluator as evaluator_module
from engine import host_memory
from engine.coco_metrics import STATISTICS, box_metrics, choose_backend, read_ground_truth
from engine.evaluator import Evaluator, evaluate
from structures import Batch, Detections, Images, Targets

CATEGORIES = ((2, "cat"), (5, "dog"), (11, "emu"))
needs_hotcoco = pytest.mark.skipif(find_spec("hotcoco") is None, reason="hotcoco is not installed")
BACKENDS = ["pycocotools", pytest.param("hotcoco", marks=needs_hotcoco)]


def random_case(seed, images=12, objects=6, detections=25, levels=None, crowd=0.15):
    """(annotations, {image id: Detections}): hits, near misses, crowds, images without either, ties of scores."""
    rng = np.random.default_rng(seed)
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in CATEGORIES]}
    found = {}
    for index in range(images):
        image_id = 3 + 4 * index
        content["images"].append({"id": image_id, "file_name": f"{index}.jpg", "width": 400, "height": 400})
        count = int(rng.integers(0, objects + 1))
        boxes = np.concatenate([rng.uniform(0, 250, (count, 2)), np.exp(rng.uniform(2, 5.4, (count, 2)))], axis=1)
        labels = rng.integers(0, 3, count)
        for box, label in zip(boxes, labels, strict=True):
            content["annotations"].append(
                {
                    "id": 50 + 3 * len(content["annotations"]),
                    "image_id": image_id,
                    "category_id": CATEGORIES[label][0],
                    "bbox": box.round(2).tolist(),
                    "area": float(box[2] * box[3] * rng.uniform(0.5, 1)),
                    "iscrowd": int(rng.random() < crowd),
                }
            )
        number = int(rng.integers(0, detections + 1))
        if count:
            source = rng.integers(0, count, number)
            spread = rng.choice([0.0, 0.03, 0.1, 0.5], (number, 1)) * boxes[source][:, [2, 3, 2, 3]]
            guesses = boxes[source] + rng.normal(size=(number, 4)) * spread
            guessed = np.where(rng.random(number) < 0.8, labels[source], rng.integers(0, 3, number))
        else:
            guesses, guessed = rng.uniform(1, 200, (number, 4)), rng.integers(0, 3, number)
        guesses[:, 2:] = guesses[:, :2] + np.abs(guesses[:, 2:]) + 0.1
        scores = rng.random(number)
        if levels:
            scores = (scores * levels).round() / levels
        order = np.argsort(-scores, kind="stable")
        found[image_id] = Detections(
            torch.tensor(scores[order], dtype=torch.float32),
            torch.tensor(guessed[order]),
            torch.tensor(guesses[order], dtype=torch.float32),
        )
    return content, found


def reference(content, found):
    """pycocotools as its own documentation uses it: (12 statistics, precision)."""
    results = [
        {
            "image_id": image_id,
            "category_id": CATEGORIES[label][0],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for image_id, item in found.items()
        for score, label, (x0, y0, x1, y1) in zip(
            item.scores.tolist(), item.labels.tolist(), item.boxes_xyxy.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps({"info": {}, **content}))
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


def filled(content, found, backend="auto"):
    evaluator = Evaluator(content, CATEGORIES, backend)
    evaluator.update(list(found), list(found.values()))
    return evaluator


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", [None, 20, 3])
@pytest.mark.parametrize("seed", range(4))
def test_statistics_and_precision_equal_pycocotools(backend, levels, seed):
    content, found = random_case(seed, levels=levels, detections=150 if seed == 3 else 25)
    statistics, precision = reference(content, found)
    evaluator = filled(content, found, backend)
    rows = evaluator._rows(evaluator._gathered())
    ours = box_metrics(evaluator.ground_truth, rows, backend)
    assert ours.precision.shape == precision.shape == (10, 101, 3, 4, 3)
    np.testing.assert_allclose(ours.statistics, statistics, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.precision, precision, rtol=0, atol=1e-12)


@needs_hotcoco
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 5), st.integers(0, 12), st.sampled_from([None, 2, 10]))
def test_both_backends_always_agree(seed, images, objects, detections, levels):
    content, found = random_case(seed, images, objects, detections, levels, crowd=0.3)
    truth = read_ground_truth(content)
    if not any(not row["iscrowd"] for row in content["annotations"]):
        return
    evaluator = filled(content, found)
    rows = evaluator._rows(evaluator._gathered())
    slow, fast = box_metrics(truth, rows, "pycocotools"), box_metrics(truth, rows, "hotcoco")
    np.testing.assert_allclose(fast.statistics, slow.statistics, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fast.precision, slow.precision, rtol=0, atol=1e-12)


def one_object(box=(10, 10, 40, 40), **fields):
    annotation = {"id": 1, "image_id": 7, "category_id": 5, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
    return {
        "images": [{"id": 7}, {"id": 8}],
        "annotations": [{**annotation, **fields}],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES],
    }


def detect(*boxes, score=0.9, label=1):
    count = len(boxes)
    return Detections(
        torch.full((count,), score), torch.full((count,), label), torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    )


def test_a_hit_in_percent_and_none_where_there_is_nothing():
    metrics = filled(one_object(), {7: detect((10, 10, 50, 50)), 8: detect()}).compute()
    assert list(metrics) == [*STATISTICS, "per_class", "images"]
    assert [metrics[name] for name in ("AP", "AP50", "APm", "AR1")] == pytest.approx([100.0] * 4)
    assert metrics["APs"] is None
    assert metrics["APl"] is None
    assert metrics["per_class"] == {"cat": None, "dog": pytest.approx(100.0), "emu": None}
    assert metrics["images"] == 2
    assert json.loads(json.dumps(metrics)) == metrics


def test_a_known_overlap():
    """IoU 0.8: right at the thresholds .50 to .80, which are seven of ten."""
    metrics = filled(one_object((0, 0, 100, 10)), {7: detect((0, 0, 80, 10))}).compute()
    assert metrics["AP50"] == pytest.approx(100.0)
    assert metrics["AP"] == pytest.approx(70.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_at_all(backend):
    for found in ({}, {7: detect(), 8: detect()}):
        metrics = filled(one_object(), found, backend).compute()
        assert metrics["AP"] == metrics["AR100"] == 0.0
        assert metrics["APl"] is None
        assert metrics["per_class"]["dog"] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("annotation_id", [0, None, "x", 10**12])
def test_annotation_ids_do_not_matter(backend, annotation_id):
    """pycocotools itself takes an annotation with id 0 for no match."""
    content = one_object(id=annotation_id)
    assert filled(content, {7: detect((10, 10, 50, 50))}, backend).compute()["AP"] == pytest.approx(100.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_annotation_ids_are_told_apart(backend):
    content = one_object()
    content["annotations"].append({**content["annotations"][0], "bbox": [200, 200, 40, 40]})
    found = {7: detect((10, 10, 50, 50), (200, 200, 240, 240))}
    assert filled(content, found, backend).compute()["AP"] == pytest.approx(100.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_annotations_are_taken_as_they_are(backend):
    """Crowds absorb detections; boxes without area and unseen images are there to be missed."""
    content = one_object()
    content["annotations"].append({**content["annotations"][0], "id": 2, "bbox": [100, 100, 90, 90], "iscrowd": 1})
    found = {7: detect((10, 10, 50, 50), (100, 100, 140, 140), (150, 150, 190, 190))}
    assert filled(content, found, backend).compute()["AP"] == pytest.approx(100.0)
    content["annotations"].append({**content["annotations"][0], "id": 3, "bbox": [60, 60, 0, 5], "area": 0.0})
    assert filled(content, found, backend).compute()["AP"] == pytest.approx(51 / 101 * 100)
    content["annotations"][-1] = {**content["annotations"][0], "id": 3, "image_id": 8}
    assert filled(content, found, backend).compute()["AR100"] == pytest.approx(50.0)


def test_missing_fields_and_unusable_annotations():
    content = one_object()
    del content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]
    good = content["annotations"][0]
    bad = [
        {**good, "bbox": [1, 2, 3]},
        {**good, "bbox": [1, 2, float("nan"), 4]},
        {**good, "bbox": [1, 2, 10**400, 4]},
        {**good, "bbox": None},
        {**good, "image_id": 99},
        {**good, "category_id": 99},
        {**good, "category_id": None},
        "text",
    ]
    content["annotations"] += bad
    evaluator = filled(content, {7: detect((10, 10, 50, 50))})
    assert evaluator.ground_truth.unusable == len(bad)
    assert evaluator.compute()["AP"] == pytest.approx(100.0)
    content["annotations"][0]["area"] = float("nan")
    assert filled(content, {7: detect((10, 10, 50, 50))}).compute()["APm"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**one_object(), "annotations": []}, "no objects to find"),
        (one_object(iscrowd=1), "no objects to find"),
        ({"images": []}, "not a COCO annotation file"),
        ({**one_object(), "categories": [{"id": 77, "name": "dog"}]}, "no objects to find"),
    ],
)
def test_annotations_that_cannot_be_evaluated_are_refused(tmp_path, content, message):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    for source in (content, path):
        with pytest.raises(ValueError, match=message) as error:
            Evaluator(source, CATEGORIES)
        assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Evaluator(tmp_path / "gone.json", CATEGORIES)
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(ValueError, match=r"text\.json is not a JSON file"):
        Evaluator(tmp_path / "text.json", CATEGORIES)


def test_a_model_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="none of the model's categories"):
        Evaluator(one_object(), ((70, "fish"),))


def test_classes_of_one_name_are_told_apart():
    evaluator = Evaluator(one_object(), ((2, "dog"), (5, "dog")))
    evaluator.update([7], [detect((10, 10, 50, 50))])
    assert evaluator.compute()["per_class"] == {"dog (2)": None, "dog (5)": pytest.approx(100.0)}


def test_unknown_images_are_refused():
    with pytest.raises(ValueError, match="image 9 is not among the annotated ones"):
        Evaluator(one_object(), CATEGORIES).update(torch.tensor([9]), [detect()])


def test_an_image_that_comes_again_counts_once():
    evaluator = filled(one_object(), {7: detect((10, 10, 50, 50))})
    evaluator.update([7], [detect((10, 10, 50, 50))])
    assert len(evaluator.results()) == 1
    evaluator.reset()
    assert evaluator.results() == []


def test_detections_with_nan_are_left_out(caplog):
    found = detect((10, 10, 50, 50), (float("nan"), 10, 50, 50))
    evaluator = filled(one_object(), {7: found})
    assert evaluator.compute()["AP"] == pytest.approx(100.0)
    assert "left out 1 detections with NaN" in caplog.text


def test_results_can_be_read_by_pycocotools(tmp_path):
    content, found = random_case(1)
    evaluator = filled(content, found)
    results = json.loads(json.dumps(evaluator.results()))
    assert len(results) == sum(len(item.scores) for item in found.values())
    assert {result["category_id"] for result in results} <= {2, 5, 11}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **content}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 100 * evaluation.stats[0] == pytest.approx(evaluator.compute()["AP"], abs=0.05)


def test_an_absent_fast_backend_falls_back(monkeypatch):
    monkeypatch.setattr("engine.coco_metrics.find_spec", lambda name: None)
    assert choose_backend("auto") == "pycocotools"
    assert choose_backend("hotcoco") == "hotcoco"


class Broken:
    """A library that refuses everything."""

    @staticmethod
    def COCO(content):  # noqa: N802 - as hotcoco names it
        raise RuntimeError("categories[0]: field 'id': expected a non-negative integer")


def test_a_fast_backend_that_fails_is_replaced_and_told(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "hotcoco", Broken)
    monkeypatch.setattr("engine.coco_metrics.find_spec", lambda name: True)
    content, found = random_case(3)
    evaluator = filled(content, found)
    rows = evaluator._rows(evaluator._gathered())
    truth = read_ground_truth(content)
    metrics = box_metrics(truth, rows)
    assert np.array_equal(metrics.statistics, box_metrics(truth, rows, "pycocotools").statistics)
    assert "expected a non-negative integer" in caplog.text
    with pytest.raises(RuntimeError, match="non-negative"):
        box_metrics(truth, rows, "hotcoco")


@pytest.mark.parametrize("backend", BACKENDS)
def test_categories_that_are_not_annotated_are_told_of_once(backend, caplog, capfd):
    content = one_object()
    content["categories"] = [entry for entry in content["categories"] if entry["id"] != 11]
    evaluator = Evaluator(content, CATEGORIES, backend)
    assert "no category emu, so that there is no AP for them" in caplog.text
    caplog.clear()
    evaluator.update([7], [detect((10, 10, 50, 50))])
    evaluator.update([8], [detect((10, 10, 50, 50), label=2)])
    metrics = evaluator.compute()
    assert (metrics["AP"], metrics["per_class"]["emu"]) == (pytest.approx(100.0), None)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


class Echo(nn.Module):
    """Detects what the targets of the batches say, in their order: it is shown the images alone."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        assert isinstance(images, Images)
        targets = [batch.targets for batch in batches()]
        self.calls.append((self.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return targets[(len(self.calls) - 1) % len(targets)]

    def postprocess(self, outputs, original_sizes):
        return [
            Detections(
                torch.ones(len(labels)),
                labels,
                torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
                * size.flip(0).repeat(2),
            )
            for (labels, boxes), size in zip(outputs.split(), original_sizes, strict=True)
        ]


def batches():
    boxes = torch.tensor([[0.3, 0.3, 0.4, 0.4]])
    for image_id, count in ((7, 1), (8, 0)):
        yield Batch(
            Images(torch.zeros(1, 3, 8, 8), torch.tensor([[8, 8]])),
            Targets(torch.ones(count, dtype=torch.int64), boxes[:count], (count,)),
            torch.tensor([image_id]),
            torch.tensor([[100, 100]]),
        )


def test_an_evaluation_does_not_keep_what_training_left(monkeypatch, tmp_path):
    seen = []
    (tmp_path / "statm").write_text("9 9 0")
    monkeypatch.setattr(host_memory, "_STATM", tmp_path / "statm")
    monkeypatch.setattr(host_memory, "_trim", lambda _: seen.append("given back"))
    evaluate(Echo(), list(batches()), Evaluator(one_object(), CATEGORIES), "cpu", on_batch=lambda n, *_: seen.append(n))
    assert seen == [1, "given back", 2]


def test_evaluate_runs_the_model_and_restores_its_mode():
    model, seen = Echo().train(), []
    evaluator = Evaluator(one_object(), CATEGORIES)
    metrics = evaluate(
        model,
        list(batches()),
        evaluator,
        "cpu",
        torch.bfloat16,
        on_batch=lambda done, batch, found: seen.append((done, int(batch.image_ids), len(found[0].scores))),
    )
    assert metrics["AP"] == pytest.approx(100.0)
    assert metrics["images"] == 2
    assert model.calls == [(False, True, True)] * 2
    assert seen == [(1, 7, 1), (2, 8, 0)]
    assert model.training
    evaluate(model.eval(), list(batches()), evaluator, "cpu")
    assert model.calls[-1] == (False, True, False)
    assert not model.training
    assert evaluate(model, list(batches()), evaluator, "cpu", give_up=lambda: True) == {}


def gather_on_rank(rank, world_size, path, content, found, expected):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    ids = list(found)
    # Rank 1 repeats images of rank 0, as a sampler that fills up would.
    mine = ids[:7] if rank == 0 else ids[5:]
    evaluator = Evaluator(content, CATEGORIES, "pycocotools")
    evaluator.update(mine, [found[i] for i in mine])
    try:
        assert evaluator.compute() == expected
        assert len(evaluator.results()) == sum(len(item.scores) for item in found.values())
        if rank == 0:
            evaluator_module.box_metrics = broken
        with pytest.raises(ValueError, match="disk on fire"):
            evaluator.compute()
    finally:
        dist.destroy_process_group()


def broken(*_):
    raise ValueError("disk on fire")


def test_two_processes_equal_one(tmp_path):
    content, found = random_case(5)
    expected = filled(content, found, "pycocotools").compute()
    context = mp.get_context("fork")
    arguments = (2, tmp_path / "store", content, found, expected)
    ranks = [context.Process(target=gather_with_environment, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]


def gather_with_environment(rank, world_size, *arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    gather_on_rank(rank, world_size, *arguments)
