"""What a person and a program can follow: log.txt and the terminal, metrics.jsonl, loggers."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine import distributed
from engine.dispensable import dispensable
from engine.loggers import LoggerName, Loggers
from engine.runs.run_directory import LOG, METRICS
from structures import Images, LossOutput

if TYPE_CHECKING:
    from engine.trainer import Trainer


def configure(directory: Path | None) -> None:
    """Send the log of all modules to the terminal and, where given, to ``log.txt``.

    Only the first process shows ordinary messages; the others show warnings, each with its rank.
    """
    if distributed.is_main():
        handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
        if directory is not None:
            handlers.append(logging.FileHandler(directory / LOG, encoding="utf-8"))
        level, form = logging.INFO, "%(asctime)s %(message)s"
    else:
        handlers = [logging.StreamHandler(sys.stderr)]
        level, form = logging.WARNING, f"%(asctime)s rank {distributed.rank()}: %(message)s"
    # A line that cannot be written, as on a full disk, must not bring a traceback with it: checkpoints report the disk.
    logging.raiseExceptions = False
    for chatty in ("matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", handlers=handlers, force=True)


class Records:
    """Writer of metrics.jsonl and of the loggers; does nothing on processes other than the first."""

    def __init__(
        self, directory: Path, step: int, loggers: Sequence[LoggerName] = (), config: Mapping[str, Any] | None = None
    ) -> None:
        """Open the files of a run that starts or goes on after ``step`` optimizer steps."""
        self._active = distributed.is_main()
        if self._active:
            self._file = (directory / METRICS).open("a", encoding="utf-8")
            self._loggers = Loggers(loggers, directory, config or {}, step)

    def write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, and its numbers to the loggers under ``kind/``."""
        if not self._active:
            return
        line = {"kind": kind, "step": step, **record}
        try:
            self._file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"cannot write records: {error.strerror}", self._file.name) from error
        self._loggers.record(kind, record, step)

    def picture(self, path: Path, step: int) -> None:
        """Show an image file in the loggers, under its name."""
        if self._active and path.exists():
            self._loggers.tell(lambda logger: logger.picture(path.stem, path, step))

    def close(self) -> None:
        """Flush and close the files."""
        if self._active:
            self._file.close()
            self._loggers.tell(lambda logger: logger.close())


def finite(value: Any) -> Any:
    """The value with NaN and infinity, which JSON does not know, as null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Progress:
    """Loss and speed since the last line, and the time that remains."""

    def __init__(self, total_steps: int, steps_per_epoch: int, device: torch.device) -> None:
        self._total, self._per_epoch, self._device = total_steps, steps_per_epoch, device
        self._memory = "at most" if device.type == "cuda" else "resident"
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._steps = self._measured = self._images = 0
        self._waited = self._seconds = 0.0

    def add_losses(self, losses: Sequence[LossOutput]) -> None:
        """Add the micro-batches of a step that was not skipped; values stay on the device until the next line."""
        self._measured += 1
        for loss in losses:
            self._add({"loss": loss.total} | {f"terms/{name}": value for name, value in loss.terms.items()})
            self._add({f"diagnostics/{name}": value for name, value in loss.diagnostics.items()}, len(losses))

    def _add(self, values: Mapping[str, torch.Tensor], divisor: int = 1) -> None:
        if values:
            names, stacked = tuple(values), torch.stack([value.detach().float() for value in values.values()])
            known = self._sums.get(names)
            self._sums[names] = stacked / divisor if known is None else known + stacked / divisor

    def end_step(self, images: int, seconds: float, waited: float) -> None:
        """Count one optimizer step.

        Args:
            images: in the global batch.
            seconds: the step took, waiting included; what happens between steps does not count as training speed.
            waited: seconds of it this process waited for data.
        """
        self._steps += 1
        self._images += images
        self._seconds += seconds
        self._waited += waited

    def summarise(self, step: int) -> dict[str, Any]:
        """Means since the last call, over steps and summed over processes; all processes must call it together."""
        stacked = torch.cat(list(self._sums.values())).tolist() if self._sums else []
        totals: dict[str, float] = {}
        for name, value in zip((name for names in self._sums for name in names), stacked, strict=True):
            totals[name] = totals.get(name, 0.0) + value
        means: dict[str, float] = {}
        for part in distributed.gather(totals):
            for name, value in part.items():
                means[name] = means.get(name, 0.0) + value / self._measured
        seconds = max(self._seconds, 1e-9)
        record: dict[str, Any] = {
            "epoch": round(step / self._per_epoch, 4),
            "loss": means.get("loss", float("nan")),
            "seconds_per_step": seconds / self._steps,
            "images_per_second": self._images / seconds,
            "data_wait": min(1.0, self._waited / seconds),
            "memory_gib": memory_gib(self._device),
            "eta_seconds": seconds / self._steps * (self._total - step),
            "terms": {name.removeprefix("terms/"): v for name, v in means.items() if name.startswith("terms/")},
        }
        processes = distributed.world_size()
        # Terms add up over processes to those of the global batch; diagnostics describe a process and are averaged.
        record["diagnostics"] = {
            name.removeprefix("diagnostics/"): value / processes
            for name, value in means.items()
            if name.startswith("diagnostics/")
        }
        self._sums, self._seconds, self._waited = {}, 0.0, 0.0
        self._steps = self._measured = self._images = 0
        return record

    def line(self, step: int, record: Mapping[str, Any]) -> str:
        """One line for a person; what went wrong so far is on every line from then on."""
        eta = int(record["eta_seconds"])
        return "  ".join(
            [
                f"epoch {record['epoch']:.2f}/{self._total / self._per_epoch:.4g}",
                f"step {step}/{self._total}",
                f"loss {record['loss']:.3f}",
                *_last_terms(record["terms"]),
                f"grad {record['grad_norm']:.3g}",
                f"lr {record['lr']:.2e}",
                f"{record['seconds_per_step']:.3f} s/step",
                f"{record['images_per_second']:.1f} img/s",
                f"data {100 * record['data_wait']:.0f}%",
                f"{record['memory_gib']:.2f} GiB {self._memory}",
                f"ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}",
                *(f"{name.replace('_', ' ')} {count}" for name, count in record.get("counters", {}).items() if count),
            ]
        )


def _last_terms(terms: Mapping[str, float]) -> list[str]:
    """The loss terms of the last decoder layer, which is the result."""
    layers = [int(part) for name in terms if (part := name.partition("/")[0].removeprefix("decoder.")).isdigit()]
    prefix = f"decoder.{max(layers, default=0)}/"
    return [f"{name.removeprefix(prefix)} {value:.3f}" for name, value in terms.items() if name.startswith(prefix)]


def summarise_metrics(step: int, metrics: Mapping[str, Any]) -> str:
    """One line for a person."""
    names = [name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl") if metrics.get(name) is not None]
    values = "  ".join(f"{name} {metrics[name]:.2f}" for name in names)
    if "loss" in metrics:
        values += f"  loss {metrics['loss']:.3f}"
    missing = metrics.get("unreadable_images", 0)
    return f"after step {step}: {values}" + (
        f"  ({missing} images unreadable, their objects missed)" if missing else ""
    )


def memory_gib(device: torch.device) -> float:
    """Return the largest memory that tensors have taken on a CUDA device so far; elsewhere what the process has in
    main memory now: libraries and what the allocator keeps for later included, so more than its tensors need."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def count_operations(model: Any, size: tuple[int, int], device: torch.device) -> int:
    """Multiplications and additions of a detector for one image of (height, width), as torch's counter finds them.

    It counts matrix products, convolutions and attention; not what else there is, such as sampling. Nothing is
    computed: on a CPU, an image would take longer than the rest of the start.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:  # the counter's hooks want a graph of what needs gradients
            parameter.requires_grad_(False)
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            image = Images(torch.zeros(1, 3, *size, device=device), torch.tensor([size], device=device))
            model.eval()(image)
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops())


def banner(trainer: Trainer, images: tuple[int, int], size: tuple[int, int], op_backend: str) -> list[str]:
    """Lines that say what is going to run.

    Args:
        trainer: ready to run.
        images: in the training and in the validation set.
        size: (height, width) of the image for which operations are counted; (0, 0) counts none.
        op_backend: what computes deformable attention.
    """
    config, step = trainer.config, trainer.optimizer_step
    world, device, model = distributed.world_size(), step.device, step.module
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    groups = step.optimizer.param_groups
    rates = ", ".join(f"{group['name']} {group['base_lr']:.3g}" for group in groups[:8])
    if len(groups) > 8:  # layer-wise decay makes dozens
        low, high = (pick(group["base_lr"] for group in groups) for pick in (min, max))
        rates = f"{len(groups)} groups, {low:.3g} to {high:.3g}"
    operations = "operations not counted"
    with dispensable("the number of operations"):
        if min(size) and distributed.is_main():
            giga = count_operations(model, size, device) / 1e9
            operations = f"{giga:.1f} G operations for {size[0]} x {size[1]} pixels"
    local = trainer.batch_size // (world * config.accumulation_steps)
    length, per_epoch, warmup = trainer.total_steps, trainer.steps_per_epoch, trainer.schedule.warmup_steps
    return [
        f"devices: {world} x {device.type} ({name}), precision {step.precision}; op backend {op_backend}",
        f"batch: {trainer.batch_size} images a step = {world} processes x {config.accumulation_steps} accumulated "
        f"x {local}",
        f"data: {images[0]} training images, {images[1]} validation images, "
        f"{len(trainer.identity['categories'])} classes",
        f"length: {length} steps = {length / per_epoch:.4g} epochs of {per_epoch}, from step {trainer.step}; "
        f"warm-up {warmup} steps ({100 * warmup / length:.1f}%)",
        f"learning rates: {rates}",
        f"parameters: {total / 1e6:.2f} M, trainable {trainable / 1e6:.2f} M; {operations}; "
        + ("no averaged weights" if config.ema_decay is None else f"averaged weights with decay {config.ema_decay}"),
        *(f"warning: {doubt}" for doubt in trainer.schedule.doubts(per_epoch)),
    ]
