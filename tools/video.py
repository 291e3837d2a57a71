"""Video files, frame by frame; PyAV (``pip install av``) reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine.whole_files import replacing

ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("video files need PyAV: pip install av") from error
    return av


class Video:
    """A video file that is being read."""

    def __init__(self, path: Path, container: Any) -> None:
        self.path, self._container = path, container
        self._stream = container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or 25
        """Frames a second."""
        self.length = int(self._stream.frames)
        """Frames, as the file says; 0 if it does not."""

    def __iter__(self) -> Iterator[Tensor]:
        """Each frame as [3, H, W] uint8 RGB.

        Raises:
            ValueError: the file is damaged; frames before that have come.
        """
        try:
            for frame in self._container.decode(self._stream):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        except _av().FFmpegError as error:
            raise ValueError(f"{self.path}: {error.strerror}") from error


@contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """Open a video file.

    Raises:
        ValueError: it holds no video that can be read, or PyAV is missing.
    """
    av = _av()
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{path}: holds no video")
        yield Video(path, container)


class Writer:
    """Writes pictures as frames of an MP4 file, whose size is that of the first."""

    def __init__(self, container: Any, rate: Any) -> None:
        self._container, self._rate = container, rate
        self._stream: Any = None

    def add(self, picture: Image.Image) -> None:
        """Add a frame; of an odd width or height the last column or row is left out, which most players want.

        A picture of another size than the first is scaled and bordered to fit.
        """
        if self._stream is not None and (size := (self._stream.width, self._stream.height)) != picture.size:
            picture = ImageOps.pad(picture, size)
        av, pixels = _av(), np.asarray(picture)
        pixels = pixels[: len(pixels) // 2 * 2, : pixels.shape[1] // 2 * 2]
        if self._stream is None:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self._rate)
            self._stream.height, self._stream.width = pixels.shape[:2]
            self._stream.pix_fmt = "yuv420p"
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))))

    def end(self) -> None:
        """Write what the encoder holds back."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())


@contextmanager
def write_video(path: Path, rate: Any) -> Iterator[Writer]:
    """Write a file of so many frames a second; it is there as a whole or not at all."""
    with replacing(path) as temporary, _av().open(str(temporary), "w", format="mp4") as container:
        writer = Writer(container, rate)
        yield writer
        writer.end()
