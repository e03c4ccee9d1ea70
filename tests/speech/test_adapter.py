"""The speech adapter: sizes, an oracle for its layer, and the contract that any way of streaming gives the offline tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig as HFConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from lm.config import PRESETS as LM_PRESETS
from speech.adapter import SpeechAdapter, SpeechAdapterConfig, SpeechAdapterState
from speech.conformer import PRESETS as ENCODER_PRESETS
from speech.conformer import Conformer

CONFIG = SpeechAdapterConfig(
    encoder_dim=11, lm_dim=13, dim=28, ffn_dim=19, n_heads=7, chunk_frames=10, left_chunks=2, norm_eps=1e-3
)
N_FRAMES = torch.tensor([43, 30, 17, 1])  # 22, 15, 9 and 1 tokens; chunks have 5


@pytest.fixture(scope="module")
def adapter() -> SpeechAdapter:
    """All weights count, norms included."""
    adapter = SpeechAdapter(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter.eval().requires_grad_(False)


@pytest.fixture(name="h_BSE")
def frames() -> Tensor:
    return torch.randn(len(N_FRAMES), 43, CONFIG.encoder_dim, generator=torch.Generator().manual_seed(2))


def stream(adapter: SpeechAdapter, h_BSE: Tensor, n_B: Tensor, cuts: list[int], chunk_frames: int) -> list[Tensor]:
    """Tokens of each row, streamed in pieces that end at the cuts; a row ends in the piece that holds its last frame."""
    rows: list[list[Tensor]] = [[] for _ in n_B]
    state = adapter.init_state(len(n_B), chunk_frames)
    for start, end in zip([0, *cuts], [*cuts, h_BSE.shape[1]], strict=True):
        piece_B = n_B.clamp(start, end) - start
        x_BUD, n_tokens_B, state = adapter.step(h_BSE[:, start:end], state, n_B=piece_B, final=n_B <= end)
        for row, x_UD, n in zip(rows, x_BUD, n_tokens_B.tolist(), strict=True):
            row.append(x_UD[:n])
            assert not x_UD[n:].any()
    assert not any(tensor.any() for name, tensor in vars(state).items() if name.startswith("n_"))  # all rows ended
    return [torch.cat(row) for row in rows]


# -------------------------------------------------------------------------------------------------- sizes and lengths


@pytest.mark.parametrize(
    ("lm", "encoder_dim", "preset", "n_parameters"),
    [
        ("llama3-8b", 1536, "paper", 102_252_544),
        ("llama3-70b", 1536, "paper", 114_839_552),
        ("smollm2-135m", 240, "bundled", 1_317_696),
        ("debug", 24, "debug", 11_952),
    ],
)
def test_sizes(lm, encoder_dim, preset, n_parameters):
    with torch.device("meta"):
        adapter = SpeechAdapter(SpeechAdapterConfig.for_lm(LM_PRESETS[lm](), encoder_dim, preset))
    assert sum(p.numel() for p in adapter.parameters()) == n_parameters
    assert adapter.projection.out_features == LM_PRESETS[lm]().dim
    if preset == "paper":
        assert 89.7e6 <= n_parameters <= 114.9e6  # "about 100M"


def test_a_minute_is_750_tokens():
    adapter = SpeechAdapter(SpeechAdapterConfig.for_lm(LM_PRESETS["debug"](), 24, "debug"))
    x_BUD, n_tokens_B = adapter(torch.randn(1, 1500, 24), torch.tensor([1500]))
    assert x_BUD.shape == (1, 750, 48) and n_tokens_B.tolist() == [750]


@pytest.mark.parametrize("n_frames", range(1, 24))
def test_every_length(adapter, n_frames):
    h_BSE = torch.randn(2, n_frames, CONFIG.encoder_dim)
    x_BUD, n_tokens_B = adapter(h_BSE, torch.tensor([n_frames, 1]))
    assert x_BUD.shape == (2, math.ceil(n_frames / 2), CONFIG.lm_dim)
    assert n_tokens_B.tolist() == [math.ceil(n_frames / 2), 1]
    last = h_BSE.clone()
    last[0, -1] += 1  # the last frame is heard, be the length odd or even
    assert not torch.equal(adapter(last, n_tokens_B.new_tensor([n_frames, 1]))[0][0], x_BUD[0])


def test_streams_what_the_encoder_streams():
    """Mel frames in pieces through both give the tokens of both offline, each as soon as its chunk is full."""
    torch.manual_seed(5)
    encoder = Conformer(ENCODER_PRESETS["debug"]()).eval()
    adapter = SpeechAdapter(SpeechAdapterConfig.for_lm(LM_PRESETS["debug"](), encoder.config.dim, "debug"))
    assert adapter.config.chunk_frames == encoder.config.chunk_frames
    mel_BTM = torch.randn(2, 83, encoder.config.n_mels)
    offline, n_tokens_B = adapter(*encoder(mel_BTM, torch.tensor([83, 83]), 6), 6)
    assert n_tokens_B.tolist() == [11, 11]
    encoder_state, adapter_state = encoder.init_state(2, 6), adapter.init_state(2, 6)
    streamed = []
    for piece_BTM in mel_BTM.split(17, dim=1):
        final = piece_BTM.shape[1] < 17
        h_BSD, n_B, encoder_state = encoder.step(piece_BTM, encoder_state, final=final)
        x_BUD, _, adapter_state = adapter.step(h_BSD, adapter_state, n_B=n_B, final=final)
        streamed.append(x_BUD)
    assert [x.shape[1] for x in streamed] == [0, 3, 3, 0, 5]
    torch.testing.assert_close(torch.cat(streamed, dim=1), offline, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- oracle


def test_agrees_with_a_llama_layer_without_causal_mask(adapter, h_BSE):
    hf_config = HFConfig(
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.ffn_dim,
        num_attention_heads=CONFIG.n_heads,
        num_key_value_heads=CONFIG.n_heads,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    layer, norm = LlamaDecoderLayer(hf_config, 0), LlamaRMSNorm(CONFIG.dim, CONFIG.norm_eps)
    ours = {k: v for k, v in adapter.state_dict().items() if not k.startswith(("conv.", "norm.", "projection."))}
    layer.load_state_dict(ours)
    norm.load_state_dict(adapter.norm.state_dict())
    padded_BES = F.pad(h_BSE, (0, 0, 1, 1)).transpose(
        1, 2
    )  # 43 frames: one zero before them, one to fill the last pair
    x_BUD = F.conv1d(padded_BES, adapter.conv.weight, adapter.conv.bias, stride=2).transpose(1, 2)
    rope = LlamaRotaryEmbedding(hf_config)(x_BUD, torch.arange(22)[None])
    mask = torch.zeros(len(x_BUD), 1, 22, 22)
    expected = F.linear(
        norm(layer(x_BUD, attention_mask=mask, position_embeddings=rope)), *adapter.projection.parameters()
    )
    actual, _ = adapter(h_BSE, torch.full((len(h_BSE),), 43), 44)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("chunk_frames", [2, 10, 26, 44])
def test_a_row_is_the_row_alone(adapter, h_BSE, chunk_frames):
    x_BUD, n_tokens_B = adapter(h_BSE, N_FRAMES, chunk_frames)
    for b, n in enumerate(N_FRAMES.tolist()):
        n_tokens = math.ceil(n / 2)
        assert n_tokens_B[b] == n_tokens
        alone, _ = adapter(h_BSE[b : b + 1, :n], N_FRAMES[b : b + 1], chunk_frames)
        torch.testing.assert_close(x_BUD[b, :n_tokens], alone[0], rtol=1e-5, atol=1e-5)
        assert not x_BUD[b, n_tokens:].any()


def test_padding_changes_nothing(adapter, h_BSE):
    x_BUD, _ = adapter(h_BSE, N_FRAMES)
    padded_BSE = torch.cat([h_BSE, h_BSE], dim=1)
    for b, n in enumerate(N_FRAMES.tolist()):
        padded_BSE[b, n:] = math.nan
    more_BUD, _ = adapter(padded_BSE, N_FRAMES)
    torch.testing.assert_close(more_BUD[:, :22], x_BUD, rtol=1e-5, atol=1e-5)
    assert not more_BUD[:, 22:].any()


@pytest.mark.parametrize("frame", [0, 8, 9, 10, 19, 42])
def test_a_token_sees_its_chunk_and_those_before(adapter, h_BSE, frame):
    """Bit for bit: chunks before a frame's, and those more than `left_chunks` after all that the frame reaches."""
    n_B = torch.full((len(h_BSE),), 43)
    changed_BSE = h_BSE.clone()
    changed_BSE[1, frame] += 1
    before_BUD, after_BUD = adapter(h_BSE, n_B)[0], adapter(changed_BSE, n_B)[0]
    changed_BU = (before_BUD != after_BUD).any(-1)
    first = frame // 10
    last = (frame + frame % 2) // 10 + CONFIG.left_chunks  # an odd frame is seen by the next token's convolution, too
    expected_U = torch.tensor([first <= u // 5 <= last for u in range(22)])
    assert torch.equal(changed_BU[1], expected_U)
    assert not changed_BU[[0, 2, 3]].any()


@pytest.mark.parametrize("chunk_frames", [2, 10, 26, 44])
@pytest.mark.parametrize("cuts", [[], [*range(1, 43)], [7, 8, 8, 29], [10, 20, 30, 40], [1, 42]], ids=len)
def test_any_chunking_gives_the_offline_tokens(adapter, h_BSE, cuts, chunk_frames):
    x_BUD, n_tokens_B = adapter(h_BSE, N_FRAMES, chunk_frames)
    streamed = stream(adapter, h_BSE, N_FRAMES, cuts, chunk_frames)
    for row, x_UD, n in zip(streamed, x_BUD, n_tokens_B.tolist(), strict=True):
        torch.testing.assert_close(row, x_UD[:n], rtol=1e-5, atol=1e-5)


def test_tokens_come_when_their_chunk_is_full(adapter, h_BSE):
    state = adapter.init_state(4)
    emitted = []
    for s in range(43):
        _, n_tokens_B, state = adapter.step(h_BSE[:, s : s + 1], state)
        emitted.append(n_tokens_B.tolist())
    assert emitted == [[5] * 4 if s % 10 == 9 else [0] * 4 for s in range(43)]


def test_partial_reset(adapter, h_BSE):
    """Row 0 starts anew in the middle of a chunk; the others do not notice."""
    state = adapter.init_state(4)
    _, _, state = adapter.step(h_BSE[:, :23], state)
    state = state.reset(torch.tensor([True, False, False, False]))
    x_BUD, n_tokens_B, _ = adapter.step(h_BSE[:, 23:], state, final=True)
    n_B = torch.full((4,), 43)
    offline = adapter(h_BSE, n_B)[0]
    fresh = adapter(h_BSE[:, 23:], n_B - 23)[0]
    assert n_tokens_B.tolist() == [10, 12, 12, 12]
    torch.testing.assert_close(x_BUD[0, :10], fresh[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_BUD[1:], offline[1:, 10:], rtol=1e-5, atol=1e-5)


def test_state_saved_and_loaded(adapter, h_BSE, tmp_path):
    _, _, state = adapter.step(h_BSE[:, :27], adapter.init_state(4))
    save_file({name: tensor.contiguous() for name, tensor in vars(state).items()}, tmp_path / "state.safetensors")
    loaded = SpeechAdapterState(**load_file(tmp_path / "state.safetensors"))
    expected, _, _ = adapter.step(h_BSE[:, 27:], state, final=True)
    actual, _, _ = adapter.step(h_BSE[:, 27:], loaded, final=True)
    assert torch.equal(actual, expected) and actual.shape[1] == 12


def test_every_parameter_learns(h_BSE):
    torch.manual_seed(3)
    adapter = SpeechAdapter(CONFIG)
    target = torch.randn(len(h_BSE), 22, CONFIG.lm_dim)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        x_BUD, n_tokens_B = adapter(h_BSE, N_FRAMES)
        real_BU = torch.arange(22) < n_tokens_B[:, None]
        loss = (x_BUD - target)[real_BU].square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_match_embeddings(h_BSE):
    torch.manual_seed(4)
    adapter = SpeechAdapter(dataclasses.replace(CONFIG, lm_dim=1009))
    adapter.match_embeddings(torch.randn(101, 1009) * 0.07)
    x_BUD, _ = adapter(h_BSE[:1], N_FRAMES[:1])
    assert x_BUD.square().mean().sqrt().item() == pytest.approx(0.07, rel=0.05)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 8}, "dim 28 must be a multiple of twice n_heads 8"),
        ({"stride": 4}, "stride 4 must be between 1 and kernel 3"),
        ({"left_chunks": -1}, "left_chunks must not be negative"),
        ({"chunk_frames": 15}, "chunk_frames must be a multiple of the stride 2, got 15"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_bad_calls(adapter, h_BSE):
    with pytest.raises(ValueError, match="preset 'huge' is unknown; choose one of debug, bundled, paper"):
        SpeechAdapterConfig.for_lm(LM_PRESETS["debug"](), 24, "huge")
    with pytest.raises(ValueError, match=r"h: need \(rows, frames, 11\), got \(4, 43, 5\)"):
        adapter(h_BSE[..., :5], N_FRAMES)
    with pytest.raises(ValueError, match=r"n: \[44, 30, 17, 1\] does not fit frames of shape \(4, 43, 11\)"):
        adapter(h_BSE, torch.tensor([44, 30, 17, 1]))
    with pytest.raises(ValueError, match="h: no frames to embed"):
        adapter(h_BSE[:, :0], N_FRAMES * 0)
    with pytest.raises(ValueError, match="chunk_frames must be a multiple of the stride 2, got 7"):
        adapter.init_state(4, chunk_frames=7)
