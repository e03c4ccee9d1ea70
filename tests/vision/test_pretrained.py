"""Encoders that start from a ViT or a convolutional backbone compute exactly what it computes."""

import pytest
import timm
import torch
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers import QuickGELU as TimmQuickGELU
from timm.models import VisionTransformer as TimmViT
from torch import Tensor, nn

from lm import hub
from vision.encoder import PRESETS, ImageEncoder
from vision.pretrained import config_from_vit, init_from_vit, init_stem, load_vit, read_efficientnet_lite0
from vision.tiling import PIXEL_MEAN, PIXEL_STD, Pictures, Tiles

LAYERS = (1, 3)
SHAPE = {
    "img_size": 21,
    "patch_size": 7,
    "embed_dim": 22,
    "depth": 5,
    "num_heads": 2,
    "mlp_ratio": 1.5,
    "num_classes": 3,
}


def randomised(vit: nn.Module) -> nn.Module:
    """Draws every parameter, so that a swapped or forgotten one shows."""
    torch.manual_seed(0)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit.eval()


def timm_vit(**options: object) -> TimmViT:
    return randomised(TimmViT(**(SHAPE | options)))


def open_clip_vit(**options: object) -> OpenClipViT:
    shape = {
        "image_size": 21,
        "patch_size": 7,
        "width": 22,
        "layers": 5,
        "heads": 2,
        "mlp_ratio": 1.5,
        "output_dim": 13,
    }
    return randomised(OpenClipViT(**(shape | options)))


def encoder_from(vit: nn.Module) -> ImageEncoder:
    encoder = ImageEncoder(config_from_vit(vit, n_global_blocks=1, feature_layers=LAYERS))
    init_from_vit(encoder, vit)
    return encoder


def features(encoder: ImageEncoder, tiles_PCHW: Tensor) -> list[Tensor]:
    """Final output and intermediate features of single-tile pictures, each `(P, L, D)`."""
    pictures = Pictures.collate([Tiles(tile[None], 1, 1) for tile in tiles_PCHW])
    features_PLF, width = encoder(pictures)[:, 0], encoder.config.width
    n_layers = len(encoder.config.feature_layers)
    return [features_PLF[..., :width], *(features_PLF[..., width + i :: n_layers] for i in range(n_layers))]


def timm_features(vit: TimmViT, tiles_PCHW: Tensor) -> list[Tensor]:
    """As `features`: the input of block i is the output of block i - 1."""
    before = [layer - 1 for layer in LAYERS]
    final, taken = vit.forward_intermediates(tiles_PCHW, before, return_prefix_tokens=True, output_fmt="NLC")
    return [final, *(torch.cat([prefix, patches], dim=1) for patches, prefix in taken)]


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": False}, {"pre_norm": True, "act_layer": TimmQuickGELU}],  # pre-norm ViTs have no patch bias
    ids=["augreg", "without-qkv-bias", "clip"],
)
def test_features_equal_timms(options: dict) -> None:
    vit = timm_vit(**options)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    tiles_PCHW = torch.randn(3, 3, 21, 21)
    for ours, theirs in zip(features(encoder_from(vit), tiles_PCHW), timm_features(vit, tiles_PCHW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items()), (
        "the source is left alone"
    )


@pytest.mark.parametrize("options", [{}, {"act_layer": QuickGELU}], ids=["gelu", "metaclip"])
def test_features_equal_open_clips(options: dict) -> None:
    vit = open_clip_vit(**options)
    tiles_PCHW = torch.randn(3, 3, 21, 21)
    taken = vit.forward_intermediates(
        tiles_PCHW, [layer - 1 for layer in LAYERS], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    pairs = zip(taken["image_intermediates_prefix"], taken["image_intermediates"], strict=True)
    final = vit.ln_post(vit.transformer(vit._embeds(tiles_PCHW)))
    theirs = [final, *(torch.cat(pair, dim=1) for pair in pairs)]
    for ours, reference in zip(features(encoder_from(vit), tiles_PCHW), theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_another_tile_size_interpolates_positions_as_timm_does() -> None:
    vit = timm_vit()
    encoder = encoder_from(vit)
    encoder.resize(42)
    init_from_vit(encoder, vit)
    vit.set_input_size(42)
    tiles_PCHW = torch.randn(2, 3, 42, 42)
    for ours, theirs in zip(features(encoder, tiles_PCHW), timm_features(vit, tiles_PCHW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_opening_the_position_gate_changes_nothing_at_first() -> None:
    encoder, tiles_PCHW = encoder_from(timm_vit()), torch.randn(2, 3, 21, 21)
    before = features(encoder, tiles_PCHW)[0]
    nn.init.constant_(encoder.gated_positional_embedding.gate, 0.7)
    torch.testing.assert_close(features(encoder, tiles_PCHW)[0], before, rtol=1e-4, atol=1e-4)


def test_paper_preset_fits_metaclips_vit_h_14() -> None:
    with torch.device("meta"):
        vit = OpenClipViT(
            image_size=224, patch_size=14, width=1280, layers=32, heads=16, mlp_ratio=4.0, act_layer=QuickGELU
        )
    assert config_from_vit(vit, n_global_blocks=8, feature_layers=(3, 7, 15, 23, 30)) == PRESETS["vit-h-14"]()


@pytest.mark.parametrize(
    ("vit", "message"),
    [
        (lambda: timm_vit(reg_tokens=2), "reg_token has no place"),
        (lambda: timm_vit(init_values=0.1), "ls1.gamma has no place"),
        (lambda: timm_vit(class_token=False, global_pool="avg"), "one class token"),
        (lambda: timm_vit(no_embed_class=True), "one class token"),
        (lambda: timm_vit(fc_norm=True), "missing layernorm_post"),
        (lambda: timm_vit(depth=4), "n_blocks: the encoder has 5, the ViT 4"),
        (lambda: timm_vit(block_fn=timm.models.vision_transformer.ResPostBlock), "expected a plain ViT"),
        (lambda: timm_vit(act_layer=nn.ReLU), "activation ReLU"),
    ],
)
def test_other_vits_are_refused_by_name(vit, message: str) -> None:
    encoder = encoder_from(timm_vit())
    with pytest.raises(ValueError, match=message):
        init_from_vit(encoder, vit())


def test_biases_need_a_place() -> None:
    bare = encoder_from(timm_vit(qkv_bias=False, proj_bias=False))
    assert not bare.config.attention_bias
    with pytest.raises(ValueError, match="attention_bias=True"):
        init_from_vit(bare, timm_vit())


def test_unknown_names_are_refused_without_a_download() -> None:
    with pytest.raises(ValueError, match="neither a timm model nor"):
        load_vit("vit_of_nowhere")
    with pytest.raises(ValueError, match="metaclip_fullcc"):
        load_vit("ViT-H-14-quickgelu/nothing")


# -- stem ------------------------------------------------------------------------------------------------------------


def test_stem_loads_efficientnet_lite0() -> None:
    """The stem is the backbone under its own normalisation, (pixel - 127) / 128, at the borders too."""
    try:
        path = hub.download("efficientnet-lite0")
    except ValueError as error:
        pytest.skip(str(error))
    encoder = ImageEncoder(PRESETS["hybrid-s"]())
    init_stem(encoder, "efficientnet-lite0")
    backbone = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3, 4)).eval()
    backbone.load_state_dict(read_efficientnet_lite0(path))
    pixels = torch.randint(0, 256, (2, 3, 128, 128)).float()
    mean, std = (torch.tensor(x)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
    fine, coarse = backbone((pixels - 127) / 128)
    ours = encoder.patch_embed.backbone((pixels / 255 - mean) / std)
    torch.testing.assert_close(ours[:, :112], fine, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[:, 112:, ::2, ::2], coarse, rtol=1e-3, atol=1e-3)
    assert fine.std() > 0.1 and coarse.std() > 0.1


def test_other_files_are_not_taken_for_efficientnet_lite0(tmp_path) -> None:
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    state["conv_stem.weight"] = state["conv_stem.weight"][:, :2]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: conv_stem.weight \(32, 2, 3, 3\)"):
        read_efficientnet_lite0(tmp_path / "other.pth")


def test_init_stem_needs_the_right_stem() -> None:
    with pytest.raises(ValueError, match="has no stem"):
        init_stem(ImageEncoder(PRESETS["debug"]()), "efficientnet-lite0")
