"""Gives spoken questions their replies: what the language model itself says to the words (section 8.1.1).

python -m mm.train.dialogue_targets --lm smollm2-135m-instruct --shards "shards/speech/*-dialogue-*.tar" --out shards/replies
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset import WebDataset

from data.shards import expand_shards, write_shard
from mm.model import MultimodalLlama

#: The end of a sentence, with whatever closes it; not the number of a list.
_SENTENCE_END = re.compile(r"(?<!\d)[.!?][\"')\]*]*(?=\s|$)")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and answers shard after shard; finished ones are kept, so an interrupted run resumes.

    Args:
        argv: see `--help`; the process's own arguments when None.
    """
    summary, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m mm.train.dialogue_targets", description=summary, epilog=example)
    parser.add_argument("--lm", required=True, help="language model, as MultimodalLlama.from_pretrained takes it")
    parser.add_argument("--shards", required=True, help="folder or pattern of shards")
    parser.add_argument("--out", required=True, type=Path, help="another folder; made if missing")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="longer replies end with their last whole sentence"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="questions that are answered together")
    parser.add_argument("--device", default="cpu", help='such as "cuda"')
    arguments = parser.parse_args(argv)
    try:
        answer_shards(**vars(arguments))
    except ValueError as error:
        parser.error(str(error))


def answer_shards(
    lm: str, shards: str | Path, out: str | Path, max_new_tokens: int = 64, batch_size: int = 32, device: str = "cpu"
) -> None:
    """Writes a copy of each shard under its name in `out`, in which every dialogue has a reply.

    The reply becomes the last turn of `conversations`. `answer`, the right answer that evaluation looks for, stays as it is.
    Samples that are no dialogue, or have a reply, are copied; a question to which the model does not finish a single
    sentence is left out, and counted.

    Args:
        lm: what replies, greedily, to the text alone; whatever `from_pretrained` takes.
        max_new_tokens: longest reply; what is cut off by it ends with its last whole sentence.
        batch_size: questions that are answered together; the replies do not depend on it.

    Raises:
        ValueError: an argument is wrong, or a dialogue has no text.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"need max_new_tokens and batch_size >= 1, got {max_new_tokens} and {batch_size}")
    out = Path(out)
    paths = expand_shards(shards)
    if any(path.resolve().parent == out.resolve() for path in paths):
        raise ValueError(f"out: {out} is where the shards are; give another folder")
    missing = [path for path in paths if not (out / path.name).exists()]
    out.mkdir(parents=True, exist_ok=True)
    model = MultimodalLlama.from_pretrained(lm, device=device)
    n_unfinished = 0
    for path in tqdm(missing, unit="shard", desc="replies"):
        samples = list(_read(path))
        replies = _replies(model, samples, max_new_tokens, batch_size)
        n_unfinished += sum(reply is None for reply in replies.values())
        write_shard(out / path.name, _with_replies(samples, replies))
    print(
        f"wrote {len(missing)} shards to {out}; {n_unfinished} questions without a whole sentence for a reply left out"
    )


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """A shard's samples as `write_shard` takes them, but for the JSON all as bytes."""
    for sample in WebDataset(str(path), shardshuffle=False):
        files = {name: value for name, value in sample.items() if not name.startswith("__")}
        yield {"__key__": sample["__key__"], **files, "json": json.loads(files.get("json", b"{}"))}


def _replies(
    model: MultimodalLlama, samples: Sequence[dict[str, Any]], max_new_tokens: int, batch_size: int
) -> dict[str, str | None]:
    """Replies by key, of the dialogues that have none; None where no sentence was finished."""
    questions = {sample["__key__"]: _question(sample) for sample in samples if _awaits_reply(sample["json"])}
    keys = sorted(questions, key=lambda key: len(questions[key]))  # to pad little
    replies: dict[str, str | None] = {}
    for start in tqdm(range(0, len(keys), batch_size), unit="batch", leave=False):
        batch = keys[start : start + batch_size]
        answers = model.generate([questions[key] for key in batch], max_new_tokens=max_new_tokens)
        assert isinstance(answers, list)
        for key, answer in zip(batch, answers, strict=True):
            replies[key] = (answer.text.strip() if answer.reason == "stop" else whole_sentences(answer.text)) or None
    return replies


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; empty where none ends."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def _awaits_reply(about: dict[str, Any]) -> bool:
    turns = about.get("conversations") or []
    return about.get("task") == "dialogue" and bool(turns) and turns[-1]["from"] != "gpt"


def _question(sample: dict[str, Any]) -> str:
    text = sample.get("txt", b"").decode().strip()
    if not text:
        raise ValueError(f"shards: dialogue {sample['__key__']!r} has no text (.txt) that could be answered")
    return text


def _with_replies(samples: Sequence[dict[str, Any]], replies: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        reply = replies.get(sample["__key__"], "")
        if reply:
            turns = [*sample["json"]["conversations"], {"from": "gpt", "value": reply}]
            yield sample | {"json": sample["json"] | {"conversations": turns}}
        elif reply is not None:  # it asked for none
            yield sample


if __name__ == "__main__":
    main()
