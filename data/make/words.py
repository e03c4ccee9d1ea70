"""Single words in many fonts, to be spelt letter by letter."""

from __future__ import annotations

import random
import re
import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data.make.canvas import Colour, Ground, Picture, Question, Source, Split, hsv, luma, package_files, photograph

QUESTION = "Spell the word in the picture."
MAX_SIZE, MIN_HEIGHT = (512, 100), 40
FONT_SIZES = range(72, 19, -4)
#: Least difference in brightness (0 to 255) between letters and background.
MIN_CONTRAST = 75
#: Part of the training pictures that shows random letters, so that a reader cannot guess from the first ones.
RANDOM_LETTERS = 0.5


class Family(NamedTuple):
    name: str
    package: str
    files: str
    licence: str = "OFL-1.1"


_T, _O, _G = "usr/share/fonts/truetype", "usr/share/fonts/opentype", "usr/share/texmf/fonts/opentype/public/tex-gyre"
_APACHE, _GUST, _GPL = "Apache-2.0", "GUST Font License", "GPL-3+ with font exception"
FAMILIES: Mapping[Split, Sequence[Family]] = {
    "train": (
        Family("DejaVu", "fonts-dejavu-core", f"{_T}/dejavu/DejaVuS*.ttf", "Bitstream Vera"),
        Family("Liberation Sans", "fonts-liberation", f"{_T}/liberation/LiberationSans*.ttf"),
        Family("Liberation Serif", "fonts-liberation", f"{_T}/liberation/LiberationSerif*.ttf"),
        Family("Liberation Mono", "fonts-liberation", f"{_T}/liberation/LiberationMono*.ttf"),
        Family("Roboto", "fonts-roboto-unhinted", f"{_T}/roboto/unhinted/**/Roboto*.ttf", _APACHE),
        Family("Open Sans", "fonts-open-sans", f"{_T}/open-sans/OpenSans*.ttf", _APACHE),
        Family("Lato", "fonts-lato", f"{_T}/lato/Lato*.ttf"),
        Family("Inter", "fonts-inter", f"{_O}/inter/Inter-*.otf"),
        Family("Oxygen", "fonts-oxygen", f"{_T}/oxygen/Oxygen*.ttf"),
        Family("League Spartan", "fonts-league-spartan", f"{_O}/league-spartan/LeagueSpartan*.otf"),
        Family("Yanone Kaffeesatz", "fonts-yanone-kaffeesatz", f"{_O}/yanone-kaffeesatz/Yanone*.otf"),
        Family("Free Sans", "fonts-freefont-ttf", f"{_T}/freefont/FreeSans*.ttf", _GPL),
        Family("Free Serif", "fonts-freefont-ttf", f"{_T}/freefont/FreeSerif*.ttf", _GPL),
        Family("Free Mono", "fonts-freefont-ttf", f"{_T}/freefont/FreeMono*.ttf", _GPL),
        Family("Fira Code", "fonts-firacode", f"{_T}/firacode/FiraCode*.ttf"),
        Family("Hack", "fonts-hack", f"{_T}/hack/Hack*.ttf", "Expat and Bitstream Vera"),
        Family("Inconsolata", "fonts-inconsolata", f"{_T}/inconsolata/Inconsolata*"),
        Family("Mononoki", "fonts-mononoki", f"{_T}/mononoki/mononoki*.ttf"),
        Family("Courier Prime", "fonts-courier-prime", f"{_O}/courier-prime/*.otf"),
        Family("GFS Didot", "fonts-gfs-didot", f"{_O}/didot/GFSDidot*.otf"),
        Family("Fanwood", "fonts-fanwood", f"{_T}/fanwood/Fanwood*.otf", "MIT"),
        Family("Junicode", "fonts-junicode", f"{_O}/junicode/Junicode*.otf"),
        Family("Linux Libertine", "fonts-linuxlibertine", f"{_O}/linux-libertine/LinLibertine_R*.otf"),
        Family("Linux Biolinum", "fonts-linuxlibertine", f"{_O}/linux-libertine/LinBiolinum_R*.otf"),
        Family("Lobster", "fonts-lobster", f"{_O}/lobster/lobster.otf"),
        Family("TeX Gyre Adventor", "fonts-texgyre", f"{_G}/texgyreadventor*.otf", _GUST),
        Family("TeX Gyre Bonum", "fonts-texgyre", f"{_G}/texgyrebonum*.otf", _GUST),
        Family("TeX Gyre Chorus", "fonts-texgyre", f"{_G}/texgyrechorus*.otf", _GUST),
        Family("TeX Gyre Cursor", "fonts-texgyre", f"{_G}/texgyrecursor*.otf", _GUST),
        Family("TeX Gyre Heros Condensed", "fonts-texgyre", f"{_G}/texgyreheroscn*.otf", _GUST),
        Family("TeX Gyre Pagella", "fonts-texgyre", f"{_G}/texgyrepagella*.otf", _GUST),
        Family("TeX Gyre Schola", "fonts-texgyre", f"{_G}/texgyreschola*.otf", _GUST),
    ),
    "heldout": (
        Family("Cantarell", "fonts-cantarell", f"{_O}/cantarell/Cantarell*.otf"),
        Family("Quicksand", "fonts-quicksand", f"{_T}/quicksand/Quicksand*.ttf"),
        Family("Play", "fonts-play", f"{_T}/play/Play*.ttf"),
        Family("JetBrains Mono", "fonts-jetbrains-mono", f"{_T}/jetbrains-mono/JetBrainsMono*.ttf", _APACHE),
        Family("EB Garamond", "fonts-ebgaramond", f"{_O}/ebgaramond/EBGaramond*.otf"),
        Family("Gentium", "fonts-sil-gentium", f"{_T}/gentium/Gentium*.ttf"),
        Family("Caladea", "fonts-crosextra-caladea", f"{_T}/crosextra/Caladea*.ttf"),
        Family("Comic Neue", "fonts-comic-neue", f"{_O}/comic-neue/ComicNeue*.otf"),
    ),
}
#: Faces too thin to read at 20 pixels.
TOO_THIN = re.compile("Thin|Hairline|ExtraLight")

#: Faces of each family.
Fonts = Mapping[Split, Sequence[Sequence[Path]]]
Vocabulary = Mapping[Split, Sequence[str]]


def installed_fonts() -> Fonts:
    """The faces of every family of the registry.

    Raises:
        ValueError: packages are missing.
    """
    families = [family for split in FAMILIES.values() for family in split]
    package_files({family.package: family.files for family in families})
    return {
        split: [
            [path for path in package_files({f.package: f.files})[f.package] if not TOO_THIN.search(path.name)]
            for f in families
        ]
        for split, families in FAMILIES.items()
    }


def wordnet_vocabulary() -> Vocabulary:
    """WordNet's words of 3 to 10 letters; a hash of the word puts one in twenty aside.

    Raises:
        ValueError: the package is missing.
    """
    files = package_files({"wordnet-base": "usr/share/wordnet/index.*"})["wordnet-base"]
    lemma = re.compile(r"^([a-z]{3,10}) ", re.MULTILINE)
    words = sorted({word for path in files for word in lemma.findall(path.read_text(encoding="ascii"))})
    splits: dict[Split, list[str]] = {"train": [], "heldout": []}
    for word in words:
        splits["train" if zlib.crc32(word.encode()) % 20 else "heldout"].append(word)
    return splits


@lru_cache(maxsize=1024)  # some faces take a megabyte
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def spelling(word: str) -> str:
    """`House` -> `h o u s e`."""
    return " ".join(word.lower())


@dataclass(frozen=True, kw_only=True)
class Words:
    """One word per picture, which is cropped near it. Held out are words and font families, both at once."""

    fonts: Fonts = field(default_factory=installed_fonts)
    vocabulary: Vocabulary = field(default_factory=wordnet_vocabulary)

    name: ClassVar[str] = "words"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 60_000, "heldout": 2_000}
    sources: ClassVar[Sequence[Source]] = (
        Source(package="wordnet-base", licence="WordNet 3.0 licence"),
        *dict.fromkeys(Source(package=f.package, licence=f.licence) for split in FAMILIES.values() for f in split),
    )

    def draw(self, rng: random.Random, split: Split, index: int) -> Picture:
        word = self.random_word(rng, split)
        written = rng.choice([str.lower, str.title, str.upper])(word)
        face = rng.choice(rng.choice(self.fonts[split]))
        question = Question(task="words", question=QUESTION, answer=spelling(word))
        image = photograph(rng, paint_word(rng, written, face))
        return Picture(image=image, caption=question.answer, questions=[question])

    def random_word(self, rng: random.Random, split: Split) -> str:
        if split == "heldout" or rng.random() >= RANDOM_LETTERS:
            return rng.choice(self.vocabulary[split])
        while True:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 10)))
            if word not in self._heldout_words:
                return word

    @cached_property
    def _heldout_words(self) -> frozenset[str]:
        return frozenset(self.vocabulary["heldout"])


def paint_word(rng: random.Random, word: str, face: Path) -> Image.Image:
    """The word on a background, 40 to 100 pixels high and at most 512 wide."""
    tilt = rng.uniform(-4, 4) if rng.random() < 0.7 else 0.0
    wanted = rng.choice(FONT_SIZES)
    letters = next(
        mask
        for size in FONT_SIZES
        if size <= wanted
        and (mask := _letters(word, _font(face, size), tilt)).width <= MAX_SIZE[0] - 8
        and mask.height <= MAX_SIZE[1] - 8
    )
    width, height = (
        min(limit, side + round(wanted * rng.uniform(0.2, 1.0)))
        for side, limit in zip(letters.size, MAX_SIZE, strict=True)
    )
    height = max(height, MIN_HEIGHT)
    ground, colour = _readable_colours(rng)
    image = ground.paint(rng, (width, height))
    corner = rng.randint(2, width - letters.width - 2), rng.randint(2, height - letters.height - 2)
    image.paste(colour, corner, letters)
    return image


def _letters(word: str, font: ImageFont.FreeTypeFont, tilt: float) -> Image.Image:
    """Coverage of the tilted word (mode L), cut to its ink."""
    left, top, right, bottom = font.getbbox(word)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), word, font=font, fill=255)
    mask = mask.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
    return mask.crop(mask.getbbox())


def _readable_colours(rng: random.Random) -> tuple[Ground, Colour]:
    while True:
        ground = Ground.draw(rng, "train", contrast=0.3)
        colour = hsv(rng.random(), rng.random(), rng.random())
        if all(abs(luma(colour) - luma(shade)) >= MIN_CONTRAST for shade in ground.shades):
            return ground, colour
