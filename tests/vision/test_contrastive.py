"""Contrastive pre-training: open_clip's loss, pooling that ignores padding, and eight pairs learnt by heart."""

import math

import pytest
import torch
import torch.nn.functional as F

from vision.contrastive import ContrastiveModel, TextTowerConfig
from vision.encoder import PRESETS, ImageEncoder
from vision.tiling import Pictures, Tiles

TEXT = TextTowerConfig(width=26, n_layers=2, n_heads=2, context_length=11, embed_dim=19)
NAMES = ["a red cat", "two dogs", "blue house", "a tree", "the sun", "green frog", "an old car", "a fish"]


@pytest.fixture(scope="module")
def model() -> ContrastiveModel:
    torch.manual_seed(0)
    return ContrastiveModel(ImageEncoder(PRESETS["debug"]()), TEXT)


def pictures(*n_tiles: int) -> Pictures:
    generator = torch.Generator().manual_seed(1)
    return Pictures.collate([Tiles(torch.randn(n, 3, 28, 28, generator=generator), 1, n) for n in n_tiles])


def test_loss_is_the_mean_of_both_directions(model: ContrastiveModel) -> None:
    batch, ids = pictures(1, 3, 2), model.tokenize(NAMES[:3])
    output = model(batch, ids)
    logits = model.embed_pictures(batch) @ model.embed_texts(ids).T / 0.07
    labels = torch.arange(3)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.accuracy, (logits.argmax(-1) == labels).float().mean())


def test_embeddings_are_unit_vectors_of_the_shared_width(model: ContrastiveModel) -> None:
    for embedding, n in ((model.embed_pictures(pictures(1, 3)), 2), (model.embed_texts(model.tokenize(NAMES)), 8)):
        assert embedding.shape == (n, 19)
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(n))


def test_a_pictures_embedding_does_not_depend_on_the_batch(model: ContrastiveModel) -> None:
    batch = pictures(1, 4, 2)
    alone = model.embed_pictures(Pictures(batch.tiles_PNCHW[2:, :2], batch.grid_P2[2:]))
    torch.testing.assert_close(model.embed_pictures(batch)[2:], alone, rtol=1e-5, atol=1e-5)


def test_scale_is_bounded(model: ContrastiveModel) -> None:
    batch, ids = pictures(1, 1), model.tokenize(NAMES[:2])
    learnt = model.logit_scale.item()
    try:
        model.logit_scale.data.fill_(math.log(1e6))
        unbounded = model(batch, ids).loss
        model.logit_scale.data.fill_(math.log(100))
        torch.testing.assert_close(unbounded, model(batch, ids).loss)
    finally:
        model.logit_scale.data.fill_(learnt)


def test_captions_are_cut_to_the_context(model: ContrastiveModel) -> None:
    ids = model.tokenize(["a " * 100, "a"])
    assert ids.shape == (2, 11)
    end = model.tokenizer.eot_token_id
    assert ids[0, -1] == end and ids[1, 2] == end and not ids[1, 3:].any()


def test_learns_eight_pairs_by_heart_and_names_them() -> None:
    torch.manual_seed(0)
    model = ContrastiveModel(ImageEncoder(PRESETS["debug"]()), TEXT)
    batch, ids = pictures(1, 2, 1, 4, 1, 3, 1, 1), model.tokenize(NAMES)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(batch, ids)
    for _ in range(40):
        loss = model(batch, ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    last = model(batch, ids)
    assert last.accuracy == 1 and last.loss < first.loss / 20
    shuffled = NAMES[3:] + NAMES[:3]
    assert model.zero_shot(batch, shuffled) == NAMES
