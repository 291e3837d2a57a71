"""Settings of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.coco_metrics import STATISTICS
from engine.loggers import LoggerName
from engine.step import Precision


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to run the steps, and how often to do what between them."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is any."""
    precision: Precision = "fp32"
    """Of the model's forward pass; the losses are always computed in fp32."""
    inference_precision: Precision | None = None
    """Of main.py --eval (null: as precision), and of tools.predict and Predictor (null: fp32)."""
    tf32: bool = False
    """Whether fp32 matrix products on CUDA may round their inputs to TF32."""
    deterministic: bool = False
    """Whether CUDA must give the same bits every time (slower); the CPU always does."""
    compile: bool = False
    """Whether to compile the layers of encoder and decoder with torch.compile."""
    accumulation_steps: int = 1
    """Micro-batches per process into which an optimizer step's share of the batch is divided."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights that is evaluated; null evaluates the weights themselves."""
    log_every: int = 50
    """Optimizer steps between lines of progress."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints: so many are lost at most when a run is killed."""
    eval_every_epochs: int | None = 1
    """Epochs between evaluations; null for none but the last, unless eval_every_steps is set."""
    eval_every_steps: int | None = None
    """Optimizer steps between evaluations, in place of eval_every_epochs."""
    stop_after: int | None = None
    """Optimizer steps after which to end, with an evaluation, though the schedule is longer; null for all of it."""
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    """What shows the run beside its own files: tensorboard, wandb, mlflow (the latter two are optional packages)."""
    best_metric: str = "AP"
    """What the best checkpoint is best in, by its name in an evaluation's line of metrics.jsonl: AP, AP50, AR100,
    per_class/dog, or loss and terms/…, of which less is better."""
    early_stopping: int | None = None
    """Evaluations in a row without a gain in best_metric after which training ends; null: never."""
    validation_loss: bool = False
    """Whether an evaluation also computes the loss by term: it says sooner than AP that a detector overfits."""
    curve_classes: tuple[str, ...] = ()
    """Classes whose AP is drawn in curves.png."""
    max_nonfinite_steps: int = 0
    """Steps with a non-finite loss or gradient to skip before stopping."""
    collective_timeout: float = 1800.0
    """Seconds after which processes give up waiting for one that hangs; must exceed the longest evaluation."""

    def __post_init__(self) -> None:
        counts = (self.accumulation_steps, self.log_every, self.checkpoint_every)
        if min(counts) < 1:
            raise ValueError("accumulation_steps, log_every and checkpoint_every must be at least 1")
        if any(every is not None and every < 1 for every in (self.eval_every_epochs, self.eval_every_steps)):
            raise ValueError("eval_every_epochs and eval_every_steps must be at least 1, or null")
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(f"stop_after must be at least 1, or null, found {self.stop_after}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must lie between 0 and 1 (null switches averaging off), found {self.ema_decay}"
            )
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError("early_stopping must be at least 1, or null")
        if self.best_metric not in STATISTICS and not self.best_metric.startswith(("per_class/", "loss", "terms/")):
            raise ValueError(f"best_metric must be one of {', '.join(STATISTICS)}, per_class/NAME, loss or terms/NAME")
        if self.best_metric.startswith(("loss", "terms/")) and not self.validation_loss:
            raise ValueError(f"best_metric={self.best_metric} needs validation_loss=true")
        if self.max_nonfinite_steps < 0 or self.collective_timeout <= 0:
            raise ValueError("max_nonfinite_steps must not be negative and collective_timeout must be positive")

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise ValueError where a class is named that the data, whose classes these are, do not have."""
        for name in (*self.curve_classes, *self.best_metric.split("per_class/", 1)[1:]):
            if name not in names:
                known = ", ".join(names)[:300]
                raise ValueError(f"trainer.curve_classes, best_metric: there is no class {name!r} in the data: {known}")

    def evaluation_interval(self, steps_per_epoch: int) -> int | None:
        """Optimizer steps between evaluations; None for none but the last."""
        if self.eval_every_steps is None and self.eval_every_epochs is not None:
            return self.eval_every_epochs * steps_per_epoch
        return self.eval_every_steps
