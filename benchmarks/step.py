"""Whole models: operations, host reads, time and memory of a training step or an inference, beside public ones.

    python -m benchmarks.step --cfg configs/dino_r50_12ep.yaml --size 480 640 --batch 2
    python -m benchmarks.step --cfg configs/deformable_detr_two_stage_r50_50ep.yaml --infer --peer transformers
    python -m benchmarks.step --cfg configs/quickstart.yaml --size 192 192 --batch 4 --backends reference cpu
    python -m benchmarks.step --cfg configs/shapes/detr.yaml --cfg configs/shapes/dino.yaml --size 64 64 --batch 16

All contenders take turns, each in a process of its own with its own allocator; a time is the best of the rounds, of
the processor where --busy says so. Memory is the growth of the largest resident size over that of the built model; on
a GPU, what was allocated at most. Operations are those that PyTorch dispatches, views left out: on a GPU each is a
launch. The floor is the time that a call's multiplications (convolutions, linear layers, attention; not the sampling
op) would take at the rate at which the same machine multiplies large matrices, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import config
from benchmarks import frame
from engine.step import OptimizerStep, configure_device
from ops.ms_deform_attn import available_backends, set_default_backend
from structures import Batch, BatchSize, Images, Targets
from tools import console

MATRIX = {"cpu": 3072, "cuda": 8192}
"""Side of the matrices whose product gives the rate of the floor."""
Call = Callable[[], object]


class Dispatched(TorchDispatchMode):
    """Counts what PyTorch dispatches, views left out, what it multiplies, and what makes the host wait for a device."""

    READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = flop_registry.get(func.overloadpacket)
        with self:  # in inference mode, what is made of others arrives whole
            if counted is None and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if counted is not None:
            self.flops += counted(*args, **kwargs, out_val=result)
        if not (
            func.is_view or name in ("detach", "lift_fresh", "_unsafe_view") or name.startswith("_record_function")
        ):
            self.operations[name] += 1
        return result

    @property
    def reads(self) -> int:
        """How often the host waited."""
        return sum(count for name, count in self.operations.items() if name in self.READS)


def make_batch(size: tuple[int, int], images: int, device: str = "cpu", targets: int = 7) -> Batch:
    """Random images, the second and all further ones smaller than the first, each with as many random targets."""
    torch.manual_seed(0)
    height, width = size
    sizes = torch.tensor([size] + [(height * 15 // 16, width * 7 // 8)] * (images - 1))
    boxes = torch.rand(targets * images, 4) * 0.2 + 0.3
    what = Targets(torch.arange(targets * images) % 5, boxes, (targets,) * images, tuple(range(images)))
    return Batch(Images(torch.randn(images, 3, *size), sizes), what, torch.arange(images), sizes).to(device)


def ours(cfg: config.Config, batch: Batch, infer: bool, dtype: str) -> Call:
    """A step of this project: forward, matching, losses, backward, clipping and update."""
    device = batch.images.pixels.device
    configure_device(device)
    torch.manual_seed(0)
    model = cfg.model.build(91, load_backbone=False).to(device)
    if infer:
        model.eval()
        enabled = dtype != "float32"

        @torch.inference_mode()
        def call() -> object:
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                return model(batch.images)

        return call
    step = OptimizerStep(
        model,
        cfg.criterion.for_classes([1] * 91),
        cfg.optimizer.build(model),
        device=device,
        precision="fp32" if dtype == "float32" else "bf16",
        clip_norm=cfg.optimizer.clip_norm,
    )
    size = BatchSize(len(batch.targets.labels), len(batch.targets.counts))

    def train() -> object:
        norm, _ = step.backward([batch], size)
        step.update(norm)
        return norm

    return train


def transformers(cfg: config.Config, batch: Batch, infer: bool, dtype: str) -> Call:
    """A step of transformers' two-stage Deformable DETR with ResNet-50, published sizes, its own loss and matcher."""
    library: Any = importlib.import_module("transformers")
    published = library.DeformableDetrConfig(
        use_pretrained_backbone=False,
        use_timm_backbone=False,
        backbone=None,
        backbone_config=library.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        two_stage=True,
        with_box_refine=True,
        num_labels=91,
        num_queries=300,
    )
    device = batch.images.pixels.device
    model = library.DeformableDetrForObjectDetection(published).to(device).train(not infer)
    rows, columns = (torch.arange(n, device=device) for n in batch.images.pixels.shape[-2:])
    height, width = batch.images.sizes[:, :1], batch.images.sizes[:, 1:]
    mask = (rows < height)[:, :, None] & (columns < width)[:, None]
    labels = [
        {"class_labels": classes, "boxes": boxes}
        for classes, boxes in zip(
            batch.targets.labels.split(batch.targets.counts),
            batch.targets.boxes.split(batch.targets.counts),
            strict=True,
        )
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)

    def call() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != "float32"), torch.set_grad_enabled(not infer):
            outputs = model(batch.images.pixels, mask.long(), labels=None if infer else labels)
        if infer:
            return outputs
        optimizer.zero_grad()
        outputs.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return float(norm)

    return call


class Contender(NamedTuple):
    """What takes turns with others."""

    cfg: str
    by: str
    """A backend of the project's op, transformers, or module:function."""

    def make(self, arguments: argparse.Namespace) -> Call:
        """Build the model; the result is one step or inference of it."""
        cfg = config.load(self.cfg, arguments.overrides)
        batch = make_batch(tuple(arguments.size), arguments.batch, arguments.device, arguments.targets)
        if self.by in available_backends():
            set_default_backend(self.by)
            return ours(cfg, batch, arguments.infer, arguments.dtype)
        made = transformers if self.by == "transformers" else console.named_function(self.by)
        return made(cfg, batch, arguments.infer, arguments.dtype)


def contenders(arguments: argparse.Namespace) -> dict[str, Contender]:
    """All of them by name: by file where there are several, by what computes where there are several."""
    files = arguments.cfg or ["configs/dino_r50_12ep.yaml"]
    by = [*(arguments.backends or [arguments.device]), *arguments.peer]
    found = {}
    for cfg in files:
        for one in by:
            parts = [Path(cfg).stem] * (len(files) > 1) + [one] * (len(by) > 1 or len(files) == 1)
            found[" ".join(parts)] = Contender(cfg, one)
    return found


class Turns:
    """One contender in this process, called when it is its turn."""

    call: Call

    @classmethod
    def begin(cls, contender: Contender, arguments: argparse.Namespace) -> dict[str, Any]:
        """Build it, and measure the memory and the operations of its first calls."""
        cls.call = contender.make(arguments)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cls.call()
        cls.call()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        if arguments.device == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        with Dispatched() as seen:
            cls.call()
        operations = {"operations": seen.operations.total(), "reads": seen.reads, "gflop": seen.flops / 1e9}
        return {"memory_mib": memory, "seconds": float("inf"), **operations}

    @classmethod
    def take(cls, arguments: argparse.Namespace) -> float:
        """Time its next call."""
        return seconds(cls.call, arguments)


def seconds(call: Call, arguments: argparse.Namespace) -> float:
    """Time of a call, or the processor's with --busy."""
    clock = time.process_time if arguments.busy else time.perf_counter
    began = clock()
    call()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def product(arguments: argparse.Namespace) -> Call:
    """One product of two large matrices in the contenders' type."""
    side, dtype = MATRIX[arguments.device], getattr(torch, arguments.dtype)
    left, right = (torch.randn(side, side, device=arguments.device, dtype=dtype) for _ in range(2))
    return lambda: left @ right


@console.command
def main() -> int:
    """The command line."""
    parser = frame.parser(__doc__)
    parser.add_argument(
        "--cfg", action="append", help="YAML file; may be given several times (default configs/dino_r50_12ep.yaml)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the YAML files")
    parser.add_argument("--infer", action="store_true", help="inference instead of a training step")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--targets", type=int, default=7, help="of each image (default: %(default)s, the mean of COCO)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: mixed precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", help="of the op (default: that of the device)")
    parser.add_argument(
        "--peer", nargs="+", default=[], help="transformers, or module:function(cfg, batch, infer, dtype)"
    )
    parser.add_argument("--busy", action="store_true", help="processor time instead of time, for a machine in use")
    arguments = parser.parse_args()
    found = contenders(arguments)
    for name in {one.by for one in found.values()} - {*available_backends(), "transformers"}:
        console.named_function(name)  # before anything takes its time
    rows: dict[str, dict[str, Any]] = {}
    multiply, fastest = product(arguments), float("inf")
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as running:
        processes = {name: running.enter_context(spawn.Pool(1)) for name in found}
        for name, process in processes.items():
            rows[name] = process.apply(Turns.begin, (found[name], arguments))
        for _ in range(arguments.rounds):
            for name, process in processes.items():
                rows[name]["seconds"] = min(rows[name]["seconds"], process.apply(Turns.take, (arguments,)))
            fastest = min(fastest, seconds(multiply, arguments))
    rate = 2 * MATRIX[arguments.device] ** 3 / fastest / 1e9
    last = rows[name]["seconds"]
    print(f"multiplying matrices of {MATRIX[arguments.device]}: {rate:.0f} GFLOP/s")
    print(f"{'':24} operations  reads   seconds  of the last   GFLOP  times their floor   memory beyond the model")
    for name, row in rows.items():
        print(
            f"{name:24} {row['operations']:10d} {row['reads']:6d} {row['seconds']:9.3f} {last / row['seconds']:11.2f}x"
            f" {row['gflop']:8.0f} {row['seconds'] * rate / row['gflop']:17.2f}x {row['memory_mib']:15.0f} MiB"
        )
    frame.save(
        arguments.save,
        {**frame.machine(arguments.device), "arguments": vars(arguments), "product_gflop_s": rate, "rows": rows},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
