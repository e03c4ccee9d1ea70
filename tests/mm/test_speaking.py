"""Speaking while the language model decodes: its text stays, audio is the same by any road, a voice travels with its model."""

from __future__ import annotations

import dataclasses
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from typer.testing import CliRunner

from lm.features import empty_prompt, text_ends, text_features
from mm.cli import app
from mm.generate import AudioDelta, Done, TextDelta
from mm.model import MultimodalLlama
from mm.speaking import Speaker, voice_of
from mm.voice import PARTS, assemble_voice, load_part, load_voice, save_part, save_voice
from speech.normalizer import LMFeatures, NormalizerConfig
from speech.voice import Voice, VoiceStream

SAMPLED = {"max_new_tokens": 19, "temperature": 1.0, "seed": 5}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (27, 43, 3), dtype=np.uint8))
NOISE = (np.random.default_rng(1).normal(0, 3000, 6000).astype(np.int16), 16_000)


@pytest.fixture(scope="module")
def model() -> MultimodalLlama:
    pytest.importorskip("gruut_lang_en")
    return MultimodalLlama.from_pretrained("debug")


def audio_of(events: list[Any]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(e.audio for e in events if isinstance(e, AudioDelta))])


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) < 1e-4)


@pytest.mark.parametrize(
    "asked",
    [{"prompt": "Hi"}, {"prompt": "What?", "image": PICTURE}, {"audio": NOISE}, {"prompt": "Hi", "stop": "\x1a"}],
    ids=["text", "picture", "spoken question", "stop string"],
)
def test_the_text_is_the_same_with_and_without_speaking(model: MultimodalLlama, asked: dict[str, Any]) -> None:
    silent, spoken = (model.generate(**asked, **SAMPLED, speak=speak) for speak in (False, True))
    assert (silent.text, silent.tokens, silent.reason) == (spoken.text, spoken.tokens, spoken.reason)
    assert silent.audio is None and silent.sample_rate is None and silent.skipped == ()
    assert spoken.audio.dtype == np.float32 and len(spoken.audio) and spoken.sample_rate == 24_000
    *events, done = model.stream(**asked, **SAMPLED, speak=True)
    assert isinstance(done, Done) and done.generation == spoken
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == silent.text
    assert close(audio_of(events), spoken.audio) and close(done.generation.audio, spoken.audio)


def test_greedy_answers_of_many_tokens_are_bit_identical(model: MultimodalLlama) -> None:
    silent, spoken = (model.generate("Tell me all.", max_new_tokens=60, speak=speak) for speak in (False, True))
    assert silent.tokens == spoken.tokens


def test_rows_of_a_batch_sound_as_if_alone(model: MultimodalLlama) -> None:
    prompts = ["Hi", "What is in the picture, then?", "x"]
    together = model.generate(prompts, image=[None, PICTURE, None], **SAMPLED, speak=True)
    for prompt, image, row in zip(prompts, [None, PICTURE, None], together, strict=True):
        alone = model.generate(prompt, image=image, **SAMPLED, speak=True)
        assert row == alone and close(row.audio, alone.audio)


def test_the_language_model_runs_no_more_than_without(model: MultimodalLlama) -> None:
    shapes: list[Any] = []
    hook = model.lm.norm.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    try:
        model.generate("Hi", **SAMPLED)
        silent = shapes.copy()
        shapes.clear()
        model.generate("Hi", **SAMPLED, speak=True)
    finally:
        hook.remove()
    assert shapes == silent


def test_a_stream_that_is_closed_stops_its_voice(model: MultimodalLlama) -> None:
    events = model.stream("Hi", max_new_tokens=200, temperature=1.0, seed=0, speak=True)
    for event in events:
        if isinstance(event, AudioDelta):
            break
    assert "voice" in [thread.name for thread in threading.enumerate()]
    events.close()
    assert "voice" not in [thread.name for thread in threading.enumerate()]


def test_the_language_model_waits_while_the_voice_is_short_of_audio(
    model: MultimodalLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no end of audio wanted, what can be said of a text is said before the next text; by the clock it is chance."""
    monkeypatch.setattr("mm.speaking.AHEAD", float("inf"))
    events = [
        list(model.stream("Tell me all.", max_new_tokens=200, temperature=1.0, seed=5, speak=True)) for _ in range(2)
    ]
    kinds = [[type(event) for event in row] for row in events]
    assert kinds[0] == kinds[1] and kinds[0].index(AudioDelta) < max(
        i for i, k in enumerate(kinds[0]) if k is TextDelta
    )
    assert close(*(audio_of(row) for row in events))


def test_an_error_of_the_voice_reaches_the_caller(model: MultimodalLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("hoarse")

    monkeypatch.setattr(VoiceStream, "_sound", fail)
    with pytest.raises(RuntimeError, match="hoarse"):
        model.generate("Hi", **SAMPLED, speak=True)
    with pytest.raises(RuntimeError, match="hoarse"):
        list(model.stream("Hi", **SAMPLED, speak=True))


def test_a_text_is_spoken_with_the_features_that_it_would_be_written_with(
    model: MultimodalLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an answer to an empty prompt, whatever pieces its features are computed in."""
    text = "Well, 12 zorblax eggs are 3/4 of $5.30!"
    tokenizer, stream = model.processor.chat.tokenizer, voice_of(model).stream()
    ids, lm = tokenizer.encode(text), stream.voice.config.lm
    assert lm is not None
    (features_SF,) = text_features(model.lm, empty_prompt(model.processor.chat), [ids], lm.layer)
    ends = text_ends(tokenizer, ids)
    pieces = [text[a:b] for a, b in pairwise([0, *ends])]
    waveforms = [w for piece, f in zip(pieces, features_SF, strict=True) for w in stream.push(piece, f)]
    expected = torch.cat([*waveforms, *stream.finish()]).numpy()
    for piece in (1, 7, 1000):
        monkeypatch.setattr("mm.speaking.PIECE", piece)
        assert close(model.speak(text).audio, expected)
    monkeypatch.setattr("mm.speaking.CONTEXT", 11)  # a text longer than the language model remembers
    assert len(model.speak(text).audio)


@pytest.mark.parametrize("text", ["", "\N{GRINNING FACE}", "\x00\x1b", "\ud800 hi", "мир 世界 hello", "\ufffd", "\n"])
def test_no_text_is_too_odd_to_speak(model: MultimodalLlama, text: str) -> None:
    speech = model.speak(text)
    assert np.isfinite(speech.audio).all() and (text or len(speech.audio) == 0)


# -- the voice on disk -------------------------------------------------------------------------------------------------


def test_a_voice_travels_with_its_model(model: MultimodalLlama, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "voice").iterdir()) == ["config.json", "voice.safetensors"]
    again = MultimodalLlama.from_pretrained(tmp_path)
    assert close(again.speak("Hello, 5 cats!").audio, model.speak("Hello, 5 cats!").audio)
    (tmp_path / "voice" / "voice.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no voice.safetensors"):
        MultimodalLlama.from_pretrained(tmp_path)


def test_a_voice_is_put_together_from_its_stages(model: MultimodalLlama, tmp_path: Path) -> None:
    voice = model.voice
    assert voice is not None
    for part in PARTS:
        save_part(voice.parts[part], tmp_path / part, part)
    options = [text for part in PARTS for text in (f"--{part}", str(tmp_path / part))]
    result = CliRunner().invoke(app, ["voice", *options, "--out", str(tmp_path / "voice"), "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    expected = assemble_voice({part: tmp_path / part for part in PARTS})
    for name, tensor in load_voice(tmp_path / "voice").parts.state_dict().items():
        whole = expected.parts.state_dict()[name]
        assert tensor.dtype == whole.dtype and torch.equal(tensor, whole.bfloat16().to(whole.dtype))
        assert torch.equal(whole, voice.parts.state_dict()[name])
    with pytest.raises(ValueError, match="no export of stage tts-vocoder"):
        load_part(tmp_path / "prosody", "vocoder")


def test_a_model_without_a_voice_or_with_another_models_says_so(model: MultimodalLlama) -> None:
    other = MultimodalLlama.from_pretrained("debug")
    other.voice = None
    calls = (
        lambda: other.speak("Hi"),
        lambda: other.generate("Hi", speak=True),
        lambda: next(other.stream("Hi", speak=True)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="this model has no voice; put one into the folder `voice`"):
            call()
    assert model.voice is not None
    config = model.voice.config
    lm = LMFeatures(source="else", layer=2, dim=7)
    normalizer = NormalizerConfig(lm=lm, lm_window=7, dim=12, n_heads=2, char_dim=5, max_chars=6)
    other.voice = Voice(
        dataclasses.replace(config, normalizer=normalizer, prosody=dataclasses.replace(config.prosody, lm=lm))
    )
    with pytest.raises(ValueError, match="reads layer 2 of else, 7 wide"):
        Speaker(other, 1)


def test_training_neither_sees_nor_casts_the_voice(model: MultimodalLlama) -> None:
    assert not any("voice" in name for name in model.state_dict())
    bf16 = MultimodalLlama.from_pretrained("debug", dtype=torch.bfloat16)
    assert bf16.voice is not None
    assert {p.dtype for p in bf16.voice.parts.parameters()} == {torch.float32, torch.float64}
    assert len(bf16.generate("Hi", **SAMPLED, speak=True).audio)


# -- the command line --------------------------------------------------------------------------------------------------


def run(*args: str, **kwargs: Any) -> Any:
    result = CliRunner().invoke(app, args, **kwargs)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


def test_commands_write_wav_files(model: MultimodalLlama, tmp_path: Path) -> None:
    out, text = tmp_path / "out.wav", "Hello \N{GRINNING FACE} there."
    result = run("speak", text, "-o", str(out), "--model", "debug")
    expected = model.speak(text)
    assert f"wrote {out}" in result.stderr and all(repr(part) in result.stderr for part in expected.skipped)
    assert_wav(out, expected.audio)
    options = ("--model", "debug", "--max-new-tokens", "9")
    result = run("generate", "Hi", *options, "--speak", str(out))
    answer = model.generate("Hi", max_new_tokens=9, speak=True)
    assert result.stdout == answer.text + "\n"
    assert_wav(out, answer.audio)
    run("chat", *options, "--speak", str(tmp_path / "chat"), input="Hi\nAnd?\n/quit")
    assert_wav(tmp_path / "chat" / "answer-1.wav", answer.audio)
    assert (tmp_path / "chat" / "answer-2.wav").is_file()
    save_voice(voice_of(model), tmp_path / "voice")
    run("speak", text, "-o", str(out), "--model", "debug", "--voice", str(tmp_path / "voice"))
    assert_wav(out, expected.audio)


def assert_wav(path: Path, audio: np.ndarray) -> None:
    read, rate = soundfile.read(path, dtype="float32")
    assert rate == 24_000 and read.shape == audio.shape
    assert np.abs(read - audio.clip(-1, 1)).max(initial=0) < 1e-4


@pytest.mark.parametrize("path", ["out.mp3", "nowhere/out.wav"])
def test_audio_goes_into_wav_files_of_folders_that_exist(path: str) -> None:
    for command in (["speak", "Hi", "-o", path], ["generate", "Hi", "--speak", path]):
        result = CliRunner().invoke(app, [*command, "--model", "debug"])
        assert result.exit_code == 2 and "must be a .wav file" in result.stderr
