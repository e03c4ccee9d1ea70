"""The whole voice: the same waveform however text arrives and work is scheduled, the tail, cancelling, and texts nobody can say."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from speech import acoustic, prosody, vocoder
from speech.normalizer import RULES, LMFeatures, NormalizerConfig
from speech.phone_batch import PhoneBatch, PhoneIds, PhoneStream
from speech.phones import Phonemizer
from speech.prosody import durations
from speech.scheduler import Chunks, Schedule
from speech.spoken_text import SpokenText
from speech.tn_rules import Rule
from speech.voice import Voice, VoiceConfig, VoiceStream

LM = LMFeatures(source="debug", layer=2, dim=11)
TEXT = "Dr. Ng paid $5.30 on 3/4, didn't she? Well: 12 eggs!"
SMALL = Schedule(
    prosody=Chunks(first=1, largest=1), acoustic=Chunks(first=1, largest=1), vocoder=Chunks(first=1, largest=3)
)
WHOLE = Chunks(first=10**9, largest=10**9)
OFFLINE = Schedule(prosody=WHOLE, acoustic=WHOLE, vocoder=WHOLE)
ODD = Schedule(
    prosody=Chunks(first=2, largest=5),
    acoustic=Chunks(first=3, largest=7),
    vocoder=Chunks(first=5, largest=31),
    growth=1.5,
)


def make(lm: LMFeatures | None) -> Voice:
    pytest.importorskip("gruut_lang_en")
    torch.manual_seed(0)
    voice = Voice(
        VoiceConfig(
            normalizer=NormalizerConfig(lm=lm, lm_window=7, dim=26, n_heads=2, char_dim=5, max_chars=6),
            prosody=dataclasses.replace(prosody.PRESETS["debug"](), lm=lm),
            acoustic=acoustic.PRESETS["debug"](),
            vocoder=vocoder.PRESETS["debug"](),
        )
    )
    with torch.no_grad():  # nothing starts at zero, so that what is swapped shows
        for parameter in voice.parts.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return voice


@pytest.fixture(scope="module")
def plain() -> Voice:
    return make(None)


@pytest.fixture(scope="module")
def voice() -> Voice:
    return make(LM)


def tokens_of(text: str) -> list[tuple[str, Tensor]]:
    """A text in tokens of 0 to 6 characters, with random features; the same each time."""
    rng, ends = random.Random(text), [0]
    while ends[-1] < len(text):
        ends.append(min(len(text), ends[-1] + rng.randint(0, 6)))
    features = torch.randn(len(ends) - 1, LM.dim, generator=torch.Generator().manual_seed(1))
    return [(text[start:end], f) for (start, end), f in zip(pairwise(ends), features, strict=True)]


def say(stream: VoiceStream, tokens: Sequence[tuple[str, Tensor | None]], rest: str = "") -> list[Tensor]:
    pieces = [piece for token in tokens for piece in stream.push(*token)]
    return [*pieces, *stream.finish(rest)]


@torch.inference_mode()
def offline(voice: Voice, tokens: Sequence[tuple[str, Tensor | None]], rest: str = "") -> Tensor:
    """Every part once, on all that there is, without scheduler or states."""
    spoken, parts = SpokenText(voice.parts["normalizer"]), []
    for token in tokens:
        parts += spoken.push(*token)
    parts += spoken.finish(rest)
    stream = PhoneStream()
    phones = [*stream.push(Phonemizer()(parts)), *stream.finish()]
    ids = [PhoneIds.of(phone) for phone in phones]
    ids = [i._replace(chunk=min(i.chunk, len(tokens) - 1) if voice.config.lm else 0) for i in ids]
    batch = PhoneBatch.collate([ids])
    features = torch.stack([f.double() for _, f in tokens])[None] if voice.config.lm else None
    prosody_1N3 = voice.parts["prosody"].predict(batch, features)
    frames = voice.parts["acoustic"](batch, prosody_1N3, durations(prosody_1N3[..., 0]))
    waveform_1N = voice.parts["vocoder"](frames.mel_BTM.float(), frames.f0_BT)
    assert waveform_1N.shape[1] == 240 * int(durations(prosody_1N3[..., 0]).sum())
    return waveform_1N[0]


@pytest.mark.parametrize("schedule", [None, SMALL, ODD, OFFLINE], ids=["usual", "smallest", "odd", "offline"])
def test_any_schedule_gives_the_waveform_of_the_parts_run_once(voice: Voice, schedule: Schedule | None) -> None:
    tokens = tokens_of(TEXT)
    pieces = say(voice.stream(schedule=schedule), tokens)
    assert len(pieces) == 1 if schedule is OFFLINE else len(pieces) > 1
    torch.testing.assert_close(torch.cat(pieces), offline(voice, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_any_cut_of_the_text_gives_the_same_waveform(plain: Voice, seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.choices(range(len(TEXT) + 1), k=rng.choice((0, 3, 40))))
    pieces = [(TEXT[a:b], None) for a, b in pairwise([0, *cuts, len(TEXT)])]
    spoken = torch.cat(say(plain.stream(schedule=rng.choice((SMALL, ODD))), pieces))
    torch.testing.assert_close(spoken, offline(plain, [(TEXT, None)]), atol=1e-5, rtol=0)


def test_a_last_token_without_features_is_said_too(voice: Voice) -> None:
    tokens = tokens_of(TEXT)
    rest = tokens[-1][0] + " Yes"
    spoken = torch.cat(say(voice.stream(), tokens[:-1], rest))
    torch.testing.assert_close(spoken, offline(voice, tokens[:-1], rest), atol=1e-5, rtol=0)
    assert len(spoken) > len(torch.cat(say(voice.stream(), tokens[:-1])))


def test_a_cancelled_voice_is_silent(voice: Voice) -> None:
    stream, n = voice.stream(schedule=SMALL), 0
    for token in tokens_of(TEXT):
        for _ in stream.push(*token):
            n += 1
            stream.cancel()
    assert n == 1 and list(stream.finish()) == []


@pytest.fixture(scope="module")
def reader() -> Voice:
    """A voice that reads letters as words and digits as numbers."""
    voice = make(None)
    head = voice.parts["normalizer"].head
    with torch.no_grad():
        head.weight.zero_()
        for bias, rule in enumerate((Rule.JOIN, Rule.DELETE, Rule.PAUSE, Rule.SYMBOL, Rule.CARDINAL, Rule.WORD)):
            head.bias[RULES.index(rule)] = 10 * (bias + 1)
    return voice


@pytest.mark.parametrize(
    ("text", "skipped"),
    [
        ("", []),
        ("a" * 99, []),
        ("9" * 99, []),
        ("\N{GRINNING FACE}\N{GRINNING FACE}", ["\N{GRINNING FACE}\N{GRINNING FACE}"]),
        ("\x00\x07 ok\x1b[31m", ["\x00\x07", "\x1b"]),
        ("мир hello 世界 ok", ["мир", "世界"]),
        ("e\u0301\u200d\u202e", ["\u200d\u202e"]),
    ],
    ids=["empty", "letters", "digits", "emoji", "control", "mixed", "invisible"],
)
def test_any_text_is_said_or_skipped(reader: Voice, text: str, skipped: list[str]) -> None:
    stream = reader.stream()
    pieces = say(stream, [(text[i : i + 7], None) for i in range(0, len(text), 7)])
    assert stream.skipped == skipped
    assert all(piece.isfinite().all() and len(piece) % 240 == 0 for piece in pieces)
    assert bool(pieces) == any(character.isalnum() and character.isascii() for character in text)


def test_audio_comes_a_few_words_after_the_text(reader: Voice) -> None:
    stream, words = reader.stream(), ["one", "two", "three", "four", "five", "six"] * 4
    n_before = [sum(1 for _ in stream.push(word + " ")) for word in words]
    assert sum(n_before[:7]) >= 1 and sum(n_before[7:]) >= 1
    assert list(stream.finish())


def test_features_must_be_those_that_the_voice_reads(plain: Voice, voice: Voice) -> None:
    with pytest.raises(ValueError, match="reads those of debug"):
        list(voice.stream().push("Hi"))
    with pytest.raises(ValueError, match="reads text alone"):
        list(plain.stream().push("Hi", torch.zeros(11)))
    with pytest.raises(ValueError, match="different features"):
        dataclasses.replace(
            voice.config, prosody=dataclasses.replace(voice.config.prosody, lm=dataclasses.replace(LM, layer=3))
        )
    with pytest.raises(ValueError, match="right_context"):
        dataclasses.replace(plain.config, normalizer=NormalizerConfig(right_context=None))
