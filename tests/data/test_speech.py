"""Corpora in their own layouts, with real recordings, read as one kind of sample; bad lines are named."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.audio import AudioClip, load_audio
from data.shards import Sample, write_shard
from data.speech import open_speech, speech_length
from data.stream import BatchStream, StreamConfig

RATE = 8_000
TONE = (0.3 * np.sin(np.arange(6_143) * 0.11)).astype(np.float32)
SUBTYPES = {
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}


def sound(format: str = "flac", n_samples: int = len(TONE)) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.resize(TONE, n_samples), RATE, format=SUBTYPES[format][0], subtype=SUBTYPES[format][1])
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(path: Path, *records: dict) -> Path:
    return write(path, "\n".join(map(json.dumps, records)) + "\n")


def spoken(sample: Sample) -> str:
    """The transcript that the messages hold, after checks of their shape."""
    user, assistant = sample.messages
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert [part["type"] for part in user["content"]] == ["audio"]
    assert assistant["content"] == [{"type": "text", "text": sample.caption}]
    return assistant["content"][0]["text"]


def heard(sample: Sample) -> torch.Tensor:
    return load_audio(sample.messages[0]["content"][0]["audio"], RATE)


def librispeech(root: Path) -> Path:
    folder = root / "dev-clean"
    for speaker, chapter, lines in (("84", "121", ["HELLO THERE", "IT'S ME"]), ("9", "7", ["GOOD BYE"])):
        stem = f"{speaker}-{chapter}"
        for i, _ in enumerate(lines):
            write(folder / speaker / chapter / f"{stem}-{i:04d}.flac", sound(n_samples=1_009 * (i + 1)))
        text = "".join(f"{stem}-{i:04d} {line}\n" for i, line in enumerate(lines))
        write(folder / speaker / chapter / f"{stem}.trans.txt", text)
    return folder


def test_librispeech(tmp_path: Path):
    source = open_speech(librispeech(tmp_path))
    assert (source.name, len(source), source.shard_sizes.tolist()) == ("dev-clean", 3, [1, 1, 1])
    assert [sample.key for sample in source] == ["84-121-0000", "84-121-0001", "9-7-0000"]
    assert [spoken(sample) for sample in source] == ["HELLO THERE", "IT'S ME", "GOOD BYE"]
    assert source[2].metadata == {"language": "English", "speaker": "9"}
    assert [len(heard(sample)) for sample in source] == [1_009, 2_018, 1_009]
    assert [speech_length(sample) for sample in source] == [126, 252, 126]  # ms, by the headers


def test_common_voice(tmp_path: Path):
    header = "client_id\tpath\tsentence\tlocale\n"
    rows = ['ab\tone.mp3\tHe said "no.\tde\n', "cd\ttwo\tÄh\u2028ja \tde\n", "ef\tthree.mp3\t\tde\n"]
    path = write(tmp_path / "train.tsv", header + "".join(rows))
    write(tmp_path / "clip_durations.tsv", "clip\tduration[ms]\none.mp3\t769\n")
    for name in ("one", "two", "three"):
        write(tmp_path / "clips" / f"{name}.mp3", sound("mp3"))
    source = open_speech(path, name="german")
    assert [spoken(source[i]) for i in range(2)] == ['He said "no.', "Äh\u2028ja"]  # a lone quote opens nothing
    assert [message["role"] for message in source[2].messages] == ["user"] and source[2].caption is None
    assert source[0].metadata == {"language": "de", "speaker": "ab", "duration": 0.769}
    assert "duration" not in source[1].metadata
    assert [sample.key for sample in source] == ["one", "two", "three"]
    assert [speech_length(sample) for sample in source] == [769, 768, 768]
    assert len(heard(source[1])) == len(TONE)


def test_nemo(tmp_path: Path):
    path = json_lines(
        tmp_path / "manifest.json",
        {"audio_filepath": "a.wav", "duration": 0.75, "text": "whole", "lang": "fr", "speaker": 3, "snr": 7},
        {"audio_filepath": "a.wav", "duration": 0.25, "offset": 0.5, "text": "end", "id": "x"},
        {"audio_filepath": str(tmp_path / "a.wav"), "duration": -1, "offset": None},
    )
    write(tmp_path / "a.wav", sound("wav"))
    source = open_speech(path)
    whole = load_audio(tmp_path / "a.wav", RATE)
    assert torch.equal(heard(source[0]), whole)
    assert torch.equal(heard(source[1]), whole[4_000:6_000])
    assert torch.equal(heard(source[2]), whole) and len(source[2].messages) == 1
    assert [spoken(source[i]) for i in range(2)] == ["whole", "end"]
    assert source[0].metadata == {"language": "fr", "lang": "fr", "speaker": 3, "duration": 0.75, "snr": 7}
    assert [sample.key for sample in source] == ["a:1", "x", "a:3"]
    assert [speech_length(sample) for sample in source] == [750, 250, 768]
    moved = open_speech(path, audio_folder=tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"there is no file '.*elsewhere/a\.wav' \(sample 'a:1' of source 'manifest\.json'"
    ):
        moved[0]


def cut(**changes) -> dict:
    recording = {"sources": [{"type": "file", "channels": [0, 1], "source": "talk.flac"}]}
    return {
        "id": "c1",
        "start": 0.25,
        "duration": 0.5,
        "channel": 1,
        "recording": recording,
        "type": "MonoCut",
    } | changes


def test_lhotse(tmp_path: Path):
    supervisions = [
        {"start": 0.3, "duration": 0.2, "text": "world", "speaker": "B"},
        {"start": 0.0, "duration": 0.3, "text": "hello", "speaker": "A", "language": "English"},
    ]
    lines = "\n".join(json.dumps(line) for line in (cut(supervisions=supervisions), cut(id="c2", channel=[0, 1])))
    path = write(tmp_path / "cuts.jsonl.gz", gzip.compress(lines.encode()))
    file = io.BytesIO()
    soundfile.write(file, np.stack([TONE, TONE[::-1]], axis=1), RATE, format="FLAC")
    write(tmp_path / "talk.flac", file.getvalue())
    one, two = open_speech(path)
    assert spoken(one) == "hello world" and (one.key, speech_length(one)) == ("c1", 500)
    assert one.metadata == {"duration": 0.5, "language": "English", "speaker": "A"}
    torch.testing.assert_close(heard(one), torch.from_numpy(TONE[::-1][2_000:6_000].copy()), rtol=0, atol=1e-4)
    both = (TONE + TONE[::-1])[2_000:6_000] / 2
    torch.testing.assert_close(heard(two), torch.from_numpy(both), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", SUBTYPES)
def test_webdataset(format: str, tmp_path: Path):
    turns = [{"from": "human", "value": "<audio>\nIn French:"}, {"from": "gpt", "value": "Oui <audio>"}]
    samples = [
        {"__key__": "0", format: sound(format), "txt": "yes", "json": {"duration": 7.5, "language": "English"}},
        {"__key__": "1", format: sound(format), "json": {"conversations": turns}},
        {"__key__": "2", format: sound(format)},
    ]
    write_shard(tmp_path / "a.tar", samples)
    source = open_speech(tmp_path)
    assert spoken(source[0]) == "yes" and speech_length(source[0]) == 7_500
    user, assistant = source[1].messages
    assert [part["type"] for part in user["content"]] == ["audio", "text"]
    assert user["content"][1]["text"] == "In French:" and assistant["content"][0]["text"] == "Oui <audio>"
    assert [message["role"] for message in source[2].messages] == ["user"]
    assert abs(speech_length(source[2]) - 768) <= 7
    assert abs(len(heard(source[2])) - len(TONE)) <= 160


def test_pictures_and_speech_share_a_conversation(tmp_path: Path):
    turns = [{"from": "human", "value": "<audio><image>And <audio>"}, {"from": "gpt", "value": "Both."}]
    sample = {"__key__": "0", "0.wav": b"one", "1.wav": b"two", "png": b"seen", "json": {"conversations": turns}}
    write_shard(tmp_path / "a.tar", [sample])
    assert open_speech(tmp_path)[0].messages[0]["content"] == [
        {"type": "audio", "audio": b"one"},
        {"type": "image", "image": b"seen"},
        {"type": "text", "text": "And "},
        {"type": "audio", "audio": b"two"},
    ]
    turns[0]["value"] = "<audio><image>"
    write_shard(tmp_path / "a.tar", [sample])
    with pytest.raises(ValueError, match=r"1 <audio> markers for 2 recordings \(sample '0'"):
        open_speech(tmp_path)[0]


def repeat_after_me(language: str) -> str:
    return f"Repeat after me in {language}:"


def test_prompt_and_language(tmp_path: Path):
    turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "Hi."}]
    write_shard(
        tmp_path / "a.tar",
        [
            {"__key__": "0", "wav": sound("wav"), "txt": "oui", "json": {"language": "fr"}},
            {"__key__": "1", "wav": sound("wav"), "json": {"conversations": turns}},
            {"__key__": "2", "wav": sound("wav")},
            {"__key__": "3", "wav": sound("wav"), "txt": "oui"},
        ],
    )
    source = open_speech(tmp_path, language="French", prompt=repeat_after_me)
    question = source[0].messages[0]["content"][1:]
    assert question == [{"type": "text", "text": "Repeat after me in French:"}]
    assert source[0].metadata["language"] == "French"
    assert len(source[1].messages[0]["content"]) == 1  # a dialogue has no prompt
    with pytest.raises(ValueError, match=r"sample '2' of source .* has no transcript"):
        source[2]
    with pytest.raises(ValueError, match=r"sample '3' of source .* has no language"):
        open_speech(tmp_path, prompt=repeat_after_me)[3]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.tsv", "path\ttext\n", r"has no column 'sentence'; its columns are path, text"),
        ("a.tsv", "path\tsentence\na.mp3\thi\nb.mp3\n", r"line 3 of '.*a\.tsv': has 1 cells under 2 columns"),
        ("a.tsv", "path\tsentence\n\thi\n", "line 2 .*path is empty"),
        ("a.tsv", "path\tsentence\n", "lists no recordings"),
        ("a.jsonl", "", "lists no recordings"),
        ("a.jsonl", '{"audio_filepath": "a"}\n\n{"audio', r"line 3 of '.*a\.jsonl': is not valid JSON"),
        ("a.jsonl", '{"audio_filepath": "a"}\n[]', "line 2 .*must be a JSON object"),
        ("a.jsonl", '{"audio_filepath": "a"}\n{"text": "b"}', "line 2 .*needs an audio_filepath"),
        ("a.jsonl", '{"audio_filepath": "a", "duration": "long"}', "line 1 .*duration must be a number.*'long'"),
        ("a.jsonl", '{"audio_filepath": "a", "offset": -3}', "line 1 .*offset must be a number of at least 0, got -3"),
        ("a.jsonl", b'{"audio_filepath": "a"}\n\xff', "line 2 .*is not UTF-8"),
        ("a.jsonl", json.dumps({"type": "MixedCut", "tracks": []}), "line 1 .*save it as a MonoCut"),
        (
            "a.jsonl",
            json.dumps(cut(recording={"sources": [{"type": "command", "source": "rm"}]})),
            "line 1 .*type 'command'; only files are read",
        ),
        ("a.jsonl.gz", gzip.compress(b'{"audio_filepath": "a"}\n', mtime=0)[:-9], "cannot read"),
        ("a.csv", "", "cannot tell the format .*; give format, one of librispeech, common_voice"),
        ("folder/a.csv", "", "holds neither shards"),
        ("folder/1-2.trans.txt", "1-2-3 \n", r"line 1 of '.*1-2\.trans\.txt': expected an utterance's name"),
    ],
)
def test_bad_manifests_are_named(name: str, content: bytes | str, cause: str, tmp_path: Path):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"path: .*{cause}"):
        open_speech(path.parent if path.parent != tmp_path else path)


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match=r"path: there is no file '.*none\.jsonl'"):
        open_speech(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"format: 'kaldi' is unknown; choose one of librispeech, .*webdataset"):
        open_speech(tmp_path, "kaldi")
    with pytest.raises(ValueError, match=r"audio_folder: .*leave it out"):
        open_speech(librispeech(tmp_path), audio_folder=tmp_path)


def seconds(sample: Sample) -> tuple[str, int]:
    audio = sample.messages[0]["content"][0]["audio"]
    return sample.key, len(load_audio(audio))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_bucketed_by_duration_and_bad_files_skipped(num_workers: int, tmp_path: Path):
    n, records = 24, []
    for i in range(n):
        write(tmp_path / f"{i}.wav", b"RIFF" if i == 5 else sound("wav", 811 + 400 * i))
        records.append({"audio_filepath": f"{i}.wav", "text": "x"} | ({"duration": 0.35} if i == 5 else {}))
    source = open_speech(json_lines(tmp_path / "all.jsonl", *records))
    config = StreamConfig(batch_size=4, bucket_batches=6, num_workers=num_workers)
    stream = BatchStream([source], config, prepare=seconds, length=speech_length)
    batches = [batch for batch, _ in zip(iter(stream), range(6), strict=False)]
    assert len({key for batch in batches for key, _ in batch}) >= n - 2  # the bad one gives way to one drawn anew
    assert sum(stream.skipped["all.jsonl"].values()) == 1
    spread = [max(length for _, length in batch) - min(length for _, length in batch) for batch in batches]
    assert sorted(spread)[-2] <= 3 * 800 + 1  # neighbours in length, but for the batch of the substitute


def test_a_clip_travels_undecoded(tmp_path: Path):
    source = open_speech(json_lines(tmp_path / "a.jsonl", {"audio_filepath": "a.wav", "offset": 0.5, "duration": 1.0}))
    write(tmp_path / "a.wav", b"never opened")
    assert source[0].messages[0]["content"][0]["audio"] == AudioClip(
        source=str(tmp_path / "a.wav"), start=0.5, seconds=1.0
    )
    with pytest.raises(ValueError, match=r"audio: '.*a\.wav' is no audio"):
        heard(source[0])
