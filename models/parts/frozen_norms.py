"""BatchNorm that is not trained, computed where it costs least: inside the convolution before it, else in one pass.

A frozen BatchNorm multiplies each channel by a number and adds another. After a convolution without bias, the same
result comes from the convolution itself: of its weights times those numbers, plus those sums. Parameters, buffers and
their names stay as they are; a trained weight gets the gradient that it had before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from models.parts.any_size import EvenConv2dSame


class FrozenNorm(FrozenBatchNorm2d):
    """timm's frozen BatchNorm in one operation, or none where a convolution has done its work."""

    folded = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return _normalise(self, x)


class FrozenNormAct(FrozenBatchNormAct2d):
    """The same with timm's activation behind it."""

    folded = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return self.act(self.drop(_normalise(self, x)))


class NormedConv(nn.Conv2d):
    """A convolution that does the work of the frozen norm behind it."""

    norm: tuple[Any]
    """In a tuple, so that it is no submodule of the convolution."""
    now: Folded | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W'], normalised."""
        weight, shift = self.now or fold(self)
        return self._conv_forward(input, weight, shift)


class NormedConvSame(EvenConv2dSame):
    """The same for a convolution with TensorFlow's padding."""

    norm: tuple[Any]
    now: Folded | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W'], normalised."""
        weight, shift = self.now or fold(self)
        return F.conv2d(self.padded(x), weight, shift, self.stride, (0, 0), self.dilation, self.groups)


class Folded(NamedTuple):
    """What a convolution computes with."""

    weight: Tensor
    """Of the convolution's shape."""
    shift: Tensor
    """[C'], the bias."""


_NORMED: dict[type, type] = {nn.Conv2d: NormedConv, EvenConv2dSame: NormedConvSame}


def freeze_norms(body: nn.Module, image_size: tuple[int, int]) -> tuple[nn.Module, list[Any]]:
    """Freeze the BatchNorm layers of a timm model, and let convolutions do their work.

    Args:
        body: changed in place; it is run once, to see which norm follows which convolution.
        image_size: (height, width) in pixels that the model takes.

    Returns:
        The model, and the convolutions that need :func:`fold`.
    """
    body = freeze_batch_norm_2d(body)
    norms = {FrozenBatchNorm2d: FrozenNorm, FrozenBatchNormAct2d: FrozenNormAct}
    for module in body.modules():
        if type(module) in norms:
            # Same buffers and state, another way to compute.
            module.__class__ = norms[type(module)]
    convolutions = []
    for convolution, norm in _neighbours(body, image_size):
        convolution.__class__ = _NORMED[type(convolution)]
        convolution.norm, norm.folded = (norm,), True
        convolutions.append(convolution)
    return body, convolutions


def fold(convolution: Any) -> Folded:
    """Find what one convolution computes with."""
    (norm,) = convolution.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return Folded(convolution.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale)


def fold_all(convolutions: Sequence[Any]) -> None:
    """Find it for all convolutions at once, in a handful of operations; kept as ``now`` until that is set to None."""
    norms = [convolution.norm[0] for convolution in convolutions]
    with torch.no_grad():
        scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(scales, [norm.weight for norm in norms])
        shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
        torch._foreach_neg_(shifts)
        torch._foreach_add_(shifts, [norm.bias for norm in norms])
    columns = [scale[:, None, None, None] for scale in scales]
    for trained in (False, True):
        chosen = [i for i, convolution in enumerate(convolutions) if convolution.weight.requires_grad == trained]
        if chosen:
            weights = _Scaled.apply([columns[i] for i in chosen], *(convolutions[i].weight for i in chosen))
            for i, weight in zip(chosen, weights, strict=True):
                convolutions[i].now = Folded(weight, shifts[i])


class _Scaled(torch.autograd.Function):
    """Tensors times constants, all in one operation, forward and backward."""

    @staticmethod
    def forward(ctx: Any, scales: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.scales = scales
        return tuple(torch._foreach_mul(weights, scales))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *torch._foreach_mul(gradients, ctx.scales)


def _normalise(norm: Any, x: Tensor) -> Tensor:
    if norm.folded:
        return x
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


class _Readers(TorchDispatchMode):
    """Counts the operations that read a tensor, by its identity."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self._alive: list[Any] = []  # or another tensor could get its identity

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._alive.append(args)
        self.count.update(id(value) for value in args if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def _neighbours(body: nn.Module, image_size: tuple[int, int]) -> list[tuple[Any, Any]]:
    """Convolutions without bias, with the frozen norm that alone reads what they make."""
    made: list[tuple[Any, Tensor]] = []
    read: list[tuple[Any, Tensor]] = []
    hooks = []
    for module in body.modules():
        if type(module) in _NORMED and module.bias is None:
            hooks.append(module.register_forward_hook(lambda source, _, output: made.append((source, output))))
        elif isinstance(module, (FrozenNorm, FrozenNormAct)):
            hooks.append(module.register_forward_pre_hook(lambda norm, inputs: read.append((norm, inputs[0]))))
    if not hooks:
        return []
    training, device = body.training, next(body.parameters()).device
    with torch.no_grad(), _Readers() as readers:
        outputs = body.eval()(torch.zeros(1, 3, *image_size, device=device))
    body.train(training)
    for hook in hooks:
        hook.remove()
    given = {id(output) for output in outputs}
    times = Counter(id(module) for module, _ in (*made, *read))
    sources = {id(tensor): module for module, tensor in made}
    return [
        (sources[id(tensor)], norm)
        for norm, tensor in read
        if id(tensor) in sources
        and id(tensor) not in given
        and readers.count[id(tensor)] == 1
        and times[id(norm)] == times[id(sources[id(tensor)])] == 1
    ]
