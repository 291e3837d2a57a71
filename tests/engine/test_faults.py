"""Losses and gradients that are not finite: traced, kept, and run again; skipped up to a limit."""

import json
import math
import re
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exactness import assert_identical, last
from tiny_training import Options, TinyDetector, build, criterion, decoder_outputs, make_batch, map_pixels, train
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from training_processes import run_processes

from benchmarks.step import Dispatched
from engine.runs.diagnosis import StepRecord, diagnose
from engine.runs.faults import MAX_DUMPS, DivergedError, TakenStep
from engine.runs.signals import StopRequest
from engine.step import OnHost, OptimizerStep
from structures import Batch, BatchSize, DetectorOutputs, Images, LossOutput, Targets

CPU = torch.device("cpu")
TWO_IMAGES = BatchSize(num_targets=3, num_images=2)


def taken(step: int, batch: Batch, losses: Sequence[LossOutput] = ()) -> TakenStep:
    """A step on two images that was not finite."""
    return TakenStep(step, [batch], TWO_IMAGES, losses, 1.0, [], OnHost(torch.tensor(math.nan)))


def nan_as_zero(value: Any) -> Any:
    return torch.nan_to_num(value) if isinstance(value, Tensor) else 0.0 if value != value else value


def test_non_finite_image_stops_training_with_its_origin(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"), nan_at=6, checkpoint_every=2)
    expected = (
        r"step 6 on rank 0: images or targets are not finite; first bad layer backbone; "
        r"first bad loss term decoder.0/class .*python -m tools.replay .*nonfinite_step6_rank0.pth"
    )
    with pytest.raises(DivergedError, match=expected):
        train(options)
    dump = torch.load(tmp_path / "run/nonfinite_step6_rank0.pth", weights_only=True)
    assert dump["image_ids"] == list(range(48, 56))
    assert dump["config"] == {"seed": 7}
    # The weights are those the step met, and the last checkpoint is that of the step before.
    assert_identical(dict(dump["weights"]), dict(last(options.directory)["weights"]))
    assert last(options.directory)["position"]["step"] == 6


def test_dump_runs_again_with_the_same_random_numbers(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        train(Options(directory=str(tmp_path / "run"), nan_at=2))
    path = tmp_path / "run/nonfinite_step2_rank0.pth"
    content = torch.load(path, weights_only=True)
    record = StepRecord.from_content(content, path)
    model = TinyDetector(dropout=0.2)
    model.load_state_dict(content["weights"])
    assert record.size == BatchSize(num_targets=sum(sum(b.targets.counts) for b in record.batches), num_images=8)
    assert [batch.targets.seeds for batch in record.batches] == [tuple(range(16, 24))]
    found = record.run_again(model, criterion, CPU)
    assert json.dumps(found._asdict()) == json.dumps(content["diagnosis"])
    # With the batch mended, what is left is finite, and equals what training would have computed.
    mended = record._replace(batches=[map_pixels(batch, torch.nan_to_num) for batch in record.batches])
    assert mended.run_again(model, criterion, CPU).terms == mended.run_again(model, criterion, CPU).terms
    assert mended.run_again(model, criterion, CPU).is_finite
    with pytest.raises(ValueError, match="is not the dump of a non-finite step"):
        StepRecord.from_content({"weights": {}}, path)
    former = {name: value for name, value in content.items() if name != "size"} | {"num_targets": 3}
    with pytest.raises(ValueError, match=r"nonfinite_step2_rank0.pth: was dumped by an earlier version"):
        StepRecord.from_content(former, path)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_skipped_steps_are_counted_and_leave_the_weights_alone(tmp_path: Path, batch_norm: bool) -> None:
    options = Options(directory=str(tmp_path / "run"), nan_at=6, max_nonfinite_steps=1, batch_norm=batch_norm)
    trainer = train(options)
    assert trainer.step == options.steps
    assert trainer.faults.counters["nonfinite_steps"] == 1
    assert "skipped, 1 of 1" in (tmp_path / "run/log.txt").read_text()
    state = last(options.directory)
    assert state["counters"]["nonfinite_steps"] == 1
    assert state["ema"]["updates"] == options.steps - 1
    assert next(iter(state["optimizer"]["state"].values()))["step"] == options.steps - 1
    dump = torch.load(tmp_path / "run/nonfinite_step6_rank0.pth", weights_only=True)
    for weights in (state["weights"], state["ema"]["weights"], dump["weights"]):
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    if batch_norm:
        assert state["weights"]["norm.num_batches_tracked"] == options.steps - 1
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[6]["grad_norm"] is None, "NaN is not JSON"
    with pytest.raises(DivergedError):  # the count outlives a restart
        train(replace(options, steps=14, nan_at=12, resume="auto"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("nan_at", [5, 6])
def test_a_bad_step_that_is_found_late_leaves_what_it_leaves_when_found_at_once(
    tmp_path: Path, nan_at: int, optimizer: str
) -> None:
    """Without a line of progress after every step, the next one is computed before the host asks."""
    runs = {}
    for log_every in (1, 4):
        options = Options(
            directory=str(tmp_path / f"every{log_every}"),
            nan_at=nan_at,
            max_nonfinite_steps=1,
            batch_norm=True,
            log_every=log_every,
            optimizer=optimizer,
            accumulation_steps=2,
        )
        train(options)
        state = dict(last(options.directory))
        dump = torch.load(f"{options.directory}/nonfinite_step{nan_at}_rank0.pth", weights_only=True)
        lines = (Path(options.directory) / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        runs[log_every] = state, dump, {record["step"]: record for record in records}
    (state, dump, each), (late, late_dump, fourth) = runs[1], runs[4]
    assert_identical(late, state)
    assert_identical(*(tree_map(nan_as_zero, found) for found in (late_dump, dump)))
    for step in (4, 8, 12):
        steps = [each[taken] for taken in range(step - 3, step + 1) if taken != nan_at + 1]
        assert fourth[step]["loss"] == pytest.approx(sum(record["loss"] for record in steps) / len(steps))
        assert fourth[step]["counters"] == each[step]["counters"]
        assert fourth[step]["grad_norm"] == each[step]["grad_norm"]


def test_processes_take_the_step_after_a_late_one_again_together(tmp_path: Path) -> None:
    """One process alone has the bad images; the other has begun its next step by the time it is told."""
    options = Options(str(tmp_path / "every1"), nan_at=5, nan_rank=1, max_nonfinite_steps=1, batch_norm=True)
    late = replace(options, directory=str(tmp_path / "every4"), log_every=4)
    ended = run_processes([options, late], processes=2)
    assert [e.code for e in ended] == [0, 0], ended
    assert_identical(last(late.directory), last(options.directory))
    for run in (options, late):
        assert [path.name for path in Path(run.directory).glob("nonfinite*")] == ["nonfinite_step5_rank1.pth"]


def test_a_step_asks_nothing_of_the_device(tmp_path: Path) -> None:
    trainer = build(Options(directory=str(tmp_path / "run"), log_every=100, checkpoint_every=100, ema_decay=None))
    Path(tmp_path / "run").mkdir()
    with StopRequest() as stop:
        steps = trainer.steps(stop)
        next(steps)
        with Dispatched() as seen:
            for _ in range(3):
                next(steps)
        steps.close()
    assert seen.operations["_fused_adamw_"] == 6, "of two groups of parameters, in three steps"
    assert seen.reads == 0


def test_dumps_are_bounded(tmp_path: Path) -> None:
    trainer = build(Options(directory=str(tmp_path), max_nonfinite_steps=100))
    batch = make_batch([1, 2])
    batch = map_pixels(batch, lambda pixels: pixels * float("inf"))
    for step in range(MAX_DUMPS + 2):
        trainer.faults.handle(trainer.optimizer_step, taken(step, batch))
    assert len(list(tmp_path.glob("nonfinite_*.pth"))) == MAX_DUMPS


def test_full_disk_leaves_the_diagnosis_and_no_half_dump(tmp_path: Path) -> None:
    trainer = build(Options(directory=str(tmp_path), ballast_mib=2))
    batch = make_batch([1, 2])
    batch = map_pixels(batch, lambda pixels: pixels * float("inf"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(DivergedError, match=r"first bad layer backbone.*cannot keep it: File too large"):
            trainer.faults.handle(trainer.optimizer_step, taken(4, batch))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_processes_stop_together_and_the_guilty_one_keeps_the_batch(tmp_path: Path) -> None:
    ended = run_processes([Options(directory=str(tmp_path / "run"), nan_at=3, nan_rank=1)], processes=2)
    assert [e.code for e in ended] == [3, 3], ended
    errors = "".join(e.errors for e in ended)
    assert errors.count("error") == 1
    assert re.search(r"^error: loss or gradient is not finite: step 3 on rank 1: images or targets", errors, re.M)
    assert [path.name for path in (tmp_path / "run").glob("nonfinite*")] == ["nonfinite_step3_rank1.pth"]


class _Spoiled(nn.Module):
    """A detector in which one layer goes bad in the forward or only in the backward pass."""

    def __init__(self, forward: bool) -> None:
        super().__init__()
        self.detector = TinyDetector()
        self.scale = nn.Parameter(torch.ones(()))
        self.spoil_forward = forward

    def forward(self, images: Images, targets: Targets) -> DetectorOutputs:
        logits, boxes = self.detector(images).groups["decoder"].prediction
        # 0 forwards; the derivative of the square root at 0 is infinite.
        return decoder_outputs(logits / 0 if self.spoil_forward else logits + (logits * 0).sqrt() * self.scale, boxes)


def test_diagnosis_tells_forward_from_backward() -> None:
    def run(model: nn.Module) -> Any:
        return diagnose(model, criterion, [make_batch([1, 2])], TWO_IMAGES, device=CPU, precision="fp32")

    forward, backward, good = run(_Spoiled(True)), run(_Spoiled(False)), run(TinyDetector())
    assert forward.first_module == "the model"
    assert forward.bad_terms[0] == "decoder.0/class"
    assert backward.first_module is None
    assert not backward.bad_terms
    assert backward.first_gradient == "detector"
    assert "detector.class_head.weight" in backward.bad_gradients
    assert "detector.box_head.weight" not in backward.bad_gradients
    assert good.is_finite
    assert good.describe() == "everything was finite when run again"
    model = TinyDetector()
    with torch.no_grad():
        model.box_head.bias[0] = float("inf")
    assert run(model).bad_weights == ["box_head.bias"]


def test_refusing_criterion_becomes_a_non_finite_gradient_everywhere() -> None:
    """Other processes wait for gradients: an exception on one of them would leave them waiting."""

    def refusing(outputs: DetectorOutputs, targets: Targets, num_targets: float, num_images: int) -> LossOutput:
        if not bool(torch.isfinite(outputs.result.logits).all()):
            raise ValueError("layer 0 predicts NaN")
        raise ValueError("a wrong configuration")

    model = TinyDetector()
    step = OptimizerStep(model, refusing, torch.optim.SGD(model.parameters()), device=CPU)
    bad = make_batch([1, 2])
    bad = map_pixels(bad, lambda pixels: pixels * float("nan"))
    norm, _ = step.backward([bad], TWO_IMAGES)
    assert not bool(torch.isfinite(norm))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    found = diagnose(model, refusing, [bad], TWO_IMAGES, device=CPU, precision="fp32")
    assert "the criterion says: layer 0 predicts NaN" in found.describe()
    with pytest.raises(ValueError, match="a wrong configuration"):
        step.backward([make_batch([1, 2])], TWO_IMAGES)


def test_infinite_loss_with_finite_gradient_is_noticed() -> None:
    def infinite(outputs: DetectorOutputs, targets: Targets, num_targets: float, num_images: int) -> LossOutput:
        total: Tensor = outputs.result.logits.sum() + outputs.result.boxes.sum() + float("inf")
        return LossOutput(total, {}, {})

    model = TinyDetector()
    step = OptimizerStep(model, infinite, torch.optim.SGD(model.parameters()), device=CPU)
    norm, _ = step.backward([make_batch([1, 2])], TWO_IMAGES)
    assert not bool(torch.isfinite(norm))


def test_half_precision_overflow_is_the_scalers_business(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"), precision="fp16")
    trainer = build(options)
    Path(options.directory).mkdir()
    # Beyond what gradients in fp16 can hold.
    trainer.optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    trainer.fit()
    counters = trainer.faults.counters
    assert counters["overflows"] > 0
    assert counters["nonfinite_steps"] == 0
    assert trainer.optimizer_step.scaler.get_scale() == 2.0 ** (20 - counters["overflows"])
    assert not list((tmp_path / "run").glob("nonfinite*"))


def test_persistent_overflow_in_half_precision_stops(tmp_path: Path) -> None:
    trainer = build(Options(directory=str(tmp_path), precision="fp16"))
    step = trainer.optimizer_step
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    batch = make_batch([1, 2])
    huge = map_pixels(batch, lambda pixels: pixels * 1e30)
    _, losses = step.backward([huge], TWO_IMAGES)
    with pytest.raises(DivergedError):
        trainer.faults.handle(step, taken(5, huge, losses))
