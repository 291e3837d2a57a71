"""Times whole models with each backend of deformable attention: a published-size DINO, or a step of any config.

    python -m benchmarks.inference                                    # DINO R50 on one image of 800 x 1333, inference
    python -m benchmarks.inference --cfg configs/quickstart.yaml --train --size 192 192 --batch 4

The backends take turns in one run; a time is the best of the rounds. On a GPU the peak of the memory is kept as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

import config
from benchmarks.ms_deform_attn import RESULTS, machine
from models import AnyDetector, BackboneConfig, DINOConfig
from ops.ms_deform_attn import available_backends, set_default_backend
from structures import Batch, Images, Targets


def make_batch(size: tuple[int, int], images: int, device: str) -> Batch:
    """Random images of one size with five targets each."""
    sizes = torch.tensor([size] * images)
    boxes = torch.rand(5 * images, 4) * 0.2 + 0.3
    targets = Targets(torch.zeros(5 * images, dtype=torch.long), boxes, (5,) * images)
    batch = Batch(Images(torch.randn(images, 3, *size), sizes), targets, torch.arange(images), sizes)
    return batch.to(device)


def make_call(arguments: argparse.Namespace) -> Callable[[], object]:
    """One inference, or one forward, criterion and backward."""
    if arguments.cfg is None:
        backbone = BackboneConfig(pretrained=False, norm="batch", frozen_stages=0)
        model_config: AnyDetector = DINOConfig(backbone=backbone)
        criterion = None
    else:
        cfg = config.load(arguments.cfg, arguments.overrides)
        model_config, criterion = cfg.model, cfg.criterion
    model = model_config.build(num_classes=80).to(arguments.device)
    batch = make_batch(tuple(arguments.size), arguments.batch, arguments.device)
    if not arguments.train:
        model.eval()

        @torch.inference_mode()
        def infer() -> object:
            return model(batch.images)

        return infer
    if criterion is None:
        raise ValueError("--train needs --cfg FILE, whose criterion is used")

    def step() -> object:
        model.zero_grad()
        return criterion(model(batch.images, batch.targets), batch.targets).total.backward()

    return step


def seconds(call: Callable[[], object], device: str, dtype: torch.dtype | None) -> float:
    """Of one call, in automatic mixed precision if there is a dtype."""
    began = time.perf_counter()
    with torch.autocast(device, dtype, enabled=dtype is not None):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", help="YAML file; without it, DINO with ResNet-50 as published")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the YAML file")
    parser.add_argument("--train", action="store_true", help="forward, criterion and backward instead of inference")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="automatic mixed precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    call = make_call(arguments)
    names = [n for n in ("reference", arguments.device) if available_backends()[n] is None]
    dtype = None if arguments.autocast is None else getattr(torch, arguments.autocast)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for round_ in range(arguments.rounds + 1):
        for name in names:
            set_default_backend(name)
            if arguments.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = seconds(call, arguments.device, dtype)
            if round_:  # the first warms up
                times[name].append(taken)
            if arguments.device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    best = {name: min(values) for name, values in times.items()}
    result = {**machine(arguments.device), "arguments": vars(arguments), "seconds": best, "peak_gib": peaks}
    for name, value in best.items():
        memory = f"  {peaks[name]:6.2f} GiB" if peaks else ""
        print(f"{name:10} {value:8.3f} s  {best['reference'] / value:5.2f}x{memory}")
    if arguments.save:
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
