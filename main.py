"""Train or evaluate a detector.

    python main.py --cfg configs/quickstart.yaml output_dir=runs/mine       # train
    python main.py --cfg configs/quickstart.yaml --resume auto              # go on from the last checkpoint, or start
    python main.py --eval --resume runs/quickstart/checkpoint_best.pth      # evaluate, and write nothing

With torchrun --nproc-per-node N in place of python, N processes share the work. docs/using.md explains keys and files.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import config as configuration
from analysis.detections_file import annotated_images, detections_by_image, read_rows
from analysis.operating_points import draw_all
from config import Config
from datasets import Category, CocoDataset, DataConfig
from engine import checkpoint, distributed, run_log
from engine.coco_metrics import choose_backend
from engine.evaluator import Evaluator
from engine.host_memory import forget_kernels
from engine.inference import prepare_inference
from engine.runs import session
from engine.runs.environment import VERSION, describe_environment
from engine.runs.run_directory import DETECTIONS, PREDICTIONS, RunDirectory, record_start
from engine.runs.transfer import initialise_from
from engine.step import OptimizerStep, Precision, configure_device
from engine.trainer import Trainer
from engine.validation import Validation
from models import Detector
from ops.ms_deform_attn import describe_backend, set_default_backend
from structures import BatchSize
from tools import console

log = logging.getLogger(__name__)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = console.Parser(prog="main.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument(
        "--cfg", type=Path, metavar="FILE", help="YAML file (default: the configuration inside --resume's checkpoint)"
    )
    parser.add_argument(
        "--resume",
        type=lambda text: str(console.home_path(text)),
        metavar="FILE",
        help="checkpoint to go on from or to evaluate, or 'auto' for the last one in output_dir",
    )
    parser.add_argument("--init-from", type=Path, metavar="FILE", help="start from its weights; heads go by class name")
    parser.add_argument("--eval", action="store_true", help="evaluate the checkpoint and write nothing")
    parser.add_argument("--version", action="version", version=f"align-detr {VERSION}")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(arguments)


def read_inputs(args: argparse.Namespace) -> tuple[Config, checkpoint.Loaded | None]:
    """The configuration, and the checkpoint that --resume names."""
    if args.eval and args.resume in (None, session.AUTO):
        raise ValueError("--eval needs --resume CHECKPOINT")
    if args.init_from is not None and args.resume not in (None, session.AUTO):
        raise ValueError("--init-from starts a run and --resume CHECKPOINT goes on with one: give one of them")
    loaded = None
    if args.resume is not None and args.resume != session.AUTO:
        loaded = checkpoint.load(Path(args.resume))
    if args.cfg is None and loaded is not None:
        with checkpoint.understanding(loaded.path):
            return configuration.from_dict(loaded.state["config"], args.overrides, str(loaded.path)), loaded
    if args.cfg is None:
        raise ValueError("--cfg FILE is needed (only --resume CHECKPOINT goes without: it carries its configuration)")
    return configuration.load(args.cfg, args.overrides), loaded


def fit(
    cfg: Config,
    *,
    resume: str | None = None,
    init_from: Path | None = None,
    explicit: checkpoint.Loaded | None = None,
    process_ends: bool = False,
) -> dict[str, Any]:
    """Train from beginning to end, as the command line does.

    Ctrl-C stops it after the step, with a checkpoint, a second one at once; afterwards signals do what they did before.

    Args:
        cfg: such as ``config.load(path, overrides)`` gives.
        resume: a checkpoint to go on from, or "auto": the output directory's last one, if there is one.
        init_from: a file to take weights from, heads by class name.
        explicit: the checkpoint at ``resume``, where it has been read already.
        process_ends: whether this process ends after a signal to stop, so that its handlers may stay.

    Returns:
        The metrics of the last evaluation, named as in metrics.jsonl.

    Raises:
        ValueError: for what a user can mend.
        Interrupted: a signal asked to stop.
    """
    if explicit is None and resume not in (None, session.AUTO):
        explicit = checkpoint.load(Path(resume))
    if explicit is not None:
        checkpoint.check_goes_on(explicit)
    with on_device(cfg) as device:
        directory, loaded = session.open_run(Path(cfg.output_dir), resume, explicit)
        run_log.configure(Path(cfg.output_dir))
        try:
            return prepare(cfg, device, directory, loaded, init_from).fit(process_ends=process_ends)
        finally:
            if directory is not None:
                directory.close()


@contextmanager
def on_device(cfg: Config) -> Iterator[torch.device]:
    """The device of this process, set up, and connected to the other processes."""
    device = distributed.choose_device(cfg.trainer.device)
    configure_device(device, tf32=cfg.trainer.tf32, deterministic=cfg.trainer.deterministic)
    with distributed.process_group(device, cfg.trainer.collective_timeout):
        yield device


def prepare(
    cfg: Config,
    device: torch.device,
    directory: RunDirectory | None,
    loaded: checkpoint.Loaded | None,
    init_from: Path | None = None,
) -> Trainer:
    """Build what a configuration names, ready to train.

    Args:
        cfg: of the run.
        device: of this process.
        directory: the hold on the output directory, which then notes configuration and environment; None: nothing does.
        loaded: checkpoint to go on from.
        init_from: file whose weights a new run starts with.
    """
    output_dir = Path(cfg.output_dir)
    environment = describe_environment(cfg.seed, device)
    with distributed.agreed_errors():  # nothing in here may depend on other processes
        set_default_backend(cfg.op_backend)
        environment |= {"op_backend": describe_backend(device), "metric_backend": choose_backend("auto")}
        cfg.model.backbone.check(load_weights=loaded is None and init_from is None)
        train_set, val_set = cfg.data.build_datasets(unlabelled=cfg.criterion.unlabelled == "ignored")
        for title, dataset in (("training", train_set), ("validation", val_set)):
            for line in dataset.report.lines():
                log.info("%s annotations: %s", title, line)
        if device.type == "cpu" and train_set.many_sizes():
            forget_kernels()
        rank, world, parts = distributed.rank(), distributed.world_size(), cfg.trainer.accumulation_steps
        length = cfg.schedule.total_steps
        loader = cfg.data.build_train_loader(
            train_set, seed=cfg.seed, rank=rank, world_size=world, accumulation_steps=parts, total_steps=length
        )
        categories = [list(category) for category in train_set.categories]
        counts = torch.bincount(train_set.annotations.labels, minlength=len(categories)).tolist()
        cfg = dataclasses.replace(cfg, criterion=cfg.criterion.for_classes(counts))
        validation = build_validation(cfg, val_set, device, output_dir)
        model = build_model(cfg, categories, loaded, init_from).to(device)
        optimizer = cfg.optimizer.build(model)
    step = OptimizerStep(
        model,
        cfg.criterion,
        optimizer,
        device=device,
        precision=cfg.trainer.precision,
        clip_norm=cfg.optimizer.clip_norm,
        compile_layers=cfg.trainer.compile,
    )
    about = {"config": configuration.to_dict(cfg), "categories": categories, "environment": environment}
    trainer = Trainer(
        cfg.trainer,
        step=step,
        schedule=cfg.schedule,
        loader=loader,
        evaluate=validation,
        directory=output_dir,
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        draw_last=lambda: draw_operation(validation.evaluator, output_dir),
        identity={**about, "data": describe_data(train_set, cfg.data)},
    )
    with distributed.agreed_errors():
        if loaded is not None:
            trainer.load_state_dict(loaded)
        if directory is not None:
            record_start(output_dir, configuration.dump(cfg), environment)
    size = cfg.data.size_in_model(val_set, 0)
    for line in run_log.banner(trainer, (len(train_set), len(val_set)), size, describe_backend(device)):
        log.info(line)
    return trainer


def build_model(
    cfg: Config, categories: Sequence[Sequence[Any]], loaded: checkpoint.Loaded | None, init_from: Path | None
) -> Detector:
    """The detector of a run, with the weights that a new one starts from; the trainer loads those of ``loaded``."""
    torch.manual_seed(cfg.seed)
    model = cfg.model.build(len(categories), load_backbone=loaded is None and init_from is None)
    if loaded is None and init_from is not None:
        transfer = initialise_from(
            model, init_from, categories, by_class=model.class_parts, required=model.pretrained_part
        )
        for line in transfer.report():
            log.info("%s: %s", init_from, line)
    return model


def evaluate(cfg: Config, loaded: checkpoint.Loaded, device: torch.device) -> None:
    """Measure a checkpoint's weights (the averaged ones, where there are) as training did."""
    run_log.configure(None)
    with distributed.agreed_errors():
        set_default_backend(cfg.op_backend)
        with checkpoint.understanding(loaded.path):
            step = loaded.state["position"]["step"]
            categories = tuple(Category(*category) for category in loaded.state["categories"])
            model = cfg.model.build(len(categories), load_backbone=False)
            checkpoint.load_evaluated_weights(model, loaded)
        precision, remark = prepare_inference(model, cfg.trainer, device, cfg.trainer.precision)
        val_set = cfg.data.val.build(split="val", categories=categories)
        for line in val_set.report.lines():
            log.info("validation annotations: %s", line)
        validation = build_validation(cfg, val_set, device, precision=precision)
    if remark is not None:
        log.info(remark)
    metrics = validation(model)
    log.info("%s (%d images) %s", loaded.path, metrics["images"], run_log.summarise_metrics(step, metrics))
    for name, value in metrics["per_class"].items():
        log.info("AP of %s: %s", name, "no objects" if value is None else f"{value:.2f}")


def build_validation(
    cfg: Config,
    dataset: CocoDataset,
    device: torch.device,
    directory: Path | None = None,
    precision: Precision | None = None,
) -> Validation:
    mean, std = cfg.data.pixel_statistics
    loader = cfg.data.build_val_loader(dataset, rank=distributed.rank(), world_size=distributed.world_size())
    return Validation(
        loader,
        Evaluator(cfg.data.val.annotations, dataset.categories),
        device=device,
        precision=precision or cfg.trainer.precision,
        mean=mean,
        std=std,
        picture=None if directory is None else directory / PREDICTIONS,
        detections=None if directory is None else directory / DETECTIONS,
        criterion=cfg.criterion if cfg.trainer.validation_loss and directory is not None else None,
        size=BatchSize(len(dataset.annotations.labels), len(dataset)),
    )


def draw_operation(evaluator: Evaluator, directory: Path) -> list[Path]:
    """Draw how the last evaluation's detections do at every threshold, and what is taken for what."""
    ids = [category_id for category_id, _ in evaluator.categories]
    images = annotated_images(evaluator.ground_truth, ids)
    found = detections_by_image(read_rows(directory / DETECTIONS), [image.image_id for image in images], ids)
    return draw_all(directory, [image.objects for image in images], found, [name for _, name in evaluator.categories])


def describe_data(train_set: CocoDataset, data: DataConfig) -> dict[str, Any]:
    """What a step's images are a function of, besides seed and step; see ``checkpoint.check_data``."""
    ids = hashlib.sha256(train_set.annotations.image_ids.numpy().tobytes()).hexdigest()
    order = {"batch_size": data.batch_size, "one_orientation": data.one_orientation}
    return {**order, "images": len(train_set), "image_ids": ids}


def run(arguments: Sequence[str] | None = None) -> None:
    """Raises what :func:`engine.runs.session.exit_code` turns into a line and an exit code."""
    args = parse_arguments(arguments)
    cfg, loaded = read_inputs(args)
    if not args.eval:
        fit(cfg, resume=args.resume, init_from=args.init_from, explicit=loaded, process_ends=True)
        return
    assert loaded is not None
    with on_device(cfg) as device:
        evaluate(cfg, loaded, device)


if __name__ == "__main__":
    session.leave(session.exit_code(run))
