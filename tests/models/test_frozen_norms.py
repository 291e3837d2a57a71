"""Frozen norms inside convolutions: the same function, the same gradients, the same names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.parts.any_size import accept_any_size
from models.parts.frozen_norms import FrozenNorm, fold_all, freeze_norms


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in float64, with statistics as of training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.5, 2.0)):
                nn.init.uniform_(getattr(module, tensor), low, high)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.double()


def gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "regnetx_002"])
def test_features_and_gradients_are_those_of_separate_norms(name: str, at_once: bool):
    torch.manual_seed(0)
    model: Any = with_statistics(timm.create_model(name, features_only=True))
    model.requires_grad_(True)
    next(model.parameters()).requires_grad_(False)  # of a frozen stage
    apart = freeze_batch_norm_2d(copy.deepcopy(model))
    accept_any_size(model)
    folded, convolutions = freeze_norms(model.float(), (64, 64))
    folded.double()
    norms = [module for module in folded.modules() if hasattr(module, "folded")]
    assert len(convolutions) == len(norms) > 10
    assert all(norm.folded for norm in norms)
    assert {name: t.shape for name, t in folded.state_dict().items()} == {
        name: t.shape for name, t in apart.state_dict().items()
    }
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    if at_once:
        fold_all(convolutions)
    found, expected = folded(images), apart(images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(folded, found), gradients(apart, expected), rtol=1e-8, atol=1e-12)


class Odd(nn.Module):
    """A convolution that another part reads too, one that is returned, one with a bias, one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.returned, self.biased, self.twice = (nn.Conv2d(3, 3, 1, bias=i == 2) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x: Tensor) -> list[Tensor]:
        shared, returned = self.shared(x), self.returned(x)
        sums = self.norms[0](shared) + shared
        results = [returned, self.norms[1](returned) + sums, self.norms[2](self.biased(x))]
        return [*results, self.norms[3](self.twice(x)) + self.norms[4](self.twice(sums))]


def test_what_others_read_is_not_folded():
    model = with_statistics(Odd()).float()
    apart = freeze_batch_norm_2d(copy.deepcopy(model))
    frozen, convolutions = freeze_norms(model, (8, 8))
    assert convolutions == []
    assert all(type(norm) is FrozenNorm for norm in frozen.norms)  # type: ignore[union-attr]
    assert all(type(norm) is FrozenBatchNorm2d for norm in apart.norms)
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(frozen(images), apart(images))


def test_a_copy_folds_its_own_norms():
    model, convolutions = freeze_norms(timm.create_model("resnet10t", features_only=True), (64, 64))
    both = copy.deepcopy({"model": model, "convolutions": convolutions})
    convolutions[0].norm[0].weight.zero_()
    assert both["convolutions"][0].norm[0] is not convolutions[0].norm[0]
    assert any(module is both["convolutions"][0] for module in both["model"].modules())
    assert both["convolutions"][0].norm[0].weight.all()
