"""Text to token ids and back: Llama 3's tiktoken file, Hugging Face's `tokenizer.json`, GGUF vocabularies, plain bytes.

Text never becomes a special token here. Whoever wants one takes its id from `special_tokens`, as `lm.chat` does.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tiktoken
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lm.checkpoint import read_json
from lm.gguf import read_metadata
from lm.hub import resolve

#: How Llama 3 cuts text into the pieces that byte-pair encoding then works on.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_N_SPECIAL = 256
#: The named ones among Llama 3's special tokens, in the order of their ids (section 9.3); the others are reserved.
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer.

    Attributes:
        vocab_size: one more than the largest id.
        special_tokens: the id of each special token.
        bos_id: the token that starts a text, if there is one.
        eos_ids: the tokens at which generation ends.
    """

    vocab_size: int
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; what looks like a special token is text too."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Special tokens and ids beyond the vocabulary are left out; broken UTF-8 becomes U+FFFD."""
        ...

    def letters(self, token_id: int) -> list[int]:
        """The tokens of a token's single bytes, which are the same however a text is cut into tokens."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the files from which `load_tokenizer(directory)` makes the same tokenizer."""
        ...


class TiktokenTokenizer:
    """Llama 3's own tokenizer: ranked byte pairs and 256 special tokens after them.

    Args:
        ranks: rank of each token's bytes, which is its id.
    """

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        n_reserved = LLAMA3_N_SPECIAL - len(LLAMA3_SPECIAL)
        names = [*LLAMA3_SPECIAL, *(f"<|reserved_special_token_{2 + i}|>" for i in range(n_reserved))]
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(names)}
        self.vocab_size = len(ranks) + len(names)
        self.bos_id: int | None = self.special_tokens["<|begin_of_text|>"]
        self.eos_ids = frozenset(self.special_tokens[t] for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
        self._ranks = dict(ranks)
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=self._ranks, special_tokens=self.special_tokens
        )

    @classmethod
    def from_file(cls, path: str | Path) -> TiktokenTokenizer:
        """Reads lines of a base64 token and its rank."""
        # Not with tiktoken's own reader: its cache goes by the path and outlives a changed file.
        try:
            pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise ValueError(f"{path} is not a tiktoken file (SentencePiece is not supported): {error}") from error
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError(f"{path}: the ranks must be 0, 1, 2, ... and cover every byte; is the file complete?")
        return cls(ranks)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i for i in ids if i < len(self._ranks)])

    def letters(self, token_id: int) -> list[int]:
        if token_id >= len(self._ranks):
            return [token_id]
        return [self._ranks[bytes([byte])] for byte in self._encoding.decode_single_token_bytes(token_id)]

    def save(self, directory: str | Path) -> None:
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in self._ranks.items())
        (Path(directory) / "tokenizer.model").write_bytes(b"".join(lines))


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        backend: the library's tokenizer.
        bos_id: the token that starts a text, if there is one.
        eos_ids: the tokens at which generation ends.

    Raises:
        ValueError: plain text could still make a special token, so a user could forge the end of a turn.
    """

    def __init__(self, backend: Backend, *, bos_id: int | None, eos_ids: Iterable[int]) -> None:
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self._backend = backend
        self._backend.encode_special_tokens = True  # the library's name for leaving them plain text
        self._backend.no_truncation()
        self._backend.no_padding()
        for name, i in self.special_tokens.items():
            if i in self.encode(name):
                raise ValueError(f"tokenizer: the text {name!r} encodes to the special token itself; not supported")

    @classmethod
    def from_file(cls, path: str | Path) -> JsonTokenizer:
        """Reads a `tokenizer.json`, and which tokens start and end a text from the configs beside it."""
        path = Path(path)
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a file of the tokenizers library: {error}") from error
        beside = [path.with_name(name) for name in ("tokenizer_config.json", "generation_config.json")]
        names, numbers = (read_json(file) if file.is_file() else {} for file in beside)

        def named(key: str) -> int | None:
            token = names.get(key)
            content = token["content"] if isinstance(token, dict) else token
            return None if content is None else backend.token_to_id(content)

        bos_id, eos_ids = named("bos_token"), numbers.get("eos_token_id")
        ends = {named("eos_token"), *(eos_ids if isinstance(eos_ids, list) else [eos_ids])}
        return cls(backend, bos_id=bos_id, eos_ids={i for i in ends if i is not None})

    @classmethod
    def from_gguf(cls, path: str | Path) -> JsonTokenizer:
        """Builds the byte-level BPE that a GGUF file carries, with the pre-tokeniser that it names."""
        prefix = "tokenizer.ggml."
        vocabulary = {k.removeprefix(prefix): v for k, v in read_metadata(path).items() if k.startswith(prefix)}
        backend = _gguf_backend(vocabulary, path)
        ends = (vocabulary.get(f"{name}_token_id") for name in ("eos", "eot", "eom"))
        return cls(backend, bos_id=vocabulary.get("bos_token_id"), eos_ids={i for i in ends if i is not None})

    def encode(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # half of a surrogate pair, as broken JSON can hold; tiktoken replaces it like this, too
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def letters(self, token_id: int) -> list[int]:
        token = self._backend.id_to_token(token_id)
        if token is None or token in self.special_tokens:
            return [token_id]
        # Of byte-level BPE, a character is a byte.
        ids = [i for char in token if (i := self._backend.token_to_id(char)) is not None]
        return ids if len(ids) == len(token) else [token_id]

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and, in transformers' spelling, who starts and ends a text."""
        directory = Path(directory)
        self._backend.save(str(directory / "tokenizer.json"))
        eos_ids = sorted(self.eos_ids)
        names: dict[str, str | None] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.bos_id is not None:
            names["bos_token"] = self._backend.id_to_token(self.bos_id)
        if eos_ids:
            names["eos_token"] = self._backend.id_to_token(eos_ids[0])
        numbers = {"bos_token_id": self.bos_id, "eos_token_id": eos_ids}  # the one place for several ends
        (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
        (directory / "generation_config.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


class ByteTokenizer(JsonTokenizer):
    """The debug model's: ids below 256 are bytes, then come ChatML's special tokens and reserved ones up to 320."""

    def __init__(self) -> None:
        backend = Backend(models.BPE(vocab=byte_alphabet(), merges=[]))
        backend.pre_tokenizer, backend.decoder = _gpt2_pretokenizer(), decoders.ByteLevel()
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(61))]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        super().__init__(backend, bos_id=None, eos_ids=[256 + names.index("<|im_end|>")])


class TextStream:
    """Decodes ids one at a time; the pieces put together are `decode` of all ids.

    A piece is held back while its last character may still be incomplete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The latest piece's ids, since a tokenizer may drop the space that starts a text, then the ids after it.
        self._ids: list[int] = []
        self._n_shown = 0

    def push(self, token_id: int) -> str:
        """Takes one more id and returns the text that is now certain."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids, self._n_shown = self._ids[self._n_shown :], len(self._ids) - self._n_shown
        return text

    def flush(self) -> str:
        """Returns what was held back. The stream is then at its end."""
        return self._new_text()

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._n_shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads a tokenizer by what lies at `source`.

    Args:
        source: a directory, a `tokenizer.json`, a Llama 3 `tokenizer.model` or a `.gguf` file, by path or as
            `lm.hub.resolve` knows it; or "debug" for bytes.

    Raises:
        ValueError: there is none, or its kind is not supported.
    """
    if source == "debug":
        return ByteTokenizer()
    path = resolve(source)
    if path.is_dir():
        found = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.gguf"))]
        path = next((file for file in found if file.is_file()), path)
    if path.suffix == ".json" and path.is_file():
        return JsonTokenizer.from_file(path)
    if path.suffix == ".model" and path.is_file():
        return TiktokenTokenizer.from_file(path)
    if path.suffix == ".gguf" and path.is_file():
        return JsonTokenizer.from_gguf(path)
    raise ValueError(
        f"source: no tokenizer at {source}; it needs a tokenizer.json, a Llama 3 tokenizer.model or a .gguf"
    )


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next of U+0100, U+0101, ..."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return {char: ord(char) if ord(char) < 256 else others[ord(char) - 256] for char in alphabet}


def _gpt2_pretokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _llama3_pretokenizer() -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm_pretokenizer() -> pre_tokenizers.PreTokenizer:
    """GPT-2's, after every digit was set apart."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_pretokenizer()])


#: `tokenizer.ggml.pre` of a GGUF file -> its pre-tokeniser.
_GGUF_PRETOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2_pretokenizer,
    "gpt-2": _gpt2_pretokenizer,
    "llama-bpe": _llama3_pretokenizer,
    "smollm": _smollm_pretokenizer,
}


def _gguf_backend(vocabulary: Mapping[str, Any], path: str | Path) -> Backend:
    """Byte-level BPE from the `tokenizer.ggml.*` fields of a GGUF file."""
    if vocabulary.get("model") != "gpt2":
        raise ValueError(
            f"{path}: GGUF tokenizer model {vocabulary.get('model')!r}; only byte-level BPE ('gpt2') is supported"
        )
    pre = vocabulary.get("pre", "default")
    if pre not in _GGUF_PRETOKENIZERS:
        raise ValueError(f"{path}: GGUF pre-tokeniser {pre!r} is not one of {', '.join(_GGUF_PRETOKENIZERS)}")
    tokens: list[str] = vocabulary["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary["merges"]]
    # Llama 3 takes a piece that is a token as it is, whether or not merges lead there.
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe")
    backend = Backend(model)
    backend.pre_tokenizer, backend.decoder = _GGUF_PRETOKENIZERS[pre](), decoders.ByteLevel()
    for token, kind in zip(tokens, vocabulary["token_type"], strict=True):
        if kind == TokenType.CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    return backend
