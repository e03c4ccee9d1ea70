"""Stage tts-normalizer: the rule of every TN token is predicted (section 8.2.2).

The language model is read, never run: its features come from a folder of `mm.train.lm_features`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.shards import Sample as RawSample
from mm.sheet import Shown
from mm.train.config import TrainConfig
from mm.train.lm_features import FeatureFolder, TextFeatures, open_features, written_text
from mm.train.objective import Objective
from mm.train.showing import share_right
from mm.voice import save_part
from speech.normalizer import RULES, TextNormalizer, TokenBatch, best_rules
from speech.tn_rules import RULES_OF_KIND, Rule, speak, words_of
from speech.tn_tokens import TNToken, split

NO_RULE = -1  #: label past a row's end


@dataclass
class Labelled:
    """A text's tokens and their rules, by number; its features, where the model reads any."""

    tokens: list[TNToken]
    labels: list[int]
    lm: TextFeatures | None
    key: str


@dataclass
class LabelledTexts:
    """A batch of texts, and the rules of their tokens `(B, T)`, `NO_RULE` past a row's end."""

    tokens: TokenBatch
    labels_BT: Tensor
    keys: list[str]

    def to(self, device: torch.device | str) -> LabelledTexts:
        return LabelledTexts(self.tokens.to(device), self.labels_BT.to(device), self.keys)


@dataclass(frozen=True)
class LabelledReader:
    """Reads samples of `mm data make writing`.

    Attributes:
        folders: source name -> its features; empty for a model that reads text alone.
    """

    max_chars: int
    folders: Mapping[str, FeatureFolder]

    def length(self, raw: RawSample) -> int:
        return len(written_text(raw.metadata))

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Labelled:
        tokens = split(written_text(raw.metadata))
        names = raw.metadata.get("rules")
        if not isinstance(names, list) or len(names) != len(tokens) or not set(names) <= Rule.__members__.keys():
            raise ValueError(
                f"`rules`: the sample needs one of `speech.tn_rules.Rule` for each of its {len(tokens)} tokens"
            )
        rules = [Rule[name] for name in names]
        for token, rule in zip(tokens, rules, strict=True):
            if rule not in RULES_OF_KIND[token.kind]:
                raise ValueError(f"`rules`: {token.text!r} cannot have rule {rule.name}")
        lm = self.folders[raw.source][raw.key] if self.folders else None
        return Labelled(tokens, [RULES.index(rule) for rule in rules], lm, f"{raw.source}/{raw.key}")

    def count(self, sample: Labelled) -> int:
        return len(sample.labels)

    def collate(self, samples: Sequence[Labelled]) -> LabelledTexts:
        lm = [sample.lm for sample in samples if sample.lm is not None] or None
        batch = TokenBatch.whole([sample.tokens for sample in samples], lm, self.max_chars)
        labels_BT = torch.full(batch.kind_BT.shape, NO_RULE)
        for b, sample in enumerate(samples):
            labels_BT[b, : len(sample.labels)] = torch.tensor(sample.labels)
        return LabelledTexts(batch, labels_BT, [sample.key for sample in samples])


class Normalizing(Objective[nn.ModuleDict, LabelledReader]):
    """A new normaliser."""

    def __init__(self, config: TrainConfig) -> None:
        self.normalizer = TextNormalizer(config.model.normalizer)
        self.model = nn.ModuleDict({"normalizer": self.normalizer})
        self.reader = LabelledReader(
            config.model.normalizer.max_chars, open_features(config.data, config.model.normalizer.lm)
        )

    def loss(self, batch: LabelledTexts) -> Tensor:
        logits_BTR = self.normalizer(batch.tokens)
        return F.cross_entropy(
            logits_BTR.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=NO_RULE, reduction="sum"
        )

    def n_tokens(self, batch: LabelledTexts) -> int:
        return int(batch.tokens.n_tokens_B.sum())

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """What would be said, against what is to be said."""
        samples = [self.reader.prepare(raw) for raw in raws]
        batch = self.reader.collate(samples).to(self.normalizer.head.weight.device)
        rules = best_rules(self.normalizer(batch.tokens), batch.tokens.n_tokens_B)
        blank = Image.new("RGB", (1, 1), "white")
        rows = [
            Shown(blank, written_text(raw.metadata), raw.metadata["spoken"], words_of(speak(sample.tokens, chosen)))
            for raw, sample, chosen in zip(raws, samples, rules, strict=True)
        ]
        return rows, share_right(rows)

    def export(self, directory: Path) -> None:
        save_part(self.normalizer, directory, "normalizer")
