"""Stages tts-acoustic and tts-vocoder: that they learn and hand on, the discriminators' gradients, resuming, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.audio import encode_flac
from data.shards import write_shard
from data.voice import read_voice
from mm.config import from_mapping
from mm.train import run_checkpoint
from mm.train.config import TrainConfig
from mm.train.discriminators import LogSpectra, distance
from mm.train.run_log import read_log
from mm.train.trainer import Collate, Trainer
from mm.train.vocoding import Vocoding
from mm.voice import load_part
from speech.excitation import noise, pulses

N = 3
PHONES = ["|", "h", "ɛ", "l", "oʊ", "|"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hum with a little noise, whose pitch rises; phones of random length."""
    folder = tmp_path_factory.mktemp("voice")
    rng = np.random.default_rng(0)

    def sample(i: int) -> dict[str, Any]:
        frames = rng.integers(5, 12, len(PHONES)).tolist()
        f0_1T = torch.linspace(100, 170 + 30 * i, sum(frames))[None]
        f0_1T[:, : frames[0]] = 0
        start = torch.zeros(1, dtype=torch.float64)
        hum_1TN, _, _ = pulses(f0_1T, start, start, hop=240, sample_rate=24_000)
        hiss_1TN = noise(torch.arange(sum(frames))[None], hop=240)
        waveform_N = 0.05 * (hum_1TN + 0.1 * hiss_1TN).flatten()
        phones = [(ipa, 0, 3, "." if ipa == "|" else "", n, 0) for ipa, n in zip(PHONES, frames, strict=True)]
        about = {"text": "Hello.", "spoken": "hello", "voice": "hum", "speaker": 0, "phones": phones}
        f0 = f0_1T[0].numpy().astype(np.float16)
        return {"__key__": f"{i:03d}", "flac": encode_flac(waveform_N, 24_000), "f0.npy": f0, "json": about}

    write_shard(folder / "train-0000.tar", [sample(i) for i in range(N)])
    return folder


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A small, complete run, as plain data."""

    def run(stage: str, steps: int, lr: float, **model: Any) -> dict[str, Any]:
        sources = [{"path": str(shards / "train-0000.tar")}]
        return {
            "stage": stage,
            "output": str(tmp_path / stage),
            "model": model,
            "data": {"sources": sources, "heldout": sources, "window": 2},
            "optim": {
                "steps": steps,
                "batch_size": N,
                "lr": {"voice": lr} | ({"head": lr} if "vocod" in stage else {}),
            },
            "eval": {"every": 100, "samples": N, "pictures": 1},
            "checkpoint": {"every": 100},
        }

    return run


CROPS = {"frames": 20, "crops": 2, "judged": 10, "channels": 2}


def make_trainer(data: dict[str, Any]) -> Trainer:
    return Trainer(from_mapping(TrainConfig, data))


def gradients(trainer: Trainer, batch: Any) -> dict[str, torch.Tensor | None]:
    trainer.optimizer.zero_grad()
    trainer.accumulate(batch)
    return {name: None if p.grad is None else p.grad.clone() for name, p in trainer.trained.items()}


# --- the acoustic model -----------------------------------------------------------------------------------------------


def test_the_acoustic_model_learns_by_heart_and_is_exported(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    trainer = make_trainer(run("tts-acoustic", 40, 2e-2, acoustic="debug"))
    before = trainer.evaluate()
    export = trainer.train()
    assert export is not None
    after = trainer.evaluate()
    assert after["heldout/loss"] < 0.5 * before["heldout/loss"]
    assert after["heldout/mcd_db"] < 0.5 * before["heldout/mcd_db"]
    assert after["heldout/f0_rmse_hz"] < 12 and after["heldout/voicing_errors"] < 0.05
    loaded = load_part(export, "acoustic")
    assert loaded.config == trainer.objective.acoustic.config
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[f"acoustic.{name}"])
    assert (tmp_path / "tts-acoustic" / "samples" / "step_000040.png").exists()
    again = make_trainer(run("tts-acoustic", 1, 1e-9, init_from=str(export)) | {"output": str(tmp_path / "again")})
    assert again.evaluate()["heldout/loss"] == pytest.approx(after["heldout/loss"])


def test_the_loss_does_not_depend_on_the_cut(run: Callable[..., dict[str, Any]]) -> None:
    for stage, model in (
        ("tts-acoustic", {"acoustic": "debug"}),
        ("tts-vocoder", {"vocoder": "debug", "vocoding": CROPS | {"judged_from": 0}}),
    ):
        trainer = make_trainer(run(stage, 1, 1e-3, **model))
        if isinstance(trainer.objective, Vocoding):
            trainer.objective.begin(0)
        samples = [trainer.objective.reader.prepare(raw) for raw in trainer.heldout]
        losses = [trainer.accumulate(Collate(trainer.objective.reader, size)(samples)) for size in (N, 2, 1)]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


# --- the vocoder ------------------------------------------------------------------------------------------------------


def test_the_vocoder_learns_and_is_exported_without_discriminators(run: Callable[..., dict[str, Any]]) -> None:
    trainer = make_trainer(run("tts-vocoder", 25, 1e-2, vocoder="debug", vocoding=CROPS))
    before = trainer.evaluate()
    export = trainer.train()
    assert export is not None
    after = trainer.evaluate()
    assert after["heldout/loss"] < 0.5 * before["heldout/loss"]
    assert after["heldout/mcd_db"] < before["heldout/mcd_db"]
    loaded = load_part(export, "vocoder")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[f"vocoder.{name}"])


def test_noise_is_learnt_as_noise() -> None:
    """The energy distance is smallest for noise of the same power, where that to the mean would prefer softer one."""
    judge, hiss_BN = LogSpectra(24_000), noise(torch.arange(3 * 60).view(3, 60), hop=240).flatten(1)
    real, made, again = hiss_BN

    def energy(gain: float) -> float:
        spectra = [judge(x[None]) for x in (real, gain * made, gain * again)]
        pairs = distance(spectra[0], spectra[1]) + distance(spectra[0], spectra[2]) - distance(spectra[1], spectra[2])
        return pairs.item()

    hum = pulses(torch.full((1, 60), 150.0), *torch.zeros(2, 1).double(), hop=240, sample_rate=24_000)[0].flatten(1)
    assert energy(1.0) < min(energy(0.8), energy(1.25))
    assert energy(1.0) < 2 * distance(judge(real[None]), judge(hum)).item()


def test_no_gradient_crosses_between_vocoder_and_discriminators(run: Callable[..., dict[str, Any]]) -> None:
    trainer = make_trainer(run("tts-vocoder", 2, 1e-3, vocoder="debug", vocoding=CROPS | {"judged_from": 1}))
    batch = next(iter(trainer.stream))
    objective = trainer.objective
    assert isinstance(objective, Vocoding)
    objective.begin(0)
    alone = gradients(trainer, batch)
    assert all((g is None) == name.startswith("discriminators") for name, g in alone.items())
    objective.begin(1)
    judged = gradients(trainer, batch)
    assert all(g is not None and g.abs().sum() > 0 for g in judged.values())
    # The discriminators' gradient is that of telling real from made, to which the vocoder's wish to be taken for real adds nothing.
    made = objective._judged
    only: list[torch.Tensor] = []

    def mistaken(real_BN: torch.Tensor, made_BN: torch.Tensor) -> torch.Tensor:
        only.append(made(real_BN, made_BN.detach()))
        return only[0]

    objective._judged = mistaken  # type: ignore[method-assign]
    detached = gradients(trainer, batch)
    for name, g in detached.items():
        expected = judged[name] if name.startswith("discriminators") else alone[name]
        torch.testing.assert_close(g, expected)


def test_a_resumed_run_is_bit_for_bit_the_same_across_the_start_of_the_discriminators(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    data = run("tts-vocoder", 6, 1e-3, vocoder="debug", vocoding=CROPS | {"judged_from": 3})
    data["optim"]["batch_size"] = 2
    for output, stops in (("whole", []), ("cut", [2, 4])):
        for stop in [*stops, 6]:
            trainer = make_trainer(data | {"output": str(tmp_path / output), "checkpoint": {"every": 1, "keep": 9}})
            step = trainer.train_step

            def until(batch: Any, trainer: Trainer = trainer, step: Any = step, stop: int = stop) -> dict[str, float]:
                trainer.stop_requested = trainer.step + 1 >= stop
                return step(batch)

            trainer.train_step = until  # type: ignore[method-assign]
            trainer.train()
    logs = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    paths = [
        run_checkpoint.path_of(tmp_path / name / "checkpoints", 6) / "weights.safetensors" for name in ("whole", "cut")
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_vocoder_learns_from_what_the_acoustic_model_says(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    acoustic = make_trainer(run("tts-acoustic", 1, 1e-3, acoustic="debug")).train()
    first = make_trainer(run("tts-vocoder", 1, 1e-3, vocoder="debug", vocoding=CROPS)).train()
    crops = CROPS | {"mels_from": str(acoustic), "judged_from": 0}
    data = run("tts-vocoder", 1, 1e-3, init_from=str(first), vocoding=crops) | {"output": str(tmp_path / "tuned")}
    trainer = make_trainer(data)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if name.startswith("acoustic")}
    assert frozen and not set(frozen) & set(trainer.trained)
    batch = next(iter(trainer.stream)).micro_batches[0]
    objective = trainer.objective
    assert isinstance(objective, Vocoding) and objective.acoustic is not None and batch.utterances is not None
    mel_BTM = objective._mels(batch)
    whole = objective.acoustic(
        batch.utterances.phones, batch.utterances.prosody_BN3, batch.utterances.frames_BN
    ).mel_BTM
    for mel_TM, row, start in zip(mel_BTM, batch.row_B.tolist(), batch.start_B.tolist(), strict=True):
        torch.testing.assert_close(mel_TM, whole[row, start : start + 20])
    assert trainer.train() is not None
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)


def test_crops_are_of_the_recording(run: Callable[..., dict[str, Any]]) -> None:
    trainer = make_trainer(run("tts-vocoder", 1, 1e-3, vocoder="debug", vocoding=CROPS))
    objective = trainer.objective
    assert isinstance(objective, Vocoding)
    crops = trainer.objective.reader.prepare(trainer.heldout[1]).crops
    sample = read_voice(trainer.heldout[1])
    assert sample.waveform_N is not None
    mel_TM, mel_BTM = objective.log_mel(sample.waveform_N[None])[0], objective._mels(crops)
    for mel, f0_T, start in zip(mel_BTM, crops.f0_BT, crops.start_B.tolist(), strict=True):
        torch.testing.assert_close(mel, mel_TM[start : start + 20], atol=1e-3, rtol=0)
        assert torch.equal(f0_T, sample.f0_T[start : start + 20])


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuse(data: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_trainer(data)


def test_what_does_not_fit_is_refused(run: Callable[..., dict[str, Any]]) -> None:
    refuse(run("tts-acoustic", 1, 1e-3), r"model: give either acoustic, .* or init_from")
    refuse(run("tts-acoustic", 1, 1e-3, acoustic="huge"), r"model\.acoustic: 'huge' is unknown; choose one of debug")
    refuse(run("tts-acoustic", 1, 1e-3, acoustic="debug", vocoder="debug"), "does not read it")
    refuse(
        run("tts-vocoder", 1, 1e-3, vocoder="debug", vocoding=CROPS | {"frames": 15}), "vocoding.frames: the vocoder is"
    )
    refuse(
        run("tts-vocoder", 1, 1e-3, vocoder="debug", vocoding=CROPS | {"crops": 0}),
        r"vocoding\.crops must be at least 1",
    )


def test_a_sample_that_is_no_voice_is_named(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    trainer = make_trainer(run("tts-acoustic", 1, 1e-3, acoustic="debug"))
    raw = trainer.heldout[0]
    phones = json.loads(json.dumps(raw.metadata["phones"]))
    phones[0][4] += 1
    with pytest.raises(ValueError, match="every phone needs a frame or more"):
        trainer.objective.reader.prepare(replace(raw, metadata=raw.metadata | {"phones": phones}))
