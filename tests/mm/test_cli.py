"""The command line, run as a user does: every command on the debug model, and every mistake as one plain line."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner, Result

from data.make.actors import Cast
from data.make.clips import KINDS as CLIPS
from data.make.pictures import KINDS as PICTURES
from data.make.speech import KINDS as RECORDINGS
from lm.checkpoint import load_llama
from lm.config import PRESETS
from mm import MultimodalLlama
from mm import cli as mm_cli
from mm.checkpoint import compose
from mm.cli import app
from mm.config import ImageConfig, MultimodalConfig
from mm.demo import EXAMPLES
from mm.stages import STAGES
from mm.train.config import load_config
from vision.adapter import ImageAdapterConfig
from vision.encoder import PRESETS as ENCODERS

SHAPES = str(EXAMPLES / "shapes.png")


def mm(*args: str, expect: int = 0, **kwargs: Any) -> Result:
    result = CliRunner().invoke(app, args, **kwargs)
    assert result.exit_code == expect, f"{result.output}\n{result.exception!r}"
    return result


def refusal(*args: str, **kwargs: Any) -> str:
    """The one line that a mistake gets."""
    result = mm(*args, expect=2, **kwargs)
    assert "Traceback" not in result.output
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def debug() -> MultimodalLlama:
    return MultimodalLlama.from_pretrained("debug")


def commands(group: Any, *path: str) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found += commands(command, *path, name) if hasattr(command, "commands") else [(*path, name)]
    return found


# ---------------------------------------------------------------------------------------------------------------- help


def test_every_command_is_explained_with_an_example_of_itself() -> None:
    paths = commands(get_command(app))
    assert len(paths) == 24
    for path in paths:
        text = mm(*path, "--help").output
        assert f"Example: mm {' '.join(path)}" in text, text


@pytest.mark.parametrize(("medium", "kinds"), [("pictures", PICTURES), ("clips", CLIPS), ("speech", RECORDINGS)])
def test_all_kinds_are_made_by_default(medium: str, kinds: Iterable[str]) -> None:
    """The command line names them itself, so that `--help` need not import what makes them."""
    default = inspect.signature(getattr(mm_cli, medium)).parameters["kinds"].default
    assert default.split(",") == list(kinds)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, mm.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------- answers


def test_generate_prints_what_the_model_says_about_the_pictures(debug: MultimodalLlama) -> None:
    word = str(EXAMPLES / "word.png")
    seen = set()
    for pictures in ([], [SHAPES], [SHAPES, word]):
        arguments = [argument for picture in pictures for argument in ("--image", picture)]
        result = mm("generate", "Describe.", *arguments, "--model", "debug", "--max-new-tokens", "11")
        expected = debug.generate("Describe.", image=pictures or None, max_new_tokens=11)
        assert result.stdout == expected.text + "\n"
        seen.add(result.stdout)
    assert len(seen) == 3  # the pictures matter


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """A lossless clip of noise."""
    frames = [Image.effect_noise((47, 31), 60).convert("RGB") for _ in range(5)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    return str(tmp_path / "clip.webp")


def test_generate_and_chat_take_clips(debug: MultimodalLlama, clip: str) -> None:
    result = mm("generate", "Describe.", "--video", clip, "--model", "debug", "--max-new-tokens", "11")
    assert result.stdout == debug.generate("Describe.", video=clip, max_new_tokens=11).text + "\n"
    alone = mm("generate", "--video", clip, "--image", SHAPES, "--model", "debug", "--max-new-tokens", "11")
    assert alone.stdout == debug.generate(video=clip, image=SHAPES, max_new_tokens=11).text + "\n"
    said = mm("chat", "--model", "debug", "--max-new-tokens", "11", input=f"/video {clip}\nDescribe.\n/quit")
    assert said.stdout.splitlines()[-2].removeprefix("> > ") == result.stdout.splitlines()[-1]


def test_generate_hands_every_sampling_option_on(debug: MultimodalLlama) -> None:
    options = {
        "max_new_tokens": 13, "temperature": 2.5, "top_k": 300, "top_p": 0.97, "min_p": 0.001,
        "repetition_penalty": 1.1, "seed": 5, "stop": "zzz",
    }  # fmt: skip
    arguments = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    result = mm("generate", "Hello", "--model", "debug", *arguments)
    assert result.stdout == debug.generate("Hello", **options).text + "\n"
    assert result.stdout != debug.generate("Hello", **options | {"seed": 6}).text + "\n"


def test_chat_remembers_turns_and_pictures_until_reset(debug: MultimodalLlama) -> None:
    lines = [f"/image {SHAPES}", "One", "/image missing.png", "/dance", "Two", "/reset", "Three", "/quit", "Never"]
    result = mm("chat", "--model", "debug", "--max-new-tokens", "7", input="\n".join(lines))

    def turn(text: str, image: str | None = None) -> dict[str, Any]:
        shown = [{"type": "image", "image": image}] if image else []
        return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}

    def answer(messages: list[dict[str, Any]]) -> str:
        return debug.generate(messages=messages, max_new_tokens=7).text

    first = answer([turn("One", SHAPES)])
    second = answer([turn("One", SHAPES), {"role": "assistant", "content": first}, turn("Two")])
    help_line, *_ = result.stdout.splitlines()
    assert result.stdout == f"{help_line}\n> > {first}\n> > > {second}\n> > {answer([turn('Three')])}\n> "
    assert "missing.png" in result.stderr and "/dance is no command" in result.stderr


def test_demo_asks_every_example_and_one_question_without_a_medium(tmp_path: Path) -> None:
    text = mm("demo", "--model", "debug", "--out", str(tmp_path / "a.wav")).stdout
    media = [file for suffix in ("png", "mp4", "flac") for file in EXAMPLES.glob(f"*.{suffix}")]
    assert len(media) == 11 and all(f"examples/{file.name}" in text for file in media)
    assert text.count("right: ") == 29 and "What is the capital of France?" in text
    assert (tmp_path / "a.wav").is_file()


def test_demo_leaves_out_what_the_model_has_no_part_for(tmp_path: Path) -> None:
    compose("debug", image="debug").save_pretrained(tmp_path)
    text = mm("demo", "--model", str(tmp_path)).stdout
    assert text.count("right: ") == 16 and text.count("this model has no part for audio") == 2
    assert text.count("this model has no part for video") == 3
    assert "this model has no voice" in text


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_download_prints_where_the_file_is(smollm2_gguf: Path) -> None:
    assert Path(mm("download", "smollm2-135m-instruct").stdout.strip()) == smollm2_gguf


def test_params_of_presets_checkpoints_and_the_paper() -> None:
    assert "8,030,261,248" in mm("params", "llama3-8b").stdout
    with_eyes = mm("params", "llama3-405b", "--image", "paper").stdout
    assert "98,818,826,046" in with_eyes and "630,766,080" in with_eyes
    assert "436,224,516" in mm("params", "llama3-8b", "--image", "paper", "--video", "paper").stdout
    table = mm("params").stdout
    assert "about 100B" in table and "1,744,898,064" in table


def test_native_conversion_gives_the_same_model(tmp_path: Path, debug: MultimodalLlama) -> None:
    mm("convert", "debug", str(tmp_path / "out"))
    assert_same_tensors(MultimodalLlama.from_pretrained(tmp_path / "out"), debug)


def test_llama_conversion_gives_the_language_model_alone(tmp_path: Path, debug: MultimodalLlama) -> None:
    mm("convert", "debug", str(tmp_path / "out"), "--to", "llama", "--dtype", "bfloat16")
    loaded = load_llama(tmp_path / "out")
    assert loaded.norm.weight.dtype == torch.bfloat16
    for name, tensor in debug.lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
    text_only = MultimodalLlama.from_pretrained(tmp_path / "out")  # with its tokenizer
    assert text_only.generate("Hello", max_new_tokens=3).tokens


@pytest.mark.parametrize(("layout", "weights"), [("huggingface", "model.safetensors"), ("meta", "consolidated.00.pth")])
def test_conversion_to_llama_3_2_vision(tmp_path: Path, layout: str, weights: str) -> None:
    lm = dataclasses.replace(PRESETS["debug"](), tie_embeddings=False, rope_theta=500_000.0, max_seq_len=8192)
    encoder = dataclasses.replace(ENCODERS["debug"](), released_padding_quirk=True)
    config = MultimodalConfig(
        lm=lm,
        chat="llama3",
        image=ImageConfig(encoder=encoder, adapter=ImageAdapterConfig.for_lm(lm, encoder.feature_dim)),
        n_new_tokens=8,
        media_ids={"image": lm.vocab_size},
    )
    model = MultimodalLlama(config)
    model.save_pretrained(tmp_path / "ours")
    mm("convert", str(tmp_path / "ours"), str(tmp_path / layout), "--to", layout)
    assert (tmp_path / layout / weights).is_file()
    if layout == "huggingface":  # Meta's params.json does not tell the encoder's size, so a small one cannot come back
        mm("convert", str(tmp_path / layout), str(tmp_path / "ours_again"))
        mm("convert", str(tmp_path / "ours_again"), str(tmp_path / "again"), "--to", layout)
        for name in (weights, "config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / layout / name).read_bytes()


def assert_same_tensors(model: MultimodalLlama, other: MultimodalLlama) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------------------------- training and data


def test_config_prints_a_complete_commented_yaml(tmp_path: Path) -> None:
    texts = set()
    for stage in STAGES:
        for paper in ([], ["--paper"]):
            text = mm("config", stage, *paper).stdout
            (tmp_path / "a.yaml").write_text(text)
            assert load_config(tmp_path / "a.yaml").stage == stage and text.startswith("#")
            texts.add(text)
    assert len(texts) == 2 * len(STAGES)


def test_train_runs_a_stage_with_overrides(tmp_path: Path, run_data: dict[str, Any]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_data))
    output = tmp_path / "elsewhere"
    result = mm("train", "image-adapter", "--config", str(file), "optim.steps=1", f"output={output}")
    assert f"exported {output}" in result.stdout
    MultimodalLlama.from_pretrained(output / "export")


def test_pictures_are_made_inspected_and_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    made = mm(
        "data", "make", "pictures", "--out", str(folder), "--kinds", "charts", "--scale", "0.006", "--workers", "1"
    )
    assert "charts: 36 pictures to train on, 3 held out" in made.stdout
    sheet = tmp_path / "sheet.png"
    text = mm("data", "inspect", str(folder / "heldout-charts-*.tar"), "--samples", "2", "--sheet", str(sheet)).stdout
    assert "charts-heldout-000001" in text and "charts-heldout-000002" not in text and "3 samples" in text
    assert "user: How many" in text
    assert Image.open(sheet).width == 400  # two pictures beside each other
    out = tmp_path / "eval"
    arguments = ("--shards", str(folder), "--limit", "1", "--out", str(out), "--model", "debug")
    assert "chart-value" in mm("eval", "pictures", *arguments).stdout
    assert (out / "results.json").is_file()


def test_clips_are_made_and_inspected(tmp_path: Path) -> None:
    try:
        Cast()
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path / "clips"
    made = mm("data", "make", "clips", "--out", str(folder), "--kinds", "changes", "--scale", "0.002", "--workers", "1")
    assert "changes: 3 clips to train on, 1 held out" in made.stdout
    sheet = tmp_path / "sheet.png"
    text = mm("data", "inspect", str(folder / "train-*.tar"), "--samples", "2", "--sheet", str(sheet)).stdout
    assert re.search(r"user: a clip of [234]\.\d s and 128 x 128 pixels\n  user: What", text)
    assert Image.open(sheet).width == 400  # two clips beside each other


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("generate",), "prompt"),
        (("generate", "Hi", "--model", "nowhere"), "nowhere"),
        (("generate", "Hi", "--model", "debug", "--temperature", "-1"), "temperature"),
        (("generate", "Hi", "--image", __file__), "is not a picture"),
        (("generate", "Hi", "--video", __file__), "video"),
        (("params", "llama3-8b", "--video", "paper"), "image part"),
        (("download", "gpt-5"), "smollm2-135m-instruct"),
        (("params", "llama3-8b", "--image", "fly"), "fly"),
        (("params", "debug.gguf", "--image", "paper"), "preset"),
        (("config", "image-dream"), "image-sft"),
        (("train", "image-adapter", "optim.stepz=3"), "steps"),
        (("data", "make", "pictures", "--out", "x", "--kinds", "cats"), "cats"),
        (("data", "make", "clips", "--out", "x", "--kinds", "cats"), "cats"),
        (("data", "inspect", "nothing/*.tar"), "nothing"),
        (("eval", "pictures", "--shards", "nothing", "--model", "debug"), "nothing"),
        (("eval", "video", "--shards", "nothing", "--model", "debug"), "nothing"),
    ],
)
def test_a_mistake_is_one_plain_line(args: tuple[str, ...], named: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(*args)
    assert "error: " in line and named in line, line
    assert not any(tmp_path.iterdir())


def test_convert_never_writes_into_a_folder_that_is_used(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    assert "is not empty" in refusal("convert", "debug", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_the_debug_switch_shows_where_an_error_was_raised() -> None:
    result = CliRunner().invoke(app, ["config", "image-dream"], env={"MM_DEBUG": "1"})
    assert isinstance(result.exception, ValueError)
