"""main.py and tools.replay with a real, if tiny, detector and data set: what they do, refuse, and say."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_exactness import assert_identical, last
from torch import Tensor
from training_processes import run_processes

import config
import main
from datasets.coco import SampleKey
from datasets.collate import make_batch
from datasets.shapes import ShapesConfig, generate
from engine import checkpoint, distributed
from engine.runs import session
from engine.step import OptimizerStep
from ops.ms_deform_attn import describe_backend, set_default_backend
from structures import Batch, BatchSize
from tools import export, replay

MODEL: dict[str, Any] = {
    "backbone": {"model": "resnet10t", "pretrained": False, "norm": "group", "frozen_stages": 0},
    "embed_dim": 32,
    "num_heads": 4,
    "num_levels": 3,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 32,
    "num_queries": 10,
    "denoising": {"queries": 6},
}

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training images, two of them without objects, and a configuration beside them."""
    directory = tmp_path_factory.mktemp("data")
    generate(directory, ShapesConfig(train_images=8, val_images=2, image_size=64, max_object_size=40, seed=3), 1)
    annotations = directory / "annotations/instances_train.json"
    content = json.loads(annotations.read_text())
    empty = {entry["id"] for entry in content["images"][:2]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in empty]
    annotations.write_text(json.dumps(content))
    values = {
        "model": MODEL,
        "criterion": {"classification": "ia_bce", "matcher": "mixed", "prime_sample_tau": 1.5},
        "data": {
            **{
                split: {
                    "images": f"{directory}/images/{split}",
                    "annotations": f"{directory}/annotations/instances_{split}.json",
                }
                for split in ("train", "val")
            },
            "batch_size": 8,
            "num_workers": 0,
        },
        "schedule": {"name": "cosine", "steps": 2, "warmup_steps": 1},
        "trainer": {"device": "cpu", "ema_decay": 0.9, "log_every": 1, "eval_every_epochs": None},
        "output_dir": f"{directory}/run",
    }
    (directory / "tiny.yaml").write_text(yaml.safe_dump(values))
    return directory


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = session.exit_code(lambda: main.run([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """The run directory of a finished training."""
    main.run(["--cfg", str(data / "tiny.yaml")])
    return data / "run"


def test_run_directory_is_complete(trained: Path) -> None:
    expected = {"config.yaml", "metrics.jsonl", "log.txt", "curves.png", "predictions.png", "environment.jsonl"}
    expected |= {"checkpoint_last.pth", "checkpoint_best.pth"}
    expected |= {"precision_recall.png", "f1_confidence.png", "confusion.png"}
    names = {path.name for path in trained.iterdir()}
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    resolved = config.load(trained / "config.yaml")
    assert config.to_dict(resolved) == config.to_dict(config.load(trained.parent / "tiny.yaml"))
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["train", "train", "eval"]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class"} <= records[-1].keys()
    environment = json.loads((trained / "environment.jsonl").read_text())
    assert {"seed", "commit", "dirty", "packages", "devices", "command"} <= environment.keys()
    assert {"torch", "hotcoco", "huggingface_hub"} <= environment["packages"].keys()
    assert environment["metric_backend"] in ("hotcoco", "pycocotools")
    assert environment["op_backend"].partition(":")[0] in ("cpu", "reference")
    log = (trained / "log.txt").read_text()
    for said in (
        "devices: 1 x cpu",
        "8 images a step",
        "6 classes",
        "warm-up 1 steps (50.0%)",
        "op backend",
        "trainable",
        "G operations for 64 x 64 pixels",
    ):
        assert said in log


def test_evaluation_needs_only_the_checkpoint(trained: Path, command: Command, tmp_path: Path) -> None:
    """Or its weights alone."""
    before = {path: path.read_bytes() for path in trained.iterdir()}
    export.export(trained / "checkpoint_last.pth", "safetensors", tmp_path / "weights.safetensors")
    record = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    for path in (trained / "checkpoint_last.pth", tmp_path / "weights.safetensors"):
        code, output, errors = command("--eval", "--resume", path, "data.eval_batch_size=1")
        assert (code, errors) == (0, "")
        assert f"AP {record['AP']:.2f}  AP50 {record['AP50']:.2f}" in output
    assert {path: path.read_bytes() for path in trained.iterdir()} == before, "evaluation writes nothing"


def test_evaluation_says_when_it_computes_unlike_training(trained: Path, command: Command) -> None:
    code, output, _ = command("--eval", "--resume", trained / "checkpoint_last.pth", "trainer.inference_precision=bf16")
    assert code == 0
    assert "computing in bf16, unlike training" in output


@pytest.mark.slow
@pytest.mark.thorough
def test_compiled_layers_learn_the_same(trained: Path, data: Path, command: Command, tmp_path: Path) -> None:
    code, _, _ = command("--cfg", data / "tiny.yaml", "trainer.compile=true", f"output_dir={tmp_path}/run")
    assert code == 0
    compiled, plain = (last(run)["weights"] for run in (tmp_path / "run", trained))
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


def test_resume_goes_on_and_init_from_keeps_classes(
    trained: Path, data: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    code, output, _ = command(
        "--resume", tmp_path / "run/checkpoint_last.pth", f"output_dir={tmp_path}/run", "schedule.steps=3"
    )
    assert code == 0
    assert "from step 2" in output
    assert "step 3/3" in output
    content = json.loads((data / "annotations/instances_train.json").read_text())
    content["categories"][0]["name"] = "something new"
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    others = [f"data.{split}.annotations={tmp_path}/{split}.json" for split in ("train", "val")]
    others += [f"data.val.images={data}/images/train", f"output_dir={tmp_path}/tuned", "schedule.steps=1"]
    code, _, errors = command("--cfg", data / "tiny.yaml", "--resume", trained / "checkpoint_best.pth", *others)
    assert code == 2
    assert re.match(
        r"error: .*is for other classes: its class '\w+' \(id \d+\) is 'something new'.*--init-from\)\n$", errors
    )
    shutil.rmtree(tmp_path / "tuned")
    others.append("schedule.warmup_steps=9")
    code, output, _ = command("--cfg", data / "tiny.yaml", "--init-from", trained / "checkpoint_best.pth", *others)
    assert code == 0
    assert "warning: schedule.warmup_steps=9 is more than the 1 steps of the training\n" in output
    assert "classes made anew: something new\n" in output
    assert "denoising.label_embedding.weight" in output


def test_one_line_and_exit_code_two(trained: Path, data: Path, command: Command, tmp_path: Path) -> None:
    cfg, checkpoint = data / "tiny.yaml", trained / "checkpoint_last.pth"
    fresh = f"output_dir={tmp_path}/fresh"
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:5000])
    cases: list[tuple[list[object], str]] = [
        ([], "--cfg FILE is needed"),
        (["--eval"], "--eval needs --resume CHECKPOINT"),
        (["--cfg", tmp_path / "none.yaml"], "none.yaml: cannot be read"),
        (["--cfg", cfg, "optimizer.lrr=1"], "unknown key 'lrr', did you mean 'lr'"),
        (["--cfg", cfg], "already holds a run .* --resume auto"),
        (["--cfg", cfg, fresh, "data.batch_size=16"], "batch_size=16 is more than the 8 training images"),
        (["--cfg", cfg, fresh, "data.batch_size=3", "trainer.accumulation_steps=2"], "must be a multiple of 2"),
        (["--cfg", cfg, fresh, "data.train.annotations=none.json"], "no annotation file none.json"),
        (["--cfg", cfg, fresh, "trainer.device=cuda"], "no CUDA device"),
        (["--eval", "--resume", tmp_path / "cut.pth"], "cut.pth: cannot be read as a checkpoint"),
        (["--eval", "--resume", checkpoint, "model.embed_dim=64"], "is for another model"),
        (["--cfg", cfg, fresh, "--init-from", tmp_path / "none.pth"], "no such checkpoint"),
        (["--eval", "--resume", checkpoint, "--init-from", checkpoint], "--init-from starts a run and --resume"),
        (["--cfg", cfg, fresh, "--resume", checkpoint, "--init-from", checkpoint], "--init-from starts a run and"),
        (
            [
                "--cfg",
                cfg,
                fresh,
                "--init-from",
                checkpoint,
                "model.backbone={model: resnet14t, pretrained: other.pth}",
            ],
            "its backbone is another one: .* tensors of backbone.body are absent or of another shape",
        ),
    ]
    if torch.cuda.is_available():
        cases = [case for case in cases if "trainer.device=cuda" not in case[0]]
    for arguments, expected in cases:
        code, _, errors = command(*arguments)
        assert code == 2, (arguments, errors)
        assert re.match(rf"error: .*{expected}", errors), (arguments, errors)
        assert errors.count("\n") == 1, (arguments, errors)


def test_everything_random_at_once_is_exact(
    data: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped mid-epoch and resumed: the real detector with denoising and dropout, mixed data from a worker."""
    colours = "{name: random_flip}, {name: colour_jitter}"
    transforms = f"[{colours}, {{name: iou_crop}}, {{name: mosaic, size: 64, until: 0.7}}, {{name: mixup}}]"
    options = [
        "--cfg", data / "tiny.yaml", "data.num_workers=1", f"data.train.transforms={transforms}", "data.batch_size=4",
        "trainer.accumulation_steps=2", "model.dropout=0.1", "schedule.steps=5",
        "data.sampling={name: repeat_factor, threshold: 0.5}",
    ]  # fmt: skip
    assert command(*options, f"output_dir={tmp_path}/whole")[0] == 0
    update, steps = OptimizerStep.update, itertools.count(1)

    def interrupt(step: OptimizerStep, norm: Tensor) -> None:
        update(step, norm)
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as third_step:
        third_step.setattr(OptimizerStep, "update", interrupt)
        assert command(*options, f"output_dir={tmp_path}/parts")[0] == 128 + signal.SIGTERM
    assert last(tmp_path / "parts")["position"]["step"] == 3
    assert command(*options, f"output_dir={tmp_path}/parts", "--resume", "auto")[0] == 0
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    for state in (whole, parts):
        assert state["position"]["steps_per_epoch"] == 2
        del state["config"]["output_dir"]
    assert_identical(whole, parts)


def test_a_transform_ends_where_the_schedule_says(data: Path, tmp_path: Path) -> None:
    """In a training of two steps, one that ends at half of it is made in the first."""
    smaller = "[{name: resize_exact, height: 32, width: 40, until: 0.5}]"
    overrides = [f"data.train.transforms={smaller}", f"output_dir={tmp_path}"]
    trainer = main.prepare(config.load(data / "tiny.yaml", overrides), torch.device("cpu"), None, None)
    (first,), (second,) = next(trainer.loader.iterate(0, 0)), next(trainer.loader.iterate(1, 0))
    assert [tuple(batch.images.pixels.shape[2:]) for batch in (first, second)] == [(32, 40), (64, 64)]


def test_kernels_are_kept_where_images_are_of_one_size(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(main, "forget_kernels", lambda: forgotten.append("all"))
    for transforms, kept in (("[]", True), ("[{name: random_size_crop, min_size: 32, max_size: 64}]", False)):
        overrides = [f"data.train.transforms={transforms}", f"output_dir={tmp_path}"]
        main.prepare(config.load(data / "tiny.yaml", overrides), torch.device("cpu"), None, None)
        assert bool(forgotten) is not kept


def test_unreadable_validation_images_are_told(trained: Path, data: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(data / "images/val", tmp_path / "val")
    broken = next((tmp_path / "val").iterdir())
    broken.write_bytes(b"broken")
    for options, said in (
        ((), "AP"),
        ((f"data.val.images={tmp_path}/val",), "(1 images unreadable, their objects missed)"),
    ):
        code, output, _ = command("--eval", "--resume", trained / "checkpoint_last.pth", *options)
        assert code == 0
        assert said in output
        assert ("unreadable" in output) == bool(options)


def test_an_evaluation_tells_what_is_wrong_with_its_annotations(
    trained: Path, data: Path, command: Command, tmp_path: Path
) -> None:
    """And blames the checkpoint for none of it."""
    content = json.loads((data / "annotations/instances_val.json").read_text())
    content["annotations"][0]["iscrowd"] = "0"
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(content))
    arguments = "--eval", "--resume", trained / "checkpoint_last.pth", f"data.val.annotations={file}"
    code, output, _ = command(*arguments)
    assert code == 0
    assert "validation annotations: 1 x iscrowd written as text, read as it says" in output
    for entry in content["annotations"]:
        entry["image_id"] = "one"
    file.write_text(json.dumps(content))
    code, output, errors = command(*arguments)
    assert code == 2
    assert f"validation annotations: {len(content['annotations'])} x annotation whose image_id is no whole" in output
    assert errors == f"error: {file}: no objects to find, so that nothing can be evaluated\n"


def test_evaluation_that_is_given_up_leaves_the_last_one(trained: Path, tmp_path: Path) -> None:
    cfg = config.load(trained / "config.yaml")
    _, val_set = cfg.data.build_datasets()
    validation = main.build_validation(cfg, val_set, torch.device("cpu"), tmp_path)
    model = cfg.model.build(6)
    assert validation(model)["unreadable_images"] == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"detections.npz", "predictions.png"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert validation(model, lambda: True) == {}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    validation(model)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != files


def test_diverged_run_is_replayed(
    trained: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that is not finite: the matcher refuses, training stops, and the dump shows the same again."""
    state = torch.load(trained / "checkpoint_last.pth", weights_only=True)
    state["weights"]["heads.0.class_head.bias"][2] = float("nan")
    torch.save(state, tmp_path / "bad.pth")
    code, _, errors = command("--resume", tmp_path / "bad.pth", f"output_dir={tmp_path}/run", "schedule.steps=3")
    assert code == 3
    assert "weights are not finite already (heads.0.class_head.bias)" in errors
    assert "first bad layer heads.0.class_head" in errors
    (path,) = re.findall(r"python -m tools.replay (\S+)\)", errors)
    capsys.readouterr()
    assert replay.main([path]) == 1
    assert "the criterion says: " in capsys.readouterr().out
    dump = torch.load(path, weights_only=True)
    dump["weights"]["heads.0.class_head.bias"][2] = 0
    torch.save(dump, path)
    try:
        assert replay.main([path, "op_backend=reference", "trainer.tf32=true"]) == 0
        assert describe_backend("cpu") == "reference: plain PyTorch, as configured"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        set_default_backend("auto")
        torch.backends.cuda.matmul.allow_tf32 = False
    assert "everything was finite when run again" in capsys.readouterr().out
    assert replay.main([str(trained / "checkpoint_last.pth")]) == 2


def write_gradients(data: Path, splits: dict[str, int], emptied: int) -> None:
    """Gradients and their norm for the first batch, with each number of accumulation steps, to a file of that name.

    The last ``emptied`` images of the global batch lose their targets.
    """
    with distributed.process_group(torch.device("cpu"), 60):
        cfg = config.load(data / "tiny.yaml")
        train_set, _ = cfg.data.build_datasets()
        for name, accumulation_steps in splits.items():
            torch.manual_seed(0)
            model = cfg.model.build(6)
            optimizer = cfg.optimizer.build(model)
            step = OptimizerStep(model, cfg.criterion, optimizer, device=torch.device("cpu"))
            loader = cfg.data.build_train_loader(
                train_set,
                seed=2,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                accumulation_steps=accumulation_steps,
            )
            batches = next(iter(loader.iterate(0, 0)))
            own = [batch.image_ids.tolist() for batch in batches]
            order = [image for part in zip(*distributed.gather(own), strict=True) for ids in part for image in ids]
            batches = [without_targets(batch, set(order[len(order) - emptied :])) for batch in batches]
            counts = [count for batch in batches for count in batch.targets.counts]
            assert any(0 in gathered for gathered in distributed.gather(counts)), "an image without targets takes part"
            per_process = distributed.gather(sum(counts))
            norm, _ = step.backward(batches, BatchSize(sum(per_process), len(order)))
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            if distributed.is_main():
                torch.save({"norm": norm, "targets": torch.tensor(per_process), **gradients}, data / name)


def without_targets(batch: Batch, images: set[int]) -> Batch:
    """The batch, but for the targets of some of its images."""
    kept = [image not in images for image in batch.image_ids.tolist()]
    found = [
        (labels[:0], boxes[:0]) if not keep else (labels, boxes)
        for keep, (labels, boxes) in zip(kept, batch.targets.split(), strict=True)
    ]
    labels, boxes = zip(*found, strict=True)
    counts = tuple(map(len, labels))
    return batch._replace(
        targets=batch.targets._replace(labels=torch.cat(labels), boxes=torch.cat(boxes), counts=counts)
    )


@pytest.mark.parametrize("emptied", [0, 4])
def test_detector_does_not_notice_how_its_batch_is_split(data: Path, emptied: int) -> None:
    """1 × 8 = 1 × 4 × 2 = 2 × 4 = 2 × 2 × 2, denoising, mixed matching and all, in every gradient.

    With four images emptied, the second process of 2 × 4 has no target at all.
    """
    write_gradients(data, {"1x8": 1, "1x4x2": 2}, emptied)
    two = functools.partial(write_gradients, data, {"2x4": 1, "2x2x2": 2}, emptied)
    assert [e.code for e in run_processes(two, processes=2)] == [0, 0]
    whole = torch.load(data / "1x8", weights_only=True)
    total = whole.pop("targets").sum()
    for other in ("1x4x2", "2x4", "2x2x2"):
        split = torch.load(data / other, weights_only=True)
        targets = split.pop("targets")
        assert targets.sum() == total
        assert bool(targets[-1] == 0) == (emptied == 4 and other == "2x4")
        for name, value in whole.items():
            assert value is not None, name
            torch.testing.assert_close(split[name], value, rtol=1e-5, atol=1e-6, msg=f"{other}: {name}")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_validation_loss_is_that_of_one_batch_of_everything(trained: Path, tmp_path: Path, batch_size: int) -> None:
    overrides = ["trainer.validation_loss=true", f"data.eval_batch_size={batch_size}"]
    cfg = config.load(trained / "config.yaml", overrides)
    _, val_set = cfg.data.build_datasets()
    model = cfg.model.build(6)
    checkpoint.load_evaluated_weights(model, checkpoint.load(trained / "checkpoint_last.pth"))
    metrics = main.build_validation(cfg, val_set, torch.device("cpu"), tmp_path)(model)
    samples = [val_set[SampleKey(index, 0)].sample for index in range(len(val_set))]
    batch = make_batch([sample for sample in samples if sample is not None], *cfg.data.pixel_statistics)
    with torch.no_grad():
        expected = cfg.criterion(model.eval()(batch.images), batch.targets)
    assert metrics["loss"] == pytest.approx(float(expected.total), rel=1e-4)
    assert metrics["terms"] == pytest.approx({name: float(value) for name, value in expected.terms.items()}, rel=1e-3)
    assert "decoder.1/giou" in metrics["terms"]


def test_fit_from_python_gives_the_metrics_and_goes_on(data: Path, tmp_path: Path) -> None:
    cfg = config.load(data / "tiny.yaml", [f"output_dir={tmp_path}/run", "schedule.steps=1", "optimizer=sgd"])
    metrics = main.fit(cfg)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics == {key: value for key, value in records[-1].items() if key not in ("kind", "step", "epoch")}
    with pytest.raises(ValueError, match="already holds a run"):
        main.fit(cfg)
    assert main.fit(cfg, resume="auto") == metrics
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        main.fit(cfg, resume=f"{tmp_path}/gone.pth")
