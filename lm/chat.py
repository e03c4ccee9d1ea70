"""Chat formats: messages -> token ids, which of them are supervised, and where media stand.

Ids are put together directly, never through a rendered string, so text cannot forge the end of a turn.
Text between two special tokens is encoded as one piece, which is what a template's rendered string gives too.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lm.tokenizer import Tokenizer

#: Type of a part -> kind of medium. The longer names are OpenAI's, which wrap the source: `"image_url": {"url": ...}`.
MEDIA_PARTS = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
}

#: `{"role": "user" | ..., "content": text or parts}`.
Message = Mapping[str, Any]
Content = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MediaSpan:
    """One medium of a chat.

    Attributes:
        kind: "image", "audio" or "video".
        position: index of its token in the row.
        source: what the message gave: a path, bytes, a picture, an array.
    """

    kind: str
    position: int
    source: Any


@dataclass(frozen=True)
class Encoded:
    """A row of tokens.

    Attributes:
        ids: token ids.
        supervised: True where a token is one that the model must learn to say.
        media: media in reading order.
    """

    ids: list[int]
    supervised: list[bool]
    media: list[MediaSpan]


class ChatFormat(ABC):
    """How one family of models writes a chat.

    Args:
        tokenizer: must know the format's special tokens.
        media_ids: the token that stands for one medium of each kind that the model takes.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    #: Start a text, end a text, end a turn.
    text_start: ClassVar[str]
    text_end: ClassVar[str]
    turn_end: ClassVar[str]

    def __init__(self, tokenizer: Tokenizer, media_ids: Mapping[str, int]) -> None:
        self.tokenizer, self.media_ids = tokenizer, dict(media_ids)
        needed = (self.text_start, self.text_end, self.turn_end)
        missing = [name for name in needed if name not in tokenizer.special_tokens]
        if missing:
            raise ValueError(f"tokenizer: it lacks {', '.join(missing)}, so it does not fit chat format {self.name!r}")
        self.stop_ids = tokenizer.eos_ids | {tokenizer.special_tokens[t] for t in (self.text_end, self.turn_end)}

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Encoded:
        """Encodes a chat.

        Args:
            messages: at least one, each with a role and content: text, or parts of text and media in their order.
            add_generation_prompt: end with the header of the assistant's next turn.

        Returns:
            Ids; what the assistant says and the token that ends its turn are supervised.

        Raises:
            ValueError: no messages, an unknown role or part, or a medium where none may stand.
        """
        if not messages:
            raise ValueError("messages: there are none; give at least one")
        writer = _Writer(self.tokenizer, self.media_ids)
        self._begin(writer, messages)
        for message in messages:
            role = message.get("role")
            if role not in self.roles:
                raise ValueError(f"messages: role {role!r} is not one of {', '.join(self.roles)}")
            content = _parts(message.get("content"))
            if role != "user" and any(part["type"] != "text" for part in content):
                raise ValueError(f"messages: pictures, sound and video belong to the user's turns, not to {role!r}")
            self._turn(writer, role, content)
        if add_generation_prompt:
            self._header(writer, "assistant")
        return writer.finish()

    def encode_plain(self, content: Content, *, end: bool) -> Encoded:
        """Encodes text and media without turns, as base models and captions have them.

        Args:
            content: text, or parts of text and media in their order.
            end: close with the token that ends a text.

        Returns:
            Ids; all text and the end token are supervised.
        """
        writer = _Writer(self.tokenizer, self.media_ids)
        writer.special(self.text_start)
        writer.content(_parts(content), supervised=True)
        if end:
            writer.special(self.text_end, supervised=True)
        return writer.finish()

    @abstractmethod
    def _begin(self, writer: _Writer, messages: Sequence[Message]) -> None:
        """Writes what stands before the first turn."""

    @abstractmethod
    def _header(self, writer: _Writer, role: str) -> None:
        """Writes what stands before the content of a turn."""

    def _turn(self, writer: _Writer, role: str, content: list[Mapping[str, Any]]) -> None:
        """Writes a whole turn."""
        said = role == "assistant"
        self._header(writer, role)
        writer.content(content, supervised=said)
        writer.special(self.turn_end, supervised=said)


class Llama3Format(ChatFormat):
    """Llama 3 (section 9.3): `<|start_header_id|>user<|end_header_id|>\\n\\n...<|eot_id|>`, content stripped."""

    name = "llama3"
    roles = ("system", "user", "assistant", "ipython")
    text_start, text_end, turn_end = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"

    def _begin(self, writer: _Writer, messages: Sequence[Message]) -> None:
        writer.special(self.text_start)

    def _header(self, writer: _Writer, role: str) -> None:
        writer.special("<|start_header_id|>")
        writer.text(role)
        writer.special("<|end_header_id|>")
        writer.text("\n\n")

    def _turn(self, writer: _Writer, role: str, content: list[Mapping[str, Any]]) -> None:
        super()._turn(writer, role, _strip(content))


class ChatMLFormat(ChatFormat):
    """ChatML as SmolLM2 has it: `<|im_start|>user\\n...<|im_end|>\\n`.

    Attributes:
        default_system: the system turn of a chat that does not begin with one; None for none.
    """

    name = "chatml"
    roles = ("system", "user", "assistant")
    text_start, text_end, turn_end = "<|endoftext|>", "<|endoftext|>", "<|im_end|>"

    def __init__(
        self,
        tokenizer: Tokenizer,
        media_ids: Mapping[str, int],
        default_system: str | None = "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ) -> None:
        super().__init__(tokenizer, media_ids)
        self.default_system = default_system

    def _begin(self, writer: _Writer, messages: Sequence[Message]) -> None:
        if self.default_system is not None and messages[0].get("role") != "system":
            self._turn(writer, "system", _parts(self.default_system))

    def _header(self, writer: _Writer, role: str) -> None:
        writer.special("<|im_start|>")
        writer.text(role + "\n")

    def _turn(self, writer: _Writer, role: str, content: list[Mapping[str, Any]]) -> None:
        super()._turn(writer, role, content)
        writer.text("\n")


CHAT_FORMATS: dict[str, type[ChatFormat]] = {cls.name: cls for cls in (Llama3Format, ChatMLFormat)}


def chat_format(name: str, tokenizer: Tokenizer, media_ids: Mapping[str, int]) -> ChatFormat:
    """Makes the chat format called "llama3" or "chatml"."""
    if name not in CHAT_FORMATS:
        raise ValueError(f"chat format {name!r} is not one of {', '.join(CHAT_FORMATS)}")
    return CHAT_FORMATS[name](tokenizer, media_ids)


@dataclass
class _Writer:
    """Collects ids. Neighbouring text waits until something else follows, then is encoded in one piece.

    Supervision is such a boundary too: a header must have the ids that it has as a generation prompt.
    """

    tokenizer: Tokenizer
    media_ids: Mapping[str, int]
    row: Encoded = field(default_factory=lambda: Encoded([], [], []))
    waiting: str = ""
    waiting_supervised: bool = False

    def text(self, text: str, supervised: bool = False) -> None:
        if supervised != self.waiting_supervised:
            self._flush()
        self.waiting += text
        self.waiting_supervised = supervised

    def special(self, name: str, supervised: bool = False) -> None:
        self._flush()
        self._append([self.tokenizer.special_tokens[name]], supervised)

    def content(self, parts: Sequence[Mapping[str, Any]], supervised: bool) -> None:
        for part in parts:
            if part["type"] == "text":
                self.text(part["text"], supervised)
            else:
                self._medium(part["type"], part["source"])

    def finish(self) -> Encoded:
        self._flush()
        return self.row

    def _medium(self, kind: str, source: Any) -> None:
        if kind not in self.media_ids:
            raise ValueError(
                f"messages: this model takes no {kind}; it takes {', '.join(self.media_ids) or 'text only'}"
            )
        self._flush()
        self.row.media.append(MediaSpan(kind, len(self.row.ids), source))
        self._append([self.media_ids[kind]], supervised=False)

    def _flush(self) -> None:
        self._append(self.tokenizer.encode(self.waiting), self.waiting_supervised)
        self.waiting = ""

    def _append(self, ids: list[int], supervised: bool) -> None:
        self.row.ids.extend(ids)
        self.row.supervised.extend([supervised] * len(ids))


def _parts(content: Any) -> list[Mapping[str, Any]]:
    """Content as parts `{"type": "text", "text"}` and `{"type": kind, "source"}`, whatever spelling it came in."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"messages: content must be text or a list of parts, not {type(content).__name__}")
    return [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    name = str(part.get("type"))
    if name == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError("messages: a part of type 'text' needs its text under 'text'")
        return part
    if name not in MEDIA_PARTS:
        raise ValueError(f"messages: part type {name!r} is not one of text, {', '.join(MEDIA_PARTS)}")
    kind = MEDIA_PARTS[name]
    source = next((part[key] for key in (name, "url", "path") if part.get(key) is not None), None)
    if name != kind and isinstance(source, Mapping):
        source = _from_base64(source["data"], kind) if "data" in source else source.get("url")
    if source is None:
        raise ValueError(f"messages: a part of type {name!r} needs its source under {name!r}")
    if isinstance(source, str) and source.startswith("data:"):
        source = _from_base64(source.partition(",")[2], kind)
    return {"type": kind, "source": source}


def _from_base64(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"messages: the {kind}'s data is not base64: {error}") from error


def _strip(parts: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without the white space at both ends of a turn."""
    parts = list(parts)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and parts[end]["type"] == "text":
            parts[end] = {"type": "text", "text": strip(parts[end]["text"])}
    return parts
