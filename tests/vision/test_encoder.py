"""The image encoder: counts of the presets, what may influence what, and how its features are laid out."""

import dataclasses

import pytest
import timm
import torch
from torch import Tensor, nn

from vision.encoder import PRESETS, ConvStem, ImageEncoder, ImageEncoderConfig, lookup_tiles
from vision.tiling import PIXEL_MEAN, PIXEL_STD, Pictures, Tiles, supported_grids

# Widths, depths and token counts are all different, so that a wrong reshape fails.
CONFIG = ImageEncoderConfig(
    tile_size=21, patch_size=7, width=22, n_blocks=5, n_heads=2, ffn_dim=17, n_global_blocks=2, feature_layers=(0, 2, 3)
)
HYBRID = ImageEncoderConfig(
    tile_size=32, patch_size=8, width=22, n_blocks=2, n_heads=2, ffn_dim=17, n_global_blocks=1, feature_layers=(0,),
    stem="test_efficientnet", stem_stages=(2, 4),
)  # fmt: skip


def make(config: ImageEncoderConfig = CONFIG, *, open_gates: bool = True) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(config)
    for name, parameter in encoder.named_parameters():
        if "gate" in name.rpartition(".")[2] and open_gates:
            nn.init.uniform_(parameter, 0.3, 0.9)
    return encoder


def pictures(*grids: tuple[int, int], size: int = 21, n_tiles: int | None = None) -> Pictures:
    generator = torch.Generator().manual_seed(1)
    tiles = [Tiles(torch.randn(r * c, 3, size, size, generator=generator), r, c) for r, c in grids]
    return Pictures.collate(tiles, n_tiles)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- counts ----------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_all_presets() -> None:
    counts = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            counts[name] = count(ImageEncoder(preset()))
    assert counts.pop("debug") < 100_000
    assert counts.pop("hybrid-s") <= 7_000_000
    # ViT-H/14 with 8 gated layers: "850M" with a projection to the 70B model's width.
    assert counts.pop("vit-h-14") + 7680 * 8192 + 8192 == pytest.approx(850e6, rel=0.03)
    assert counts.pop("llama3.2-11b-448") == 809_996_819
    assert counts.pop("llama3.2-11b-560") == pytest.approx(822.5e6, rel=1e-4)
    assert not counts


def test_vit_h_14_alone_has_630m_parameters_and_features_of_7680() -> None:
    config = PRESETS["vit-h-14"]()
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    added = (
        "global_blocks",
        "pre_tile_",
        "post_tile_",
        "gated_positional_embedding.tile",
        "gated_positional_embedding.gate",
    )
    alone = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith(added))
    assert alone == pytest.approx(630e6, rel=0.002)
    assert config.feature_dim == 7680 and config.n_tokens == 257


def test_tokens_of_four_336_pixel_tiles_are_the_papers_2308() -> None:
    assert 4 * dataclasses.replace(PRESETS["vit-h-14"](), tile_size=336).n_tokens == 2308


# -- features --------------------------------------------------------------------------------------------------------


def test_features_are_the_final_output_then_the_layers_with_channels_interleaved() -> None:
    encoder, batch = make(), pictures((1, 2))
    inputs: dict[int, Tensor] = {}
    for i, block in enumerate(encoder.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0]}))
    final: list[Tensor] = []
    encoder.global_blocks[-1].register_forward_hook(lambda *args: final.append(args[-1]))
    features_PNLF = encoder(batch)
    assert features_PNLF.shape == (1, 2, 10, 88)
    flat = features_PNLF.flatten(1, 2)
    assert torch.equal(flat[..., :22], final[0])
    for position, layer in enumerate((0, 2, 3)):
        assert torch.equal(flat[..., 22 + position :: 3], inputs[layer])


def test_new_encoder_is_the_plain_vit() -> None:
    encoder, batch = make(open_gates=False), pictures((2, 2), (1, 3))
    before = encoder(batch)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "gate" not in name.rpartition(".")[2] and ("global_blocks" in name or "tile" in name):
                parameter.normal_()
    assert torch.equal(before, encoder(batch))


def test_every_parameter_gets_a_gradient_once_gates_are_open() -> None:
    encoder = make()
    encoder(pictures((2, 2), (1, 3))).square().sum().backward()
    without = {
        name for name, parameter in encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert not without


# -- what may influence what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, HYBRID], ids=["plain", "hybrid"])
def test_padded_tiles_change_nothing_and_have_no_features(config: ImageEncoderConfig) -> None:
    encoder = make(config).eval()
    grids = [(1, 1), (3, 1), (2, 2), (1, 1), (1, 2)]
    batch = pictures(*grids, size=config.tile_size)
    batch.tiles_PNCHW[~batch.valid_PN] = torch.nan
    together = encoder(batch)
    assert not together[~batch.valid_PN].any()
    for i, (rows, columns) in enumerate(grids):
        n_tiles = rows * columns
        alone = encoder(Pictures(batch.tiles_PNCHW[i : i + 1, :n_tiles], batch.grid_P2[i : i + 1]))
        torch.testing.assert_close(together[i, :n_tiles], alone[0], rtol=1e-5, atol=1e-5)


def test_tiles_of_a_picture_see_each_other_and_no_other_picture() -> None:
    encoder, batch = make(), pictures((1, 2), (2, 1))
    before = encoder(batch)
    batch.tiles_PNCHW[0, 1] += 1
    changed_PN = (encoder(batch) != before).flatten(2).any(-1)
    assert changed_PN.tolist() == [[True, True], [False, False]]


def test_layouts_of_as_many_tiles_are_told_apart_by_the_gated_positions_alone() -> None:
    wide, tall = pictures((1, 2)), pictures((2, 1))
    assert torch.equal(wide.tiles_PNCHW, tall.tiles_PNCHW)
    closed, opened = make(open_gates=False), make()
    assert torch.equal(closed(wide), closed(tall))
    assert not torch.allclose(opened(wide), opened(tall), atol=1e-3)


def test_lookup_reads_tables_by_row_and_column() -> None:
    table_NN1 = torch.arange(16.0).view(4, 4, 1)
    grids = supported_grids(4)
    entries = lookup_tiles(table_NN1, torch.tensor(grids), n_tiles=4)[..., 0]
    for (rows, columns), row in zip(grids, entries.tolist(), strict=True):
        expected = [4 * r + c for r in range(rows) for c in range(columns)]
        assert row == expected + [0] * (4 - len(expected))


def test_lookup_reads_tables_by_layout_and_place() -> None:
    grids = supported_grids(4)
    table_GN1 = torch.arange(4.0 * len(grids)).view(-1, 4, 1)
    order = torch.tensor([5, 0, 7, 3])
    entries = lookup_tiles(table_GN1, torch.tensor(grids)[order], n_tiles=3, per_grid=True)[..., 0]
    assert torch.equal(entries, table_GN1[order, :3, 0])


def test_released_quirk_lets_real_tokens_see_padding() -> None:
    """That it is exactly the released model's padding is shown against transformers, in test_mllama.py."""
    honest, quirky = make(), make(dataclasses.replace(CONFIG, released_padding_quirk=True))
    full, padded = pictures((2, 2)), pictures((1, 3), n_tiles=4)
    # Even a full picture sees the tokens that pad each tile from 10 to 16.
    assert not torch.allclose(honest(full), quirky(full), atol=1e-3)
    before = quirky(padded)
    assert before[:, 3].any() and not honest(padded)[:, 3].any()
    padded.tiles_PNCHW[:, 3] = torch.nan
    assert torch.equal(quirky(padded), before), "the pixels of padding are never read"


# -- tile size -------------------------------------------------------------------------------------------------------


def test_resize_interpolates_patch_positions_and_keeps_the_class_tokens() -> None:
    encoder = make()
    table = encoder.gated_positional_embedding
    with torch.no_grad():  # a ramp from left to right, the same in every row
        table.embedding[1:] = torch.arange(3.0).repeat(3)[:, None]
    class_token, tile_classes = table.embedding[0].clone(), table.tile_embedding[:, :, 0].clone()
    encoder.resize(42)
    assert encoder.config.tile_size == 42 and encoder.config.n_tokens == 37
    assert table.embedding.shape == (37, 22) and table.tile_embedding.shape == (4, 4, 37, 22)
    assert torch.equal(table.embedding[0], class_token) and torch.equal(table.tile_embedding[:, :, 0], tile_classes)
    ramp_HW = table.embedding[1:, 0].view(6, 6)
    assert torch.allclose(ramp_HW, ramp_HW[:1].expand(6, 6), atol=1e-5) and (ramp_HW[0].diff() > 0).all()
    assert encoder(pictures((1, 2), size=42)).shape == (1, 2, 37, 88)
    with pytest.raises(ValueError, match="tiles of 21 pixels do not suit"):
        encoder(pictures((1, 2)))


def test_resize_to_the_same_size_changes_nothing() -> None:
    encoder, batch = make(), pictures((2, 2))
    before = encoder(batch)
    encoder.resize(21)
    assert torch.equal(encoder(batch), before)


# -- stem ------------------------------------------------------------------------------------------------------------


def test_stem_gives_the_backbones_features_of_its_own_normalisation() -> None:
    stem = ConvStem("test_efficientnet", (2, 4), stride=8)
    stem.set_pixel_statistics([0.2, 0.3, 0.5], [0.7, 0.6, 0.4])
    torch.manual_seed(0)
    reference = timm.create_model("test_efficientnet", features_only=True, out_indices=(2, 4))
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    stem.backbone.load_state_dict(reference.state_dict())
    pixels = torch.rand(2, 3, 64, 96)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    fine, coarse = reference.eval()(normalised((0.2, 0.3, 0.5), (0.7, 0.6, 0.4)))
    ours = stem(normalised(PIXEL_MEAN, PIXEL_STD))
    assert ours.shape == (2, 32 + 64, 8, 12) and stem.num_features == 96
    torch.testing.assert_close(ours[:, :32], fine, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours[:, 32:], coarse.repeat_interleave(4, 2).repeat_interleave(4, 3), rtol=1e-4, atol=1e-5
    )


def test_stem_learns_but_its_batch_norms_stay_fixed() -> None:
    encoder, batch = make(HYBRID), pictures((1, 2), (1, 1), size=32)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert torch.equal(encoder.train()(batch), encoder.eval()(batch))
    encoder.train()(batch).square().sum().backward()
    assert any("running_var" in name for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    assert encoder.patch_embed.backbone.backbone.conv_stem.weight.grad.any()


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_size": 22}, "multiple of patch_size"),
        ({"n_heads": 3}, "multiple of n_heads"),
        ({"act": "relu"}, "choose one of gelu, quick_gelu"),
        ({"feature_layers": (0, 5)}, "0 to 4"),
        ({"feature_layers": (2, 0)}, "must rise"),
        ({"stem": "test_efficientnet"}, "go together"),
    ],
)
def test_bad_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_bad_pictures_and_stems_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tiles 4"):
        make()(pictures((1, 5)))
    with pytest.raises(ValueError, match=r"collate\(..., n_tiles=4\)"):
        make(dataclasses.replace(CONFIG, released_padding_quirk=True))(pictures((1, 3)))
    with pytest.raises(ValueError, match=r"strides \[8, 32\]"):
        ImageEncoder(dataclasses.replace(HYBRID, patch_size=16))
