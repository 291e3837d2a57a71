"""Lines, records and summaries of training."""

import json
import logging
from pathlib import Path

import pytest
import tiny_training
import torch

from engine import run_log
from engine.run_log import Progress, Records
from engine.runs import session
from engine.runs.faults import DivergedError
from engine.runs.signals import Interrupted
from structures import LossOutput


def loss(total: float, **diagnostics: float) -> LossOutput:
    terms = {f"decoder.{layer}/class": torch.tensor(total / 10 + layer) for layer in (0, 1)}
    return LossOutput(torch.tensor(total), terms, {name: torch.tensor(value) for name, value in diagnostics.items()})


def test_means_over_steps_and_sums_over_micro_batches() -> None:
    progress = Progress(total_steps=10, steps_per_epoch=4, device=torch.device("cpu"))
    progress.add_losses([loss(1.0, iou=0.2), loss(2.0, iou=0.4)])
    progress.end_step(images=8, seconds=2.0, waited=0.5)
    progress.add_losses([loss(3.0, iou=0.6), loss(4.0, iou=0.8)])
    progress.end_step(images=8, seconds=2.0, waited=0.5)
    progress.end_step(images=8, seconds=4.0, waited=3.0)  # a skipped step has no loss, but takes time
    record = progress.summarise(6)
    assert record["loss"] == pytest.approx(5.0)
    assert record["terms"]["decoder.1/class"] == pytest.approx(0.5 + 2)
    assert record["diagnostics"]["iou"] == pytest.approx(0.5)
    assert record["epoch"] == 1.5
    assert record["images_per_second"] == pytest.approx(3.0)
    assert record["data_wait"] == pytest.approx(0.5)
    assert record["eta_seconds"] == pytest.approx(4 * 8 / 3)
    line = progress.line(6, {**record, "grad_norm": 1.0, "lr": 1e-4})
    for part in ("epoch 1.50/2.5", "step 6/10", "loss 5.000", "class 2.500", "data 50%", "ETA 0:00:10"):
        assert part in line
    assert "class 1.500" not in line, "only the last layer's terms"
    progress.end_step(images=8, seconds=1.0, waited=0.0)
    only_skipped = progress.summarise(7)
    assert only_skipped["loss"] != only_skipped["loss"]
    assert "loss nan" in progress.line(7, {**only_skipped, "grad_norm": 1.0, "lr": 1e-4})


def test_records_are_json_and_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    records = Records(tmp_path, 0, ["tensorboard"], {"seed": 5})
    records.write("train", 3, {"loss": float("nan"), "terms": {"decoder.0/class": 0.5}})
    records.write("eval", 4, {"AP": 12.5, "per_class": {"Katze": None, "Hühner": float("inf")}})
    records.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"kind": "train", "step": 3, "loss": None, "terms": {"decoder.0/class": 0.5}}
    assert json.loads(lines[1])["per_class"] == {"Katze": None, "Hühner": None}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/terms/decoder.0/class")] == [(3, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/AP")] == [(4, 12.5)]
    assert events.Tags()["tensors"] == ["config/text_summary"]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    records = Records(tmp_path, 0)
    with pytest.raises(OSError, match=r"cannot write records: No space left on device: .*metrics.jsonl"):
        records.write("train", 1, {})


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Interrupted(15, 3), 143, ""),
        (Interrupted(2, 3), 130, ""),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (DivergedError("bad"), 3, "error: bad\n"),
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 2, "error: x.json: No such file or directory\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "error: CUDA out of memory: raise trainer.accum"),
        (RuntimeError("[pair.cc] Connection closed by peer [::1]"), 1, "error: lost contact with another process, "),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    def run() -> None:
        raise error

    run_log.configure(tmp_path)
    assert session.exit_code(run) == code
    assert capsys.readouterr().err.startswith(said)
    assert said.strip() in (tmp_path / "log.txt").read_text()
    for handler in logging.getLogger().handlers:
        handler.close()


@pytest.mark.parametrize(
    ("processes", "said"),
    [("1", "Connection reset by peer"), ("2", "Caught RuntimeError in DataLoader worker process 0: broken pipe")],
)
def test_what_is_no_lost_contact(processes: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        raise RuntimeError(said)

    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(RuntimeError, match=said):
        session.exit_code(run)


def test_programming_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        session.exit_code(run)

    def refuse() -> None:
        raise ValueError("for users")

    monkeypatch.setenv("ALIGN_DETR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="for users"):
        session.exit_code(refuse)


def test_operations_are_those_of_the_products_by_hand() -> None:
    torch.manual_seed(0)
    detector = tiny_training.TinyDetector(dropout=0.5, batch_norm=True).train()
    detector.class_head.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    state = torch.get_rng_state()
    conv, heads = 2 * 8 * (3 * 3 * 3) * (8 * 10), 2 * 8 * 5 * (3 + 4)
    assert run_log.count_operations(detector, (10, 12), torch.device("cpu")) == conv + heads
    assert detector.training
    assert all(
        parameter.requires_grad == (parameter is not detector.class_head.bias) for parameter in detector.parameters()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
