"""Sources of speech on disk: corpora in the layouts that speech people have them in, and WebDataset shards.

Every reader turns its manifest into records `{"key", "audio", "text", "duration", "language", "speaker", ...}` up front,
naming the file and line of a bad one, and opens no recording: a sample carries a path or an `AudioClip`, and
`data.audio.load_audio` decodes it where the batch is prepared.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import AudioClip, audio_seconds
from data.shards import PackedRecords, Sample, Source, captioned, open_source

Record = dict[str, Any]


def open_speech(
    path: str | Path,
    format: str | None = None,
    *,
    name: str | None = None,
    audio_folder: str | Path | None = None,
    language: str | None = None,
    prompt: Callable[[str], str] | None = None,
) -> Source:
    """Opens a corpus of speech.

    Args:
        path: what `format` names:
            "librispeech": a folder with `*.trans.txt` files beside their `.flac`, at any depth.
            "common_voice": a `.tsv`; recordings lie in `clips/` beside it, durations in `clip_durations.tsv` if there.
            "nemo": JSON lines with `audio_filepath` and, if wanted, `duration`, `offset`, `text`, `lang`, `speaker`.
            "lhotse": cuts as JSON lines, `.gz` or not; each cut is one sample.
            "webdataset": shards (a folder or pattern) of `flac|wav|opus|ogg|mp3|m4a` with `txt` or `json`, see
            `data.shards`.
        format: told from `path` when None.
        name: how logs and errors call it; the path's last part when None.
        audio_folder: what a manifest's relative paths start from; its own folder (or `clips/` there) when None.
        language: of all samples, whatever the manifest calls it (Common Voice has codes); None takes the manifest's.
        prompt: given the language, what the user says after the recording (`Repeat after me in {language}:`); it goes
            into every sample that is a recording and its transcript. None adds nothing.

    Raises:
        ValueError: naming `path` and the line, for a file that is missing or not of its format.
    """
    format = format or _detect(path)
    name = name or Path(path).name
    source: Source
    if format == "webdataset":
        if audio_folder is not None:
            raise ValueError(f"audio_folder: source {name!r} reads shards, which hold their own audio; leave it out")
        source = open_source(path, name=name)
    elif format in _READERS:
        folder = Path(audio_folder) if audio_folder is not None else None
        source = ManifestSource(_READERS[format](Path(path), folder), name=name, path=Path(path))
    else:
        raise ValueError(f"format: {format!r} is unknown; choose one of {', '.join([*_READERS, 'webdataset'])}")
    return source if language is None and prompt is None else _Annotated(source, language, prompt)


def speech_length(sample: Sample) -> int:
    """Milliseconds of audio in a sample, by its metadata or else the headers: what batches are bucketed by.

    Raises:
        ValueError: audio without a readable header.
    """
    if isinstance(duration := sample.metadata.get("duration"), (int, float)):
        return round(1000 * duration)
    parts = [part for message in sample.messages for part in message["content"] if part["type"] == "audio"]
    return round(1000 * sum(audio_seconds(part["audio"]) for part in parts))


class ManifestSource:
    """Recordings that a manifest lists, each a user who speaks and, where there is a transcript, an assistant who says it."""

    def __init__(self, records: Iterator[Record], *, name: str, path: Path) -> None:
        self.name = name
        self._records = PackedRecords(records)
        if not len(self):
            raise ValueError(f"path: {str(path)!r} lists no recordings")
        self.shard_sizes = np.ones(len(self), dtype=np.int64)  # any order is cheap here

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        audio, clip = record.pop("audio"), record.pop("clip", None)
        if not Path(audio).is_file():
            raise ValueError(f"there is no file {audio!r} (sample {record['key']!r} of source {self.name!r})")
        part = {"type": "audio", "audio": AudioClip(source=audio, **clip) if clip else Path(audio)}
        text = record.pop("text", None)
        return Sample(
            key=record.pop("key"),
            source=self.name,
            messages=captioned([part], text),
            metadata=record,
            caption=text,
        )


class _Annotated:
    """A source whose samples say their language, and whose transcriptions are asked for by a prompt."""

    def __init__(self, source: Source, language: str | None, prompt: Callable[[str], str] | None) -> None:
        self.source, self.language, self.prompt = source, language, prompt
        self.name, self.shard_sizes = source.name, source.shard_sizes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        language = self.language or sample.metadata.get("language")
        sample = replace(sample, metadata=sample.metadata | {"language": language})
        if self.prompt is None or "conversations" in sample.metadata:
            return sample
        if len(sample.messages) < 2 or not language:
            missing = "transcript" if len(sample.messages) < 2 else "language"
            raise ValueError(f"sample {sample.key!r} of source {self.name!r} has no {missing}")
        asked, *rest = sample.messages
        question = {"type": "text", "text": self.prompt(language)}
        return replace(sample, messages=[{**asked, "content": [*asked["content"], question]}, *rest])


def _detect(path: str | Path) -> str:
    text = os.fspath(path)
    folder = Path(text)
    if folder.is_dir():
        if any(folder.glob("*.tar")):
            return "webdataset"
        if any(folder.rglob("*.trans.txt")):
            return "librispeech"
        raise ValueError(
            f"path: {text!r} holds neither shards (*.tar) nor LibriSpeech's *.trans.txt; name the manifest"
        )
    if text.endswith(".tar"):
        return "webdataset"
    if text.endswith(".tsv"):
        return "common_voice"
    if text.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        for _, record in _json_lines(folder):
            return "nemo" if "audio_filepath" in record else "lhotse"
        raise ValueError(f"path: {text!r} lists no recordings")
    raise ValueError(
        f"path: cannot tell the format of {text!r}; give format, one of {', '.join([*_READERS, 'webdataset'])}"
    )


def _librispeech(folder: Path, audio_folder: Path | None) -> Iterator[Record]:
    if audio_folder is not None:
        raise ValueError("audio_folder: LibriSpeech keeps recordings beside their transcripts; leave it out")
    for transcripts in sorted(folder.rglob("*.trans.txt")):
        for number, line in _lines(transcripts):
            key, _, text = line.partition(" ")
            if not text.strip():
                raise _bad_line(transcripts, number, f"expected an utterance's name and its words, got {line!r}")
            yield {
                "key": key,
                "audio": str(transcripts.parent / f"{key}.flac"),
                "text": text.strip(),
                "language": "English",
                "speaker": key.partition("-")[0],
            }


def _common_voice(path: Path, audio_folder: Path | None) -> Iterator[Record]:
    clips = audio_folder or path.parent / "clips"
    milliseconds: dict[str, float] = {}
    durations = path.parent / "clip_durations.tsv"
    if durations.is_file():
        for number, row in _tsv(durations, ("clip", "duration[ms]")):
            milliseconds[row["clip"]] = _number(row["duration[ms]"], "duration[ms]", durations, number)
    for number, row in _tsv(path, ("path", "sentence")):
        clip = row["path"] if Path(row["path"]).suffix else row["path"] + ".mp3"  # the first releases left it out
        if not row["path"]:
            raise _bad_line(path, number, "the path is empty")
        yield {
            "key": Path(clip).stem,
            "audio": str(clips / clip),
            "text": row["sentence"].strip() or None,
            "language": row.get("locale") or None,
            "speaker": row.get("client_id") or None,
        } | ({"duration": milliseconds[clip] / 1000} if clip in milliseconds else {})


def _nemo(path: Path, audio_folder: Path | None) -> Iterator[Record]:
    for number, line in _json_lines(path):
        file = line.pop("audio_filepath", None)
        if not isinstance(file, str) or not file:
            raise _bad_line(path, number, "needs an audio_filepath")
        duration = line.pop("duration", None)  # null or -1 where it was not measured
        duration = None if duration in (None, -1) else _number(duration, "duration", path, number)
        clip = None
        if (offset := line.pop("offset", None)) is not None:
            clip = {"start": _number(offset, "offset", path, number), "seconds": duration}
        yield (
            line
            | {
                "key": str(line.get("id", f"{Path(file).stem}:{number}")),
                "audio": str((audio_folder or path.parent) / file),
                "text": line.pop("text", None),
                "language": line.get("language") or line.get("lang") or line.get("target_lang"),
                "speaker": line.get("speaker"),
            }
            | ({"clip": clip} if clip else {})
            | ({} if duration is None else {"duration": duration})
        )


def _lhotse(path: Path, audio_folder: Path | None) -> Iterator[Record]:
    for number, cut in _json_lines(path):
        try:
            (source,) = cut["recording"]["sources"]
            kind, file = source["type"], source["source"]
            supervisions = sorted(cut.get("supervisions", []), key=lambda supervision: supervision["start"])
            spoken = [supervision["text"] for supervision in supervisions if supervision.get("text")]
            first = supervisions[0] if supervisions else {}
            channel = cut.get("channel")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _bad_line(path, number, "is no cut of one recording from one file; save it as a MonoCut") from None
        if kind != "file":  # "command" would run a program
            raise _bad_line(path, number, f"has a recording of type {kind!r}; only files are read")
        duration = _number(cut.get("duration"), "duration", path, number)
        yield {
            "key": str(cut.get("id", number)),
            "audio": str((audio_folder or path.parent) / file),
            "clip": {
                "start": _number(cut.get("start"), "start", path, number),
                "seconds": duration,
                "channel": channel if isinstance(channel, int) else None,  # a list: the mean of all
            },
            "text": " ".join(spoken) or None,
            "duration": duration,
            "language": first.get("language"),
            "speaker": first.get("speaker"),
        }


_READERS: Mapping[str, Callable[[Path, Path | None], Iterator[Record]]] = {
    "librispeech": _librispeech,
    "common_voice": _common_voice,
    "nemo": _nemo,
    "lhotse": _lhotse,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that hold something. Only a line feed ends one: text may hold Unicode's other separators."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise _bad_line(path, number, f"is not UTF-8 ({error})") from None
                if text.strip():
                    yield number, text
    except FileNotFoundError:
        raise ValueError(f"path: there is no file {str(path)!r}") from None
    except (OSError, EOFError) as error:  # EOFError: a gzip file that is cut short
        raise ValueError(f"path: cannot read {str(path)!r} ({error})") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _bad_line(path, number, f"is not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise _bad_line(path, number, "must be a JSON object")
        yield number, record


def _tsv(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    lines = _lines(path)
    header = next(lines, (0, ""))[1].split("\t")
    if missing := [column for column in required if column not in header]:
        raise ValueError(f"path: {str(path)!r} has no column {missing[0]!r}; its columns are {', '.join(header)}")
    for number, line in lines:
        cells = line.split("\t")  # quotes mean nothing in these files
        if len(cells) != len(header):
            raise _bad_line(path, number, f"has {len(cells)} cells under {len(header)} columns")
        yield number, dict(zip(header, cells, strict=True))


def _number(value: Any, field: str, path: Path, line: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise _bad_line(path, line, f"{field} must be a number of at least 0, got {value!r}")
    return number


def _bad_line(path: Path, line: int, cause: str) -> ValueError:
    return ValueError(f"path: line {line} of {str(path)!r}: {cause}")
