"""Stage video-align, a warm start for small budgets: effective frames must tell which words their clip's caption has.

The language model never runs, so that a step takes a fraction of the time that the same clips take in `video`; and every word is
asked about at once. What it says about which object does what is left to the stages after.

Shape letters: V clips, X tokens of all effective frames of a clip, W their width, H hidden width of the head, A words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.shards import Sample as RawSample
from mm.model import MultimodalLlama
from mm.processor import Processor, Sample
from mm.sheet import Shown
from mm.train.config import TrainConfig
from mm.train.feature_cache import FeatureCache
from mm.train.objective import Objective
from mm.train.reading import as_caption, media_of, read_once
from mm.train.showing import picture_of
from video.adapter import VideoAdapter
from video.clips import Clips, encode_frames
from vision.encoder import ImageEncoder

#: Words that are asked about are in at least this share of the captions. Together, names that a small run sees a few times each
#: would outweigh how their things move.
LEAST_SHARE = 0.01
HIDDEN = 256


def words_of(caption: str) -> list[str]:
    """Words in lower case, each once."""
    return sorted(set(re.findall(r"\w+", caption.lower())))


@dataclass
class Named:
    """A clip and the words of its caption, by their numbers."""

    clip: Sample
    words: list[int]


@dataclass
class NamedClips:
    """A batch of clips, and which words the caption of each has."""

    clips: Clips
    has_VA: Tensor
    keys: list[str]

    def to(self, device: torch.device | str) -> NamedClips:
        return NamedClips(self.clips.to(device), self.has_VA.to(device), self.keys)


@dataclass(frozen=True)
class NamingReader:
    """Reads each sample as its one clip and the words of its caption."""

    processor: Processor
    words: dict[str, int] = field(repr=False)

    def length(self, raw: RawSample) -> int:
        return 0  # clips have about as many frames each

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Named:
        if (n_clips := len(media_of(raw, "video"))) != 1:
            raise ValueError(f"the sample has {n_clips} clips; this stage learns from samples with one")
        sample = self.processor.encode(as_caption(raw), style="plain", key=f"{raw.source}/{raw.key}")
        return Named(sample, [self.words[word] for word in words_of(raw.caption or "") if word in self.words])

    def count(self, sample: Named) -> int:
        return 1

    def collate(self, samples: Sequence[Named]) -> NamedClips:
        has_VA = torch.zeros(len(samples), len(self.words))
        for row_A, sample in zip(has_VA, samples, strict=True):
            row_A[sample.words] = 1
        batch = self.processor.collate([sample.clip for sample in samples])
        assert batch.clips is not None
        return NamedClips(batch.clips, has_VA, batch.keys)


class WordHead(nn.Module):
    """Log-odds `(V, A)` of words, from the mean and the largest of what the tokens of a clip's effective frames tell.

    The largest, because what a word means may be at one place alone; learned queries had not found it after as many steps,
    when motion was not yet told from appearance (docs/LOG.md).
    """

    def __init__(self, width: int, odds_A: Tensor) -> None:
        super().__init__()
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, HIDDEN)
        self.pooled, self.words = nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(HIDDEN, len(odds_A))
        nn.init.zeros_(self.words.weight)
        with torch.no_grad():
            self.words.bias.copy_(odds_A)

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Of the tokens `(X, W)` of each clip."""
        pooled = []
        for x_XW in clips:
            told_XH = F.gelu(self.hidden(self.norm(x_XW)))
            pooled.append(torch.cat([told_XH.mean(0), told_XH.amax(0)]))
        return self.words(F.gelu(self.pooled(torch.stack(pooled))))


class NamingModel(nn.Module):
    """A model's frozen eyes, its video part, and the head that is thrown away."""

    def __init__(self, encoder: ImageEncoder, adapter: VideoAdapter, odds_A: Tensor) -> None:
        super().__init__()
        self.image_encoder, self.video_adapter = encoder, adapter
        self.head = WordHead(adapter.config.memory_dim, odds_A)

    def forward(self, clips: Clips, features_PNLF: Tensor | None = None) -> Tensor:
        """Log-odds `(V, A)`; `features_PNLF` are what the eyes see where that is known already."""
        if features_PNLF is None:
            features_PNLF = encode_frames(self.image_encoder, clips.frames)
        x_ENLW, n_effective_V = self.video_adapter.effective_frames(features_PNLF, clips)
        effective = zip(x_ENLW.split(n_effective_V.tolist()), clips.valid_VN, strict=True)
        return self.head([frames_ENLW[:, valid_N].flatten(0, 2) for frames_ENLW, valid_N in effective])


class Naming(Objective[NamingModel, NamingReader]):
    """A model whose video part learns what there is to see, and how it moves, from captions as sets of words.

    Every caption of the run is read once at the start, for the words.
    """

    def __init__(self, config: TrainConfig, whole: MultimodalLlama) -> None:
        assert whole.video_adapter is not None and whole.image_encoder is not None
        self.whole = whole
        cache = config.data.feature_cache
        self.features = FeatureCache(cache, whole.image_encoder) if cache is not None else None
        counts, n_captions = _count_words(config)
        self.words = [word for word, count in counts.most_common() if count >= LEAST_SHARE * n_captions]
        if not self.words:
            raise ValueError(
                f"data.sources: no sample has a caption (.txt) with a word that at least {LEAST_SHARE:.0%} of the captions have, "
                "from which this stage learns"
            )
        share_A = torch.tensor([counts[word] / n_captions for word in self.words]).clamp(max=0.99)
        self.model = NamingModel(whole.image_encoder, whole.video_adapter, share_A.logit())
        self.reader = NamingReader(whole.processor, {word: i for i, word in enumerate(self.words)})

    def loss(self, batch: NamedClips) -> Tensor:
        return F.binary_cross_entropy_with_logits(self._log_odds(batch).float(), batch.has_VA, reduction="sum")

    def _log_odds(self, batch: NamedClips) -> Tensor:
        return self.model(batch.clips, self.features(batch.clips) if self.features is not None else None)

    def n_tokens(self, batch: NamedClips) -> int:
        """Tokens that the encoder makes of the frames."""
        return int(batch.clips.frames.valid_PN.sum()) * self.model.image_encoder.config.n_tokens

    @torch.no_grad()
    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """The prediction is as many of the likeliest words as the caption has; the score is the share of them that it has."""
        rows, n_right, n_words = [], 0, 0
        for raw in raws:
            batch = self.reader.collate([self.reader.prepare(raw)]).to(self.model.head.words.weight.device)
            wanted = {self.words[i] for i in batch.has_VA[0].nonzero()[:, 0].tolist()}
            likely = [self.words[i] for i in self._log_odds(batch)[0].topk(len(wanted)).indices.tolist()]
            rows.append(Shown(picture_of(raw, None), raw.key, " ".join(sorted(wanted)), " ".join(sorted(likely))))
            n_right, n_words = n_right + len(wanted.intersection(likely)), n_words + len(wanted)
        return rows, {"words": n_right / max(n_words, 1)}

    def export(self, directory: Path) -> None:
        self.whole.save_pretrained(directory)


def _count_words(config: TrainConfig) -> tuple[Counter[str], int]:
    """In how many captions each word is, and how many captions there are; bad samples are the stream's to count."""
    counts: Counter[str] = Counter()
    n_captions = 0
    for caption in read_once(config.data.sources, lambda raw: raw.caption, hears=False, unit="caption"):
        if caption:
            counts.update(words_of(caption))
            n_captions += 1
    return counts, n_captions
