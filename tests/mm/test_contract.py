"""The contract of the whole model, clause by clause, on the debug model with its gates open.

Clause 5 belongs to the streaming modules (tests/speech), clauses 7 and 8 to the trainer: tests/mm/test_trainer.py,
tests/mm/test_speech_stages.py and tests/mm/test_resume.py. Clause 10, full tensors against oracles that no one here wrote,
is kept where each part is tested:

    transformers Llama, 3.1 RoPE scaling      tests/lm/test_model.py, tests/lm/test_checkpoint.py
    transformers Mllama                       tests/vision/test_mllama.py; with its processor: tests/mm/test_checkpoint.py
    transformers Mllama image processor       tests/vision/test_tiling.py
    timm and open_clip ViT                    tests/vision/test_encoder.py, tests/vision/test_pretrained.py
    open_clip loss and text tower             tests/vision/test_contrastive.py
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lm.config import PRESETS
from lm.model import KVCache
from mm.checkpoint import debug_model
from mm.config import with_parts
from mm.model import MultimodalLlama
from mm.processor import Batch
from mm.stages import part_of
from video.clips import Clips
from vision.tiling import Pictures


class Picture(NamedTuple):
    """Noise of this size; another seed is another picture."""

    width: int
    height: int
    seed: int = 0

    def open(self) -> Image.Image:
        pixels = np.random.default_rng(self.seed).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


class Recording(NamedTuple):
    """Noise of this many mel frames, 8 of which are a token; another seed is another recording."""

    n_frames: int
    seed: int = 0

    def open(self) -> tuple[np.ndarray, int]:
        return np.random.default_rng(self.seed).uniform(-0.5, 0.5, 160 * self.n_frames).astype(np.float32), 16_000


class Clip(NamedTuple):
    """Noise of this many frames; another seed is another clip."""

    n_frames: int
    width: int
    height: int
    seed: int = 0

    def open(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.n_frames, 3, self.height, self.width)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


Medium = Picture | Clip | Recording
Row = tuple[str | Medium, ...]
KINDS = {Picture: "image", Clip: "video", Recording: "audio"}

#: 15, 17 and 12 tokens, with the one that starts a text. Tiles of pictures: 1, then 1 x 3 and 2 x 2 seen together; none; 4 x 1.
#: Clips, 4 frames to a group: 5 frames of 1 x 2 tiles, 2 of one; none; 7 of 2 x 1. A recording is a start token, 2, 3 or 2
#: audio tokens, and an end token.
ROWS: tuple[Row, ...] = (
    (
        "ab",
        Picture(29, 23),
        "c",
        Clip(5, 47, 26),
        Picture(83, 27),
        Picture(53, 59),
        "d",
        Recording(13),
        Clip(2, 17, 23),
        "e",
    ),
    ("hijklmnopqrstuvw",),
    (Picture(23, 113), "t", Recording(19), Clip(7, 26, 53), "uvw"),
)
PICTURES = ((0, 1), (0, 4), (0, 5), (2, 0))  # row and part
CLIPS = ((0, 3), (0, 8), (2, 3))
RECORDINGS = ((0, 7), (2, 2))


@pytest.fixture(scope="module")
def model() -> MultimodalLlama:
    return MultimodalLlama.from_pretrained("debug")


def batch_of(model: MultimodalLlama, *rows: Row, pad_side: str = "left") -> Batch:
    def sample(row: Row):
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": KINDS[type(part)], KINDS[type(part)]: part.open()}
            for part in row
        ]
        messages = [{"role": "user", "content": parts}]
        return model.processor.encode(messages, style="plain", add_generation_prompt=True)

    return model.processor.collate([sample(row) for row in rows], pad_side=pad_side)


@torch.no_grad()
def logits_of(model: MultimodalLlama, *rows: Row, pad_side: str = "left") -> tuple[Tensor, Batch]:
    batch = batch_of(model, *rows, pad_side=pad_side)
    return model(batch), batch


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    assert expected.std() > 0.1  # not a comparison of zeros


# ------------------------------------------------------------------------------------------------------------- clause 1

FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": torch.randn_like,
    "huge": lambda weight: 1e6 * torch.randn_like(weight),
    "nan": lambda weight: torch.full_like(weight, torch.nan),
}


@pytest.fixture(scope="module", params=FILLS)
def any_adapters(request) -> MultimodalLlama:
    """The debug model with anything in place of its adapters."""
    torch.manual_seed(0)
    model = debug_model().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("lm."):
                parameter.copy_(FILLS[request.param](parameter))
    return model


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_1_text_is_bit_identical_to_the_bare_lm(any_adapters, pad_side):
    """Clause 1: without media, the logits are those of the language model alone, whatever the adapters hold."""
    logits, batch = logits_of(any_adapters, ("abcde",), ROWS[1], ("fgh",), pad_side=pad_side)
    assert torch.equal(logits, any_adapters.lm(batch.ids_BT, valid_BS=batch.valid_BS))


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_1_a_text_row_among_media_is_bit_identical_too(any_adapters, pad_side):
    """Clause 1: nor do the media of other rows reach it."""
    logits, batch = logits_of(any_adapters, *ROWS, pad_side=pad_side)
    known_BT = batch.ids_BT.clamp(max=any_adapters.lm.config.vocab_size - 1)  # the bare table has no media tokens
    bare = any_adapters.lm(known_BT, valid_BS=batch.valid_BS)
    assert torch.equal(logits[1], bare[1])
    assert not torch.equal(logits[0], bare[0])


def test_1_a_model_without_a_video_part_says_the_same_of_texts_pictures_and_recordings(model):
    """Clause 1: clips cost nothing where there are none."""
    media_ids = {kind: token_id for kind, token_id in model.config.media_ids.items() if kind != "video"}
    config = dataclasses.replace(model.config, video=None, media_ids=media_ids)
    without = MultimodalLlama(config, model.tokenizer, lm=model.lm).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("video_adapter.")}
    without.load_state_dict(state)
    rows = [tuple(part for part in row if not isinstance(part, Clip)) for row in ROWS]
    assert torch.equal(logits_of(without, *rows)[0], logits_of(model, *rows)[0])


# ------------------------------------------------------------------------------------------------------------- clause 2


def replaced(place: tuple[int, int], medium: Medium) -> list[Row]:
    """`ROWS` with another medium at a row and part."""
    rows, (row, part) = list(ROWS), place
    rows[row] = (*ROWS[row][:part], medium, *ROWS[row][part + 1 :])
    return rows


def tokens_from(batch: Batch, row: Tensor, position: Tensor) -> Tensor:
    """True `(B, T)` from a position on in its row."""
    position_BT = batch.valid_BT.long().cumsum(-1) - 1
    row_B1 = torch.arange(len(position_BT))[:, None]
    return batch.valid_BT & (row_B1 == row) & (position_BT >= position)


def tokens_from_picture(batch: Batch, k: int) -> Tensor:
    return tokens_from(batch, batch.picture_row_P[k], batch.picture_position_P[k])


def tokens_from_clip(batch: Batch, k: int) -> Tensor:
    return tokens_from(batch, batch.clip_row_V[k], batch.clip_position_V[k])


@pytest.mark.parametrize("turned", [False, True], ids=["other pixels", "other grid"])
@pytest.mark.parametrize("k", range(len(PICTURES)))
def test_2_a_picture_changes_exactly_what_follows_it(model, k, turned):
    """Clause 2: earlier tokens and other rows stay as they were, bit for bit."""
    row, part = PICTURES[k]
    old = ROWS[row][part]
    new = Picture(old.height, old.width, 1) if turned else old._replace(seed=1)
    (before, batch), (after, _) = logits_of(model, *ROWS), logits_of(model, *replaced(PICTURES[k], new))
    assert torch.equal((before != after).any(-1), tokens_from_picture(batch, k))


@pytest.mark.parametrize("k", range(len(PICTURES)))
def test_2_a_picture_of_more_tiles_changes_only_what_follows_it(model, k):
    """Clause 2, to rounding: more tiles make the batch's memory longer, as more tokens make its rows longer."""
    (before, batch), (after, _) = logits_of(model, *ROWS), logits_of(model, *replaced(PICTURES[k], Picture(61, 211)))
    follows_BT = tokens_from_picture(batch, k)
    assert_close(after[~follows_BT], before[~follows_BT])
    assert (before - after)[follows_BT].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("turned", [False, True], ids=["other pixels", "other grid"])
@pytest.mark.parametrize("k", range(len(CLIPS)))
def test_2_a_clip_changes_exactly_what_follows_it(model, k, turned):
    """Clause 2: earlier tokens and other rows stay as they were, bit for bit."""
    row, part = CLIPS[k]
    old = ROWS[row][part]
    new = old._replace(width=old.height, height=old.width, seed=1) if turned else old._replace(seed=1)
    (before, batch), (after, _) = logits_of(model, *ROWS), logits_of(model, *replaced(CLIPS[k], new))
    assert torch.equal((before != after).any(-1), tokens_from_clip(batch, k))


@pytest.mark.parametrize("k", range(len(CLIPS)))
def test_2_a_clip_of_other_length_changes_only_what_follows_it(model, k):
    """Clause 2, to rounding: other groups make the batch's memory longer or shorter."""
    (before, batch), (after, _) = logits_of(model, *ROWS), logits_of(model, *replaced(CLIPS[k], Clip(3, 41, 19)))
    follows_BT = tokens_from_clip(batch, k)
    assert_close(after[~follows_BT], before[~follows_BT])
    assert (before - after)[follows_BT].abs().amax(-1).min() > 1e-4


def test_2_the_order_of_frames_matters(model):
    """A clip is not a bag of pictures."""
    clip = ROWS[2][3].open()
    answers = []
    for frames in (clip, clip.flip(0)):
        content = [{"type": "video", "video": frames}, {"type": "text", "text": "?"}]
        sample = model.processor.encode([{"role": "user", "content": content}])
        with torch.no_grad():
            answers.append(model(model.processor.collate([sample]))[0, -1])
    assert (answers[0] - answers[1]).abs().max() > 1e-4


@torch.no_grad()
def test_2_a_picture_does_not_hide_the_clip_before_it_nor_a_clip_the_picture(model):
    """A token sees the latest of each; blocks alone are compared, as self-attention passes everything on."""
    batch = batch_of(model, ROWS[0])
    media = model.encode_media(batch)
    h_BTD = model.embed(batch.ids_BT, media.speech_KD)
    bound = model.adapters(media, torch.arange(h_BTD.shape[1])[None])
    layer = min(bound)
    seen_by = {}
    for kind in ("pictures", "clips"):
        other = dataclasses.replace(media, **{kind: None})
        alone = model.adapters(other, torch.arange(h_BTD.shape[1])[None])
        seen_by[kind] = (bound[layer](h_BTD) != alone[layer](h_BTD)).any(-1)[0].tolist()
    picture, clip = int(batch.picture_position_P[0]), int(batch.clip_position_V[0])
    assert seen_by["pictures"] == [t >= picture for t in range(15)]
    assert seen_by["clips"] == [t >= clip for t in range(15)]


@pytest.mark.parametrize("pad_side", ["left", "right"])
@pytest.mark.parametrize(("row", "part"), RECORDINGS)
def test_2_a_recording_changes_exactly_what_follows_it(model, row, part, pad_side):
    """Clause 2: from its first audio token on; earlier tokens and other rows stay as they were, bit for bit."""
    others = replaced((row, part), ROWS[row][part]._replace(seed=1))
    (before, batch), (after, _) = (
        logits_of(model, *ROWS, pad_side=pad_side),
        logits_of(model, *others, pad_side=pad_side),
    )
    heard_BT = (batch.ids_BT == model.config.media_ids["audio"]).cumsum(-1) > 0
    heard_BT &= batch.valid_BT & (torch.arange(len(heard_BT)) == row)[:, None]
    assert 0 < heard_BT.sum() < batch.valid_BT[row].sum()
    changed_BT = (before != after).any(-1)
    assert torch.equal(changed_BT & batch.valid_BT, heard_BT)


def test_2_a_row_that_sees_nothing_makes_no_nan():
    """Clause 2: neither in the logits, padding included, nor in any gradient."""
    model = debug_model()
    batch = batch_of(model, *ROWS)
    logits = model(batch)
    assert logits.isfinite().all()
    logits[batch.valid_BT].square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


# ------------------------------------------------------------------------------------------------------------- clause 3

LENGTH = 17
CUTS = {
    **{f"{i} and steps": [i, *range(i + 1, LENGTH)] for i in range(1, LENGTH)},
    **{f"{i} and the rest": [i] for i in range(1, LENGTH)},
    "only steps": list(range(1, LENGTH)),
    "chunks of 5": [5, 10, 15],
}


@torch.no_grad()
def logits_in_chunks(model: MultimodalLlama, batch: Batch, cuts: list[int]) -> Tensor:
    """Logits of a batch that is fed piece by piece; media are encoded once."""
    n_rows, n_tokens = batch.ids_BT.shape
    media, cache = model.encode_media(batch), KVCache(model.config.lm, n_rows, n_tokens)
    audio_BT = batch.ids_BT == model.config.media_ids["audio"]
    order_BT = audio_BT.flatten().cumsum(0).view_as(audio_BT) - 1  # of the audio tokens among all
    chunks = []
    for start, end in pairwise([0, *cuts, n_tokens]):
        valid_BS = None if batch.valid_BS is None else batch.valid_BT[:, :end]
        heard_K = order_BT[:, start:end][audio_BT[:, start:end]]
        now = dataclasses.replace(media, speech_KD=media.speech_KD[heard_K])
        chunks.append(model.decode(batch.ids_BT[:, start:end], valid_BS=valid_BS, media=now, cache=cache))
    return model.lm.logits(torch.cat(chunks, dim=1))


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("rows", [ROWS, ((*ROWS[0], "wx"),)], ids=["left-padded", "unpadded"])
def test_3_prefill_and_steps_equal_the_full_forward(model, rows, cuts):
    """Clause 3: at every split point, with all kinds of media, left padding and a prefill in chunks."""
    whole, batch = logits_of(model, *rows)
    assert batch.ids_BT.shape[1] == LENGTH
    pieces = logits_in_chunks(model, batch, cuts)
    assert_close(pieces[batch.valid_BT], whole[batch.valid_BT])


# ------------------------------------------------------------------------------------------------------------- clause 4


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_4_a_row_of_a_batch_equals_the_row_alone(model, pad_side):
    """Clause 4: to rounding, wherever the padding is."""
    together, batch = logits_of(model, *ROWS, pad_side=pad_side)
    for i, row in enumerate(ROWS):
        alone, _ = logits_of(model, row)
        assert_close(together[i, batch.valid_BT[i]], alone[0])


@torch.no_grad()
def test_4_tile_padding_changes_nothing(model):
    """Clause 4: neither its amount nor what is in it, bit for bit."""
    batch = batch_of(model, ROWS[1], ("ab", Picture(57, 27), "cd"), ("e", Picture(13, 17), "f"))
    padded = torch.full((2, 4, 3, 28, 28), torch.nan)
    padded[batch.pictures.valid_PN.nonzero().unbind(1)] = batch.pictures.tiles_PNCHW[batch.pictures.valid_PN]
    assert batch.pictures.grid_P2.tolist() == [[1, 3], [1, 1]]
    more = dataclasses.replace(batch, pictures=Pictures(padded, batch.pictures.grid_P2))
    assert torch.equal(model(more), model(batch))


@torch.no_grad()
def test_4_tile_padding_of_frames_changes_nothing(model):
    """Clause 4: neither its amount nor what is in it, bit for bit."""
    batch = batch_of(model, ROWS[1], ("ab", Clip(3, 53, 27), "cd"), ("e", Clip(5, 13, 17), "f"))
    frames = batch.clips.frames
    assert batch.clips.n_frames_V.tolist() == [3, 5] and frames.grid_P2.tolist() == [[1, 2]] * 3 + [[1, 1]] * 5
    padded = torch.full((8, 4, 3, 28, 28), torch.nan)
    padded[frames.valid_PN.nonzero().unbind(1)] = frames.tiles_PNCHW[frames.valid_PN]
    more = dataclasses.replace(batch, clips=Clips(Pictures(padded, frames.grid_P2), batch.clips.n_frames_V))
    assert torch.equal(model(more), model(batch))


@torch.no_grad()
def test_4_what_is_in_the_padding_of_recordings_changes_nothing(model):
    """Clause 4: bit for bit; to rounding when there is more of it."""
    batch = batch_of(model, *ROWS)
    assert batch.n_frames_A.tolist() == [13, 19]
    junk = batch.mel_ATM.clone()
    junk[0, 13:] = torch.nan
    assert torch.equal(model(dataclasses.replace(batch, mel_ATM=junk)), model(batch))
    more = torch.nn.functional.pad(junk, (0, 0, 0, 11), value=torch.nan)
    assert_close(model(dataclasses.replace(batch, mel_ATM=more))[batch.valid_BT], model(batch)[batch.valid_BT])


@torch.no_grad()
def test_4_the_ids_at_padding_change_nothing(model):
    """Clause 4: bit for bit."""
    batch = batch_of(model, *ROWS)
    other = dataclasses.replace(batch, ids_BT=batch.ids_BT.where(batch.valid_BT, 7))
    assert torch.equal(model(other)[batch.valid_BT], model(batch)[batch.valid_BT])


def test_3_a_recording_takes_as_many_tokens_as_embeddings_come_out(model):
    """What the clauses rest on: 80 ms each, and what is left over counts as one."""
    speech = model.config.speech
    for n_frames in (10, 13, 16, 17, 24, 31):
        batch = batch_of(model, ("a", Recording(n_frames), "b"))
        n_tokens = int((batch.ids_BT == model.config.media_ids["audio"]).sum())
        assert n_tokens == -(-n_frames // 8) == speech.n_tokens(n_frames) == len(model.encode_media(batch).speech_KD)
        start = batch.ids_BT[0].tolist().index(speech.start_id)
        assert batch.ids_BT[0, start + 1 + n_tokens] == speech.end_id


# ------------------------------------------------------------------------------------------------------------- clause 9

#: Cross-attention blocks of section 7.2's adapter: at every fourth layer, each as large as a layer of this model.
ADAPTER_SIZES = {
    "debug": 35_556,
    "smollm2-135m": 24_781_582,
    "smollm2-360m": 78_659_600,
    "smollm2-1.7b": 402_678_540,
    "llama3-8b": 1_744_898_064,
    "llama3-70b": 17_113_093_160,
    "llama3-405b": 98_818_826_046,  # "about 100B"
    "llama3.2-1b": 243_286_536,
    "llama3.2-3b": 704_687_886,
}


@cache
def sizes(lm: str, preset: str) -> Counter[str]:
    """Parameters of each part of a whole model, and of its projection."""
    with torch.device("meta"):
        video = (
            None if (lm, preset) == ("debug", "paper") else preset
        )  # it has too few layers for the paper's placement
        model = MultimodalLlama(with_parts(PRESETS[lm](), image=preset, speech=preset, video=video, chat="llama3"))
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts["projection" if name.startswith("image_adapter.projection.") else part_of(name)] += parameter.numel()
    return counts


def test_9_every_preset_takes_the_papers_parts():
    """Clause 9: they build on the meta device, with the paper's counts."""
    assert ADAPTER_SIZES.keys() == PRESETS.keys() and len(PRESETS) == 9
    for lm, n_blocks in ADAPTER_SIZES.items():
        counts = sizes(lm, "paper")
        assert counts["image_adapter"] == n_blocks
        assert counts["projection"] == (7680 + 1) * PRESETS[lm]().dim
        assert counts["vit"] == pytest.approx(630e6, rel=0.002)
        assert counts["speech_encoder"] == pytest.approx(1.001e9, rel=0.002)
        assert counts["speech_adapter"] == 89_665_536 + (3072 + 1) * PRESETS[lm]().dim


@pytest.mark.parametrize("lm", ["llama3-8b", "llama3-70b"])
def test_9_the_speech_adapter_is_about_100m(lm):
    """Clause 9."""
    assert sizes(lm, "paper")["speech_adapter"] == pytest.approx(100e6, rel=0.15)


@pytest.mark.parametrize("lm", ["llama3-8b", "llama3-70b"])
def test_9_encoder_gated_layers_and_projection_are_850m(lm):
    """Clause 9."""
    counts = sizes(lm, "paper")
    assert counts["lm"] == {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}[lm]
    assert counts["new_tokens"] == 5 * PRESETS[lm]().dim  # picture, speech, its start and end, clip
    assert counts["vit"] + counts["gated_layers"] + counts["projection"] == pytest.approx(850e6, rel=0.03)


@pytest.mark.parametrize(("lm", "stated"), [("llama3-8b", 0.6e9), ("llama3-70b", 4.6e9)])
def test_9_aggregator_and_video_blocks_are_the_papers(lm, stated):
    """Clause 9: on tiles of 224 pixels; tests/mm/test_verify.py has those of 448."""
    counts = sizes(lm, "paper")
    assert counts["aggregator"] + counts["video_adapter"] == pytest.approx(stated, rel=0.035)


def test_9_the_debug_model_is_small():
    """Decision 9: under one million parameters, all parts together."""
    assert sum(sizes("debug", "debug").values()) < 1e6


def test_9_bundled_adapters_are_what_the_package_can_carry():
    """Beside the language model, in two bytes a parameter, they stay below 60 MB."""
    counts = sizes("smollm2-135m", "bundled")
    assert 2 * (counts.total() - counts["lm"]) < 60e6
