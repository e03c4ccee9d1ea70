"""The training stages as data: what trains, with which loss (the trainable/frozen matrix of sections 7.4, 7.5.2 and 8.3).

`apply` is the only code that touches `requires_grad`. A stage starts from what the one before exported, weights without optimiser
state, so its optimiser always starts anew, as the paper does for annealing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from mm.model import MultimodalLlama

#: Where a parameter belongs, told by its name; the first pattern that matches wins.
PARTS: tuple[tuple[str, str], ...] = (
    (r"image_encoder\.patch_embed\.backbone\.", "stem"),
    # What the adapter stage adds to the contrastively trained ViT; its gates start at zero.
    (r"image_encoder\.(global_blocks|pre_tile_positional_embedding|post_tile_positional_embedding)\.", "gated_layers"),
    (r"image_encoder\.gated_positional_embedding\.(tile_embedding|gate)$", "gated_layers"),
    (r"image_encoder\.", "vit"),
    (r"image_adapter\.", "image_adapter"),
    # What makes effective frames of features.
    (r"video_adapter\.(projection|aggregator)\.", "aggregator"),
    (r"video_adapter\.", "video_adapter"),
    (r"(speech_encoder|encoder)\.", "speech_encoder"),  # in BEST-RQ's and the CTC model the encoder is alone
    (r"speech_adapter\.", "speech_adapter"),
    (r"new_tokens\.", "new_tokens"),
    (r"normalizer\.", "normalizer"),
    (r"prosody\.", "prosody"),
    (r"acoustic\.", "acoustic"),
    (r"vocoder\.", "vocoder"),
    (r"lm\.", "lm"),
    (r"(text_encoder|image_projection|logit_scale|heads|head|discriminators)\b", "head"),
)


#: A parameter of a cross-attention adapter; of a block, with the layer of the language model before which it runs.
ADAPTER = re.compile(r"(?:image|video)_adapter\.(?:blocks\.(?P<layer>\d+)\.)?")
#: A tanh gate; `gate_proj.weight` of a SwiGLU is none.
GATE = re.compile(r"(^|[._])gate(_attn|_ffn)?$")


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rate of each group of parameters; 0 freezes the group.

    Attributes:
        encoder: the ViT and its gated layers, or the Conformer.
        stem: a hybrid encoder's convolutional backbone.
        adapter: projection and cross-attention blocks, the temporal aggregator, and the speech adapter.
        new_tokens: the rows of a medium beside the token table, such as those that enclose speech. Each is one vector, which has a
            frozen language model do what it would not by itself, and wants far larger steps than matrices (docs/LOG.md).
        gates: the tanh gates of parts that train. They start at zero and scale whole layers, so they want larger steps than
            matrices.
        head: what a stage needs and no later one: text tower and projections, codebook heads, CTC heads, discriminators.
        normalizer: all of the text normaliser.
        voice: all of the prosody model, the acoustic model or the vocoder.
    """

    encoder: float = 0.0
    stem: float = 0.0
    adapter: float = 0.0
    new_tokens: float = 0.0
    gates: float = 0.0
    head: float = 0.0
    normalizer: float = 0.0
    voice: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"lr.{field.name} must not be negative, got {getattr(self, field.name)}")


#: Learning rate of a part's parameters other than gates. Parts that are not here never train.
RATE_OF_PART = {
    "stem": "stem",
    "vit": "encoder",
    "gated_layers": "encoder",
    "image_adapter": "adapter",
    "aggregator": "adapter",
    "video_adapter": "adapter",
    "speech_encoder": "encoder",
    "speech_adapter": "adapter",
    "new_tokens": "new_tokens",
    "head": "head",
    "normalizer": "normalizer",
    "prosody": "voice",
    "acoustic": "voice",
    "vocoder": "voice",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One line of the paper's matrix.

    Attributes:
        medium: kind of medium that it learns from. Where `trains` names new tokens, they are those of this medium.
        trains: parts that train; all others are frozen.
        loss: "contrastive" between pictures and texts, "best-rq" on masked speech, "ctc" on the letters of transcripts,
            "token-ctc" on their tokens, "caption-words" on the words of captions as sets, "facts" about what questions name,
            "next-token" on supervised tokens, "rules" of TN tokens, "prosody" of phones, "mel" on their frames, or "waveform" on
            the samples of frames.
        swaps_lm: the language model may be replaced by another of its shape at the start (7.5.2).
        masks_prompts: only answers are supervised, so its data must be conversations.
    """

    name: str
    medium: Literal["image", "audio", "video", "text", "voice"]
    trains: frozenset[str]
    loss: Literal[
        "contrastive",
        "best-rq",
        "ctc",
        "token-ctc",
        "caption-words",
        "facts",
        "next-token",
        "rules",
        "prosody",
        "mel",
        "waveform",
    ]
    swaps_lm: bool = False
    masks_prompts: bool = False


_EYES = frozenset({"stem", "vit", "gated_layers", "image_adapter"})
_EARS = frozenset({"speech_encoder", "speech_adapter", "new_tokens"})
_MOTION = frozenset({"aggregator", "video_adapter", "new_tokens"})

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(name="image-encoder", medium="image", trains=frozenset({"stem", "vit", "head"}), loss="contrastive"),
        Stage(name="image-adapter", medium="image", trains=_EYES, loss="next-token"),
        Stage(name="image-anneal", medium="image", trains=_EYES, loss="next-token"),
        Stage(name="image-sft", medium="image", trains=_EYES, loss="next-token", swaps_lm=True, masks_prompts=True),
        # Not the paper's: warm starts for small budgets, as speech-align is.
        Stage(name="video-align", medium="video", trains=frozenset({"aggregator", "head"}), loss="caption-words"),
        Stage(name="video-ground", medium="video", trains=_MOTION - {"new_tokens"} | {"head"}, loss="facts"),
        Stage(name="video", medium="video", trains=_MOTION, loss="next-token"),
        Stage(name="video-sft", medium="video", trains=_MOTION, loss="next-token", swaps_lm=True, masks_prompts=True),
        Stage(name="speech-encoder", medium="audio", trains=frozenset({"speech_encoder", "head"}), loss="best-rq"),
        # Not the paper's: warm starts for small budgets, the first also the probe of what pre-training is worth.
        Stage(name="speech-ctc", medium="audio", trains=frozenset({"speech_encoder", "head"}), loss="ctc"),
        Stage(name="speech-align", medium="audio", trains=_EARS - {"new_tokens"}, loss="token-ctc"),
        Stage(name="speech", medium="audio", trains=_EARS, loss="next-token", masks_prompts=True),
        Stage(name="tts-normalizer", medium="text", trains=frozenset({"normalizer"}), loss="rules"),
        Stage(name="tts-prosody", medium="voice", trains=frozenset({"prosody"}), loss="prosody"),
        Stage(name="tts-acoustic", medium="voice", trains=frozenset({"acoustic"}), loss="mel"),
        Stage(name="tts-vocoder", medium="voice", trains=frozenset({"vocoder", "head"}), loss="waveform"),
    )
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in `MultimodalLlama` or `ContrastiveModel`."""
    for pattern, part in PARTS:
        if re.match(pattern, name):
            return part
    raise AssertionError(f"parameter {name} belongs to no part; add it to PARTS")


def _is_before(layer: int, name: str) -> bool:
    """Whether a parameter works before the cross-attention block of that layer of the language model."""
    adapter = ADAPTER.match(name)
    return name.startswith("new_tokens.") or (adapter is not None and int(adapter["layer"] or 0) < layer)


def apply(
    stage: Stage, model: nn.Module, rates: LearningRates, weight_decay: float = 0.0, first_block: int = 0
) -> list[dict[str, Any]]:
    """Freezes and unfreezes every parameter; modules are in train mode where they own one that trains. Idempotent.

    Of the new tokens, which are one parameter, the rows of other media than the stage's get no gradient.

    Args:
        first_block: if not 0, cross-attention blocks before earlier layers of the language model are frozen, and so is what all
            blocks and layers build on: the projection, the aggregator, new tokens.

    Returns:
        The optimiser's parameter groups: `params`, `lr`, `weight_decay`, the `name` of the learning rate, and whether they are
        `matrices` of linear layers. They hold exactly the parameters that train. Gates, norms, biases and token embeddings are not
        decayed.

    Raises:
        ValueError: nothing would train.
    """
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    model.eval()
    if isinstance(model, MultimodalLlama) and model.new_tokens is not None:
        rows = set(range(model.config.n_new_tokens))
        model.new_tokens.frozen_rows = tuple(rows.difference(model.config.new_token_rows(stage.medium)))
    for name, parameter in model.named_parameters():
        part = part_of(name)
        rate_name = RATE_OF_PART.get(part, "")
        rate = getattr(rates, rate_name, 0.0) if part in stage.trains else 0.0
        if first_block and _is_before(first_block, name):
            rate = 0.0
        if rate > 0 and GATE.search(name):
            rate_name, rate = "gates", rates.gates
        parameter.requires_grad_(rate > 0)
        if rate == 0:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        module.training = True
        decays = parameter.ndim > 1 and part != "new_tokens"
        is_matrix = isinstance(module, nn.Linear) and parameter.ndim == 2
        group = groups.setdefault(
            (rate_name, decays, is_matrix),
            {
                "name": rate_name,
                "params": [],
                "lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
                "matrices": is_matrix,
            },
        )
        group["params"].append(parameter)
    if not groups:
        which = f"cross-attention block from layer {first_block} on" if first_block else "part"
        raise ValueError(
            f"optim.lr: every {which} that stage {stage.name} trains has learning rate 0, or there is none"
        )
    return list(groups.values())
