"""What all rows begin with runs once in training, and that changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.checkpoint import debug_model
from mm.model import MultimodalLlama
from mm.processor import Batch
from mm.train.loss import count_shared, next_token_loss

SYSTEM = {"role": "system", "content": "You are helpful."}
PICTURE = np.random.default_rng(0).integers(0, 256, (29, 31, 3), dtype=np.uint8)
SPEECH = (np.random.default_rng(1).uniform(-0.5, 0.5, 3700).astype(np.float32), 16_000)


def conversation(*content: Any, answer: str, system: dict[str, Any] = SYSTEM) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": part[0], part[0]: part[1]}
        for part in content
    ]
    return [system, {"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def batch_of(model: MultimodalLlama, *conversations: list[dict[str, Any]]) -> Batch:
    return model.processor.collate([model.processor.encode(messages) for messages in conversations])


def plain_loss(model: MultimodalLlama, batch: Batch) -> Tensor:
    target_BT = torch.where(batch.supervised_BT, batch.ids_BT, -100)[:, 1:]
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), target_BT.flatten(), reduction="sum")


def gradients(model: MultimodalLlama, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model() -> MultimodalLlama:
    model = debug_model()
    model.lm.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "conversations",
    [
        [conversation(("image", PICTURE), "What?", answer="red"), conversation("Hello", answer="Hi there")],
        [conversation(("audio", SPEECH), answer="yes"), conversation(("audio", SPEECH), "Repeat:", answer="no, maybe")],
        [conversation("Look:", ("image", PICTURE), ("audio", SPEECH), answer="a"), conversation("Look: b", answer="b")],
    ],
    ids=["picture", "speech", "both"],
)
def test_loss_and_gradients_are_those_of_whole_rows(model: MultimodalLlama, conversations: list[Any]) -> None:
    batch = batch_of(model, *conversations)
    n_system = len(model.processor.tokenize([SYSTEM]).ids)
    assert count_shared(model, batch) >= n_system
    expected, loss = plain_loss(model, batch), next_token_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    wanted = gradients(model, expected)
    assert wanted
    torch.testing.assert_close(gradients(model, next_token_loss(model, batch)), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_shared_ends_before_media_answers_and_differences(model: MultimodalLlama) -> None:
    def shared(*conversations: list[dict[str, Any]]) -> int:
        return count_shared(model, batch_of(model, *conversations))

    picture = conversation(("image", PICTURE), "What?", answer="red")
    ids = batch_of(model, picture).ids_BT[0].tolist()
    assert shared(picture, picture) == ids.index(model.config.media_ids["image"])
    speech = conversation(("audio", SPEECH), answer="red")
    assert model.config.speech is not None
    assert shared(speech, speech) == batch_of(model, speech).ids_BT[0].tolist().index(model.config.speech.start_id)
    text = conversation("What?", answer="red")
    (first_answer, *_) = batch_of(model, text).supervised_BT[0].nonzero()[:, 0].tolist()
    assert shared(text, text) == first_answer - 1  # the token before an answer predicts it
    other = conversation("What?", answer="red", system={"role": "system", "content": "Xou are helpful."})
    (n_same, *_) = (batch_of(model, text).ids_BT[0] != batch_of(model, other).ids_BT[0]).nonzero()
    assert shared(text, other) == n_same
