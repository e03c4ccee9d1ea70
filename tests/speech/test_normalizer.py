"""The text normaliser: streaming equals offline, what may influence what, and words that are never taken back."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speech.normalizer import LMFeatures, NormalizerConfig, NormalizerState, TextNormalizer, TokenBatch, best_rules
from speech.spoken_text import SpokenPart, SpokenText
from speech.tn_rules import MAX_ITEM, RULES_OF_KIND, speak
from speech.tn_tokens import split

LM = LMFeatures(source="debug", layer=2, dim=11)
CONFIG = NormalizerConfig(lm=LM, lm_window=7, dim=26, n_heads=2, char_dim=5, max_chars=6)
TEXTS = (
    "On 3/4/1999 Dr. Smith paid $5.30 for 12 eggs at www.cats.org, didn't he?",
    "Well 7 days",
    "It is 10:30 pm; call 555-1234 \N{GRINNING FACE} now!",
)


def make(config: NormalizerConfig = CONFIG) -> TextNormalizer:
    torch.manual_seed(0)
    normalizer = TextNormalizer(config).eval()
    with torch.no_grad():  # nothing starts at zero, so that what is swapped shows
        for parameter in normalizer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return normalizer


def lm_of(text: str, seed: int = 1) -> tuple[Tensor, list[int]]:
    """Random features of tokens that are 0 to 6 characters long; where they end."""
    rng, ends = random.Random(f"{seed}/{text}"), [0]
    while ends[-1] < len(text):
        ends.append(min(len(text), ends[-1] + rng.randint(0, 6)))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(ends) - 1, LM.dim, generator=generator), ends[1:]


def batch_of(*texts: str, config: NormalizerConfig = CONFIG) -> TokenBatch:
    return TokenBatch.whole(
        list(map(split, texts)), [lm_of(text) for text in texts] if config.lm else None, config.max_chars
    )


def cut(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Tokens `start` to `stop` of a batch, with the language-model tokens of their chunks."""
    n_B = (batch.n_tokens_B - start).clamp(0, stop - start)
    features = None
    if batch.features_BSF is not None:
        seen = torch.nn.functional.pad(batch.chunk_BT.cumsum(1), (1, 0))
        parts = [f[a:b] for f, a, b in zip(batch.features_BSF, seen[:, start], seen[:, stop], strict=True)]
        features = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return TokenBatch(
        batch.chars_BTC[:, start:stop], batch.kind_BT[:, start:stop], n_B, batch.chunk_BT[:, start:stop], features
    )


@torch.no_grad()
def stream(normalizer: TextNormalizer, batch: TokenBatch, cuts: Sequence[int]) -> list[Tensor]:
    """Scores of each row, streamed in pieces of the sizes in `cuts`, then the rest."""
    n = batch.kind_BT.shape[1]
    edges = [*(min(edge, n) for edge in accumulate([0, *cuts])), n]
    state, pieces = normalizer.init_state(len(batch.kind_BT)), [[] for _ in batch.kind_BT]
    for start, stop in pairwise(edges):
        part = cut(batch, start, stop)
        # Rows may end before the others do.
        final_B = (batch.n_tokens_B <= stop) & (batch.n_tokens_B > start)
        logits_BUR, n_B, state = normalizer.step(part, state, final=final_B)
        for row, logits_UR, k in zip(pieces, logits_BUR, n_B.tolist(), strict=True):
            row.append(logits_UR[:k])
            assert not logits_UR[k:].any()
    assert not any(tensor.any() for tensor in vars(state).values())
    return [torch.cat(row) for row in pieces]


@pytest.mark.parametrize("lm", [LM, None], ids=["lm", "text"])
@pytest.mark.parametrize("cuts", [[], [1] * 60, [2, 5, 1, 13], [0, 3, 0, 30]], ids=str)
def test_any_chunking_equals_offline_and_a_row_equals_the_row_alone(cuts: list[int], lm: LMFeatures | None) -> None:
    config = dataclasses.replace(CONFIG, lm=lm)
    normalizer, batch = make(config), batch_of(*TEXTS, config=config)
    streamed = stream(normalizer, batch, cuts)
    for text, scores in zip(TEXTS, streamed, strict=True):
        with torch.no_grad():
            alone = normalizer(batch_of(text, config=config))[0]
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_text_goes_on_from_a_saved_state_and_rows_reset_alone(tmp_path: Path) -> None:
    normalizer, batch = make(), batch_of(TEXTS[0], TEXTS[2])
    n = batch.kind_BT.shape[1]
    first, n_B, state = normalizer.step(cut(batch, 0, 11), normalizer.init_state(2))
    assert n_B.tolist() == [8, 8]
    save_file(vars(state), tmp_path / "state.safetensors")
    state = NormalizerState(**load_file(tmp_path / "state.safetensors"))
    rest, n_B, _ = normalizer.step(cut(batch, 11, n), state.reset(torch.tensor([False, True])), final=True)
    whole = normalizer(batch_of(TEXTS[0]))[0]
    torch.testing.assert_close(torch.cat([first[0], rest[0]])[: len(whole)], whole, atol=1e-5, rtol=1e-5)
    alone = cut(batch, 11, n)
    alone = TokenBatch(*(tensor[1:] for tensor in vars(alone).values()))
    torch.testing.assert_close(rest[1, : n_B[1]], normalizer(alone)[0, : n_B[1]], atol=1e-5, rtol=1e-5)


# -- what may influence what -----------------------------------------------------------------------------------------


@torch.no_grad()
def influenced(normalizer: TextNormalizer, batch: TokenBatch, changed: TokenBatch) -> list[int]:
    """TN tokens whose scores differ by a single bit."""
    before, after = normalizer(batch)[0], normalizer(changed)[0]
    return (before != after).any(-1).nonzero()[:, 0].tolist()


def test_a_token_sees_features_of_chunks_that_are_there_when_it_is_decided() -> None:
    """Language-model token s came with TN token i: the first to see it is i - right_context."""
    normalizer, batch = make(), batch_of(TEXTS[0])
    assert batch.features_BSF is not None
    owner = torch.repeat_interleave(torch.arange(batch.kind_BT.shape[1]), batch.chunk_BT[0])
    for s, i in enumerate(owner.tolist()):
        features = batch.features_BSF.clone()
        features[0, s] *= -1
        changed = dataclasses.replace(batch, features_BSF=features)
        assert influenced(normalizer, batch, changed)[0] == max(0, i - 3), s


def test_the_window_forgets() -> None:
    """Without the LSTM's memory a feature reaches no token whose window begins after it."""
    normalizer, batch = make(), batch_of(TEXTS[0])
    assert batch.features_BSF is not None
    for name, parameter in normalizer.lstm.named_parameters():
        if "hh" in name:
            parameter.data.zero_()
    hidden = normalizer.lstm.hidden_size
    normalizer.lstm.bias_ih_l0.data[hidden : 2 * hidden] = -1e9  # the forget gate is shut
    n_seen = batch.chunk_BT[0].cumsum(0)
    features = batch.features_BSF.clone()
    features[0, 4] *= -1
    reached = influenced(normalizer, batch, dataclasses.replace(batch, features_BSF=features))
    n = batch.kind_BT.shape[1]
    assert reached == [
        u for u in range(n) if n_seen[min(u + 3, n - 1)] - CONFIG.lm_window <= 4 < n_seen[min(u + 3, n - 1)]
    ]


def test_right_context_is_three_tokens_or_all() -> None:
    text, changed = "a b c d e f g", "a b c d e f xx"
    for right_context, first in ((3, 9), (0, 12), (None, 0)):
        config = dataclasses.replace(CONFIG, lm=None, right_context=right_context)
        batches = (batch_of(some, config=config) for some in (text, changed))
        assert influenced(make(config), *batches)[0] == first


def test_only_rules_of_the_tokens_kind_are_chosen() -> None:
    normalizer, batch = make(), batch_of(*TEXTS)
    with torch.no_grad():
        rules = best_rules(normalizer(batch), batch.n_tokens_B)
    for text, row in zip(TEXTS, rules, strict=True):
        for token, rule in zip(split(text), row, strict=True):
            assert rule in RULES_OF_KIND[token.kind]


def test_gradients_reach_every_parameter_and_no_padding() -> None:
    normalizer, batch = make(), batch_of(*TEXTS)
    assert batch.features_BSF is not None
    batch.features_BSF.requires_grad_()
    logits_BTR = normalizer(batch)
    logits_BTR[logits_BTR.isfinite()].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in normalizer.parameters())
    n_lm_B = batch.chunk_BT.sum(1).tolist()
    for row, n in zip(batch.features_BSF.grad, n_lm_B, strict=True):
        assert row[:n].any(-1).all() and not row[n:].any()


# -- text in, words out ----------------------------------------------------------------------------------------------


def speak_text(
    normalizer: TextNormalizer, text: str, ends: Sequence[int], features: Tensor | None
) -> list[list[SpokenPart]]:
    """What comes out at each language-model token, and at the end."""
    spoken, said = SpokenText(normalizer), []
    for i, (start, end) in enumerate(pairwise([0, *ends])):
        said.append(spoken.push(text[start:end], None if features is None else features[i]))
    return [*said, spoken.finish(text[ends[-1] if ends else 0 :])]


def flat(said: Sequence[Sequence[SpokenPart]]) -> list[SpokenPart]:
    return [part for some in said for part in some]


def test_streamed_words_are_those_of_the_whole_text_and_know_their_source() -> None:
    normalizer = make()
    for text in TEXTS:
        features, ends = lm_of(text)
        parts = flat(speak_text(normalizer, text, ends, features))
        with torch.no_grad():
            batch = batch_of(text)
            (rules,) = best_rules(normalizer(batch), batch.n_tokens_B)
        tokens = split(text)
        whole = speak(tokens, rules)
        assert [(part.kind, part.text) for part in parts] == [(part.kind, part.text) for part in whole]
        for part, expected in zip(parts, whole, strict=True):
            assert (part.start, part.end) == (tokens[expected.tokens[0]].start, tokens[expected.tokens[1]].end)
            starts = [0, *ends]
            assert starts[part.first] <= part.start < part.end <= ends[part.stop - 1]


def test_without_features_the_pieces_of_a_text_change_nothing(random_text: object) -> None:
    normalizer = make(dataclasses.replace(CONFIG, lm=None))
    for seed in range(12):
        text = random_text(random.Random(seed), n=12)  # type: ignore[operator]  # a fixture that is a function
        alone = flat(speak_text(normalizer, text, list(range(1, len(text) + 1)), None))
        pieces = flat(speak_text(normalizer, text, lm_of(text, seed)[1], None))
        assert [(part.text, part.start, part.end) for part in pieces] == [(p.text, p.start, p.end) for p in alone]


def test_a_longer_text_never_changes_what_was_said(random_text: object) -> None:
    normalizer = make()
    for seed in range(5):
        rng = random.Random(seed)
        text = rng.choice(TEXTS) + " " + random_text(rng, n=6) + " 1,234.50 " + rng.choice(TEXTS)  # type: ignore[operator]
        features, ends = lm_of(text, seed)
        n = rng.randrange(len(ends))
        longer, shorter = features.clone(), features[: n + 1]
        longer[n + 1 :] *= -1
        said_before = flat(speak_text(normalizer, text[: ends[n]], ends[: n + 1], shorter)[:-1])
        said_after = flat(speak_text(normalizer, text, ends, longer))
        assert said_before == said_after[: len(said_before)]


def test_nothing_is_said_inside_a_number_a_date_or_an_address() -> None:
    """Whatever an untrained tagger thinks of them: the words for them come out together, after the space that follows."""
    normalizer = make()
    for thing in ("1,234.50", "3/4/1999", "www.cats.org/a-b", "10:30", "$3.50"):
        text = f"so {thing} is it now"
        features, ends = torch.randn(len(text), LM.dim), list(range(1, len(text) + 1))
        said = speak_text(normalizer, text, ends, features)
        when = [i for i, some in enumerate(said) for part in some if 3 <= part.start < 3 + len(thing)]
        assert when and len(set(when)) == 1 and when[0] > 3 + len(thing), thing


def test_an_endless_run_still_streams() -> None:
    normalizer = make(dataclasses.replace(CONFIG, lm=None))
    spoken, silent = SpokenText(normalizer), 0
    for character in "a" * 3000:
        silent = 0 if spoken.push(character) else silent + 1
        assert silent <= 32 * (MAX_ITEM * 2 + 4)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="right_context: a normaliser with unlimited right context cannot stream"):
        make(dataclasses.replace(CONFIG, right_context=None)).init_state(1)
    with pytest.raises(ValueError, match="features: this normaliser was made with features"):
        make()(batch_of(TEXTS[0], config=dataclasses.replace(CONFIG, lm=None)))
    with pytest.raises(ValueError, match="features: need width 13 of debug"):
        make(dataclasses.replace(CONFIG, lm=dataclasses.replace(LM, dim=13)))(batch_of(TEXTS[0]))


def test_features_go_with_every_token_or_with_none() -> None:
    with pytest.raises(ValueError, match="features: this normaliser reads those of debug"):
        SpokenText(make()).push("a")
    with pytest.raises(ValueError, match="features: this normaliser reads text alone"):
        SpokenText(make(dataclasses.replace(CONFIG, lm=None))).push("a", torch.zeros(LM.dim))


def test_bad_configs_are_refused() -> None:
    for change, message in (
        ({"right_context": -1}, "right_context must not be negative"),
        ({"lm_window": 0}, "lm_window must be at least 1"),
        ({"dim": 25}, "dim 25 must be a multiple of n_heads 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
