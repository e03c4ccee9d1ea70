"""Stage image-align: the encoder learns to answer by letters, and image-sft goes on from there."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.shards import open_source, write_shard
from mm.config import from_mapping
from mm.train.config import TrainConfig
from mm.train.run_log import read_log
from mm.train.trainer import Collate, Trainer

LR = {"encoder": 3e-3, "gates": 3e-3, "head": 3e-3}


def make_trainer(run: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer(from_mapping(TrainConfig, run | changes))


@pytest.fixture
def data(run_data: dict[str, Any]) -> dict[str, Any]:
    run_data["optim"]["lr"] = dict(LR)
    return run_data | {"stage": "image-align"}


def test_a_step_moves_the_encoder_and_nothing_else_that_stays(data: dict[str, Any]) -> None:
    trainer = make_trainer(data)
    before = {name: tensor.clone() for name, tensor in trainer.objective.whole.state_dict().items()}
    for _ in range(2):  # what is behind a gate at zero has no gradient in the first step
        trainer.train_step(next(iter(trainer.stream)))
    changed = {n for n, t in trainer.objective.whole.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {name for name in before if name.startswith("image_encoder.")}


@pytest.mark.parametrize("size", [1, 3])
def test_the_cut_into_micro_batches_changes_nothing(data: dict[str, Any], size: int) -> None:
    trainer = make_trainer(data)
    reader = trainer.objective.reader
    samples = [reader.prepare(raw) for raw in trainer.heldout]
    assert len({reader.count(sample) for sample in samples}) > 1  # a mean of means would differ
    whole = trainer.accumulate(Collate(reader, 4)(samples))
    expected = torch.cat([p.grad.flatten() for p in trainer.trained.values() if p.grad is not None])
    trainer.optimizer.zero_grad()
    assert trainer.accumulate(Collate(reader, size)(samples)) == pytest.approx(whole, rel=1e-5)
    cut = torch.cat([p.grad.flatten() for p in trainer.trained.values() if p.grad is not None])
    assert (cut - expected).norm() <= 1e-4 * expected.norm()


def test_a_debug_model_reads_four_colours_and_image_sft_goes_on_from_there(
    data: dict[str, Any], tmp_path: Path
) -> None:
    data["optim"] |= {"steps": 120, "micro_batch_size": 4, "matrices": "muon"}
    data["eval"] |= {"samples": 4, "pictures": 4, "max_new_tokens": 8}
    trainer = make_trainer(data)
    export = trainer.train()
    first, *_, last = read_log(tmp_path / "run")
    assert last["heldout/exact"] == 1.0 and last["heldout/loss"] < 0.3 < 4.0 < first["loss"]
    with Image.open(tmp_path / "run" / "samples" / "step_000120.png") as sheet:
        assert sheet.width >= 4 * 100
    data["optim"]["lr"] = {"encoder": 1e-3, "adapter": 1e-3, "gates": 1e-3}
    after = make_trainer(
        data, stage="image-sft", output=str(tmp_path / "sft"), model={"init_from": str(export)}
    ).model.state_dict()
    name = "image_encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(after[name], trainer.objective.whole.state_dict()[name])


def test_captions_need_no_question_and_pictures_vary_in_training_alone(
    data: dict[str, Any], colour_shard: Path
) -> None:
    varied = data["data"] | {"augment": {"picture": {"scale": [0.5, 0.6]}}}
    source = {"path": str(colour_shard), "style": "plain"}
    for sources in ([source], data["data"]["sources"]):
        reader = make_trainer(data, data=varied | {"sources": sources, "heldout": sources}).objective.reader
        raw = replace(open_source(str(colour_shard), name="x")[0], source=next(iter(reader.styles)))
        assert reader.exchange(raw) == ("" if sources == [source] else "Colour?", raw.caption)
        plain, again, other = (reader.prepare(raw, augment=augment) for augment in (False, False, True))
        assert torch.equal(plain.tiles.pixels_NCHW, again.tiles.pixels_NCHW)
        assert not torch.equal(plain.tiles.pixels_NCHW, other.tiles.pixels_NCHW)
    with pytest.raises(
        ValueError, match="the sample has 2 pictures and 0 clips; this stage learns from samples with one"
    ):
        reader.prepare(replace(raw, messages=[*raw.messages, *raw.messages]))


def test_of_a_clip_one_frame_is_read(data: dict[str, Any], tmp_path: Path) -> None:
    """The middle one of its frames, or in training any."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (40, 40), colour) for colour in colours]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=200)
    path = tmp_path / "clips.tar"
    write_shard(path, [{"__key__": "lights", "gif": file.getvalue(), "txt": "red, green, blue"}])
    source = {"path": str(path), "style": "plain"}
    trainer = make_trainer(data, data=data["data"] | {"sources": [source], "heldout": [source]})
    reader, (raw,) = trainer.objective.reader, trainer.heldout

    def colour(*, augment: bool) -> int:
        return int(reader.prepare(raw, augment=augment).tiles.pixels_NCHW[0].mean((1, 2)).argmax())

    assert colour(augment=False) == 1
    assert {colour(augment=True) for _ in range(40)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("stage", "augment", "message"),
    [
        ("image-align", {"waveform": {}}, "data.augment.waveform: stage image-align does not vary that"),
        ("image-sft", {"picture": {}}, "data.augment.picture: stage image-sft does not vary that"),
        ("image-align", {"picture": {"zoom": 2}}, "unknown key 'zoom'"),
    ],
)
def test_what_a_stage_does_not_vary(data: dict[str, Any], stage: str, augment: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(data, stage=stage, data=data["data"] | {"augment": augment})


def test_a_stopped_run_goes_on_as_if_it_had_not_been(data: dict[str, Any], tmp_path: Path) -> None:
    data["data"]["augment"] = {"picture": {}}
    whole = make_trainer(data, output=str(tmp_path / "whole"))
    whole.train()
    stopped = make_trainer(data, output=str(tmp_path / "stopped"))
    step = stopped.train_step

    def and_stop(batch: Any) -> dict[str, float]:
        stopped.stop_requested = stopped.step == 1
        return step(batch)

    stopped.train_step = and_stop  # type: ignore[method-assign]
    assert stopped.train() is None
    resumed = make_trainer(data, output=str(tmp_path / "stopped"))
    assert resumed.step == 2
    resumed.train()
    for (name, a), b in zip(whole.trained.items(), resumed.trained.values(), strict=True):
        assert torch.equal(a, b), name
