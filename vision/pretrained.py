"""Pre-trained weights for an image encoder: a timm or open_clip ViT for its blocks, a timm backbone for its stem.

Whatever the source holds must find its place, and every block of the encoder must be filled; both are checked by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from lm import hub
from vision.encoder import ACTIVATIONS, ConvStem, ImageEncoder, ImageEncoderConfig

#: Where a ViT's tensors go: patterns of their names, and our names.
_TIMM_KEYS = {
    r"cls_token": "class_embedding",
    r"pos_embed": "gated_positional_embedding.embedding",
    r"patch_embed\.proj\.(weight|bias)": r"patch_embed.proj.\1",
    r"norm_pre\.(weight|bias)": r"layernorm_pre.\1",
    r"norm\.(weight|bias)": r"layernorm_post.\1",
    r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)": r"blocks.\1.\2.\3",
    r"(head|fc_norm)\..*": None,  # classifier or projection to a shared space
}
_OPEN_CLIP_KEYS = {
    r"class_embedding": "class_embedding",
    r"positional_embedding": "gated_positional_embedding.embedding",
    r"conv1\.weight": "patch_embed.proj.weight",
    r"ln_pre\.(weight|bias)": r"layernorm_pre.\1",
    r"ln_post\.(weight|bias)": r"layernorm_post.\1",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)": r"blocks.\1.attn.qkv.\2",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
    r"proj": None,
}
#: What Llama 3 adds to a ViT; a source has none of it.
_ADDED = re.compile(
    r"(global_blocks|(pre|post)_tile_positional_embedding)\..*|gated_positional_embedding\.(tile_embedding|gate)"
)


def load_vit(name: str) -> nn.Module:
    """A pre-trained ViT by name.

    Args:
        name: a timm model such as "vit_base_patch16_clip_224.openai", or an open_clip architecture and its weights such
            as "ViT-H-14-quickgelu/metaclip_fullcc" (the paper's encoder), of which the image tower is returned.

    Raises:
        ValueError: neither library knows it, or its weights cannot be downloaded.
    """
    architecture, _, weights = name.partition("/")
    try:
        if architecture in open_clip.list_models():
            if weights not in open_clip.list_pretrained_tags_by_model(architecture):
                known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
                raise ValueError(
                    f"name: {architecture} has no weights {weights!r}; choose ARCHITECTURE/WEIGHTS from {known}"
                )
            return open_clip.create_model(architecture, pretrained=weights).visual
        if not timm.is_model(name):
            raise ValueError(f"name: {name!r} is neither a timm model nor an open_clip architecture with its weights")
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"name: the weights of {name} could not be downloaded ({error})") from error


def config_from_vit(vit: Any, *, n_global_blocks: int, feature_layers: tuple[int, ...]) -> ImageEncoderConfig:
    """The encoder that continues a timm or open_clip ViT with Llama 3's additions."""
    block: Any
    if isinstance(vit, timm.models.VisionTransformer) and type(vit.blocks[0]) is timm.models.vision_transformer.Block:
        n_blocks, block, pre_norm = len(vit.blocks), vit.blocks[0], vit.norm_pre
        norm, fc1, act = block.norm1, block.mlp.fc1, block.mlp.act
        tile_size, patch_size = vit.patch_embed.img_size, vit.patch_embed.patch_size
        attention_bias = block.attn.qkv.bias is not None or block.attn.proj.bias is not None
    elif isinstance(vit, open_clip.transformer.VisionTransformer):
        n_blocks, block, pre_norm = len(vit.transformer.resblocks), vit.transformer.resblocks[0], vit.ln_pre
        norm, fc1, act = block.ln_1, block.mlp.c_fc, block.mlp.gelu
        tile_size, patch_size = vit.image_size, vit.patch_size
        attention_bias = True
    else:
        raise ValueError(f"vit: expected a plain ViT of timm or open_clip, got {type(vit).__name__}")
    acts = [name for name in ACTIVATIONS if name.replace("_", "") == type(act).__name__.lower()]
    if not acts:
        raise ValueError(f"vit: activation {type(act).__name__} is not one of {', '.join(ACTIVATIONS)}")
    return ImageEncoderConfig(
        tile_size=tile_size[0],
        patch_size=patch_size[0],
        width=fc1.in_features,
        n_blocks=n_blocks,
        n_heads=block.attn.num_heads,
        ffn_dim=fc1.out_features,
        n_global_blocks=n_global_blocks,
        feature_layers=feature_layers,
        norm_eps=norm.eps,
        act=acts[0],
        attention_bias=attention_bias,
        pre_norm=not isinstance(pre_norm, nn.Identity),
    )


@torch.no_grad()
def init_from_vit(encoder: ImageEncoder, vit: str | nn.Module) -> None:
    """Makes the encoder compute what a pre-trained ViT computes; what Llama 3 adds stays as it is.

    Positions are interpolated to the encoder's tile size; a patch bias becomes part of them.

    Args:
        encoder: without a stem; of the ViT's shape.
        vit: a timm or open_clip ViT, or its name as in `load_vit`.

    Raises:
        ValueError: shapes differ, or a tensor has no place or is missing; names it.
    """
    vit = load_vit(vit) if isinstance(vit, str) else vit
    config = encoder.config
    source = config_from_vit(vit, n_global_blocks=config.n_global_blocks, feature_layers=())
    for field in ("patch_size", "width", "n_blocks", "n_heads", "ffn_dim", "norm_eps", "act", "pre_norm"):
        if getattr(source, field) != getattr(config, field):
            raise ValueError(f"{field}: the encoder has {getattr(config, field)}, the ViT {getattr(source, field)}")
    if config.stem or (source.attention_bias and not config.attention_bias):
        raise ValueError("encoder: needs stem=None, and attention_bias=True for a ViT with biases; see config_from_vit")
    keys = _TIMM_KEYS if isinstance(vit, timm.models.VisionTransformer) else _OPEN_CLIP_KEYS
    state = {key: tensor for name, tensor in vit.state_dict().items() if (key := _renamed(name, keys))}
    positions = state["gated_positional_embedding.embedding"].reshape(1, -1, config.width).clone()
    if positions.shape[1] != source.n_tokens or "class_embedding" not in state:
        raise ValueError("vit: needs one class token with a position of its own, and no registers")
    positions[:, 1:] += state.pop("patch_embed.proj.bias", positions.new_zeros(config.width))
    positions = resample_abs_pos_embed(positions, [config.grid_size, config.grid_size])[0]
    state["gated_positional_embedding.embedding"] = positions
    state["class_embedding"] = state["class_embedding"].flatten()
    _load(encoder, state)
    # Until training says otherwise, a tile's positions are those within the tile, however far the gate opens.
    encoder.gated_positional_embedding.tile_embedding.copy_(positions)


def _renamed(name: str, keys: dict[str, str | None]) -> str | None:
    for pattern, ours in keys.items():
        if match := re.fullmatch(pattern, name):
            return ours and match.expand(ours)
    raise ValueError(f"vit: {name} has no place in the image encoder, which takes plain ViTs only")


def _load(encoder: ImageEncoder, state: dict[str, Tensor]) -> None:
    """Loads a ViT's tensors; a bias of its blocks that the ViT lacks is zero, everything else must be there."""
    for name, parameter in encoder.named_parameters():
        if re.fullmatch(r"blocks\.\d+\.(attn|mlp)\..*\.bias", name) and name not in state:
            state[name] = torch.zeros_like(parameter)
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    missing = [name for name in missing if not _ADDED.fullmatch(name)]
    if missing or unexpected:
        raise ValueError(
            f"vit: missing {', '.join(missing) or 'nothing'}; without a place {', '.join(unexpected) or 'nothing'}"
        )


def init_stem(encoder: ImageEncoder, source: str) -> None:
    """Fills the stem's backbone with pre-trained weights.

    Args:
        encoder: with a stem.
        source: "efficientnet-lite0", which `lm.hub` downloads, or a timm model with weights as "resnet26d.bt_in1k".

    Raises:
        ValueError: the encoder has no stem, or the weights are of another backbone or cannot be downloaded.
    """
    config = encoder.config
    if config.stem is None:
        raise ValueError("encoder: has no stem; give its configuration stem and stem_stages")
    stem = encoder.patch_embed.backbone
    assert isinstance(stem, ConvStem)
    if source != "efficientnet-lite0":
        try:
            backbone: Any = timm.create_model(
                source, pretrained=True, features_only=True, out_indices=config.stem_stages
            )
            stem.backbone.load_state_dict(backbone.state_dict())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"source: the weights of {source} could not be loaded ({error})") from error
        stem.set_pixel_statistics(backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])
        return
    if config.stem != "tf_efficientnet_lite0":
        raise ValueError(f"source: {source} is for the stem tf_efficientnet_lite0, this encoder's is {config.stem}")
    stem.backbone.load_state_dict(read_efficientnet_lite0(hub.download(source)))
    # They were trained on (pixel - 127) / 128, which timm's description of them rounds to (pixel - 127.5) / 127.5.
    stem.set_pixel_statistics([127 / 255] * 3, [128 / 255] * 3)


def read_efficientnet_lite0(path: Path) -> dict[str, Tensor]:
    """Weights of EfficientNet-PyTorch's Lite0 under timm's names, without the classifier.

    Both define the layers in one order, so tensors pair up by position; last parts of names and shapes are checked.
    """
    theirs = torch.load(path, weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    state = {}
    for (their_name, tensor), (name, like) in zip(theirs.items(), ours.items(), strict=True):
        if their_name.rpartition(".")[2] != name.rpartition(".")[2] or tensor.shape != like.shape:
            raise ValueError(
                f"{path.name}: {their_name} {tuple(tensor.shape)} is not timm's {name} {tuple(like.shape)}"
            )
        state[name] = tensor
    return {
        name: tensor for name, tensor in state.items() if not name.startswith(("conv_head.", "bn2.", "classifier."))
    }
