"""Configurations: what they refuse, and that strict reading from plain data gives them back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lm.config import PRESETS, LlamaConfig, RopeScaling
from mm.config import (
    IMAGE_PRESETS,
    SPEECH_PRESETS,
    VIDEO_PRESETS,
    MultimodalConfig,
    add_part,
    add_speech,
    from_mapping,
    with_parts,
)
from video.adapter import PRESETS as VIDEO_ADAPTERS


def plain(config: Any) -> dict[str, Any]:
    """As it comes out of a JSON file."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("name", IMAGE_PRESETS)
@pytest.mark.parametrize("lm", ["debug", "llama3-8b", "llama3.2-1b"])
def test_json_gives_back_the_same_configuration(lm, name):
    video = None if (lm, name) == ("debug", "paper") else name  # it has too few layers for the paper's placement
    config = with_parts(PRESETS[lm](), image=name, speech=name, video=video, chat="llama3", lm_source="some/where")
    assert from_mapping(MultimodalConfig, plain(config)) == config


def test_the_image_token_is_the_first_row_beside_the_table():
    config = with_parts(PRESETS["debug"](), image="debug", chat="chatml")
    assert (config.media_ids, config.n_new_tokens) == ({"image": 320}, 1)
    assert config.image.adapter.lm_dim == config.lm.dim
    assert config.image.adapter.feature_dim == config.image.encoder.feature_dim


def test_ears_bring_three_rows_which_come_after_what_is_there():
    config = with_parts(PRESETS["debug"](), image="debug", speech="debug", chat="chatml")
    assert (config.media_ids, config.n_new_tokens) == ({"image": 320, "audio": 321}, 4)
    assert (config.speech.start_id, config.speech.end_id) == (322, 323)
    assert config.speech.adapter.lm_dim == config.lm.dim
    assert config.speech.adapter.encoder_dim == config.speech.encoder.dim
    assert config.speech.features.n_mels == config.speech.encoder.n_mels
    assert [config.speech.n_tokens(n) for n in (1, 8, 9, 6000)] == [1, 1, 2, 750]  # 60 s are 750 tokens (8.2.1)
    assert add_speech(with_parts(PRESETS["debug"](), image="debug", chat="chatml"), "debug") == config


def test_a_video_part_brings_one_row_and_looks_through_the_image_part():
    config = with_parts(PRESETS["debug"](), image="debug", speech="debug", video="debug", chat="chatml")
    assert (config.media_ids, config.n_new_tokens) == ({"image": 320, "audio": 321, "video": 324}, 5)
    assert [config.new_token_rows(kind) for kind in ("image", "audio", "video")] == [(0,), (1, 2, 3), (4,)]
    assert config.video.adapter.feature_dim == config.image.encoder.feature_dim
    assert config.video.adapter.aggregator.n_tokens == config.image.encoder.n_tokens
    assert VIDEO_PRESETS.keys() == VIDEO_ADAPTERS.keys() == IMAGE_PRESETS.keys()
    with pytest.raises(ValueError, match="video: a model without an image part cannot look at frames"):
        with_parts(PRESETS["debug"](), video="debug", chat="chatml")
    with pytest.raises(ValueError, match="video: this model has a video part already"):
        add_part(config, "video", "debug")


LM = plain(PRESETS["llama3.2-1b"]())
WHOLE = plain(with_parts(PRESETS["debug"](), image="debug", speech="debug", video="debug", chat="chatml"))


def nested(path: str, value: Any) -> dict[str, Any]:
    """`WHOLE` with one entry changed; `...` removes it."""
    data = json.loads(json.dumps(WHOLE))
    *outer, last = path.split(".")
    place = data
    for key in outer:
        place = place[key]
    place[last] = value
    if value is ...:
        del place[last]
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("imagee", 1, r"^the file: unknown key 'imagee'; did you mean 'image'\?"),
        ("zzzzz", 1, "unknown key 'zzzzz'; known keys are lm, chat, image"),
        ("image.encoder.tile_sise", 28, r"the file.image.encoder: unknown key 'tile_sise'; did you mean 'tile_size'\?"),
        ("chat", ..., "the file: missing chat"),
        ("image.adapter", ..., "the file.image: missing adapter"),
        ("lm", 7, "the file.lm: expected a mapping of LlamaConfig fields, got int"),
        ("lm.dim", "48", "the file.lm.dim: expected int, got '48'"),
        ("lm.dim", True, "the file.lm.dim: expected int, got True"),
        ("lm.dim", None, "the file.lm.dim: expected int, got None"),
        ("lm.norm_eps", "small", "the file.lm.norm_eps: expected a number, got 'small'"),
        ("lm.tie_embeddings", 1, "the file.lm.tie_embeddings: expected bool, got 1"),
        ("image.adapter.layers", 3, "the file.image.adapter.layers: expected a list, got 3"),
        ("image.adapter.layers", [1, "3"], r"the file.image.adapter.layers\[1\]: expected int, got '3'"),
        ("media_ids", [320], "the file.media_ids: expected a mapping"),
        ("media_ids.image", "320", "the file.media_ids.image: expected int"),
        ("media_ids.image", 325, "id 325 of 'image' has no embedding row"),
        ("speech.end_id", 325, "id 325 of 'end_id' has no embedding row"),
        ("video.adapter.aggregator.factr", 4, "aggregator: unknown key 'factr'; did you mean 'factor'"),
        ("video.max_frames", 0, "max_frames must be at least 1, got 0"),
        ("media_ids.video", ..., "media_ids: a model's video part needs the id of its video token"),
        ("image", None, "video: a model without an image part cannot look at frames"),
        ("speech.encoder.stak", 4, "the file.speech.encoder: unknown key 'stak'; did you mean 'stack'"),
        ("media_ids.audio", ..., "media_ids: a model's speech part needs the id of its audio token"),
        ("media_ids", {}, "media_ids: a model's image part needs the id of its image token"),
        ("lm.n_kv_heads", 5, "n_heads 6 must be a multiple of n_kv_heads 5"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(MultimodalConfig, nested(path, value), "the file")


def test_numbers_as_yaml_reads_them():
    config = from_mapping(LlamaConfig, LM | {"norm_eps": "1e-6", "rope_theta": 7})
    assert config.norm_eps == 1e-6 and config.rope_theta == 7.0


def test_nested_and_optional_parts():
    assert from_mapping(LlamaConfig, LM).rope_scaling == RopeScaling(factor=32.0)
    assert from_mapping(LlamaConfig, LM | {"rope_scaling": None}).rope_scaling is None
    assert from_mapping(MultimodalConfig, {"lm": LM, "chat": "llama3"}).image is None


def test_an_unknown_part_names_the_known_ones():
    with pytest.raises(ValueError, match="image preset 'huge' is unknown; choose one of debug, bundled, paper"):
        with_parts(PRESETS["debug"](), image="huge", chat="chatml")
    assert SPEECH_PRESETS.keys() == IMAGE_PRESETS.keys()
    with pytest.raises(ValueError, match="speech preset 'huge' is unknown; choose one of debug, bundled, paper"):
        with_parts(PRESETS["debug"](), speech="huge", chat="chatml")
    with pytest.raises(ValueError, match="video preset 'huge' is unknown; choose one of debug, bundled, paper"):
        with_parts(PRESETS["debug"](), image="debug", video="huge", chat="chatml")
