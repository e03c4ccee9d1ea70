"""Stages that train ears: that they learn, hand on to each other, and what they refuse."""

from __future__ import annotations

import json
import logging
import math
import runpy
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.audio import encode_flac
from data.shards import Sample, open_source, write_shard
from lm.checkpoint import load_llama
from mm.checkpoint import debug_model, give
from mm.config import from_mapping
from mm.generate import Generation
from mm.model import MultimodalLlama
from mm.processor import read_mel
from mm.sheet import MEL_SIZE, Shown, mel_picture
from mm.train import dialogue_targets
from mm.train.config import TrainConfig
from mm.train.encoders import load_encoder, save_encoder
from mm.train.reading import spelling_of
from mm.train.run_log import read_log
from mm.train.showing import recognition_scores
from mm.train.trainer import Collate, Trainer, TrainingError
from speech.conformer import PRESETS, Conformer

RATE = 16000
STAGES = ("speech-encoder", "speech-ctc", "speech-align", "speech")
#: What recordings say, by their pitch in Hz; as many tenths of seconds, so that they differ in length.
SAID = {310: (7, "one bee"), 530: (5, "go"), 1100: (11, "a new hat"), 2300: (13, "stop it now")}


def tone(hertz: int, tenths: int) -> torch.Tensor:
    """A note that swells, so that no mel bin is constant."""
    time = torch.arange(tenths * RATE // 10) / RATE
    return 0.4 * time / time[-1] * torch.sin(2 * torch.pi * hertz * time)


def transcribed(key: str, hertz: int, **about: Any) -> dict[str, Any]:
    tenths, text = SAID[hertz]
    turns = [{"from": "human", "value": "<audio>\nRepeat after me in English:"}, {"from": "gpt", "value": text}]
    about = {"task": "asr", "language": "English", "duration": tenths / 10, "conversations": turns} | about
    return {"__key__": key, "flac": encode_flac(tone(hertz, tenths)), "txt": text, "json": about}


@pytest.fixture(scope="module")
def speech_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "tones.tar"
    write_shard(path, [transcribed(f"tone{hertz}", hertz) for hertz in SAID])
    return path


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of files, without durations: LibriSpeech's layout."""
    chapter = tmp_path_factory.mktemp("LibriSpeech") / "19" / "198"
    chapter.mkdir(parents=True)
    lines = []
    for i, (hertz, (tenths, text)) in enumerate(SAID.items()):
        (chapter / f"19-198-{i:04d}.flac").write_bytes(encode_flac(tone(hertz, tenths)))
        lines.append(f"19-198-{i:04d} {text.upper()}\n")
    (chapter / "19-198.trans.txt").write_text("".join(lines))
    return chapter.parents[1]


MODELS: dict[str, dict[str, Any]] = {
    "speech-encoder": {
        "encoder": "debug",
        "best_rq": {"mask_prob": 0.1, "mask_span": 7, "n_codebooks": 3, "codebook_size": 17, "code_dim": 5},
    },
    "speech-ctc": {"encoder": "debug"},
    "speech-align": {"init_from": "debug"},
    "speech": {"init_from": "debug"},
}


@pytest.fixture
def data(speech_shard: Path, tmp_path: Path) -> dict[str, Any]:
    """A small, complete run but for its stage and model, as plain data that a test may change."""
    return {
        "output": str(tmp_path / "run"),
        "data": {"sources": [{"path": str(speech_shard)}], "heldout": [{"path": str(speech_shard)}], "window": 2},
        "optim": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lr": {"encoder": 1e-3, "adapter": 1e-3, "new_tokens": 1e-2, "head": 1e-3},
        },
        "eval": {"every": 100, "samples": 4, "pictures": 4, "max_new_tokens": 3},
        "checkpoint": {"every": 100},
    }


def make_trainer(stage: str, data: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer(from_mapping(TrainConfig, data | {"stage": stage, "model": MODELS.get(stage, {})} | changes))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainer.trained.items() if p.grad is not None}


def heldout_batch(trainer: Trainer, size: int) -> Any:
    """The held-out samples with the same masks every time, cut into micro-batches."""
    torch.manual_seed(5)
    reader = trainer.objective.reader
    batch = Collate(reader, size)([reader.prepare(raw) for raw in trainer.heldout])
    torch.manual_seed(6)  # of BEST-RQ's noise
    return batch


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_all_that_trains_and_nothing_else(stage: str, data: dict[str, Any]) -> None:
    trainer = make_trainer(stage, data)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_step(next(iter(trainer.stream)))
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainer.trained)
    parts = {
        "speech-encoder": {"encoder", "heads"},
        "speech-ctc": {"encoder", "head"},
        "speech-align": {"speech_encoder", "speech_adapter"},
        "speech": {"speech_encoder", "speech_adapter", "new_tokens"},
    }
    assert {name.partition(".")[0] for name in changed} == parts[stage]
    if (
        stage == "speech"
    ):  # of the new tokens, only those that enclose speech: not the pictures', nor the one spoken over
        config = trainer.model.config
        moved = (trainer.model.new_tokens.weight != before["new_tokens.weight"]).any(1).nonzero()[:, 0]
        enclosing = {config.speech.start_id, config.speech.end_id}
        assert set((moved + config.lm.vocab_size).tolist()) == enclosing


@pytest.mark.parametrize("stage", STAGES)
def test_the_cut_into_micro_batches_changes_nothing(stage: str, data: dict[str, Any]) -> None:
    trainer = make_trainer(stage, data)
    whole_batch = heldout_batch(trainer, 4)
    whole = trainer.accumulate(whole_batch)
    expected = {name: grad.clone() for name, grad in gradients(trainer).items()}
    for size in (1, 3):
        trainer.optimizer.zero_grad()
        batch = heldout_batch(trainer, size)
        assert len(batch.micro_batches) > 1 and batch.n_terms == whole_batch.n_terms
        assert trainer.accumulate(batch) == pytest.approx(whole, rel=1e-6)
        error = torch.cat([(grad - expected[name]).flatten() for name, grad in gradients(trainer).items()]).norm()
        assert error <= 1e-5 * torch.cat([grad.flatten() for grad in expected.values()]).norm()


@pytest.mark.parametrize("stage", ["speech-encoder", "speech-ctc", "speech-align"])
def test_the_terms_that_are_counted_are_those_of_the_loss(stage: str, data: dict[str, Any]) -> None:
    trainer = make_trainer(stage, data)
    batch = heldout_batch(trainer, 4)
    (part,) = batch.micro_batches
    if stage == "speech-encoder":
        output = trainer.model(part.mel_BTM, part.n_frames_B, mask_BT=part.mask_BT)
    else:
        output = trainer.model.loss(part.mel_BTM, part.n_frames_B, part.texts)
    assert output.n_terms == batch.n_terms > 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(stage: str, data: dict[str, Any], tmp_path: Path) -> None:
    """Evaluation, which one of the runs does often, draws masks and leaves no trace."""
    spectrogram = {} if stage == "speech-encoder" else {"augment": {"waveform": {}, "spectrogram": {}}}
    data["data"] |= spectrogram
    rarely, often = ({"output": str(tmp_path / name)} for name in ("whole", "stopped"))
    make_trainer(stage, data, **rarely).train()
    trainer = make_trainer(stage, data, **often, eval=data["eval"] | {"every": 1})
    trainer.stop_requested = False
    step = trainer.train_step

    def stopping(batch: Any) -> dict[str, float]:
        trainer.stop_requested = trainer.step == 1
        return step(batch)

    trainer.train_step = stopping  # type: ignore[method-assign]
    assert trainer.train() is None and trainer.step == 2
    make_trainer(stage, data, **often, eval=data["eval"] | {"every": 1}).train()
    keys = ("step", "loss", "grad_norm", "audio_hours")
    whole, stopped = (
        [[record[key] for key in keys] for record in read_log(tmp_path / name) if "loss" in record]
        for name in ("whole", "stopped")
    )
    assert whole == stopped and len(whole) == 4
    if stage == "speech-encoder":  # nothing changes its lengths
        assert whole[-1][-1] == pytest.approx(4 * sum(tenths for tenths, _ in SAID.values()) / 36000)


@pytest.mark.parametrize("stage", ["speech-ctc", "speech-align"])
def test_ctc_memorises_four_tones(stage: str, data: dict[str, Any], tmp_path: Path) -> None:
    data["data"]["window"] = 1
    data["optim"] |= {"steps": 90, "micro_batch_size": 4, "lr": {"encoder": 1e-2, "adapter": 1e-2, "head": 1e-2}}
    make_trainer(stage, data, log={"every": 1}).train()
    first, *_, last = read_log(tmp_path / "run")
    assert last["heldout/loss"] < 0.1 < 1.0 < first["loss"]
    assert last["heldout/wer"] == last["heldout/cer"] == 0.0 and last["heldout/exact"] == 1.0


def test_debug_ears_learn_to_listen(data: dict[str, Any], tmp_path: Path) -> None:
    """The answers become likely, and more so after the recording that they belong to than after another one."""
    data["data"]["window"] = 1
    data["optim"] |= {"steps": 150, "micro_batch_size": 4, "lr": {"encoder": 3e-3, "adapter": 1e-2, "new_tokens": 3e-2}}
    trainer = make_trainer("speech", data, log={"every": 1})
    with torch.no_grad():  # a random model of the usual small weights hardly passes on what it is given
        for parameter in trainer.model.lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    trainer.train()
    first, *_, last = read_log(tmp_path / "run")
    assert last["heldout/loss"] < 4.0 < 8.0 < first["loss"]

    def loss(order: tuple[int, ...]) -> float:
        samples = [trainer.objective.reader.prepare(raw) for raw in trainer.heldout]
        mels = [samples[i].mels for i in order]
        exchanged = [replace(sample, mels=mel) for sample, mel in zip(samples, mels, strict=True)]
        with torch.no_grad():
            batch = Collate(trainer.objective.reader, 4)(exchanged).micro_batches[0]
            return float(trainer.objective.loss(batch))

    assert loss((0, 1, 2, 3)) < 0.5 * loss((1, 2, 3, 0))


def test_the_stages_follow_each_other_through_their_scripts(
    data: dict[str, Any],
    librispeech: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """BEST-RQ -> CTC -> alignment -> speech, each from what the one before exported, on a folder of FLAC files."""
    source = {"path": str(librispeech), "format": "librispeech"}
    models = {
        "speech-encoder": MODELS["speech-encoder"],
        "speech-ctc": {"encoder": str(tmp_path / "speech-encoder" / "export")},
        "speech-align": {"lm": "debug", "speech": "debug", "encoder": str(tmp_path / "speech-ctc" / "export")},
        "speech": {"init_from": str(tmp_path / "speech-align" / "export")},
    }
    assert tuple(models) == STAGES
    for stage, model in models.items():
        asked = source | ({"task": "asr"} if stage == "speech" else {})
        changes = {"stage": stage, "model": model, "output": str(tmp_path / stage)}
        run = data | changes | {"data": {"sources": [asked], "heldout": [asked]}, "dtype": "bfloat16"}
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(run))
        script = f"mm.train.{stage.replace('-', '_')}"
        monkeypatch.setattr(sys, "argv", [script, "--config", str(path), "optim.steps=2"])
        runpy.run_module(script, run_name="__main__")
        assert f"exported {tmp_path / stage / 'export'}" in capsys.readouterr().out
    encoders = [load_file(tmp_path / stage / "export" / "encoder.safetensors") for stage in STAGES[:2]]
    aligned, model = (MultimodalLlama.from_pretrained(tmp_path / stage / "export") for stage in STAGES[2:])
    assert model.image_encoder is None
    for whole in (aligned, model):
        assert whole.speech_encoder is not None
        encoders.append(whole.speech_encoder.state_dict())
    for name in encoders[0]:
        for before, after in pairwise(encoder[name] for encoder in encoders):  # it went on, and not from anew
            assert not torch.equal(before, after) and (before - after).abs().max() < 0.01, name
    ids = torch.randint(256, (2, 11))
    frozen = load_llama("debug").bfloat16().float()  # as the run held it
    assert torch.equal(model.lm(ids), frozen(ids))


def test_ears_that_go_on_learn_new_tokens_and_keep_those_that_they_know(data: dict[str, Any], tmp_path: Path) -> None:
    model = MultimodalLlama.from_pretrained("debug")
    rare = model.config.lm.vocab_size - 1
    model.read_speech([rare])
    model.save_pretrained(tmp_path / "before")
    trainer = make_trainer("speech-align", data, model={"init_from": str(tmp_path / "before")})
    export = MultimodalLlama.from_pretrained(trainer.train())
    said = {token for raw in trainer.heldout for token in model.processor.chat.tokenizer.encode(spelling_of(raw))}
    assert export.speech_adapter is not None and export.speech_adapter.readout is not None
    assert set(export.speech_adapter.readout.token_ids.tolist()) == {rare} | said and len(said) > 1


def test_ears_are_given_to_a_model_with_eyes(data: dict[str, Any], tmp_path: Path) -> None:
    """The eyes and what they answer go into the export bit for bit, also from a run in bf16."""
    seeing = MultimodalLlama.from_pretrained("debug")
    seeing = MultimodalLlama.from_pretrained(without_ears(seeing, tmp_path / "seeing"))
    model = {"init_from": str(tmp_path / "seeing"), "speech": "debug"}
    trainer = make_trainer("speech", data, model=model, dtype="bfloat16")
    assert trainer.objective.gauges() == {}
    export = MultimodalLlama.from_pretrained(trainer.train())
    state = export.state_dict()
    eyes = {name: tensor for name, tensor in seeing.state_dict().items() if name.startswith("image_")}
    assert eyes and all(torch.equal(tensor, state[name]) for name, tensor in eyes.items())
    assert torch.equal(state["new_tokens.weight"][:1], seeing.state_dict()["new_tokens.weight"])


def without_ears(model: MultimodalLlama, directory: Path) -> Path:
    """Saves the eyes of a model that has both."""
    from mm.checkpoint import compose

    seeing = compose("debug", image="debug")
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in seeing.state_dict().items():
            tensor.copy_(own[name][: len(tensor)] if name.startswith("new_tokens") else own[name])
    seeing.save_pretrained(directory)
    return directory


# --- held-out data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_repeats_exactly_and_changes_nothing(stage: str, data: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(stage, data)
    state = torch.get_rng_state()
    scores = trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert trainer.evaluate() == scores
    known = {
        "speech-encoder": {"masked_accuracy"},
        "speech-ctc": {"exact", "wer", "cer"},
        "speech-align": {"exact", "wer", "cer"},
        "speech": {"wer", "cer"},
    }
    assert scores.keys() == {f"heldout/{name}" for name in {"loss"} | known[stage]}
    with Image.open(tmp_path / "run" / "samples" / "step_000000.png") as sheet:
        assert sheet.width >= len(SAID) * 100


def test_replies_are_scored_apart_from_transcripts(data: dict[str, Any], tmp_path: Path) -> None:
    question = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "I do not know."}]
    path = tmp_path / "mixed.tar"
    write_shard(path, [transcribed("a", 530), transcribed("b", 310, task="dialogue", conversations=question)])
    data["data"]["heldout"] = [{"path": str(path)}]
    assert make_trainer("speech", data).evaluate().keys() == {
        f"heldout/{name}" for name in ("loss", "wer", "cer", "exact")
    }


def test_recognition_scores() -> None:
    picture = Image.new("RGB", (1, 1))
    rows = [
        Shown(picture, "", "the red bus", "the red bus"),
        Shown(picture, "", "I have 2 cats", "i have two dogs"),
        Shown(picture, "", "um", "hello"),  # no words after Whisper's normaliser
    ]
    assert recognition_scores(rows, ["English"] * 3)["wer"] == pytest.approx(1 / 7)
    assert recognition_scores(rows, ["English", "German", "German"])["wer"] == pytest.approx((2 + 1) / 8)
    assert recognition_scores(rows[2:], ["English"]) == {}


def test_only_training_samples_are_varied(data: dict[str, Any]) -> None:
    slower = {"waveform": {"speeds": [0.5]}, "spectrogram": {"max_share": 0.2, "tempo": [0.5, 0.5]}}
    data["data"] |= {"window": 1, "augment": slower}
    for stage in STAGES[1:]:
        trainer = make_trainer(stage, data)
        reader, raw = trainer.objective.reader, trainer.heldout[0]
        log_mel = debug_model().processor.log_mel
        assert log_mel is not None
        plain = read_mel(raw.messages[0]["content"][0]["audio"], log_mel)

        def mel_of(sample: Any) -> torch.Tensor:
            return sample.mels[0] if hasattr(sample, "mels") else sample.mel_TM

        assert torch.equal(mel_of(reader.prepare(raw)), plain)
        varied = mel_of(reader.prepare(raw, augment=True))
        assert len(varied) == 4 * len(plain) and (varied == 0).all(0).any()  # slower, and with a band masked
        batch = next(iter(trainer.stream))
        parts = [part.n_frames_A if stage == "speech" else part.n_frames_B for part in batch.micro_batches]
        assert sorted(torch.cat(parts).tolist()) == sorted(40 * tenths for tenths, _ in SAID.values())
        assert math.isfinite(trainer.accumulate(batch))  # there are as many audio tokens as frames want


def test_bad_heldout_samples_are_left_out_at_the_start(
    data: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = transcribed("foreign", 530) | {"txt": "Straße"}
    path = tmp_path / "some.tar"
    write_shard(path, [transcribed("a", 310), foreign])
    data["data"]["heldout"] = [{"path": str(path)}]
    with caplog.at_level(logging.WARNING):
        assert [raw.key for raw in make_trainer("speech-ctc", data).heldout] == ["a"]
    assert "left out 1 samples" in caplog.text and "Straße" in caplog.text
    write_shard(path, [foreign])
    with pytest.raises(ValueError, match="none of its samples can be used"):
        make_trainer("speech-ctc", data)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_length_counts_audio_tokens_and_opens_nothing(data: dict[str, Any], speech_shard: Path) -> None:
    reader = make_trainer("speech", data).objective.reader
    name = f"{speech_shard} (chat)"
    for i, raw in enumerate(open_source(speech_shard, name=name)[i] for i in range(len(SAID))):
        sample = reader.prepare(raw)
        assert reader.length(raw) == len(sample.ids) - 1, (
            i
        )  # the recording's place in the text is counted for its two ends
        raw.messages[0]["content"][0]["audio"] = b"no recording"
        assert reader.length(raw) == len(sample.ids) - 1
        with pytest.raises(ValueError, match="audio"):
            reader.prepare(raw)


def test_a_bad_batch_is_saved_with_its_features(data: dict[str, Any], tmp_path: Path) -> None:
    for stage in STAGES:
        trainer = make_trainer(stage, data, output=str(tmp_path / stage))
        with torch.no_grad():
            next(iter(trainer.trained.values())).fill_(torch.nan)
        with pytest.raises(TrainingError, match="step 1: loss is nan"):
            trainer.train()
        saved = load_file(tmp_path / stage / "bad_batch_000001.safetensors")
        mels = [tensor for name, tensor in saved.items() if "mel" in name]
        assert len(mels) == 2 and all(mel.isfinite().all() and mel.shape[-1] == 80 for mel in mels)


def test_speech_without_a_mask_is_a_batch_without_a_loss(data: dict[str, Any]) -> None:
    model = MODELS["speech-encoder"] | {"best_rq": MODELS["speech-encoder"]["best_rq"] | {"mask_prob": 1e-6}}
    trainer = make_trainer("speech-encoder", data, model=model)
    assert trainer.train_step(next(iter(trainer.stream)))["loss"] == 0.0


# --- samples ----------------------------------------------------------------------------------------------------------


def raw_sample(caption: str | None, **metadata: Any) -> Sample:
    return Sample(key="k", source="s", messages=[], metadata=metadata, caption=caption)


def test_transcripts_are_spelt() -> None:
    assert spelling_of(raw_sample("The 2 CATS, don't \u2018purr\u2019!")) == "the two cats don't purr"
    assert spelling_of(raw_sample("What is 2 + 2?", transcript="what is two plus two")) == "what is two plus two"
    for bad, message in ((None, "no transcript"), ("Straße", "'Straße' cannot be spelt"), ("2 + 2", "cannot be spelt")):
        with pytest.raises(ValueError, match=message):
            spelling_of(raw_sample(bad))


def test_speech_that_is_too_fast_is_refused(data: dict[str, Any]) -> None:
    trainer = make_trainer("speech-ctc", data)
    raw = trainer.heldout[1]  # 0.5 s: 13 encoder frames
    raw.metadata["transcript"] = "eleven abcdx"
    assert trainer.objective.reader.prepare(raw).text == "eleven abcdx"
    raw.metadata["transcript"] = "eleven abcc x"  # one letter more, and a blank
    with pytest.raises(ValueError, match="50 mel frames are too few to spell 'eleven abcc x', which needs 56"):
        trainer.objective.reader.prepare(raw)


@pytest.mark.parametrize("stage", STAGES)
def test_samples_without_a_recording_are_refused(stage: str, data: dict[str, Any], colour_shard: Path) -> None:
    data["data"] |= {"sources": [{"path": str(colour_shard)}], "heldout": []}
    with pytest.raises(ValueError, match=r"20 samples of source .* are bad, the last one so: .*recording"):
        make_trainer(stage, data).train()


def test_recordings_without_a_question_or_a_reply_are_refused(
    data: dict[str, Any], librispeech: Path, tmp_path: Path
) -> None:
    for heldout, message in (
        ({"path": str(librispeech)}, "say what is asked by the source's `task`"),
        ({"path": str(tmp_path / "unanswered.tar")}, "no reply yet; see mm.train.dialogue_targets"),
    ):
        waiting = transcribed("q", 310, task="dialogue", conversations=[{"from": "human", "value": "<audio>"}])
        write_shard(tmp_path / "unanswered.tar", [waiting])
        data["data"]["heldout"] = [heldout]
        with pytest.raises(ValueError, match=message):
            make_trainer("speech", data)


def test_the_task_says_what_is_asked(data: dict[str, Any], librispeech: Path) -> None:
    source = {"path": str(librispeech)}
    tasks = {
        "asr": ({}, "Repeat after me in English:"),
        "translation": ({"language": "de"}, "Translate the following sentence into German:"),
        "dialogue": ({}, None),
    }
    for task, (more, prompt) in tasks.items():
        data["data"]["heldout"] = [source | {"task": task} | more]
        trainer = make_trainer("speech", data)
        texts = [part.get("text") for part in trainer.heldout[0].messages[0]["content"]]
        assert texts == [None] + ([prompt] if prompt else [])
        assert ("heldout/wer" in trainer.evaluate()) == (task == "asr")


# --- mistakes in the configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "model", "message"),
    [
        ("speech-encoder", {}, "give its preset as model.encoder"),
        ("speech-encoder", {"encoder": "somewhere/export"}, "preset 'somewhere/export' is unknown"),
        ("speech-encoder", {"encoder": "debug", "lm": "debug"}, "model.lm: stage speech-encoder does not read it"),
        (
            "speech-ctc",
            {"encoder": "debug", "best_rq": {"seed": 3}},
            "model.best_rq: stage speech-ctc does not read it",
        ),
        ("speech-ctc", {"encoder": "nowhere"}, "nowhere is neither a preset nor an export"),
        ("speech", {"lm": "debug"}, "give init_from, or lm together with speech"),
        ("speech", {"lm": "debug", "speech": "large"}, "model.speech: 'large' is unknown"),
        ("speech", {"init_from": "debug", "swap_lm": "debug"}, "model.swap_lm: stage speech does not read it"),
        (
            "speech",
            {"init_from": "debug", "encoder": "x"},
            "init_from brings a speech part, which was trained; leave encoder out",
        ),
        ("speech", {"init_from": "debug", "speech": "debug"}, "has a speech part already"),
        ("image-adapter", {"init_from": "debug", "speech": "debug"}, "model.speech: stage image-adapter does not"),
    ],
)
def test_mistakes_in_the_model_are_named(data: dict[str, Any], stage: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(stage, data, model=model)


@pytest.mark.parametrize(
    ("stage", "source", "more", "message"),
    [
        ("speech", {"task": "asm"}, {}, "task 'asm' of .* is unknown; choose one of asr, translation, dialogue"),
        ("speech", {"language": "Klingon"}, {}, "'Klingon' is not one of the 34"),
        ("speech", {"task": "translation"}, {}, "needs the language that is translated into"),
        ("speech", {"format": "kaldi"}, {}, "format: 'kaldi' is unknown"),
        ("speech", {"style": "plain"}, {}, "needs style: chat"),
        ("speech", {"image_folder": "x"}, {}, "image_folder of .*: stage speech does not read it"),
        ("speech-ctc", {"task": "asr"}, {}, "task of .*: stage speech-ctc does not read it"),
        ("speech-encoder", {}, {"augment": {"waveform": {}}}, "data.augment: stage speech-encoder does not vary"),
        ("speech-ctc", {}, {"augment": {"spectrogram": {"max_bin": 3}}}, "did you mean 'max_bins'"),
        ("speech-ctc", {}, {"tile_size": 42}, "data.tile_size: stage speech-ctc does not read it"),
        ("image-adapter", {"format": "nemo"}, {}, "format of .*: stage image-adapter does not read it"),
    ],
)
def test_mistakes_in_the_data_are_named(
    data: dict[str, Any], stage: str, source: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    data["data"] |= {"sources": [data["data"]["sources"][0] | source]} | more
    with pytest.raises(ValueError, match=message):
        make_trainer(stage, data, model=MODELS.get(stage, {"init_from": "debug"}))


def test_an_encoder_of_another_kind_or_shape_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    seeing = debug_model().image_encoder
    assert seeing is not None
    save_encoder(seeing, tmp_path / "image")
    with pytest.raises(ValueError, match="unknown key"):
        make_trainer("speech-ctc", data, model={"encoder": str(tmp_path / "image")})
    save_encoder(Conformer(PRESETS["debug"]()), tmp_path / "speech")
    config = tmp_path / "speech" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"left_chunks": 3}))
    with pytest.raises(ValueError, match="left_chunks 3, this model 1"):
        load_encoder(tmp_path / "speech", Conformer(PRESETS["debug"]()))


def test_a_model_without_ears_cannot_train_them(data: dict[str, Any], tmp_path: Path) -> None:
    seeing = without_ears(debug_model(), tmp_path / "seeing")
    with pytest.raises(ValueError, match=r"has no speech part; name a new one as model\.speech"):
        make_trainer("speech", data, model={"init_from": str(seeing)})
    assert give(MultimodalLlama.from_pretrained(seeing), "speech", "debug").speech_encoder is not None


# --- replies to spoken questions --------------------------------------------------------------------------------------


@dataclass
class Speaker:
    """Answers by table; remembers how many questions came together."""

    answers: dict[str, tuple[str, str]]
    batches: list[int]

    def generate(self, prompts: list[str], *, max_new_tokens: int) -> list[Generation]:
        assert max_new_tokens == 64
        self.batches.append(len(prompts))
        return [Generation(text, [], reason) for text, reason in (self.answers[prompt] for prompt in prompts)]


def test_dialogues_get_the_replies_of_the_language_model(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {
        "Is it hot?": ("It is.", "stop"),
        "Why?": ("Because. There are 2. And so", "length"),
        "Who?": ("The man that", "length"),
    }
    turns = [{"from": "human", "value": "<audio>"}]
    waiting = [
        transcribed(f"q{i}", 310, task="dialogue", conversations=turns, answer=None) | {"txt": text}
        for i, text in enumerate(asked)
    ]
    folder, out = tmp_path / "shards", tmp_path / "replies"
    folder.mkdir()
    write_shard(folder / "train-dialogue-0000.tar", [transcribed("a", 530), *waiting])
    speaker = Speaker(asked, [])
    monkeypatch.setattr(MultimodalLlama, "from_pretrained", lambda source, device: speaker)
    command = ["--lm", "debug", "--shards", str(folder), "--out", str(out), "--batch-size", "2"]
    dialogue_targets.main(command)
    assert "wrote 1 shards" in (said := capsys.readouterr().out) and "1 questions without a whole sentence" in said
    before, after = (open_source(path, name="s") for path in (folder, out))
    assert [after[i].key for i in range(len(after))] == ["a", "q0", "q1"] and speaker.batches == [2, 1]
    assert after[0] == before[0]
    for i, reply in ((1, "It is."), (2, "Because.")):
        assert after[i].messages[:-1] == before[i].messages and after[i].metadata["answer"] is None
        assert after[i].messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    written = (out / "train-dialogue-0000.tar").read_bytes()
    dialogue_targets.main(command)  # finished shards are kept
    assert "wrote 0 shards" in capsys.readouterr().out and len(speaker.batches) == 2
    (out / "train-dialogue-0000.tar").unlink()
    dialogue_targets.main(command)
    assert (out / "train-dialogue-0000.tar").read_bytes() == written
    data["data"]["heldout"] = [{"path": str(out)}]
    monkeypatch.undo()
    assert len(make_trainer("speech", data).heldout) == 3  # what was written is what training reads


def test_replies_are_greedy_and_do_not_depend_on_the_batch() -> None:
    model = debug_model()
    samples = [transcribed(str(i), 310, task="dialogue", conversations=[{"from": "human"}]) for i in range(3)]
    samples = [sample | {"txt": text.encode()} for sample, text in zip(samples, ("Why?", "How so?", "Go"), strict=True)]
    replies = dialogue_targets._replies(model, samples, 9, 2)
    for sample in samples:
        alone = model.generate(sample["txt"].decode(), max_new_tokens=9)
        expected = alone.text if alone.reason == "stop" else dialogue_targets.whole_sentences(alone.text)
        assert replies[sample["__key__"]] == (expected.strip() or None)


def test_whole_sentences() -> None:
    cut = dialogue_targets.whole_sentences
    assert cut('He said "no!" Then he le') == 'He said "no!"'
    assert cut("Do this: 1. Eat. 2. Sleep") == "Do this: 1. Eat."
    assert cut("It costs 3.5 or so") == ""


def test_replies_need_another_folder_and_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.tar"
    question = transcribed("q", 310, task="dialogue", conversations=[{"from": "human", "value": "<audio>"}])
    write_shard(path, [{name: value for name, value in question.items() if name != "txt"}])
    for out, message in ((tmp_path, "give another folder"), (tmp_path / "out", "dialogue 'q' has no text")):
        with pytest.raises(SystemExit):
            dialogue_targets.main(["--lm", "debug", "--shards", str(path), "--out", str(out)])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "q.tar").exists()


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_a_spectrogram_is_drawn_with_low_notes_at_the_bottom_and_hidden_frames_pale() -> None:
    mel_TM = torch.full((50, 80), -2.0)
    mel_TM[:, :20] = 3.0
    hidden_T = torch.arange(50) >= 25
    picture = mel_picture(mel_TM, hidden_T).convert("L")
    assert picture.size == MEL_SIZE
    width, height = MEL_SIZE
    top, bottom = (picture.getpixel((width // 4, y)) for y in (4, height - 4))
    assert bottom > 200 > 30 > top
    assert picture.getpixel((3 * width // 4, 4)) > 190  # hidden
