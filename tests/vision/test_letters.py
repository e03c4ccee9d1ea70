"""The decoder of letters: what it may see, and what it is given to say."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vision.encoder import PRESETS, ImageEncoder
from vision.letters import ANSWER, END, MAX_LETTERS, LetterModel, spell
from vision.tiling import Pictures, tile_image


def model() -> LetterModel:
    torch.manual_seed(0)
    return LetterModel(ImageEncoder(PRESETS["debug"]())).eval()


def pictures(*sizes: tuple[int, int]) -> Pictures:
    torch.manual_seed(1)
    noise = [torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy() for width, height in sizes]
    return Pictures.collate([tile_image(Image.fromarray(pixels), 28, 4) for pixels in noise])


def test_a_question_is_read_and_its_answer_said() -> None:
    ids, said = spell("Sí?", "né")
    assert ids == [*"Sí?".encode(), ANSWER, *"né".encode(), END]
    assert [i for i, is_said in zip(ids, said, strict=True) if is_said] == [*"né".encode(), END]


def test_what_cannot_be_said() -> None:
    with pytest.raises(ValueError, match="there is no answer"):
        spell("Who?", "")
    spell("", "x" * (MAX_LETTERS - 2))
    with pytest.raises(ValueError, match=f"have {MAX_LETTERS + 1} letters; at most {MAX_LETTERS}"):
        spell("", "x" * (MAX_LETTERS - 1))


def test_no_letter_sees_those_after_it() -> None:
    letters, seen = model(), pictures((28, 28))
    ids_PT = torch.randint(256, (1, 9))
    later_PT = torch.cat([ids_PT[:, :5], 255 - ids_PT[:, 5:]], dim=1)
    with torch.no_grad():
        before, after = letters(seen, ids_PT), letters(seen, later_PT)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-6)
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3


def test_a_picture_beside_larger_ones_is_read_as_alone() -> None:
    letters, together = model(), pictures((28, 28), (80, 28), (28, 80))
    ids_PT = torch.randint(256, (3, 6))
    with torch.no_grad():
        batch_PTV = letters(together, ids_PT)
        for row, n_tiles in enumerate(together.valid_PN.sum(-1).tolist()):
            alone = Pictures(together.tiles_PNCHW[row : row + 1, :n_tiles], together.grid_P2[row : row + 1])
            torch.testing.assert_close(
                letters(alone, ids_PT[row : row + 1]), batch_PTV[row : row + 1], rtol=0, atol=1e-5
            )
    assert (batch_PTV[0] - batch_PTV[1]).abs().max() > 1e-3


def test_answers_are_the_likeliest_letters_up_to_their_end() -> None:
    letters, seen = model(), pictures((28, 28), (80, 28))
    with torch.no_grad():
        letters.head.scores.weight.zero_()
        letters.head.scores.bias.zero_()
        letters.head.scores.bias[ord("a")] = 1
        assert letters.answer(seen, ["", "How?"], max_letters=3) == ["aaa", "aaa"]
        assert letters.answer(seen, ["", "?" * (MAX_LETTERS - 3)], max_letters=MAX_LETTERS)[1] == "aa"
        letters.head.scores.bias[END] = 2
        assert letters.answer(seen, ["", "How?"], max_letters=3) == ["", ""]
