"""Features from the middle of the language model: collected while decoding, or computed as if it had decoded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm.chat import ChatMLFormat
from lm.config import PRESETS
from lm.features import LayerTap, empty_prompt, features_layer, text_ends, text_features, with_features
from lm.generate import decode_prompts
from lm.model import KVCache, Llama
from lm.sampling import SamplingParams
from lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
TEXTS = ["It is 3 pm.", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}", "a"]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama(PRESETS["debug"]()).init_weights().eval()


def prompt() -> list[int]:
    return empty_prompt(ChatMLFormat(TOKENIZER, {}))


def test_the_layer_is_the_papers_and_half_of_any_other() -> None:
    assert features_layer(PRESETS["llama3-8b"]()) == 16
    assert features_layer(PRESETS["debug"]()) == PRESETS["debug"]().n_layers // 2


def test_stopping_after_a_layer_gives_what_the_next_one_would_get(llama: Llama) -> None:
    h_BTD = llama.embed_tokens(torch.randint(0, 256, (2, 7)))
    seen: dict[int, Tensor] = {}

    def keep(i: int, h: Tensor) -> Tensor:
        seen[i] = h
        return h

    n = llama.config.n_layers
    taps = {i: (lambda h, i=i: keep(i, h)) for i in range(n)}
    with torch.no_grad():
        out = llama.hidden(h_BTD, adapters=taps)
        for i in range(1, n):
            assert torch.equal(llama.hidden(h_BTD, n_layers=i), seen[i])
        assert torch.equal(llama.norm(llama.hidden(h_BTD, n_layers=n)), out)


def test_a_tap_changes_no_bit_and_sits_before_what_is_there(llama: Llama) -> None:
    ids_BT = torch.randint(0, 256, (2, 7))
    layer = features_layer(llama.config)
    tap = LayerTap(llama.config, layer)
    with torch.no_grad():
        plain, tapped = (
            llama.hidden(llama.embed_tokens(ids_BT)),
            llama.hidden(llama.embed_tokens(ids_BT), adapters=tap.over()),
        )
        assert torch.equal(plain, tapped) and tap.h_BTD is not None
        kept = tap.h_BTD
        changed = llama.hidden(llama.embed_tokens(ids_BT), adapters=tap.over({layer: lambda h: 2 * h, 0: lambda h: h}))
    assert torch.equal(kept, tap.h_BTD) and not torch.equal(changed, plain)


def test_features_of_a_text_are_those_of_decoding_it(llama: Llama) -> None:
    """Forced decoding: the sampler is greedy over logits that want the text."""
    layer, tap = features_layer(llama.config), LayerTap(llama.config, features_layer(llama.config))
    rows = [TOKENIZER.encode(text) for text in TEXTS]
    end = TOKENIZER.special_tokens["<|im_end|>"]
    wanted, n_fed = [[*ids, end] for ids in rows], [0]

    class Forced(Llama):
        def logits(self, hidden_BTD: Tensor) -> Tensor:
            logits_BV = super().logits(hidden_BTD).clone()
            for row, ids in zip(logits_BV, wanted, strict=True):
                row[ids[min(n_fed[0], len(ids) - 1)]] = 1e9
            n_fed[0] += 1
            return logits_BV

    forced = Forced(llama.config)
    forced.load_state_dict(llama.state_dict())

    def decoder(ids_BT: Tensor, valid_BS: Tensor | None, cache: KVCache) -> Tensor:
        return forced.hidden(forced.embed_tokens(ids_BT), valid_BS=valid_BS, cache=cache, adapters=tap.over())

    steps = decode_prompts(forced, decoder, TOKENIZER, [prompt()] * 3, SamplingParams(max_new_tokens=50), {end})
    collected: list[list[Tensor]] = [[] for _ in rows]
    said = ["" for _ in rows]
    for step_of_row, features_BD in with_features(steps, tap):
        for b, step in enumerate(step_of_row):
            if step is not None:
                said[b] += step.text
                if step.finished is None:
                    assert features_BD is not None
                    collected[b].append(features_BD[b].clone())
    assert said == TEXTS
    for decoded, features in zip(collected, text_features(llama, prompt(), rows, layer), strict=True):
        torch.testing.assert_close(torch.stack(decoded), features, atol=1e-5, rtol=1e-4)


def test_a_text_is_alone_in_its_batch(llama: Llama) -> None:
    rows = [TOKENIZER.encode(text) for text in TEXTS]
    for ids, features in zip(rows, text_features(llama, prompt(), rows, 2), strict=True):
        assert features.shape == (len(ids), llama.config.dim)
        torch.testing.assert_close(features, text_features(llama, prompt(), [ids], 2)[0], atol=1e-5, rtol=1e-4)


def test_the_last_step_has_no_features(llama: Llama) -> None:
    tap = LayerTap(llama.config, 1)

    def decoder(ids_BT: Tensor, valid_BS: Tensor | None, cache: KVCache) -> Tensor:
        return llama.hidden(llama.embed_tokens(ids_BT), valid_BS=valid_BS, cache=cache, adapters=tap.over())

    steps = decode_prompts(llama, decoder, TOKENIZER, [[5]], SamplingParams(max_new_tokens=4), set())
    assert [features is None for _, features in with_features(steps, tap)] == [False, False, False, True]


def test_an_empty_prompt_is_a_user_who_says_nothing() -> None:
    chat = ChatMLFormat(TOKENIZER, {}, default_system=None)
    special = TOKENIZER.special_tokens
    assert empty_prompt(chat) == [
        *(special["<|im_start|>"], *b"user\n", special["<|im_end|>"], *b"\n"),
        *(special["<|im_start|>"], *b"assistant\n"),
    ]


def test_ends_count_characters_that_are_whole() -> None:
    assert text_ends(TOKENIZER, TOKENIZER.encode("a\N{LATIN SMALL LETTER E WITH ACUTE}b")) == [1, 1, 2, 3]


def test_a_tap_beyond_the_layers_is_refused(llama: Llama) -> None:
    for layer in (0, llama.config.n_layers):
        with pytest.raises(ValueError, match="layer: a model of"):
            LayerTap(llama.config, layer)
