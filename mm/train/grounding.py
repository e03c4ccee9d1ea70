"""Stage video-ground, a warm start for small budgets: at each name in a question, the first cross-attention block must find what is
true of that thing in the clip.

A question's answer says little: one bit, where it is yes or no, through all layers of a language model that has never compared what
it sees. Here the block is told at once which thing moves, which way, how fast, when and where, and the language model runs only up
to it. The linear readout is thrown away. What connects this to answers is left to the stages after.

Shape letters: B rows, T tokens, D language model width, N facts of a batch, C values that facts can have.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.shards import Sample as RawSample
from lm.model import Llama, NewTokenRows, RMSNorm, token_positions
from lm.tokenizer import Tokenizer
from mm.model import MultimodalLlama
from mm.processor import Batch, Processor, Sample
from mm.sheet import Shown
from mm.train.config import DTYPES, TrainConfig
from mm.train.feature_cache import FeatureCache
from mm.train.next_token import attention_for
from mm.train.objective import Objective
from mm.train.reading import exchanges, first_question, media_of, read_once, split_answer
from mm.train.showing import gate_gauges, picture_of
from video.clips import encode_frames
from vision.encoder import ImageEncoder

#: A value of a kind of fact, such as `("pace", "faster")`.
Value = tuple[str, str]
#: The kind of fact that depends on the question: whether it is what the answer names.
CHOSEN = "is the answer"


def facts_of(raw: RawSample) -> Mapping[str, Mapping[str, str]]:
    """What is true of each thing by its name, from the sample's JSON.

    Raises:
        ValueError: there is none, or it is no such thing.
    """
    facts = raw.metadata.get("facts")
    if not facts:
        raise ValueError('the sample has no "facts", which this stage learns from; `mm data make clips` writes them')
    if not isinstance(facts, dict) or not all(
        isinstance(said, dict) and all(isinstance(value, str) for value in said.values()) for said in facts.values()
    ):
        raise ValueError('"facts" must be like {"drum": {"deed": "moves left"}}')
    return facts


@dataclass(frozen=True)
class Mention:
    """A name in a text: where it ends, and what is true of what it names."""

    end: int
    values: tuple[Value, ...]


def mentions(question: str, answer: str, facts: Mapping[str, Mapping[str, str]]) -> Iterator[Mention]:
    """Every name that a question mentions and that something is known of; of several, also whether the answer is that one."""
    names = "|".join(re.escape(name) for name in sorted(facts, key=len, reverse=True))
    found = list(re.finditer(rf"(?<![\w-])(?:{names})(?![\w-])", question))
    chooses = len(found) > 1 and answer in {match[0] for match in found}
    for match in found:
        values = tuple(facts[match[0]].items())
        if chooses:
            values += ((CHOSEN, "yes" if match[0] == answer else "no"),)
        if values:
            yield Mention(match.end(), values)


def token_at(tokenizer: Tokenizer, ids: Sequence[int], end: int) -> int:
    """Index of the token with which the first `end` characters of what `ids` say are complete."""
    for n in range(1, len(ids)):
        if len(tokenizer.decode(ids[:n])) >= end:
            return n - 1
    return len(ids) - 1


@dataclass
class Grounded:
    """A question about a clip, and at which of its tokens which facts, by their numbers, are to be found."""

    sample: Sample
    facts: list[tuple[int, int]]


@dataclass
class GroundedBatch:
    """A batch of questions; each fact's row, token and value."""

    questions: Batch
    fact_N3: Tensor

    @property
    def keys(self) -> list[str]:
        return self.questions.keys

    def to(self, device: torch.device | str) -> GroundedBatch:
        return GroundedBatch(self.questions.to(device), self.fact_N3.to(device))


@dataclass(frozen=True)
class GroundingReader:
    """Reads each sample as one question about its clip, and where in it which facts are to be found."""

    processor: Processor
    values: dict[Value, int] = field(repr=False)

    def length(self, raw: RawSample) -> int:
        return 0  # questions are of about one length

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Grounded:
        if (n_clips := len(media_of(raw, "video"))) != 1:
            raise ValueError(f"the sample has {n_clips} clips; this stage learns from samples with one")
        messages, question, said = self.asked(raw, draw=augment)
        sample = self.processor.encode(messages, key=f"{raw.source}/{raw.key}")
        tokenizer = self.processor.chat.tokenizer
        ids = tokenizer.encode(question)
        start = next((i for i in range(len(sample.ids)) if sample.ids[i : i + len(ids)] == ids), None)
        if start is None:
            raise ValueError(
                f"question {question!r}: its tokens are not those of the conversation; end it without spaces"
            )
        at = [(start + token_at(tokenizer, ids, mention.end), mention.values) for mention in said]
        known = [(i, self.values[v]) for i, values in at for v in values if v in self.values]
        if not known:
            raise ValueError("its facts have no value that occurs in training")
        return Grounded(sample, known)

    def asked(self, raw: RawSample, *, draw: bool) -> tuple[list[dict[str, Any]], str, list[Mention]]:
        """A question with its clip, as text, and what it mentions: the first that mentions a name, or any of those if `draw`."""
        facts = facts_of(raw)
        found = []
        for messages in exchanges(raw):
            (asked, answer), text = split_answer(raw, messages), first_question(messages)
            if said := list(mentions(text, answer, facts)):
                found.append((asked, text, said))
        if not found:
            raise ValueError("no question mentions a name that the sample has facts about")
        return found[int(torch.randint(len(found), ())) if draw else 0]

    def count(self, sample: Grounded) -> int:
        return len(sample.facts)

    def collate(self, samples: Sequence[Grounded]) -> GroundedBatch:
        facts = [(row, *fact) for row, sample in enumerate(samples) for fact in sample.facts]
        batch = self.processor.collate([sample.sample for sample in samples])
        return GroundedBatch(batch, torch.tensor(facts, dtype=torch.int64).reshape(-1, 3))


class Readout(nn.Module):
    """Log-odds `(N, C)` of the values of each fact's kind; minus infinity for those of other kinds."""

    def __init__(self, dim: int, values: Sequence[Value]) -> None:
        super().__init__()
        self.norm, self.values = RMSNorm(dim, 1e-5), nn.Linear(dim, len(values))
        kinds = list(dict.fromkeys(kind for kind, _ in values))
        self.kind_C: Tensor
        self.register_buffer("kind_C", torch.tensor([kinds.index(kind) for kind, _ in values]), persistent=False)

    def forward(self, h_ND: Tensor, value_N: Tensor) -> Tensor:
        same_NC = self.kind_C[value_N][:, None] == self.kind_C
        return self.values(self.norm(h_ND)).float().masked_fill(~same_NC, -torch.inf)


class GroundingModel(nn.Module):
    """A model up to its first block that sees clips, and the readout that is thrown away."""

    def __init__(self, whole: MultimodalLlama, values: Sequence[Value]) -> None:
        super().__init__()
        assert whole.image_encoder is not None and whole.video_adapter is not None and whole.new_tokens is not None
        self.image_encoder: ImageEncoder = whole.image_encoder
        self.new_tokens: NewTokenRows = whole.new_tokens
        self.lm: Llama = whole.lm
        self.video_adapter = whole.video_adapter.first_block_alone()
        self.head = Readout(whole.config.lm.dim, values)

    def forward(self, batch: GroundedBatch, features_PNLF: Tensor | None = None) -> Tensor:
        """Log-odds `(N, C)`; `features_PNLF` are what the eyes see where that is known already."""
        asked, adapter = batch.questions, self.video_adapter
        assert asked.clips is not None
        if features_PNLF is None:
            features_PNLF = encode_frames(self.image_encoder, asked.clips.frames)
        memory = adapter.memory(
            features_PNLF,
            asked.clips,
            row_V=asked.clip_row_V,
            position_V=asked.clip_position_V,
            n_rows=len(asked.ids_BT),
        )
        (layer,) = adapter.config.layers
        with torch.no_grad():
            h_BTD = self.new_tokens(asked.ids_BT, self.lm.embed_tokens)
            h_BTD = self.lm.hidden(h_BTD, valid_BS=asked.valid_BS, n_layers=layer)
        position_BT = torch.where(asked.valid_BT, token_positions(h_BTD, asked.valid_BS, 0), -1)
        h_BTD = adapter.bind(memory, position_BT)[layer](h_BTD)
        row_N, token_N, value_N = batch.fact_N3.unbind(1)
        return self.head(h_BTD[row_N, token_N], value_N)


class Grounding(Objective[GroundingModel, GroundingReader]):
    """A model whose first block that sees clips learns to find what a name stands for.

    Every sample of the run is read once at the start, for the values that facts can have.
    """

    def __init__(self, config: TrainConfig, whole: MultimodalLlama) -> None:
        self.whole, self.dtype = whole, DTYPES[config.dtype]
        cache = config.data.feature_cache
        assert whole.image_encoder is not None
        self.features = FeatureCache(cache, whole.image_encoder) if cache is not None else None
        self.values = _values(config)
        self.model = GroundingModel(whole, self.values)
        self.reader = GroundingReader(whole.processor, {value: i for i, value in enumerate(self.values)})

    def loss(self, batch: GroundedBatch) -> Tensor:
        value_N = batch.fact_N3[:, 2]
        return F.cross_entropy(self._log_odds(batch), value_N, reduction="sum")

    def _log_odds(self, batch: GroundedBatch) -> Tensor:
        clips = batch.questions.clips
        known = self.features(clips) if self.features is not None and clips is not None else None
        with attention_for(batch.questions.ids_BT):
            return self.model(batch, known)

    def n_tokens(self, batch: GroundedBatch) -> int:
        return int(batch.questions.valid_BT.sum())

    @torch.no_grad()
    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """The prediction is the likeliest value of each fact; scores are the shares that are right, of all and of each kind."""
        rows, right = [], defaultdict(list)
        for raw in raws:
            question = self.reader.asked(raw, draw=False)[1]
            batch = self.reader.collate([self.reader.prepare(raw)]).to(self.model.lm.embed_tokens.weight.device)
            wanted = [self.values[i] for i in batch.fact_N3[:, 2].tolist()]
            found = [self.values[i] for i in self._log_odds(batch).argmax(1).tolist()]
            texts = ["; ".join(f"{kind}: {value}" for kind, value in facts) for facts in (wanted, found)]
            rows.append(Shown(picture_of(raw, None), question, *texts))
            for value, best in zip(wanted, found, strict=True):
                right[value[0]].append(value == best)
        scores = {f"facts, {kind}": sum(hits) / len(hits) for kind, hits in right.items()}
        hits = [hit for of_kind in right.values() for hit in of_kind]
        return rows, {"facts": sum(hits) / max(len(hits), 1)} | scores

    def gauges(self) -> dict[str, float]:
        """How far the block's gates are open."""
        return gate_gauges(self.model.video_adapter)

    def freeze_precision(self) -> None:
        """The language model alone: frozen eyes go into the export, where nothing may have rounded them."""
        self.whole.lm.to(self.dtype)

    def export(self, directory: Path) -> None:
        self.whole.save_pretrained(directory)


def _values(config: TrainConfig) -> list[Value]:
    """Values that the facts of the run have, sorted by kind; bad samples are the stream's to count."""
    values: set[Value] = set()
    for facts in read_once(config.data.sources, facts_of, hears=False, unit="sample"):
        values.update(value for said in facts.values() for value in said.items())
    if not values:
        raise ValueError(
            'data.sources: no sample has "facts", which this stage learns from; `mm data make clips` writes them'
        )
    return sorted(values | {(CHOSEN, "no"), (CHOSEN, "yes")})
