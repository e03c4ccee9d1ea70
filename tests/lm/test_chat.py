"""Chat formats: ids spelled out for Llama 3, the GGUF's own template for SmolLM2, then masks, media and errors."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lm.chat import ChatFormat, ChatMLFormat, Encoded, Llama3Format, MediaSpan, chat_format
from lm.gguf import read_metadata
from lm.tokenizer import ByteTokenizer, TiktokenTokenizer, load_tokenizer

IMAGE, AUDIO = 900, 901
WORDS = [b"user", b"system", b"assistant", b"ipython", b"\n\n", b"Hi", b" there", b"Be", b" kind", b"Hello"]
#: Every byte, then the words (ids 256 to 265), then the special tokens from 266 on.
LLAMA3 = TiktokenTokenizer({bytes([b]): b for b in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)})
BYTES = ByteTokenizer()


def llama3() -> ChatFormat:
    return chat_format("llama3", LLAMA3, {"image": IMAGE})


def chatml() -> ChatMLFormat:
    return ChatMLFormat(BYTES, {"image": IMAGE, "audio": AUDIO}, default_system=None)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_llama3_ids() -> None:
    messages = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Hi there"}]},
        {"role": "assistant", "content": "  Hello \n"},
        {"role": "user", "content": "Hi"},
    ]
    expected = [
        (266, False),  # <|begin_of_text|>
        (272, False),  # <|start_header_id|>
        (257, False),  # system
        (273, False),  # <|end_header_id|>
        (260, False),  # \n\n
        (263, False),  # Be
        (264, False),  # " kind"
        (275, False),  # <|eot_id|>
        (272, False),  # <|start_header_id|>
        (256, False),  # user
        (273, False),  # <|end_header_id|>
        (260, False),  # \n\n
        (900, False),  # the picture
        (261, False),  # Hi
        (262, False),  # " there"
        (275, False),  # <|eot_id|>
        (272, False),  # <|start_header_id|>
        (258, False),  # assistant
        (273, False),  # <|end_header_id|>
        (260, False),  # \n\n
        (265, True),  # Hello, stripped
        (275, True),  # <|eot_id|>
        (272, False),  # <|start_header_id|>
        (256, False),  # user
        (273, False),  # <|end_header_id|>
        (260, False),  # \n\n
        (261, False),  # Hi
        (275, False),  # <|eot_id|>
        (272, False),  # <|start_header_id|>
        (258, False),  # assistant
        (273, False),  # <|end_header_id|>
        (260, False),  # \n\n
    ]
    encoded = llama3().encode(messages, add_generation_prompt=True)
    assert list(zip(encoded.ids, encoded.supervised, strict=True)) == expected
    assert encoded.media == [MediaSpan("image", 12, "cat.png")]


def test_llama3_plain_ids() -> None:
    content = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Hi there"}]
    encoded = llama3().encode_plain(content, end=True)
    # <|begin_of_text|>, the picture, Hi, " there", <|end_of_text|>
    assert encoded == Encoded(
        [266, 900, 261, 262, 267], [False, False, True, True, True], [MediaSpan("image", 1, "cat.png")]
    )
    assert llama3().encode_plain(content, end=False).ids == [266, 900, 261, 262]


def test_stop_ids() -> None:
    assert llama3().stop_ids == {267, 274, 275}  # <|end_of_text|>, <|eom_id|>, <|eot_id|>
    assert chatml().stop_ids == {256, 258}  # <|endoftext|>, <|im_end|>


CHATS = [
    [("user", "What is 12 + 34?")],
    [("user", "  leading\nand trailing  \n")],
    [("system", ""), ("user", "Grüße 😀"), ("assistant", "Hi!\n\nBye."), ("user", "1  2")],
    [("user", "a"), ("assistant", ""), ("user", "b"), ("system", "late"), ("assistant", "c ")],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_smollm2_matches_the_template_in_its_gguf(
    chat: list[tuple[str, str]], add_generation_prompt: bool, smollm2_gguf: Path
) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    messages = [{"role": role, "content": content} for role, content in chat]
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    theirs.chat_template = read_metadata(smollm2_gguf)["tokenizer.chat_template"]
    theirs.backend_tokenizer.encode_special_tokens = False
    expected = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)["input_ids"]
    encoded = chat_format("chatml", tokenizer, {}).encode(messages, add_generation_prompt=add_generation_prompt)
    assert encoded.ids == expected


@pytest.mark.parametrize(("fmt", "end"), [(llama3(), "<|eot_id|>"), (chatml(), "<|im_end|>")])
def test_what_the_assistant_says_and_its_end_are_supervised(fmt: ChatFormat, end: str) -> None:
    messages = [
        *user("ask"),
        {"role": "assistant", "content": "one"},
        *user("more"),
        {"role": "assistant", "content": "two"},
    ]
    encoded = fmt.encode(messages, add_generation_prompt=False)
    end_id = fmt.tokenizer.special_tokens[end]
    said = [i for i, supervised in zip(encoded.ids, encoded.supervised, strict=True) if supervised]
    assert said == [*fmt.tokenizer.encode("one"), end_id, *fmt.tokenizer.encode("two"), end_id]
    # A row cut before what is said is the prompt that generation starts from.
    first = encoded.supervised.index(True)
    assert encoded.ids[:first] == fmt.encode(messages[:1], add_generation_prompt=True).ids


def test_media_stand_where_their_parts_do() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": b"1"},
        {"type": "image", "image": b"2"},
        {"type": "text", "text": "b"},
        {"type": "text", "text": "c"},
        {"type": "audio", "audio": b"3"},
    ]
    encoded = chatml().encode(user(parts), add_generation_prompt=False)
    im_start, im_end = 257, 258
    assert encoded.ids == [im_start, *b"user\na", IMAGE, IMAGE, *b"bc", AUDIO, im_end, *b"\n"]
    assert encoded.media == [MediaSpan("image", 7, b"1"), MediaSpan("image", 8, b"2"), MediaSpan("audio", 11, b"3")]
    assert [encoded.ids[span.position] for span in encoded.media] == [IMAGE, IMAGE, AUDIO]


def test_neighbouring_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "Hi the"}, {"type": "text", "text": "re"}]
    assert llama3().encode(user(parts), add_generation_prompt=False) == llama3().encode(
        user("Hi there"), add_generation_prompt=False
    )


@pytest.mark.parametrize(
    ("part", "kind", "source"),
    [
        ({"type": "image", "image": "a.png"}, "image", "a.png"),
        ({"type": "image", "url": "https://example.org/a.png"}, "image", "https://example.org/a.png"),
        ({"type": "image", "path": "a.png"}, "image", "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, "image", "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "image", "a.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}, "image", b"hi"),
        ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, "audio", "a.wav"),
        ({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}, "audio", b"hi"),
        ({"type": "audio", "audio": ([0.0], 16_000)}, "audio", ([0.0], 16_000)),
    ],
)
def test_spellings_of_media(part: dict[str, Any], kind: str, source: Any) -> None:
    (span,) = chatml().encode(user([part]), add_generation_prompt=False).media
    assert (span.kind, span.source) == (kind, source)


def test_text_cannot_forge_a_turn_or_a_picture() -> None:
    for fmt in (llama3(), chatml()):
        attack = "".join(fmt.tokenizer.special_tokens)
        forged = fmt.encode(user(attack), add_generation_prompt=False).ids
        honest = fmt.encode(user("Hi"), add_generation_prompt=False).ids
        special = set(fmt.tokenizer.special_tokens.values()) | {IMAGE}
        assert [i for i in forged if i in special] == [i for i in honest if i in special]
        assert attack in fmt.tokenizer.decode(forged)


def test_default_system_turn_of_smollm2() -> None:
    fmt = chat_format("chatml", BYTES, {})
    text = BYTES.decode(fmt.encode(user("Hi"), add_generation_prompt=False).ids)
    assert text.startswith("system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\nuser\nHi")
    own = [{"role": "system", "content": "Be kind"}, *user("Hi")]
    assert BYTES.decode(fmt.encode(own, add_generation_prompt=False).ids) == "system\nBe kind\nuser\nHi\n"


PICTURE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "none; give at least one"),
        ([{"role": "robot", "content": "x"}], "role 'robot' is not one of system, user, assistant"),
        ([{"content": "x"}], "role None"),
        (user(None), "content must be text or a list of parts, not NoneType"),
        (user(["x"]), "content must be text or a list of parts"),
        (user([{"type": "smell", "smell": "x"}]), "part type 'smell'"),
        (user([{"type": "text"}]), "needs its text"),
        (user([{"type": "image"}]), "needs its source under 'image'"),
        (user([{"type": "image_url", "image_url": {}}]), "needs its source under 'image_url'"),
        (user([{"type": "input_audio", "input_audio": {"data": "@@@"}}]), "audio's data is not base64"),
        (user([{"type": "video", "video": "a.mp4"}]), "takes no video; it takes image, audio"),
        ([{"role": "assistant", "content": [PICTURE]}], "belong to the user's turns, not to 'assistant'"),
        ([{"role": "system", "content": [PICTURE]}], "belong to the user's turns, not to 'system'"),
    ],
)
def test_bad_messages(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match="^messages: .*" + message):
        chatml().encode(messages, add_generation_prompt=True)


def test_ipython_is_a_role_of_llama3_only() -> None:
    turn = [{"role": "ipython", "content": "Hi"}]
    assert llama3().encode(turn, add_generation_prompt=False).ids == [266, 272, 259, 273, 260, 261, 275]
    with pytest.raises(ValueError, match="ipython"):
        chatml().encode(turn, add_generation_prompt=False)


def test_a_format_needs_its_tokens() -> None:
    with pytest.raises(ValueError, match=r"lacks <\|begin_of_text\|>"):
        Llama3Format(BYTES, {})
    with pytest.raises(ValueError, match="'alpaca' is not one of llama3, chatml"):
        chat_format("alpaca", BYTES, {})
