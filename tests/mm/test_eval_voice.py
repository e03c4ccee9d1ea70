"""What `mm eval voice` measures, on signals whose answers are known; and all of it on the debug model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import mm.eval.voice as evaluation
from data.shards import write_shard
from mm.eval.voice import spelt
from mm.eval.voice_measures import warped
from mm.eval.voice_timing import run_dry
from mm.model import MultimodalLlama


def test_a_stretched_recording_is_found_again() -> None:
    mel_TM = torch.randn(13, 80, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([1, 1, 3, 1, 2, 1, 1, 1, 4, 1, 1, 1, 2])
    t_P, u_P = warped(mel_TM, mel_TM.repeat_interleave(times, 0) + 2)  # loudness does not count
    assert u_P.tolist() == list(range(int(times.sum())))
    assert t_P.tolist() == torch.arange(13).repeat_interleave(times).tolist()


def test_underruns() -> None:
    assert run_dry([]) == (0, 0.0, [])
    assert run_dry([(1.0, 0.5), (1.4, 0.2), (1.7, 1.0)]) == (0, 0.0, pytest.approx([0.1, 0.0]))
    n, silence, lead = run_dry([(0.2, 0.1), (0.6, 0.5), (0.9, 0.1), (2.0, 0.1)])
    assert (n, silence, lead) == (2, pytest.approx(0.3 + 0.8), pytest.approx([-0.3, 0.2, -0.8]))


def test_letters_are_joined_as_they_are_written() -> None:
    assert spelt("the F B I at A T and T or a B") == "the FBI at AT and T or a B"


class Told:
    """Hears the first recording right, and nothing else."""

    def __init__(self, folder: object) -> None:
        self.n = 0

    def __call__(self, waveform_N: np.ndarray, sample_rate: int) -> str:
        assert sample_rate == 24_000 and len(waveform_N)
        self.n += 1
        return "Hello there, 5 cats!" if self.n == 1 else "none"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two held-out sentences of noise."""
    samples: list[dict[str, Any]] = []
    for i, (text, spoken) in enumerate(
        (("Hello there, 5 cats!", "hello there five cats"), ("Yes we can.", "yes we can"))
    ):
        phones = [["|", 0, 3, "", 31, 0], ["ə", 0, 3, "", 29, len(text)]]
        noise = np.random.default_rng(i).normal(0, 0.1, 60 * 240).astype(np.float32)
        soundfile.write(tmp_path / "a.flac", noise, 24_000)
        about = {"text": text, "spoken": spoken, "voice": "noise", "speaker": 0, "phones": phones}
        arrays = {"f0.npy": np.zeros(60, np.float16), "power.npy": np.zeros(60, np.float16)}
        samples.append({"__key__": f"heldout-{i}", "flac": (tmp_path / "a.flac").read_bytes(), "json": about} | arrays)
    write_shard(tmp_path / "heldout-voice-0000.tar", samples)
    return tmp_path


def test_the_whole_report(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gruut_lang_en")
    monkeypatch.setattr(evaluation, "Recogniser", Told)
    monkeypatch.setattr(evaluation, "PROMPTS", ("Hi",))
    monkeypatch.setattr(evaluation, "ANSWER_TOKENS", 7)
    model = MultimodalLlama.from_pretrained("debug")
    model.save_pretrained(tmp_path / "model")
    results = evaluation.main("debug", shards, tmp_path / "out", voice=tmp_path / "model" / "voice", limit=9)
    values = {result.metric: result for result in results}
    assert values["WER"].n == 2 and values["WER"].value == pytest.approx(100 * 3 / 7)
    assert values["WER"].recording == 100 and values["WER with digits or symbols"].value == 0
    assert values["real-time factor, one core"].value > 0 and values["mel-cepstral distortion"].value > 1
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [line["metric"] for line in saved] == list(values)
    assert "| WER | 2 |" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "voice.png").is_file() and len(list((tmp_path / "out" / "samples").iterdir())) == 4
    first = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["heard"] == "Hello there, 5 cats!" and first["heard_recording"] == "none"
