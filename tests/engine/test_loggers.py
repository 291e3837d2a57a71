"""Numbers, configuration and pictures arrive, a resumed run goes on in the same run; a failure costs nothing else."""

import json
import logging
import time
from pathlib import Path

import pytest
from PIL import Image

from engine import dispensable, loggers
from engine.loggers import Loggers
from engine.run_log import Records

CONFIG = {"seed": 5, "model": {"name": "dino", "strides": [8, 16]}}


def write(directory: Path, name: loggers.LoggerName, steps: range) -> None:
    Image.new("RGB", (8, 8), "red").save(directory / "curves.png")
    records = Records(directory, steps[0] - 1, [name], CONFIG)
    for step in steps:
        records.write("train", step, {"loss": 1.0 / step, "terms": {"decoder.0/class": 0.5}, "names": ["no number"]})
    records.write("eval", steps[-1], {"AP": 12.5, "per_class": {"Hühner (3)": 50.0, "Katze": None}})
    records.picture(directory / "curves.png", steps[-1])
    records.close()


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path, "mlflow", range(1, 4))
    write(tmp_path, "mlflow", range(3, 6))
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("align-detr").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "5", "model/name": '"dino"', "model/strides": "[8, 16]"}
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(history) == sorted((step, 1.0 / step) for step in (1, 2, 3, 3, 4, 5))
    assert run.data.metrics["train/terms/decoder.0/class"] == 0.5
    assert run.data.metrics["eval/per_class/Hühner _3_"] == 50.0
    found = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert found == {"config.yaml", "pictures"}
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "pictures")]
    assert pictures == ["pictures/step_00000003", "pictures/step_00000005"]


@pytest.mark.slow
def test_wandb_offline_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb", range(1, 4))
    time.sleep(1.1)  # a run's directory has the second in its name
    write(tmp_path, "wandb", range(3, 6))
    wandb.teardown()  # files are written by another process, which ends here as it does with this one
    run_id = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == len(files) == 2
    for file in files:
        content = file.read_bytes()
        for expected in (b"train/loss", b"train/terms/decoder.0/class", b"eval/AP", b'"dino"', b"curves"):
            assert expected in content, (file, expected)
        assert list((file.parent / "files" / "media" / "images").glob("curves*.png"))


class Failing:
    """Takes so many calls, then raises."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, directory: Path, config: object, step: int) -> "Failing":
        self._take()
        return self

    def _take(self, *arguments: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no way there")

    scalars = picture = close = _take


@pytest.mark.parametrize("calls", range(5))
def test_a_logger_that_fails_says_so_once_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, calls: int
) -> None:
    failing, lasting = Failing(calls), Failing(99)
    monkeypatch.setattr(loggers, "_KINDS", {"wandb": failing, "mlflow": lasting})
    monkeypatch.setattr(dispensable, "_said", set())
    with caplog.at_level(logging.WARNING):
        board = Loggers(["wandb", "mlflow"], tmp_path, {}, 0)
        board.record("train", {"loss": 1.0}, 1)
        board.record("train", {"loss": 2.0}, 2)
        board.tell(lambda logger: logger.picture("curves", tmp_path / "curves.png", 2))
        board.tell(lambda logger: logger.close())
    (said,) = caplog.records
    assert said.getMessage() == "wandb could not be written, the run goes on without (ConnectionError: no way there)"
    assert failing.left == -1, "it is not asked again"
    assert lasting.left == 99 - 5


def test_a_package_that_is_missing_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setattr(dispensable, "_said", set())
    write(tmp_path, "wandb", range(1, 3))
    assert "wandb could not be written, the run goes on without (ModuleNotFoundError" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "loggers.json").exists()
