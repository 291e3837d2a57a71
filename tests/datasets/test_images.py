import io
import os
import re
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torchvision.datasets.folder import default_loader

from datasets import images
from datasets.image_files import absent_files, explain_absence, image_files
from datasets.images import UnreadableImageError, decode_image, read_image, read_size

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def save(path, picture, **options):
    picture.save(path, **options)
    return path


def as_array(tensor):
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


def test_plain_rgb(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))
    assert np.array_equal(as_array(read_image(path, (12, 20))), COLOURS)
    assert read_size(path) == (12, 20)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_other_modes_are_converted_as_torchvision_does(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    save(path, Image.fromarray(COLOURS).convert(mode))
    assert np.array_equal(as_array(read_image(path)), np.asarray(default_loader(str(path))))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(values))
    assert as_array(read_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour(tmp_path):
    """Written by hand, as Pillow cannot: one row of 16-bit RGB."""
    row = b"\x00" + struct.pack(">6H", 0, 32768, 65535, 257, 514, 771)
    chunks = [(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    (tmp_path / "a.png").write_bytes(data)
    assert as_array(read_image(tmp_path / "a.png")).tolist() == [[[0, 128, 255], [1, 2, 3]]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert as_array(read_image(path))[3, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_unless_the_annotations_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS), exif=exif)
    assert np.array_equal(as_array(read_image(path)), COLOURS)
    assert np.array_equal(as_array(read_image(path, (12, 20))), COLOURS)
    upright = as_array(read_image(path, (20, 12)))
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture)) if orientation >= 5 else COLOURS
    assert np.array_equal(upright, expected)


def test_pixels_may_be_written_to(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))
    read_image(path).zero_()


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone\.jpg: no such file"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    for reader in (read_image, read_size):
        with pytest.raises(UnreadableImageError, match=r"text\.jpg: "):
            reader(tmp_path / "text.jpg")
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_give_a_picture_or_one_line(tmp_path, kind):
    """Cut off at every eighth of the file, and with bytes changed: nothing but the one error may come out."""
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, kind)
    whole, path = buffer.getvalue(), tmp_path / "damaged"
    variants = [whole[: len(whole) * eighth // 8] for eighth in range(8)]
    for _ in range(60):
        changed = bytearray(whole)
        for place in RNG.integers(0, min(len(whole), 400), 3):
            changed[place] = RNG.integers(256)
        variants.append(bytes(changed))
    messages = []
    for data in variants:
        path.write_bytes(data)
        try:
            assert read_image(path).shape[0] == 3
        except UnreadableImageError as error:
            messages.append(str(error))
    assert len(messages) >= 4
    assert all("\n" not in message and str(path) in message for message in messages)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_without_its_last_bytes_is_decoded_as_far_as_it_goes(tmp_path, kind):
    pixels = RNG.integers(1, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "a"
    Image.fromarray(pixels).save(path, kind)
    whole = as_array(read_image(path))
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    decoded = decode_image(path)
    lost = int(re.search(r"bytes are missing, (\d+) of its 64 rows are lost", decoded.damage)[1])
    assert 10 <= lost <= 24
    assert np.array_equal(as_array(decoded.pixels)[:28], whole[:28])
    assert np.array_equal(as_array(read_image(path)), as_array(decoded.pixels))
    with pytest.raises(UnreadableImageError, match=r"a: .*truncated"):
        decode_image(path, strict=True)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "other users of Pillow are left alone"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UnreadableImageError, match="truncated"):
        decode_image(path)


def test_no_program_is_started_for_a_file_that_claims_to_be_postscript(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    for reader in (read_image, read_size):
        with pytest.raises(UnreadableImageError, match=r"a\.jpg: cannot identify"):
            reader(path)
    assert not ran.exists()
    assert not {"EPS", "WMF", "FPX", "MIC"} & set(images.FORMATS)


@pytest.mark.parametrize("ending", [".avif", ".jfif", ".jp2", ".jpg", ".png", ".tiff", ".webp"])
def test_what_can_be_read_is_taken_from_a_folder(tmp_path, ending):
    kind = Image.registered_extensions()[ending]
    if kind not in images.FORMATS:
        pytest.skip(f"this Pillow has no {kind}")
    path = save(tmp_path / f"a{ending.upper()}", Image.fromarray(COLOURS), format=kind)
    (tmp_path / f"._a{ending}").write_text("of a Macintosh")
    (tmp_path / "notes.txt").write_text("no picture")
    assert image_files(tmp_path) == ([path], [tmp_path / "notes.txt"])
    assert read_size(path) == (12, 20)


def test_folders_behind_symbolic_links_are_searched_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "a.png", Image.fromarray(COLOURS))
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "train").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "loop").symlink_to(folder, target_is_directory=True)
    assert image_files(folder) == ([folder / "train" / "a.png"], [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sub\\a b.png", "backslashes"),
        ("C:\\data\\sub\\a b.png", "folders too many"),
        ("/home/else/images/sub/a b.png", "folders too many"),
        ("images/sub/a b.png", "folders too many"),
        ("sub/a%20b.png", "escapes such as %20"),
        ("sub/A b.PNG", "letters' case differs"),
        (" sub/a b.png\t", "spaces around it"),
        ("0123cdef-c.png", "Label Studio's prefix: c.png"),
        ("sub/0123cdef-a b.png", "Label Studio's prefix: sub/a b.png"),
        ("images/sub/c.png", "folders too many: sub/c.png"),
        ("sub/a b.jpg", "another ending"),
        (unicodedata.normalize("NFD", "sub/ö.png"), "accents composed otherwise"),
    ],
)
def test_why_an_image_is_absent(tmp_path, name, reason):
    (tmp_path / "sub").mkdir()
    for there in ("a b.png", unicodedata.normalize("NFC", "ö.png")):
        (tmp_path / "sub" / there).touch()
    assert absent_files(tmp_path, ["sub/a b.png", name]) == [1]
    for there in ("c.png", "sub/c.png"):
        (tmp_path / there).touch()
    assert reason in explain_absence(tmp_path, name)
    assert explain_absence(tmp_path, "sub/gone.png") == explain_absence(tmp_path, "\0") == ""


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("1", (3000, 2000)))
    assert read_image(path).shape == (3, 2000, 3000)
    monkeypatch.setattr(images, "MAX_PIXELS", 5_999_999)
    with pytest.raises(UnreadableImageError, match="3000 x 2000 pixels are more than"):
        read_image(path)


@pytest.mark.filterwarnings("error")
def test_large_pictures_do_not_warn(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("1", (300, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert read_image(path).shape == (3, 200, 300)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(UnreadableImageError, match="exceeds limit"):
        read_image(path)


def test_float_pixels_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
    with pytest.raises(UnreadableImageError, match="floating-point"):
        read_image(path)
