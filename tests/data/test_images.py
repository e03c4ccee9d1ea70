"""Pictures in every form and mode open as upright, opaque RGB; anything else is a ValueError that names `image`."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import load_image

H, W = 5, 7
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(RGB))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bilevel_png(width: int, height: int, body: bytes | None = None) -> bytes:
    """A PNG of one bit a pixel, made without holding the pixels; `body` replaces its compressed data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 1) if body is None else body
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind", ["path", "str", "bytes", "file", "data", "percent", "pil", "hwc", "chw", "tensor", "bf16"]
)
def test_every_form_gives_the_same_pixels(kind: str, tmp_path: Path):
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    chw = torch.from_numpy(RGB).permute(2, 0, 1)
    form = {
        "path": path,
        "str": str(path),
        "bytes": PNG,
        "file": io.BytesIO(PNG),
        "data": "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "percent": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
        "pil": Image.fromarray(RGB),
        "hwc": RGB.astype(np.float64) / 255,
        "chw": RGB.transpose(2, 0, 1),
        "tensor": chw.float() / 255,
        "bf16": (chw.float() / 255).bfloat16(),
    }[kind]
    image = load_image(form)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).astype(int), RGB, atol=1 if kind == "bf16" else 0)


def test_ambiguous_shape_is_read_as_the_library_means_it():
    array = RGB[:3, :, :]  # (3, 7, 3)
    np.testing.assert_array_equal(np.asarray(load_image(array)), array)
    np.testing.assert_array_equal(np.asarray(load_image(torch.from_numpy(array))), array.transpose(1, 2, 0))


def test_grey_bool_and_four_channel_arrays():
    grey = RGB[:, :, 0]
    for array in (grey, grey[:, :, None], grey[None]):
        np.testing.assert_array_equal(np.asarray(load_image(array)), np.repeat(grey[:, :, None], 3, 2))
    assert set(np.unique(np.asarray(load_image(grey > 99)))) == {0, 255}
    transparent = np.concatenate([RGB, np.zeros((H, W, 1), np.uint8)], axis=2)
    assert (np.asarray(load_image(transparent)) == 255).all()


@pytest.mark.parametrize("dtype", [">u2", "<u2"])
def test_sixteen_bits_are_scaled_not_clipped(dtype: str, tmp_path: Path):
    levels = np.arange(256, dtype=np.uint32) * 257
    wide = levels.astype(np.uint16).reshape(16, 16)
    Image.fromarray(wide.astype(dtype)).save(tmp_path / "wide.tif")
    Image.fromarray(wide).save(tmp_path / "wide.png")
    expected = np.arange(256).reshape(16, 16)
    for source in (tmp_path / "wide.tif", tmp_path / "wide.png", wide, Image.fromarray(wide.astype(np.int32))):
        np.testing.assert_array_equal(np.asarray(load_image(source))[:, :, 0], expected)


def test_float_tiff(tmp_path: Path):
    Image.fromarray(np.full((H, W), 0.2, np.float32)).save(tmp_path / "float.tif")
    assert (np.asarray(load_image(tmp_path / "float.tif")) == 51).all()


def test_alpha_lies_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (255, 51, 0)
    for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True, "exact": True}):
        pixels = np.asarray(load_image(encoded(Image.fromarray(rgba), **options)))
        np.testing.assert_array_equal(pixels[0], [[200, 0, 0], [244, 204, 204], [255, 255, 255]])
    grey_alpha = np.array([[[0, 255], [0, 0]]], np.uint8)
    pixels = np.asarray(load_image(encoded(Image.fromarray(grey_alpha, mode="LA"))))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 255])


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    pixels = np.asarray(load_image(encoded(palette)))
    np.testing.assert_array_equal(pixels[0], [[10, 20, 30], [40, 50, 60]])
    pixels = np.asarray(load_image(encoded(palette, transparency=1)))
    np.testing.assert_array_equal(pixels[0], [[10, 20, 30], [255, 255, 255]])
    pixels = np.asarray(load_image(encoded(Image.fromarray(RGB), transparency=tuple(RGB[0, 0].tolist()))))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == RGB[1, 1].tolist()


def test_bilevel_and_one_pixel():
    assert np.asarray(load_image(bilevel_png(H, W))).shape == (W, H, 3)
    assert load_image(encoded(Image.new("RGB", (1, 1), "red"))).getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_jpeg(tmp_path: Path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "ink.jpg").getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "lime")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(gif).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB)),
    ],
)
def test_exif_rotation(orientation: int, upright: np.ndarray):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(load_image(encoded(Image.fromarray(RGB), exif=exif))), upright)
    assert load_image(encoded(Image.fromarray(RGB), "JPEG", exif=exif)).size == upright.shape[1::-1]


def test_given_pil_image_is_not_changed():
    image = Image.fromarray(RGB)
    load_image(image).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), RGB)


def test_size_is_capped_before_decoding(recwarn: pytest.WarningsRecorder):
    with pytest.raises(ValueError, match=r"image: .*too large.*400000000 pixels"):
        load_image(bilevel_png(20_000, 20_000))
    with pytest.raises(ValueError, match=r"image: 10001 x 10000 is more than max_pixels"):
        load_image(bilevel_png(10_001, 10_000, body=b"not zlib data"))  # decoding it would fail otherwise
    with pytest.raises(ValueError, match=r"image: .* is broken"):
        load_image(bilevel_png(10_000, 10_000, body=b"not zlib data"))  # within the cap, but Pillow alone would warn
    with pytest.raises(ValueError, match="image: 7 x 5 is more than max_pixels=34"):
        load_image(PNG, max_pixels=34)
    with pytest.raises(ValueError, match="image: 7 x 5 is more than max_pixels=34"):
        load_image(RGB, max_pixels=34)
    assert not recwarn.list


def test_broken_files(tmp_path: Path):
    photo = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    files = {
        "cut.jpg": (photo[: len(photo) // 2], "cut short"),
        "cut.png": (PNG[:-30], "cut short"),
        "broken.png": (bilevel_png(H, W, body=b"not zlib data"), "broken"),
        "text.png": (b"this is text", r"is not a picture .* b'this is text'"),
        "print.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not a picture"),
        "empty.png": (b"", "is empty"),
    }
    for name, (content, cause) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^image: .*{name}.*{cause}"):
            load_image(path)
        with pytest.raises(ValueError, match=f"^image: .*{cause}"):
            load_image(content)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("no/such/file.png", "there is no file 'no/such/file.png'"),
        (".", "cannot open"),
        ("a\0b.png", "cannot open"),
        ("https://example.com/cat.png", "download the file"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@", "base64"),
        (io.StringIO("text"), "mode 'rb'"),
        (None, "cannot read a NoneType"),
        (np.full((H, W, 3), np.nan), "NaN"),
        (torch.full((3, H, W), float("inf")), "NaN or infinite"),
        (np.full((H, W, 3), 200.0), r"0\.\.1 but lie in \[200, 200\]"),
        (np.full((H, W, 3), -0.5), r"0\.\.1"),
        (np.zeros((H, W, 3), np.int64), "int64"),
        (np.zeros((H, W, 2), np.uint8), r"shape \(5, 7, 2\)"),
        (np.zeros((2, 3, H, W), np.uint8), r"shape \(2, 3, 5, 7\)"),
        (np.zeros((0, W, 3), np.uint8), "no pixels"),
        (Image.fromarray(np.full((H, W), 70_000, np.int32)), "32-bit"),
    ],
)
def test_wrong_arguments(source, cause: str):
    with pytest.raises(ValueError, match=f"^image: .*{cause}"):
        load_image(source)
