"""A complete training run in miniature for the engine's tests, in this process or as a program of its own.

The model has convolutions, dropout and batch norm, and predicts one box per target slot; a step takes milliseconds.
``python tiny_training.py '{"directory": "…", …}' …`` runs one after the other, with the engine's own start, signals and
exit codes; ``training_processes.py`` does so on one or several processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from engine import distributed, run_log
from engine.optimizer import CosineSchedule, OptimizerConfig, Schedule, SGDConfig, StepSchedule
from engine.runs import session
from engine.runs.signals import Interrupted
from engine.step import OptimizerStep, configure_device
from engine.trainer import Trainer
from engine.trainer_config import TrainerConfig
from structures import Batch, BatchSize, DetectorOutputs, Images, LossOutput, Prediction, QueryGroup, Targets

QUERIES = 5


class TinyDetector(nn.Module):
    """[B, 3, 8, 8] → QUERIES boxes and logits of each image."""

    def __init__(self, num_classes: int = 3, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.class_head = nn.Linear(8, QUERIES * num_classes)
        self.box_head = nn.Linear(8, QUERIES * 4)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        features = self.dropout(self.norm(self.backbone(images.pixels)).relu().mean(dim=(2, 3)))
        size = len(images.pixels)
        logits = self.class_head(features).float().view(1, size, QUERIES, -1)
        boxes = self.box_head(features).float().view(1, size, QUERIES, 4).sigmoid()
        return decoder_outputs(logits, boxes)


def decoder_outputs(logits: Tensor, boxes: Tensor) -> DetectorOutputs:
    """Of logits [L, B, Q, C] and boxes [L, B, Q, 4] of a decoder alone."""
    return DetectorOutputs({"decoder": QueryGroup(Prediction(logits, boxes))})


def criterion(outputs: DetectorOutputs, targets: Targets, num_targets: float, num_images: int) -> LossOutput:
    """The i-th target of an image belongs to its i-th query; all others are background."""
    logits, boxes = outputs.groups["decoder"].prediction
    labels = torch.zeros_like(logits[0])
    box_loss = boxes.sum() * 0
    for image, (classes, wanted) in enumerate(targets.split()):
        labels[image, torch.arange(len(classes)), classes] = 1
        box_loss = box_loss + (boxes[0, image, : len(wanted)] - wanted).abs().sum()
    class_loss = nn.functional.binary_cross_entropy_with_logits(logits[0], labels, reduction="sum")
    terms = {"decoder.0/class": class_loss / num_targets, "decoder.0/bbox": box_loss / num_targets}
    total = terms["decoder.0/class"] + 5 * terms["decoder.0/bbox"]
    return LossOutput(total, {name: term.detach() for name, term in terms.items()}, {})


def make_batch(seeds: list[int]) -> Batch:
    """Images and targets drawn from one seed each; seeds divisible by four have no targets."""
    images, labels, boxes, counts = [], [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        count = seed % 4
        images.append(torch.randn(3, 8, 8, generator=generator))
        labels.append(torch.randint(3, (count,), generator=generator))
        boxes.append(torch.rand(count, 4, generator=generator))
        counts.append(count)
    size = torch.full((len(seeds), 2), 8)
    targets = Targets(torch.cat(labels), torch.cat(boxes), tuple(counts), tuple(seeds))
    return Batch(Images(torch.stack(images), size), targets, torch.tensor(seeds), size)


def map_pixels(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with a function of its pixels in their place."""
    return batch._replace(images=batch.images._replace(pixels=function(batch.images.pixels)))


class TinyLoader:
    """Global batch g of an epoch is a fixed set of seeds, whoever asks for which part."""

    def __init__(self, batch_size: int, steps_per_epoch: int, accumulation_steps: int, delay: float = 0.0) -> None:
        self.batch_size, self.accumulation_steps, self.delay = batch_size, accumulation_steps, delay
        self._steps_per_epoch = steps_per_epoch
        self.spoil: Callable[[int, Batch], Batch] = lambda step, batch: batch
        self.skipped = types.SimpleNamespace(count=0)

    worker_restarts = 0

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def iterate(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        parts = distributed.world_size() * self.accumulation_steps
        size = self.batch_size // parts
        for step in range(start_step, self.steps_per_epoch):
            time.sleep(self.delay)
            first = (epoch * self.steps_per_epoch + step) * self.batch_size
            batches = []
            for part in range(self.accumulation_steps):
                start = first + (part * distributed.world_size() + distributed.rank()) * size
                batch = make_batch(list(range(start, start + size)))
                batches.append(self.spoil(epoch * self.steps_per_epoch + step, batch))
            yield batches


@dataclass
class Options:
    """What a test may vary."""

    directory: str
    steps: int = 12
    steps_per_epoch: int = 5
    batch_size: int = 8
    one_orientation: int = 1
    images: int = 40
    image_ids: str = "0 to 39"
    accumulation_steps: int = 1
    precision: str = "fp32"
    dropout: float = 0.2
    batch_norm: bool = False
    ema_decay: float | None = 0.99
    checkpoint_every: int = 4
    log_every: int = 1
    optimizer: str = "adamw"
    eval_every_steps: int | None = None
    max_nonfinite_steps: int = 0
    cosine: bool = True
    seed: int = 7
    delay: float = 0.0
    resume: str | None = None
    die_at: int | None = None
    die_rank: int = 0
    signal_at: int | None = None
    signal_number: int = int(signal.SIGTERM)
    signal_rank: int = 0
    nan_at: int | None = None
    nan_rank: int = 0
    file_limit: int | None = None
    collective_timeout: float = 60.0
    eval_seconds: float = 0.0
    eval_is_deaf: bool = False
    """Whether evaluation goes on whatever it is told."""
    hang_at: int | None = None
    """Step whose data never come."""
    ballast_mib: int = 0
    """Makes checkpoints large, so that writing them takes a while."""
    gradients: str | None = None
    """Instead of training: write the gradients of the first step to this file."""


def evaluate(model: nn.Module, should_stop: Callable[[], bool], options: Options) -> dict[str, Any]:
    """A number that depends on the weights; uses up random numbers on purpose, and says that it has begun."""
    torch.rand(3)
    (Path(options.directory) / "evaluating").touch()
    until = time.monotonic() + options.eval_seconds
    while time.monotonic() < until and (options.eval_is_deaf or not should_stop()):
        time.sleep(0.01)
    with torch.no_grad():
        outputs = model(make_batch(list(range(1000, 1016))).images)
    return {"AP": float(outputs.result.boxes.mean()) * 100, "AP50": 50.0}


def build(options: Options) -> Trainer:
    """The trainer of a run; needs the processes to be connected."""
    device = torch.device("cpu")
    configure_device(device)
    torch.manual_seed(options.seed)
    model = TinyDetector(dropout=options.dropout, batch_norm=options.batch_norm)
    kind = OptimizerConfig if options.optimizer == "adamw" else SGDConfig
    optimizer = kind(lr=1e-2, clip_norm=1.0)
    config = TrainerConfig(
        precision=options.precision,  # type: ignore[arg-type]  # a Literal, out of JSON
        accumulation_steps=options.accumulation_steps,
        ema_decay=options.ema_decay,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        eval_every_epochs=None,
        eval_every_steps=options.eval_every_steps,
        max_nonfinite_steps=options.max_nonfinite_steps,
    )
    schedule: Schedule = (
        CosineSchedule(steps=options.steps, warmup_steps=3)
        if options.cosine
        else StepSchedule(steps=options.steps, warmup_steps=3, milestones=(1.4,))
    )
    step = OptimizerStep(
        model,
        criterion,
        optimizer.build(model),
        device=device,
        precision=config.precision,
        clip_norm=optimizer.clip_norm,
    )
    loader = TinyLoader(options.batch_size, options.steps_per_epoch, options.accumulation_steps, options.delay)
    loader.spoil = lambda at, batch: _inject(options, at, batch)
    return Trainer(
        config,
        step=step,
        schedule=schedule,
        loader=loader,
        evaluate=lambda model, should_stop: evaluate(model, should_stop, options),
        directory=Path(options.directory),
        batch_size=options.batch_size,
        seed=options.seed,
        identity={
            "config": {"seed": options.seed},
            "categories": [[1, "a"], [5, "b"], [9, "c"]],
            "data": {key: getattr(options, key) for key in ("batch_size", "one_orientation", "images", "image_ids")},
            "environment": {"ballast": torch.zeros(options.ballast_mib * 2**18)},
        },
    )


def _inject(options: Options, step: int, batch: Batch) -> Batch:
    """The fault asked for, when this process is about to take this step."""
    first_life = distributed.restart_count() == 0
    if step == options.die_at and distributed.rank() == options.die_rank and first_life:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == options.hang_at:
        threading.Event().wait()
    if step == options.signal_at and distributed.rank() == options.signal_rank:
        os.kill(os.getpid(), options.signal_number)
    if step == options.nan_at and distributed.rank() == options.nan_rank:
        pixels: Tensor = batch.images.pixels.clone()
        pixels[0, 0, 0, 0] = float("nan")
        return map_pixels(batch, lambda _: pixels)
    return batch


def train(options: Options, *, process_ends: bool = False) -> Trainer:
    """Start or go on as main does."""
    if options.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_limit, resource.RLIM_INFINITY))
    directory = Path(options.directory)
    opened = session.open_run(directory, options.resume)
    try:
        run_log.configure(directory)
        trainer = build(options)
        with distributed.agreed_errors():
            if opened.loaded is not None:
                trainer.load_state_dict(opened.loaded)
        if options.gradients is not None:
            write_gradients(trainer, Path(options.gradients))
        else:
            trainer.fit(process_ends=process_ends)
    finally:
        if opened.directory is not None:
            opened.directory.close()
    return trainer


def write_gradients(trainer: Trainer, path: Path) -> None:
    """Gradients of the first step, by name, and their norm."""
    batches = next(trainer.loader.iterate(0, 0))
    (targets,) = distributed.host_sum([sum(sum(batch.targets.counts) for batch in batches)])
    step = trainer.optimizer_step
    norm, _ = step.backward(batches, BatchSize(targets, trainer.batch_size))
    found = {name: parameter.grad for name, parameter in step.module.named_parameters()}
    if distributed.is_main():
        torch.save({"norm": norm, **found}, path)


def run_all(runs: list[Options]) -> None:
    """One run after the other in one group of processes; an interrupted run is followed by the next."""
    with distributed.process_group(torch.device("cpu"), runs[0].collective_timeout):
        for options in runs[:-1]:
            with contextlib.suppress(Interrupted):
                train(options)
        train(runs[-1], process_ends=True)


def exit_code(work: list[Options] | Callable[[], None]) -> int:
    """Do ``work`` as the program does; its exit code."""
    code = session.exit_code(functools.partial(run_all, work) if isinstance(work, list) else work)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    session.leave(exit_code([Options(**json.loads(text)) for text in sys.argv[1:]]))
