"""Where a run can be followed beside its own files: TensorBoard, Weights & Biases, MLflow.

All get the numbers under the names of metrics.jsonl, with the kind of record before them (``train/loss``), and
the configuration and the pictures. Their packages are imported here only, and only where asked for; their own
environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, …) say where they write, and under which account.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from engine.dispensable import dispensable
from engine.whole_files import replacing

LoggerName = Literal["tensorboard", "wandb", "mlflow"]
RUN_IDS = "loggers.json"
PROJECT = "align-detr"


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, directory: Path, config: Mapping[str, Any], step: int) -> None:
        # Imported here: it takes seconds, and processes that write nothing do not need it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```yaml\n{_yaml(config)}\n```", step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; offline (WANDB_MODE=offline), files in the run directory."""

    def __init__(self, directory: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.resolve().name,
            id=_run_id(directory, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(directory),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps of its own may only rise: after a resume some are taken again.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; without MLFLOW_TRACKING_URI, files under ``mlruns`` in the run directory."""

    def __init__(self, directory: Path, config: Mapping[str, Any], step: int) -> None:
        local = "MLFLOW_TRACKING_URI" not in os.environ
        if local:  # later versions want to be told that files are meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.entities import Metric

        uri = (directory.resolve() / "mlruns").as_uri() if local else os.environ["MLFLOW_TRACKING_URI"]
        self._metric, self._client = Metric, mlflow.MlflowClient(uri)
        known = self._client.get_experiment_by_name(name := os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id

        def start() -> str:
            run = self._client.create_run(experiment, run_name=directory.resolve().name).info.run_id
            for key, value in flat(config):
                self._client.log_param(run, _allowed(key), json.dumps(value, ensure_ascii=False)[:500])
            return str(run)

        self._id = _run_id(directory, "mlflow", start)
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_text(self._id, _yaml(config), "config.yaml")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_allowed(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # the most in one call
            self._client.log_batch(self._id, metrics[start : start + 1000])

    def picture(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._id, str(path), f"pictures/step_{step:08d}")

    def close(self) -> None:
        self._client.set_terminated(self._id)


Logger = TensorBoard | WandB | MLflow
_KINDS: dict[LoggerName, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Loggers:
    """Those that were asked for; one that fails is left out from then on."""

    def __init__(self, names: Sequence[LoggerName], directory: Path, config: Mapping[str, Any], step: int) -> None:
        """Open them for a run that starts or goes on after ``step`` optimizer steps."""
        self._open: dict[LoggerName, Logger] = {}
        for name in names:
            with dispensable(name):
                self._open[name] = _KINDS[name](directory, config, step)

    def record(self, kind: str, record: Mapping[str, Any], step: int) -> None:
        """Pass on the numbers of a line of metrics.jsonl."""
        numbers = {f"{kind}/{name}": float(value) for name, value in flat(record) if type(value) in (int, float)}
        self.tell(lambda logger: logger.scalars(numbers, step))

    def tell(self, action: Callable[[Logger], None]) -> None:
        """Have each of them do something."""
        for name in list(self._open):
            logger = self._open.pop(name)
            with dispensable(name):
                action(logger)
                self._open[name] = logger


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as ("outer/inner", value)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield prefix + str(key), value


def _allowed(name: str) -> str:
    """A name that MLflow takes: others' signs are not."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _run_id(directory: Path, logger: LoggerName, make: Callable[[], str]) -> str:
    """The run that this directory was begun with, so that a resumed run goes on in it."""
    file = directory / RUN_IDS
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if logger not in known:
        known[logger] = make()
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(known), encoding="utf-8")
    return known[logger]
