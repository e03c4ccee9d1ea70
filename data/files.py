"""Opens files of media: a path or encoded bytes becomes a binary file and a name for errors."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO


def open_media(source: Any, argument: str, forms: str) -> tuple[BinaryIO, str]:
    """A seekable file of encoded bytes, and what to call it in errors.

    Args:
        source: a path, or encoded bytes.
        argument: what errors start with: `image`, `audio` or `video`.
        forms: what the caller takes, such as "a path, bytes or a tensor".

    Raises:
        ValueError: for anything else, and for a file that cannot be opened.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), "the given data"
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{argument}: cannot read a {type(source).__name__}; give {forms}")
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"{argument}: web addresses are not fetched; download the file and give its path or bytes")
    try:
        return Path(text).open("rb"), repr(text)
    except FileNotFoundError:
        raise ValueError(f"{argument}: there is no file {text!r}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ValueError(f"{argument}: cannot open {text!r} ({error})") from error
