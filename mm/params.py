"""How many parameters each part has, beside the numbers that the paper and the released models give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import nn

from lm.config import PRESETS
from mm.config import ImageConfig, MultimodalConfig, with_parts
from mm.model import MultimodalLlama
from mm.stages import part_of
from video.adapter import VideoAdapter, VideoAdapterConfig
from vision.adapter import ImageAdapterConfig
from vision.encoder import PRESETS as ENCODER_PRESETS
from vision.mllama import N_NEW_TOKENS

LM, NEW_TOKENS = "language model", "new token rows"
STEM, VIT, GATED_LAYERS = "image encoder: stem", "image encoder: ViT", "image encoder: gated layers"
PROJECTION, CROSS_ATTENTION = "image adapter: projection", "image adapter: cross-attention"
CONFORMER, SPEECH_ADAPTER = "speech encoder", "speech adapter"
VIDEO_PROJECTION, AGGREGATOR = "video adapter: projection", "video adapter: aggregator"
VIDEO_CROSS_ATTENTION = "video adapter: cross-attention"
_ROW_OF_PART = {
    "lm": LM,
    "new_tokens": NEW_TOKENS,
    "stem": STEM,
    "vit": VIT,
    "gated_layers": GATED_LAYERS,
    "image_adapter": CROSS_ATTENTION,
    "speech_encoder": CONFORMER,
    "speech_adapter": SPEECH_ADAPTER,
    "aggregator": AGGREGATOR,
    "video_adapter": VIDEO_CROSS_ATTENTION,
}
#: Rows of what is counted apart from the rest of its part, by the beginning of its names.
_ROW_OF_PREFIX = {
    "image_adapter.projection.": PROJECTION,
    "video_adapter.projection.": VIDEO_PROJECTION,
}


def count_parts(model: nn.Module) -> dict[str, int]:
    """Parameters of each part of a `MultimodalLlama`."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        apart = (row for prefix, row in _ROW_OF_PREFIX.items() if name.startswith(prefix))
        counts[next(apart, _ROW_OF_PART[part_of(name)])] += parameter.numel()
    return dict(counts)


def count_voice(model: MultimodalLlama) -> dict[str, int]:
    """Parameters of each part of the model's voice; nothing without one."""
    parts = model.voice.parts.items() if model.voice else ()
    return {f"voice: {name}": sum(p.numel() for p in part.parameters()) for name, part in parts}


def preset_model(
    lm: str, image: str | None = None, speech: str | None = None, video: str | None = None
) -> MultimodalLlama:
    """A model of a preset's shape on the meta device, which takes no memory.

    Args:
        lm: a name in `lm.config.PRESETS`.
        image: a name in `mm.config.IMAGE_PRESETS`; None for a model without eyes.
        speech: a name in `mm.config.SPEECH_PRESETS`; None for a model without ears.
        video: a name in `mm.config.VIDEO_PRESETS`; None for a model that takes no clips.

    Raises:
        ValueError: a name is unknown.
    """
    if lm not in PRESETS:
        raise ValueError(f"preset {lm!r} is unknown; choose one of {', '.join(PRESETS)}")
    # The chat format has no parameters; any will do.
    config = with_parts(PRESETS[lm](), image=image, speech=speech, video=video, chat="llama3")
    with torch.device("meta"):
        return MultimodalLlama(config)


def parts_table(title: str, counts: Mapping[str, int]) -> Table:
    """For people: a row per part, and the sum."""
    view = Table(title=title, show_footer=True)
    view.add_column("part", footer="all")
    view.add_column("parameters", justify="right", footer=f"{sum(counts.values()):,}")
    for part, count in counts.items():
        view.add_row(part, f"{count:,}")
    return view


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A number that is known from elsewhere, and ours.

    Attributes:
        stated: how the source says it; `expected` is the same as a number.
        tolerance: relative; 0 for exact numbers.
    """

    what: str
    stated: str
    expected: float
    tolerance: float
    ours: int

    @property
    def holds(self) -> bool:
        return abs(self.ours - self.expected) <= self.tolerance * self.expected


def paper_claims() -> list[Claim]:
    """Counts of sections 7.2 and 8.2.1 and of the released models, against models built here on the meta device."""
    sizes = {name: count_parts(preset_model(f"llama3-{name}", "paper", "paper")) for name in ("8b", "70b", "405b")}
    video = {name: _video_adapter_size(f"llama3-{name}") for name in ("8b", "70b")}
    vision = {name: sum(count_parts(_llama3_2_vision(f"llama3-{name}")).values()) for name in ("8b", "70b")}
    encoder = sizes["70b"][VIT] + sizes["70b"][GATED_LAYERS]
    rows = (
        ("Llama 3 8B", "8,030,261,248", 8_030_261_248, 0, sizes["8b"][LM]),
        ("Llama 3 70B", "70,553,706,496", 70_553_706_496, 0, sizes["70b"][LM]),
        ("Llama 3 405B", "405,853,388,800", 405_853_388_800, 0, sizes["405b"][LM]),
        ("ViT-H/14 at 224 pixels", "630M", 630e6, 2e-3, sizes["70b"][VIT]),
        # The paper does not itemise its 850M; with the projection to 8192 it comes out.
        ("the same with 8 gated layers, projection", "850M", 850e6, 0.03, encoder + sizes["70b"][PROJECTION]),
        ("width of its features", "7680", 7680, 0, ENCODER_PRESETS["vit-h-14"]().feature_dim),
        ("cross-attention for the 8B", "1.745B", 1.745e9, 1e-3, sizes["8b"][CROSS_ATTENTION]),
        ("cross-attention for the 405B", "about 100B", 100e9, 0.03, sizes["405b"][CROSS_ATTENTION]),
        ("aggregator and video blocks for the 8B", "0.6B", 0.6e9, 0.01, video["8b"]),
        ("aggregator and video blocks for the 70B", "4.6B", 4.6e9, 0.01, video["70b"]),
        ("Conformer of 24 layers", "1B (1.001B)", 1.001e9, 2e-3, sizes["8b"][CONFORMER]),
        # For the 8B; the last layer grows with the language model.
        ("speech adapter", "about 100M", 100e6, 0.05, sizes["8b"][SPEECH_ADAPTER]),
        ("Llama 3.2 Vision 11B", "10.629B", 10.629e9, 1e-3, vision["8b"]),
        ("Llama 3.2 Vision 90B", "88.552B", 88.552e9, 1e-3, vision["70b"]),
    )
    return [Claim(what=w, stated=s, expected=e, tolerance=t, ours=ours) for w, s, e, t, ours in rows]


def claims_table(claims: list[Claim]) -> Table:
    """For people: ours beside what is expected."""
    view = Table(title="The paper and the released models")
    view.add_column("what")
    view.add_column("expected", justify="right")
    view.add_column("here", justify="right")
    for claim in claims:
        view.add_row(claim.what, claim.stated, f"{claim.ours:,}", style=None if claim.holds else "red")
    return view


def _video_adapter_size(lm_preset: str) -> int:
    """Parameters of the video adapter, its projection included, on the tiles of 448 pixels that video is trained with."""
    lm, encoder = PRESETS[lm_preset](), replace(ENCODER_PRESETS["vit-h-14"](), tile_size=448)
    image = ImageAdapterConfig.for_lm(lm, encoder.feature_dim)
    with torch.device("meta"):
        adapter = VideoAdapter(VideoAdapterConfig.for_lm(lm, image, encoder))
    return sum(parameter.numel() for parameter in adapter.parameters())


def _llama3_2_vision(lm_preset: str) -> MultimodalLlama:
    lm, encoder = PRESETS[lm_preset](), ENCODER_PRESETS["llama3.2-11b-560"]()
    adapter = ImageAdapterConfig.for_lm(lm, encoder.feature_dim)
    config = MultimodalConfig(
        lm=lm,
        chat="llama3",
        image=ImageConfig(encoder=encoder, adapter=adapter),
        n_new_tokens=N_NEW_TOKENS,
        media_ids={"image": lm.vocab_size},
    )
    with torch.device("meta"):
        return MultimodalLlama(config)
