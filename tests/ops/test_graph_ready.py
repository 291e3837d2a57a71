"""Models could be captured as CUDA graphs: nothing on the way asks the host, and no value of a batch stays in them.

The first is seen on fake CUDA tensors; the second by recording, on the CPU, what a batch dispatches, and running it on
another batch of the same shape, as a graph that is replayed would.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from models import BackboneConfig, DINOConfig
from models.parts.denoising import attention_mask
from ops.ms_deform_attn import backends
from structures import Images


class Watch(TorchDispatchMode):
    """Keeps what is dispatched, and what has come from another device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        devices = {a.device.type for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and devices and result.device.type not in devices:
            self.copies.append(f"{func} {result.shape}")
        return result


CONFIG = DINOConfig(
    backbone=BackboneConfig(model="resnet10t", pretrained=False, norm="group", frozen_stages=0),
    embed_dim=64,
    num_heads=4,
    num_points=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=96,
    num_queries=20,
)


def test_inference_asks_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static shapes, no number read back, nothing copied from the host, and the op as a kernel."""
    monkeypatch.setattr(backends, "_failures", {"cuda": None, "cpu": None})
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = CONFIG.build(5).eval()
            images = Images(torch.randn(2, 3, 96, 128), torch.tensor([(96, 128), (80, 100)]))
        with torch.no_grad(), Watch() as watch:
            model(images)
        assert sum("ms_deform_attn" in name for name in watch.operations) == 3
        assert not watch.copies
        with pytest.raises(DataDependentOutputException):  # this is how a read would show
            images.sizes.sum().item()


def batch(seed: int, sizes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Pixels and sizes of two images; content, boxes and mask of noised and other queries."""
    generator = torch.Generator().manual_seed(seed)
    content, boxes = torch.randn(2, 20, 64, generator=generator), torch.rand(2, 20, 4, generator=generator)
    mask = attention_mask(torch.randint(0, 3, (2, 8), generator=generator), 12)
    return torch.randn(2, 3, 96, 128, generator=generator), torch.tensor(sizes), content, boxes, mask


@pytest.mark.parametrize("training", [False, True], ids=["inference", "encoder and decoder, forward and backward"])
def test_what_one_batch_dispatches_computes_every_batch_of_its_shape(training: bool) -> None:
    torch.manual_seed(0)
    model = CONFIG.build(5).train(training)
    heads = [model.heads[0]] * CONFIG.decoder_layers
    trained = [*model.encoder.parameters(), *model.decoder.parameters(), *model.heads.parameters()]
    with torch.no_grad():  # or boxes get no gradient
        for head in (model.heads[0].box_head.layers[-1], model.query_selection.heads.box_head.layers[-1]):
            torch.nn.init.normal_(head.weight, std=0.1)

    def compute(pixels: Tensor, sizes: Tensor, content: Tensor, boxes: Tensor, mask: Tensor) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return list(model(Images(pixels, sizes)).result)
        prediction = model.decoder(content, boxes, model.encode(Images(pixels, sizes)), heads, mask)
        loss = prediction.logits.square().sum() + prediction.boxes.square().sum()
        return [*(part.detach() for part in prediction), *torch.autograd.grad(loss, trained)]

    first, second = batch(1, [(96, 128), (80, 100)]), batch(2, [(61, 128), (96, 64)])
    recorded = make_fx(compute)(*first)
    for given in (second, first):
        for found, expected in zip(recorded(*given), compute(*given), strict=True):
            torch.testing.assert_close(found, expected)
    assert not torch.allclose(recorded(*first)[0], recorded(*second)[0], atol=0.01)
