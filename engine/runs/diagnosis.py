"""Where a loss or gradient first went bad, and everything needed to run that step again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine.checkpoint import serialise
from engine.step import Criterion, Precision, forward_loss, is_finite, seed_step
from engine.whole_files import replacing
from structures import Batch, BatchSize, Images, Targets

KIND = "align-detr non-finite step"


class Diagnosis(NamedTuple):
    """Where a step first went bad, in the order of computation; None or empty where it did not."""

    bad_weights: list[str]
    """Parameters that were not finite before the step."""
    bad_inputs: bool
    """Whether images or targets were not finite."""
    first_module: str | None
    """First module of the model whose output was not finite, in the forward pass."""
    bad_terms: list[str]
    """Loss terms that were not finite."""
    first_gradient: str | None
    """First module, in the backward pass, whose output's gradient was not finite."""
    bad_gradients: list[str]
    """Parameters whose gradient was not finite."""
    refusal: str | None
    """Why the criterion refused the predictions."""
    terms: dict[str, float]

    @property
    def is_finite(self) -> bool:
        """Whether nothing was found."""
        found = (self.bad_weights, self.bad_inputs, self.bad_terms, self.bad_gradients)
        return not any(found) and self.first_module is None and self.first_gradient is None

    def describe(self) -> str:
        """One line for the user."""
        parts = []
        if self.bad_inputs:
            parts.append("images or targets are not finite")
        if self.bad_weights:
            parts.append(f"weights are not finite already ({_some(self.bad_weights)})")
        if self.first_module is not None:
            parts.append(f"first bad layer {self.first_module}")
        if self.refusal is not None:
            parts.append(f"the criterion says: {self.refusal}")
        elif self.bad_terms:
            parts.append(f"first bad loss term {self.bad_terms[0]} ({len(self.bad_terms)} of {len(self.terms)} bad)")
        if self.first_gradient is not None:
            parts.append(f"gradients first bad at the output of {self.first_gradient}")
        if self.bad_gradients:
            parts.append(f"bad gradients of {_some(self.bad_gradients)}")
        return "; ".join(parts) or "everything was finite when run again"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class _Probe:
    """Notes the first module with a non-finite output, and the first with a non-finite gradient of its output."""

    def __init__(self, model: nn.Module) -> None:
        self.first_module: str | None = None
        self.first_gradient: str | None = None
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_hook(self._forward_hook(name or "the model")))

    def _forward_hook(self, name: str) -> Any:
        def check(module: nn.Module, arguments: Any, output: Any) -> None:
            if self.first_module is None and not is_finite(output):
                self.first_module = name
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    self._handles.append(leaf.register_hook(self._gradient_hook(name)))

        return check

    def _gradient_hook(self, name: str) -> Any:
        def check(gradient: Tensor) -> None:
            if self.first_gradient is None and not bool(torch.isfinite(gradient).all()):
                self.first_gradient = name

        return check

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def diagnose(
    model: nn.Module,
    criterion: Criterion,
    batches: Sequence[Batch],
    size: BatchSize,
    *,
    device: torch.device,
    precision: Precision,
    loss_scale: float = 1.0,
) -> Diagnosis:
    """Run one process's part of a step again and find where it goes bad; clears the gradients.

    Args:
        model: without the wrapper for distributed training, in training mode.
        criterion: as in training.
        batches: micro-batches of this process.
        size: of the global batch.
        device: of the model.
        precision: of the forward pass.
        loss_scale: factor on the loss in fp16.
    """
    bad_weights = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    terms: dict[str, float] = {}
    bad_inputs = False
    refusals: list[str] = []
    model.zero_grad(set_to_none=True)
    probe = _Probe(model)
    try:
        for batch in batches:
            batch = batch.to(device)
            bad_inputs = bad_inputs or not is_finite([batch.images.pixels, batch.targets.boxes])
            loss = forward_loss(model, criterion, batch, size, device, precision, refusals)
            for name, value in (*loss.terms.items(), ("total", loss.total.detach())):
                terms[name] = terms.get(name, 0.0) + float(value)
            (loss.total * loss_scale).backward()
    finally:
        probe.remove()
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    model.zero_grad(set_to_none=True)
    bad_terms = [name for name, value in terms.items() if not torch.isfinite(torch.tensor(value))]
    return Diagnosis(
        bad_weights,
        bad_inputs,
        probe.first_module,
        bad_terms,
        probe.first_gradient,
        gradients,
        refusals[0] if refusals else None,
        terms,
    )


class StepRecord(NamedTuple):
    """One process's part of one optimizer step: what :func:`diagnose` needs to run it again elsewhere."""

    seed: int
    rank: int
    step: int
    batches: list[Batch]
    size: BatchSize
    precision: Precision
    loss_scale: float

    def run_again(self, model: nn.Module, criterion: Criterion, device: torch.device) -> Diagnosis:
        """Diagnose the step with the random state it had."""
        seed_step(self.seed, self.rank, self.step)
        return diagnose(
            model,
            criterion,
            self.batches,
            self.size,
            device=device,
            precision=self.precision,
            loss_scale=self.loss_scale,
        )

    def save(self, path: Path, model: nn.Module, diagnosis: Diagnosis, identity: Mapping[str, Any]) -> None:
        """Write the step, the weights it met and the identity of the run (configuration, classes) to one file.

        Raises:
            OSError: if it cannot be written; nothing is left behind.
        """
        content = {
            **identity,
            **self._asdict(),
            "kind": KIND,
            "size": tuple(self.size),
            "batches": [as_tuples(batch.to("cpu")) for batch in self.batches],
            "image_ids": [int(image) for batch in self.batches for image in batch.image_ids],
            "diagnosis": diagnosis._asdict(),
            "weights": model.state_dict(),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            serialise(content, file)

    @classmethod
    def from_content(cls, content: Mapping[str, Any], path: Path) -> StepRecord:
        """The step in a file's content.

        Raises:
            ValueError: if the file is something else.
        """
        if content.get("kind") != KIND:
            raise ValueError(f"{path}: is not the dump of a non-finite step")
        if "size" not in content:
            raise ValueError(f"{path}: was dumped by an earlier version: replay it with that version")
        batches = [Batch(Images(*images), Targets(*targets), *rest) for images, targets, *rest in content["batches"]]
        values = {name: content[name] for name in cls._fields if name not in ("batches", "size")}
        return cls(batches=batches, size=BatchSize(*content["size"]), **values)


def as_tuples(value: Any) -> Any:
    """Plain tuples in the place of named ones, which a file that executes nothing when it is read cannot hold."""
    return tuple(as_tuples(part) for part in value) if isinstance(value, tuple) else value
