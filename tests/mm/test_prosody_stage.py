"""Stage tts-prosody: it learns by heart and hands on, with and without a language model; chunks, refusals, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.shards import open_source, write_shard
from data.voice import VoicePhone, VoiceSample, read_voice
from mm.checkpoint import debug_model
from mm.config import from_mapping
from mm.eval import prosody as evaluation
from mm.eval.prosody_measures import prosody_errors, rmse
from mm.train import lm_features
from mm.train.config import TrainConfig
from mm.train.lm_features import FeatureFolder
from mm.train.prosody_prediction import ProsodyReader, phone_ids
from mm.train.trainer import Collate, Trainer
from mm.voice import load_part

N = 5
TEXT = "Hello, Ann."
WORDS = [("", "|", 5), ("hɛloʊ", "hɛl", 5), (",", "|", 6), ("æn", "æn", 10), (".", "|", 11)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random prosody in recordings that nobody listens to, and the debug model's features of the text."""
    folder, rng = tmp_path_factory.mktemp("voice"), np.random.default_rng(0)

    def sample(i: int) -> dict[str, Any]:
        phones = [
            (ipa, 0, 0, mark if mark in (",", ".") else "", int(rng.integers(2, 30)), end)
            for mark, some, end in WORDS
            for ipa in some
        ]
        n_frames = sum(phone[4] for phone in phones)
        arrays = {"f0": rng.choice([0, 150, 210], n_frames), "power": rng.uniform(-7, -2, n_frames)}
        about = {"text": f"{TEXT}", "spoken": "hello ann", "voice": "dice", "speaker": 0, "phones": phones}
        npy = {f"{name}.npy": array.astype(np.float16) for name, array in arrays.items()}
        return {"__key__": f"{i:03d}", **npy, "json": about}

    write_shard(folder / "train-0000.tar", [sample(i) for i in range(N)])
    source = str(folder / "train-0000.tar")
    lm_features.main(["--lm", "debug", "--source", source, "--out", str(folder / "features"), "--batch-size", "2"])
    return folder


def run(shards: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A small, complete run, as plain data; `lm` reads the debug model's features."""
    shape = {"dim": 22, "n_layers": 1, "n_heads": 2, "ffn_dim": 31, "lookahead": 2, "window": 7} | changes
    source = {"path": str(shards / "train-0000.tar")} | (
        {"features": str(shards / "features")} if "lm" in shape else {}
    )
    return {
        "stage": "tts-prosody",
        "output": str(out),
        "model": {"prosody": shape},
        "data": {"sources": [source], "heldout": [source], "window": 2},
        "optim": {"steps": 3, "batch_size": N, "lr": {"voice": 1e-2}},
        "eval": {"every": 100, "samples": N, "pictures": N},
        "checkpoint": {"every": 100},
    }


def lm() -> dict[str, Any]:
    config = debug_model().config.lm
    return {"source": "debug", "layer": config.n_layers // 2, "dim": config.dim}


def make_trainer(data: dict[str, Any]) -> Trainer:
    return Trainer(from_mapping(TrainConfig, data))


def test_learns_by_heart_and_is_exported(shards: Path, tmp_path: Path) -> None:
    data = run(shards, tmp_path / "run")
    one = {"path": str(tmp_path / "one.tar")}  # of several with the same text only the mean could be learnt
    opened = open_source(shards / "train-0000.tar", name="all")
    raw = opened[0]
    arrays = {f"{name}.npy": array for name, array in raw.arrays.items()}
    write_shard(one["path"], [{"__key__": "0", **arrays, "json": raw.metadata}])
    data["data"] = {"sources": [one], "heldout": [one], "window": 2}
    data["optim"] |= {"steps": 100, "batch_size": 1, "warmup": 10}
    trainer = make_trainer(data)
    before = trainer.evaluate()
    export = trainer.train()
    assert export is not None
    after = trainer.evaluate()
    assert after["heldout/loss"] < 0.03 * before["heldout/loss"]
    # Told its own predictions, too.
    for name in ("log_duration", "log_f0", "log_power"):
        assert after[f"heldout/rmse_{name}"] < 0.25 * before[f"heldout/rmse_{name}"], name
    loaded = load_part(export, "prosody")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[f"prosody.{name}"])
    assert (tmp_path / "run" / "samples" / "step_000100.png").exists()


def test_reads_features_and_any_micro_batch_gives_the_same(shards: Path, tmp_path: Path) -> None:
    trainer = make_trainer(run(shards, tmp_path / "run", lm=lm()))
    reader, gradients = trainer.objective.reader, []
    samples = [reader.prepare(raw) for raw in trainer.heldout]
    assert samples[0].lm is not None and samples[0].phones[-1].chunk == len(samples[0].lm[1]) - 1
    for size in (N, 2):
        trainer.optimizer.zero_grad()
        loss = trainer.accumulate(Collate(reader, size)(samples))
        gradients.append([loss, *(p.grad.clone() for p in trainer.trained.values() if p.grad is not None)])
    assert len(gradients[0]) == 1 + len(trainer.trained)
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-6)
    export = trainer.train()
    assert export is not None and load_part(export, "prosody").config.lm.source == "debug"


def test_chunks_end_with_the_token_that_completes_the_word() -> None:
    ends = [2, 5, 6, 7, 10, 11]  # He|llo|,| |Ann|.
    phones = tuple(VoicePhone("h", 0, 0, "", 1, end) for _, some, end in WORDS for _ in some)
    sample = VoiceSample(key="0", text=TEXT, speaker=0, phones=phones, f0_T=torch.zeros(8), log_power_T=torch.zeros(8))
    assert [ids.chunk for ids in phone_ids(sample, ends)] == [1, 1, 1, 1, 2, 4, 4, 5]
    assert {ids.chunk for ids in phone_ids(sample, [])} == {0}


def test_measures() -> None:
    true_N3 = torch.tensor([[9.0, 9, 9], [1, 5, -3], [2, 5, -3], [9, 9, 9]])
    predicted_N3 = true_N3 + torch.tensor([[7.0, 7, 7], [0.3, 0.2, 0], [0.1, 3, 2], [7, 7, 7]])
    found = rmse([prosody_errors(predicted_N3, true_N3, torch.tensor([True, True, False, True]))])
    values = [found[name].value for name in ("log_duration", "log_f0", "log_power")]
    assert values == pytest.approx([0.05**0.5, 0.2, 2**0.5], rel=1e-5)  # ends and unvoiced pitch do not count


def test_the_table(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exports = []
    for name, changes in (("lm", {"lm": lm()}), ("text", {}), ("all", {"lookahead": None})):
        trainer = make_trainer(run(shards, tmp_path / name, **changes))
        export = trainer.train()
        assert export is not None
        exports.append(export)
    source = str(shards / "train-0000.tar")
    results = evaluation.main(exports, source, tmp_path / "eval", limit=N, batch_size=2)
    assert [(r.features, r.lookahead, r.n) for r in results] == [
        (f"debug, layer {lm()['layer']}", 2, N),
        (None, 2, N),
        (None, None, N),
    ]
    # As the run itself measures it, with features from the folder.
    assert results[2].rmse["log_power"].value == pytest.approx(trainer.evaluate()["heldout/rmse_log_power"], rel=1e-4)
    assert "unlimited" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"results.json", "predictions.jsonl", "contours.png"}


def test_refusals(shards: Path, tmp_path: Path) -> None:
    data = run(shards, tmp_path / "run", lm=lm())
    del data["data"]["sources"][0]["features"]
    with pytest.raises(ValueError, match="lm_features"):
        make_trainer(data)
    data = run(shards, tmp_path / "run")
    data["data"]["sources"][0]["features"] = str(shards / "features")
    with pytest.raises(ValueError, match="does not read it"):
        make_trainer(data)
    raw = open_source(shards / "train-0000.tar", name="x")[0]
    raw.arrays.pop("power")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"power\.npy"):
        ProsodyReader({}).prepare(raw)
    raw.metadata["phones"].pop()
    with pytest.raises(ValueError, match="frame or more"):
        read_voice(raw, waveform=False)
    del raw.metadata["phones"]
    with pytest.raises(ValueError, match="mm data make voice"):
        read_voice(raw, waveform=False)


def test_features_are_those_of_the_text(shards: Path) -> None:
    features, ends = FeatureFolder(shards / "features")["000"]
    assert ends[-1] == len(TEXT) and features.shape == (len(ends), lm()["dim"])
