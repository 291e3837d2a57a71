"""The moving average of the weights."""

import torch
from torch import nn

from engine.averaging import AveragedWeights


def test_average_follows_its_definition() -> None:
    """Against the recursion written out in float64, over the growth of the decay and beyond."""
    model = nn.BatchNorm1d(3).double()
    average = AveragedWeights(model, decay=0.5)
    expected = None
    generator = torch.Generator().manual_seed(0)
    for n in range(20):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, generator=generator))
            assert model.running_mean is not None
            model.running_mean += 1
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        new = model.weight.detach()
        expected = new.clone() if expected is None else decay * expected + (1 - decay) * new
        torch.testing.assert_close(average.model.weight, expected, check_dtype=True)
    assert average.updates == 20
    assert torch.equal(average.model.running_mean, model.running_mean), "buffers are not averaged"
    assert not average.model.training


def test_state_goes_round() -> None:
    model = nn.Linear(2, 2)
    average, other = AveragedWeights(model, 0.9), AveragedWeights(nn.Linear(2, 2), 0.9)
    for _ in range(3):
        with torch.no_grad():
            model.weight += 1
        average.update(model)
    other.load_state_dict(average.state_dict())
    with torch.no_grad():
        model.weight += 1
    average.update(model)
    other.update(model)
    assert other.updates == 4
    assert torch.equal(average.model.weight, other.model.weight)
    assert not torch.equal(average.model.weight, model.weight)
