"""Frame features on disk: a frozen encoder sees every clip once, however many epochs there are.

Shape letters: V clips, T frames of a clip, P frames of all clips, N tiles of a frame, L tokens of a tile, F feature width.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from video.clips import Clips, encode_frames
from vision.encoder import ImageEncoder
from vision.tiling import Pictures

NAME = "features_TNLF"


def digest(what: str, *tensors: Tensor) -> str:
    """A hash of a text and of the shapes, types and contents of tensors."""
    hashed = hashlib.blake2b(what.encode(), digest_size=20)
    for tensor in tensors:
        hashed.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


class FeatureCache:
    """What a frozen image encoder makes of clips, kept in half precision: a file per clip, a folder per encoder.

    A clip is known by its tiles, which tell its content, how many frames were taken, and how they were cut. Its features are
    computed in FP32 and apart from the rest of the batch, and are rounded before they are first used; so they are the same
    in every epoch, in every batch and after a restart.

    Args:
        directory: made if missing; may be shared by runs, and deleted when none is running.
        encoder: its weights must not change any more.
    """

    def __init__(self, directory: str | Path, encoder: ImageEncoder) -> None:
        state = encoder.state_dict()
        self.directory = Path(directory) / digest(f"{encoder.config} {list(state)}", *state.values())
        self.directory.mkdir(parents=True, exist_ok=True)
        self.encoder = encoder

    @torch.no_grad()
    def __call__(self, clips: Clips) -> Tensor:
        """Features `(P, N, L, F)` of the frames of clips; zeros for padded tiles."""
        tiles_PNCHW, grid_P2 = clips.frames.tiles_PNCHW, clips.frames.grid_P2
        config, sizes = self.encoder.config, clips.n_frames_V.tolist()
        features_PNLF = tiles_PNCHW.new_zeros(*tiles_PNCHW.shape[:2], config.n_tokens, config.feature_dim)
        for features_TNLF, tiles, grid in zip(
            features_PNLF.split(sizes), tiles_PNCHW.split(sizes), grid_P2.split(sizes), strict=True
        ):
            n_tiles = int(grid[0].prod())
            path = self.directory / f"{digest('clip', tiles[:, :n_tiles], grid)}.safetensors"
            known = read_features(path)
            if known is None:
                known = self._encode(tiles, grid)[:, :n_tiles].half().cpu()
                write_features(path, known)
            features_TNLF[:, :n_tiles] = known.to(features_TNLF)
        return features_PNLF

    def _encode(self, tiles_TNCHW: Tensor, grid_T2: Tensor) -> Tensor:
        """Features of a clip's frames, in FP32; a frame that is the one before it, pixel for pixel, is not looked at again."""
        is_new_T = torch.ones(len(tiles_TNCHW), dtype=torch.bool, device=tiles_TNCHW.device)
        is_new_T[1:] = (tiles_TNCHW[1:] != tiles_TNCHW[:-1]).flatten(1).any(1)
        with torch.autocast(tiles_TNCHW.device.type, enabled=False):
            features = encode_frames(self.encoder, Pictures(tiles_TNCHW[is_new_T], grid_T2[is_new_T]))
        return features[is_new_T.cumsum(0) - 1]


def write_features(path: Path, features_TNLF: Tensor) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({NAME: features_TNLF.contiguous()}, temporary, {"digest": digest(NAME, features_TNLF)})
    os.replace(temporary, path)


def read_features(path: Path) -> Tensor | None:
    """What `write_features` wrote; None where there is no such file, or its content is no longer what it was."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        features_TNLF = file.get_tensor(NAME)
        if (file.metadata() or {}).get("digest") == digest(NAME, features_TNLF):
            return features_TNLF
    return None
