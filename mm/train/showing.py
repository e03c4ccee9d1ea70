"""How held-out samples are drawn and how the answers to them are scored, while a model trains."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from data.images import load_image
from data.make.canvas import strip
from data.shards import Sample as RawSample
from mm.eval.metrics import cer, wer, whisper_normaliser
from mm.processor import read_mel
from mm.sheet import Shown, mel_picture
from mm.train.reading import media_of
from speech.features import LogMel
from video.frames import load_frames
from vision.adapter import CrossAdapter


def picture_of(raw: RawSample, log_mel: LogMel | None) -> Image.Image:
    """A sample's first clip as some of its frames, picture, or recording as a spectrogram; white where it has none."""
    if clips := media_of(raw, "video"):
        return strip(load_frames(clips[0]))
    if pictures := media_of(raw, "image"):
        return load_image(pictures[0])
    if log_mel is not None and (recordings := media_of(raw, "audio")):
        return mel_picture(read_mel(recordings[0], log_mel))
    return Image.new("RGB", (1, 1), "white")


def share_right(rows: Sequence[Shown]) -> dict[str, float]:
    """Share of the answers that are right; nothing without answers."""
    return {"exact": sum(row.is_right for row in rows) / len(rows)} if rows else {}


def recognition_scores(rows: Sequence[Shown], languages: Sequence[str]) -> dict[str, float]:
    """Error rates of transcripts, by words and by characters (section 8.3.2).

    Whisper's English normaliser is used where all of them are English, its basic one otherwise. Transcripts in which it
    leaves no words, such as "um", do not count.
    """
    language = next((name for name in languages if name != "English"), "English")
    normalised = whisper_normaliser(language)
    rows = [row for row in rows if normalised(row.answer).split()]
    if not rows:
        return {}
    said, wanted = [row.prediction or "" for row in rows], [row.answer for row in rows]
    return {name: rate(said, wanted, language).value for name, rate in (("wer", wer), ("cer", cer))}


def gate_gauges(adapter: CrossAdapter) -> dict[str, float]:
    """How far the gates of an adapter are open, by kind and layer of the language model."""
    return {
        f"gates/{kind}.{i}": pair[k] for i, pair in adapter.gates().items() for k, kind in enumerate(("attn", "mlp"))
    }
