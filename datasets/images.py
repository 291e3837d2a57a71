"""Decoding image files of every kind into 8-bit RGB, the way COCO's tools see them."""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from ops.errors import describe_error

MAX_PIXELS = 180_000_000
"""Larger pictures are refused: decoding one would take a data-loading worker more than half a gigabyte."""

Image.init()
_PLAIN_FORMATS = {
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "SGI",
    "TGA",
    "TIFF",
    "WEBP",
}
FORMATS = tuple(name for name in Image.ID if name in _PLAIN_FORMATS)
"""What is read. Pillow knows more, and starts a program for some: a file only has to claim to be PostScript."""

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


class UnreadableImageError(ValueError):
    """An image file that cannot be used; its message names the file and the reason."""


class Header(NamedTuple):
    """What an image file says about itself."""

    height: int
    """Of the stored pixels."""
    width: int
    mode: str
    """Pillow's word for the kind of pixels."""
    frames: int
    orientation: int
    """EXIF's, 1 to 8; 1 is upright."""

    def about_orientation(self, stated_size: tuple[int, int]) -> str:
        """What to doubt about a picture that is to be turned and of which annotations state this (height, width)."""
        if self.orientation == 1:
            return ""
        if self.orientation >= 5 and stated_size == (self.width, self.height) != (self.height, self.width):
            return "image annotated upright, turned by its EXIF orientation"
        return "image with an EXIF orientation, used as stored: look whether its boxes fit"


def read_header(path: Path | str) -> Header:
    """Reads no pixels.

    Raises:
        UnreadableImageError: there is no such file, or it is not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(path) as picture:
                frames = getattr(picture, "n_frames", 1)
                return Header(picture.height, picture.width, picture.mode, frames, _orientation(picture))
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(_reason(path, error)) from error


def read_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of the stored pixels, as ``read_header`` finds them."""
    header = read_header(path)
    return header.height, header.width


def _open(path: Path | str) -> Image.Image:
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # a pipe would be waited for; Pillow refuses a directory
        raise ValueError("a pipe or device, not a file")
    return Image.open(path, formats=FORMATS)


def _orientation(picture: Image.Image) -> int:
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1  # asking would decode the whole picture
    orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def read_image(path: Path | str, stated_size: tuple[int, int] = (0, 0)) -> Tensor:
    """The image of ``decode_image``, whatever is missing of it."""
    return decode_image(path, stated_size).pixels


class DecodedImage(NamedTuple):
    """An image, and what is wrong with its file."""

    pixels: Tensor
    """[3, height, width] uint8 RGB."""
    damage: str
    """What is missing at the end of the file, in words; usually nothing."""


def decode_image(path: Path | str, stated_size: tuple[int, int] = (0, 0), strict: bool = False) -> DecodedImage:
    """Decodes one image to [3, height, width] uint8 RGB (in memory the channels come last, as resizing likes it).

    The EXIF orientation is ignored: COCO's annotations, pycocotools and torchvision's CocoDetection all refer to the
    pixels as they are stored. The one exception: where the annotation file states the size of the upright picture,
    which is not the size of the stored one, its boxes were drawn on the upright picture, and that is returned.

    16-bit grey is scaled to 8 bits, other grey, palette and CMYK pictures are converted as Pillow does, transparency is
    dropped, and of an animation the first frame is taken. A file that ends too early is decoded as far as it goes, as
    other tools do, unless more than half of the picture is missing; what is missing is black or grey.

    Args:
        path: the file.
        stated_size: (height, width) in the annotation file; (0, 0) if unknown.
        strict: whether a file that ends too early is an error.

    Raises:
        UnreadableImageError: missing, truncated, not an image, or larger than ``MAX_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on size and metadata; what matters is raised
            try:
                (pixels, orientation, _), damage = _decode(path), ""
            except OSError as error:
                if strict or "truncated" not in str(error):
                    raise
                pixels, orientation, damage = _decode_what_is_there(path, error)
            if pixels.shape[:2] != stated_size and pixels.shape[:2] == stated_size[::-1]:
                turn = _TURNED.get(orientation)
                pixels = pixels if turn is None else np.ascontiguousarray(turn(pixels))
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(_reason(path, error)) from error
    return DecodedImage(torch.from_numpy(pixels).permute(2, 0, 1), damage)


def _decode(path: Path | str) -> tuple[np.ndarray[Any, Any], int, str | None]:
    """(stored pixels [height, width, 3], EXIF orientation, format)."""
    with _open(path) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
        return _to_rgb(picture), _orientation(picture), picture.format


def _decode_what_is_there(path: Path | str, error: OSError) -> tuple[np.ndarray[Any, Any], int, str]:
    """The pixels that a truncated file still has, and how much of them is missing."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        pixels, orientation, kind = _decode(path)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    # Rows that the decoder did not come to: libjpeg makes them grey, Pillow black.
    lost = int((pixels == (128 if kind == "JPEG" else 0)).all(axis=(1, 2)).sum())
    if 2 * lost > len(pixels):
        raise error
    return pixels, orientation, f"its last bytes are missing, {lost} of its {len(pixels)} rows are lost altogether"


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
    return f"{path}: {getattr(error, 'strerror', None) or describe_error(error)}"
