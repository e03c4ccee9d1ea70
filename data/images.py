"""Opens pictures: whatever form a user has one in becomes an upright, opaque RGB image, or a clear error."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data.files import open_media

MAX_PIXELS = 100_000_000

# Pictures are untrusted, so only plain raster formats: Pillow would also hand PostScript to an interpreter.
Image.init()
_RASTER = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_FORMATS: list[str] = [name for name in _RASTER if name in Image.OPEN]


def load_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens a picture as RGB: rotated as its EXIF says, transparency on white, the first frame of an animation.

    Args:
        source: a path, encoded bytes, a binary file, a `data:` URL, a PIL image, or pixels: an array or tensor
            `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels of bool, uint8, uint16, or floats in 0..1. A
            shape that could be either, such as `(3, H, 3)`, is `(H, W, C)` in NumPy and `(C, H, W)` in torch.
        max_pixels: width times height beyond which nothing is decoded.

    Raises:
        ValueError: naming `image`, for anything that is not one whole picture of a sane size.
    """
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        array = source.float().numpy() if source.is_floating_point() else source.numpy()
        return _to_rgb(_from_array(array, channels_first=True, max_pixels=max_pixels))
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, channels_first=False, max_pixels=max_pixels))
    if isinstance(source, Image.Image):
        _check_size(*source.size, max_pixels)
        return _decode(source, "the PIL image")
    stream, name = _open_stream(source)
    with stream, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        start = stream.read(16)
        if not start:
            raise ValueError(f"image: {name} is empty")
        stream.seek(0)
        try:
            image = Image.open(stream, formats=_FORMATS)
        except UnidentifiedImageError:
            known = ", ".join(_FORMATS)
            raise ValueError(f"image: {name} is not a picture ({known}); it starts with {start!r}") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"image: {name} is too large to decode safely ({error}); shrink it") from None
        except Exception as error:
            raise _broken(name, error) from error
        _check_size(*image.size, max_pixels)
        return _decode(image, name)


def _open_stream(source: Any) -> tuple[BinaryIO, str]:
    """A seekable file of encoded bytes, and what to call it in errors."""
    if hasattr(source, "read"):
        content = source.read()
        if not isinstance(content, bytes):
            raise ValueError("image: the file was opened as text; open it in mode 'rb'")
        return io.BytesIO(content), "the given file"
    if isinstance(source, str) and source.startswith("data:"):
        return io.BytesIO(_data_url(source)), "the data: URL"
    return open_media(source, "image", "a path, bytes, a PIL image, an array or a tensor")


def _data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ValueError("image: the data: URL has no comma; write data:image/png;base64,...")
    if not header.endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(unquote_to_bytes(payload), validate=True)
    except binascii.Error as error:
        raise ValueError(f"image: the data: URL is not valid base64 ({error})") from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height == 0:
        raise ValueError(f"image: {width} x {height} has no pixels")
    if width * height > max_pixels:
        raise ValueError(f"image: {width} x {height} is more than max_pixels={max_pixels}; shrink it or raise the cap")


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        raise _broken(name, error) from error
    return _to_rgb(image)


def _broken(name: str, error: Exception) -> ValueError:
    return ValueError(f"image: {name} is broken or cut short ({error}); replace it with a whole file")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB. A conversion by Pillow alone would clip 16 bits and drop transparency."""
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]
            raise ValueError(f"image: 32-bit values in [{low}, {high}] have no known scale; save it with 8 or 16 bits")
        image = Image.fromarray(_to_uint8(np.asarray(image).astype(np.uint16)))
    elif image.mode == "F" or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _from_array(array: np.ndarray, *, channels_first: bool, max_pixels: int) -> Image.Image:
    shape = array.shape
    if array.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"image: shape {shape} has no side of 1, 3 or 4 channels; give (H, W, C) or (C, H, W)")
    elif array.ndim != 2:
        raise ValueError(f"image: shape {shape} is not one picture; give (H, W), (H, W, C) or (C, H, W)")
    _check_size(array.shape[1], array.shape[0], max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array)))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """bool, uint8, uint16 or floats in 0..1, each scaled from its full range to 0..255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind != "f":
        raise ValueError(f"image: values of type {values.dtype} have no known scale; give uint8, or floats in 0..1")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("image: it holds NaN or infinite values")
    if low < -1e-3 or high > 1 + 1e-3:  # resizing may overshoot a little
        raise ValueError(f"image: floats must be in 0..1 but lie in [{low:.4g}, {high:.4g}]; undo the normalisation")
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
