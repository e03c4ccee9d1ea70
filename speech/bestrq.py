"""BEST-RQ: self-supervised pre-training of the speech encoder by predicting random quantisations of masked speech (8.3.1).

Spans of the log-mel input are replaced by noise. Every group of four mel frames, as the encoder stacks them, is also
quantised by a random projection and random codebooks that are never trained; the encoder predicts the codes of the groups
that it cannot see.

Shape letters: B rows, T mel frames (10 ms), M mel bins, S encoder frames (40 ms), D encoder width, F stacked features
(4 * M), N masked encoder frames of the batch, Q codebooks, V codes of a codebook, K code width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speech.conformer import Conformer
from speech.streaming import below

_SEARCH_CHUNK = 256  # frames compared with all codes at a time: with 16 x 8192 codes, 134 MB of similarities
_HEAD_CHUNK = 1024  # frames whose logits exist at a time: with 16 x 8192 codes, 537 MB


@dataclass(frozen=True, kw_only=True)
class BestRQConfig:
    """Masking and quantiser; the defaults are the paper's (noise and seed, which it does not give, are ours).

    Attributes:
        mask_span: mel frames that one masked span covers.
        mask_prob: probability that a span starts at a mel frame; spans overlap.
        code_dim: width of the space in which the nearest code is looked up.
        noise_std: of the noise that replaces masked frames; features have unit variance.
        max_frames: mel frames that longer utterances are cropped to (60 s).
        seed: of projection and codebooks; another seed is another task.
    """

    mask_span: int = 32
    mask_prob: float = 0.025
    n_codebooks: int = 16
    codebook_size: int = 8192
    code_dim: int = 16
    noise_std: float = 0.1
    max_frames: int = 6000
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and field.name != "seed" and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")
        if not 0 < self.mask_prob <= 1:
            raise ValueError(f"mask_prob must be in (0, 1], got {self.mask_prob}")
        if self.noise_std < 0:
            raise ValueError(f"noise_std must not be negative, got {self.noise_std}")


def random_crop(mel_TM: Tensor, max_frames: int, generator: torch.Generator | None = None) -> Tensor:
    """A random stretch of `max_frames` of an utterance; a shorter one comes back whole."""
    spare = len(mel_TM) - max_frames
    if spare <= 0:
        return mel_TM
    start = int(torch.randint(spare + 1, (), generator=generator))
    return mel_TM[start : start + max_frames]


def mask_frames(n_frames_B: Tensor, T: int, config: BestRQConfig, generator: torch.Generator | None = None) -> Tensor:
    """Draws the mel frames to hide, `(B, T)`, True = hidden; padding never is.

    Row after row is drawn, real frames only, so an utterance's mask does not depend on padding.
    """
    starts_BT = torch.zeros(len(n_frames_B), T)
    for starts_T, n_frames in zip(starts_BT, n_frames_B.tolist(), strict=True):
        starts_T[:n_frames] = (torch.rand(n_frames, generator=generator) < config.mask_prob).float()
    # A frame is hidden where a span starts at it or at one of the `mask_span - 1` frames before it.
    hidden_BT = F.max_pool1d(F.pad(starts_BT, (config.mask_span - 1, 0)), config.mask_span, stride=1) > 0
    return hidden_BT.to(n_frames_B.device) & below(n_frames_B, T)


def masked_groups(mask_BT: Tensor, n_frames_B: Tensor, stack: int) -> Tensor:
    """Encoder frames that count, `(B, S)`: those of which every real mel frame is hidden.

    The paper leaves open how a partly hidden group counts. Here it does not count: what can still be seen of it would give
    its target away.
    """
    n_total = mask_BT.shape[1]
    valid_BT = below(n_frames_B, n_total)
    padding = (0, -n_total % stack)
    hidden_BS = F.pad(mask_BT | ~valid_BT, padding, value=True).unflatten(1, (-1, stack)).all(-1)
    return hidden_BS & F.pad(valid_BT, padding).unflatten(1, (-1, stack)).any(-1)


class RandomQuantizer(nn.Module):
    """A random projection and random codebooks: features to the index of the nearest code, by cosine, in each codebook.

    All codebooks share one projection, as the paper has it ("the projection matrix"). Both are buffers, saved with the model,
    so that a run goes on with the same targets whatever the version of the random number generator.

    Args:
        in_dim: width of the stacked features (320 in the paper).
    """

    projection_FK: Tensor
    codebooks_QVK: Tensor

    def __init__(self, in_dim: int, config: BestRQConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        bound = math.sqrt(6 / (in_dim + config.code_dim))  # Xavier
        projection = (2 * torch.rand(in_dim, config.code_dim, generator=generator, device="cpu") - 1) * bound
        shape = (config.n_codebooks, config.codebook_size, config.code_dim)
        codebooks = F.normalize(torch.randn(shape, generator=generator, device="cpu"), dim=-1)
        self.register_buffer("projection_FK", projection)
        self.register_buffer("codebooks_QVK", codebooks)

    @torch.no_grad()
    def forward(self, x_NF: Tensor) -> Tensor:
        """Codes `(N, Q)` of stacked features that were normalised to zero mean and unit variance, else few codes are ever used.

        FP32 whatever the autocast: rounding would exchange near codes.
        """
        with torch.autocast(x_NF.device.type, enabled=False):
            # The length of the projected vector does not change which cosine is the largest.
            z_NK = x_NF.float() @ self.projection_FK.float()
            codes_PK = self.codebooks_QVK.float().flatten(0, 1)
            n_codebooks = len(self.codebooks_QVK)
            nearest = [(z @ codes_PK.T).unflatten(1, (n_codebooks, -1)).argmax(-1) for z in z_NK.split(_SEARCH_CHUNK)]
        return torch.cat(nearest)


class BestRQOutput(NamedTuple):
    """What a batch gives; a term is one code of one masked encoder frame.

    Attributes:
        loss_sum: of the cross-entropies, FP32.
        n_terms: how many they are.
        accuracy: share of the codes that were predicted right; 0 where nothing was masked.
        codebook_usage_entropy: of this batch's targets, mean over codebooks, in bits: 13 when all of 8,192 codes are used alike,
            and at most the logarithm of the batch's masked encoder frames.
    """

    loss_sum: Tensor
    n_terms: int
    accuracy: Tensor
    codebook_usage_entropy: Tensor


class BestRQ(nn.Module):
    """An encoder, the quantiser that makes its targets, and one softmax per codebook (multi-softmax, equal weights).

    Args:
        encoder: what is trained and kept; the rest is only for this stage.
    """

    def __init__(self, encoder: Conformer, config: BestRQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.quantizer = RandomQuantizer(encoder.config.stack * encoder.config.n_mels, config)
        self.heads = nn.Linear(encoder.config.dim, config.n_codebooks * config.codebook_size)

    def forward(
        self,
        mel_BTM: Tensor,
        n_frames_B: Tensor,
        generator: torch.Generator | None = None,
        mask_BT: Tensor | None = None,
    ) -> BestRQOutput:
        """Loss of a batch of utterances, on the encoder frames that are hidden in full (`masked_groups`).

        Args:
            mel_BTM: normalised features, at most `max_frames` of them (see `random_crop`).
            n_frames_B: real frames of each row; the others are neither masked nor counted.
            generator: of the noise, and of the mask where none is given; on the CPU. PyTorch's own when None.
            mask_BT: frames to hide, drawn with the samples (`mask_frames`): the loss then does not depend on how a global batch is
                cut, and its terms are known beforehand.
        """
        if mask_BT is None:
            mask_BT = mask_frames(n_frames_B, mel_BTM.shape[1], self.config, generator)
        h_BSD, _ = self.encoder(self._hide(mel_BTM, mask_BT, generator), n_frames_B)
        masked_BS = masked_groups(mask_BT, n_frames_B, self.encoder.config.stack)
        code_NQ = self.quantizer(self._stacked(mel_BTM, n_frames_B)[masked_BS])
        loss_sum, n_right = self._predict(h_BSD[masked_BS], code_NQ)
        return BestRQOutput(loss_sum, code_NQ.numel(), n_right / max(code_NQ.numel(), 1), self._usage_entropy(code_NQ))

    def _hide(self, mel_BTM: Tensor, mask_BT: Tensor, generator: torch.Generator | None) -> Tensor:
        """Replaces masked frames by noise, drawn row after row so that a row's noise depends on no later row."""
        n_mels = mel_BTM.shape[-1]
        noise = [torch.randn(n_masked, n_mels, generator=generator) for n_masked in mask_BT.sum(1).tolist()]
        hidden_BTM = mel_BTM.clone()
        hidden_BTM[mask_BT] = (torch.cat(noise) * self.config.noise_std).to(mel_BTM)
        return hidden_BTM

    def _stacked(self, mel_BTM: Tensor, n_frames_B: Tensor) -> Tensor:
        """Groups of mel frames `(B, S, F)` as the encoder sees them; zeros fill the last one."""
        stack, n_total = self.encoder.config.stack, mel_BTM.shape[1]
        real_BTM = mel_BTM.where(below(n_frames_B, n_total)[..., None], 0)
        return F.pad(real_BTM, (0, 0, 0, -n_total % stack)).unflatten(1, (-1, stack)).flatten(2)

    def _predict(self, h_ND: Tensor, code_NQ: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies and number of right predictions; never holds the logits of more than one chunk."""
        score = partial(checkpoint, self._score, use_reentrant=False) if len(h_ND) > _HEAD_CHUNK else self._score
        chunks = zip(h_ND.split(_HEAD_CHUNK), code_NQ.split(_HEAD_CHUNK), strict=True)
        losses, rights = zip(*(score(h_XD, code_XQ) for h_XD, code_XQ in chunks), strict=True)
        return torch.stack(losses).sum(), torch.stack(rights).sum()

    def _score(self, h_ND: Tensor, code_NQ: Tensor) -> tuple[Tensor, Tensor]:
        logits_PV = self.heads(h_ND).unflatten(1, (self.config.n_codebooks, -1)).flatten(0, 1).float()
        code_P = code_NQ.flatten()
        return F.cross_entropy(logits_PV, code_P, reduction="sum"), (logits_PV.argmax(-1) == code_P).sum()

    def _usage_entropy(self, code_NQ: Tensor) -> Tensor:
        counts_QV = torch.zeros(self.config.n_codebooks, self.config.codebook_size, device=code_NQ.device)
        counts_QV.scatter_add_(1, code_NQ.T, torch.ones_like(code_NQ.T, dtype=counts_QV.dtype))
        share_QV = counts_QV / max(len(code_NQ), 1)
        return torch.special.entr(share_QV).sum(-1).mean() / math.log(2)
