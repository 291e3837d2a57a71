"""Export a checkpoint as ONNX or as a torch.export program, for use without this project, or export its weights alone.

    python -m tools.export --resume runs/k3/checkpoint_best.pth --format onnx --out detector.onnx
    python -m tools.export --resume runs/k3/checkpoint_best.pth --format safetensors --out detector.safetensors

A safetensors file has configuration and classes inside; --eval --resume, --init-from and tools.predict read it.

Batch size and image size stay free. Inputs: ``images`` [B, 3, H, W] float32, RGB pixels from 0 to 255, each resized as
in evaluation and padded on the right and at the bottom with anything; ``image_sizes`` [B, 2] int64, (height, width)
before padding. Outputs, best first: ``scores`` [B, N], ``labels`` [B, N] int64, ``boxes`` [B, N, 4] xyxy in pixels of
``images``. The result is checked against the model on batches of one and three images of two sizes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import Config, to_dict
from engine import checkpoint
from engine.weights_file import write_weights
from models import Detector
from structures import Images
from tools import console
from tools.predictor import load_model

Format = Literal["onnx", "torch_export", "safetensors"]
Outputs = tuple[Tensor, Tensor, Tensor]

ENDINGS: dict[Format, str] = {"onnx": "onnx", "torch_export": "pt2", "safetensors": "safetensors"}
INPUTS, OUTPUTS = ("images", "image_sizes"), ("scores", "labels", "boxes")
TOLERANCE = 1e-3
"""Largest difference of scores, and of boxes relative to the image, that the check accepts."""
SMALLEST = 65
"""Least height and width: below, levels shrink to a single pixel, which would need a graph of its own."""
CHECKED = ((1, 128, 224), (3, 230, 150))
"""(batch, height, width) of the checks."""


class Deployed(nn.Module):
    """A detector from pixels to boxes with tensors only, as it is exported."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Detector, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """Detect.

        Args:
            images: [B, 3, H, W] float32 RGB in 0..255.
            image_sizes: [B, 2] int64 (height, width) without padding.

        Returns:
            scores [B, N], labels [B, N], boxes [B, N, 4] xyxy in pixels.
        """
        rows = torch.arange(images.shape[2], device=images.device)[None] < image_sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device)[None] < image_sizes[:, 1:]
        inside = (rows[:, :, None] & columns[:, None])[:, None]
        # Padding is zero after normalisation, as in training; no matter what the caller pads with.
        normalised = (images - self.mean) / self.std * inside
        return self.model.detect(self.model(Images(normalised, image_sizes)), image_sizes)


def example(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels and sizes; all images but the first are smaller than the padded size."""
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 255
    sizes = torch.tensor([[height - 13 * i, width - 7 * i] for i in range(batch)])
    return images, sizes


def export_program(deployed: Deployed) -> torch.export.ExportedProgram:
    """The detector as a graph whose batch and image sizes are free."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    height, width = (torch.export.Dim(name, min=SMALLEST, max=8192) for name in ("height", "width"))
    shapes = {"images": {0: batch, 2: height, 3: width}, "image_sizes": {0: batch}}
    # Two different images: a size of one, or equal sides, would be taken for a rule. Without gradients, or what only
    # they need would be exported, too.
    with torch.no_grad():
        return torch.export.export(
            deployed,
            example(2, 192, 256),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def write(program: torch.export.ExportedProgram, kind: Format, path: Path, class_names: Sequence[str]) -> None:
    """Write the file, the class names in it.

    Raises:
        ValueError: the packages for ONNX are not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch_export":
        torch.export.save(program, path, extra_files={"class_names.json": json.dumps(list(class_names))})
        return
    try:
        # Without onnxscript's optimizer: it fuses the two clamps of a box's logit and loses one's bounds. onnxruntime
        # optimizes when it loads the file anyway.
        onnx_program = torch.onnx.export(
            program,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            opset_version=18,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except ImportError as error:
        raise ValueError("ONNX needs more packages: pip install -r requirements-export.txt") from error
    assert onnx_program is not None
    onnx_program.model.metadata_props["class_names"] = json.dumps(list(class_names))
    onnx_program.save(path, external_data=False)


def read(kind: Format, path: Path) -> Callable[[Tensor, Tensor], Outputs]:
    """The exported file as a function, run by what users run it with.

    Raises:
        ValueError: onnxruntime is not installed.
    """
    if kind == "torch_export":
        module: Any = torch.export.load(path).module()
        return module
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("ONNX needs more packages: pip install -r requirements-export.txt") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor, image_sizes: Tensor) -> Outputs:
        results = session.run(list(OUTPUTS), {"images": images.numpy(), "image_sizes": image_sizes.numpy()})
        scores, labels, boxes = (torch.from_numpy(result) for result in results)
        return scores, labels, boxes

    return run


def largest_difference(ours: Outputs, theirs: Outputs, image_sizes: Tensor) -> float:
    """Of scores, and of boxes relative to the image, over detections that are told apart by their scores.

    Detections of nearly equal scores may come in another order; they are compared as a set.
    """
    scores = (ours[0] - theirs[0]).abs().max()
    scale = image_sizes.flip(-1).repeat(1, 2)[:, None]
    worst = [float(scores)]
    for image in range(len(ours[0])):
        boxes, other = ours[2][image] / scale[image], theirs[2][image] / scale[image]
        distance = (boxes[:, None] - other[None]).abs().amax(dim=-1)
        distance = distance.masked_fill(ours[1][image][:, None] != theirs[1][image][None], torch.inf)
        # The last ones may have a partner beyond the cut.
        clear = ours[0][image] > ours[0][image][-1] + TOLERANCE
        if clear.any():
            worst.append(float(distance.amin(dim=1)[clear].max()))
    return max(worst)


def check(deployed: Deployed, run: Callable[[Tensor, Tensor], Outputs]) -> float:
    """Compare on batches of one and three images of two sizes; returns the largest difference.

    Raises:
        ValueError: it is more than ``TOLERANCE``.
    """
    worst = 0.0
    for seed, (batch, height, width) in enumerate(CHECKED):
        images, sizes = example(batch, height, width, seed)
        with torch.inference_mode():
            expected = deployed(images, sizes)
            found = run(images, sizes)
        worst = max(worst, largest_difference(expected, found, sizes))
    if worst > TOLERANCE:
        raise ValueError(f"the exported detector differs from the model by {worst:.1e}, more than {TOLERANCE:g}")
    return worst


def export(path: Path, kind: Format, out: Path, overrides: Sequence[str] = ()) -> float:
    """Export and check; returns the largest difference from the model.

    Raises:
        ValueError: the checkpoint, an override or the result is wrong, or packages are missing.
    """
    if out.suffix != f".{ENDINGS[kind]}":
        raise ValueError(f"--out {out}: a {kind} file ends in .{ENDINGS[kind]}")
    model, config, categories = load_model(path, overrides)
    if kind == "safetensors":
        state = {**checkpoint.load(path).state, "config": to_dict(config)}
        write_weights(out, state)
        return 0.0
    deployed = deploy(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # While it is exported, the attention op takes its plain PyTorch form, whatever the configured backend.
        write(export_program(deployed), kind, out, [category.name for category in categories])
    return check(deployed, read(kind, out))


def deploy(model: Detector, config: Config) -> Deployed:
    """The module that is exported."""
    return Deployed(model, *config.data.pixel_statistics).eval()


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = console.parser("export", __doc__)
    parser.add_argument("--resume", type=Path, required=True, help="checkpoint to export")
    parser.add_argument("--format", choices=tuple(ENDINGS), default="onnx", help="what to write (%(default)s)")
    parser.add_argument("--out", type=Path, help="file to write (default: detector.onnx and so on)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the configuration")
    options = parser.parse_intermixed_args(arguments)
    out = options.out or Path(f"detector.{ENDINGS[options.format]}")
    difference = export(options.resume, options.format, out, options.overrides)
    print(f"wrote {out}; differs from the model by {difference:.1e} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
