"""The whole model: its language model stays untouched, can be swapped, and is exactly SmolLM2 where that is inside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lm.chat import ChatMLFormat
from lm.checkpoint import export_huggingface
from lm.config import PRESETS, LlamaConfig
from lm.generate import generate_text
from lm.model import Llama
from lm.sampling import SamplingParams
from mm.checkpoint import compose, debug_model
from mm.model import MultimodalLlama

PICTURE = np.random.default_rng(0).integers(0, 256, (61, 131, 3), dtype=np.uint8)


def sample_of(model: MultimodalLlama, *content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return model.processor.encode([{"role": "user", "content": parts}], add_generation_prompt=True)


# ---------------------------------------------------------------------------------------------------- composition


def test_the_language_models_keys_are_its_own():
    model = debug_model()
    assert model.lm.state_dict().keys() == Llama(PRESETS["debug"]()).state_dict().keys()


def test_a_new_image_part_changes_nothing_until_it_is_trained():
    """Its gates are zero, so even with a picture the answer is the one without its sight."""
    model = compose("debug", "debug").eval()
    with torch.no_grad():
        model.new_tokens.weight.normal_()
    batch = model.processor.collate([sample_of(model, PICTURE, "What?")])
    with torch.no_grad():
        assert torch.equal(model(batch), model.lm.logits(model.decode(batch.ids_BT)))


def test_trainable_parameters_are_those_that_require_gradients():
    model = debug_model().requires_grad_(False)
    assert not list(model.trainable_parameters())
    model.image_adapter.projection.bias.requires_grad_(True)
    (only,) = model.trainable_parameters()
    assert only[0] == "image_adapter.projection.bias" and only[1] is model.image_adapter.projection.bias


def test_other_tile_sizes_are_taken_up_by_the_processor():
    model = debug_model().eval()
    model.resize_tiles(56)
    assert model.config.image.encoder.tile_size == 56
    assert sample_of(model, PICTURE).tiles[0].pixels_NCHW.shape[-2:] == (56, 56)
    assert len(model.generate("What?", image=PICTURE, max_new_tokens=3).tokens) == 3
    with pytest.raises(ValueError, match="tile_size: this model has no image encoder"):
        compose("debug").resize_tiles(56)


def test_frames_take_up_other_tile_sizes_counts_and_factors():
    model = debug_model().eval()
    clip = torch.randint(256, (11, 3, 29, 83), dtype=torch.uint8)
    model.resize_tiles(56)
    model.change_frames(max_frames=9, factor=2)
    assert model.config.video.adapter == model.video_adapter.config
    content = [{"role": "user", "content": [{"type": "video", "video": clip}]}]
    (frames,) = model.processor.encode(content).clips
    assert len(frames) == 9 and frames[0].pixels_NCHW.shape[-2:] == (56, 56)
    batch = model.processor.collate([model.processor.encode(content)])
    n_tokens = model.encode_clips(batch).start_BM.shape[1]
    assert n_tokens == 5 * frames[0].pixels_NCHW.shape[0] * (4 * 4 + 1)  # 9 frames, 2 to a group
    assert len(model.generate("What?", video=clip, max_new_tokens=3).tokens) == 3
    model.change_frames(factor=9)
    assert model.config.video.max_frames == 9 and model.encode_clips(batch).start_BM.shape[1] * 5 == n_tokens
    with pytest.raises(ValueError, match="max_frames, factor: this model has no video part"):
        compose("debug", image="debug").change_frames(7)


# ------------------------------------------------------------------------------------------------------------- swaps


@torch.no_grad()
def test_swapping_the_language_model_leaves_the_adapters(tmp_path):
    model = debug_model().requires_grad_(False)
    other = Llama(PRESETS["debug"]()).init_weights(seed=7)
    export_huggingface(other, tmp_path)
    beside = {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.startswith("lm.")}
    model.swap_lm(tmp_path)
    batch = model.processor.collate([sample_of(model, "Hello.")])
    assert torch.equal(model(batch), other(batch.ids_BT))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in beside.items())
    assert not list(model.trainable_parameters())  # what was frozen stays frozen


def test_a_swapped_language_model_is_the_one_that_is_saved(tmp_path):
    """Also when the old one was known by its name alone."""
    other = Llama(PRESETS["debug"]()).init_weights(seed=7)
    export_huggingface(other, tmp_path / "other")
    model = debug_model()
    model.config = replace(model.config, lm_source="smollm2-135m-instruct")
    model.swap_lm(tmp_path / "other")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["lm_source"] is None
    again = MultimodalLlama.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(again.lm.state_dict()[key], tensor) for key, tensor in other.state_dict().items())


@torch.no_grad()
def test_swapping_the_image_part_leaves_the_rest_and_takes_its_token(tmp_path):
    model, other = debug_model(seed=0), debug_model(seed=1)
    other.resize_tiles(42)
    other.save_pretrained(tmp_path / "other")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.swap_image(tmp_path / "other")
    assert model.config.image == other.config.image and model.config.video.adapter.aggregator.n_tokens == 10
    theirs = other.state_dict()
    for key, tensor in model.state_dict().items():
        if key == "new_tokens.weight":
            assert torch.equal(tensor, torch.cat([theirs[key][:1], before[key][1:]]))
        elif key != "video_adapter.aggregator.latents":  # which are interpolated
            assert torch.equal(tensor, (theirs if key.startswith("image_") else before)[key]), key
    assert model.generate("What?", image=PICTURE, video=PICTURE[None], max_new_tokens=3).tokens
    compose("debug").save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match=r"swap_image: .* has another image part than this model"):
        model.swap_image(tmp_path / "blind")


def test_a_language_model_of_another_shape_is_refused(tmp_path):
    config = LlamaConfig(vocab_size=320, dim=48, n_layers=7, n_heads=6, n_kv_heads=2, ffn_dim=80)
    export_huggingface(Llama(config), tmp_path)
    model = debug_model()
    lm, described = model.lm, model.config
    with pytest.raises(ValueError, match=r"swap_lm: .* has another shape than this model's language model:\n.*=7"):
        model.swap_lm(tmp_path)
    assert model.lm is lm and model.config == described


# -------------------------------------------------------------------------------------------------------------- SmolLM2

NAME = "smollm2-135m-instruct"
QUESTIONS = ("What is the capital of France?", "Name three colours of the rainbow, please.")


@pytest.fixture(scope="module")
def text_model(smollm2_gguf: Path) -> MultimodalLlama:
    return MultimodalLlama.from_pretrained(smollm2_gguf)


@pytest.fixture(scope="module")
def bare(text_model) -> Llama:
    """SmolLM2 as its GGUF file has it, called without anything of `mm`."""
    return text_model.lm


@pytest.fixture(scope="module")
def seeing() -> MultimodalLlama:
    """The bundled model's shape on SmolLM2, with every gate open."""
    model = compose(NAME, "bundled").eval()
    with torch.no_grad():
        gates = [p for name, p in model.named_parameters() if "gate" in name.rsplit(".", 1)[-1]]
        for gate in gates:
            gate.fill_(0.7)
    assert len(gates) == 3 + 2 * 2 + 7 * 2  # position tables, gated blocks, cross-attention blocks
    return model


@torch.no_grad()
def test_text_is_bit_identical_to_smollm2(bare, seeing):
    batch = seeing.processor.collate([sample_of(seeing, question) for question in QUESTIONS], pad_side="left")
    assert not batch.valid_BT.all()
    assert torch.equal(seeing(batch), bare(batch.ids_BT, valid_BS=batch.valid_BS))


@torch.no_grad()
def test_a_picture_reaches_smollm2_once_the_gates_are_open(seeing):
    batch = seeing.processor.collate([sample_of(seeing, PICTURE, "What?")])
    unseen = seeing.lm.logits(seeing.decode(batch.ids_BT))
    assert (seeing(batch) - unseen)[:, -1].abs().max() > 1e-2


def test_greedy_text_equals_smollm2s(bare, seeing):
    params = SamplingParams(max_new_tokens=7)
    chat = ChatMLFormat(seeing.tokenizer, {})
    ids = [chat.encode([{"role": "user", "content": q}], add_generation_prompt=True).ids for q in QUESTIONS]
    expected = generate_text(bare, seeing.tokenizer, ids, params, chat.stop_ids)
    answers = seeing.generate(list(QUESTIONS), max_new_tokens=7)
    assert [a.tokens for a in answers] == [e.ids for e in expected]
    assert [a.text for a in answers] == [e.text for e in expected]


@torch.no_grad()
def test_a_registered_language_model_is_saved_by_its_name(bare, seeing, tmp_path):
    seeing.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters.safetensors", "config.json"]
    again = MultimodalLlama.from_pretrained(tmp_path)
    assert again.config == seeing.config and again.config.lm_source == NAME
    for key, tensor in again.state_dict().items():
        expected = bare.state_dict()[key[3:]] if key.startswith("lm.") else seeing.state_dict()[key]
        assert torch.equal(tensor, expected), key
    assert again.tokenizer.special_tokens == seeing.tokenizer.special_tokens


def test_a_gguf_file_is_a_text_model(text_model):
    assert text_model.image_encoder is None and text_model.image_adapter is None and text_model.new_tokens is None
    assert text_model.config.chat == "chatml" and text_model.config.lm == PRESETS["smollm2-135m"]()
    assert "Paris" in text_model.generate(QUESTIONS[0], max_new_tokens=9).text
