"""Shards and LLaVA files, written for real, are read sample by sample; broken ones are named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from data.shards import ShardSource, expand_shards, open_source, write_shard


def captioned(n: int, start: int = 0) -> list[dict]:
    return [{"__key__": f"{i:04d}", "jpg": b"picture %d" % i, "txt": f"caption {i}"} for i in range(start, start + n)]


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar as the system's own tools make it."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def image(content: bytes) -> dict:
    return {"type": "image", "image": content}


def video(content: bytes | Path) -> dict:
    return {"type": "video", "video": content}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def one(folder: Path, **files) -> list[dict]:
    """Messages of a shard that holds one sample."""
    write_shard(folder / "one.tar", [{"__key__": "k"} | {name.replace("_", "."): body for name, body in files.items()}])
    (sample,) = open_source(folder / "one.tar", name="one")
    return sample.messages


def test_caption_sample(tmp_path: Path):
    write_shard(tmp_path / "a.tar", [{"__key__": "x/1", "webp": b"pixels", "txt": " a cat\n", "json": {"width": 7}}])
    (sample,) = open_source(tmp_path / "a.tar", name="web")
    assert (sample.key, sample.source, sample.metadata) == ("x/1", "web", {"width": 7})
    assert sample.messages == [
        {"role": "user", "content": [image(b"pixels")]},
        {"role": "assistant", "content": [text("a cat")]},
    ]


def test_conversation_sample(tmp_path: Path):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat; <image> is only text here."},
        {"from": "human", "value": "And <image> or that?\n<image>"},
        {"from": "gpt", "value": "Two dogs."},
    ]
    messages = one(
        tmp_path, **{"0_jpg": b"cat", "1_png": b"dog", "2_jpeg": b"pup"}, json={"conversations": turns}, txt=""
    )
    assert messages == [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [image(b"cat"), text("What is it?")]},
        {"role": "assistant", "content": [text("A cat; <image> is only text here.")]},
        {"role": "user", "content": [text("And "), image(b"dog"), text(" or that?"), image(b"pup")]},
        {"role": "assistant", "content": [text("Two dogs.")]},
    ]


def test_clips(tmp_path: Path):
    for extension in ("mp4", "webm", "mkv", "gif"):
        assert one(tmp_path, **{extension: b"clip"}, txt="a car") == [
            {"role": "user", "content": [video(b"clip")]},
            {"role": "assistant", "content": [text("a car")]},
        ]
    turns = [{"from": "human", "value": "<image>\nOr this?\n<video>\n<video>"}, {"from": "gpt", "value": "This."}]
    messages = one(tmp_path, **{"0_jpg": b"a", "0_mp4": b"b", "1_webm": b"c"}, json={"conversations": turns})
    assert messages[0]["content"] == [image(b"a"), text("Or this?"), video(b"b"), video(b"c")]


def test_llava_video_file(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"clip")
    turns = [{"from": "human", "value": "<image>\nWho <image>?"}, {"from": "gpt", "value": "<image> is text."}]
    records = [
        {"id": "own", "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}]},
        {"id": "llava-video", "video": ["a.mp4", "a.mp4"], "conversations": turns},
        {"id": "lost", "video": "b.mp4", "conversations": turns},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    source = open_source(tmp_path / "llava.json", name="llava")
    clip = video(tmp_path / "a.mp4")
    assert source[0].messages == [{"role": "user", "content": [clip, text("What?")]}]
    assert source[1].messages[0]["content"] == [clip, text("Who "), clip, text("?")]
    assert source[1].messages[1]["content"] == [text("<image> is text.")]
    with pytest.raises(ValueError, match=r"no file '.*b\.mp4' \(record 'lost' of source 'llava'\)"):
        source[2]


def test_text_only_conversation_and_several_pictures_of_a_caption(tmp_path: Path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert one(tmp_path, json={"conversations": turns})[0] == {"role": "user", "content": [text("Hi")]}
    assert one(tmp_path, **{"0_jpg": b"a", "1_jpg": b"b"}, txt="both")[0]["content"] == [image(b"a"), image(b"b")]


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"jpg": b"x"}, "no caption"),
        ({"jpg": b"x", "txt": " \n"}, "no caption"),
        ({"txt": "alone"}, "neither a picture nor a clip nor audio nor a conversation"),
        ({"mp4": b"clip"}, "the clip has no caption"),
        (
            {"mp4": b"clip", "json": {"conversations": [{"from": "human", "value": "Hi"}]}},
            "0 <video> markers for 1 clips",
        ),
        ({"jpg": b"x", "txt": b"\xff\xfe"}, "utf-8"),
        ({"jpg": b"x", "json": b"{cut"}, "double quotes"),
        ({"jpg": b"x", "json": b"[]"}, "must be an object"),
        ({"jpg": b"x", "json": {"conversations": []}}, "is empty"),
        (
            {"jpg": b"x", "json": {"conversations": [{"from": "human", "value": "no marker"}]}},
            "0 <image> markers for 1",
        ),
        ({"json": {"conversations": [{"from": "robot", "value": "beep"}]}}, "one of human, gpt, system"),
        ({"json": {"conversations": [{"from": "human", "value": 3}]}}, "one of human, gpt, system"),
    ],
)
def test_bad_sample_is_named(files: dict, cause: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{cause}.*\(sample 'k' of shard '.*one\.tar'\)"):
        one(tmp_path, **files)


def test_reads_what_webdataset_reads(tmp_path: Path):
    """Oracle: webdataset's own reader, over several shards of different sizes."""
    for number, size in enumerate([3, 1, 7]):
        write_shard(tmp_path / f"{number}.tar", captioned(size, start=10 * number))
    source = open_source(tmp_path, name="ours")
    theirs = webdataset.WebDataset(f"{tmp_path}/{{0..2}}.tar", shardshuffle=False)
    expected = [(sample["__key__"], sample["jpg"], sample["txt"].decode()) for sample in theirs]
    found = [(s.key, s.messages[0]["content"][0]["image"], s.messages[1]["content"][0]["text"]) for s in source]
    assert found == expected and len(source) == 11
    assert [source[i].key for i in (10, 0, 3)] == ["0026", "0000", "0010"]
    assert source.shard_sizes.tolist() == [3, 1, 7]
    with pytest.raises(IndexError):
        source[11]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_other_tools(format: int, tmp_path: Path):
    """Long and non-ASCII names, leading ./, folders, hidden files."""
    long = "./" + "ö" * 150 + "/0001"
    files = {
        "./a/1.jpg": b"one",
        "./a/1.txt": b"first",
        "./a/._1.txt": b"junk",
        f"{long}.jpg": b"two",
        f"{long}.TXT": b"second",
    }
    first, second = open_source(write_tar(tmp_path / "a.tar", files, format), name="a")
    assert (first.key, second.key) == ("./a/1", long)
    assert second.messages[1]["content"] == [text("second")]


def test_patterns(tmp_path: Path):
    for name in ("b-01.tar", "b-00.tar", "a-00.tar"):
        write_shard(tmp_path / name, captioned(1))

    def names(pattern: str) -> list[str]:
        return [shard.name for shard in expand_shards(tmp_path / pattern)]

    assert names("") == ["a-00.tar", "b-00.tar", "b-01.tar"]
    assert names("b-*.tar") == ["b-00.tar", "b-01.tar"]
    assert names("{b,a}-{00..00}.tar") == ["b-00.tar", "a-00.tar"]
    with pytest.raises(ValueError, match=r"no file '.*b-02\.tar'"):
        names("b-{00..02}.tar")
    with pytest.raises(ValueError, match="no file"):
        names("c-*.tar")


@pytest.mark.parametrize("cut", ["in a file", "between files", "in a header"])
def test_truncated_shard_is_named(cut: str, tmp_path: Path):
    path = write_tar(tmp_path / "cut.tar", {f"{i}.{kind}": b"x" * 700 for i in range(3) for kind in ("jpg", "txt")})
    member = 512 + 1024
    size = {"in a file": 3 * member + 900, "between files": 4 * member, "in a header": 4 * member + 100}[cut]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.tar' is cut short"):
        open_source(path, name="cut")
    assert list(tmp_path.iterdir()) == [path]  # no index of a broken shard


def test_unsuitable_shards_are_named(tmp_path: Path):
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    (tmp_path / "text.tar").write_text("not a tar at all" * 100)
    (tmp_path / "nothing.tar").write_bytes(b"")
    write_tar(tmp_path / "mixed.tar", {"a.jpg": b"", "b.jpg": b"", "a.txt": b""})
    write_tar(tmp_path / "none.tar", {})
    for name, cause in {
        "zipped": "compressed",
        "text": "no tar",
        "nothing": "empty",
        "mixed": "'a' are not next",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}\.tar'.*{cause}"):
            open_source(tmp_path / f"{name}.tar", name="s")
    with pytest.raises(ValueError, match="source 's' holds no samples"):
        open_source(tmp_path / "none.tar", name="s")


def test_index_is_kept_and_renewed(tmp_path: Path):
    path = tmp_path / "a.tar"
    index = tmp_path / "a.tar.index.npy"
    write_shard(path, captioned(3))
    assert len(open_source(path, name="a")) == 3
    written = index.stat().st_mtime_ns
    assert open_source(path, name="a")[2].key == "0002" and index.stat().st_mtime_ns == written
    index.write_bytes(b"broken")
    assert open_source(path, name="a")[2].key == "0002"
    size = path.stat().st_size
    write_shard(path, captioned(2, start=50))
    assert path.stat().st_size == size  # tar pads, so the size alone would not tell
    assert [sample.key for sample in open_source(path, name="a")] == ["0050", "0051"]


def test_shard_that_shrinks_after_opening(tmp_path: Path):
    path = tmp_path / "a.tar"
    write_shard(path, captioned(3))
    source = ShardSource([path], name="a")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"a\.tar' changed or broke"):
        source[0]


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_reading_runs_no_code(tmp_path: Path):
    payload = pickle.dumps(Bomb(tmp_path / "ran"))
    files = {f"a.{kind}": payload for kind in ("pyd", "pickle", "pkl", "pth", "npy")}
    (sample,) = open_source(write_tar(tmp_path / "a.tar", {"a.jpg": b"x", "a.txt": b"y"} | files), name="a")
    assert sample.messages and not (tmp_path / "ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "ran").exists()  # the payload does run when it is unpickled


def test_writing_is_reproducible_and_all_or_nothing(tmp_path: Path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, captioned(3))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with pytest.raises(ValueError, match=r"key 'x/1\.5' has a dot"):
        write_shard(tmp_path / "c.tar", [*captioned(1), {"__key__": "x/1.5", "jpg": b""}])
    assert not (tmp_path / "c.tar").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_file(suffix: str, tmp_path: Path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A\u2028cät."}]
    records = [
        {"id": "first", "image": "coco/1.jpg", "conversations": turns},
        {"image": ["coco/1.jpg", "2.jpg"], "conversations": [{"from": "human", "value": "<image><image>"}, turns[1]]},
        {"id": 7, "image": None, "conversations": [{"from": "human", "value": "Hi"}, turns[1]]},
        {"id": "gone", "image": "3.jpg", "conversations": turns},
        {"id": "odd", "image": 5, "conversations": turns},
    ]
    (tmp_path / "pictures" / "coco").mkdir(parents=True)
    (tmp_path / "pictures" / "coco" / "1.jpg").write_bytes(b"one")
    (tmp_path / "pictures" / "2.jpg").write_bytes(b"two")
    path = tmp_path / f"data{suffix}"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join([*lines, ""]) if suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    source = open_source(path, name="llava", image_folder=tmp_path / "pictures")
    assert len(source) == 5 and source.shard_sizes.tolist() == [1] * 5
    assert source[0].messages[0]["content"] == [image(b"one"), text("What?")]
    assert source[0].messages[1]["content"] == [text("A\u2028cät.")]
    assert source[1].messages[0]["content"] == [image(b"one"), image(b"two")]
    assert [source[i].key for i in range(3)] == ["first", "1", "7"]
    with pytest.raises(OSError, match=r"3\.jpg"):
        source[3]
    with pytest.raises(ValueError, match=r"record 'odd' of source 'llava'"):
        source[4]


def test_llava_errors(tmp_path: Path):
    (tmp_path / "cut.json").write_text('[{"id": 1}')
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cut\.json' is not valid JSON"):
        open_source(tmp_path / "cut.json", name="s")
    with pytest.raises(ValueError, match=r"object\.json' must hold a list"):
        open_source(tmp_path / "object.json", name="s")
    with pytest.raises(ValueError, match=r"source 's' has no file '.*none\.json'"):
        open_source(tmp_path / "none.json", name="s")
    with pytest.raises(ValueError, match="image_folder: there is no folder"):
        open_source(tmp_path / "cut.json", name="s", image_folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"image_folder: .*leave it out"):
        open_source(tmp_path, name="s", image_folder=tmp_path)
