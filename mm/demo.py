"""`mm demo`: the bundled model answers questions about the pictures, clips and recordings in examples/, and speaks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import soundfile
from rich.console import Console
from rich.markup import escape

from mm.generate import Done, Generation, TextDelta
from mm.model import MultimodalLlama
from mm.params import count_parts

#: Media and `questions.json`, in the repository beside the package.
EXAMPLES = Path(__file__).parents[1] / "examples"
#: Kinds of media, as `generate` names them.
MEDIA = ("image", "video", "audio")
TEXT_QUESTION = "What is the capital of France?"


def main(model: str, out: Path, examples: Path = EXAMPLES) -> None:
    """Loads a model, asks it every question of `examples/questions.json` and one without a medium, and prints all.

    The answer to the last one is spoken into the file `out`.

    Raises:
        ValueError: the examples or the model are not there.
    """
    questions_file = examples / "questions.json"
    if not questions_file.is_file():
        raise ValueError(f"examples: there is no {questions_file}; run the demo from a clone of the repository")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Loading the model {model!r} ...")
    started = time.perf_counter()
    loaded = MultimodalLlama.from_pretrained(model)
    n_parameters = sum(count_parts(loaded).values())
    seconds = time.perf_counter() - started
    console.print(f"{n_parameters / 1e6:.0f}M parameters on {loaded.device}, loaded in {seconds:.1f} s.")
    shown: Path | None = None
    for entry in json.loads(questions_file.read_text(encoding="utf-8")):
        (kind,) = (kind for kind in MEDIA if kind in entry)
        path, has_part = examples / entry[kind], kind in loaded.config.media_ids
        if path != shown:
            shown = path
            console.print(f"\n[bold]{escape(f'{examples.name}/{path.name}')}[/]")
            if not has_part:
                console.print(f"  this model has no part for {kind}", style="dim")
        if has_part:
            _ask(console, loaded, entry["question"], {kind: path}, right=entry["answer"])
    console.print("\n[bold]text alone[/]")
    _ask(console, loaded, TEXT_QUESTION, {})
    console.print("\n[bold]spoken[/]")
    if loaded.voice is None:
        console.print("  this model has no voice", style="dim")
        return
    answer = loaded.generate(TEXT_QUESTION, max_new_tokens=48, speak=True)
    assert isinstance(answer, Generation) and answer.audio is not None and answer.sample_rate is not None
    soundfile.write(out, answer.audio, answer.sample_rate)
    console.print(f"  wrote {out}, {len(answer.audio) / answer.sample_rate:.1f} s", markup=False)


def _ask(
    console: Console, model: MultimodalLlama, question: str, media: Mapping[str, Path], right: str | None = None
) -> None:
    """Prints a question, its answer as it is made, and in grey what would be right."""
    console.print(f"  {escape(question or '(spoken)')}  ", end="")
    started = time.perf_counter()
    for event in model.stream(question or None, **media, max_new_tokens=48):
        match event:
            case TextDelta(text):
                console.print(text, end="", style="green", markup=False)
            case Done():
                truth = f"right: {right}, " if right is not None else ""
                console.print(f"  ({escape(truth)}{time.perf_counter() - started:.1f} s)", style="dim")
