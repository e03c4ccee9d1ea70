"""`mm verify`: is this checkpoint whole, and does its language model answer text exactly as it does alone?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from lm.checkpoint import load_llama
from mm.model import MultimodalLlama
from mm.params import paper_claims
from mm.processor import Batch
from video.clips import Clips
from vision.tiling import Pictures, tile_image

#: The batch that is tried: a row of text, and a row that is padded on the left and has a picture, a clip or a recording.
N_TOKENS, PADDING, MEDIUM_AT = 23, 5, 9
#: Mel frames of the recording. One token stands for 8 in every preset; what it stands for must fit into the row.
N_MEL_FRAMES = 45
#: Frames of the clip.
N_FRAMES = 3

Kind = Literal["picture", "clip", "recording"]


@dataclass(frozen=True)
class Check:
    """A question that was put to the model; `detail` says in plain words what was found."""

    name: str
    passed: bool
    detail: str


def verify(source: str | Path) -> list[Check]:
    """All checks that a model allows, and the paper's parameter counts, which need no weights.

    Args:
        source: as `MultimodalLlama.from_pretrained`; one that does not load is a failed check.
    """
    try:
        model = MultimodalLlama.from_pretrained(source)
    except ValueError as error:
        return [Check("strict keys", False, str(error)), *check_counts()]
    return [*check_model(model), *check_counts()]


def check_model(model: MultimodalLlama) -> list[Check]:
    """Checks of a loaded model."""
    checks = [check_tensors(model), check_text_parity(model)]
    if model.config.image is not None:
        checks.append(check_parity_beside(model, "picture"))
    if model.config.video is not None:
        checks.append(check_parity_beside(model, "clip"))
    if model.config.speech is not None:
        checks.append(check_parity_beside(model, "recording"))
    if model.config.has_parts and model.config.lm_source is not None:
        checks.append(check_language_model(model, model.config.lm_source))
    return checks


def check_tensors(model: MultimodalLlama) -> Check:
    """Loading is strict, so a model that is here lacks nothing; its numbers may still be broken."""
    state = model.state_dict()
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        return Check("strict keys", False, f"not finite: {', '.join(broken[:8])}")
    return Check("strict keys", True, f"{len(state)} tensors; none missing, none left over, all finite")


@torch.inference_mode()
def check_text_parity(model: MultimodalLlama) -> Check:
    """Contract clause 1: without media, logits are those of the bare language model, bit for bit."""
    batch = _batch(model)
    same = torch.equal(model(batch), model.lm(batch.ids_BT, valid_BS=batch.valid_BS))
    return _parity("text parity", same, "text alone")


@torch.inference_mode()
def check_parity_beside(model: MultimodalLlama, kind: Kind) -> Check:
    """Clauses 1 and 2: a medium reaches neither the other row nor the tokens before it."""
    batch = _batch(model, kind)
    bare_BTV = model.lm.logits(model.lm.hidden(model.embed(batch.ids_BT), valid_BS=batch.valid_BS))
    logits_BTV = model(batch)
    before = slice(PADDING, MEDIUM_AT)
    same = torch.equal(logits_BTV[0], bare_BTV[0]) and torch.equal(logits_BTV[1, before], bare_BTV[1, before])
    return _parity(f"text parity beside {kind}s", same, f"text in a batch with a {kind}, and text before the {kind},")


def check_language_model(model: MultimodalLlama, lm_source: str) -> Check:
    """The language model inside is the one that the checkpoint names."""
    original = load_llama(lm_source, dtype=model.lm.norm.weight.dtype, device=model.device).state_dict()
    changed = [name for name, tensor in model.lm.state_dict().items() if not torch.equal(tensor, original[name])]
    if changed:
        return Check("language model", False, f"differs from {lm_source} in {', '.join(changed[:8])}")
    return Check("language model", True, f"its {len(original)} tensors are those of {lm_source}, bit for bit")


def check_counts() -> list[Check]:
    """The parameter table of the paper and of the released models."""
    return [
        Check(f"count: {claim.what}", claim.holds, f"{claim.ours:,} here, {claim.stated} expected")
        for claim in paper_claims()
    ]


def _parity(name: str, same: bool, where: str) -> Check:
    verdict = "has the bare language model's logits, bit for bit" if same else "differs from the bare language model"
    return Check(name, same, f"{where} {verdict}")


def _batch(model: MultimodalLlama, kind: Kind | None = None) -> Batch:
    """Random tokens, the same on every call; no tokenizer is needed."""
    ids_BT = torch.randint(model.config.lm.vocab_size, (2, N_TOKENS), generator=torch.Generator().manual_seed(0))
    valid_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    valid_BT[1, :PADDING] = False
    batch = Batch(ids_BT=ids_BT, valid_BT=valid_BT, supervised_BT=torch.zeros_like(valid_BT))
    row, position = torch.tensor([1]), torch.tensor([MEDIUM_AT - PADDING])
    if kind == "picture":
        ids_BT[1, MEDIUM_AT] = model.config.media_ids["image"]
        batch.pictures = _pictures(model, 1, max_tiles=4)
        batch.picture_row_P, batch.picture_position_P = row, position
    elif kind == "clip":
        ids_BT[1, MEDIUM_AT] = model.config.media_ids["video"]
        batch.clips = Clips(_pictures(model, N_FRAMES, max_tiles=1), torch.tensor([N_FRAMES]))
        batch.clip_row_V, batch.clip_position_V = row, position
    elif kind == "recording":
        assert model.config.speech is not None
        n_tokens = model.config.speech.n_tokens(N_MEL_FRAMES)
        ids_BT[1, MEDIUM_AT : MEDIUM_AT + n_tokens] = model.config.media_ids["audio"]
        shape = (1, N_MEL_FRAMES, model.config.speech.features.n_mels)
        batch.mel_ATM = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        batch.n_frames_A = torch.tensor([N_MEL_FRAMES])
    return batch.to(model.device)


def _pictures(model: MultimodalLlama, n: int, max_tiles: int) -> Pictures:
    """Noise, padded to as many tiles as the released encoder needs; no other encoder minds."""
    assert model.config.image is not None
    encoder = model.config.image.encoder
    size, max_tiles = (2 * encoder.tile_size, encoder.tile_size), min(max_tiles, encoder.max_tiles)
    noise = [Image.effect_noise(size, sigma=80).convert("RGB") for _ in range(n)]
    tiles = [tile_image(picture, encoder.tile_size, max_tiles) for picture in noise]
    return Pictures.collate(tiles, n_tiles=encoder.max_tiles)
