import gc
import logging
import os
import random
import re
import resource
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets import CocoConfig, CocoDataset, DataConfig, images
from datasets.loaders import MAX_RESTARTS
from datasets.transforms import ColourJitter, RandomFlip, RandomSizeCrop, Resize

AUGMENTATION = (RandomFlip(), ColourJitter(), RandomSizeCrop(min_size=16, max_size=32))

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}


@pytest.fixture
def folder(make_folder):
    return make_folder(sizes=[(36, 44), (44, 36), (40, 40)] * 4)


def make_config(folder, **settings):
    return DataConfig(
        train=CocoConfig(**folder.paths(), transforms=AUGMENTATION),
        val=CocoConfig(**folder.paths(), transforms=(Resize(short_side=24),)),
        **{**STATISTICS, "batch_size": 4, "num_workers": 0, "eval_batch_size": 3, **settings},
    )


def train_loader(folder, *, settings=None, **arguments):
    config = make_config(folder, **(settings or {}))
    return config.build_train_loader(config.train.build(split="train"), seed=5, **arguments)


def val_loader(folder, *, settings=None, **arguments):
    config = make_config(folder, **(settings or {}))
    return config.build_val_loader(config.val.build(split="val"), **arguments)


def equal(batch, other):
    return (
        torch.equal(batch.images.pixels, other.images.pixels)
        and torch.equal(batch.images.sizes, other.images.sizes)
        and torch.equal(batch.targets.labels, other.targets.labels)
        and torch.equal(batch.targets.boxes, other.targets.boxes)
        and torch.equal(batch.image_ids, other.image_ids)
        and batch.targets[2:] == other.targets[2:]
    )


def equal_steps(steps, others):
    return all(
        equal(batch, other)
        for step, other_step in zip(steps, others, strict=True)
        for batch, other in zip(step, other_step, strict=True)
    )


@pytest.fixture
def fast_detection(monkeypatch):
    """torch looks for dead workers every five seconds; here every fifth of one."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def test_an_epoch(folder):
    loader = train_loader(folder, accumulation_steps=2)
    assert loader.steps_per_epoch == 3
    steps = list(loader.iterate(0))
    assert [[len(batch.images.pixels) for batch in step] for step in steps] == [[2, 2]] * 3
    assert len({int(i) for step in steps for batch in step for i in batch.image_ids}) == 12


def test_workers_change_nothing(folder):
    expected = list(train_loader(folder).iterate(1))
    assert equal_steps(train_loader(folder, settings={"num_workers": 2}).iterate(1), expected)


def test_spawned_workers_change_nothing_and_share_the_annotations(folder):
    expected = list(train_loader(folder).iterate(1))
    config = make_config(folder, num_workers=1, worker_start="spawn")
    dataset = config.train.build(split="train")
    assert not any(tensor.is_shared() for tensor in dataset.annotations)
    assert equal_steps(config.build_train_loader(dataset, seed=5).iterate(1), expected)
    assert all(tensor.is_shared() for tensor in dataset.annotations)


def test_starting_inside_an_epoch(folder):
    loader = train_loader(folder, settings={"num_workers": 1})
    whole = list(loader.iterate(2))
    assert equal_steps(loader.iterate(2, 1), whole[1:])
    assert list(loader.iterate(2, 3)) == []


def test_a_split_batch_holds_the_same_samples(folder):
    whole = list(train_loader(folder).iterate(0))
    parts = [list(train_loader(folder, rank=rank, world_size=2).iterate(0)) for rank in range(2)]
    for g, (batch,) in enumerate(whole):
        halves = [part[g][0] for part in parts]
        assert torch.equal(torch.cat([half.image_ids for half in halves]), batch.image_ids)
        assert torch.equal(torch.cat([half.targets.boxes for half in halves]), batch.targets.boxes)
        images = [image for half in halves for image in half.images.pixels]
        for image, other, (height, width) in zip(batch.images.pixels, images, batch.images.sizes.tolist(), strict=True):
            assert torch.equal(image[:, :height, :width], other[:, :height, :width])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_global_random_states_alone(folder, num_workers):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    list(train_loader(folder, settings={"num_workers": num_workers}).iterate(0))
    list(val_loader(folder, settings={"num_workers": num_workers}))
    assert state() == before


def test_an_abandoned_epoch_does_not_leak_into_the_next(folder):
    loader = train_loader(folder, settings={"num_workers": 2})
    expected = list(loader.iterate(1))
    for epoch in (0, 3):
        iterator = loader.iterate(epoch)
        next(iterator)
        del iterator
    assert equal_steps(loader.iterate(1), expected)


def test_evaluation_covers_every_image_once_without_padding(folder):
    for settings in ({}, {"num_workers": 2}, {"eval_batch_size": 1}):
        seen = []
        for rank in range(2):
            loader = val_loader(folder, settings=settings, rank=rank, world_size=2)
            batches = list(loader)
            assert len(batches) == len(loader)
            for batch in batches:
                assert (batch.images.sizes == torch.tensor(batch.images.pixels.shape[2:])).all()
                seen += batch.image_ids.tolist()
        assert sorted(seen) == [10 + 3 * index for index in range(12)]


def test_evaluation_does_not_pad_where_the_file_misstates_sizes(folder):
    folder.content["images"][0].update(height=72, width=88)  # twice the file, which gives another rounding
    for entry in folder.content["images"][1:]:
        entry.update(height=40, width=40)
    folder.write()
    loader = val_loader(folder)
    batches = list(loader)
    assert all((batch.images.sizes == torch.tensor(batch.images.pixels.shape[2:])).all() for batch in batches)
    assert sorted(i for batch in batches for i in batch.image_ids.tolist()) == [10, *range(16, 44, 9)]
    assert loader.skipped.count == 7


def test_unreadable_images_are_counted_and_named_once(folder, caplog):
    (folder.images / "003.png").write_text("broken")
    for settings in ({}, {"num_workers": 1}):
        caplog.clear()
        loader = train_loader(folder, settings=settings)
        with caplog.at_level(logging.WARNING):
            for epoch in range(2):
                assert all(len(batch.images.pixels) == 4 for step in loader.iterate(epoch) for batch in step)
        assert loader.skipped.count == 2
        assert list(loader.skipped.reasons) == [19]
        (record,) = caplog.records
        assert "003.png" in record.getMessage()


def test_unreadable_evaluation_images_leave_the_others_alone(folder):
    (folder.images / "003.png").write_text("broken")
    loader = val_loader(folder, settings={"eval_batch_size": 1})
    assert sorted(i for batch in loader for i in batch.image_ids.tolist()) == [10, 13, 16, *range(22, 44, 3)]
    assert loader.skipped.count == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_unreadable_images_ends_training(folder, num_workers):
    loader = train_loader(folder, settings={"num_workers": num_workers})
    for path in folder.images.iterdir():
        path.write_text("broken")
    with pytest.raises(ValueError, match="training images in a row cannot be read") as error:
        next(loader.iterate(0))
    assert "\n" not in str(error.value)


def test_too_large_a_batch_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size=16 is more than the 12 training images"):
        train_loader(folder, settings={"batch_size": 16})
    with pytest.raises(ValueError, match="multiple of 3"):
        train_loader(folder, world_size=3)


def worker_ids(loader):
    return [worker.pid for worker in loader._pool._loader._iterator._workers]


def test_dead_workers_are_replaced_without_a_trace_in_the_data(folder, fast_detection, caplog):
    expected = list(train_loader(folder, accumulation_steps=4).iterate(0))
    loader = train_loader(folder, settings={"num_workers": 2, "prefetch": 1}, accumulation_steps=4)
    steps = []
    with caplog.at_level(logging.WARNING):
        for index, step in enumerate(loader.iterate(0)):
            steps.append(step)
            if index == 0:
                for pid in worker_ids(loader):
                    os.kill(pid, signal.SIGKILL)
    assert equal_steps(steps, expected)
    assert 1 <= loader.worker_restarts <= 2
    assert "starting the data-loading workers again" in caplog.text
    assert equal_steps(loader.iterate(0), expected), "and the next epoch works"


def test_a_dead_worker_never_raises_elsewhere(folder, fast_detection):
    """torch's SIGCHLD handler would raise in the code below, whatever it does."""
    before = signal.getsignal(signal.SIGCHLD)
    loader = train_loader(folder, settings={"num_workers": 1})
    iterator = loader.iterate(0)
    next(iterator)
    assert signal.getsignal(signal.SIGCHLD) is before
    (pid,) = worker_ids(loader)
    os.kill(pid, signal.SIGKILL)
    (worker,) = loader._pool._loader._iterator._workers
    worker.join(10)
    assert not worker.is_alive()
    assert sum(range(100_000)) == 4999950000
    assert len(list(iterator)) == 2


@pytest.mark.parametrize("worker_start", ["fork", "spawn"])
def test_workers_leave_signals_to_the_main_process(folder, fast_detection, worker_start):
    """A scheduler signals every process; the step that is under way still gets its data."""
    loader = train_loader(folder, settings={"num_workers": 2, "worker_start": worker_start})
    steps = []
    for step in loader.iterate(0):
        steps.append(step)
        for pid in worker_ids(loader):
            os.kill(pid, signal.SIGINT)
            if len(steps) == 1:
                os.kill(pid, signal.SIGTERM)
    assert len(steps) == 3
    assert loader.worker_restarts == 0


def test_a_second_termination_ends_a_worker(folder, fast_detection):
    """Or torch could not get rid of one."""
    loader = train_loader(folder, settings={"num_workers": 1})
    iterator = loader.iterate(0)
    next(iterator)
    (worker,) = loader._pool._loader._iterator._workers
    deadline = time.monotonic() + 30
    while worker.is_alive() and time.monotonic() < deadline:
        worker.terminate()
        worker.join(0.2)
    assert worker.exitcode == -signal.SIGTERM


class Deadly(CocoDataset):
    """Kills the process that loads the image with this id, as a lack of memory would."""

    def load(self, index):
        if self.ids[index] == 22:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(index)


def test_workers_that_die_again_and_again_end_training_with_one_line(folder, fast_detection):
    config = make_config(folder, num_workers=1)
    dataset = config.train.build(split="train")
    dataset.__class__ = Deadly
    loader = config.build_train_loader(dataset, seed=5)
    with pytest.raises(ValueError, match=r"workers died 4 times in a row .*data.num_workers") as error:
        list(loader.iterate(0))
    assert "\n" not in str(error.value)
    assert loader.worker_restarts > MAX_RESTARTS


class Faulty(CocoDataset):
    def load(self, index):
        raise RuntimeError("a bug")


def test_a_bug_in_a_worker_is_not_taken_for_a_death(folder):
    config = make_config(folder, num_workers=1)
    dataset = config.train.build(split="train")
    dataset.__class__ = Faulty
    with pytest.raises(RuntimeError, match="a bug"):
        list(config.build_train_loader(dataset, seed=5).iterate(0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_read_that_never_returns_ends_with_the_files_in_question(folder, num_workers, split, monkeypatch):
    """A pipe that nobody writes to stands for a share that is gone."""
    monkeypatch.setattr(images, "_decode", lambda path: path.read_bytes())  # which takes a pipe
    for path in folder.images.iterdir():
        path.unlink()
        os.mkfifo(path)
    settings = {"num_workers": num_workers, "timeout": 0.5, "batch_size": 12}
    loader = (train_loader if split == "train" else val_loader)(folder, settings=settings)
    with pytest.raises(ValueError, match=r"data\.timeout=0\.5 seconds .*/\d{3}\.png") as error:
        next(loader.iterate(0) if split == "train" else iter(loader))
    assert str(error.value).count(".png") == (8 if split == "train" else 3)
    assert ("and 4 more" in str(error.value)) == (split == "train")
    assert "\n" not in str(error.value)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    gc.collect()


class Short(CocoDataset):
    """Lets its process write no more than a few bytes, as a full /dev/shm would."""

    def load(self, index):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        return super().load(index)


def test_a_batch_that_cannot_be_passed_on_ends_with_the_reason(folder, capfd):
    config = make_config(folder, num_workers=2)
    dataset = config.train.build(split="train")
    dataset.__class__ = Short
    with pytest.raises(ValueError, match=r"cannot pass on a batch \(.*File too large.*shm-size.*num_workers") as error:
        list(config.build_train_loader(dataset, seed=5).iterate(0))
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("spare", [1, 8, 12, 16, 26])
def test_few_file_handles_end_with_the_reason(folder, spare, monkeypatch):
    """With a few, workers cannot be started, or not all; with more, what they send cannot be taken, or just so."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    loader = train_loader(folder, settings={"num_workers": 2, "prefetch": 16})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    ended = ""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, before[1]))
        try:
            list(loader.iterate(0))
        except ValueError as error:
            ended = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        gc.collect()
    assert not complaints
    assert re.search("Too many open files.*ulimit -n", ended) or (spare > 1 and not ended)
