"""`mm verify` passes whole models, and fails models that are broken in one place each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lm.checkpoint import load_llama
from mm import MultimodalLlama
from mm.checkpoint import compose
from mm.cli import app
from mm.params import count_parts, paper_claims, preset_model
from mm.verify import Check, check_counts, check_language_model, check_model, verify


@pytest.fixture
def debug() -> MultimodalLlama:
    return MultimodalLlama.from_pretrained("debug")


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_a_whole_model_passes(debug: MultimodalLlama) -> None:
    checks = check_model(debug)
    assert [check.name for check in checks] == [
        "strict keys",
        "text parity",
        "text parity beside pictures",
        "text parity beside clips",
        "text parity beside recordings",
    ]
    assert not failed(checks)


def test_a_language_model_alone_passes() -> None:
    assert not failed(check_model(compose("debug")))


def test_an_adapter_that_touches_text_is_caught(debug: MultimodalLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "adapters", lambda media, position_BT: {3: lambda h_BTD: h_BTD + 1e-3})
    beside = [f"text parity beside {media}" for media in ("pictures", "clips", "recordings")]
    assert failed(check_model(debug)) == ["text parity", *beside]


@pytest.mark.parametrize("media", ["pictures", "clips"])
def test_a_medium_that_reaches_back_is_caught(
    debug: MultimodalLlama, monkeypatch: pytest.MonkeyPatch, media: str
) -> None:
    adapter = {"pictures": debug.image_adapter, "clips": debug.video_adapter}[media]
    bind = adapter.bind
    everywhere = torch.full((2, 23), 8)  # every token of both rows claims to stand after the medium
    monkeypatch.setattr(adapter, "bind", lambda memory, position_BT: bind(memory, everywhere))
    assert failed(check_model(debug)) == [f"text parity beside {media}"]


def test_a_recording_that_reaches_another_row_is_caught(
    debug: MultimodalLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = debug.embed

    def everywhere(ids_BT: torch.Tensor, speech_KD: torch.Tensor | None = None) -> torch.Tensor:
        return embed(ids_BT, speech_KD) + (0 if speech_KD is None else speech_KD.mean())

    monkeypatch.setattr(debug, "embed", everywhere)
    assert failed(check_model(debug)) == ["text parity beside recordings"]


def test_broken_numbers_are_named(debug: MultimodalLlama) -> None:
    debug.lm.layers[2].mlp.up_proj.weight.data[1, 3] = torch.inf  # type: ignore[union-attr, operator]
    (check, *_) = check_model(debug)
    assert not check.passed and "lm.layers.2.mlp.up_proj.weight" in check.detail


def test_a_changed_language_model_is_named() -> None:
    model = compose("debug", image="debug")
    assert check_language_model(model, "debug").passed
    model.lm.norm.weight.data[5] += 1e-6
    check = check_language_model(model, "debug")
    assert not check.passed and "norm.weight" in check.detail
    assert torch.equal(load_llama("debug").norm.weight[:5], model.lm.norm.weight[:5])


def test_the_command_says_all_in_plain_words_and_ends_with_zero() -> None:
    result = CliRunner().invoke(app, ["verify", "debug"])
    assert result.exit_code == 0 and "all 19 checks passed" in result.stdout
    assert result.stdout.count("pass  ") == 19


def test_the_command_ends_with_one_and_names_the_missing_tensor(debug: MultimodalLlama, tmp_path: Path) -> None:
    debug.save_pretrained(tmp_path)
    file = tmp_path / "adapters.safetensors"
    tensors = load_file(file)
    del tensors["image_adapter.projection.bias"]
    save_file(tensors, file)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1 and "1 of 15 checks failed" in result.stdout
    assert "FAIL  strict keys" in result.stdout and "image_adapter.projection.bias" in result.stdout


def test_a_source_that_does_not_load_is_a_failed_check() -> None:
    assert failed(verify("nowhere")) == ["strict keys"]


def test_parts_add_up_and_the_papers_numbers_hold() -> None:
    model = preset_model("smollm2-135m", "bundled", "bundled", "bundled")
    assert sum(count_parts(model).values()) == sum(p.numel() for p in model.parameters())
    claims = paper_claims()
    assert len(claims) == len(check_counts()) == 14
    assert [claim.what for claim in claims if not claim.holds] == []


def test_a_count_that_is_off_by_one_does_not_hold() -> None:
    exact = paper_claims()[0]
    assert exact.holds and not type(exact)(**{**vars(exact), "ours": exact.ours + 1}).holds
