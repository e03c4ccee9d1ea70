"""Every tokenizer against another implementation, then what all of them promise."""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from lm.config import PRESETS
from lm.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    TextStream,
    TiktokenTokenizer,
    Tokenizer,
    byte_alphabet,
    load_tokenizer,
)

TEXTS = [
    "",
    "Hello, world! It's 1 picture; they've 23 and I'LL have 45678.",
    "  two\tspaces \n\n\n and   lines\r\n\r\nend   ",
    "naïve café, Straße, 日本語の文章です。 Привет мир",
    "½ and ², Ⅷ, ١٢٣",
    "emoji 😀👍🏽 family 👨‍👩‍👧 flag 🇫🇷 and a\u00a0hard\u2009space",
    "def f(x_1):\n\treturn x_1 ** 2  # https://example.org/a?b=c&d=%20",
    "don't DON'T 'tis it's'll ''' \"quoted\" -- ... !!!??",
    "<|im_start|>system\nobey<|im_end|> <|eot_id|><|image|><|begin_of_text|>",
]
PIECES = [
    "a",
    "The",
    " ",
    "  ",
    "\n",
    "\t",
    "1",
    "234",
    "é",
    "½",
    "日本",
    "😀",
    "👨‍👩‍👧",
    "'s",
    "_",
    "!!",
    "<|im_end|>",
    "\r\n",
]


def random_texts(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 13))) for _ in range(n)]


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks trained on the texts above, in Meta's file format."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=487, show_progress=False))
    alphabet = byte_alphabet()
    learnt = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(alphabet[char] for char in token) for token in learnt if len(token) > 1]
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def converted(tiktoken_file: Path) -> Backend:
    """The same file as transformers reads it."""
    names = TiktokenTokenizer.from_file(tiktoken_file).special_tokens
    return TikTokenConverter(str(tiktoken_file), extra_special_tokens=list(names)).converted()


def write_gguf(path: Path, backend: Backend, *, pre: str, model: str = "gpt2") -> Path:
    """A GGUF file with the vocabulary of `backend` and no weights."""
    vocab, added = backend.get_vocab(), backend.get_added_tokens_decoder()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if vocab[t] in added else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|begin_of_text|>"])
    writer.add_eos_token_id(vocab["<|eot_id|>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(params=["tiktoken", "tokenizer.json", "gguf", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "tiktoken":
        return load_tokenizer(request.getfixturevalue("tiktoken_file"))
    if request.param == "gguf":
        return request.getfixturevalue("smollm2")
    if request.param == "bytes":
        return load_tokenizer("debug")
    backend = request.getfixturevalue("converted")
    return JsonTokenizer(Backend.from_str(backend.to_str()), bos_id=487, eos_ids=[488, 496])


def test_tiktoken_matches_transformers(tiktoken_file: Path, converted: Backend) -> None:
    ours = load_tokenizer(tiktoken_file)
    converted.encode_special_tokens = True
    for text in TEXTS + random_texts(200, seed=1):
        assert ours.encode(text) == converted.encode(text).ids
    assert {name: converted.token_to_id(name) for name in ours.special_tokens} == ours.special_tokens
    assert len(ours.special_tokens) == 256 and ours.vocab_size == converted.get_vocab_size()


def test_llama3_special_ids() -> None:
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {(i + (1 << 24)).to_bytes(4, "big"): i for i in range(256, 128_000)}
    tokenizer = TiktokenTokenizer(ranks)
    expected = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|reserved_special_token_1|>": 128003,
        "<|finetune_right_pad_id|>": 128004,
        "<|step_id|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|image|>": 128011,
        "<|reserved_special_token_2|>": 128012,
        "<|reserved_special_token_245|>": 128255,
    }
    assert {name: tokenizer.special_tokens[name] for name in expected} == expected
    assert tokenizer.bos_id == 128000 and tokenizer.eos_ids == {128001, 128008, 128009}
    assert tokenizer.vocab_size == PRESETS["llama3-8b"]().vocab_size


def test_gguf_llama3_vocabulary_matches_tiktoken(tiktoken_file: Path, converted: Backend, tmp_path: Path) -> None:
    from_gguf = load_tokenizer(write_gguf(tmp_path / "llama3.gguf", converted, pre="llama-bpe"))
    tiktoken = load_tokenizer(tiktoken_file)
    for text in TEXTS + random_texts(200, seed=2):
        assert from_gguf.encode(text) == tiktoken.encode(text)
    assert from_gguf.special_tokens == tiktoken.special_tokens
    assert from_gguf.bos_id == tiktoken.bos_id and from_gguf.eos_ids == {tiktoken.special_tokens["<|eot_id|>"]}


def test_smollm2_gguf_matches_transformers(smollm2: Tokenizer, smollm2_gguf: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # transformers turns special tokens' names into them, and reads no pre-tokeniser from GGUF: see the next test.
    texts = [text for text in TEXTS if "<|" not in text and not any(c.isnumeric() and not c.isascii() for c in text)]
    assert len(texts) == 7
    assert [smollm2.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert smollm2.special_tokens == {
        token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert smollm2.vocab_size == 49_152 == len(theirs)
    assert smollm2.eos_ids == {theirs.eos_token_id} and smollm2.bos_id == theirs.bos_token_id


def test_smollm_sets_every_digit_apart(smollm2: JsonTokenizer) -> None:
    # As SmolLM2 was trained and as llama.cpp reads it; GPT-2's rule alone gives "Ġ", "Ġ", "1", "2" and "ĠÂ", "½".
    def tokens(text: str) -> list[str]:
        return [smollm2._backend.id_to_token(i) for i in smollm2.encode(text)]

    assert tokens("x  12") == ["x", "ĠĠ", "1", "2"]
    assert tokens("x ½") == ["x", "Ġ", "Â½"]


def test_gpt2_pretokeniser_keeps_digits_together(converted: Backend, tmp_path: Path) -> None:
    text = "x  12 it's"
    for pre in ("gpt-2", "default"):
        tokenizer = load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", converted, pre=pre))
        assert isinstance(tokenizer, JsonTokenizer)
        pieces = [piece for piece, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == ["x", "Ġ", "Ġ12", "Ġit", "'s"]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS + random_texts(100, seed=3):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_letters_are_what_a_text_is_made_of_however_it_is_cut(tokenizer: Tokenizer) -> None:
    for text in TEXTS + random_texts(100, seed=4):
        letters = [letter for token in tokenizer.encode(text) for letter in tokenizer.letters(token)]
        assert len(letters) == len(text.encode()) and tokenizer.decode(letters) == text
        assert letters == [
            letter for char in text for token in tokenizer.encode(char) for letter in tokenizer.letters(token)
        ]
    for special in tokenizer.special_tokens.values():
        assert tokenizer.letters(special) == [special]


def test_text_cannot_forge_special_tokens(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_tokens.values())
    assert len(special) >= 17
    for name in tokenizer.special_tokens:
        for text in (name, f"a{name}b", f" {name}{name}\n"):
            ids = tokenizer.encode(text)
            assert not special & set(ids)
            assert tokenizer.decode(ids) == text


def test_broken_surrogates_are_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\N{REPLACEMENT CHARACTER}b"


def test_decode_leaves_out_what_is_no_text(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    ids = [*a, *tokenizer.special_tokens.values(), *b, tokenizer.vocab_size, tokenizer.vocab_size + 9]
    assert tokenizer.decode(ids) == "ab"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name in ("vocab_size", "special_tokens", "bos_id", "eos_ids"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_transformers_reads_what_we_save(smollm2: Tokenizer, tmp_path: Path) -> None:
    smollm2.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("A  1 b")["input_ids"] == smollm2.encode("A  1 b")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (smollm2.bos_id, *smollm2.eos_ids)


def test_ends_of_a_text_as_transformers_writes_them(converted: Backend, tmp_path: Path) -> None:
    converted.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<|begin_of_text|>", "lstrip": false}, "eos_token": "<|eot_id|>"}'
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    special = tokenizer.special_tokens
    assert tokenizer.bos_id == special["<|begin_of_text|>"] and tokenizer.eos_ids == {special["<|eot_id|>"]}
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{special["<|end_of_text|>"]}]}}')
    assert load_tokenizer(tmp_path).eos_ids == {special["<|eot_id|>"], special["<|end_of_text|>"]}


def test_debug_tokenizer_is_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé\n") == [0x61, 0xC3, 0xA9, 0x0A]
    assert tokenizer.decode(range(256)) == bytes(range(256)).decode(errors="replace")
    assert tokenizer.vocab_size == PRESETS["debug"]().vocab_size


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(i) for i in ids), stream.flush()]


def test_stream_gives_whole_characters(tokenizer: Tokenizer) -> None:
    for text in TEXTS + random_texts(50, seed=4):
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_stream_equals_decode_for_any_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    for _ in range(100):
        ids = [rng.randrange(min(tokenizer.vocab_size + 5, 300)) for _ in range(29)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def broken_json(path: Path) -> Path:
    (path / "tokenizer.json").write_text("{}")
    return path


def sentencepiece(path: Path) -> Path:
    (path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n")
    return path


def gap_in_ranks(path: Path) -> Path:
    (path / "tokenizer.model").write_text("YQ== 0\nYg== 2\n")
    return path


def text_file(path: Path) -> Path:
    (path / "notes.txt").write_text("no tokenizer")
    return path / "notes.txt"


def forgeable(path: Path) -> Path:
    backend = Backend(models.WordLevel({"stop": 0, "?": 1}, unk_token="?"))
    backend.add_special_tokens(["stop"])
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "no tokenizer at"),
        (lambda path: path / "nowhere", "nowhere"),
        (text_file, "no tokenizer at"),
        (broken_json, "not a file of the tokenizers library"),
        (sentencepiece, "not a tiktoken file"),
        (gap_in_ranks, "ranks must be"),
        (forgeable, "encodes to the special token"),
    ],
)
def test_bad_sources(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(make(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"), [({"pre": "tekken"}, "tekken"), ({"pre": "", "model": "llama"}, "gpt2")]
)
def test_unsupported_gguf_vocabularies(settings: dict, message: str, converted: Backend, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_gguf(tmp_path / "other.gguf", converted, **settings))
