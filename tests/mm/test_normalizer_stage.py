"""Stage tts-normalizer: features on disk, that it learns and hands on, what it refuses, and the paper's table."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data.make import writing
from data.make.written import Material
from lm.features import LayerTap, empty_prompt, text_ends, text_features, with_features
from lm.generate import decode_prompts
from lm.model import KVCache
from lm.sampling import SamplingParams
from lm.tokenizer import TextStream
from mm.checkpoint import debug_model
from mm.config import from_mapping
from mm.eval import normalizer as evaluation
from mm.train import lm_features
from mm.train.config import TrainConfig
from mm.train.lm_features import FeatureFolder, FeatureWriter
from mm.train.run_log import read_log
from mm.train.trainer import Collate, Trainer
from mm.voice import load_part
from speech.normalizer import LMFeatures, NormalizerConfig, TextNormalizer, TokenBatch, best_rules
from speech.spoken_text import SpokenText
from speech.tn_rules import speak
from speech.tn_tokens import split

MATERIAL = Material(nouns=["horse", "lamp", "kettle"], sentences=["It was late."])
N = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and their features from the debug model."""
    folder = tmp_path_factory.mktemp("writing")
    records = islice(writing.samples(0, "train", N, MATERIAL), N)
    (folder / "train-writing.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--lm", "debug", "--source", str(folder / "train-writing.jsonl"), "--out", str(folder / "features")]
    lm_features.main([*arguments, "--batch-size", "5"])
    return folder


def lm() -> dict[str, Any]:
    config = debug_model().config.lm
    return {"source": "debug", "layer": config.n_layers // 2, "dim": config.dim}


@pytest.fixture
def data(shards: Path, tmp_path: Path) -> dict[str, Any]:
    """A small, complete run, as plain data that a test may change."""
    source = {"path": str(shards / "train-writing.jsonl"), "features": str(shards / "features")}
    return {
        "stage": "tts-normalizer",
        "output": str(tmp_path / "run"),
        "model": {"normalizer": {"dim": 26, "n_heads": 2, "char_dim": 7, "lm": lm()}},
        "data": {"sources": [source], "heldout": [source], "window": 2},
        "optim": {"steps": 4, "batch_size": 6, "lr": {"normalizer": 1e-3}},
        "eval": {"every": 100, "samples": N, "pictures": N},
        "checkpoint": {"every": 100},
    }


def make_trainer(data: dict[str, Any]) -> Trainer:
    return Trainer(from_mapping(TrainConfig, data))


def without_lm(data: dict[str, Any], right_context: int | None) -> dict[str, Any]:
    source = {"path": data["data"]["sources"][0]["path"]}
    shape = data["model"]["normalizer"] | {"lm": None, "right_context": right_context}
    return data | {"model": {"normalizer": shape}, "data": {"sources": [source], "heldout": [source], "window": 2}}


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_on_disk_are_those_of_the_language_model(shards: Path) -> None:
    folder, writer = FeatureFolder(shards / "features"), FeatureWriter(debug_model())
    for line in (shards / "train-writing.jsonl").read_text().splitlines():
        record = json.loads(line)
        features, ends = folder[record["id"]]
        ((expected, expected_ends),) = writer([record["written"]])
        torch.testing.assert_close(features, expected, atol=1e-2, rtol=1e-2)  # float16
        assert ends == expected_ends and ends[-1] == len(record["written"])
    with pytest.raises(ValueError, match="has none for 'nobody'"):
        folder["nobody"]


def test_a_folder_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write it with `python -m mm\.train\.lm_features`"):
        FeatureFolder(tmp_path)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lm", "text", "both directions"])
def test_a_step_moves_all_that_trains(kind: str, data: dict[str, Any]) -> None:
    if kind != "lm":
        data = without_lm(data, 3 if kind == "text" else None)
    trainer = make_trainer(data)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_step(next(iter(trainer.stream)))
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainer.trained) == set(before)


def test_the_loss_does_not_depend_on_the_cut(data: dict[str, Any]) -> None:
    trainer = make_trainer(data)
    samples = [trainer.objective.reader.prepare(raw) for raw in trainer.heldout]
    losses = [trainer.accumulate(Collate(trainer.objective.reader, size)(samples)) for size in (N, 5, 1)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_it_learns_a_few_texts_by_heart_and_the_export_says_them(data: dict[str, Any], tmp_path: Path) -> None:
    optim = {"steps": 40, "batch_size": N, "lr": {"normalizer": 2e-2}, "warmup": 5}
    export = make_trainer(data | {"optim": optim}).train()
    assert export is not None
    (heldout,) = (line for line in read_log(tmp_path / "run") if "heldout/exact" in line)
    assert heldout["heldout/exact"] == 1.0
    source = Path(data["data"]["sources"][0]["path"])
    plain = make_trainer(without_lm(data, None) | {"output": str(tmp_path / "plain")}).train()
    assert plain is not None
    results = evaluation.main([export, plain], source, tmp_path / "eval", limit=100, batch_size=5)
    assert [(r.n, r.right_context, r.features) for r in results] == [
        (N, 3, f"debug, layer {lm()['layer']}"),
        (N, None, None),
    ]
    assert results[0].accuracy.value == 1.0 > results[1].accuracy.value
    assert sum(round(e.value) for e in results[0].by_kind.values()) == len(results[0].by_kind)
    predictions = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert all(p["predictions"][str(export)] == p["spoken"] for p in predictions)


def test_the_export_is_the_model(data: dict[str, Any]) -> None:
    trainer = make_trainer(data)
    export = trainer.train()
    assert export is not None
    loaded = load_part(export, "normalizer")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[f"normalizer.{name}"])
    assert loaded.config == trainer.config.model.normalizer and not loaded.training


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuse(data: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_trainer(data)


def test_what_does_not_fit_is_refused(data: dict[str, Any], shards: Path) -> None:
    bare = {"sources": [{"path": str(shards / "train-writing.jsonl")}]}
    refuse(data | {"data": bare}, "the model reads those of debug; write them with")
    other = data["model"]["normalizer"] | {"lm": lm() | {"layer": 1}}
    refuse(data | {"model": {"normalizer": other}}, "the model reads LMFeatures")
    refuse(without_lm(data, 3) | {"data": data["data"]}, "features of .*: stage tts-normalizer does not read it")
    refuse(data | {"model": {"lm": "debug"}}, r"model\.lm: stage tts-normalizer does not read it")
    with pytest.raises(ValueError, match="no export of stage tts-normalizer"):
        load_part(shards, "normalizer")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (None, "one of"),
        (["WORD"], "for each of its 2"),
        (["WORD", "NO"], "one of"),
        (["CARDINAL", "PAUSE"], "'hi' cannot"),
    ],
)
def test_bad_labels_are_bad_samples(rules: Any, message: str, data: dict[str, Any]) -> None:
    trainer = make_trainer(without_lm(data, 3))
    raw = trainer.heldout[0]
    raw.metadata.update(written="hi.", rules=rules)
    assert len(split("hi.")) == 2
    with pytest.raises(ValueError, match=message):
        trainer.objective.reader.prepare(raw)


# --- generation -------------------------------------------------------------------------------------------------------


def test_words_of_an_answer_under_way_are_those_of_its_text() -> None:
    """The debug model decodes; features come from the tap as it goes. Afterwards the same, offline, as in training."""
    model = debug_model()
    llama, tokenizer = model.lm, model.processor.chat.tokenizer
    features = LMFeatures(**lm())
    torch.manual_seed(0)
    normalizer = TextNormalizer(NormalizerConfig(lm=features, dim=26, n_heads=2)).eval()
    tap, prompt = LayerTap(llama.config, features.layer), empty_prompt(model.processor.chat)

    def decoder(ids_BT: torch.Tensor, valid_BS: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        return llama.hidden(llama.embed_tokens(ids_BT), valid_BS=valid_BS, cache=cache, adapters=tap.over())

    spoken, parts, ids, late = SpokenText(normalizer), [], [], ""
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=1)
    for (step,), features_1F in with_features(decode_prompts(llama, decoder, tokenizer, [prompt], params, set()), tap):
        assert step is not None
        if features_1F is None:
            late = step.text
        else:
            ids.append(step.token_id)
            parts += spoken.push(step.text, features_1F[0])
    parts += spoken.finish(late)

    (whole,) = text_features(llama, prompt, [ids], features.layer)
    ends = text_ends(tokenizer, ids)
    stream = TextStream(tokenizer)
    text = "".join(map(stream.push, ids)) + late
    batch = TokenBatch.whole([split(text)], [(whole, ends)], normalizer.config.max_chars)
    with torch.inference_mode():
        (rules,) = best_rules(normalizer(batch), batch.n_tokens_B)
    assert parts
    assert [(part.kind, part.text) for part in parts] == [(p.kind, p.text) for p in speak(split(text), rules)]
