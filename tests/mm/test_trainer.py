"""The training loop: what moves, that cuts of a batch do not matter, that it learns, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.shards import Sample as RawSample
from data.shards import write_shard
from mm.checkpoint import debug_model
from mm.config import from_mapping
from mm.model import MultimodalLlama
from mm.stages import STAGES
from mm.train.config import SourceConfig, TrainConfig, default_path, load_config
from mm.train.launch import main
from mm.train.loss import ChunkedCrossEntropy, next_token_loss
from mm.train.optim import schedule
from mm.train.reading import exchanges, first_question, split_answer
from mm.train.run_log import read_log
from mm.train.trainer import Collate, Trainer, TrainingError


def make_trainer(data: dict[str, Any], **optim: Any) -> Trainer:
    data["optim"] |= optim
    return Trainer(from_mapping(TrainConfig, data))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainer.trained.items() if p.grad is not None}


def test_a_step_moves_all_that_trains_and_nothing_else(run_data: dict[str, Any]) -> None:
    trainer = make_trainer(run_data)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batch = next(iter(trainer.stream))
    trainer.accumulate(batch)
    assert {name for name, grad in gradients(trainer).items() if grad.abs().max() > 0} == set(trainer.trained)
    assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)
    trainer.optimizer.step()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainer.trained)
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.trained.values()}


def test_nothing_is_back_propagated_below_the_first_adapter(run_data: dict[str, Any]) -> None:
    trainer = make_trainer(run_data)
    needs_grad: dict[int, bool] = {}
    for i, layer in enumerate(trainer.model.lm.layers):
        layer.register_forward_hook(lambda _, args, out, i=i: needs_grad.update({i: out.requires_grad}))
    trainer.accumulate(next(iter(trainer.stream)))
    first = min(trainer.model.config.image.adapter.layers)
    assert needs_grad == {i: i >= first for i in range(len(needs_grad))}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_cut_into_micro_batches_changes_nothing(run_data: dict[str, Any], colour_shard: Path, size: int) -> None:
    trainer = make_trainer(run_data)
    samples = [trainer.objective.reader.prepare(raw) for raw in trainer.heldout]
    assert len({sum(s.supervised) for s in samples}) > 1  # a mean of means would differ
    whole = trainer.accumulate(Collate(trainer.objective.reader, 4)(samples))
    expected = {name: grad.clone() for name, grad in gradients(trainer).items()}
    trainer.optimizer.zero_grad()
    cut = trainer.accumulate(Collate(trainer.objective.reader, size)(samples))
    assert cut == pytest.approx(whole, rel=1e-6)
    error = torch.cat([(grad - expected[name]).flatten() for name, grad in gradients(trainer).items()]).norm()
    assert error <= 1e-6 * torch.cat([grad.flatten() for grad in expected.values()]).norm()


def test_loss_equals_cross_entropy_over_full_logits(run_data: dict[str, Any]) -> None:
    trainer = make_trainer(run_data)
    model = trainer.model
    batch = trainer.objective.reader.collate([trainer.objective.reader.prepare(raw) for raw in trainer.heldout])
    logits_BTV = model(batch)[:, :-1]
    target_BT = torch.where(batch.supervised_BT, batch.ids_BT, -100)[:, 1:]
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="sum")
    expected.backward()
    wanted = gradients(trainer)
    trainer.optimizer.zero_grad()
    loss = next_token_loss(model, batch, chunk=3)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(trainer), wanted)


def test_chunked_cross_entropy_gradient() -> None:
    head = torch.nn.Linear(5, 13, bias=False).double().requires_grad_(False)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(13, (7,))
    (grad,) = torch.autograd.grad(3 * ChunkedCrossEntropy.apply(hidden, target, head, 2), hidden)
    (expected,) = torch.autograd.grad(3 * F.cross_entropy(head(hidden), target, reduction="sum"), hidden)
    torch.testing.assert_close(grad, expected)


def test_bf16_keeps_trained_weights_and_gradients_in_fp32(run_data: dict[str, Any]) -> None:
    trainer = make_trainer(run_data | {"dtype": "bfloat16"})
    reference = make_trainer(run_data | {"dtype": "float32"})
    batch = next(iter(trainer.stream))
    assert trainer.accumulate(batch) == pytest.approx(reference.accumulate(batch), rel=0.02)
    assert (
        {p.dtype for p in trainer.trained.values()}
        == {grad.dtype for grad in gradients(trainer).values()}
        == {torch.float32}
    )
    assert {p.dtype for p in trainer.model.lm.parameters()} == {torch.bfloat16}


def test_schedule_warms_up_and_decays(run_data: dict[str, Any]) -> None:
    run_data["optim"] |= {"steps": 110, "warmup": 10}
    optim = from_mapping(TrainConfig, run_data).optim
    shares = [schedule(step, optim) for step in range(110)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[10] == 1.0
    assert shares[60] == pytest.approx(0.5) and 0 < shares[109] < 1e-3


def test_debug_model_memorises_four_pictures(run_data: dict[str, Any], tmp_path: Path) -> None:
    rates = {"encoder": 3e-3, "adapter": 1e-2, "gates": 1e-2}
    run_data["data"]["window"] = 1  # each batch has all four
    run_data |= {"eval": {"every": 1000, "samples": 4, "pictures": 4, "max_new_tokens": 8}}
    export = make_trainer(run_data, steps=80, lr=rates, micro_batch_size=4).train()
    # The frozen random head bounds how sure the model can be: a loss of about 1.4 is the least.
    first, *_, last = read_log(tmp_path / "run")
    assert last["heldout/exact"] == 1.0 and last["heldout/loss"] < 2.0 < 4.0 < first["loss"]
    model = MultimodalLlama.from_pretrained(export)
    picture = Image.new("RGB", (31, 37), (220, 30, 30))
    assert model.generate("Colour?", image=picture, max_new_tokens=8).text == "red"


def test_run_folder_is_complete(run_data: dict[str, Any], tmp_path: Path) -> None:
    make_trainer(run_data, steps=3).train()
    run = tmp_path / "run"
    records = read_log(run)
    assert [record["step"] for record in records] == [1, 2, 3, 3]  # the last one is the evaluation
    wanted = {
        "loss",
        "grad_norm",
        "lr/gates",
        "tokens_per_second",
        "data_wait",
        "gates/attn.3",
        "gates/mlp.7",
        "skipped",
    }
    assert wanted <= records[0].keys()
    assert {"heldout/loss", "heldout/exact"} <= records[-1].keys()
    assert from_mapping(TrainConfig, yaml.safe_load((run / "config.yaml").read_text())) == from_mapping(
        TrainConfig, run_data
    )
    start = json.loads((run / "starts.jsonl").read_text())
    assert start["command"] and start["packages"]["torch"] == torch.__version__.split("+")[0]
    with Image.open(run / "samples" / "step_000003.png") as sheet:
        assert sheet.width >= 3 * 100
    assert (run / "loss.png").stat().st_size > 1000 and list((run / "tensorboard").iterdir())


def test_a_loss_that_is_no_number_stops_the_run_and_saves_the_batch(run_data: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(run_data)
    before = {name: p.detach().clone() for name, p in trainer.trained.items()}
    with torch.no_grad():
        trainer.model.lm.norm.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"step 1: loss is nan.*bad_batch_000001\.safetensors"):
        trainer.train()
    saved = load_file(tmp_path / "run" / "bad_batch_000001.safetensors")
    assert saved["0.ids_BT"].shape[0] == saved["1.ids_BT"].shape[0] == 2
    assert saved["0.pictures.tiles_PNCHW"].isfinite().all()
    for name, p in trainer.trained.items():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("suffix", ["", ".paper"])
def test_shipped_yaml_is_complete(stage: str, suffix: str) -> None:
    path = default_path(stage)
    config = load_config(path.with_name(path.stem + suffix + ".yaml"))
    assert config.stage == stage and config.data.heldout
    rates = config.optim.lr
    rated = {
        "image-encoder": {"encoder"},
        "video-align": {"adapter", "head"},
        "video-ground": {"adapter", "head", "gates"},
        "video": {"adapter", "new_tokens", "gates"},
        "video-sft": {"adapter", "new_tokens", "gates"},
        "speech-encoder": {"encoder", "head"},
        "speech-ctc": {"encoder", "head"},
        "speech-align": {"encoder", "adapter"},
        "speech": {"encoder", "adapter", "new_tokens"},
        "tts-normalizer": {"normalizer"},
        "tts-prosody": {"voice"},
        "tts-acoustic": {"voice"},
        "tts-vocoder": {"voice", "head"},
    }
    assert all(getattr(rates, part) > 0 for part in rated.get(stage, {"encoder", "adapter", "gates"}))


def test_the_papers_numbers() -> None:
    """Section 7.4: 6B pairs at batch 16,384 and 1e-3 on tiles of 336; 500M annealed from 2e-5."""
    adapter = load_config(default_path("image-adapter").with_name("image_adapter.paper.yaml"))
    assert (adapter.optim.batch_size, adapter.optim.lr.adapter, adapter.optim.weight_decay) == (16384, 1e-3, 0.01)
    assert (adapter.data.tile_size, adapter.optim.micro_batch_size) == (336, 8)
    assert adapter.optim.steps * adapter.optim.batch_size == pytest.approx(6e9, rel=1e-4)
    anneal = load_config(default_path("image-anneal").with_name("image_anneal.paper.yaml"))
    assert anneal.optim.lr.encoder == 2e-5 and anneal.data.tile_size > adapter.data.tile_size


def test_command_line_beats_yaml_beats_defaults(run_data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_data))
    config = load_config(path, ["optim.lr.gates=1e-2", "data.sources.0.weight=2", "eval={every: 7}"])
    assert config.optim.lr.gates == 1e-2 and config.data.sources[0].weight == 2.0 and config.eval.every == 7
    assert config.optim.batch_size == 4 and config.optim.clip == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.setps=3", "unknown key 'setps'; did you mean 'steps'"),
        ("eval.pictures=0", "eval.pictures must be at least 1, got 0"),
        ("optim.lr.gate=1", "did you mean 'gates'"),
        ("stage=image-adaptor", "stage 'image-adaptor' is unknown"),
        ("optim.steps=many", "expected int"),
        ("optim.warmup=4", "must be less than optim.steps"),
        ("model.swap_lm=debug", "finetuning swaps it"),
        ("model.lm=debug", "init_from brings its language model; leave lm out"),
        ("optim.first_block=3", "the encoder learns through all blocks"),
        ("optim.first_block=-1", "first_block must not be negative, got -1"),
        ("data.sources.5.path=a.tar", "has no place"),
        ("data.sources.0.style=poem", "choose 'chat' or 'plain'"),
        ("dtype=float8", "choose one of float32, bfloat16"),
        ("steps", "write it as key.sub=value"),
    ],
)
def test_mistakes_in_the_configuration_are_named(
    run_data: dict[str, Any], tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_data))
    with pytest.raises(ValueError, match=message):
        load_config(path, [override])


def test_stage_rules_are_checked(run_data: dict[str, Any]) -> None:
    source = run_data["data"]["sources"][0]
    plain = run_data | {"stage": "image-sft", "data": {"sources": [source | {"style": "plain"}]}}
    with pytest.raises(ValueError, match="supervises answers alone"):
        from_mapping(TrainConfig, plain)
    with pytest.raises(ValueError, match="cannot be cut"):
        from_mapping(TrainConfig, run_data | {"stage": "image-encoder", "model": {"encoder": "debug"}})
    run_data["optim"] |= {"micro_batch_size": None, "first_block": 3}
    with pytest.raises(ValueError, match="stage image-encoder trains no cross-attention blocks"):
        from_mapping(TrainConfig, run_data | {"stage": "image-encoder", "model": {"encoder": "debug"}})


def test_the_four_stages_follow_each_other_through_their_scripts(
    run_data: dict[str, Any],
    tmp_path: Path,
    colour_shard: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Encoder -> adapter -> anneal (larger tiles) -> SFT (language model swapped), each from the export before it."""
    plain = {"path": str(colour_shard), "style": "plain"}
    stages: dict[str, dict[str, Any]] = {
        "image-encoder": {
            "model": {"encoder": "debug", "text": {"width": 24, "n_layers": 1, "n_heads": 3, "embed_dim": 20}},
            "optim": {"steps": 2, "batch_size": 4, "lr": {"encoder": 1e-3, "head": 1e-3}},
        },
        "image-adapter": {
            "model": {"lm": "debug", "image": "debug", "encoder": str(tmp_path / "image-encoder" / "export")},
            "data": {"sources": [plain], "heldout": [plain]},
        },
        "image-anneal": {
            "model": {"init_from": str(tmp_path / "image-adapter" / "export")},
            "data": run_data["data"] | {"tile_size": 42},
        },
        "image-sft": {"model": {"init_from": str(tmp_path / "image-anneal" / "export"), "swap_lm": "debug"}},
    }  # fmt: skip
    assert list(stages) == [name for name in STAGES if name.startswith("image-")]
    for stage, changes in stages.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(run_data | changes | {"stage": stage, "output": str(tmp_path / stage)}))
        script = f"mm.train.{stage.replace('-', '_')}"
        monkeypatch.setattr(sys, "argv", [script, "--config", str(path), "optim.steps=2"])
        runpy.run_module(script, run_name="__main__")
        assert f"exported {tmp_path / stage / 'export'}" in capsys.readouterr().out
    encoder = load_file(tmp_path / "image-encoder" / "export" / "encoder.safetensors")
    model = MultimodalLlama.from_pretrained(tmp_path / "image-sft" / "export")
    assert model.config.image is not None and model.config.image.encoder.tile_size == 42
    assert model.image_encoder is not None
    trained = model.image_encoder.state_dict()["blocks.0.attn.qkv.weight"]
    assert (trained - encoder["blocks.0.attn.qkv.weight"]).abs().max() < 0.1  # it went on from stage 1, not from anew
    assert not torch.equal(trained, encoder["blocks.0.attn.qkv.weight"])
    text = torch.randint(256, (2, 11))
    assert torch.equal(model.lm(text), debug_lm_logits(text))  # contract 1: text is as before


def debug_lm_logits(ids_BT: torch.Tensor) -> torch.Tensor:
    from lm.checkpoint import load_llama

    return load_llama("debug")(ids_BT)


def test_script_refuses_another_stages_yaml(
    run_data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_data))
    with pytest.raises(SystemExit):
        main("image-sft", ["--config", str(path)])
    assert "is for stage image-adapter, not image-sft" in capsys.readouterr().err


def test_encoder_of_another_shape_is_refused(run_data: dict[str, Any], tmp_path: Path) -> None:
    from mm.train.encoders import load_encoder, save_encoder

    model = debug_model()
    assert model.image_encoder is not None
    save_encoder(model.image_encoder, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"max_tiles": 3}))
    with pytest.raises(ValueError):
        load_encoder(tmp_path, model.image_encoder)
    with pytest.raises(ValueError, match="nor an export of a stage"):
        load_encoder(tmp_path / "nowhere", model.image_encoder)


def test_samples_are_asked_their_first_question_alone() -> None:
    """The answer to a later one may be read off the answers before it."""
    said = ("What does it do?", "moves left", "Which way does it move?", "left")
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(said)
    ]
    raw = RawSample(key="a", source="made", messages=messages, metadata={})
    assert split_answer(raw, messages) == (messages[:1], "moves left") and first_question(raw.messages) == said[0]
    with pytest.raises(ValueError, match="sample 'a' of 'made' has no answer"):
        split_answer(raw, messages[:1])


def test_exchanges_keep_the_media_and_nothing_else_of_earlier_turns() -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    first, second = ({"type": "image", "image": name} for name in (b"1", b"2"))
    asked = [{"type": "text", "text": text} for text in ("What is it?", "And this?", "And its colour?")]
    answers = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("a cat", "a cup", "red")]
    turns = [[first, asked[0]], [asked[1], second], [asked[2]]]
    messages = [system]
    for turn, answer in zip(turns, answers, strict=True):
        messages += [{"role": "user", "content": turn}, answer]
    left_over = {"role": "user", "content": [{"type": "text", "text": "Thanks."}]}
    raw = RawSample(key="a", source="made", messages=[*messages, left_over], metadata={})
    contents = [turns[0], [first, *turns[1]], [first, second, *turns[2]]]
    assert exchanges(raw) == [
        [system, {"role": "user", "content": content}, answer]
        for content, answer in zip(contents, answers, strict=True)
    ]
    with pytest.raises(ValueError, match="sample 'a' of 'made' has no answer"):
        exchanges(RawSample(key="a", source="made", messages=[left_over], metadata={}))


def test_one_question_of_a_conversation_is_drawn_anew_each_time(run_data: dict[str, Any], tmp_path: Path) -> None:
    """Answers can then not be read off each other, batches are sorted by what is really read, and samples stay the first."""
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    turns = [{"from": "human", "value": "<image>\nShape?"}, {"from": "gpt", "value": "disc"}]
    turns += [{"from": "human", "value": "And what is its colour?"}, {"from": "gpt", "value": "red"}]
    path = tmp_path / "conversations.tar"
    write_shard(path, [{"__key__": str(i), "png": file.getvalue(), "json": {"conversations": turns}} for i in range(3)])
    source = {"path": str(path), "one_question": True}
    run_data["data"] |= {"sources": [source], "heldout": [source], "window": 8}
    trainer = make_trainer(run_data, batch_size=1, micro_batch_size=1)
    decode = trainer.model.processor.chat.tokenizer.decode

    def read(trainer: Trainer, n: int) -> list[str]:
        batches = itertools.islice(trainer.stream, n)
        return [decode(batch.micro_batches[0].ids_BT[0].tolist()) for batch in batches]

    texts = read(trainer, 24)
    assert all(("disc" in text) != ("colour" in text) for text in texts)
    assert {"disc" in text for text in texts} == {True, False}
    assert texts != texts[:8] * 3  # of the same sample, another question
    for seed in range(8):
        torch.manual_seed(seed)
        length = trainer.objective.reader.length(trainer.heldout[0])
        torch.manual_seed(seed)
        assert len(trainer.objective.reader.prepare(trainer.heldout[0], augment=True).ids) == length
    state = make_trainer(run_data, batch_size=1, micro_batch_size=1)
    state.stream.load_state_dict({**state.stream.state_dict(), "batches": 10})
    assert read(state, 14) == texts[10:]
    assert trainer.objective.reader.answer(trainer.heldout[0]) == "disc"
    with pytest.raises(ValueError, match=r"one_question of .*: style plain reads captions"):
        make_trainer(run_data | {"data": {"sources": [source | {"style": "plain"}], "heldout": [source]}})
    with pytest.raises(ValueError, match=r"one_question of .*: stage image-encoder does not read it"):
        contrastive = load_config(default_path("image-encoder"), [f"output={tmp_path}"])
        dataclasses.replace(contrastive, data=dataclasses.replace(contrastive.data, sources=[SourceConfig(**source)]))
