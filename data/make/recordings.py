"""Recordings of people, from Debian packages: in many languages to learn hearing from, in English only to be tested on.

One woman read Asterisk's English and Spanish prompts. The Spanish ones are left out, so that she is never heard in
training; so are all other recordings in English.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import NamedTuple

from data.make.canvas import Source, package_files
from data.make.sentences import spoken

_LANGUAGES = {
    "ar": "Arabic", "be": "Belarusian", "bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish",
    "de": "German", "el": "Greek", "es": "Spanish", "fr": "French", "he": "Hebrew", "hu": "Hungarian",
    "it": "Italian", "lt": "Lithuanian", "ml": "Malayalam", "nb": "Norwegian", "nds": "Low German", "nl": "Dutch",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "tn": "Tswana", "uk": "Ukrainian",
}  # fmt: skip
_ASTERISK = {"fr": "fr_CA_f_June", "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}
_ENGLISH = "usr/share/asterisk/sounds/en_US_f_Allison"
_TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"

SOURCES = (
    Source(package="tuxpaint-stamps-default", licence="GPL-2"),
    Source(package="klettres-data", licence="GPL-2+"),
    *(Source(package=f"asterisk-core-sounds-{code}-g722", licence="CC-BY-SA-3.0") for code in _ASTERISK),
)
ENGLISH_SOURCES = (
    Source(package="asterisk-core-sounds-en", licence="CC-BY-SA-3.0"),
    Source(package="asterisk-core-sounds-en-g722", licence="CC-BY-SA-3.0"),
)


class Recording(NamedTuple):
    """A file and who speaks in it.

    Attributes:
        language: English name.
        text: the words, as `spoken` gives them; None where nobody needs them.
    """

    path: Path
    voice: str
    language: str
    text: str | None = None


def foreign_recordings() -> list[Recording]:
    """All recordings in other languages than English, sorted by their source.

    Raises:
        ValueError: packages are missing.
    """
    tuxpaint, klettres = "tuxpaint-stamps-default", "klettres-data"
    patterns = {tuxpaint: "usr/share/tuxpaint/stamps/**/*_desc_*.ogg", klettres: "usr/share/klettres/*/*/*.ogg"}
    for code, folder in _ASTERISK.items():
        patterns[f"asterisk-core-sounds-{code}-g722"] = f"usr/share/asterisk/sounds/{folder}/**/*.g722"
    files = package_files(patterns)
    found = [("tuxpaint", path.name.split("_desc_")[1], path) for path in files.pop(tuxpaint)]
    found += [("klettres", path.parts[-3], path) for path in files.pop(klettres)]
    found += [("asterisk", package.split("-")[-2], path) for package in files for path in files[package]]
    recordings = []
    for source, place, path in found:
        code = re.split("[._]", place)[0]  # `pt_BR`, `fr.ogg`
        if _speaks(path) and code != "en":
            recordings.append(Recording(path, f"{source}-{code}", _LANGUAGES[code]))
    return recordings


def _speaks(path: Path) -> bool:
    """Whether there is a voice in the file, and a decoder for it: one folder has a Vorbis that FFmpeg never learnt."""
    no_voice = path.parent.name == "silence" or re.search("beep|[23]tone|monkeys", path.name)
    return not no_voice and path.parts[-3:-1] != ("cs", "syllab") and path.stat().st_size > 0


def english_recordings() -> list[Recording]:
    """Asterisk's English prompts with their words; without those that are no speech.

    Raises:
        ValueError: packages are missing.
    """
    package, sounds = "asterisk-core-sounds-en", "asterisk-core-sounds-en-g722"
    files = package_files({package: _TRANSCRIPTS, sounds: f"{_ENGLISH}/**/*.g722"})
    with gzip.open(files[package][0], "rt", encoding="utf-8") as lines:
        texts = dict(line.strip().split(": ", 1) for line in lines if re.match(r"[^;].*: ", line))
    found = []
    for path in files[sounds]:
        name = str(path.with_suffix("")).partition(_ENGLISH + "/")[2]
        text = spoken(texts.get(name, "[unknown]").lstrip(". "))  # brackets describe sounds: nobody speaks them
        if text and _speaks(path):
            found.append(Recording(path, "asterisk-en", "English", text))
    return found
