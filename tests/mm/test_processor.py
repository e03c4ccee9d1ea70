"""Messages to samples, samples to batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from lm.chat import chat_format
from lm.config import PRESETS as PRESETS_LM
from lm.tokenizer import ByteTokenizer
from mm.config import with_parts
from mm.processor import Processor, Sample, pad_frames
from video.frames import load_frames
from vision.encoder import PRESETS
from vision.tiling import tile_image

IMAGE_ID = 320
END_OF_TEXT, IM_START, IM_END = 256, 257, 258
TOKENIZER = ByteTokenizer()
ENCODER = PRESETS["debug"]()


def make_processor(**encoder) -> Processor:
    return Processor(chat_format("chatml", TOKENIZER, {"image": IMAGE_ID}), dataclasses.replace(ENCODER, **encoder))


def make_video_processor(**encoder) -> Processor:
    """Tiles of 28 pixels, at most 2 of a frame and 4 of a picture; at most 7 frames."""
    config = with_parts(PRESETS_LM["debug"](), image="debug", video="debug", chat="chatml")
    chat = chat_format("chatml", TOKENIZER, config.media_ids)
    return Processor(chat, dataclasses.replace(ENCODER, **encoder), video=config.video)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(n_frames: int, width: int, height: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_frames)
    return torch.randint(256, (n_frames, 3, height, width), dtype=torch.uint8, generator=generator)


def video(frames: torch.Tensor) -> dict:
    return {"type": "video", "video": frames}


WIDE, SMALL, TALL = noise(83, 27), noise(19, 23), noise(28, 113)


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def image(picture: Image.Image) -> dict:
    return {"type": "image", "image": picture}


def chat(*content: dict) -> list[dict]:
    return [{"role": "system", "content": "s"}, {"role": "user", "content": list(content)}]


# --------------------------------------------------------------------------------------------------------------- encode


def test_a_chat_becomes_ids_supervision_and_pictures():
    messages = [*chat(image(WIDE), text("a"), image(SMALL)), {"role": "assistant", "content": "b"}]
    sample = make_processor().encode(messages, key="the key")
    spelled = [
        IM_START, *b"system\ns", IM_END, *b"\n",
        IM_START, *b"user\n", IMAGE_ID, *b"a", IMAGE_ID, IM_END, *b"\n",
        IM_START, *b"assistant\n", *b"b", IM_END, *b"\n",
    ]  # fmt: skip
    assert sample.ids == spelled and sample.key == "the key"
    assert [i for i, said in zip(sample.ids, sample.supervised, strict=True) if said] == [*b"b", IM_END]
    assert [sample.ids[position] for position in sample.picture_positions] == [IMAGE_ID, IMAGE_ID]
    for tiles, picture in zip(sample.tiles, (WIDE, SMALL), strict=True):
        expected = tile_image(picture, 28, 4)
        assert (tiles.rows, tiles.columns) == (expected.rows, expected.columns)
        assert torch.equal(tiles.pixels_NCHW, expected.pixels_NCHW)


def test_a_generation_prompt_ends_with_the_assistants_header():
    asked = make_processor().encode(chat(text("a")), add_generation_prompt=True)
    assert asked.ids[-len("assistant\n") - 1 :] == [IM_START, *b"assistant\n"]
    assert not any(asked.supervised)


def test_plain_style_runs_on_without_roles():
    messages = [*chat(text("a"), image(TALL)), {"role": "assistant", "content": "bc"}]
    processor = make_processor()
    whole = processor.encode(messages, style="plain")
    assert whole.ids == [END_OF_TEXT, *b"sa", IMAGE_ID, *b"bc", END_OF_TEXT]
    assert whole.supervised == [False, True, True, False, True, True, True]
    assert whole.picture_positions == [3]
    assert processor.encode(messages, style="plain", add_generation_prompt=True).ids == whole.ids[:-1]


def test_pictures_stay_closed_until_they_are_needed():
    messages = chat(image("no such file"))
    assert make_processor().tokenize(messages).media[0].source == "no such file"
    with pytest.raises(ValueError, match="image: there is no file 'no such file'"):
        make_processor().encode(messages)


def test_tile_size_and_count_are_the_encoders():
    sample = make_processor(tile_size=14, max_tiles=2).encode(chat(image(WIDE)))
    assert sample.tiles[0].pixels_NCHW.shape == (2, 3, 14, 14)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (chat(text("a")), {"style": "poem"}, "style 'poem' is unknown; choose 'chat' or 'plain'"),
        ([], {}, "messages: there are none"),
        ([{"role": "user"}], {}, "content must be text or a list of parts"),
        ([{"role": "user"}], {"style": "plain"}, "content must be text or a list of parts"),
        ([{"role": "user", "content": [7]}], {"style": "plain"}, "content must be text or a list of parts"),
        (chat({"type": "audio", "audio": "a.wav"}), {}, "takes no audio; it takes image"),
        (chat({"type": "video", "video": "a.mp4"}), {"style": "plain"}, "takes no video; it takes image"),
        ([{"role": "assistant", "content": [image(SMALL)]}], {}, "belong to the user's turns"),
    ],
)
def test_what_cannot_be_encoded_is_explained(messages, options, message):
    with pytest.raises(ValueError, match=message):
        make_processor().encode(messages, **options)


# -------------------------------------------------------------------------------------------------------------- collate


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    processor = make_processor()
    contents = [[text("ab"), image(TALL), text("c"), image(SMALL)], [text("d")], [image(WIDE), text("e")]]
    return [
        processor.encode([{"role": "user", "content": content}], style="plain", key=str(i))
        for i, content in enumerate(contents)
    ]


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_rows_are_padded_on_their_side(samples, pad_side):
    batch = make_processor().collate(samples, pad_side=pad_side)
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        inside = slice(7 - n, 7) if pad_side == "left" else slice(0, n)
        assert batch.ids_BT[row, inside].tolist() == sample.ids
        assert batch.supervised_BT[row, inside].tolist() == sample.supervised
        assert batch.valid_BT[row, inside].all() and batch.valid_BT[row].sum() == n
        assert batch.supervised_BT[row].sum() == sum(sample.supervised)  # padding is never trained
    assert batch.ids_BT.shape == (3, 7) and batch.ids_BT.dtype == torch.int64
    assert batch.keys == ["0", "1", "2"]


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_pictures_of_all_rows_come_in_reading_order_and_count_no_padding(samples, pad_side):
    batch = make_processor().collate(samples, pad_side=pad_side)
    assert batch.picture_row_P.tolist() == [0, 0, 2]
    assert batch.picture_position_P.tolist() == [3, 5, 1]
    assert batch.pictures.grid_P2.tolist() == [[4, 1], [1, 1], [1, 3]]
    for picture, tiles in enumerate(tiles for sample in samples for tiles in sample.tiles):
        valid_N = batch.pictures.valid_PN[picture]
        assert torch.equal(batch.pictures.tiles_PNCHW[picture, valid_N], tiles.pixels_NCHW)


def test_tiles_are_padded_to_the_largest_picture_or_for_the_released_encoder_to_all(samples):
    few = samples[2:]
    assert make_processor().collate(few).pictures.tiles_PNCHW.shape[:2] == (1, 3)
    assert make_processor(released_padding_quirk=True).collate(few).pictures.tiles_PNCHW.shape[:2] == (1, 4)


def test_a_clip_is_one_token_and_its_frames_are_tiled_alike():
    processor = make_video_processor()
    long, short = clip(19, 120, 29), clip(2, 17, 23)
    sample = processor.encode(
        [{"role": "user", "content": [text("a"), video(long), image(WIDE), video(short)]}], style="plain"
    )
    assert sample.ids == [END_OF_TEXT, *b"a", 321, IMAGE_ID, 321, END_OF_TEXT]
    assert sample.clip_positions == [2, 4] and sample.picture_positions == [3]
    assert sample.supervised == [False, True, False, False, False, True]
    assert [[(tiles.rows, tiles.columns) for tiles in frames] for frames in sample.clips] == [
        [(1, 2)] * 7,
        [(1, 1)] * 2,
    ]
    assert (sample.tiles[0].rows, sample.tiles[0].columns) == (1, 3)  # a picture may have more tiles than a frame
    chosen = load_frames(long, 7)
    for tiles, frame in zip(sample.clips[0], chosen, strict=True):
        assert torch.equal(tiles.pixels_NCHW, tile_image(frame, 28, 2).pixels_NCHW)


def test_clips_of_all_rows_come_in_reading_order_and_count_no_padding():
    processor = make_video_processor()
    rows = [
        [text("ab"), video(clip(5, 29, 57)), text("c"), video(clip(3, 13, 17))],
        [text("d")],
        [video(clip(1, 57, 29))],
    ]
    samples = [processor.encode([{"role": "user", "content": row}], style="plain") for row in rows]
    for pad_side in ("left", "right"):
        batch = processor.collate(samples, pad_side=pad_side)
        assert batch.clip_row_V.tolist() == [0, 0, 2] and batch.clip_position_V.tolist() == [3, 5, 1]
        assert batch.clips.n_frames_V.tolist() == [5, 3, 1]
        assert batch.clips.frames.grid_P2.tolist() == [[2, 1]] * 5 + [[1, 1]] * 3 + [[1, 2]]
        assert (batch.ids_BT == 321).sum() == 3 and not batch.supervised_BT[batch.ids_BT == 321].any()
    moved = batch.to("meta").clips
    assert {moved.frames.tiles_PNCHW.device.type, moved.n_frames_V.device.type} == {"meta"}
    padded = make_video_processor(released_padding_quirk=True).collate(samples[2:])
    assert padded.clips.frames.tiles_PNCHW.shape[:2] == (1, 4)


def test_text_alone_has_no_pictures_and_equal_rows_no_mask(samples):
    alone = make_processor().collate([samples[1], samples[1]])
    assert alone.pictures is None and len(alone.picture_row_P) == 0
    assert alone.clips is None and len(alone.clip_row_V) == 0
    assert alone.valid_BS is None
    assert torch.equal(make_processor().collate(samples).valid_BS, make_processor().collate(samples).valid_BT)


def test_a_batch_moves_whole(samples):
    batch = make_processor().collate(samples).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert {t.device.type for t in [*tensors, batch.pictures.tiles_PNCHW, batch.pictures.grid_P2]} == {"meta"}
    assert make_processor().collate(samples[1:2]).to("meta").pictures is None


def test_recordings_are_padded_with_zeros_to_a_multiple() -> None:
    recordings = [torch.ones(n, 3) for n in (5, 13)]
    padded = pad_frames(recordings, multiple=7)
    assert padded.shape == (2, 14, 3)
    assert [row.any(-1).sum().item() for row in padded] == [5, 13]
    assert all(row[: len(mel_TM)].all() for row, mel_TM in zip(padded, recordings, strict=True))
    assert pad_frames([torch.ones(14, dtype=torch.bool)], multiple=7).shape == (
        1,
        14,
    )  # masks, too, and no more than needed
