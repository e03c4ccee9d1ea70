"""What the voices say: English sentences from texts that install offline, as they are spoken."""

from __future__ import annotations

import importlib.util
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from data.make.canvas import Source, Split, package_files
from data.make.templates import Vocabulary, closed_questions, questions, short_sentences

WORDS = (3, 20)  #: of a sentence of prose
#: Prose uses only words that occur this often in it, so that names and Latin do not crowd out what can be learnt.
MIN_COUNT = 5
#: One sentence in ten is held out, by a hash of its words.
HELDOUT = 10
#: WordNet's lexicographer files of what can be seen: animals, artefacts, parts of the body, food, landscape, plants.
CONCRETE = {"05", "06", "08", "13", "17", "20"}

_NUMBER = re.compile(r"(?<![\w.,$-])(\d+(?:,\d{3})*(?:\.\d+)?)(st|nd|rd|th|%)?(?![\w$]|[.,]\d)")
_UNSPEAKABLE = re.compile(r"[A-Z]{2}|[a-z][A-Z]|(?<![\w'])[b-hj-zB-HJ-Z](?![\w'])|---")  # acronyms, symbols, rules
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")


def spoken(text: str) -> str | None:
    """Words as a voice speaks them: lower case, numbers in words, `, . ? !` kept for the melody.

    Returns:
        None where anything else is left, so that nobody knows how a voice would read it.
    """
    text = re.sub(r"[\u2018\u2019]", "'", text)
    text = re.sub(r'["\u201c\u201d]', "", text)
    text = _NUMBER.sub(lambda match: _number_words(*match.groups()), text)
    text = re.sub(r"\s*(?:--+|\u2014|[:;](?=\s|$)|(?<=\s)-(?=\s))\s*", ", ", text).replace("-", " ").lower()
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", "", text)
    text = re.sub(r"([,.?!])[ ,.?!]*(?<=[,.?!])", r"\1", " ".join(text.split()))
    return text if re.fullmatch(r"[a-z][a-z' ,.?!]*", text) else None


def transcript(text: str) -> str:
    """The plain words of a `spoken` text, which a recogniser should write."""
    return " ".join(re.sub(r"[,.?!]", " ", text).split())


def _number_words(digits: str, suffix: str | None) -> str:
    try:
        from num2words import num2words
    except ImportError as error:
        raise ValueError("numbers cannot be spelt without num2words: run `pip install num2words`") from error

    if re.fullmatch(r"(1[1-9]|20)\d\d", digits) and suffix is None:
        return num2words(int(digits), to="year")
    value = float(digits.replace(",", "")) if "." in digits else int(digits.replace(",", ""))
    words = num2words(value, to="ordinal" if suffix in ("st", "nd", "rd", "th") else "cardinal").replace(",", "")
    return words + " percent" * (suffix == "%")


# --- texts ------------------------------------------------------------------------------------------------------------


def exchanges() -> Iterator[list[str]]:
    """The turns of ChatterBot's English conversations.

    Raises:
        ValueError: the package is missing.
    """
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise ValueError("a Python package is missing: run `pip install chatterbot-corpus`")
    for path in sorted(Path(spec.origin).parent.glob("data/english/*.yml")):
        for turns in yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)["conversations"]:
            yield [str(turn) for turn in turns]


def definitions() -> Iterator[tuple[list[str], list[str]]]:
    """WordNet's glosses and usage examples, of each sense."""
    for path in package_files({"wordnet-base": "usr/share/wordnet/data.*"})["wordnet-base"]:
        for line in path.read_text(encoding="latin-1").splitlines():
            parts = re.sub(r"\([^)]*\)", "", line.partition("| ")[2]).split("; ")
            examples = [part.strip(' "') for part in parts if re.fullmatch(r'\s*"[^"]*"?\s*', part)]
            yield [part.strip() for part in parts if '"' not in part], examples


def common_nouns() -> list[str]:
    """Concrete nouns, by their first sense, that WordNet's authors met in the texts that they tagged; no names."""
    package = "wordnet-base"
    index, data = (package_files({package: f"usr/share/wordnet/{name}.noun"})[package][0] for name in ("index", "data"))
    synsets = {line[:8]: line.partition(" |")[0].split(" ") for line in data.read_text(encoding="latin-1").splitlines()}
    nouns = []
    for line in index.read_text(encoding="ascii").splitlines():
        lemma, *fields = line.split(" ")
        if re.fullmatch("[a-z]{3,12}", lemma):
            n_pointers = int(fields[2])
            n_tagged, first_sense = fields[4 + n_pointers], fields[5 + n_pointers]
            synset = synsets[first_sense]
            if int(n_tagged) and synset[1] in CONCRETE and lemma in synset:
                nouns.append(lemma)
    return nouns


def manual() -> Iterator[str]:
    """Paragraphs of Python's documentation; sentences with markup drop out later."""
    sources = package_files({"python3.11-doc": "usr/share/doc/python3.11/html/_sources/**/*.rst.txt"})
    for path in sources["python3.11-doc"]:
        yield from re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))


def fortunes() -> Iterator[str]:
    """Sayings, without the lines that name who said them."""
    for path in package_files({"fortunes-min": "usr/share/games/fortunes/[flr]*[es]"})["fortunes-min"]:
        for saying in path.read_text(encoding="utf-8").split("\n%\n"):
            yield re.split(r"\n\s*--", saying)[0]


SOURCES = (
    Source(package="chatterbot-corpus", licence="BSD-3-Clause"),
    Source(package="wordnet-base", licence="WordNet 3.0 licence"),
    Source(package="python3.11-doc", licence="PSF-2.0"),
    Source(package="fortunes-min", licence="BSD (quotations of their authors)"),
)


# --- pools ------------------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """Sentences of one kind as they are written, and the share of the clips that they get."""

    share: float
    sentences: tuple[str, ...]


#: Sentences as they are written, by their words, so that none is there twice.
Texts = Mapping[str, str]


def prose(paragraphs: Iterable[str]) -> Texts:
    """The sentences of `WORDS` words that have no acronyms, symbols, or full stop inside."""
    low, high = WORDS
    found = {}
    for text in (text for paragraph in paragraphs for text in _SENTENCE_END.split(" ".join(paragraph.split()))):
        if low <= len(text.split()) <= high and not _UNSPEAKABLE.search(text):
            said = spoken(text)
            if said and re.fullmatch(r"[^.?!]+[.?!]?", said):
                words = transcript(said)
                if len(words.split()) <= high:
                    found[words] = text
    return found


def _made(texts: Iterable[str]) -> Texts:
    return {transcript(said): text for text in texts if (said := spoken(text))}


def _vocabulary() -> Vocabulary:
    return Vocabulary(nouns=tuple(common_nouns()))


@cache
def _read_texts() -> Mapping[str, tuple[float, Texts]]:
    glosses, examples = zip(*definitions(), strict=True)
    texts = {
        "exchanges": (0.12, prose(turn for turns in exchanges() for turn in turns)),
        "glosses": (0.16, prose(gloss for some in glosses for gloss in some)),
        "examples": (0.28, prose(example for some in examples for example in some)),
        "manual": (0.10, prose(manual())),
        "fortunes": (0.06, prose(fortunes())),
    }
    counts = Counter(word for _, some in texts.values() for words in some for word in words.split())
    learnable = {
        name: (
            share,
            {words: text for words, text in some.items() if min(counts[w] for w in words.split()) >= MIN_COUNT},
        )
        for name, (share, some) in texts.items()
    }
    return {**learnable, "short": (0.28, _made(short_sentences(random.Random(0), _vocabulary())))}


@cache
def _question_texts() -> Mapping[str, tuple[float, Texts]]:
    asked = prose(turns[0] for turns in exchanges() if turns[0].endswith("?"))
    made = _made(questions(_vocabulary()))
    return {"exchanges": (0.12, asked), "open": (0.68, made), "closed": (0.2, _made(closed_questions()))}


def read_pools(split: Split) -> dict[str, Pool]:
    """What is read aloud.

    Raises:
        ValueError: packages are missing.
    """
    return _of_split(_read_texts(), split)


def question_pools(split: Split) -> dict[str, Pool]:
    """What is asked aloud, and wants an answer.

    Raises:
        ValueError: packages are missing.
    """
    return _of_split(_question_texts(), split)


def _of_split(texts: Mapping[str, tuple[float, Texts]], split: Split) -> dict[str, Pool]:
    return {
        name: Pool(share, tuple(text for words, text in some.items() if split_of(words) == split))
        for name, (share, some) in texts.items()
    }


def split_of(words: str) -> Split:
    """Where a sentence belongs, whatever it was taken from."""
    return "train" if zlib.crc32(words.encode()) % HELDOUT else "heldout"


def draw_sentences(rng: random.Random, pools: Mapping[str, Pool], n: int) -> list[str]:
    """`n` sentences, from each pool by its share; none comes twice before its whole pool has come."""

    def shuffled(pool: Pool) -> Iterator[str]:
        while True:
            yield from rng.sample(pool.sentences, len(pool.sentences))

    filled = [pool for pool in pools.values() if pool.sentences]
    streams: list[Callable[[], str]] = [shuffled(pool).__next__ for pool in filled]
    return [draw() for draw in rng.choices(streams, [pool.share for pool in filled], k=n)]
