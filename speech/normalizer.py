"""Text normalisation: a streaming tagger chooses a rule for every token that the language model writes (section 8.2.2).

An LSTM reads TN tokens, each together with the `right_context` tokens after it, and looks at features of the language-model tokens
by cross-attention. When TN token i is decided, the tokens up to i + right_context are complete, and so the language-model tokens of
their chunks exist (`speech.tn_tokens.align`); of these it sees the last `lm_window`. At the end of the text it sees all there are.
Training and streaming share this mask, as offline is a single step from an empty state.

Shape letters: B rows, T TN tokens of a call, U TN tokens that it decides, R rules, or right context, C characters of a token,
S language-model tokens of a call, W window of language-model tokens, F their feature width, D width, H heads, K head width.
Masks are boolean, True = may attend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from speech.streaming import StreamState, below, ending, take
from speech.tn_rules import RULES_OF_KIND, Rule
from speech.tn_tokens import MAX_RUN, Kind, TNToken, align

RULES = tuple(Rule)
#: Characters are known by their code point below this; the others share `N_SHARED` embeddings.
N_KNOWN, N_SHARED = 256, 64
#: Farthest distance between a TN token and a chunk that attention tells apart.
MAX_DISTANCE = 8


@dataclass(frozen=True, kw_only=True)
class LMFeatures:
    """Which features a normaliser was trained with.

    Attributes:
        source: the language model, as `lm.checkpoint.load_llama` takes it.
        layer: how many of its layers run (`lm.features`).
        dim: its width.
    """

    source: str
    layer: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class NormalizerConfig:
    """Shape of a normaliser. The paper gives the right context alone.

    Attributes:
        right_context: complete tokens after the one that is decided; None for all, with an LSTM in both directions, which
            cannot stream.
        lm: language-model features; None for text alone.
        lm_window: language-model tokens that a TN token sees.
        max_chars: characters of a token that are read.
    """

    right_context: int | None = 3
    lm: LMFeatures | None = None
    lm_window: int = 48
    dim: int = 160
    n_heads: int = 4
    char_dim: int = 32
    max_chars: int = 16

    def __post_init__(self) -> None:
        if self.right_context is not None and self.right_context < 0:
            raise ValueError(f"right_context must not be negative, got {self.right_context}")
        if self.lm_window < 1:
            raise ValueError(f"lm_window must be at least 1 token, got {self.lm_window}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")

    @property
    def lookahead(self) -> int:
        """Tokens that a decision waits for; an LSTM in both directions needs none beside it."""
        return self.right_context or 0


@dataclass
class TokenBatch:
    """New TN tokens of several texts, and the language-model tokens that came with them.

    Attributes:
        chars_BTC: characters of each token, 0 where there is none.
        kind_BT: `Kind` of each token.
        n_tokens_B: real tokens of each row.
        chunk_BT: how many language-model tokens are in each token's chunk; 0 past a row's end.
        features_BSF: their features, one chunk after another; None for a normaliser that reads text alone.
    """

    chars_BTC: Tensor
    kind_BT: Tensor
    n_tokens_B: Tensor
    chunk_BT: Tensor
    features_BSF: Tensor | None = None

    @classmethod
    def collate(
        cls,
        rows: Sequence[Sequence[TNToken]],
        chunks: Sequence[Sequence[int]],
        features: Sequence[Tensor] | None,
        max_chars: int,
    ) -> TokenBatch:
        """Pads rows of tokens; `features` has `(S, F)` for each row."""
        n_tokens_B = torch.tensor([len(row) for row in rows])
        n_padding = (n_tokens_B.max() - n_tokens_B).tolist()
        no_token = [0] * max_chars
        chars = [[_char_ids(token.text, max_chars) for token in row] for row in rows]
        kinds = [[int(token.kind) for token in row] for row in rows]
        return cls(
            chars_BTC=torch.tensor([row + [no_token] * n for row, n in zip(chars, n_padding, strict=True)]),
            kind_BT=torch.tensor([row + [0] * n for row, n in zip(kinds, n_padding, strict=True)]),
            n_tokens_B=n_tokens_B,
            chunk_BT=torch.tensor([[*row, *[0] * n] for row, n in zip(chunks, n_padding, strict=True)]),
            features_BSF=None if features is None else pad_sequence(list(features), batch_first=True),
        )

    @classmethod
    def whole(
        cls, rows: Sequence[Sequence[TNToken]], lm: Sequence[tuple[Tensor, Sequence[int]]] | None, max_chars: int
    ) -> TokenBatch:
        """The tokens of whole texts, each with its features `(S, F)` and where its language-model tokens end (`lm.features`)."""
        if lm is None:
            return cls.collate(rows, [[0] * len(row) for row in rows], None, max_chars)
        chunks = [align(row, ends) for row, (_, ends) in zip(rows, lm, strict=True)]
        return cls.collate(rows, chunks, [features for features, _ in lm], max_chars)

    def to(self, device: torch.device | str) -> TokenBatch:
        return TokenBatch(*(None if x is None else x.to(device) for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class NormalizerState(StreamState):
    """Memory of a normaliser between steps.

    Attributes:
        tokens_BRD: embeddings of the last `right_context` tokens.
        kind_BR: their kinds.
        n_pending_B: how many of them are still to be decided.
        keys_BWD, values_BWD: of the last `lm_window` language-model tokens.
        owner_BW: the TN token of each one's chunk, counted from the first that is pending.
        n_context_B: how many of these exist.
        h_BD, c_BD: of the LSTM.
    """

    tokens_BRD: Tensor
    kind_BR: Tensor
    n_pending_B: Tensor
    keys_BWD: Tensor
    values_BWD: Tensor
    owner_BW: Tensor
    n_context_B: Tensor
    h_BD: Tensor
    c_BD: Tensor


class TokenEmbedding(nn.Module):
    """A token's characters, its length and its kind; zeros past a row's end."""

    def __init__(self, config: NormalizerConfig) -> None:
        super().__init__()
        self.characters = nn.Embedding(1 + N_KNOWN + N_SHARED, config.char_dim, padding_idx=0)
        self.conv = nn.Conv1d(config.char_dim, config.dim, 3, padding=1)
        self.length = nn.Embedding(MAX_RUN + 1, config.dim)
        self.kind = nn.Embedding(len(Kind), config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, batch: TokenBatch) -> Tensor:
        real_BTC = batch.chars_BTC > 0
        x_XLC = self.characters(batch.chars_BTC).flatten(0, 1).transpose(1, 2)
        x_BTCD = F.relu(self.conv(x_XLC)).transpose(1, 2).unflatten(0, batch.kind_BT.shape)
        x_BTD = self.proj((x_BTCD * real_BTC[..., None]).amax(2)) + self.kind(batch.kind_BT)
        x_BTD = x_BTD + self.length(real_BTC.sum(-1))
        return x_BTD.masked_fill(~below(batch.n_tokens_B, x_BTD.shape[1])[..., None], 0)


class ChunkAttention(nn.Module):
    """Cross-attention from TN tokens to language-model tokens, which knows how many chunks lie between them."""

    def __init__(self, config: NormalizerConfig, lm_dim: int) -> None:
        super().__init__()
        self.n_heads, self.max_ahead = config.n_heads, config.right_context or MAX_DISTANCE
        self.norm = nn.LayerNorm(lm_dim)
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(lm_dim, config.dim)
        self.v_proj = nn.Linear(lm_dim, config.dim)
        self.o_proj = nn.Linear(config.dim, config.dim)
        self.distance = nn.Embedding(MAX_DISTANCE + self.max_ahead + 1, config.n_heads)
        #: Key and value of nothing, so that a token always sees something.
        self.nothing = nn.Parameter(torch.zeros(2, config.dim))

    def project(self, features_BSF: Tensor) -> tuple[Tensor, Tensor]:
        x_BSF = self.norm(features_BSF.to(self.norm.weight.dtype))
        return self.k_proj(x_BSF), self.v_proj(x_BSF)

    def forward(
        self, x_BUD: Tensor, keys_BSD: Tensor, values_BSD: Tensor, chunks_ahead_BUS: Tensor, visible_BUS: Tensor
    ) -> Tensor:
        """Attends where `visible_BUS`; `chunks_ahead_BUS` says how many TN tokens lie between token and chunk."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        none_21D = self.nothing[:, None, None].expand(2, len(x_BUD), 1, -1)
        distance = chunks_ahead_BUS.clamp(-MAX_DISTANCE, self.max_ahead) + MAX_DISTANCE
        bias_BHUS = self.distance(distance).masked_fill(~visible_BUS[..., None], float("-inf")).permute(0, 3, 1, 2)
        y_BHUK = F.scaled_dot_product_attention(
            heads(self.q_proj(x_BUD)),
            heads(torch.cat([none_21D[0], keys_BSD], dim=1)),
            heads(torch.cat([none_21D[1], values_BSD], dim=1)),
            attn_mask=F.pad(bias_BHUS, (1, 0)),
        )
        return self.o_proj(y_BHUK.transpose(1, 2).flatten(2))


class TextNormalizer(nn.Module):
    """TN tokens to the scores of their rules."""

    allowed_KR: Tensor  #: which rules a token of each kind may have

    def __init__(self, config: NormalizerConfig) -> None:
        super().__init__()
        self.config = config
        both = config.right_context is None
        self.embed = TokenEmbedding(config)
        self.context = nn.Linear((1 + config.lookahead) * config.dim, config.dim)
        self.attention = None if config.lm is None else ChunkAttention(config, config.lm.dim)
        self.lstm = nn.LSTM(config.dim, config.dim, batch_first=True, bidirectional=both)
        self.head = nn.Linear((3 if both else 2) * config.dim, len(RULES))
        allowed = torch.tensor([[rule in RULES_OF_KIND[kind] for rule in RULES] for kind in Kind])
        self.register_buffer("allowed_KR", allowed, persistent=False)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Scores `(B, T, R)` for whole texts; minus infinity for rules that a token cannot have, zeros past a row's end.

        Raises:
            ValueError: features are missing, or not expected, or do not fit.
        """
        return self.step(batch, self._empty_state(len(batch.kind_BT)), final=True)[0]

    def init_state(self, batch_size: int) -> NormalizerState:
        """State of texts that have not begun.

        Raises:
            ValueError: this normaliser reads whole texts only.
        """
        if self.config.right_context is None:
            raise ValueError("right_context: a normaliser with unlimited right context cannot stream; train one with 3")
        return self._empty_state(batch_size)

    def step(
        self, batch: TokenBatch, state: NormalizerState, *, final: bool | Tensor = False
    ) -> tuple[Tensor, Tensor, NormalizerState]:
        """Scores what new tokens decide; together, the scores of all steps are those of `forward`.

        Args:
            batch: the tokens that became complete, any number, also none.
            final: whether the text ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            logits_BUR: of the tokens that are decided; zeros past a row's end.
            n_B: how many each row has.
            state: for the next step.
        """
        self._check(batch)
        ahead, n_new_B = self.config.lookahead, batch.n_tokens_B
        final_B = ending(final, n_new_B)
        n_known_B = state.n_pending_B + n_new_B
        n_B = torch.where(final_B, n_known_B, (n_known_B - ahead).clamp(min=0))
        n_decided = int(n_B.max())

        recent_BTD = torch.cat([state.tokens_BRD, self.embed(batch)], dim=1)
        kind_BT = torch.cat([state.kind_BR, batch.kind_BT], dim=1)
        start_B = ahead - state.n_pending_B
        known_BTD = take(recent_BTD, start_B, n_decided + ahead)
        known_BTD = known_BTD.masked_fill(~below(n_known_B, n_decided + ahead)[..., None], 0)
        x_BUD = self.context(torch.cat([known_BTD[:, i : i + n_decided] for i in range(1 + ahead)], dim=-1))
        if batch.features_BSF is not None:
            x_BUD, state = self._attend(x_BUD, batch.features_BSF, batch.chunk_BT, n_known_B, n_B, state)
        y_BUD, state = self._remember(x_BUD, n_B, state)

        logits_BUR = self.head(torch.cat([x_BUD, y_BUD], dim=-1))
        logits_BUR = logits_BUR.masked_fill(~self.allowed_KR[take(kind_BT, start_B, n_decided)], float("-inf"))
        logits_BUR = logits_BUR.masked_fill(~below(n_B, n_decided)[..., None], 0)
        state = dataclasses.replace(
            state,
            tokens_BRD=take(recent_BTD, n_new_B, ahead),
            kind_BR=take(kind_BT, n_new_B, ahead),
            n_pending_B=n_known_B - n_B,
        )
        return logits_BUR, n_B, state.reset(final_B)

    def _attend(
        self,
        x_BUD: Tensor,
        features_BSF: Tensor,
        chunk_BT: Tensor,
        n_known_B: Tensor,
        n_B: Tensor,
        state: NormalizerState,
    ) -> tuple[Tensor, NormalizerState]:
        """Adds what each token sees of the language model. Positions count from the first language-model token of this call."""
        assert self.attention is not None
        window, device = self.config.lm_window, x_BUD.device
        new_keys, new_values = self.attention.project(features_BSF)
        keys_BSD = torch.cat([state.keys_BWD, new_keys], dim=1)
        values_BSD = torch.cat([state.values_BWD, new_values], dim=1)
        n_seen_BT = F.pad(
            chunk_BT.cumsum(1), (1, 0)
        )  # language-model tokens of this call, before and after each TN token
        position = torch.arange(features_BSF.shape[1], device=device).expand(len(x_BUD), -1).contiguous()
        owner = torch.searchsorted(n_seen_BT[:, 1:].contiguous(), position, right=True) + state.n_pending_B[:, None]
        owner_BS = torch.cat([state.owner_BW, owner], dim=1)

        token = torch.arange(x_BUD.shape[1], device=device)
        last_B1 = (n_known_B - 1)[:, None]
        right = self.config.right_context
        frontier_BU = last_B1.expand(-1, len(token)) if right is None else torch.minimum(token + right, last_B1)
        frontier_BU = (frontier_BU - state.n_pending_B[:, None] + 1).clamp(0, chunk_BT.shape[1])
        end_BU1 = n_seen_BT.gather(1, frontier_BU)[..., None]
        position = torch.arange(-window, features_BSF.shape[1], device=device)
        exists_B1S = position >= -state.n_context_B[:, None, None]
        visible_BUS = exists_B1S & (position < end_BU1) & (position >= end_BU1 - window)
        chunks_ahead_BUS = owner_BS[:, None] - token[:, None]
        x_BUD = x_BUD + self.attention(x_BUD, keys_BSD, values_BSD, chunks_ahead_BUS, visible_BUS)

        n_lm_B = n_seen_BT[:, -1]
        state = dataclasses.replace(
            state,
            keys_BWD=take(keys_BSD, n_lm_B, window),
            values_BWD=take(values_BSD, n_lm_B, window),
            owner_BW=take(owner_BS, n_lm_B, window) - n_B[:, None],
            n_context_B=(state.n_context_B + n_lm_B).clamp(max=window),
        )
        return x_BUD, state

    def _remember(self, x_BUD: Tensor, n_B: Tensor, state: NormalizerState) -> tuple[Tensor, NormalizerState]:
        """Runs the LSTM over the decided tokens; rows without one keep their state."""
        rows = n_B > 0
        y_BUD = x_BUD.new_zeros(*x_BUD.shape[:2], self.lstm.hidden_size * (2 if self.lstm.bidirectional else 1))
        if not rows.any():
            return y_BUD, state
        packed = pack_padded_sequence(x_BUD[rows], n_B[rows].cpu(), batch_first=True, enforce_sorted=False)
        if self.lstm.bidirectional:
            y, _ = self.lstm(packed)
        else:
            y, (h, c) = self.lstm(packed, (state.h_BD[None, rows], state.c_BD[None, rows]))
            state = dataclasses.replace(
                state, h_BD=state.h_BD.index_put((rows,), h[0]), c_BD=state.c_BD.index_put((rows,), c[0])
            )
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=x_BUD.shape[1])
        return y_BUD.index_put((rows,), y), state

    def _empty_state(self, batch_size: int) -> NormalizerState:
        config, zeros = self.config, partial(self.head.weight.new_zeros, batch_size)
        window = config.lm_window if config.lm else 0
        return NormalizerState(
            tokens_BRD=zeros(config.lookahead, config.dim),
            kind_BR=zeros(config.lookahead, dtype=torch.int64),
            n_pending_B=zeros(dtype=torch.int64),
            keys_BWD=zeros(window, config.dim),
            values_BWD=zeros(window, config.dim),
            owner_BW=zeros(window, dtype=torch.int64),
            n_context_B=zeros(dtype=torch.int64),
            h_BD=zeros(config.dim),
            c_BD=zeros(config.dim),
        )

    def _check(self, batch: TokenBatch) -> None:
        lm, features = self.config.lm, batch.features_BSF
        if (lm is None) != (features is None):
            raise ValueError(
                f"features: this normaliser was made {'without' if lm is None else 'with'} features of a language model"
            )
        if lm is not None and features is not None and features.shape[2:] != (lm.dim,):
            raise ValueError(
                f"features: need width {lm.dim} of {lm.source}, got shape {tuple(features.shape)}; use its layer {lm.layer}"
            )


def _char_ids(text: str, max_chars: int) -> list[int]:
    """Ids of a token's first characters; 0 where it has no more."""
    codes = [ord(character) for character in text[:max_chars]]
    ids = [1 + (code if code < N_KNOWN else N_KNOWN + code % N_SHARED) for code in codes]
    return ids + [0] * (max_chars - len(ids))


def best_rules(logits_BUR: Tensor, n_B: Tensor) -> list[list[Rule]]:
    """The likeliest rule of every real token."""
    best = logits_BUR.argmax(-1).tolist()
    return [[RULES[i] for i in row[:n]] for row, n in zip(best, n_B.tolist(), strict=True)]
