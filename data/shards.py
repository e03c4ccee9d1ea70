"""Sources of samples on disk: WebDataset shards, and LLaVA's JSON beside a folder of pictures or clips.

A shard is a plain tar whose neighbouring files with one name make a sample: `0007.jpg`, `0007.txt`, `0007.json`, or
`0007.flac` or `0007.mp4` with the same companions.
Reading any sample costs one seek, because the byte offsets of a shard's samples are kept beside it
(`shard.tar.index.npy`); so `data.stream` can jump to any position of an epoch. Files are only ever read as bytes, text
and JSON: a shard cannot run code.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

IMAGE_MARKER = "<image>"
AUDIO_MARKER = "<audio>"
VIDEO_MARKER = "<video>"
_MARKER = re.compile(f"({IMAGE_MARKER}|{AUDIO_MARKER}|{VIDEO_MARKER})")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MEDIA = {  # kind -> extensions, numbered where a sample has several: `0.jpg`, `1.jpg`
    "image": re.compile(r"(\d+\.)?(jpg|jpeg|png|webp)"),
    "audio": re.compile(r"(\d+\.)?(flac|wav|opus|ogg|mp3|m4a)"),
    "video": re.compile(r"(\d+\.)?(mp4|webm|mkv|gif)"),
}
_BLOCK = 512  # unit of the tar format


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One raw sample; media are still encoded.

    Attributes:
        key: its name within the source.
        source: the source's name.
        messages: `{"role": ..., "content": parts}` with parts `{"type": "text", "text": str}`,
            `{"type": "image", "image": bytes}`, `{"type": "audio", "audio": bytes, path or AudioClip}` or
            `{"type": "video", "video": bytes or path}`. A captioned picture or clip is a user who shows it and an
            assistant who says the caption; so is speech with its transcript. Speech without one is the user alone; arrays
            alone are no message.
        metadata: the sample's JSON. Speech may have its `duration` in seconds, `language` and `speaker` there.
        caption: the sample's text file, or the transcript; None where there is none.
        arrays: what the sample's `.npy` files hold, by name: `f0` of `0007.f0.npy`.
    """

    key: str
    source: str
    messages: list[dict[str, Any]]
    metadata: dict[str, Any]
    caption: str | None = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Source(Protocol):
    """Numbered samples under a name.

    Attributes:
        shard_sizes: samples in each stretch that is cheap to read together; they add up to the length.
    """

    name: str
    shard_sizes: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises ValueError or OSError for a broken sample, IndexError past the end."""


def open_source(path: str | Path, *, name: str, image_folder: str | Path | None = None) -> Source:
    """Opens shards or a LLaVA file.

    Args:
        path: shards as a folder or pattern (`shards/{0000..0099}.tar`, `shards/*.tar`), or LLaVA's `.json` or `.jsonl`.
        name: how logs and errors call it.
        image_folder: what a LLaVA file's paths of pictures and clips start from; the file's own folder when None.

    Raises:
        ValueError: a missing, truncated or unsuitable file, by name.
    """
    if Path(path).suffix in (".json", ".jsonl"):
        return LlavaSource(Path(path), name=name, image_folder=Path(image_folder or Path(path).parent))
    if image_folder is not None:
        raise ValueError(f"image_folder: source {name!r} reads shards, which hold their own media; leave it out")
    return ShardSource(expand_shards(path), name=name)


def expand_shards(pattern: str | Path) -> list[Path]:
    """Shard files of a folder or of a pattern with braces and wildcards, in a fixed order; all must exist."""
    pattern = os.fspath(pattern)
    if Path(pattern).is_dir():
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    shards: list[Path] = []
    for name in braceexpand(pattern):
        found = [name] if Path(name).is_file() else sorted(glob.glob(name))
        if not found:
            raise ValueError(f"shards: there is no file {name!r}; restore it, or correct the pattern {pattern!r}")
        shards += map(Path, found)
    return shards


class ShardSource:
    """Samples of WebDataset shards. The first opening reads every header and leaves an index beside each shard."""

    def __init__(self, shards: Sequence[Path], *, name: str) -> None:
        self.name = name
        self.shards = list(shards)
        bar = tqdm(self.shards, desc=f"opening {name}", unit="shard", leave=False, delay=2)
        self._offsets = [shard_offsets(shard) for shard in bar]
        self.shard_sizes = np.array([len(offsets) - 1 for offsets in self._offsets])
        self._ends = self.shard_sizes.cumsum()
        if len(self) == 0:
            raise ValueError(f"shards: source {name!r} holds no samples; check its shards")

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        offsets = self._offsets[shard]
        row = index - int(self._ends[shard] - self.shard_sizes[shard])
        start, end = int(offsets[row]), int(offsets[row + 1])
        with self.shards[shard].open("rb") as file:
            file.seek(start)
            block = file.read(end - start)
        return self._parse(block, self.shards[shard])

    def _parse(self, block: bytes, shard: Path) -> Sample:
        files: dict[str, bytes] = {}
        key = ""
        try:
            with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
                for member in tar:
                    member_key, extension = _split_name(member.name)
                    if member.isfile() and member_key:
                        key = member_key
                        files[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
        except tarfile.TarError as error:
            raise ValueError(f"shard {str(shard)!r} changed or broke since it was opened ({error})") from error
        try:
            metadata = json.loads(files["json"]) if "json" in files else {}
            media = [
                {"type": kind, kind: files[extension]}
                for extension in sorted(files)
                for kind, pattern in _MEDIA.items()
                if pattern.fullmatch(extension)
            ]
            caption = files["txt"].decode() if "txt" in files else None
            arrays = {
                extension.removesuffix(".npy"): np.load(io.BytesIO(content), allow_pickle=False)
                for extension, content in files.items()
                if extension.endswith(".npy")
            }
            messages = _messages(metadata, media, caption) if media or not arrays else []
            return Sample(
                key=key, source=self.name, messages=messages, metadata=metadata, caption=caption, arrays=arrays
            )
        except ValueError as error:
            raise ValueError(f"{error} (sample {key!r} of shard {str(shard)!r})") from error


def shard_offsets(shard: Path) -> np.ndarray:
    """Byte offsets where each sample of a shard starts, and where the last ends, int64; kept beside the shard.

    Raises:
        ValueError: a truncated or compressed shard, or one whose samples are not in one piece, by name.
    """
    stat = shard.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]  # tells an index of a former file of this name
    index_file = shard.with_name(shard.name + ".index.npy")
    with contextlib.suppress(OSError, ValueError, EOFError):
        stored = np.load(index_file, allow_pickle=False)
        if stored[:2].tolist() == stamp:
            return stored[2:]
    offsets = _scan_shard(shard)
    temporary = index_file.with_name(f"{index_file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a read-only folder: scan again next time
        with temporary.open("wb") as file:
            np.save(file, np.array(stamp + offsets, dtype=np.int64))
        temporary.replace(index_file)
    return np.array(offsets, dtype=np.int64)


def _scan_shard(shard: Path) -> list[int]:
    starts: list[int] = []
    keys: set[str] = set()
    key, end = "", 0
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                member_key, _ = _split_name(member.name)
                if not member.isfile() or member_key in ("", key):
                    continue
                key = member_key
                if key in keys:
                    raise ValueError(
                        f"shard {str(shard)!r}: the files of sample {key!r} are not next to each other; "
                        "pack it again with `tar --sort=name`"
                    )
                keys.add(key)
                starts.append(member.offset)
    except tarfile.TarError as error:
        raise ValueError(
            f"shard {str(shard)!r} is cut short, compressed or no tar ({error}); copy or write it again as a plain tar"
        ) from error
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a cut between two files for the end
            raise ValueError(f"shard {str(shard)!r} is cut short after {len(starts)} samples; copy or write it again")
    return [*starts, end]


def _split_name(path: str) -> tuple[str, str]:
    """Key and extension: `images/0007.1.jpg` is `images/0007` and `1.jpg`. Hidden files have no key."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


class PackedRecords(Sequence[Any]):
    """JSON records in one block of bytes: millions of small objects would be copied into every worker once touched."""

    def __init__(self, records: Iterable[Any]) -> None:
        lines = [json.dumps(record).encode() for record in records]
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._block = b"".join(lines)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(self._block[start : self._ends[index]])


class LlavaSource:
    """Conversations of a LLaVA `.json` (one list) or `.jsonl` (one record a line), whose media lie in a folder.

    A record is `{"id": ..., "image": path or [paths] or absent, "conversations": [...]}`, or has `video` likewise.
    """

    def __init__(self, path: Path, *, name: str, image_folder: Path) -> None:
        self.name = name
        self.image_folder = image_folder
        if not image_folder.is_dir():
            raise ValueError(f"image_folder: there is no folder {str(image_folder)!r}")
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".jsonl":
                records = [json.loads(line) for line in text.split("\n") if line.strip()]
            else:
                records = json.loads(text)
        except FileNotFoundError:
            raise ValueError(f"path: source {name!r} has no file {str(path)!r}") from None
        except ValueError as error:
            raise ValueError(f"path: {str(path)!r} is not valid JSON ({error})") from error
        if not isinstance(records, list) or not records:
            raise ValueError(f"path: {str(path)!r} must hold a list of LLaVA records")
        self._records = PackedRecords(records)
        self.shard_sizes = np.ones(len(self._records), dtype=np.int64)  # any order is cheap here

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        key = str(record.get("id", index)) if isinstance(record, dict) else str(index)
        try:
            media: list[dict[str, Any]] = [
                {"type": "image", "image": path.read_bytes()} for path in self._paths(record, "image")
            ]
            clips = self._paths(record, "video")  # too large to be read before it is time to decode them
            if missing := [str(path) for path in clips if not path.is_file()]:
                raise ValueError(f"there is no file {missing[0]!r}")
            media += [{"type": "video", "video": path} for path in clips]
            return Sample(key=key, source=self.name, messages=_messages(record, media, None), metadata=record)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error} (record {key!r} of source {self.name!r})") from error

    def _paths(self, record: Any, kind: str) -> list[Path]:
        names = record.get(kind) or [] if isinstance(record, dict) else []
        return [self.image_folder / name for name in ([names] if isinstance(names, str) else names)]


def _messages(metadata: Any, media: Sequence[dict[str, Any]], caption: str | None) -> list[dict[str, Any]]:
    """Messages of a sample: its conversation if the JSON has one, else the media and their caption."""
    if not isinstance(metadata, dict):
        raise ValueError("the JSON of a sample must be an object")
    if "conversations" in metadata:
        return _conversation(metadata["conversations"], media)
    if not media:
        raise ValueError("the sample has neither a picture nor a clip nor audio nor a conversation")
    return captioned(media, caption)


def captioned(media: Sequence[dict[str, Any]], caption: str | None) -> list[dict[str, Any]]:
    """A user who shows pictures or clips or speaks, and an assistant who says the caption or transcript.

    Raises:
        ValueError: a picture or clip without a caption. Speech needs no transcript: the encoder learns from it alone.
    """
    user = {"role": "user", "content": list(media)}
    if caption is not None and caption.strip():
        return [user, {"role": "assistant", "content": [{"type": "text", "text": caption.strip()}]}]
    for kind, noun in (("image", "picture"), ("video", "clip")):
        if any(part["type"] == kind for part in media):
            raise ValueError(f"the {noun} has no caption")
    return [user]


def _conversation(turns: Any, media: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """LLaVA turns to messages; each marker in a human turn is the next medium of its kind."""
    kinds = {part["type"] for part in media}
    try:
        turns = [(_ROLES[turn["from"]], turn["value"]) for turn in turns]
        if "video" in kinds and "image" not in kinds:  # LLaVA-Video writes <image> where its clips go
            turns = [(r, v.replace(IMAGE_MARKER, VIDEO_MARKER) if r == "user" else v) for r, v in turns]
        markers = Counter(marker for role, value in turns if role == "user" for marker in _MARKER.findall(value))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"conversations must be a list of {{'from': one of {', '.join(_ROLES)}, 'value': text}}"
        ) from None
    if not turns:
        raise ValueError("conversations is empty")
    remaining: dict[str, Iterator[dict[str, Any]]] = {}
    for marker, kind, noun in (
        (IMAGE_MARKER, "image", "pictures"), (AUDIO_MARKER, "audio", "recordings"), (VIDEO_MARKER, "video", "clips")
    ):  # fmt: skip
        parts = [part for part in media if part["type"] == kind]
        if markers[marker] != len(parts):
            raise ValueError(f"the conversation has {markers[marker]} {marker} markers for {len(parts)} {noun}")
        remaining[marker] = iter(parts)
    messages = []
    for role, value in turns:
        content: list[dict[str, Any]] = []
        for text in _MARKER.split(value) if role == "user" else [value]:
            if text in remaining and role == "user":
                content.append(next(remaining[text]))
            elif text.strip():
                content.append({"type": "text", "text": text.strip("\n")})
        messages.append({"role": role, "content": content})
    return messages


def write_shard(path: str | Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Writes one shard; the same samples give the same bytes, and a killed run leaves no shard that looks whole.

    Args:
        samples: WebDataset's form: `{"__key__": "0007", "jpg": bytes, "txt": str, "json": dict}`.

    Raises:
        ValueError: a key with a dot, which readers would take for the start of the extension.
    """
    from webdataset import TarWriter  # slow to import, and reading does not need it

    temporary = Path(path).with_suffix(".tmp")
    with temporary.open("wb") as file, TarWriter(file, mtime=0) as writer:
        for sample in samples:
            if "." in sample["__key__"].rpartition("/")[2]:
                raise ValueError(f"samples: the key {sample['__key__']!r} has a dot; replace it")
            writer.write(dict(sample))
    temporary.replace(path)
