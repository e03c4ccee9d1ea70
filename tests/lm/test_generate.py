"""The decode loop with scripted logits, and the text model against a loop without a cache."""

import pytest
import torch
from torch import Tensor

from lm.config import PRESETS
from lm.generate import Step, decode_loop, generate_text
from lm.model import Llama
from lm.sampling import SamplingParams
from lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END = TOKENIZER.special_tokens["<|im_end|>"]


class Script:
    """A model that says given ids, whatever it hears."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows, self.heard = rows, []

    def logits(self) -> Tensor:
        position = len(self.heard)
        ids = torch.tensor([row[min(position, len(row) - 1)] for row in self.rows])
        return torch.nn.functional.one_hot(ids, TOKENIZER.vocab_size).float()

    def step(self, ids_B: Tensor) -> Tensor:
        self.heard.append(ids_B.tolist())
        return self.logits()

    def run(self, **params: object) -> list[list[Step | None]]:
        prompts = [[] for _ in self.rows]
        return list(decode_loop(self.logits(), self.step, SamplingParams(**params), TOKENIZER, {END}, prompts))


def column(steps: list[list[Step | None]], row: int = 0) -> list[Step]:
    return [step[row] for step in steps if step[row] is not None]


def test_rows_end_on_their_own_and_the_model_is_not_asked_in_vain() -> None:
    script = Script([*b"ab", END], [END], [*b"wxyz", END])
    steps = script.run()
    assert [s.text for s in column(steps, 0)] == ["a", "b", ""]
    assert column(steps, 1) == [Step(END, "", "stop")]
    assert [s.token_id for s in column(steps, 2)] == [*b"wxyz", END]
    assert [[step is None for step in row] for row in steps] == [
        [False, False, False],
        [False, True, False],
        [False, True, False],
        [True, True, False],
        [True, True, False],
    ]
    assert len(script.heard) == 4  # the last token is not fed
    assert [ids[2] for ids in script.heard] == [*b"wxyz"]


def test_length_ends_a_row() -> None:
    script = Script([*b"abcdef"])
    assert column(script.run(max_new_tokens=3))[-1] == Step(ord("c"), "c", "length")
    assert len(script.heard) == 2


def test_a_stop_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert column(Script([*b"a", END]).run(max_new_tokens=2))[-1].finished == "stop"


def test_stop_strings_do_not_show_and_what_only_looked_like_one_does() -> None:
    steps = column(Script([*b"a##b###c"]).run(stop="###", max_new_tokens=99))
    assert [s.text for s in steps] == ["a", "", "", "##b", "", "", ""]
    assert [s.finished for s in steps] == [None] * 6 + ["stop"]


@pytest.mark.parametrize("end", [[END], []])
def test_held_text_shows_at_the_end(end: list[int]) -> None:
    # A stop string's beginning and the first half of "é" are held back until nothing more can come.
    ids = [*b"a#", 0xC3, *end]
    steps = column(Script(ids).run(stop="##", max_new_tokens=len(ids)))
    assert "".join(s.text for s in steps) == "a#\N{REPLACEMENT CHARACTER}"
    assert steps[1].text == ""


def test_characters_come_whole() -> None:
    steps = column(Script([*"€!".encode(), END]).run())
    assert [s.text for s in steps] == ["", "", "€", "!", ""]


@pytest.fixture(scope="module")
def llama() -> Llama:
    """Random weights, the layers' enlarged: else a tied model just repeats its last token."""
    llama = Llama(PRESETS["debug"]()).init_weights(seed=0)
    with torch.no_grad():
        for parameter in llama.layers.parameters():
            parameter *= 8 if parameter.ndim > 1 else 1
    return llama.requires_grad_(False)


def greedy_without_cache(llama: Llama, prompt: list[int], n_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [list(b"a prompt"), list(b"another, longer prompt"), list(b"x")]


def test_a_ragged_batch_says_what_each_prompt_gets_alone_without_cache(llama: Llama) -> None:
    out = generate_text(llama, TOKENIZER, PROMPTS, SamplingParams(max_new_tokens=13), stop_ids=())
    expected = [greedy_without_cache(llama, prompt, 13) for prompt in PROMPTS]
    assert [row.ids for row in out] == expected
    assert all(len(set(ids)) > 4 for ids in expected)
    assert [row.text for row in out] == [TOKENIZER.decode(ids) for ids in expected]
    assert {row.finished for row in out} == {"length"}


def test_sampled_rows_equal_rows_alone(llama: Llama) -> None:
    params = SamplingParams(max_new_tokens=11, temperature=1.0, top_k=50, repetition_penalty=1.3, seed=5)
    together = generate_text(llama, TOKENIZER, PROMPTS, params, stop_ids=())
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert generate_text(llama, TOKENIZER, [prompt], params, stop_ids=()) == [row]


def test_stop_ids_end_only_their_row(llama: Llama) -> None:
    params = SamplingParams(max_new_tokens=13, temperature=1.0, seed=5)
    free = generate_text(llama, TOKENIZER, PROMPTS, params, stop_ids=())
    stop_id = free[0].ids[4]
    stopped = generate_text(llama, TOKENIZER, PROMPTS, params, stop_ids={stop_id})
    for before, after in zip(free, stopped, strict=True):
        n = before.ids.index(stop_id) + 1 if stop_id in before.ids else 13
        assert after.ids == before.ids[:n]
        assert after.finished == ("stop" if stop_id in before.ids else "length")


def test_the_whole_context_can_be_used_and_no_more(llama: Llama) -> None:
    context = llama.config.max_seq_len
    prompt = [list(b"ab" * (context // 2 - 3))]
    n_left = context - len(prompt[0]) + 1
    out = generate_text(llama, TOKENIZER, prompt, SamplingParams(max_new_tokens=n_left), stop_ids=())
    assert len(out[0].ids) == n_left
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_text(llama, TOKENIZER, prompt, SamplingParams(max_new_tokens=n_left + 1), stop_ids=())


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(llama: Llama, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="prompt_ids"):
        generate_text(llama, TOKENIZER, prompts, SamplingParams(), stop_ids=())
