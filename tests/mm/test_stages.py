"""Which parts train in which stage: the paper's matrix, and that nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm.checkpoint import debug_model
from mm.stages import STAGES, LearningRates, apply, part_of
from mm.train.discriminators import Discriminators
from mm.train.grounding import GroundingModel
from mm.train.loss import next_token_loss
from mm.train.naming import NamingModel
from speech.acoustic import PRESETS as ACOUSTICS
from speech.acoustic import AcousticModel
from speech.bestrq import BestRQ, BestRQConfig
from speech.conformer import PRESETS as CONFORMERS
from speech.conformer import Conformer
from speech.ctc import CTCProbe, Letters, TokenCTC
from speech.normalizer import NormalizerConfig, TextNormalizer
from speech.prosody import PRESETS as PROSODIES
from speech.prosody import ProsodyModel
from speech.vocoder import PRESETS as VOCODERS
from speech.vocoder import Vocoder
from vision.contrastive import ContrastiveModel, TextTowerConfig
from vision.encoder import PRESETS, ImageEncoder

RATES = LearningRates(
    encoder=1e-3, stem=1e-4, adapter=2e-3, new_tokens=2e-2, gates=3e-2, head=4e-3, normalizer=5e-3, voice=6e-3
)
TEXT = TextTowerConfig(width=24, n_layers=1, n_heads=3, context_length=7, embed_dim=20)

#: Sections 7.4, 7.5.2 and 8.3: the language model never trains; encoders do but for video; adapters where text is the target.
MATRIX = {
    "image-encoder": {"stem", "vit", "head"},
    "image-adapter": {"stem", "vit", "gated_layers", "image_adapter"},
    "image-anneal": {"stem", "vit", "gated_layers", "image_adapter"},
    "image-sft": {"stem", "vit", "gated_layers", "image_adapter"},
    "video-align": {"aggregator", "head"},
    "video-ground": {"aggregator", "video_adapter", "head"},
    "video": {"aggregator", "video_adapter", "new_tokens"},
    "video-sft": {"aggregator", "video_adapter", "new_tokens"},
    "speech-encoder": {"speech_encoder", "head"},
    "speech-ctc": {"speech_encoder", "head"},
    "speech-align": {"speech_encoder", "speech_adapter"},
    "speech": {"speech_encoder", "speech_adapter", "new_tokens"},
    "tts-normalizer": {"normalizer"},
    "tts-prosody": {"prosody"},
    "tts-acoustic": {"acoustic"},
    "tts-vocoder": {"vocoder", "head"},
}


def model_of(stage: str) -> nn.Module:
    if stage == "image-encoder":
        return ContrastiveModel(ImageEncoder(PRESETS["debug"]()), TEXT)
    if stage == "speech-encoder":
        return BestRQ(Conformer(CONFORMERS["debug"]()), BestRQConfig(n_codebooks=2, codebook_size=7, code_dim=3))
    if stage == "speech-ctc":
        return CTCProbe(Conformer(CONFORMERS["debug"]()))
    if stage == "speech-align":
        whole = debug_model()
        assert whole.speech_encoder is not None and whole.speech_adapter is not None
        whole.read_speech(range(len(Letters())))
        return TokenCTC(whole.speech_encoder, whole.speech_adapter, Letters(), whole.lm.embed_tokens.weight)
    if stage == "video-align":
        whole = debug_model()
        assert whole.image_encoder is not None and whole.video_adapter is not None
        return NamingModel(whole.image_encoder, whole.video_adapter, torch.zeros(3))
    if stage == "video-ground":
        return GroundingModel(debug_model(), [("turn", "first"), ("turn", "last")])
    if stage == "tts-normalizer":
        return nn.ModuleDict({"normalizer": TextNormalizer(NormalizerConfig(dim=12, n_heads=2))})
    if stage == "tts-prosody":
        return nn.ModuleDict({"prosody": ProsodyModel(PROSODIES["debug"]())})
    if stage == "tts-acoustic":
        return nn.ModuleDict({"acoustic": AcousticModel(ACOUSTICS["debug"]())})
    if stage == "tts-vocoder":
        parts = {"vocoder": Vocoder(VOCODERS["debug"]()), "discriminators": Discriminators(2)}
        return nn.ModuleDict(parts | {"acoustic": AcousticModel(ACOUSTICS["debug"]())})
    return debug_model()


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_papers_parts_train(stage: str) -> None:
    model = model_of(stage)
    groups = apply(STAGES[stage], model, RATES)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if part_of(name) in MATRIX[stage]}
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("stage", STAGES)
def test_applying_again_and_after_another_stage_gives_the_same(stage: str) -> None:
    fresh, used = model_of(stage), model_of(stage)
    apply(STAGES[stage], fresh, RATES)
    apply(STAGES[stage], used, LearningRates(encoder=1.0, adapter=1.0, head=1.0, normalizer=1.0, voice=1.0))
    apply(STAGES[stage], used, RATES)
    apply(STAGES[stage], used, RATES)
    for (name, a), b in zip(fresh.named_parameters(), used.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
    for (name, a), b in zip(fresh.named_modules(), used.modules(), strict=True):
        assert a.training == b.training, name


@pytest.mark.parametrize(("stage", "rows"), [("video", [4]), ("video-sft", [4]), ("speech", [2, 3])])
def test_of_the_new_tokens_only_the_stages_own_learn(stage: str, rows: list[int]) -> None:
    """Whatever else a sample shows: rows are those of picture, speech (spoken over), its start and end, clip."""
    model = debug_model()
    apply(STAGES["speech" if stage == "video" else "video"], model, RATES)
    apply(STAGES[stage], model, RATES)
    clip = torch.randint(256, (3, 3, 29, 31), dtype=torch.uint8)
    media = {"image": clip[0], "video": clip, "audio": (torch.rand(4000), 16_000)}
    content = [{"type": kind, kind: source} for kind, source in media.items()]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    next_token_loss(model, model.processor.collate([model.processor.encode(messages)])).backward()
    assert model.new_tokens is not None and model.new_tokens.weight.grad is not None
    assert model.new_tokens.weight.grad.abs().amax(1).nonzero()[:, 0].tolist() == rows


def test_groups_have_their_rates_and_decay() -> None:
    model = debug_model()
    groups = apply(STAGES["image-adapter"], model, RATES, weight_decay=0.1)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert model.image_encoder is not None and model.image_adapter is not None
    block = model.image_adapter.blocks["3"]
    vit = model.image_encoder.blocks[0]
    expected = {
        block.cross_attn_attn_gate: (3e-2, 0.0),
        block.cross_attn_mlp_gate: (3e-2, 0.0),
        model.image_encoder.global_blocks[0].gate_attn: (3e-2, 0.0),
        model.image_encoder.gated_positional_embedding.gate: (3e-2, 0.0),
        block.mlp.gate_proj.weight: (2e-3, 0.1),  # a gate in name only
        block.input_layernorm.weight: (2e-3, 0.0),
        model.image_adapter.projection.bias: (2e-3, 0.0),
        vit.attn.qkv.weight: (1e-3, 0.1),
        vit.norm1.bias: (1e-3, 0.0),
    }
    assert {id(p): value for p, value in expected.items()}.items() <= settings.items()


@pytest.mark.parametrize("stage", ["speech", "video", "video-sft"])
def test_new_tokens_have_a_rate_of_their_own_and_do_not_decay(stage: str) -> None:
    model = debug_model()
    assert model.new_tokens is not None
    (group,) = [g for g in apply(STAGES[stage], model, RATES, weight_decay=0.1) if g["name"] == "new_tokens"]
    assert [id(p) for p in group["params"]] == [id(model.new_tokens.weight)]
    assert (group["lr"], group["weight_decay"], group["matrices"]) == (2e-2, 0.0, False)


def test_rate_zero_freezes_a_group() -> None:
    model = debug_model()
    apply(STAGES["image-adapter"], model, LearningRates(adapter=1e-3))
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"image_adapter"}
    assert not any(name.endswith("_gate") for name, p in model.named_parameters() if p.requires_grad)
    # The encoder's own gates are frozen with it.
    apply(STAGES["image-adapter"], model, LearningRates(adapter=1e-3, gates=1e-2))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {part_of(name) for name in trained} == {"image_adapter"} and any(name.endswith("_gate") for name in trained)


@pytest.mark.parametrize(("stage", "part"), [("image-sft", "image_adapter"), ("video", "video_adapter")])
def test_the_last_blocks_alone_train_and_no_gradient_goes_further_back(stage: str, part: str) -> None:
    model = debug_model()
    rates = LearningRates(adapter=1e-3, gates=1e-2)
    apply(STAGES[stage], model, rates, first_block=7)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(f"{part}.blocks.7.")}
    reached = {}
    for i, layer in enumerate(model.lm.layers):
        layer.register_forward_hook(lambda _, args, out, i=i: reached.update({i: out.requires_grad}))
    clip = torch.randint(256, (3, 3, 29, 31), dtype=torch.uint8)
    content = [{"type": "image", "image": clip[0]}, {"type": "video", "video": clip}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    next_token_loss(model, model.processor.collate([model.processor.encode(messages)])).backward()
    assert reached == {i: i >= 7 for i in range(8)}
    with pytest.raises(ValueError, match=r"every cross-attention block from layer 8 on that .* or there is none"):
        apply(STAGES[stage], model, rates, first_block=8)


def test_frozen_parts_are_in_eval_mode_and_trained_ones_in_train_mode() -> None:
    model = debug_model().train()
    apply(STAGES["image-adapter"], model, RATES)
    assert not any(module.training for module in model.lm.modules())
    assert model.image_adapter is not None and model.image_adapter.projection.training


def test_a_hybrid_encoders_stem_is_a_group_of_its_own() -> None:
    encoder = nn.Module()
    with torch.device("meta"):
        encoder.image_encoder = ImageEncoder(PRESETS["hybrid-s"]())
    groups = apply(STAGES["image-adapter"], encoder, LearningRates(encoder=1e-3, stem=1e-5))
    stem = {id(p) for p in encoder.image_encoder.patch_embed.backbone.parameters()}
    assert stem
    assert stem == {id(p) for group in groups if group["name"] == "stem" for p in group["params"]}


def test_a_stage_in_which_nothing_trains_is_refused() -> None:
    with pytest.raises(ValueError, match="learning rate 0"):
        apply(STAGES["image-sft"], debug_model(), LearningRates(head=1.0))
    with pytest.raises(ValueError, match=r"lr\.gates must not be negative"):
        LearningRates(gates=-1.0)
