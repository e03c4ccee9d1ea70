"""Pictures as the world has them, end to end through `generate`: the right result, or an error that says what to do."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mm.model import MultimodalLlama

TRANSPOSED_BY_EXIF = 5  # the first row of the file is the left side of the picture


@pytest.fixture(scope="module")
def model() -> MultimodalLlama:
    return MultimodalLlama.from_pretrained("debug")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@torch.no_grad()
def logits_about(model: MultimodalLlama, image) -> Tensor:
    """What the model thinks after a question about a picture; `generate` must be able to answer it too."""
    assert len(model.generate("What?", image=image, max_new_tokens=2).tokens) == 2
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    sample = model.processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)
    return model(model.processor.collate([sample]))


# ------------------------------------------------------------------------------------------------------ the right result


def one_pixel(path: Path) -> Image.Image:
    picture = Image.fromarray(noise(1, 1, 3))
    picture.save(path / "file.png")
    return picture


def cmyk_jpeg(path: Path) -> Image.Image:
    Image.fromarray(noise(37, 53, 4), "CMYK").save(path / "file.jpg")
    return Image.open(path / "file.jpg").convert("RGB")


def palette_with_transparency(path: Path) -> Image.Image:
    index = noise(37, 53) % 3
    picture = Image.fromarray(index, "P")
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.save(path / "file.png", transparency=1)
    colours = np.array([[200, 10, 10], [255, 255, 255], [10, 10, 200]], np.uint8)  # transparent becomes white
    return Image.fromarray(colours[index])


def sixteen_bits(path: Path) -> Image.Image:
    grey = noise(37, 53)
    Image.fromarray(grey.astype(np.uint16) * 257).save(path / "file.png")
    assert Image.open(path / "file.png").mode.startswith("I")
    return Image.fromarray(grey).convert("RGB")


def rotated_by_exif(path: Path) -> Image.Image:
    file = Image.fromarray(noise(37, 53, 3))
    exif = Image.Exif()
    exif[0x0112] = TRANSPOSED_BY_EXIF
    file.save(path / "file.jpg", exif=exif)
    with Image.open(path / "file.jpg") as stored:
        return Image.fromarray(np.asarray(stored).transpose(1, 0, 2))


@pytest.mark.parametrize(
    "write", [one_pixel, cmyk_jpeg, palette_with_transparency, sixteen_bits, rotated_by_exif], ids=lambda f: f.__name__
)
def test_odd_pictures_are_seen_as_what_they_are(model, tmp_path, write):
    expected = write(tmp_path)
    (file,) = tmp_path.iterdir()
    logits = logits_about(model, file)
    assert torch.equal(logits, logits_about(model, expected))
    assert not torch.equal(logits, logits_about(model, ImageOps.invert(expected)))


# ------------------------------------------------------------------------------------------------------- a clear error


def png_header(width: int, height: int) -> bytes:
    """The beginning of a picture that claims a size; what follows need not be there to be refused."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # 1 bit of grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(97, 101, 3)).save(file, "JPEG")
    return file.getvalue()[: file.tell() // 2]


BROKEN = {
    "truncated.jpg": (truncated_jpeg(), "is broken or cut short"),
    "cut.png": (png_header(31, 37), "is broken or cut short"),
    "text.png": (b"I am a picture, believe me.\n", "is not a picture .* it starts with b'I am a picture, '"),
    "empty.png": (b"", "is empty"),
    "huge.png": (png_header(20_000, 20_000), "too large|more than max_pixels"),
    "huge.ppm": (b"P6 20000 20000 255\n" + bytes(99), "too large|more than max_pixels"),
    "large.png": (png_header(12_000, 10_000), "12000 x 10000 is more than max_pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_broken_files_are_explained(model, tmp_path, name, as_bytes):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"image: .*({message})"):
        model.generate("What?", image=content if as_bytes else tmp_path / name)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((7, 5, 3), np.nan), "image: it holds NaN or infinite values"),
        (torch.full((3, 7, 5), torch.inf), "image: it holds NaN or infinite values"),
        (np.full((7, 5, 3), 200.0), r"image: floats must be in 0\.\.1"),
        (np.zeros((7, 0, 3), np.uint8), "image: 0 x 7 has no pixels"),
        (np.zeros((2, 7, 5, 3), np.uint8), r"image: shape \(2, 7, 5, 3\) is not one picture"),
        (np.zeros((7, 5, 2), np.uint8), r"image: shape \(7, 5, 2\) has no side of 1, 3 or 4 channels"),
        (7, "image: cannot read a int"),
        ("no such file.png", "image: there is no file 'no such file.png'"),
        ("https://example.org/cat.png", "image: web addresses are not fetched"),
    ],
)
def test_what_is_no_picture_is_explained(model, image, message):
    with pytest.raises(ValueError, match=message):
        model.generate("What?", image=image)


def test_one_broken_picture_fails_the_batch_before_anything_runs(model, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    good = Image.fromarray(noise(31, 37, 3))
    with pytest.raises(ValueError, match=r"image: .*empty\.png' is empty"):
        model.generate(["a", "b"], image=[good, tmp_path / "empty.png"])
