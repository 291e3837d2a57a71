"""Decoding image files of every kind into 8-bit RGB, the way COCO's tools see them."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 180_000_000
"""Larger pictures are refused: decoding one would take a data-loading worker more than half a gigabyte."""

_DECODER_ERRORS = (
    OSError,
    SyntaxError,  # what Pillow raises for a broken PNG chunk
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    MemoryError,
    OverflowError,
    Image.DecompressionBombError,
)
_EXIF_ORIENTATION = 0x0112


class UnreadableImageError(Exception):
    """An image file that cannot be used; its message names the file and the reason."""


def read_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of the stored pixels, from the header alone.

    Raises:
        UnreadableImageError: there is no such file, or it is not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return picture.height, picture.width
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(_reason(path, error)) from error


def read_image(path: Path | str, stated_size: tuple[int, int] = (0, 0)) -> Tensor:
    """Decodes one image to [3, height, width] uint8 RGB (in memory the channels come last, as resizing likes it).

    The EXIF orientation is ignored: COCO's annotations, pycocotools and torchvision's CocoDetection all refer to the
    pixels as they are stored. The one exception: where the annotation file states the size of the upright picture,
    which is not the size of the stored one, its boxes were drawn on the upright picture, and that is returned.

    16-bit grey is scaled to 8 bits, other grey, palette and CMYK pictures are converted as Pillow does, transparency is
    dropped, and of an animation the first frame is taken.

    Args:
        path: the file.
        stated_size: (height, width) in the annotation file; (0, 0) if unknown.

    Raises:
        UnreadableImageError: missing, truncated, not an image, or larger than ``MAX_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on size and metadata; what matters is raised
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
                pixels = _to_rgb(picture)
                if pixels.shape[:2] != stated_size and pixels.shape[:2] == stated_size[::-1]:
                    turn = _TURNED.get(picture.getexif().get(_EXIF_ORIENTATION, 1))
                    pixels = pixels if turn is None else np.ascontiguousarray(turn(pixels))
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(_reason(path, error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


# The EXIF orientations that swap height and width (5 to 8), as operations on [height, width, 3].
_TURNED = {
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """[height, width, 3] uint8, writable."""
    if picture.mode.startswith("I"):  # I, I;16, I;16B: Pillow's own conversion would clip at 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError("integer pixels beyond 16 bits")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    return np.array(picture.convert("RGB"))


def _reason(path: Path | str, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{path}: {text}"
