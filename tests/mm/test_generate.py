"""Calling conventions, batches, streaming and options of `generate` and `stream`, on the debug model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from lm.sampling import SamplingParams
from mm.checkpoint import compose
from mm.generate import Done, TextDelta
from mm.model import MultimodalLlama

#: A random model repeats itself when greedy; sampled answers tell more apart.
SAMPLED = {"max_new_tokens": 13, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def model() -> MultimodalLlama:
    return MultimodalLlama.from_pretrained("debug")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


WIDE, SMALL, TALL = noise(83, 27), noise(19, 23), noise(28, 113)


def chirp(hertz: float, seconds: float) -> np.ndarray:
    """A rising tone at 16 kHz, in 16 bits, as a file holds it."""
    time = np.arange(round(16_000 * seconds)) / 16_000
    return np.round(9000 * np.sin(2 * np.pi * hertz * (1 + time) * time)).astype(np.int16)


MOVING = torch.randint(256, (5, 3, 31, 47), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LOW, HIGH = chirp(170, 0.31), chirp(1900, 0.53)


def turn(*content: Any) -> list[dict[str, Any]]:
    """A user's turn of texts, pictures, clips and recordings at 16 kHz."""

    def part(c: Any) -> dict[str, Any]:
        if isinstance(c, np.ndarray):
            return {"type": "audio", "audio": (c, 16_000)}
        if isinstance(c, torch.Tensor):
            return {"type": "video", "video": c}
        return {"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c}

    return [{"role": "user", "content": [part(c) for c in content]}]


# -------------------------------------------------------------------------------------------------- calling conventions


def test_a_prompt_is_one_user_turn_with_its_pictures_first(model):
    expected = model.generate(messages=turn(WIDE, TALL, "What?"), **SAMPLED)
    assert model.generate("What?", image=[WIDE, TALL], **SAMPLED) == expected
    assert model.generate(messages=turn("What?", WIDE, TALL), **SAMPLED) != expected
    assert model.generate("What?", image=WIDE, **SAMPLED) != expected
    assert model.generate("What?", **SAMPLED) == model.generate(messages=turn("What?"), **SAMPLED) != expected


def test_a_picture_alone_is_a_prompt(model):
    assert model.generate(image=WIDE, **SAMPLED) == model.generate(messages=turn(WIDE), **SAMPLED)


def test_a_picture_may_come_in_any_form(model, tmp_path):
    expected = model.generate("What?", image=WIDE, **SAMPLED)
    WIDE.save(tmp_path / "a.png")
    file = io.BytesIO((tmp_path / "a.png").read_bytes())
    array = np.asarray(WIDE)
    chw = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), file.getvalue(), file, array, chw, chw / 255):
        assert model.generate("What?", image=source, **SAMPLED) == expected


def test_recordings_come_after_pictures_and_before_the_text(model):
    low, high = (LOW, 16_000), (HIGH, 16_000)
    expected = model.generate(messages=turn(WIDE, LOW, HIGH, "What?"), **SAMPLED)
    assert model.generate("What?", image=WIDE, audio=[low, high], **SAMPLED) == expected
    others = [{"audio": [high, low], "image": WIDE}, {"audio": low, "image": WIDE}, {"audio": [low, high]}]
    answers = [expected, *(model.generate("What?", **media, **SAMPLED) for media in others)]
    assert len({tuple(answer.tokens) for answer in answers}) == 4


def test_a_recording_alone_is_a_spoken_question(model):
    assert model.generate(audio=(LOW, 16_000), **SAMPLED) == model.generate(messages=turn(LOW), **SAMPLED)


def test_a_recording_may_come_in_any_form(model, tmp_path):
    expected = model.generate("What?", audio=(LOW, 16_000), **SAMPLED)
    soundfile.write(tmp_path / "a.wav", LOW, 16_000)
    soundfile.write(tmp_path / "a.flac", LOW, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    floats = torch.from_numpy(LOW / np.float32(32768))
    stereo = np.stack([LOW, LOW])
    for source in (tmp_path / "a.wav", str(tmp_path / "a.flac"), data, (floats, 16_000), (stereo, 16_000)):
        assert model.generate("What?", audio=source, **SAMPLED) == expected


def test_clips_come_after_pictures_and_before_recordings(model):
    expected = model.generate(messages=turn(WIDE, MOVING, LOW, "What?"), **SAMPLED)
    media = {"image": WIDE, "audio": (LOW, 16_000)}
    assert model.generate("What?", video=MOVING, **media, **SAMPLED) == expected
    others = [{"video": [MOVING, MOVING.flip(0)]}, {"video": MOVING.flip(0)}, {}]
    answers = [expected, *(model.generate("What?", **media, **other, **SAMPLED) for other in others)]
    assert len({tuple(answer.tokens) for answer in answers}) == 4


def test_a_clip_may_come_in_any_form(model, tmp_path):
    expected = model.generate(video=MOVING, **SAMPLED)
    assert expected == model.generate(messages=turn(MOVING), **SAMPLED)
    for source in (MOVING.numpy(), MOVING / 255, MOVING.movedim(1, -1)):
        assert model.generate(video=source, **SAMPLED) == expected
    frames = [Image.fromarray(frame) for frame in MOVING.movedim(1, -1).numpy()]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    for source in (tmp_path / "a.webp", str(tmp_path / "a.webp"), (tmp_path / "a.webp").read_bytes()):
        assert model.generate(video=source, **SAMPLED) == expected


def test_earlier_turns_are_remembered(model):
    history = [*turn(WIDE, "What?"), {"role": "assistant", "content": "A cat."}]
    answers = [model.generate(messages=[*history[:n], *turn("And?")], **SAMPLED).tokens for n in range(3)]
    assert len({tuple(tokens) for tokens in answers}) == 3


def test_plain_style_continues_without_roles(model):
    plain = model.generate("Once", image=WIDE, style="plain", **SAMPLED)
    assert plain != model.generate("Once", image=WIDE, **SAMPLED)
    with pytest.raises(ValueError, match="style 'poem' is unknown"):
        model.generate("Once", style="poem")


# --------------------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("sampling", [SAMPLED, {"max_new_tokens": 7}], ids=["sampled", "greedy"])
def test_each_row_of_a_batch_equals_the_row_run_alone(model, sampling):
    prompts = ["What is in the picture?", "Hi", "Compare.", "Count to seven, slowly."]
    images = [WIDE, None, [SMALL, TALL], [TALL]]
    sounds = [None, (HIGH, 16_000), None, [(LOW, 16_000), (HIGH, 16_000)]]
    videos = [MOVING, None, MOVING[:2], [MOVING[1:], MOVING[3:]]]
    together = model.generate(prompts, image=images, video=videos, audio=sounds, **sampling)
    rows = zip(prompts, images, videos, sounds, strict=True)
    assert together == [model.generate(p, image=i, video=v, audio=a, **sampling) for p, i, v, a in rows]
    assert len({tuple(answer.tokens) for answer in together}) > 1


def test_a_batch_of_conversations(model):
    conversations = [turn("Hi"), [*turn(TALL, "What?"), {"role": "assistant", "content": "Hm."}, *turn(WIDE, "And?")]]
    together = model.generate(messages=conversations, **SAMPLED)
    assert together == [model.generate(messages=messages, **SAMPLED) for messages in conversations]


def test_rows_end_when_they_end(model):
    """A row that has stopped does not keep the others from going on, nor change them."""
    prompts = ["What?", "How?"]
    first, second = model.generate(prompts, **SAMPLED)
    stop = next(c for c in first.text if c not in second.text)
    stopped, other = model.generate(prompts, stop=stop, **SAMPLED)
    assert stopped.text == first.text[: first.text.index(stop)] and stopped.reason == "stop"
    assert other == second and second.reason == "length"


def test_a_batch_of_one_is_a_list(model):
    assert model.generate(["Hi"], **SAMPLED) == [model.generate("Hi", **SAMPLED)]


# -------------------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize(
    "content", [("Hi",), (WIDE, "What?"), (MOVING,), (LOW,)], ids=["text", "picture", "clip", "speech"]
)
def test_the_pieces_of_a_stream_are_the_answer(model, content):
    expected = model.generate(messages=turn(*content), **SAMPLED)
    *deltas, done = model.stream(turn(*content), **SAMPLED)
    assert done == Done(expected)
    assert all(isinstance(delta, TextDelta) and delta.text for delta in deltas)
    assert "".join(delta.text for delta in deltas) == expected.text
    assert len(deltas) > 1


def test_a_stream_takes_a_prompt_and_a_picture(model):
    assert list(model.stream("What?", image=WIDE, **SAMPLED)) == list(model.stream(turn(WIDE, "What?"), **SAMPLED))


def test_a_stream_makes_a_token_at_a_time(model):
    n_runs = 0

    def count(*_: Any) -> None:
        nonlocal n_runs
        n_runs += 1

    hook = model.lm.norm.register_forward_hook(count)
    try:
        next(model.stream("Hi", max_new_tokens=100, temperature=1.0, seed=0))
    finally:
        hook.remove()
    assert n_runs < 20  # a few bytes may be held back until they are a character


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str)
def test_filters_that_leave_one_token_are_greedy(model, option):
    greedy = model.generate("What?", image=WIDE, max_new_tokens=13)
    assert model.generate("What?", image=WIDE, **(SAMPLED | option)) == greedy
    assert model.generate("What?", image=WIDE, **SAMPLED) != greedy


def test_seeds_repeat(model):
    assert model.generate("Hi", **SAMPLED) == model.generate("Hi", **SAMPLED)
    assert model.generate("Hi", **SAMPLED) != model.generate("Hi", **(SAMPLED | {"seed": 6}))
    fresh = [model.generate("Hi", **(SAMPLED | {"seed": None})).tokens for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_repetition_penalty_reaches_prompt_and_answer(model):
    prompt = "What?"
    repeated = model.generate(prompt, max_new_tokens=13).tokens
    tokens = model.generate(prompt, max_new_tokens=13, repetition_penalty=1e9).tokens
    asked = model.processor.encode(turn(prompt), add_generation_prompt=True).ids
    assert len(set(tokens)) == 13 > len(set(repeated))
    assert not set(tokens) & set(asked)


def test_an_answer_ends_at_a_stop_string(model):
    whole = model.generate("Hi", **SAMPLED)
    assert len(whole.tokens) == 13 and whole.reason == "length"
    stop = whole.text[3:5]
    cut = model.generate("Hi", stop=["never said", stop], **SAMPLED)
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.reason == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.tokens) < 13
    assert "".join(e.text for e in model.stream("Hi", stop=stop, **SAMPLED) if isinstance(e, TextDelta)) == cut.text


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either a prompt or messages"),
        ({"prompt": "Hi", "messages": turn("Hi")}, "give either a prompt or messages"),
        ({"messages": turn("Hi"), "image": WIDE}, "put the text and the media into their content"),
        ({"messages": []}, "messages: there are none"),
        ({"prompt": []}, "prompt: the batch is empty"),
        ({"prompt": ["a", "b"], "image": WIDE}, "image: a batch of 2 prompts needs a list"),
        ({"prompt": ["a", "b"], "image": [WIDE]}, "image: a batch of 2 prompts needs a list"),
        ({"prompt": "Hi", "temprature": 1}, "unknown option 'temprature'; sampling options are max_new_tokens"),
        ({"prompt": "Hi", "temperature": -1}, "temperature must be 0"),
        ({"prompt": "Hi", "video": "nowhere.mp4"}, "video: there is no file 'nowhere.mp4'"),
        ({"video": b"noise"}, "video: "),
        ({"prompt": ["a", "b"], "video": "a.mp4"}, "video: a batch of 2 prompts needs a list"),
        ({"prompt": ["a", "b"], "audio": "a.wav"}, "audio: a batch of 2 prompts needs a list"),
        ({"audio": "nowhere.wav"}, "audio: there is no file 'nowhere.wav'"),
        ({"audio": b"noise"}, "audio: the given data is no audio"),
        ({"audio": (np.zeros(7, np.float32), 16_000)}, r"audio: the waveform is only 0.000 s long"),
        ({"audio": (np.full(3200, np.nan, np.float32), 16_000)}, "audio: the waveform has NaN"),
        ({"audio": 7}, "audio: cannot read a int"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "role 'king' is not one of"),
    ],
)
def test_what_cannot_be_answered_is_explained(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_the_context_may_be_filled_but_not_exceeded(model):
    n_prompt = len(model.processor.encode(turn(WIDE, ""), add_generation_prompt=True).ids)
    prompt = "x" * (512 - n_prompt - 4)
    assert len(model.generate(prompt, image=WIDE, max_new_tokens=5).tokens) == 5  # the last one is not fed
    with pytest.raises(
        ValueError, match="a prompt of 508 tokens and 6 new ones exceed this model's max_seq_len of 512"
    ):
        model.generate(prompt, image=WIDE, max_new_tokens=6)


def test_a_stream_is_of_one_conversation(model):
    with pytest.raises(ValueError, match="takes one prompt or conversation"):
        list(model.stream([turn("a"), turn("b")]))


def test_a_text_model_refuses_pictures(model):
    text_only = compose("debug")
    assert len(text_only.generate("Hi", **SAMPLED).tokens) == SAMPLED["max_new_tokens"]
    with pytest.raises(ValueError, match="this model takes no image; it takes text only"):
        text_only.generate("What?", image=WIDE)
    with pytest.raises(ValueError, match="this model takes no video; it takes text only"):
        text_only.generate("What?", video=MOVING)
    with pytest.raises(ValueError, match="video: this model has no video part"):
        text_only.encode_clips(model.processor.collate([model.processor.encode(turn(MOVING))]))
    with pytest.raises(ValueError, match="this model takes no audio; it takes text only"):
        text_only.generate("What?", audio=(LOW, 16_000))
    with pytest.raises(ValueError, match="image: this model has no image part"):
        text_only.encode_media(model.processor.collate([model.processor.encode(turn(WIDE))]))


def test_a_model_without_tokenizer_says_so(model):
    without = MultimodalLlama(model.config, None, lm=model.lm)
    with pytest.raises(ValueError, match=r"no tokenizer; put its tokenizer.json"):
        without.generate("Hi")


def test_every_sampling_option_is_taken(model):
    options = {
        "max_new_tokens": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1,
        "seed": 1, "stop": ["x"],
    }  # fmt: skip
    assert options.keys() == vars(SamplingParams()).keys()
    assert model.generate("Hi", **options).tokens
