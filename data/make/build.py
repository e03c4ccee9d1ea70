"""From kinds of pictures or clips to shards: numbered samples, each with its own random numbers, in a fixed split."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

from PIL import Image, ImageDraw
from tqdm import tqdm

from data.make.canvas import Drawn, Kind, Split, plain_font
from data.shards import write_shard

SHARD_SIZE = 2000


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Samples `start` to `stop` of a split, and the file that they fill."""

    kind: Kind
    split: Split
    seed: int
    start: int
    stop: int
    path: Path


def make_shards(
    out: str | Path,
    known: Mapping[str, Callable[[], Kind]],
    noun: str,
    *,
    seed: int,
    kinds: Sequence[str],
    scale: float,
    workers: int,
) -> dict[str, Any]:
    """Writes `train-{kind}-0000.tar`, ..., `heldout-{kind}-0000.tar`, a contact sheet per kind and `manifest.json`.

    The bytes depend on seed, scale and the installed packages, never on `workers`. Finished shards are kept, so an
    interrupted run resumes.

    Args:
        out: folder; made if missing.
        known: kinds by name.
        noun: what a sample is, in the plural.
        kinds: names from `known`.
        scale: factor on the number of samples of both splits.
        workers: processes; 1 draws in this one.

    Returns:
        The manifest: seed, and per kind its counts, shards and sources with their licences.

    Raises:
        ValueError: an argument is wrong, a Debian package is missing, or `out` was made with another seed or scale.
    """
    if unknown := set(kinds) - set(known):
        raise ValueError(f"kinds: {sorted(unknown)} unknown; choose from {list(known)}")
    if scale <= 0 or workers < 1:
        raise ValueError(f"need scale > 0 and workers >= 1, got scale {scale} and workers {workers}")
    out = Path(out)
    made = [known[name]() for name in dict.fromkeys(kinds)]
    out.mkdir(parents=True, exist_ok=True)
    shards = [shard for kind in made for shard in plan(kind, out, seed, scale)]
    manifest = _write_manifest(out, noun, seed, scale, made, shards)
    _write_shards([shard for shard in shards if not shard.path.exists()], noun, workers)
    for kind in made:
        sheet = contact_sheet(kind, seed)
        _save_atomically(out / f"contact-sheet-{kind.name}.png", partial(sheet.save, format="PNG"))
    return manifest


def plan(kind: Kind, out: Path, seed: int, scale: float) -> list[Shard]:
    """The shards of a kind: training cut every `SHARD_SIZE` samples, held-out samples in one file."""
    shards = []
    for split, size in kind.sizes.items():
        total = max(1, round(size * scale))
        step = SHARD_SIZE if split == "train" else total
        for i, start in enumerate(range(0, total, step)):
            path = out / f"{split}-{kind.name}-{i:04d}.tar"
            shards.append(
                Shard(kind=kind, split=split, seed=seed, start=start, stop=min(start + step, total), path=path)
            )
    return shards


def sample(kind: Kind, split: Split, seed: int, index: int) -> dict[str, Any]:
    """Sample `index` of a split as WebDataset writes it; its random numbers depend on nothing else."""
    rng = sample_rng(kind, split, seed, index)
    drawn = kind.draw(rng, split, index)
    extension, content = drawn.encode(rng)
    return {
        "__key__": f"{kind.name}-{split}-{index:06d}",
        extension: content,
        "txt": drawn.caption,
        "json": annotation(kind, drawn),
    }


def sample_rng(kind: Kind, split: Split, seed: int, index: int) -> random.Random:
    return random.Random(f"{seed}/{kind.name}/{split}/{index}")


def annotation(kind: Kind, drawn: Drawn) -> dict[str, Any]:
    """Task, questions, the same questions as LLaVA-style turns, and what is true of what is named."""
    turns = []
    for i, q in enumerate(drawn.questions):
        turns.append({"from": "human", "value": q.question if i else f"{drawn.marker}\n{q.question}"})
        turns.append({"from": "gpt", "value": q.answer})
    questions = [
        {key: value for key, value in asdict(question).items() if value or key != "options"}
        for question in drawn.questions
    ]
    facts = {"facts": drawn.facts} if drawn.facts else {}
    return {"task": kind.name, "kind": kind.name, "conversations": turns, "questions": questions} | facts


def draw_shard(shard: Shard) -> int:
    """Draws and writes one shard; returns its number of samples."""
    indices = range(shard.start, shard.stop)
    write_shard(shard.path, (sample(shard.kind, shard.split, shard.seed, index) for index in indices))
    return len(indices)


def _write_shards(shards: Sequence[Shard], noun: str, workers: int) -> None:
    with ExitStack() as stack:
        total = sum(s.stop - s.start for s in shards)
        bar = stack.enter_context(tqdm(total=total, unit=noun.removesuffix("s"), desc=noun))
        if workers == 1 or len(shards) < 2:
            for shard in shards:
                bar.update(draw_shard(shard))
            return
        # Spawned, because the caller may run threads of PyTorch.
        pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
        for count in pool.map(draw_shard, shards):  # an error cancels what has not begun
            bar.update(count)


def _write_manifest(
    out: Path, noun: str, seed: int, scale: float, kinds: Sequence[Kind], shards: Sequence[Shard]
) -> dict[str, Any]:
    """Adds these kinds to the manifest, before any shard is drawn, so that no later run mixes seeds or scales."""
    path = out / "manifest.json"
    manifest: dict[str, Any] = {"seed": seed, "scale": scale, "kinds": {}}
    if path.exists():
        manifest = json.loads(path.read_text())
    if (manifest["seed"], manifest["scale"]) != (seed, scale):
        raise ValueError(
            f"out: {out} holds {noun} of seed {manifest['seed']} and scale {manifest['scale']}; "
            "give the same ones or another folder"
        )
    for kind in kinds:
        mine = [shard for shard in shards if shard.kind is kind]
        manifest["kinds"][kind.name] = {
            noun: {s: sum(x.stop - x.start for x in mine if x.split == s) for s in get_args(Split)},
            "shards": [shard.path.name for shard in mine],
            "sources": [asdict(source) for source in kind.sources],
        }
    _save_atomically(path, lambda file: file.write(json.dumps(manifest, indent=2).encode()))
    return manifest


def _save_atomically(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """A reader sees the whole file or none, also after a crash."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        write(file)
    os.replace(unfinished, path)


def contact_sheet(kind: Kind, seed: int, columns: int = 6, rows: int = 8) -> Image.Image:
    """The first samples of training (above) and of the held-out split (below), with captions; as many of each."""
    cell = 200
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    splits = list(kind.sizes)
    n_each = columns * rows // len(splits)
    for i in range(columns * rows):
        split, index = splits[i // n_each], i % n_each
        drawn = kind.draw(sample_rng(kind, split, seed, index), split, index)
        x, y = i % columns * cell, i // columns * cell
        thumbnail = drawn.view()
        thumbnail.thumbnail((cell - 8, 136))
        sheet.paste(thumbnail, (x + 4, y + 4))
        question = drawn.questions[-1]
        lines = [*drawn.caption.splitlines()[:1], question.question, question.answer]
        pen.multiline_text((x + 4, y + 144), "\n".join(line[:34] for line in lines), fill="black", font=plain_font(10))
    return sheet
