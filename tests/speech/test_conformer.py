"""The Conformer: against transformers' layers, what may influence what, and the streaming contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, Wav2Vec2ConformerConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoderLayer

from speech.conformer import PRESETS, Conformer, ConformerConfig, ConformerState
from speech.features import FeaturesConfig, LogMel

# Bins, widths, heads and chunks are all different, so that a wrong reshape fails.
CONFIG = ConformerConfig(
    n_mels=11, stack=3, dim=28, n_layers=2, n_heads=2, ffn_dim=17, conv_kernel=5, chunk_frames=7, left_chunks=2
)


def make(config: ConformerConfig = CONFIG) -> Conformer:
    torch.manual_seed(0)
    return Conformer(config).eval()


def mels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def lengths(*n: int) -> Tensor:
    return torch.tensor(n)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def encode(encoder: Conformer, mel_BTM: Tensor, chunk_frames: int | None = None) -> Tensor:
    with torch.no_grad():
        return encoder(mel_BTM, torch.full((len(mel_BTM),), mel_BTM.shape[1]), chunk_frames)[0]


def stream(
    encoder: Conformer, mel_BTM: Tensor, n_frames_B: Tensor, cuts: Sequence[int], chunk_frames: int | None = None
) -> list[Tensor]:
    """Encoder frames of each row, streamed in pieces of the sizes in `cuts`, then the rest."""
    state = encoder.init_state(len(mel_BTM), chunk_frames)
    edges = [0, *np.cumsum(cuts).tolist(), mel_BTM.shape[1]]
    pieces: list[list[Tensor]] = [[] for _ in mel_BTM]
    for start, stop in pairwise(edges):
        n_B = (n_frames_B - start).clamp(0, stop - start)
        with torch.no_grad():
            h_BSD, n_B, state = encoder.step(mel_BTM[:, start:stop], state, n_frames_B=n_B, final=stop == edges[-1])
        for row, h_SD, n in zip(pieces, h_BSD, n_B.tolist(), strict=True):
            row.append(h_SD[:n])
            assert not h_SD[n:].any()
    return [torch.cat(row) for row in pieces]


# -- counts ----------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_all_presets() -> None:
    counts = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            encoder = Conformer(preset())
        counts[name] = count(encoder.layers), count(encoder)
    assert counts.pop("debug")[1] < 100_000
    assert counts.pop("bundled")[1] <= 6_500_000
    # The paper's 1B: its layers, and with the projection of 320 stacked features.
    assert counts.pop("llama3") == (1_001_041_920, 1_001_041_920 + 321 * 1536)
    assert not counts


def test_60_seconds_are_6000_mel_frames_and_1500_encoder_frames() -> None:
    mel_BTM, n_frames_B = LogMel(FeaturesConfig())(mels(1, 960_000), lengths(960_000))
    encoder = make(PRESETS["debug"]())
    with torch.no_grad():
        h_BSD, n_B = encoder(mel_BTM, n_frames_B)
    assert mel_BTM.shape[1] == 6000
    assert h_BSD.shape == (1, 1500, 24)
    assert n_B.tolist() == [1500] == [encoder.config.chunk_frames]


@pytest.mark.parametrize(("n_frames", "n"), [(1, 1), (10, 3), (11, 3), (12, 3), (13, 4)])  # 10 = 0.1 s
def test_the_last_group_counts_when_it_is_not_full(n_frames: int, n: int) -> None:
    h_BSD, n_B = make(PRESETS["debug"]())(mels(1, n_frames, 80), lengths(n_frames))
    assert h_BSD.shape == (1, n, 24)
    assert n_B.tolist() == [n] == [PRESETS["debug"]().n_outputs(n_frames)]
    assert h_BSD.isfinite().all()


def test_ten_minutes_lose_nothing_and_equal_the_stream() -> None:
    encoder, mel_BTM = make(PRESETS["debug"]()), mels(1, 60_000, 80)
    h_BSD = encode(encoder, mel_BTM)
    assert h_BSD.shape == (1, 15_000, 24)
    (streamed,) = stream(encoder, mel_BTM, lengths(60_000), [25_013])
    torch.testing.assert_close(streamed, h_BSD[0], atol=1e-5, rtol=0)


# -- oracles ---------------------------------------------------------------------------------------------------------


class BidirectionalLlamaAttention(nn.Module):
    """transformers' Llama attention with positions and without causality, in the place of another attention."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=dim, num_attention_heads=n_heads, num_key_value_heads=n_heads, attn_implementation="eager"
        )
        self.attention, self.rotary = LlamaAttention(config, layer_idx=0), LlamaRotaryEmbedding(config)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        rope = self.rotary(hidden_states, torch.arange(hidden_states.shape[1])[None])
        n = hidden_states.shape[1]
        return self.attention(hidden_states, rope, attention_mask=torch.zeros(1, 1, n, n))[0], None


class ChannelNorm(nn.LayerNorm):
    def forward(self, x_BDS: Tensor) -> Tensor:
        return super().forward(x_BDS.transpose(1, 2)).transpose(1, 2)


def reference_layer(config: ConformerConfig, weights: dict[str, Tensor]) -> nn.Module:
    """transformers' Conformer layer, changed where ours says that it departs from it, with our layer's weights."""
    layer = Wav2Vec2ConformerEncoderLayer(
        Wav2Vec2ConformerConfig(
            hidden_size=config.dim,
            num_attention_heads=config.n_heads,
            intermediate_size=config.ffn_dim,
            conv_depthwise_kernel_size=config.conv_kernel,
            hidden_act="swish",
            position_embeddings_type=None,
        )
    )
    for ffn in (layer.ffn1, layer.ffn2):
        ffn.intermediate_dense.bias = ffn.output_dense.bias = None
    layer.self_attn = BidirectionalLlamaAttention(config.dim, config.n_heads)
    conv = layer.conv_module
    conv.batch_norm = ChannelNorm(config.dim)
    conv.depthwise_conv.padding = (0,)
    conv.glu = nn.Sequential(conv.glu, nn.ConstantPad1d((config.conv_kernel - 1, 0), 0.0))
    renamed = {
        name.replace("self_attn.", "self_attn.attention.").replace("conv_module.norm", "conv_module.batch_norm"): (
            weight[..., None] if "pointwise" in name else weight
        )
        for name, weight in weights.items()
    }
    layer.load_state_dict(renamed, strict=True)
    return layer.eval()


def test_encoder_equals_transformers_conformer_layers_with_llama_attention() -> None:
    encoder, mel_BTM = make(), mels(2, 39, 11)
    with torch.no_grad():
        for parameter in encoder.parameters():  # norms, too, so that a swapped pair shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = encoder.input_proj(mel_BTM.reshape(2, 13, 33))
        for layer in encoder.layers:
            expected = reference_layer(CONFIG, layer.state_dict())(expected)
    torch.testing.assert_close(encode(encoder, mel_BTM, chunk_frames=13), expected, atol=1e-5, rtol=1e-5)


# -- what may influence what -----------------------------------------------------------------------------------------


def influenced(encoder: Conformer, mel_frame: int, n_frames: int = 105) -> list[int]:
    """Encoder frames whose output a change of one mel frame changes by a single bit."""
    mel_BTM = mels(1, n_frames, 11)
    before = encode(encoder, mel_BTM)
    mel_BTM[:, mel_frame] += 1
    return (before != encode(encoder, mel_BTM)).any(-1)[0].nonzero()[:, 0].tolist()


def test_a_frame_sees_its_chunk_and_the_left_chunks() -> None:
    encoder = make(dataclasses.replace(CONFIG, n_layers=1))
    # Encoder frame 10 lies in chunk 1 (frames 7 to 13); chunks 1, 2 and 3 end at frame 27, and the causal convolution
    # carries what frames 24 to 27 saw four frames on.
    assert influenced(encoder, 10 * 3 + 2) == list(range(7, 28 + 4))


def test_with_one_chunk_every_frame_sees_every_other() -> None:
    encoder = make(dataclasses.replace(CONFIG, chunk_frames=35))
    assert influenced(encoder, 0) == influenced(encoder, 104) == list(range(35))


def test_the_future_beyond_the_chunk_changes_nothing() -> None:
    for mel_frame, first in [(104, 28), (62, 14), (63, 21)]:
        assert influenced(make(), mel_frame)[0] == first


@pytest.mark.parametrize("chunk_frames", [7, 40])
def test_a_row_equals_the_row_alone_whatever_its_padding_holds(chunk_frames: int) -> None:
    encoder, mel_BTM = make(), mels(3, 103, 11)
    n_frames_B = lengths(103, 19, 59)
    mel_BTM[1, 19:] = float("nan")
    with torch.no_grad():
        h_BSD, n_B = encoder(mel_BTM, n_frames_B, chunk_frames)
    assert n_B.tolist() == [35, 7, 20]
    for row, (n_frames, n) in enumerate(zip(n_frames_B.tolist(), n_B.tolist(), strict=True)):
        alone = encode(encoder, mel_BTM[row : row + 1, :n_frames], chunk_frames)
        torch.testing.assert_close(h_BSD[row, :n], alone[0], atol=1e-5, rtol=0)
        assert not h_BSD[row, n:].any()


def test_gradients_reach_every_parameter_and_no_padding() -> None:
    encoder, mel_BTM = make(), mels(2, 61, 11).requires_grad_()
    encoder(mel_BTM, lengths(61, 20))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    assert mel_BTM.grad[1, :20].any(-1).all() and not mel_BTM.grad[1, 20:].any()


# -- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 7, 50])
@pytest.mark.parametrize("cuts", [[], [1, 2, 5] * 9, [0, 43, 0, 21], [102]], ids=str)
def test_any_chunking_equals_offline(cuts: list[int], chunk_frames: int) -> None:
    encoder, mel_BTM, n_frames_B = make(), mels(2, 103, 11), lengths(103, 41)
    with torch.no_grad():
        offline, n_B = encoder(mel_BTM, n_frames_B, chunk_frames)
    for row, streamed in enumerate(stream(encoder, mel_BTM, n_frames_B, cuts, chunk_frames)):
        torch.testing.assert_close(streamed, offline[row, : n_B[row]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_stream_goes_on_from_a_saved_state_and_rows_reset_alone(tmp_path: Path) -> None:
    encoder, mel_BTM = make(), mels(2, 103, 11)
    first, _, state = encoder.step(mel_BTM[:, :50], encoder.init_state(2))
    save_file(vars(state), tmp_path / "state.safetensors")
    state = ConformerState(**load_file(tmp_path / "state.safetensors"))
    rest, n_B, state = encoder.step(mel_BTM[:, 50:], state.reset(torch.tensor([False, True])), final=True)

    assert n_B.tolist() == [21, 18]
    torch.testing.assert_close(torch.cat([first[0], rest[0]]), encode(encoder, mel_BTM)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(rest[1, :18], encode(encoder, mel_BTM[1:, 50:])[0], atol=1e-5, rtol=0)
    assert not any(tensor.any() for tensor in vars(state).values())


@torch.no_grad()
def test_one_row_may_end_before_the_others() -> None:
    encoder, mel_BTM = make(), mels(2, 90, 11)
    first, n_B, state = encoder.step(mel_BTM[:, :50], encoder.init_state(2), final=torch.tensor([True, False]))
    assert n_B.tolist() == [17, 14]
    torch.testing.assert_close(first[0], encode(encoder, mel_BTM[:1, :50])[0], atol=1e-5, rtol=0)
    rest, n_B, _ = encoder.step(mel_BTM[:, 50:], state, final=True)
    torch.testing.assert_close(rest[0, : n_B[0]], encode(encoder, mel_BTM[:1, 50:])[0], atol=1e-5, rtol=0)
    whole = encode(encoder, mel_BTM[1:])[0]
    torch.testing.assert_close(torch.cat([first[1, :14], rest[1, : n_B[1]]]), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_reset_row_recovers_from_nan() -> None:
    encoder, mel_BTM = make(), mels(1, 42, 11)
    _, _, state = encoder.step(torch.full((1, 50, 11), float("nan")), encoder.init_state(1))
    h_BSD, _, _ = encoder.step(mel_BTM, state.reset(torch.tensor([True])), final=True)
    torch.testing.assert_close(h_BSD, encode(encoder, mel_BTM), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_stream_has_no_end() -> None:
    """The same chunk, over and over: the output settles, and does not depend on how long the stream has run."""
    encoder, chunk_BTM = make(), mels(1, 21, 11)
    state, outputs = encoder.init_state(1), []
    for _ in range(60):
        h_BSD, _, state = encoder.step(chunk_BTM, state)
        outputs.append(h_BSD)
    assert torch.equal(outputs[20], outputs[59])
    assert not torch.equal(outputs[0], outputs[20])


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    encoder = make()
    with pytest.raises(ValueError, match=r"mel: need \(rows, frames, 11 bins\)"):
        encoder(mels(1, 9, 13), lengths(9))
    with pytest.raises(ValueError, match=r"n_frames: \[10\] does not fit"):
        encoder(mels(1, 9, 11), lengths(10))
    with pytest.raises(ValueError, match="mel: no frames"):
        encoder(mels(1, 0, 11), lengths(0))
    with pytest.raises(ValueError, match="chunk_frames must be at least 1"):
        encoder(mels(1, 9, 11), lengths(9), chunk_frames=0)


def test_bad_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="dim 30 must be a multiple"):
        dataclasses.replace(CONFIG, dim=30)
    with pytest.raises(ValueError, match="left_chunks"):
        dataclasses.replace(CONFIG, left_chunks=-1)
