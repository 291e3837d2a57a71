"""One optimizer step, whose result does not depend on how its batch is split over processes and micro-batches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from engine import distributed
from engine.host_memory import keep_free_memory
from structures import Batch, BatchSize, DetectorOutputs, Images, LossOutput, Targets

Precision = Literal["fp32", "bf16", "fp16"]
Criterion = Callable[[DetectorOutputs, Targets, float, int], LossOutput]
"""Called with outputs, targets, and the number of targets and images in the global batch."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Context in which the model runs at the given precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def configure_device(device: torch.device, *, tf32: bool = False, deterministic: bool = False) -> None:
    """Set what is global to the process.

    Args:
        device: of this process; the CPU is always made deterministic, and keeps free memory (host_memory.py).
        tf32: whether fp32 matrix products on CUDA may round their inputs to TF32.
        deterministic: whether CUDA must give the same bits every time.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if device.type == "cpu":
        keep_free_memory()
    if device.type == "cpu" or deterministic:
        # Warnings only: what has no deterministic form is not worth refusing to train. (use_deterministic_algorithms
        # would do the same, after seconds of importing the compiler.)
        torch.set_deterministic_debug_mode("warn")
        # A module with properties, which mypy cannot see.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = deterministic


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed every global random generator of this process for one optimizer step.

    Random state is a function of (seed, rank, step) and is therefore never saved: a resumed run has the same without
    knowing what else has drawn random numbers meanwhile, such as evaluations or the start of data-loading workers.
    """
    state = np.random.SeedSequence([seed % 2**32, rank, step]).generate_state(3, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)
    np.random.seed(int(state[1]) % 2**32)
    random.seed(int(state[2]))


def forward_loss(
    model: Callable[[Images, Targets], DetectorOutputs],
    criterion: Criterion,
    batch: Batch,
    size: BatchSize,
    device: torch.device,
    precision: Precision,
    refusals: list[str] | None = None,
) -> LossOutput:
    """Loss of one micro-batch; the criterion always computes in full precision.

    A criterion refuses predictions that it cannot match. If they are not finite, the loss is NaN, with NaN as the
    gradient of every parameter: other processes wait for gradients, and must learn of it through them. The reason is
    then added to ``refusals``.
    """
    with autocast(device, precision):
        outputs = model(batch.images, batch.targets)
    try:
        return criterion(outputs, batch.targets, *size)
    except ValueError as error:
        if is_finite(outputs):
            raise
        if refusals is not None:
            refusals.append(str(error))
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        return LossOutput(torch.stack([leaf.float().sum() for leaf in leaves]).sum() * float("nan"), {}, {})


def is_finite(values: Any) -> bool:
    """Whether all floating-point tensors in a nest of tuples, lists and dictionaries are finite."""
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float | None) -> Tensor:
    """Scale gradients down to at most the global norm ``clip_norm``; returns the norm before, as a scalar."""
    return nn.utils.clip_grad_norm_(parameters, float("inf") if clip_norm is None else clip_norm)


class OnHost:
    """A number of the device's on its way to the host: reading it does not wait for what the device was given since."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._copy = value.detach().to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if value.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> float:
        """The number, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._copy.numpy())


class OptimizerStep:
    """Forward, backward and update for the micro-batches of one optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        clip_norm: float | None = None,
        compile_layers: bool = False,
    ) -> None:
        """Wrap the model for distributed training where there are several processes.

        Args:
            model: on ``device`` already.
            criterion: called with (outputs, targets, number of targets, number of images in the global batch).
            optimizer: over the model's parameters.
            device: of this process.
            precision: of the model's forward pass; fp16 scales the loss.
            clip_norm: largest global gradient norm.
            compile_layers: whether to compile the layers of encoder and decoder.
        """
        self.module, self.criterion, self.optimizer = model, criterion, optimizer
        self.device, self.precision, self.clip_norm = device, precision, clip_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        model.train()
        if compile_layers:
            cast(Any, model).compile_layers()
        self.model: nn.Module = model
        if distributed.is_connected():
            self.model = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def backward(self, batches: Sequence[Batch], size: BatchSize) -> tuple[Tensor, list[LossOutput]]:
        """Compute clipped gradients of the whole step.

        Args:
            batches: this process's micro-batches, on any device.
            size: of the global batch, over all processes and micro-batches.

        Returns:
            Global gradient norm before clipping, the same on every process and non-finite on all if any loss or
            gradient anywhere was; and the loss of each micro-batch.
        """
        self.optimizer.zero_grad(set_to_none=True)
        # The criterion divides by the targets of the global batch, so that gradients only have to be added up;
        # DistributedDataParallel averages them.
        world = distributed.world_size()
        losses = []
        for index, batch in enumerate(batches):
            batch = batch.to(self.device, non_blocking=True)
            with self._synchronised(index == len(batches) - 1):
                loss = forward_loss(self.model, self.criterion, batch, size, self.device, self.precision)
                total = loss.total.detach()
                # Times NaN if the loss is not finite. Its gradient could be finite all the same, and the other
                # processes, which learn of it through the gradients, would go on.
                self.scaler.scale(loss.total).backward(world + (total - total))
            losses.append(LossOutput(total, loss.terms, loss.diagnostics))
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.parameters, self.clip_norm), losses

    def update(self, norm: Tensor) -> None:
        """Move the weights along the gradients, unless their norm is not finite; a loss scale then goes down.

        A fused optimizer decides that on the device, so that the host need not wait; for others, and where a loss
        scale changes, the host does.
        """
        if getattr(self.optimizer, "_step_supports_amp_scaling", False) and not self.scaler.is_enabled():
            # As torch's loss scaler tells it. The difference is 0, or NaN.
            self.optimizer.found_inf = (norm - norm).ne(0).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            return
        if math.isfinite(float(norm)):
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()
