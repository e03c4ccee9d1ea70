"""Stages that learn from clips: that they learn, change nothing but the video part, hand on, and keep frozen features."""

from __future__ import annotations

import io
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.shards import open_source, write_shard
from lm.checkpoint import load_llama
from mm.checkpoint import compose, debug_model
from mm.config import from_mapping
from mm.model import MultimodalLlama
from mm.train import next_token
from mm.train.config import TrainConfig, default_path, load_config
from mm.train.feature_cache import FeatureCache
from mm.train.grounding import CHOSEN, mentions
from mm.train.run_log import read_log
from mm.train.start import load_model
from mm.train.trainer import Collate, Trainer, TrainingError

STAGES = ("video", "video-sft")
COLOURS = {"red": (220, 30, 30), "blue": (30, 40, 220), "green": (30, 190, 40)}
#: What is shown one after the other, for how many frames, and in which size; the first two differ in order alone.
SHOWN = {
    "red blue": (7, (32, 36)),
    "blue red": (7, (32, 36)),
    "green red": (3, (60, 38)),
    "blue green": (5, (38, 64)),
}


def encode_clip(colours: str, n_frames: int, size: tuple[int, int]) -> bytes:
    """An MP4 whose frames are plain, half of them of each colour."""
    first, second = (COLOURS[name] for name in colours.split())
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=5)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(n_frames):
            pixels = np.empty((size[1], size[0], 3), np.uint8)
            pixels[:] = first if 2 * i < n_frames else second
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def clip_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = []
    for colours, (n_frames, size) in SHOWN.items():
        turns = [{"from": "human", "value": "<video>\nColours?"}, {"from": "gpt", "value": colours}]
        clip = encode_clip(colours, n_frames, size)
        key = colours.replace(" ", "-")
        samples.append({"__key__": key, "mp4": clip, "txt": colours, "json": {"conversations": turns}})
    path = tmp_path_factory.mktemp("clips") / "colours.tar"
    write_shard(path, samples)
    return path


@pytest.fixture(scope="module")
def fact_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips, asked which colour comes first, and what is true of each."""
    samples = []
    for colours, (n_frames, size) in SHOWN.items():
        first, second = colours.split()
        questions = {"Colours?": colours, f"Which is first, {min(first, second)} or {max(first, second)}?": first}
        said = [text for pair in questions.items() for text in pair]
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
        turns[0]["value"] = "<video>\n" + turns[0]["value"]
        facts = {first: {"turn": "first"}, second: {"turn": "second"}}
        clip = encode_clip(colours, n_frames, size)
        key = colours.replace(" ", "-")
        samples.append({"__key__": key, "mp4": clip, "txt": colours, "json": {"conversations": turns, "facts": facts}})
    path = tmp_path_factory.mktemp("facts") / "colours.tar"
    write_shard(path, samples)
    return path


@pytest.fixture
def facts(data: dict[str, Any], fact_shard: Path) -> dict[str, Any]:
    """A small run that learns from facts."""
    data["data"] |= {key: [{"path": str(fact_shard)}] for key in ("sources", "heldout")}
    data["optim"]["lr"] = {"adapter": 1e-3, "head": 1e-3, "gates": 1e-2}
    return data


@pytest.fixture
def data(clip_shard: Path, tmp_path: Path) -> dict[str, Any]:
    """A small, complete run but for its stage, as plain data that a test may change."""
    return {
        "output": str(tmp_path / "run"),
        "model": {"init_from": "debug"},
        "data": {"sources": [{"path": str(clip_shard)}], "heldout": [{"path": str(clip_shard)}], "window": 2},
        "optim": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lr": {"adapter": 1e-3, "new_tokens": 1e-3, "gates": 1e-2},
        },
        "eval": {"every": 100, "samples": 4, "pictures": 3, "max_new_tokens": 3},
        "checkpoint": {"every": 100},
    }


def make_trainer(run: dict[str, Any], stage: str = "video", **changes: Any) -> Trainer:
    return Trainer(from_mapping(TrainConfig, run | {"stage": stage} | changes))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainer.trained.items() if p.grad is not None}


def assert_video_goes_on(run: dict[str, Any], warmed: Trainer, export: Path | None, name: str) -> None:
    """Stage video starts from what a warm start exported, of which one tensor is looked at."""
    rates = {"adapter": 1e-3, "new_tokens": 1e-3, "gates": 1e-3}
    config = run | {"output": run["output"] + "-video", "model": {"init_from": str(export)}}
    after = make_trainer(config | {"optim": run["optim"] | {"lr": rates}}).model.state_dict()
    assert torch.equal(after[name], warmed.objective.whole.state_dict()[name])


def heldout_batch(trainer: Trainer, size: int = 4) -> Any:
    reader = trainer.objective.reader
    return Collate(reader, size)([reader.prepare(raw) for raw in trainer.heldout])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_all_that_trains_and_nothing_else(stage: str, data: dict[str, Any]) -> None:
    trainer = make_trainer(data, stage)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.accumulate(next(iter(trainer.stream)))
    assert {name for name, grad in gradients(trainer).items() if grad.abs().max() > 0} == set(trainer.trained)
    assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)
    trainer.optimizer.step()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainer.trained)
    assert {name.partition(".")[0] for name in changed} == {"video_adapter", "new_tokens"}
    moved = (trainer.model.new_tokens.weight != before["new_tokens.weight"]).any(1).nonzero()[:, 0]
    assert moved.tolist() == [trainer.model.config.media_ids["video"] - trainer.model.config.lm.vocab_size]


@pytest.mark.parametrize("stage", ["video-align", "video-ground", "video"])
def test_the_cut_into_micro_batches_changes_nothing(stage: str, facts: dict[str, Any]) -> None:
    facts["optim"]["lr"]["new_tokens"] = 1e-3
    trainer = make_trainer(facts, stage)
    whole = trainer.accumulate(heldout_batch(trainer))
    expected = {name: grad.clone() for name, grad in gradients(trainer).items()}
    for size in (1, 3):
        trainer.optimizer.zero_grad()
        assert trainer.accumulate(heldout_batch(trainer, size)) == pytest.approx(whole, rel=1e-6)
        error = torch.cat([(grad - expected[name]).flatten() for name, grad in gradients(trainer).items()]).norm()
        assert error <= 1e-5 * torch.cat([grad.flatten() for grad in expected.values()]).norm()


def test_debug_model_memorises_clips_of_which_two_differ_in_order_alone(data: dict[str, Any], tmp_path: Path) -> None:
    sources = [data["data"]["sources"][0] | {"style": "plain"}]
    data["data"] |= {"sources": sources, "heldout": sources, "window": 1, "feature_cache": str(tmp_path / "features")}
    data["optim"] |= {"steps": 80, "micro_batch_size": 4, "lr": {"adapter": 2e-2, "new_tokens": 2e-2, "gates": 2e-2}}
    data |= {"eval": {"every": 1000, "samples": 4, "pictures": 4, "max_new_tokens": 12}}
    export = make_trainer(data).train()
    first, *_, last = read_log(tmp_path / "run")
    assert last["heldout/exact"] == 1.0 and last["heldout/loss"] < 2.0 < 4.0 < first["loss"]
    assert "gates/attn.3" in first
    with Image.open(tmp_path / "run" / "samples" / "step_000080.png") as sheet:
        assert sheet.width >= 4 * 100
    model = MultimodalLlama.from_pretrained(export)
    for colours, (n_frames, size) in SHOWN.items():
        clip = encode_clip(colours, n_frames, size)
        assert model.generate(video=clip, style="plain", max_new_tokens=12).text == colours


def test_captions_as_sets_of_words_train_the_aggregator_and_nothing_that_stays_but_it(data: dict[str, Any]) -> None:
    data["optim"]["lr"] = {"adapter": 1e-3, "head": 1e-3}
    trainer = make_trainer(data, "video-align")
    before = {name: tensor.clone() for name, tensor in trainer.objective.whole.state_dict().items()}
    for _ in range(2):  # the last layer of the head starts as nothing
        trainer.train_step(next(iter(trainer.stream)))
    changed = {n for n, t in trainer.objective.whole.state_dict().items() if not torch.equal(t, before[n])}
    frames = {n for n in before if n.startswith(("video_adapter.projection.", "video_adapter.aggregator."))}
    assert changed == frames
    assert set(trainer.trained) == frames | {n for n, _ in trainer.model.named_parameters() if n.startswith("head.")}


def test_a_debug_model_tells_the_words_of_four_captions_and_video_goes_on_from_there(
    data: dict[str, Any], tmp_path: Path
) -> None:
    data["data"] |= {"window": 1, "feature_cache": str(tmp_path / "features")}
    data["optim"] |= {"steps": 60, "micro_batch_size": 4, "lr": {"adapter": 1e-2, "head": 1e-2}}
    data |= {"eval": {"every": 1000, "samples": 4, "pictures": 4}}
    trainer = make_trainer(data, "video-align")
    assert sorted(trainer.objective.words) == ["blue", "green", "red"]
    export = trainer.train()
    first, *_, last = read_log(tmp_path / "run")
    assert last["heldout/words"] == 1.0 and last["heldout/loss"] < 0.3 < 1.5 < first["loss"]
    with Image.open(tmp_path / "run" / "samples" / "step_000060.png") as sheet:
        assert sheet.width >= 4 * 100
    assert_video_goes_on(data, trainer, export, "video_adapter.aggregator.layers.0.mlp.up_proj.weight")


def test_words_need_captions_and_one_clip(data: dict[str, Any], clip_shard: Path, tmp_path: Path) -> None:
    data["optim"]["lr"] = {"adapter": 1e-3, "head": 1e-3}
    reader = make_trainer(data, "video-align").objective.reader
    raw = open_source(str(clip_shard), name="clips")[0]
    with pytest.raises(ValueError, match="has no caption"):
        reader.prepare(replace(raw, caption=None))
    with pytest.raises(ValueError, match="the sample has 2 clips; this stage learns from samples with one"):
        reader.prepare(replace(raw, messages=[*raw.messages, *raw.messages]))
    clip = next(part["video"] for part in raw.messages[0]["content"] if part["type"] == "video")
    write_shard(tmp_path / "mute.tar", [{"__key__": "a", "mp4": clip}])
    mute = {"path": str(tmp_path / "mute.tar")}
    with pytest.raises(ValueError, match=r"data.sources: no sample has a caption \(.txt\)"):
        make_trainer(data | {"data": {"sources": [mute], "heldout": [mute]}}, "video-align")


def test_facts_train_what_leads_to_the_first_block_and_nothing_that_stays_but_it(facts: dict[str, Any]) -> None:
    trainer = make_trainer(facts, "video-ground")
    before = {name: tensor.clone() for name, tensor in trainer.objective.whole.state_dict().items()}
    trainer.train_step(next(iter(trainer.stream)))
    changed = {n for n, t in trainer.objective.whole.state_dict().items() if not torch.equal(t, before[n])}
    first = f"video_adapter.blocks.{trainer.objective.whole.video_adapter.config.layers[0]}."
    learns = {n for n in before if n.startswith(("video_adapter.projection.", "video_adapter.aggregator.", first))}
    assert changed == learns
    assert set(trainer.trained) == learns | {n for n, _ in trainer.model.named_parameters() if n.startswith("head.")}


def test_the_readout_sees_what_the_whole_model_has_at_that_place(facts: dict[str, Any]) -> None:
    """State after the block at the last token of a name, though the rest of the model never ran."""
    trainer = make_trainer(facts, "video-ground")
    whole, reader = trainer.objective.whole.eval(), trainer.objective.reader
    batch = reader.collate([reader.prepare(raw) for raw in trainer.heldout])
    seen: list[torch.Tensor] = []
    trainer.model.head.norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        trainer.objective.loss(batch)
        media, position_BT = whole.encode_media(batch.questions), batch.questions.valid_BT.cumsum(1) - 1
        position_BT = torch.where(batch.questions.valid_BT, position_BT, -1)
        (layer, *_) = whole.video_adapter.config.layers
        adapters = whole.adapters(media, position_BT)
        h_BTD = whole.lm.hidden(
            whole.embed(batch.questions.ids_BT), valid_BS=batch.questions.valid_BS, adapters=adapters, n_layers=layer
        )
        h_BTD = adapters[layer](h_BTD)
    row_N, token_N, _ = batch.fact_N3.unbind(1)
    torch.testing.assert_close(seen[0], h_BTD[row_N, token_N])
    tokenizer = whole.tokenizer
    assert tokenizer is not None
    ids = [batch.questions.ids_BT[row, : token + 1].tolist() for row, token in zip(row_N, token_N, strict=True)]
    assert {tokenizer.decode(row[-6:]).split()[-1] for row in ids} == {"red", "blue", "green"}


def test_a_debug_model_finds_which_colour_comes_first_and_video_goes_on_from_there(
    facts: dict[str, Any], tmp_path: Path
) -> None:
    facts["data"] |= {"window": 1, "feature_cache": str(tmp_path / "features")}
    facts["optim"] |= {"steps": 60, "micro_batch_size": 4, "lr": {"adapter": 1e-2, "head": 1e-2, "gates": 2e-2}}
    facts |= {"eval": {"every": 1000, "samples": 4, "pictures": 4}}
    trainer = make_trainer(facts, "video-ground")
    assert trainer.objective.values == [(CHOSEN, "no"), (CHOSEN, "yes"), ("turn", "first"), ("turn", "second")]
    export = trainer.train()
    first, *_, last = read_log(tmp_path / "run")
    assert last["heldout/facts"] == 1.0 and last["heldout/facts, turn"] == 1.0
    assert last["heldout/loss"] < 0.3 < 0.6 < first["loss"] and "gates/attn.3" in first
    with Image.open(tmp_path / "run" / "samples" / "step_000060.png") as sheet:
        assert sheet.width >= 4 * 100
    assert_video_goes_on(facts, trainer, export, "video_adapter.blocks.3.cross_attn.q_proj.weight")


def test_mentions_are_whole_names_and_say_whether_the_answer_is_theirs() -> None:
    known = {"star": {"deed": "grows"}, "red star": {"deed": "moves left", "pace": "slower"}}
    said = list(mentions("Is the red star faster than the star, or the starfish?", "faster", known))
    assert [(mention.end, dict(mention.values)) for mention in said] == [
        (15, known["red star"]),
        (36, known["star"]),
    ]
    said = list(mentions("Which is faster, the star or the red star?", "red star", known))
    assert [dict(mention.values)[CHOSEN] for mention in said] == ["no", "yes"]
    assert all(CHOSEN not in dict(mention.values) for mention in mentions("What does the star do?", "star", known))
    assert list(mentions("What happens?", "star", known)) == []


def test_facts_are_refused_where_there_are_none_or_no_question_asks(
    facts: dict[str, Any], fact_shard: Path, clip_shard: Path
) -> None:
    reader = make_trainer(facts, "video-ground").objective.reader
    raw = open_source(str(fact_shard), name="clips")[0]
    wrong = {
        r'has no "facts"': None,
        '"facts" must be like': {"red": "first"},
        "no question mentions": {"drum": {"a": "b"}},
    }
    for message, said in wrong.items():
        with pytest.raises(ValueError, match=message):
            reader.prepare(replace(raw, metadata=raw.metadata | {"facts": said}))
    mute = [{"path": str(clip_shard)}]
    with pytest.raises(ValueError, match=r'data\.sources: no sample has "facts"'):
        make_trainer(facts | {"data": {"sources": mute, "heldout": mute}}, "video-ground")


@pytest.mark.parametrize("stage", ["video-align", "video-ground", "video"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(stage: str, facts: dict[str, Any], tmp_path: Path) -> None:
    """Also where one run finds all features on disk, and the other makes them."""
    data = facts | {"optim": facts["optim"] | {"lr": facts["optim"]["lr"] | {"new_tokens": 1e-3}}}
    cached = data["data"] | {"feature_cache": str(tmp_path / "features")}
    whole, stopped = ({"output": str(tmp_path / name), "data": cached} for name in ("whole", "stopped"))
    make_trainer(data, stage, **whole).train()
    trainer = make_trainer(data, stage, **stopped)
    step = trainer.train_step

    def stopping(batch: Any) -> dict[str, float]:
        trainer.stop_requested = trainer.step == 1
        return step(batch)

    trainer.train_step = stopping  # type: ignore[method-assign]
    assert trainer.train() is None and trainer.step == 2
    make_trainer(data, stage, **stopped).train()
    keys = ("step", "loss", "grad_norm")
    logs = [
        [[record[key] for key in keys] for record in read_log(tmp_path / name) if "loss" in record]
        for name in ("whole", "stopped")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_the_stages_follow_each_other_through_their_scripts(
    data: dict[str, Any], clip_shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with eyes -> video -> video-sft, which takes a finetuned image part with larger tiles, and more frames."""
    torch.manual_seed(0)
    seeing, finetuned = compose("debug", image="debug"), compose("debug", image="debug")
    with torch.no_grad():
        for model in (seeing, finetuned):
            for parameter in (*model.image_encoder.parameters(), *model.image_adapter.parameters()):
                parameter.normal_(std=0.1)
    finetuned.resize_tiles(42)
    for name, model in (("seeing", seeing), ("finetuned", finetuned)):
        model.save_pretrained(tmp_path / name)
    plain = {"path": str(clip_shard), "style": "plain"}
    stages: dict[str, dict[str, Any]] = {
        "video": {
            "model": {"init_from": str(tmp_path / "seeing"), "video": "debug", "open_gates": 0.5},
            "data": {"sources": [plain], "heldout": [plain], "max_frames": 5, "factor": 3},
            "dtype": "bfloat16",
        },
        "video-sft": {
            "model": {
                "init_from": str(tmp_path / "video"),
                "swap_lm": "debug",
                "swap_image": str(tmp_path / "finetuned"),
            },
            "data": data["data"] | {"max_frames": 7, "factor": 6},
        },
    }
    stages["video-sft"]["model"]["init_from"] += "/export"
    for stage, changes in stages.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(data | changes | {"stage": stage, "output": str(tmp_path / stage)}))
        script = f"mm.train.{stage.replace('-', '_')}"
        monkeypatch.setattr(sys, "argv", [script, "--config", str(path), "optim.steps=2"])
        runpy.run_module(script, run_name="__main__")
    first, second = (MultimodalLlama.from_pretrained(tmp_path / stage / "export") for stage in STAGES)
    for model, eyes in ((first, seeing), (second, finetuned)):
        state = model.state_dict()
        kept = {name: tensor for name, tensor in eyes.state_dict().items() if name.startswith("image_")}
        assert kept and all(torch.equal(state[name], tensor) for name, tensor in kept.items())
        assert torch.equal(state["new_tokens.weight"][:1], eyes.state_dict()["new_tokens.weight"])
        assert state["new_tokens.weight"][1].abs().max() > 0
    video = second.config.video
    assert video is not None and first.config.video is not None
    assert (first.config.video.max_frames, first.config.video.adapter.aggregator.factor) == (5, 3)
    assert (video.max_frames, video.adapter.aggregator.factor) == (7, 6)
    assert second.config.image.encoder.tile_size == 42 and video.adapter.aggregator.n_tokens == 10
    before, after = first.state_dict(), second.state_dict()
    name = "video_adapter.aggregator.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name]) and (before[name] - after[name]).abs().max() < 0.01
    ids = torch.randint(256, (2, 11))
    assert torch.equal(second.lm(ids), load_llama("debug")(ids))


def test_short_rows_learn_the_same_by_another_kernel(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    decode = MultimodalLlama.decode
    monkeypatch.setattr(
        MultimodalLlama,
        "decode",
        lambda *a, **k: used.append(torch.backends.cuda.flash_sdp_enabled()) or decode(*a, **k),
    )
    trainers = [make_trainer(data), make_trainer(data)]
    losses = []
    for trainer, longest in zip(trainers, (next_token.SHORT_ROW, 0), strict=True):
        monkeypatch.setattr(next_token, "SHORT_ROW", longest)
        losses.append(trainer.accumulate(heldout_batch(trainer)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and set(used) == {True, False}
    expected = gradients(trainers[1])
    for name, grad in gradients(trainers[0]).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


# --- frozen features --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", debug_model().eval().image_encoder)


def count_calls(module: torch.nn.Module) -> list[int]:
    """How many frames each call of an encoder gets, from now on."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def files_of(cache: FeatureCache) -> list[Path]:
    return sorted(cache.directory.rglob("*"))


def test_the_encoder_sees_every_clip_once(data: dict[str, Any], tmp_path: Path) -> None:
    """The loss is that without a cache, to the rounding of the features, and bit for bit the same in every epoch."""
    plain = make_trainer(data)
    uncached = plain.accumulate(heldout_batch(plain))
    trainer = make_trainer(data, data=data["data"] | {"feature_cache": str(tmp_path / "features")})
    calls = count_calls(trainer.model.image_encoder)
    first = trainer.accumulate(heldout_batch(trainer))
    assert calls == [2] * len(SHOWN)  # of a clip's frames no two are different but those of two colours
    assert first == pytest.approx(uncached, rel=1e-4)
    expected = {name: grad.clone() for name, grad in gradients(plain).items()}
    error = torch.cat([(grad - expected[name]).flatten() for name, grad in gradients(trainer).items()]).norm()
    assert error <= 1e-2 * torch.cat([grad.flatten() for grad in expected.values()]).norm()
    trainer.optimizer.zero_grad()
    assert trainer.accumulate(heldout_batch(trainer)) == first and len(calls) == 4
    trainer.train_step(next(iter(trainer.stream)))
    trainer.accumulate(heldout_batch(trainer, 1))
    again = make_trainer(data, data=data["data"] | {"feature_cache": str(tmp_path / "features")})
    later = count_calls(again.model.image_encoder)
    assert again.accumulate(heldout_batch(again)) == first and not later and len(calls) == 4


def test_features_are_the_encoders_in_half_precision_whatever_else_is_in_the_batch(
    cache: FeatureCache, data: dict[str, Any]
) -> None:
    (batch,) = heldout_batch(make_trainer(data)).micro_batches
    features = cache(batch.clips)
    with torch.no_grad():
        expected = cache.encoder(batch.clips.frames)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)
    assert features.dtype == torch.float32 and torch.equal(features, features.half().float())
    for path in files_of(cache):
        path.unlink()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [cache(part.clips) for part in heldout_batch(make_trainer(data), 1).micro_batches]
    for part, whole in zip(parts, features.split(batch.clips.n_frames_V.tolist()), strict=True):
        assert torch.equal(part, whole[:, : part.shape[1]]) and not whole[:, part.shape[1] :].any()


@pytest.mark.parametrize("harm", ["cut short", "a bit turned", "emptied"])
def test_a_broken_entry_is_made_anew(cache: FeatureCache, data: dict[str, Any], harm: str) -> None:
    (batch,) = heldout_batch(make_trainer(data)).micro_batches
    features = cache(batch.clips)
    before = {path: path.read_bytes() for path in files_of(cache)}
    assert len(before) == 4 and all(path.suffix == ".safetensors" for path in before)
    path, content = next(iter(before.items()))
    turned = bytearray(content)
    turned[-9] ^= 16
    path.write_bytes({"cut short": content[:-9], "a bit turned": bytes(turned), "emptied": b""}[harm])
    calls = count_calls(cache.encoder)
    assert torch.equal(cache(batch.clips), features) and len(calls) == 1
    assert {path: path.read_bytes() for path in files_of(cache)} == before


def test_other_frames_tiles_or_weights_are_other_entries(data: dict[str, Any], tmp_path: Path) -> None:
    def entries(**changes: Any) -> set[Path]:
        changes |= {"feature_cache": str(tmp_path / "features")}
        trainer = make_trainer(data, data=data["data"] | changes)
        trainer.accumulate(heldout_batch(trainer))
        return {path for path in (tmp_path / "features").rglob("*") if path.is_file()}

    counts = [len(entries()), len(entries()), len(entries(max_frames=4)), len(entries(tile_size=42))]
    assert counts == [4, 4, 7, 11]  # one of the clips has three frames and stays as it is
    encoder = debug_model().image_encoder
    with torch.no_grad():
        encoder.class_embedding[3] += 1e-6
    directories = {path.parent for path in entries()}
    assert FeatureCache(tmp_path / "features", encoder).directory not in directories


# --- samples, drawing, configuration ----------------------------------------------------------------------------------


def test_samples_without_a_clip_are_refused(data: dict[str, Any], colour_shard: Path) -> None:
    data["data"] |= {"sources": [{"path": str(colour_shard)}], "heldout": []}
    with pytest.raises(ValueError, match=r"20 samples of source .* are bad, the last one so: the sample has no clip"):
        make_trainer(data).train()


def test_longer_samples_than_max_tokens_are_refused(data: dict[str, Any]) -> None:
    data["data"]["max_tokens"] = 30
    with pytest.raises(ValueError, match=r"none of its samples can be used; the first: .* more than max_tokens 30"):
        make_trainer(data)


def test_a_bad_batch_is_saved_with_its_frames(data: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(data)
    with torch.no_grad():
        next(iter(trainer.trained.values())).fill_(torch.nan)
    with pytest.raises(TrainingError, match="step 1: loss is nan"):
        trainer.train()
    saved = load_file(tmp_path / "run" / "bad_batch_000001.safetensors")
    for i in (0, 1):
        n_frames_V, tiles = saved[f"{i}.clips.n_frames_V"], saved[f"{i}.clips.frames.tiles_PNCHW"]
        assert len(n_frames_V) == 2 and n_frames_V.sum() == len(tiles) and tiles.isfinite().all()


def test_a_video_part_may_start_from_the_image_part(data: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    seeing = compose("debug", image="debug")
    with torch.no_grad():
        for parameter in (*seeing.image_encoder.parameters(), *seeing.image_adapter.parameters()):
            parameter.normal_(std=0.1)
    seeing.save_pretrained(tmp_path / "seeing")
    source = {"init_from": str(tmp_path / "seeing"), "video": "debug", "from_image": True}
    model = load_model(from_mapping(TrainConfig, data | {"stage": "video-sft", "model": source}))
    for layer, block in model.video_adapter.layer_blocks():
        eyes = model.image_adapter.blocks[str(layer)]
        assert torch.equal(block.cross_attn.q_proj.weight, eyes.cross_attn.q_proj.weight)
        assert torch.equal(block.cross_attn_attn_gate, eyes.cross_attn_attn_gate) and block.cross_attn_attn_gate.any()
    assert not model.video_adapter.aggregator.latents.any()


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("video", {"model": {}}, "model: give init_from$"),
        ("video", {"model": {"lm": "debug"}}, "model.lm: stage video does not read it"),
        ("video", {"model": {"init_from": "debug", "video": "debug"}}, "video: this model has a video part already"),
        ("video", {"model": {"init_from": "debug", "video": "large"}}, "model.video: 'large' is unknown"),
        (
            "video",
            {"model": {"init_from": "debug", "open_gates": 0.5}},
            "init_from brings a video part, which was trained",
        ),
        (
            "video-sft",
            {"model": {"init_from": "debug", "from_image": True}},
            "model.from_image: init_from brings a video part, which was trained",
        ),
        (
            "video",
            {"model": {"init_from": "debug", "video": "debug", "from_image": True, "open_gates": 0.5}},
            "the gates come from the image part; leave open_gates out",
        ),
        ("video", {"model": {"init_from": "debug", "swap_lm": "debug"}}, "finetuning swaps it"),
        ("video", {"model": {"init_from": "debug", "swap_image": "debug"}}, "finetuning swaps it"),
        ("image-sft", {"model": {"init_from": "debug", "video": "debug"}}, "model.video: stage image-sft does not"),
    ],
)
def test_mistakes_in_the_model_are_named(
    data: dict[str, Any], stage: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(data, stage, **changes)


@pytest.mark.parametrize("key", ["max_frames", "factor", "feature_cache"])
def test_keys_of_clips_are_for_clips(data: dict[str, Any], key: str) -> None:
    data["data"][key] = "x" if key == "feature_cache" else 3
    with pytest.raises(ValueError, match=f"data.{key}: stage image-adapter does not read it"):
        make_trainer(data, "image-adapter")


@pytest.mark.parametrize("key", ["max_frames", "factor", "max_tokens"])
def test_counts_are_positive(data: dict[str, Any], key: str) -> None:
    data["data"][key] = 0
    with pytest.raises(ValueError, match=f"data.{key} must be at least 1, got 0"):
        make_trainer(data)


def test_a_model_without_a_video_part_cannot_train_it(data: dict[str, Any], tmp_path: Path) -> None:
    compose("debug", image="debug").save_pretrained(tmp_path / "seeing")
    with pytest.raises(ValueError, match=r"has no video part; name a new one as model\.video"):
        make_trainer(data, model={"init_from": str(tmp_path / "seeing")})
    compose("debug").save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="video: a model without an image part cannot look at frames"):
        make_trainer(data, model={"init_from": str(tmp_path / "blind"), "video": "debug"})


def test_the_papers_numbers() -> None:
    """Sections 7.4 and 7.5.2: 16 frames become one, batches of 4,096 from 1e-4; then 64 frames become two."""
    video, sft = (load_config(default_path(stage).with_suffix(".paper.yaml")) for stage in STAGES)
    assert (video.optim.batch_size, video.optim.lr.adapter, video.data.max_tokens) == (4096, 1e-4, 190)
    assert (video.data.max_frames, video.data.factor, video.data.tile_size) == (16, 16, 448)
    assert (sft.data.max_frames, sft.data.factor) == (64, 32)
    assert sft.model.swap_lm and sft.model.swap_image
