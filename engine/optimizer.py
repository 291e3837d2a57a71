"""Optimizers with learning rates by parameter name, and learning-rate schedules that are pure functions of the step.

A schedule keeps no state of its own: what a resumed run needs to know is its step.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


@dataclass(frozen=True, kw_only=True)
class ParameterGroups:
    """What all optimizers have in common, at the values of DINO (arXiv 2203.03605, appendix)."""

    lr: float = 1e-4
    """Learning rate after warm-up, of parameters that no entry of lr_scales names."""
    lr_scales: dict[str, float] = field(default_factory=lambda: {"backbone": 0.1})
    """Factor on the learning rate by prefix of the parameter name, or, as in "*.sampling_offsets", by the name of a
    module wherever it is; the longest that matches wins."""
    layer_decay: float | None = None
    """Factor on the backbone's learning rate for each of its layers, counted down from the last (0.7 to 0.9 for vision
    transformers, arXiv 2106.08254 and 2203.16527), beside lr_scales; null: none."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    no_decay: Literal["nothing", "norms", "norms_and_biases"] = "nothing"
    """What is exempt from weight decay: norms, the weights and biases of normalisation layers (as in detectron2);
    norms_and_biases, every vector or scalar parameter."""
    clip_norm: float | None = 0.1
    """Largest global gradient norm; null switches clipping off."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, found {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, found {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive (null switches clipping off), found {self.clip_norm}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], found {self.layer_decay}")
        for prefix, scale in self.lr_scales.items():
            if scale <= 0:
                raise ValueError(f"lr_scales.{prefix} must be positive (freeze the part instead), found {scale}")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Optimizer over the trainable parameters, in groups of equal learning rate and weight decay.

        Each group has a ``name`` and its ``base_lr``, from which :func:`set_learning_rate` computes ``lr``.

        Raises:
            ValueError: if a prefix of ``lr_scales`` names no parameter, if nothing is trainable, or if there is a
                ``layer_decay`` but no backbone that knows its layers.
        """
        names = [name for name, _ in model.named_parameters()]
        for prefix in self.lr_scales:
            if not any(_has_prefix(name, prefix) for name in names):
                parts = sorted({name.partition(".")[0] for name in names})
                raise ValueError(f"optimizer.lr_scales: no parameter is under '{prefix}', known: {', '.join(parts)}")
        depths = {} if self.layer_decay is None else _layer_depths(model)
        norms = {id(weight) for part in model.modules() if isinstance(part, NORMS) for weight in part.parameters()}
        groups: dict[tuple[str, bool, int], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            matching = [prefix for prefix in self.lr_scales if _has_prefix(name, prefix)]
            prefix = max(matching, key=len, default="")
            exempt = {"nothing": False, "norms": id(parameter) in norms, "norms_and_biases": parameter.ndim < 2}
            key = prefix, not exempt[self.no_decay], depths.get(name, 0)
            if key not in groups:
                groups[key] = self._group(*key)
            groups[key]["params"].append(parameter)
        if not groups:
            raise ValueError("the model has no trainable parameter")
        return self._make(list(groups.values()))

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def _group(self, prefix: str, decayed: bool, depth: int) -> dict[str, Any]:
        lr = self.lr * self.lr_scales.get(prefix, 1.0) * (self.layer_decay or 1.0) ** depth
        title = (prefix or "other") + (f", {depth} deep" if depth else "") + ("" if decayed else ", no decay")
        decay = self.weight_decay if decayed else 0.0
        return {"params": [], "lr": lr, "base_lr": lr, "name": title, "weight_decay": decay}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ParameterGroups):
    """AdamW (arXiv 1711.05101) with gradient clipping."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), found {list(self.betas)}")

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)


@dataclass(frozen=True, kw_only=True)
class SGDConfig(ParameterGroups):
    """Gradient descent with momentum; its weight decay is not decoupled from the gradient."""

    name: Literal["sgd"] = "sgd"
    momentum: float = 0.9
    """Share of the previous step that is taken again."""
    nesterov: bool = False
    """Whether the gradient is that of the place where the momentum leads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise ValueError(f"momentum must lie in [0, 1), above 0 with nesterov, found {self.momentum}")

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True, kw_only=True)
class TorchOptimizerConfig(ParameterGroups):
    """Any optimizer of torch.optim that needs gradients only."""

    name: Literal["torch"] = "torch"
    kind: str = "NAdam"
    """Name of its class."""
    arguments: dict[str, float | bool | tuple[float, ...]] = field(default_factory=dict)
    """Of its constructor, beside lr and weight_decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = getattr(torch.optim, self.kind, None)
        if not isinstance(known, type) or not issubclass(known, torch.optim.Optimizer) or self.kind == "LBFGS":
            raise ValueError(f"kind must be a class of torch.optim, such as NAdam or RMSprop, found {self.kind}")
        taken = list(inspect.signature(known).parameters)[1:]
        for missing in {"lr", "weight_decay"}.union(self.arguments) - set(taken):
            raise ValueError(f"torch.optim.{self.kind} takes no {missing}, but {', '.join(taken)}")

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        try:
            made: torch.optim.Optimizer = getattr(torch.optim, self.kind)(groups, lr=self.lr, **self.arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer: torch.optim.{self.kind} refuses: {error}") from error
        return made


Optimizer = OptimizerConfig | SGDConfig | TorchOptimizerConfig


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group ``factor`` times its base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the moments, but keep the hyper-parameters of this run, so that overriding them on resume works.

    Raises:
        ValueError: if the saved parameters are grouped otherwise, for example under other ``lr_scales``.
    """
    saved_groups = [group["params"] for group in state["param_groups"]]
    current = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group) for group in saved_groups] != current:
        # Earlier versions also listed what no loss depends on; it has no moments, and is no longer trained.
        trained = [[index for index in group if index in state["state"]] for group in saved_groups]
        saved_groups = [group for group in trained if group]
    if [len(group) for group in saved_groups] != current:
        sizes = [len(group["params"]) for group in state["param_groups"]]
        raise ValueError(
            f"the checkpoint's optimizer has parameter groups of sizes {sizes}, this run has {current}: "
            "resume with the same optimizer.lr_scales, optimizer.no_decay and frozen parts, or use --init-from"
        )
    old_keys, keys = (set(groups[0]) for groups in (state["param_groups"], optimizer.param_groups))
    # One more setting is a later version of torch; others on both sides are another optimizer.
    if old_keys - keys and keys - old_keys:
        raise ValueError(
            f"the checkpoint is of another optimizer (with {', '.join(sorted(old_keys - keys))}; this one has "
            f"{', '.join(sorted(keys - old_keys))}): resume with the same optimizer, or use --init-from"
        )
    groups = optimizer.state_dict()["param_groups"]
    for group, old in zip(groups, saved_groups, strict=True):
        group["params"] = old
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


@dataclass(frozen=True, kw_only=True)
class _Length:
    """Length of the training and warm-up, common to all schedules."""

    epochs: int = 12
    """Length in passes over the training set."""
    steps: int | None = None
    """Length in optimizer steps, in place of epochs."""
    epoch_steps: int | None = None
    """Optimizer steps that epochs and milestones count as an epoch (detrex: 7500 on any data); null: one pass."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from nearly zero."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, found {self.epochs}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")
        if self.epoch_steps is not None and self.epoch_steps < 1:
            raise ValueError(f"epoch_steps must be at least 1, found {self.epoch_steps}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, found {self.warmup_steps}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training."""
        return self.steps if self.steps is not None else self.epochs * (self.epoch_steps or steps_per_epoch)

    def doubts(self, steps_per_epoch: int) -> list[str]:
        """What about it looks like a mistake, though it can be run; one line each."""
        total = self.total_steps(steps_per_epoch)
        if self.warmup_steps > total:
            return [f"schedule.warmup_steps={self.warmup_steps} is more than the {total} steps of the training"]
        return []

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


@dataclass(frozen=True, kw_only=True)
class StepSchedule(_Length):
    """Learning rate multiplied by a factor at milestones."""

    name: Literal["step"] = "step"
    milestones: tuple[float, ...] = (11.0,)
    """Epochs (also fractions of one) after which the learning rate is multiplied by decay."""
    decay: float = 0.1
    """Factor at each milestone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.milestones) != sorted(self.milestones) or any(m <= 0 for m in self.milestones):
            raise ValueError(f"milestones must be positive and ascending, found {list(self.milestones)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], found {self.decay}")

    def doubts(self, steps_per_epoch: int) -> list[str]:
        """See the base class; milestones may lie beyond the end."""
        total = self.total_steps(steps_per_epoch)
        epoch = self.epoch_steps or steps_per_epoch
        late = [milestone for milestone in self.milestones if milestone * epoch >= total]
        said = f"schedule.milestones {late} are not reached in {total / epoch:.4g} epochs"
        return [*super().doubts(steps_per_epoch), *([said] if late else [])]

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Factor on the base learning rate in 0-based step ``step``."""
        passed = sum(step >= milestone * (self.epoch_steps or steps_per_epoch) for milestone in self.milestones)
        return self._warmup(step) * self.decay**passed


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_Length):
    """Half a cosine from the end of warm-up to the end of training (arXiv 1608.03983, equation 5)."""

    name: Literal["cosine"] = "cosine"
    final: float = 0.0
    """Factor on the learning rate that the last step approaches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must lie in [0, 1], found {self.final}")

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Factor on the base learning rate in 0-based step ``step``."""
        length = max(1, self.total_steps(steps_per_epoch) - self.warmup_steps)
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / length))
        return self._warmup(step) * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress)))


Schedule = StepSchedule | CosineSchedule


def _layer_depths(model: nn.Module) -> dict[str, int]:
    """By parameter name, how many layers of the backbone lie between it and the backbone's end, itself included."""
    backbone: Any = getattr(model, "backbone", None)
    if not hasattr(backbone, "layer_depths"):
        raise ValueError("optimizer.layer_decay: the model has no backbone that knows its layers; set it to null")
    return {f"backbone.{name}": depth for name, depth in backbone.layer_depths().items()}


def _has_prefix(name: str, prefix: str) -> bool:
    if prefix.startswith("*."):
        return f".{prefix[2:]}." in f".{name}."
    return name == prefix or name.startswith(prefix + ".")
