"""The prosody model: how long, how high and how loud each phone is, while the text is still being written (section 8.2.2).

A uni-directional Transformer takes one step per phone. Each block attends to the steps before, to the phones around the current
one, up to `lookahead` after it, and to features of the language-model tokens up to the end of the current phone's chunk: a new
chunk is visible as soon as its first phone is the current one. The delayed pattern: step i predicts the duration of phone i, and
pitch and loudness of phone i - 1, whose duration is then known. Each step is told what the one before predicted.
Training and streaming share all masks, as both run the same blocks; training runs all steps at once, with what they are told given.

Shape letters: B rows, N phones, U steps, Y phones of a window, W steps that are remembered, S language-model tokens, F their
feature width, D width, E a key and its value (2 D), H heads, K head width, L blocks; 3 is log duration in frames, mean log pitch
in Hz, mean log power (`speech.phone_prosody`). Masks are boolean, True = may attend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speech.normalizer import LMFeatures
from speech.phone_batch import PhoneBatch, PhoneEmbedding
from speech.streaming import StreamState, below, counts, ending, take

#: Bring log duration in frames, log pitch in Hz and log power of phones to about mean 0 and variance 1.
PROSODY_MEAN, PROSODY_STD = (2.0, 5.17, -3.4), (0.45, 0.1, 1.2)
#: Longest phone or pause, in frames.
MAX_FRAMES = 200
#: Phones after the current one whose features are read directly by a model with unlimited look-ahead.
NEAR = 4
#: Distances farther ahead than this look alike to such a model.
FAR = 64


@dataclass(frozen=True, kw_only=True)
class ProsodyConfig:
    """Shape of a prosody model. The paper gives the six heads and the width of the two fully connected layers.

    Attributes:
        lookahead: phones after the current one that are seen; None for all, which cannot stream.
        window: steps before, and phones before, that are seen.
        lm: language-model features; None for phones alone.
        lm_window: language-model tokens that a step sees.
        n_speakers, n_styles: voices to choose from.
    """

    dim: int
    n_layers: int
    n_heads: int = 6
    ffn_dim: int = 864
    lookahead: int | None = 4
    window: int = 64
    lm: LMFeatures | None = None
    lm_window: int = 48
    n_speakers: int = 1
    n_styles: int = 1

    def __post_init__(self) -> None:
        if self.lookahead is not None and self.lookahead < 0:
            raise ValueError(f"lookahead must not be negative, got {self.lookahead}")
        if self.window < 1 or self.lm_window < 1:
            raise ValueError(f"window and lm_window must be at least 1, got {self.window} and {self.lm_window}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")

    @property
    def ahead(self) -> int:
        """Phones that a step waits for; a model with unlimited look-ahead gets all of them at once."""
        return self.lookahead or 0

    @property
    def near(self) -> int:
        """Phones after the current one whose features are read directly."""
        return NEAR if self.lookahead is None else self.lookahead


PRESETS: dict[str, Callable[[], ProsodyConfig]] = {
    "debug": lambda: ProsodyConfig(dim=14, n_layers=2, n_heads=2, ffn_dim=11, lookahead=2, window=5, lm_window=3),
    "bundled": lambda: ProsodyConfig(dim=132, n_layers=2),
    "paper": lambda: ProsodyConfig(dim=864, n_layers=6, window=500, lm_window=128),
}


def durations(log_duration: Tensor) -> Tensor:
    """Whole frames, int64, at least 1."""
    return log_duration.exp().round().clamp(1, MAX_FRAMES).long()


@dataclass(frozen=True, kw_only=True)
class ProsodyState(StreamState):
    """Memory of a prosody model between steps.

    Attributes:
        phones_BYD, chunk_BY: the last `window + lookahead` phones, embedded, and their chunks.
        n_phones_B, n_steps_B: how many phones came, and how many steps were taken.
        lm_BSD: the last language-model tokens, as many as can still be seen.
        n_lm_B: how many came.
        past_BLWE: what the last `window` steps brought to the self-attention of each block.
        last_B3: what the last step predicted, brought to variance 1.
    """

    phones_BYD: Tensor
    chunk_BY: Tensor
    n_phones_B: Tensor
    n_steps_B: Tensor
    lm_BSD: Tensor
    n_lm_B: Tensor
    past_BLWE: Tensor
    last_B3: Tensor


class RelativeAttention(nn.Module):
    """Attention that knows how far a key is from the query, and can look at nothing at all."""

    def __init__(self, dim: int, n_heads: int, behind: int, ahead: int) -> None:
        super().__init__()
        self.n_heads, self.behind, self.ahead = n_heads, behind, ahead
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.distance = nn.Embedding(behind + ahead + 1, n_heads)
        nn.init.zeros_(self.distance.weight)
        self.nothing = nn.Parameter(torch.zeros(2, dim))  #: its key and value

    def project(self, x_BSD: Tensor) -> Tensor:
        """Keys and values, side by side."""
        return torch.cat([self.k_proj(x_BSD), self.v_proj(x_BSD)], dim=-1)

    def bias(self, distance_BUS: Tensor, visible_BUS: Tensor) -> Tensor:
        """What each step adds to its scores of the memory, nothing first: `(B, H, U, 1 + S)`.

        Args:
            distance_BUS: how far after the query a key lies.
            visible_BUS: whether the step may attend to it.
        """
        bias_BUSH = self.distance(distance_BUS.clamp(-self.behind, self.ahead) + self.behind)
        bias_BHUS = bias_BUSH.masked_fill(~visible_BUS[..., None], float("-inf")).permute(0, 3, 1, 2)
        return F.pad(bias_BHUS, (1, 0))

    def memory(self, projected_BSE: Tensor) -> Tensor:
        """All that can be attended to: nothing, and what was projected."""
        nothing_1E = self.nothing.flatten()[None]
        return torch.cat([nothing_1E.expand(len(projected_BSE), -1, -1), projected_BSE.to(nothing_1E.dtype)], dim=1)

    def forward(self, x_BUD: Tensor, memory_BSE: Tensor, bias_BHUS: Tensor) -> Tensor:
        keys_BHSK, values_BHSK = memory_BSE.unflatten(-1, (2, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        query_BHUK = self.q_proj(x_BUD).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        y_BHUK = F.scaled_dot_product_attention(query_BHUK, keys_BHSK, values_BHSK, attn_mask=bias_BHUS)
        return self.o_proj(y_BHUK.transpose(1, 2).flatten(2))


@dataclass
class Surroundings:
    """What the steps of one call may look at, apart from each other; lists over the blocks.

    Attributes:
        phones, lm: memories of the phones and of the language-model tokens; `lm` is empty for phones alone.
        phone_bias, lm_bias, step_bias: of the attention to these, and to the steps before (`RelativeAttention.bias`).
    """

    phones: list[Tensor]
    phone_bias: list[Tensor]
    lm: list[Tensor]
    lm_bias: list[Tensor]
    step_bias: list[Tensor]

    def at(self, step: int) -> Surroundings:
        """Of one step alone, when those after it are still to come."""
        phone_bias, lm_bias, step_bias = (
            [bias_BHUS[:, :, step : step + 1] for bias_BHUS in biases]
            for biases in (self.phone_bias, self.lm_bias, self.step_bias)
        )
        n_to_come = self.step_bias[0].shape[2] - step - 1
        step_bias = [bias_BHUS[..., : bias_BHUS.shape[3] - n_to_come] for bias_BHUS in step_bias]
        return Surroundings(self.phones, phone_bias, self.lm, lm_bias, step_bias)


class ProsodyBlock(nn.Module):
    """Self-attention, cross-attention to phones, cross-attention to language-model features, two fully connected layers."""

    def __init__(self, config: ProsodyConfig) -> None:
        super().__init__()
        dim, n_heads = config.dim, config.n_heads
        ahead = FAR if config.lookahead is None else config.lookahead
        self.self_norm, self.phone_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = RelativeAttention(dim, n_heads, config.window, 0)
        self.phone_attention = RelativeAttention(dim, n_heads, config.window, ahead)
        self.lm_norm = self.lm_attention = None
        if config.lm is not None:
            self.lm_norm = nn.LayerNorm(dim)
            self.lm_attention = RelativeAttention(dim, n_heads, config.lm_window, 0)
        self.up_proj = nn.Linear(dim, config.ffn_dim)
        self.down_proj = nn.Linear(config.ffn_dim, dim)

    def forward(self, x_BUD: Tensor, steps_BWE: Tensor, around: Surroundings, layer: int) -> tuple[Tensor, Tensor]:
        """Runs the block, and returns the memory of the steps before, `steps_BWE`, with these added."""
        now_BUD = self.self_norm(x_BUD)
        steps_BWE = torch.cat([steps_BWE, self.self_attention.project(now_BUD)], dim=1)
        x_BUD = x_BUD + self.self_attention(now_BUD, steps_BWE, around.step_bias[layer])
        x_BUD = x_BUD + self.phone_attention(self.phone_norm(x_BUD), around.phones[layer], around.phone_bias[layer])
        if self.lm_attention is not None and self.lm_norm is not None:
            x_BUD = x_BUD + self.lm_attention(self.lm_norm(x_BUD), around.lm[layer], around.lm_bias[layer])
        return x_BUD + self.down_proj(F.gelu(self.up_proj(self.ffn_norm(x_BUD)))), steps_BWE


class ProsodyModel(nn.Module):
    """Phones, and features of the language model that wrote them, to the prosody of each phone."""

    prosody_mean: Tensor
    prosody_std: Tensor

    def __init__(self, config: ProsodyConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.embed = PhoneEmbedding(dim, config.n_speakers, config.n_styles)
        self.phone_norm = nn.LayerNorm(dim)
        self.near = nn.Linear((1 + config.near) * dim, dim)
        self.told = nn.Linear(3, dim)
        self.lm_norm = self.lm_proj = None
        if config.lm is not None:
            self.lm_norm = nn.LayerNorm(config.lm.dim)
            self.lm_proj = nn.Linear(config.lm.dim, dim)
        self.blocks = nn.ModuleList(ProsodyBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3)
        self.register_buffer("prosody_mean", torch.tensor(PROSODY_MEAN), persistent=False)
        self.register_buffer("prosody_std", torch.tensor(PROSODY_STD), persistent=False)

    def forward(
        self,
        phones: PhoneBatch,
        prosody_BN3: Tensor,
        features_BSF: Tensor | None = None,
        n_features_B: Tensor | None = None,
    ) -> Tensor:
        """Predictions `(B, N, 3)` for whole utterances, where each step is told of the given prosody; zeros past a row's end.

        Args:
            features_BSF: of the language-model tokens, of which the first `n_features_B` of a row are real; all when None.

        Raises:
            ValueError: features are missing, or not expected, or do not fit.
        """
        state = self._empty_state(len(prosody_BN3))
        n_steps = prosody_BN3.shape[1] + 1
        x_BUD, around, _ = self._look(phones, features_BSF, n_features_B, state, n_steps)
        delayed_BU3 = _delayed((prosody_BN3 - self.prosody_mean) / self.prosody_std)
        told_BU3 = F.pad(delayed_BU3, (0, 0, 1, -1))
        y_BU3, _ = self._run(x_BUD, told_BU3, around, self._remembered(state))
        predicted_BN3 = _aligned(y_BU3) * self.prosody_std + self.prosody_mean
        return predicted_BN3.masked_fill(~below(phones.n_phones_B, n_steps - 1)[..., None], 0)

    def init_state(self, batch_size: int) -> ProsodyState:
        """State of rows that have said nothing yet.

        Raises:
            ValueError: this model sees whole utterances only.
        """
        if self.config.lookahead is None:
            raise ValueError("lookahead: a prosody model with unlimited look-ahead cannot stream; train one with 4")
        return self._empty_state(batch_size)

    @torch.no_grad()
    def predict(
        self, phones: PhoneBatch, features_BSF: Tensor | None = None, n_features_B: Tensor | None = None
    ) -> Tensor:
        """Prosody `(B, N, 3)` of whole utterances, each step told of what the one before predicted; zeros past a row's end."""
        state = self._empty_state(len(phones.n_phones_B))
        return self.step(phones, features_BSF, state, n_features_B=n_features_B, final=True)[0]

    @torch.no_grad()
    def step(
        self,
        phones: PhoneBatch,
        features_BSF: Tensor | None,
        state: ProsodyState,
        *,
        n_features_B: Tensor | None = None,
        final: bool | Tensor = False,
    ) -> tuple[Tensor, Tensor, ProsodyState]:
        """Predicts what new phones and language-model tokens decide, one step after the other.

        Args:
            phones: any number, also none; their chunks count all tokens of the row from 0, and must have come.
            features_BSF: of new tokens, any number, of which the first `n_features_B` of a row are real; all when None.
            final: whether the utterance ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            prosody_BN3: of the phones that are decided; zeros past a row's end.
            n_B: how many each row has.
            state: for the next step.

        Raises:
            ValueError: features are missing, or not expected, or do not fit.
        """
        final_B = ending(final, phones.n_phones_B)
        n_phones_B = state.n_phones_B + phones.n_phones_B
        # One more step than phones: the last one's pitch and loudness come after its duration.
        end_B = torch.where(final_B & (n_phones_B > 0), n_phones_B + 1, n_phones_B - self.config.ahead)
        n_steps_B = (end_B - state.n_steps_B).clamp(min=0)
        n_steps = int(n_steps_B.max())
        x_BUD, around, seen = self._look(phones, features_BSF, n_features_B, state, n_steps)

        steps, made = self._remembered(state), [state.last_B3]
        for u in range(n_steps):
            y_B13, steps = self._run(x_BUD[:, u : u + 1], made[-1][:, None], around.at(u), steps)
            made.append(y_B13[:, 0])
            if u == 0:  # No phone is before the first one, so the first step of all predicts a duration alone.
                made[1] = torch.where((state.n_steps_B == 0)[:, None], made[1] * made[1].new_tensor([1, 0, 0]), made[1])

        first_B = ((state.n_steps_B == 0) & (n_steps_B > 0)).long()
        n_B = n_steps_B - first_B
        made_BU3 = torch.stack(made, dim=1)
        prosody_BN3 = _aligned(made_BU3) * self.prosody_std + self.prosody_mean
        prosody_BN3 = take(prosody_BN3, first_B, int(n_B.max())) if n_steps else prosody_BN3
        prosody_BN3 = prosody_BN3.masked_fill(~below(n_B, prosody_BN3.shape[1])[..., None], 0)
        # Rows take different numbers of steps; what was made beyond them is forgotten.
        past = [take(steps_BWE[:, 1:], n_steps_B, self.config.window) for steps_BWE in steps]
        state = dataclasses.replace(
            seen,
            n_steps_B=state.n_steps_B + n_steps_B,
            past_BLWE=torch.stack(past, dim=1),
            last_B3=take(made_BU3, n_steps_B, 1)[:, 0],
        )
        return prosody_BN3, n_B, state.reset(final_B)

    def _run(
        self, x_BUD: Tensor, told_BU3: Tensor, around: Surroundings, steps: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Steps that follow others, at once: what they predict, at variance 1, and the memories of steps, one for each block."""
        x_BUD, longer = x_BUD + self.told(told_BU3), []
        for i, (block, steps_BWE) in enumerate(zip(self.blocks, steps, strict=True)):
            x_BUD, steps_BWE = block(x_BUD, steps_BWE, around, i)
            longer.append(steps_BWE)
        return self.head(self.norm(x_BUD)), longer

    def _remembered(self, state: ProsodyState) -> list[Tensor]:
        """The memory of the steps before, for each block."""
        blocks = cast(list[ProsodyBlock], list(self.blocks))
        return [block.self_attention.memory(state.past_BLWE[:, i]) for i, block in enumerate(blocks)]

    def _look(
        self,
        phones: PhoneBatch,
        features_BSF: Tensor | None,
        n_features_B: Tensor | None,
        state: ProsodyState,
        n_steps: int,
    ) -> tuple[Tensor, Surroundings, ProsodyState]:
        """Of the next steps, the phones near each and all that they may look at; and the state in which all that came is known."""
        self._check(features_BSF)
        config, device = self.config, phones.ipa_BN.device
        window, near = config.window, config.near
        new_BND = self.phone_norm(self.embed(phones))
        known_BYD = torch.cat([state.phones_BYD.to(new_BND.dtype), new_BND], dim=1)
        chunk_BY = torch.cat([state.chunk_BY, phones.chunk_BN], dim=1)
        n_phones_B = state.n_phones_B + phones.n_phones_B
        # Bring rows to one start: index `window + u` is the phone of step u.
        first_B = window + config.ahead - (state.n_phones_B - state.n_steps_B)
        place_Y = torch.arange(-window, n_steps + near, device=device)
        number_BY = state.n_steps_B[:, None] + place_Y
        real_BY = (number_BY >= 0) & (number_BY < n_phones_B[:, None])
        around_BYD = take(known_BYD, first_B - window, len(place_Y)).masked_fill(~real_BY[..., None], 0)
        x_BUD = self.near(
            torch.cat([around_BYD[:, window + i : window + i + n_steps] for i in range(1 + near)], dim=-1)
        )
        distance_UY = place_Y - place_Y[window : window + n_steps, None]
        limit = len(place_Y) if config.lookahead is None else config.lookahead
        sees_UY = (distance_UY >= -window) & (distance_UY <= limit)

        # The step after the last phone is in that phone's chunk.
        step_B1 = first_B[:, None] + torch.arange(n_steps, device=device)
        last_B1 = (first_B + n_phones_B - state.n_steps_B - 1)[:, None]
        chunk_BU = chunk_BY.gather(1, torch.minimum(step_B1, last_B1).clamp(0, max(chunk_BY.shape[1] - 1, 0)))
        lm_BSD, token_BS, real_BS = self._read(features_BSF, n_features_B, state)
        token_distance_BUS = token_BS[:, None] - chunk_BU[..., None]
        sees_token_BUS = real_BS[:, None] & (token_distance_BUS <= 0) & (token_distance_BUS > -config.lm_window)

        step = torch.arange(-window, n_steps, device=device)  # counted from the first of this call
        step_distance_UW = step - step[window:, None]
        sees_step_BUW = (
            (step_distance_UW <= 0) & (step_distance_UW >= -window) & (step >= -state.n_steps_B[:, None, None])
        )

        blocks = cast(list[ProsodyBlock], list(self.blocks))
        hearers = [block.lm_attention for block in blocks if block.lm_attention is not None]
        around = Surroundings(
            phones=[b.phone_attention.memory(b.phone_attention.project(around_BYD)) for b in blocks],
            phone_bias=[b.phone_attention.bias(distance_UY[None], sees_UY & real_BY[:, None]) for b in blocks],
            lm=[attention.memory(attention.project(lm_BSD)) for attention in hearers],
            lm_bias=[attention.bias(token_distance_BUS, sees_token_BUS) for attention in hearers],
            step_bias=[b.self_attention.bias(step_distance_UW[None], sees_step_BUW) for b in blocks],
        )
        n_new_lm_B = counts(n_features_B, lm_BSD[:, state.lm_BSD.shape[1] :])
        seen = dataclasses.replace(
            state,
            phones_BYD=take(known_BYD, phones.n_phones_B, window + config.ahead),
            chunk_BY=take(chunk_BY, phones.n_phones_B, window + config.ahead),
            n_phones_B=n_phones_B,
            lm_BSD=lm_BSD,
            n_lm_B=state.n_lm_B + n_new_lm_B,
        )
        if config.lm is not None:
            # Later steps see nothing before the window of the first one's chunk.
            oldest_B = (chunk_BU[:, 0] if n_steps else chunk_BY.new_zeros(len(chunk_BY))) - config.lm_window
            n_kept = min(lm_BSD.shape[1], int((seen.n_lm_B - oldest_B.clamp(min=0)).max()))
            seen = dataclasses.replace(seen, lm_BSD=_last(lm_BSD, state.lm_BSD.shape[1] + n_new_lm_B, n_kept))
        return x_BUD, around, seen

    def _read(
        self, features_BSF: Tensor | None, n_features_B: Tensor | None, state: ProsodyState
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Language-model tokens that are remembered or new, their numbers in the text, and which of them there are."""
        old_BSD = state.lm_BSD
        n_old = old_BSD.shape[1]
        lm_BSD = old_BSD
        if features_BSF is not None and self.lm_norm is not None and self.lm_proj is not None:
            new_BSD = self.lm_proj(self.lm_norm(features_BSF.to(self.lm_proj.weight.dtype)))
            lm_BSD = torch.cat([old_BSD.to(new_BSD.dtype), new_BSD], dim=1)
        place_S = torch.arange(-n_old, lm_BSD.shape[1] - n_old, device=lm_BSD.device)
        token_BS = state.n_lm_B[:, None] + place_S
        n_new_B = counts(n_features_B, lm_BSD[:, n_old:])
        return lm_BSD, token_BS, (token_BS >= 0) & (place_S < n_new_B[:, None])

    def _empty_state(self, batch_size: int) -> ProsodyState:
        config, zeros = self.config, partial(self.head.weight.new_zeros, batch_size)
        return ProsodyState(
            phones_BYD=zeros(config.window + config.ahead, config.dim),
            chunk_BY=zeros(config.window + config.ahead, dtype=torch.int64),
            n_phones_B=zeros(dtype=torch.int64),
            n_steps_B=zeros(dtype=torch.int64),
            lm_BSD=zeros(0, config.dim),
            n_lm_B=zeros(dtype=torch.int64),
            past_BLWE=zeros(config.n_layers, config.window, 2 * config.dim),
            last_B3=zeros(3),
        )

    def _check(self, features_BSF: Tensor | None) -> None:
        lm = self.config.lm
        if (lm is None) != (features_BSF is None):
            raise ValueError(
                f"features: this model was made {'without' if lm is None else 'with'} features of a language model"
            )
        if lm is not None and features_BSF is not None and features_BSF.shape[2:] != (lm.dim,):
            raise ValueError(
                f"features: need width {lm.dim} of {lm.source}, got shape {tuple(features_BSF.shape)}; use its layer {lm.layer}"
            )


def _delayed(x_BN3: Tensor) -> Tensor:
    """`(B, N + 1, 3)`: the duration of phone i beside pitch and loudness of phone i - 1; zeros where there is none."""
    return torch.cat([F.pad(x_BN3[..., :1], (0, 0, 0, 1)), F.pad(x_BN3[..., 1:], (0, 0, 1, 0))], dim=-1)


def _aligned(x_BU3: Tensor) -> Tensor:
    """`(B, U - 1, 3)`: the inverse of `_delayed`."""
    return torch.cat([x_BU3[:, :-1, :1], x_BU3[:, 1:, 1:]], dim=-1)


def _last(x_BSD: Tensor, end_B: Tensor, n: int) -> Tensor:
    """The `n` entries of each row that end at `end_B`; where a row has fewer, the first ones mean nothing."""
    index_BS = end_B[:, None] - n + torch.arange(n, device=x_BSD.device)
    return x_BSD.take_along_dim(index_BS.clamp(0, max(x_BSD.shape[1] - 1, 0))[..., None], 1) if n else x_BSD[:, :0]
