"""A large annotation file is read once for all processes of a machine, and what is kept is never stale."""

import json
import multiprocessing
import os
import time

import pytest
import torch

from datasets import Category, CocoConfig, coco_files
from engine import coco_metrics
from engine.coco_metrics import read_ground_truth
from ops import annotation_cache
from ops.coco_file import read_coco_file


@pytest.fixture
def cached(make_folder, tmp_path, monkeypatch):
    """A data set whose annotation file counts as large, and the file in which every reading leaves a letter."""
    monkeypatch.setenv("ALIGN_DETR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(annotation_cache, "SETTLED_SECONDS", 0.0)
    readings = tmp_path / "readings"
    readings.touch()

    def read(path):
        with readings.open("a") as file:
            file.write("x")
        return read_coco_file(path)

    monkeypatch.setattr(coco_files, "read_coco_file", read)
    monkeypatch.setattr(coco_metrics, "read_coco_file", read)
    folder = make_folder()
    folder.add(10, [5, 5, 0, 10])
    folder.write()
    time.sleep(0.01)
    return folder, readings


def build(folder, **arguments):
    return CocoConfig(**folder.paths()).build(split="val", **arguments)


def assert_equal(one, other):
    assert (one.categories, one.report) == (other.categories, other.report)
    assert all(torch.equal(left, right) for left, right in zip(one.annotations, other.annotations, strict=True))


def kept(tmp_path):
    return sorted((tmp_path / "cache").glob("annotations-*.pt"))


def test_a_second_reading_maps_what_the_first_one_kept(cached, tmp_path):
    folder, readings = cached
    first, second = build(folder), build(folder)
    assert readings.read_text() == "x"
    assert_equal(first, second)
    assert len(second.report.lines()) == 1
    truths = [read_ground_truth(folder.annotations) for _ in range(2)]
    assert readings.read_text() == "xx"
    assert truths[0].content == truths[1].content
    assert truths[0].unusable == truths[1].unusable == 0
    other = tuple(Category(category.id, category.name) for category in first.categories[::-1])
    assert build(folder, categories=other).categories == other
    assert readings.read_text() == "xxx", "labels depend on the categories"


def test_a_changed_file_is_read_again_though_its_size_and_date_are_the_old_ones(cached):
    folder, readings = cached
    before, status = build(folder), folder.annotations.stat()
    folder.annotations.write_text(folder.annotations.read_text().replace('"cat"', '"cow"'))
    os.utime(folder.annotations, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert folder.annotations.stat().st_size == status.st_size
    assert (before.categories[0].name, build(folder).categories[0].name) == ("cat", "cow")
    assert readings.read_text() == "xx"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_made_again(cached, tmp_path, damage):
    folder, readings = cached
    first = build(folder)
    (path,) = kept(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-10], "flip": data, "empty": b""}[damage])
    assert_equal(build(folder), first)
    assert readings.read_text() == "xx"
    assert_equal(build(folder), first)
    assert readings.read_text() == "xx"


def test_processes_read_it_once(cached):
    folder, readings = cached
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build, args=(folder,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert readings.read_text() == "x"


def test_without_a_folder_every_process_reads(cached, tmp_path, monkeypatch):
    folder, readings = cached
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALIGN_DETR_CACHE", str(tmp_path / "file"))
    assert_equal(build(folder), build(folder))
    assert readings.read_text() == "xx"


def test_new_small_and_refused_files_are_not_kept(cached, tmp_path, monkeypatch):
    folder, _ = cached
    monkeypatch.setattr(annotation_cache, "SETTLED_SECONDS", 1000.0)
    build(folder)
    monkeypatch.setattr(annotation_cache, "SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(annotation_cache, "LEAST_BYTES", 2**20)
    build(folder)
    monkeypatch.setattr(annotation_cache, "LEAST_BYTES", 0)
    folder.annotations.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="no 'categories'"):
        build(folder)
    assert kept(tmp_path) == []


def test_old_files_are_deleted(cached, tmp_path, monkeypatch):
    folder, _ = cached
    monkeypatch.setattr(annotation_cache, "MOST_FILES", 2)
    for number in range(4):
        folder.content["info"] = number
        folder.write()
        build(folder)
    assert len(kept(tmp_path)) == 2
    assert not list((tmp_path / "cache").glob("*.lock"))
