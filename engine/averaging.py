"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AveragedWeights:
    """PyTorch's averaged model, with a decay that grows with the number of updates.

    The decay of update n is min(decay, (1 + n) / (10 + n)): averages of the first steps would otherwise be those of
    the initialisation, and short runs would evaluate it. (The rule of tf.train.ExponentialMovingAverage.)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._average = AveragedModel(model)
        self._average.requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights; buffers are those of the trained model."""
        return self._average.module

    @property
    def updates(self) -> int:
        """How many steps have gone into the average."""
        return int(self._average.n_averaged)

    def update(self, model: nn.Module) -> None:
        """Take the weights after one optimizer step into the average."""
        n = self.updates
        self._average.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        self._average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["weights"])
        self._average.n_averaged = torch.tensor(state["updates"])
