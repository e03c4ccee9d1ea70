"""Sampling against transformers' processors, rows against themselves alone, stop strings against brute force."""

import random

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm.sampling import Sampler, SamplingParams, StopChecker, filter_logits

N_ROWS, N_VOCAB = 5, 83


def random_logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(N_ROWS, N_VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 0.9, "min_p": 0.2},
        {"temperature": 1.7, "top_k": 31, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_filters_match_transformers(settings: dict) -> None:
    processors = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            processors.append(warper(settings[name]))
    logits_BV = random_logits()
    expected = processors(torch.zeros(N_ROWS, 1, dtype=torch.int64), logits_BV)
    assert torch.equal(filter_logits(logits_BV, SamplingParams(**settings)), expected)


def test_repetition_penalty_matches_transformers_over_prompt_and_answer() -> None:
    # Unpenalised, each row would repeat its likeliest token; ids beyond the logits are a picture's.
    prompt_BT = torch.randint(0, N_VOCAB + 7, (N_ROWS, 11), generator=torch.Generator().manual_seed(1))
    logits_BV = random_logits()
    sampler = Sampler(SamplingParams(repetition_penalty=1.9), prompt_BT.tolist())
    reference = RepetitionPenaltyLogitsProcessor(1.9)
    seen_BT, chosen = prompt_BT, set()
    for _ in range(13):
        expected_B = reference(seen_BT, logits_BV).argmax(-1)
        assert torch.equal(sampler(logits_BV), expected_B)
        seen_BT = torch.cat([seen_BT, expected_B[:, None]], 1)
        chosen.add(tuple(expected_B.tolist()))
    assert len(chosen) > 1


def test_repetition_penalty_is_per_row_and_knows_ragged_prompts() -> None:
    logits_BV = torch.tensor([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [[0, 99], []])
    assert sampler(logits_BV).tolist() == [1, 0]


def test_greedy_is_the_default() -> None:
    logits_BV = random_logits()
    assert torch.equal(Sampler(SamplingParams(), [[]] * N_ROWS)(logits_BV), logits_BV.argmax(-1))


def test_a_row_does_not_depend_on_its_batch() -> None:
    params = SamplingParams(temperature=1.1, top_p=0.9, repetition_penalty=1.2, seed=17)
    prompts = [[i, i + 3] for i in range(N_ROWS)]
    steps = [random_logits(seed) for seed in range(19)]
    together = Sampler(params, prompts)
    ids_BT = torch.stack([together(logits_BV) for logits_BV in steps], dim=1)
    for row, prompt in enumerate(prompts):
        alone = Sampler(params, [prompt])
        assert [int(alone(logits_BV[row : row + 1])) for logits_BV in steps] == ids_BT[row].tolist()


def test_seeds() -> None:
    logits_BV = torch.zeros(2, N_VOCAB)

    def draw(seed: int | None) -> list[list[int]]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [[], []])
        return torch.stack([sampler(logits_BV) for _ in range(23)], dim=1).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    unseeded = draw(None)
    assert unseeded[0] != unseeded[1]


def test_draws_follow_the_filtered_distribution() -> None:
    params = SamplingParams(temperature=0.8, top_k=5, seed=0)
    logits_BV = random_logits()[:1, :7]
    sampler = Sampler(params, [[]])
    counts = torch.bincount(torch.cat([sampler(logits_BV) for _ in range(6000)]), minlength=7)
    expected = filter_logits(logits_BV, params).softmax(-1)[0]
    assert (counts[expected == 0] == 0).all() and (expected == 0).sum() == 2
    torch.testing.assert_close(counts / counts.sum(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("stop", ["", "x"]),
    ],
)
def test_bad_params_name_the_argument(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams(**{name: value})


def test_one_stop_string_need_not_be_in_a_list() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def cut_by_brute_force(text: str, stop: list[str]) -> tuple[str, bool]:
    """Cuts where the first stop string is complete; of several, the longest."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def test_stop_strings_cut_the_same_however_the_text_arrives() -> None:
    rng = random.Random(0)
    n_stopped = 0
    for _ in range(2000):
        stop = ["".join(rng.choices("ab\n", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc\n", k=rng.randint(0, 17)))
        expected, stopped = cut_by_brute_force(text, stop)
        checker, shown, rest = StopChecker(stop), "", text
        while rest and not checker.stopped:
            n = rng.randint(0, 4)
            shown += checker.push(rest[:n])
            rest = rest[n:]
            assert expected.startswith(shown)
        assert (shown + checker.flush(), checker.stopped) == (expected, stopped)
        n_stopped += stopped
    assert 500 < n_stopped < 1900


def test_only_a_possible_stop_string_is_held_back() -> None:
    checker = StopChecker(["<end>"])
    assert [checker.push(piece) for piece in ("a<", "b", "<en", "", "<e", "n")] == ["a", "<b", "", "", "<en", ""]
    assert checker.flush() == "<en"
