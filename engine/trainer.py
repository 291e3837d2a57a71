"""The training loop: steps, records, evaluations, checkpoints, and stopping in good order."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

from engine import checkpoint, distributed
from engine.averaging import AveragedWeights
from engine.best import restored, updated
from engine.dispensable import dispensable
from engine.host_memory import Growth
from engine.loaders import TrainLoader
from engine.optimizer import Schedule, load_optimizer_state, set_learning_rate
from engine.pictures import draw_curves
from engine.run_log import Progress, Records, summarise_metrics
from engine.runs.faults import NonFiniteSteps
from engine.runs.run_directory import CURVES, METRICS, PREDICTIONS, forget_after
from engine.runs.signals import STOPPING, Interrupted, StopRequest
from engine.step import OptimizerStep
from engine.taken_steps import TakenSteps
from engine.trainer_config import TrainerConfig
from engine.validation import Evaluate
from structures import Batch, BatchSize, LossOutput

log = logging.getLogger(__name__)


class Trainer:
    """Trains built objects; everything that has to survive a restart is in :meth:`state_dict`."""

    def __init__(
        self,
        config: TrainerConfig,
        *,
        step: OptimizerStep,
        schedule: Schedule,
        loader: TrainLoader,
        evaluate: Evaluate,
        directory: Path,
        batch_size: int,
        seed: int,
        identity: Mapping[str, Any],
        draw_last: Callable[[], list[Path]] = list,
    ) -> None:
        """Put the parts together.

        Args:
            config: how to run.
            step: model, criterion and optimizer.
            schedule: of the learning rate; gives the length.
            loader: of the training set.
            evaluate: measures a model on the validation set.
            directory: of the run; the first process writes to it.
            batch_size: images in the global batch.
            seed: of the run.
            identity: ``config``, ``categories``, ``data`` and ``environment``, kept in every checkpoint.
            draw_last: draws pictures of the last evaluation, and returns their files.
        """
        self.config, self.optimizer_step, self.schedule = config, step, schedule
        self.loader, self.evaluate, self.directory, self.draw_last = loader, evaluate, directory, draw_last
        self.batch_size, self.seed, self.identity = batch_size, seed, dict(identity)
        config.check_classes([name for _, name in identity["categories"]])
        self.steps_per_epoch = loader.steps_per_epoch
        self.total_steps = min(schedule.total_steps(self.steps_per_epoch), config.stop_after or sys.maxsize)
        self.average = AveragedWeights(step.module, config.ema_decay) if config.ema_decay is not None else None
        self.step = 0
        self.evaluated_step = 0
        self.best: dict[str, Any] | None = None
        self.metrics: dict[str, Any] = {}
        self.record: dict[str, Any] = {}
        self._going_back = False
        self.faults = NonFiniteSteps(directory, self.identity, seed, config.max_nonfinite_steps)
        self._taken = TakenSteps(step, self.faults, self._count)
        self._progress = Progress(self.total_steps, self.steps_per_epoch, step.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on exactly; random state is a function of seed, rank and step."""
        self._taken.settle()
        position = {"step": self.step, "steps_per_epoch": self.steps_per_epoch, "evaluated_step": self.evaluated_step}
        return {
            **self.identity,
            "weights": self.optimizer_step.module.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer_step.optimizer.state_dict(),
            "scaler": self.optimizer_step.scaler.state_dict(),
            "position": position,
            "best": self.best,
            "metrics": self.metrics,
            "counters": dict(self.faults.counters),
            "seed": self.seed,
        }

    def load_state_dict(self, loaded: checkpoint.Loaded) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: if it is for another model, other classes, or another division of the data into steps.
        """
        with checkpoint.understanding(loaded.path):
            self._load(*loaded)
        if self.best is None or loaded.path.resolve().parent == self.directory.resolve():
            return
        # A run of its own from now on, whose directory is to hold what its metrics promise.
        step = self.best["step"]
        if distributed.is_main() and not checkpoint.adopt_best(self.directory, loaded.path, step):
            log.warning("%s: the best checkpoint so far, of step %d, is not beside it", loaded.path, step)
            self.best = None

    def _load(self, path: Path, state: Mapping[str, Any]) -> None:
        position = state["position"]
        if position["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"{path}: was trained with {position['steps_per_epoch']} steps per epoch, this run has "
                f"{self.steps_per_epoch}: resume with the same data and data.batch_size, or use --init-from"
            )
        checkpoint.check_data(state.get("data"), self.identity["data"], path)
        checkpoint.check_categories(state["categories"], self.identity["categories"], path)
        checkpoint.load_weights(self.optimizer_step.module, state["weights"], path)
        load_optimizer_state(self.optimizer_step.optimizer, state["optimizer"])
        if self.optimizer_step.scaler.is_enabled() and state["scaler"]:
            self.optimizer_step.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            if state["ema"] is None:
                log.info("%s holds no averaged weights: averaging starts here", path)
                self.average = AveragedWeights(self.optimizer_step.module, self.average.decay)
            else:
                self.average.load_state_dict(state["ema"])
        if state["seed"] != self.seed:
            log.warning("seed %d differs from %d in %s: the order of the data changes", self.seed, state["seed"], path)
        self.step, self.evaluated_step = index(position["step"]), index(position["evaluated_step"])
        self.best, self.metrics = restored(state["best"], self.config.best_metric), state["metrics"]
        self._going_back = path.name != checkpoint.LAST and path.resolve().parent == self.directory.resolve()
        self.faults.counters.update(state["counters"])

    def fit(self, *, process_ends: bool = False) -> dict[str, Any]:
        """Train to the end and evaluate; ``process_ends`` is what it is for a ``StopRequest``.

        Returns:
            The metrics of the last evaluation.

        Raises:
            Interrupted: after SIGTERM, SIGINT or SIGHUP, once the step has ended and a checkpoint is written.
            DivergedError: when losses or gradients were not finite too often.
            ValueError: for what a user can mend, such as a full disk.
        """
        with StopRequest(process_ends=process_ends) as stop:
            for _ in self.steps(stop):
                pass
        return self.metrics

    def steps(self, stop: StopRequest) -> Iterator[tuple[list[Batch], BatchSize]]:
        """Train like :meth:`fit`, but let the caller look on: yields before each step what it is going to be taken on.

        When it goes on, ``record`` is what was last logged, and the parameters hold the gradients of the step taken.
        """
        records = None
        if self._going_back:
            # Otherwise a restart would take the later checkpoint, of a course that this run leaves.
            self._save()
        if distributed.is_main():
            forget_after(self.directory, self.step, evaluated=self.evaluated_step == self.step)
            records = Records(self.directory, self.step, self.config.loggers, self.identity["config"])
        try:
            yield from self._run(stop, records)
        finally:
            if records is not None:
                records.close()

    def _run(self, stop: StopRequest, records: Records | None) -> Iterator[tuple[list[Batch], BatchSize]]:
        if self.step >= self.total_steps:
            log.info("step %d of %d: nothing is left to train", self.step, self.total_steps)
        if self._evaluation_due():
            self._evaluate(stop, records)
        growth = Growth()
        stream = self._stream()
        while self.step < self.total_steps and not self._stopped_early:
            began = time.perf_counter()
            # A process that is to stop needs no further batch, which may never come.
            batches = stop.wait_for(stream) or []
            waited = time.perf_counter() - began
            num_targets = self._agree(stop, sum(sum(batch.targets.counts) for batch in batches))
            size = BatchSize(max(1, num_targets), self.batch_size)
            paused = time.perf_counter()
            yield batches, size
            began += time.perf_counter() - paused
            set_learning_rate(self.optimizer_step.optimizer, self.schedule.factor(self.step, self.steps_per_epoch))
            self._taken.take(self.step, batches, size)
            self._progress.end_step(self.batch_size, time.perf_counter() - began, waited)
            self.step += 1
            growth.end_step()
            if self.step % self.config.log_every == 0 or self.step == self.total_steps:
                self._record(records)
            if self._evaluation_due():
                self._evaluate(stop, records)
                growth.give_back()  # lest the next step seem to need what pictures and metrics have left
            elif self.step % self.config.checkpoint_every == 0:
                self._save()
                growth.give_back()
        stream.close()
        if self._stopped_early and self.best is not None:
            log.info("no gain in %s since step %d: training ends", self.config.best_metric, self.best["step"])

    def _stream(self) -> Generator[list[Batch]]:
        """Micro-batches of every step from the present one on, across epochs."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        while True:
            yield from self.loader.iterate(epoch, start)
            epoch, start = epoch + 1, 0

    def _agree(self, stop: StopRequest, count: int = 0) -> int:
        """Sum ``count`` over processes; if any process is to stop, write a checkpoint and stop all of them."""
        requests = [int(stop.signal_number == number) for number in STOPPING]
        total, *requests = distributed.host_sum([count, *requests])
        for number, requested in zip(STOPPING, requests, strict=True):
            if requested:
                self._save()
                raise Interrupted(number, self.step)
        return total

    def _count(self, losses: Sequence[LossOutput]) -> None:
        """Take the weights after a step, and its losses, into the averages."""
        if self.average is not None:
            self.average.update(self.optimizer_step.module)
        self._progress.add_losses(losses)

    def _record(self, records: Records | None) -> None:
        self._taken.settle()
        self.record = record = self._progress.summarise(self.step)
        record["grad_norm"] = self._taken.norm
        groups = self.optimizer_step.optimizer.param_groups
        record["lr"] = max(group["lr"] for group in groups)
        record["lrs"] = {group["name"]: group["lr"] for group in groups}
        record["loss_scale"] = float(self.optimizer_step.scaler.get_scale())
        skipped, restarts = distributed.host_sum([self.loader.skipped.count, self.loader.worker_restarts])
        record["counters"] = {**self.faults.counters, "skipped_images": skipped, "worker_restarts": restarts}
        log.info(self._progress.line(self.step, record))
        if records is not None:
            records.write("train", self.step, record)

    def _evaluation_due(self) -> bool:
        if not self.step or self.evaluated_step == self.step:
            return False
        every = self.config.evaluation_interval(self.steps_per_epoch)
        return self.step >= self.total_steps or (every is not None and self.step % every == 0)

    def _evaluate(self, stop: StopRequest, records: Records | None) -> None:
        """Measure, keep the best, and write a checkpoint before (nothing is lost meanwhile) and after."""
        self._agree(stop)
        self._save()
        began = time.perf_counter()
        model = self.optimizer_step.module if self.average is None else self.average.model
        distributed.share_buffers(model)
        metrics = self.evaluate(model, lambda: bool(stop.signal_number))
        self._agree(stop)
        self.metrics = {**metrics, "seconds": time.perf_counter() - began}
        self.evaluated_step = self.step
        self.best, is_best = updated(self.best, self.config.best_metric, metrics, self.step)
        suffix = f"  (best {self.config.best_metric} so far)" if is_best else ""
        log.info("%s  in %.1f s%s", summarise_metrics(self.step, metrics), self.metrics["seconds"], suffix)
        if records is not None:
            records.write("eval", self.step, {"epoch": self.step / self.steps_per_epoch, **self.metrics})
            self._draw(records)
        self._save(best=is_best)

    @property
    def _stopped_early(self) -> bool:
        """Whether there was no gain for too long; the same after a resume."""
        patience = self.config.early_stopping
        return patience is not None and self.best is not None and self.best["since"] >= patience

    def _draw(self, records: Records) -> None:
        with dispensable(CURVES):
            draw_curves(self.directory / METRICS, self.directory / CURVES, self.config.curve_classes)
        pictures = [self.directory / name for name in (PREDICTIONS, CURVES)]
        if self.step >= self.total_steps or self._stopped_early:
            with dispensable("pictures of the last evaluation"):
                pictures += self.draw_last()
        for path in pictures:
            records.picture(path, self.step)

    def _save(self, *, best: bool = False) -> None:
        """Write a checkpoint; a failure on the writing process stops all of them."""
        self._taken.settle()
        with distributed.agreed_errors():
            if distributed.is_main():
                checkpoint.write(self.directory, self.state_dict(), best=best)
