"""Features of a frozen language model for texts on disk, computed once (section 8.1.2).

python -m mm.train.lm_features --lm LM --source shards/writing/train-writing.jsonl --out shards/writing/features-train

A folder holds `features.npy` (float16, one language-model token after another), `ends.npy` (how many characters of its
text are known after each token) and `index.json` (which language model and layer, and where each text's tokens begin).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.shards import open_source
from lm.chat import ChatFormat
from lm.features import empty_prompt, features_layer, text_ends, text_features
from lm.model import Llama
from mm.model import MultimodalLlama
from mm.train.config import DTYPES, DataConfig
from speech.normalizer import LMFeatures

#: Features of one text `(S, F)`, and how many of its characters are known after each token.
TextFeatures = tuple[Tensor, list[int]]


class FeatureWriter:
    """Computes features of texts as answers to an empty user prompt.

    Args:
        layer: how many layers run; half of them when None.
    """

    def __init__(self, model: MultimodalLlama, layer: int | None = None) -> None:
        self.lm: Llama = model.lm
        self.chat: ChatFormat = model.processor.chat
        self.layer = features_layer(model.lm.config) if layer is None else layer

    def __call__(self, texts: Sequence[str]) -> list[TextFeatures]:
        tokenizer = self.chat.tokenizer
        ids = [tokenizer.encode(text) for text in texts]
        features = text_features(self.lm, empty_prompt(self.chat), ids, self.layer)
        return [(rows, text_ends(tokenizer, row)) for rows, row in zip(features, ids, strict=True)]


class FeatureFolder:
    """Features on disk, by the key of their text; nothing but what is asked for is read.

    Raises:
        ValueError: the folder is none of `write_features`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            index = json.loads((self.directory / "index.json").read_text())
            self.lm = LMFeatures(**index["lm"])
            self._rows: dict[str, list[int]] = index["rows"]
            self._features = np.load(self.directory / "features.npy", mmap_mode="r", allow_pickle=False)
            self._ends = np.load(self.directory / "ends.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"features: {directory} cannot be read ({error}); write it with `python -m mm.train.lm_features`"
            ) from error

    def __getitem__(self, key: str) -> TextFeatures:
        """Raises ValueError for a text that has none."""
        if key not in self._rows:
            raise ValueError(f"features: {self.directory} has none for {key!r}; write it again for this source")
        rows = slice(*self._rows[key])
        return torch.from_numpy(np.array(self._features[rows], dtype=np.float32)), self._ends[rows].tolist()


def open_features(data: DataConfig, lm: LMFeatures | None) -> dict[str, FeatureFolder]:
    """The features of every source of a run, by its name; none for a model that reads none.

    Raises:
        ValueError: a source has none, or those of another language model.
    """
    folders: dict[str, FeatureFolder] = {}
    if lm is None:
        return folders
    for source in (*data.sources, *data.heldout):
        if source.features is None:
            raise ValueError(
                f"features of {source.path}: the model reads those of {lm.source}; "
                "write them with `python -m mm.train.lm_features`"
            )
        folder = folders[source.name] = FeatureFolder(source.features)
        if folder.lm != lm:
            raise ValueError(f"features of {source.path}: {source.features} holds {folder.lm}, the model reads {lm}")
    return folders


def write_features(writer: FeatureWriter, lm_source: str, source: str | Path, out: str | Path, batch_size: int) -> int:
    """Writes the features of all texts of a source; returns how many tokens they have.

    Texts of similar length run together. A folder is whole once it has its `index.json`, which is written last.
    """
    opened, out = open_source(source, name=str(source)), Path(out)
    samples = [opened[i] for i in range(len(opened))]
    written = sorted(((sample.key, written_text(sample.metadata)) for sample in samples), key=lambda pair: len(pair[1]))
    rows: dict[str, tuple[int, int]] = {}
    ends: list[int] = []
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.json").unlink(missing_ok=True)

    def features() -> Iterator[np.ndarray]:
        bar = tqdm(total=len(written), unit="text")
        for start in range(0, len(written), batch_size):
            some = written[start : start + batch_size]
            made = writer([text for _, text in some])
            for (key, _), (features_SF, ends_S) in zip(some, made, strict=True):
                rows[key] = (len(ends), len(ends) + len(ends_S))
                ends.extend(ends_S)
                yield features_SF.cpu().half().numpy()
            bar.update(len(some))

    unfinished = out / "features.tmp"
    with unfinished.open("wb") as file:
        for array in features():
            file.write(array.tobytes())
    shape = len(ends), writer.lm.config.dim
    raw = np.memmap(unfinished, dtype=np.float16, mode="r", shape=shape)
    np.save(out / "features.npy", raw)
    os.remove(unfinished)
    np.save(out / "ends.npy", np.array(ends, dtype=np.int32))
    about = LMFeatures(source=lm_source, layer=writer.layer, dim=shape[1])
    (out / "index.json").write_text(json.dumps({"lm": asdict(about), "rows": rows}) + "\n")
    return len(ends)


def written_text(metadata: dict[str, object]) -> str:
    """The text of a sample of `mm data make writing` or `mm data make voice`: `written` or `text` in its JSON.

    Raises:
        ValueError: it has none.
    """
    text = metadata.get("written", metadata.get("text"))
    if not isinstance(text, str) or not text:
        raise ValueError("the sample has no text under `written` or `text`")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mm.train.lm_features", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lm", required=True, help="language model: anything that `MultimodalLlama.from_pretrained` takes"
    )
    parser.add_argument(
        "--source", required=True, help="texts of `mm data make writing`, or shards of `mm data make voice`"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the features")
    parser.add_argument("--layer", type=int, help="how many layers run (default: half of them)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    try:
        model = MultimodalLlama.from_pretrained(arguments.lm, dtype=DTYPES[arguments.dtype], device=arguments.device)
        writer = FeatureWriter(model, arguments.layer)
        n = write_features(writer, arguments.lm, arguments.source, arguments.out, arguments.batch_size)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {arguments.out}: {n} tokens after layer {writer.layer}")


if __name__ == "__main__":
    main()
