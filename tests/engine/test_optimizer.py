"""Parameter groups and schedules."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.optimizer import (
    CosineSchedule,
    OptimizerConfig,
    Schedule,
    SGDConfig,
    StepSchedule,
    TorchOptimizerConfig,
    load_optimizer_state,
    set_learning_rate,
)


def model() -> nn.Module:
    body = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    return nn.ModuleDict({"backbone": body, "backbone_like": nn.Linear(2, 2), "head": nn.Linear(2, 2)})


def test_groups_by_prefix_and_shape() -> None:
    config = OptimizerConfig(
        lr=1.0, weight_decay=0.5, lr_scales={"backbone": 0.1, "backbone.1": 0.01}, no_decay="norms_and_biases"
    )
    net = model()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in config.build(net).param_groups
        for parameter in group["params"]
    }
    assert found == {
        "backbone.0.weight": (0.1, 0.5),
        "backbone.0.bias": (0.1, 0.0),
        "backbone.1.weight": (0.01, 0.0),
        "backbone.1.bias": (0.01, 0.0),
        "backbone_like.weight": (1.0, 0.5),
        "backbone_like.bias": (1.0, 0.0),
        "head.weight": (1.0, 0.5),
        "head.bias": (1.0, 0.0),
    }


def test_norms_only_are_exempt_as_in_detectron2() -> None:
    """The published rule: by the type of the layer, so that biases and tables of embeddings decay."""
    net = nn.ModuleDict(
        {
            "convolution": nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
            "attention": nn.MultiheadAttention(4, 2),
            "norm": nn.LayerNorm(4),
            "table": nn.Embedding(3, 4),
        }
    )
    net.register_parameter("vector", nn.Parameter(torch.zeros(4)))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = OptimizerConfig(lr_scales={}, no_decay="norms").build(net).param_groups
    found = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    exempt = {"convolution.1.weight", "convolution.1.bias", "convolution.2.weight", "convolution.2.bias"}
    exempt |= {"norm.weight", "norm.bias"}
    assert found == {name: 0.0 if name in exempt else 1e-4 for name in names.values()}


class Layered(nn.Sequential):
    """A backbone of three layers and a part that belongs to none."""

    def layer_depths(self) -> dict[str, int]:
        return {name: 3 - int(name[0]) for name, _ in self.named_parameters()}


def test_the_learning_rate_decays_layer_by_layer() -> None:
    net = nn.ModuleDict({"backbone": Layered(*(nn.Linear(2, 2) for _ in range(4))), "head": nn.Linear(2, 2)})
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    config = OptimizerConfig(lr=1.0, lr_scales={"backbone": 0.5}, layer_decay=0.8)
    found = {
        names[id(parameter)]: group["lr"] for group in config.build(net).param_groups for parameter in group["params"]
    }
    for layer, depth in enumerate((3, 2, 1, 0)):
        assert found[f"backbone.{layer}.weight"] == found[f"backbone.{layer}.bias"] == pytest.approx(0.5 * 0.8**depth)
    assert found["head.weight"] == 1.0
    with pytest.raises(ValueError, match=r"optimizer\.layer_decay: the model has no backbone that knows its layers"):
        config.build(model())


def test_frozen_parameters_are_left_out_and_typing_errors_found() -> None:
    net = model()
    net["backbone"].requires_grad_(False)  # type: ignore[index]  # a ModuleDict
    groups = OptimizerConfig().build(net).param_groups
    assert sum(len(group["params"]) for group in groups) == 4
    with pytest.raises(ValueError, match=r"no parameter is under 'bakbone', known: backbone, backbone_like, head"):
        OptimizerConfig(lr_scales={"bakbone": 0.1}).build(net)
    with pytest.raises(ValueError, match="no trainable parameter"):
        OptimizerConfig(lr_scales={}).build(net.requires_grad_(False))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"clip_norm": 0.0},
        {"lr_scales": {"head": 0.0}},
        {"layer_decay": 0.0},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)  # type: ignore[arg-type]


def test_state_is_restored_but_overridden_values_count() -> None:
    net = model()
    old = OptimizerConfig(lr=1e-3, lr_scales={"backbone": 0.1}).build(net)
    sum(parameter.sum() for parameter in net.parameters()).backward()  # type: ignore[union-attr]
    old.step()
    new = OptimizerConfig(lr=5e-3, weight_decay=0.3, lr_scales={"backbone": 0.1}).build(net)
    load_optimizer_state(new, old.state_dict())
    assert [group["base_lr"] for group in new.param_groups] == [5e-4, 5e-3]
    assert new.param_groups[0]["weight_decay"] == 0.3
    for parameter in net.parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])
    with pytest.raises(ValueError, match=r"groups of sizes \[4, 4\], this run has \[8\]"):
        load_optimizer_state(OptimizerConfig(lr_scales={}).build(net), old.state_dict())


def test_step_schedule_of_the_paper() -> None:
    schedule = StepSchedule(epochs=12, milestones=(11.0,))
    assert schedule.total_steps(100) == 1200
    assert schedule.factor(1099, 100) == 1.0
    assert schedule.factor(1100, 100) == pytest.approx(0.1)
    assert StepSchedule(milestones=(0.5, 1.0)).factor(150, 100) == pytest.approx(0.01)


def test_an_epoch_can_be_a_number_of_steps() -> None:
    """detrex's schedule: 7,500 steps an epoch on any data."""
    schedule = StepSchedule(epochs=12, milestones=(11.0,), epoch_steps=7500)
    for pass_length in (10, 7329):
        assert schedule.total_steps(pass_length) == 90_000
        assert (schedule.factor(82_499, pass_length), schedule.factor(82_500, pass_length)) == (1.0, 0.1)
        assert not schedule.doubts(pass_length)
    assert CosineSchedule(epochs=2, epoch_steps=5).factor(5, 100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="epoch_steps must be at least 1"):
        StepSchedule(epoch_steps=0)


def test_warm_up_is_linear_and_reaches_one() -> None:
    schedule = CosineSchedule(steps=100, warmup_steps=10)
    assert [schedule.factor(step, 7) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert schedule.factor(10, 7) == 1.0
    assert schedule.factor(55, 7) == pytest.approx(0.5)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 50), st.booleans(), st.floats(0.01, 1.0))
def test_factors_stay_within_bounds_and_fall(
    epochs: int, per_epoch: int, warmup: int, cosine: bool, low: float
) -> None:
    schedule: Schedule = (
        CosineSchedule(epochs=epochs, warmup_steps=warmup, final=low)
        if cosine
        else StepSchedule(epochs=epochs, warmup_steps=warmup, decay=low, milestones=(1.0, 2.0))
    )
    factors = [schedule.factor(step, per_epoch) for step in range(schedule.total_steps(per_epoch))]
    assert all(0 < factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    if cosine and after:
        assert after[-1] >= low


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"steps": 0}, {"warmup_steps": -1}])
def test_wrong_lengths_are_refused(wrong: dict[str, int]) -> None:
    for kind in (StepSchedule, CosineSchedule):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kind(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ascending"):
        StepSchedule(milestones=(3.0, 2.0))


def test_set_learning_rate_scales_every_group() -> None:
    optimizer = OptimizerConfig(lr=1.0).build(model())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.25])


def test_schedules_doubt_what_is_never_reached() -> None:
    assert StepSchedule(epochs=12, milestones=(11.0,), warmup_steps=100).doubts(10) == []
    found = StepSchedule(epochs=6, milestones=(4.0, 6.0, 11.0), warmup_steps=100).doubts(10)
    assert found == [
        "schedule.warmup_steps=100 is more than the 60 steps of the training",
        "schedule.milestones [6.0, 11.0] are not reached in 6 epochs",
    ]
    assert CosineSchedule(steps=60, warmup_steps=60).doubts(10) == []


def quadratic(optimizer: torch.optim.Optimizer, net: nn.Module, steps: int) -> torch.Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter - 1).square().sum() for parameter in net.parameters()).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (
            SGDConfig(lr=0.05, lr_scales={}, momentum=0.8, nesterov=True, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01),
        ),
        (
            TorchOptimizerConfig(
                kind="RAdam", lr=0.05, lr_scales={}, arguments={"betas": (0.8, 0.9)}, weight_decay=0.1
            ),
            lambda p: torch.optim.RAdam(p, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1),
        ),
        (
            TorchOptimizerConfig(kind="RMSprop", lr=0.05, lr_scales={}, arguments={"alpha": 0.7, "centered": True}),
            lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.7, centered=True, weight_decay=1e-4),
        ),
    ],
)
def test_other_optimizers_do_what_torchs_do(config, make) -> None:
    torch.manual_seed(0)
    first = model()
    second = model()
    second.load_state_dict(first.state_dict())
    ours, theirs = config.build(first), make(second.parameters())
    assert type(ours) is type(theirs)
    assert torch.allclose(quadratic(ours, first, 5), quadratic(theirs, second, 5), rtol=0, atol=1e-7)
    saved, (group, *_) = ours.state_dict(), ours.param_groups
    fresh = config.build(first)
    load_optimizer_state(fresh, saved)
    assert fresh.state_dict()["state"].keys() == saved["state"].keys()
    set_learning_rate(ours, 0.5)
    assert group["lr"] == 0.025


def test_the_moments_of_another_optimizer_are_refused() -> None:
    net = model()
    adamw, sgd = OptimizerConfig(lr_scales={}).build(net), SGDConfig(lr_scales={}).build(net)
    quadratic(adamw, net, 1)
    quadratic(sgd, net, 1)
    for one, other in ((adamw, sgd), (sgd, adamw)):
        with pytest.raises(ValueError, match="the checkpoint is of another optimizer"):
            load_optimizer_state(one, other.state_dict())
    older = adamw.state_dict()
    del older["param_groups"][0]["decoupled_weight_decay"]  # of which earlier versions of torch know nothing
    load_optimizer_state(adamw, older)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SGDConfig(momentum=1.0), "momentum must lie in"),
        (lambda: SGDConfig(momentum=0.0, nesterov=True), "above 0 with nesterov"),
        (lambda: TorchOptimizerConfig(kind="LBFGS"), "must be a class of torch.optim"),
        (lambda: TorchOptimizerConfig(kind="lr_scheduler"), "must be a class of torch.optim"),
        (lambda: TorchOptimizerConfig(arguments={"beta": 0.9}), "NAdam takes no beta, but lr, betas"),
        (
            lambda: TorchOptimizerConfig(arguments={"betas": (2.0, 0.9)}).build(
                nn.ModuleDict({"backbone": nn.Linear(1, 1)})
            ),
            "NAdam refuses",
        ),
    ],
)
def test_impossible_optimizers_are_refused(make, said) -> None:
    with pytest.raises(ValueError, match=said):
        make()
