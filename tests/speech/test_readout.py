"""The adapter's frames as mixtures of the language model's own embeddings."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lm.tokenizer import JsonTokenizer, byte_alphabet
from mm.checkpoint import compose
from mm.model import MultimodalLlama
from mm.train.loss import next_token_loss
from speech import readout
from speech.readout import NOTHING, TokenReadout, as_written

TOKENS = [2, 3, 5, 7, 11, 13]
SPEECH = (torch.sin(torch.arange(9000) * 0.3) * 0.3, 16_000)


@pytest.fixture
def table_VD() -> torch.Tensor:
    return torch.randn(17, 29, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def ears(table_VD: torch.Tensor) -> TokenReadout:
    ears = TokenReadout(29, len(TOKENS))
    ears.start(TOKENS, table_VD)
    return ears


def test_a_tokens_embedding_scores_ten_and_nothing_scores_nothing(ears, table_VD):
    scores = ears.scores(table_VD[TOKENS][None], ears.embeddings(table_VD))[0].detach()
    assert scores.argmax(-1).tolist() == [1, 2, 3, 4, 5, 6]
    assert scores.diag(1).mean() == pytest.approx(10, rel=1e-4) and not scores[:, 0].any()


def test_what_is_sure_is_heard_as_the_token_itself(ears, table_VD):
    """And what is surely blank not at all; between two tokens, half of each."""
    with torch.no_grad():
        ears.blank.copy_(-table_VD[TOKENS].mean(0))
    heard, token = ears(torch.cat([table_VD[TOKENS], ears.blank[None]])[None] * 100, table_VD)
    torch.testing.assert_close(heard[0, :-1], table_VD[TOKENS])
    assert token[0].tolist() == [*TOKENS, NOTHING]
    between = torch.linalg.lstsq(table_VD[TOKENS], torch.tensor([9.0, 9.0, 0, 0, 0, 0])).solution
    with torch.no_grad():
        ears.blank.zero_()
        ears.log_scale.fill_(2.0)
    torch.testing.assert_close(ears(between[None, None], table_VD)[0][0, 0], table_VD[TOKENS[:2]].mean(0))


def test_what_is_likelier_is_heard_more_than_its_share(ears, table_VD):
    """Twice as likely counts as eight times as much."""
    with torch.no_grad():
        ears.log_scale.zero_()
    x_D = torch.linalg.lstsq(table_VD[TOKENS], torch.tensor([math.log(2), 0, *[-99.0] * 4])).solution
    torch.testing.assert_close(
        ears(x_D[None, None], table_VD)[0][0, 0], (8 * table_VD[TOKENS[0]] + table_VD[TOKENS[1]]) / 9
    )


def test_a_token_is_heard_once(ears, table_VD):
    """Until something else comes between, as in CTC."""
    said = torch.stack([table_VD[TOKENS[i]] for i in (4, 4, 4, 1, 4)] + [torch.zeros(29), table_VD[TOKENS[4]]]) * 100
    heard, token = ears(said[None], table_VD)
    assert token[0].tolist() == [11, NOTHING, NOTHING, 3, 11, NOTHING, 11]
    torch.testing.assert_close(heard[0, [0, 3, 4, 6]], table_VD[[11, 3, 11, 11]])


def test_how_many_frames_are_read_at_a_time_changes_nothing(ears, table_VD, monkeypatch):
    """Nor does what comes later; none is fine, too."""
    x_BUD = torch.randn(3, 23, 29, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, dim=1)
    whole = ears(x_BUD, table_VD)
    for part, all_of_it in zip(ears(x_BUD[:, :7], table_VD), whole, strict=True):
        torch.testing.assert_close(part, all_of_it[:, :7])
    for size in (1, 5):
        monkeypatch.setattr(readout, "CHUNK", size)
        torch.testing.assert_close(ears(x_BUD, table_VD), whole)
    assert ears(x_BUD[:, :0], table_VD)[0].shape == (3, 0, 29)


@pytest.mark.parametrize("sizes", [[1] * 46, [7, 0, 20, 19]])
def test_streamed_it_hears_the_same(ears, table_VD, sizes):
    """Also what goes on over the end of a step; a row that ends starts anew."""
    x_BUD = torch.randn(3, 23, 29, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, dim=1)
    heard_BUD, token_BU = ears(x_BUD, table_VD)
    assert 0 < (token_BU == NOTHING).sum() < token_BU.numel()
    state, steps = ears.init_state(3), []
    for x in x_BUD.split(sizes, dim=1):
        *heard, state = ears.step(x, table_VD, state)
        steps.append(heard)
    torch.testing.assert_close(torch.cat([heard for heard, _ in steps], dim=1), heard_BUD)
    assert torch.equal(torch.cat([token for _, token in steps], dim=1), token_BU)
    _, again, _ = ears.step(x_BUD[:, -1:], table_VD, state)
    ended = ears.step(x_BUD[:, :0], table_VD, state, final=torch.tensor([True, False, False]))[-1]
    _, anew, _ = ears.step(x_BUD[:, -1:], table_VD, ended)
    says_BU = ears(x_BUD[:, -1:], table_VD)[1]
    assert again.tolist() == [[NOTHING]] * 3 and anew.tolist() == [says_BU[0].tolist(), [NOTHING], [NOTHING]]
    assert int(anew[0]) != NOTHING


def test_a_step_remembers_the_last_frame_that_a_row_has(ears, table_VD):
    x_BUD = table_VD[TOKENS[:2]].expand(2, 2, 29) * 100
    _, token_BU, state = ears.step(x_BUD, table_VD, ears.init_state(2), n_B=torch.tensor([1, 2]))
    assert token_BU.tolist() == [[2, NOTHING], [2, 3]] and state.best_B.tolist() == [1, 2]
    assert ears.step(x_BUD, table_VD, state, n_B=torch.tensor([0, 0]))[-1].best_B.tolist() == [1, 2]


def test_what_was_said_is_heard_in_its_tokens(table_VD):
    """Mixtures of those that were heard as such, in their order; embeddings of the others; then nothing."""
    heard_UD = torch.arange(8 * 29.0).reshape(8, 29) + 0.5
    token_U = torch.tensor([5, NOTHING, 3, 3, NOTHING, 2, 7, NOTHING])
    written_UD, written_U = as_written(heard_UD, token_U, [5, 11, 3, 7], table_VD)
    assert written_U.tolist() == [5, 11, 3, 7] + [NOTHING] * 4
    torch.testing.assert_close(written_UD[:4], torch.stack([heard_UD[0], table_VD[11], heard_UD[2], heard_UD[6]]))
    for same, as_it_was in zip(
        as_written(heard_UD, token_U, [5, 3, 3, 2, 7], table_VD), (heard_UD, token_U), strict=True
    ):
        torch.testing.assert_close(same[:5], as_it_was[token_U != NOTHING])


def test_silence_and_more_than_there_are_frames(table_VD):
    heard_UD, token_U = torch.randn(2, 29), torch.tensor([NOTHING, 3])
    assert as_written(heard_UD, token_U, [], table_VD)[1].tolist() == [NOTHING] * 2
    for same, before in zip(as_written(heard_UD, token_U, [2, 3, 5], table_VD), (heard_UD, token_U), strict=True):
        assert torch.equal(same, before)


def test_the_likeliest_symbols_are_those_of_all_scores(ears, table_VD, monkeypatch):
    monkeypatch.setattr(readout, "CHUNK", 4)
    x_BUD = torch.randn(2, 9, 29, generator=torch.Generator().manual_seed(6))
    log_probs_BUK, symbols_BUK = ears.likely(x_BUD, table_VD)
    expected_BUR = ears.scores(x_BUD, ears.embeddings(table_VD)).log_softmax(-1)
    assert log_probs_BUK.shape == (2, 9, 1 + len(TOKENS)) and bool((log_probs_BUK.diff(dim=-1) <= 0).all())
    torch.testing.assert_close(expected_BUR.gather(-1, symbols_BUK), log_probs_BUK)


@pytest.fixture
def model() -> MultimodalLlama:
    """Hears some of its tokens, and passes over some frames of `SPEECH`."""
    model = MultimodalLlama.from_pretrained("debug")
    model.read_speech(TOKENS)
    assert model.speech_adapter is not None and model.speech_adapter.readout is not None
    with torch.no_grad():
        model.speech_adapter.readout.blank.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    return model


def turn(*content: dict[str, object], answer: str = "So it is.") -> list[dict[str, object]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


SAID = {"type": "audio", "audio": SPEECH}
SEEN = {
    "type": "image",
    "image": torch.randint(256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)),
}
ASKED = {"type": "text", "text": "What is this?"}


def test_what_is_not_heard_is_as_if_it_were_not_there(model):
    """The logits of all else are those of the same conversation with the heard embeddings alone."""
    batch = model.processor.collate([model.processor.encode(turn(SAID, ASKED))])
    with torch.no_grad():
        logits_BTV = model(batch)
        speech_KD, silent_BT = model.encode_speech(batch)
        h_BTD = model.embed(batch.ids_BT, speech_KD)
        bare_BTV = model.lm.logits(model.lm.hidden(h_BTD[:, ~silent_BT[0]]))
    n_audio = int((batch.ids_BT == model.config.media_ids["audio"]).sum())
    assert 0 < int(silent_BT.sum()) < n_audio
    torch.testing.assert_close(logits_BTV[:, ~silent_BT[0]], bare_BTV, atol=1e-5, rtol=0)


def test_silence_does_not_move_pictures(model):
    """A picture behind a recording is seen by the same tokens, in a batch as alone, trained on as asked about."""
    samples = [model.processor.encode(turn(*content)) for content in ((SAID, SEEN, ASKED), (SEEN, ASKED), (ASKED,))]
    with torch.no_grad():
        for side in ("left", "right"):
            batch = model.processor.collate(samples, pad_side=side)
            together_BTV = model(batch)
            for row, sample in enumerate(samples):
                alone = model(model.processor.collate([sample]))
                torch.testing.assert_close(together_BTV[row][batch.valid_BT[row]], alone[0], atol=1e-5, rtol=0)
        picture_off = replace(batch, pictures=replace(batch.pictures, tiles_PNCHW=batch.pictures.tiles_PNCHW * 0))
        changed_BT = (model(picture_off) - together_BTV).abs().amax(-1) > 1e-6
    assert changed_BT[0][batch.ids_BT[0] == model.config.media_ids["image"]].all()
    assert not changed_BT[0][: int((batch.ids_BT[0] == model.config.media_ids["image"]).nonzero())].any()


def test_loss_and_generation_pass_over_silence_too(model):
    sample = model.processor.encode(turn(SAID, ASKED))
    batch = model.processor.collate([sample, sample])
    with torch.no_grad():
        logits = model(batch)[:, :-1][batch.supervised_BT[:, 1:]]
        expected = F.cross_entropy(logits, batch.ids_BT[:, 1:][batch.supervised_BT[:, 1:]], reduction="sum")
        torch.testing.assert_close(next_token_loss(model, batch), expected, rtol=1e-5, atol=1e-5)
    asked, tokenizer = turn(SAID, ASKED)[:1], model.tokenizer
    alone = model.generate(messages=asked, max_new_tokens=6)
    _, again = model.generate(
        [None, "What is this?"], audio=[None, SPEECH], image=[SEEN["image"], None], max_new_tokens=6
    )
    assert again.text == alone.text
    prompt, answer = model.processor.encode(asked, add_generation_prompt=True), []
    for _ in range(6):
        longer = replace(prompt, ids=prompt.ids + answer, supervised=prompt.supervised + [False] * len(answer))
        with torch.no_grad():
            answer.append(int(model(model.processor.collate([longer]))[0, -1].argmax()))
    assert tokenizer.decode(answer) == alone.text


def test_a_model_hears_its_own_words_saves_them_and_loads_them(model, tmp_path):
    batch = model.processor.collate([model.processor.encode(turn(SAID))])
    with torch.no_grad():
        heard_KD, silent_BT = model.encode_speech(batch)
    words_RD = model.lm.embed_tokens.weight.detach()[TOKENS]
    share_KR = torch.linalg.lstsq(words_RD.T, heard_KD.T).solution.T
    torch.testing.assert_close(share_KR @ words_RD, heard_KD, atol=1e-5, rtol=0)
    assert share_KR.min() > -1e-4
    torch.testing.assert_close(share_KR.sum(-1), torch.ones(len(heard_KD)), atol=1e-3, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = MultimodalLlama.from_pretrained(tmp_path)
    again_KD, again_BT = loaded.encode_speech(batch)
    assert torch.equal(again_KD, heard_KD) and torch.equal(again_BT, silent_BT) and loaded.config == model.config
    in_bf16 = MultimodalLlama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert in_bf16.speech_adapter.readout.token_ids.tolist() == TOKENS
    assert in_bf16.encode_speech(batch)[0].dtype == torch.bfloat16


def test_a_model_hears_letters_as_its_tokenizer_writes_them(model):
    """With a tokenizer that merges all pairs of letters, half as many tokens as without, and embeddings of pairs."""
    letters = "abcdef"
    model.read_speech([ord(letter) for letter in letters])
    batch = model.processor.collate([model.processor.encode(turn(SAID))])
    with torch.no_grad():
        _, silent_BT = model.encode_speech(batch)
    vocab, pairs = byte_alphabet(), list(itertools.product(letters, repeat=2))
    vocab |= {"".join(pair): 256 + i for i, pair in enumerate(pairs)}
    backend = Backend(models.BPE(vocab, merges=pairs))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    model.tokenizer = JsonTokenizer(backend, bos_id=None, eos_ids=[])
    with torch.no_grad():
        heard_KD, again_BT = model.encode_speech(batch)
    is_audio_BT = batch.ids_BT == model.config.media_ids["audio"]
    n_pieces, n_tokens = ((~silent[is_audio_BT]).sum().item() for silent in (silent_BT, again_BT))
    assert n_pieces > 2 and n_pieces // 2 <= n_tokens < n_pieces
    words_RD = model.lm.embed_tokens.weight.detach()[256 : 256 + len(pairs)]
    is_pair_K = (heard_KD[:, None] == words_RD).all(-1).any(-1)
    assert is_pair_K[~again_BT[is_audio_BT]].sum() >= n_pieces - n_tokens


def test_ears_learn_the_names_of_more_tokens_and_forget_nothing(model, tmp_path):
    """What a frame scored for tokens that were known it scores for them still; the export has them all."""
    more = sorted({17, 19, *TOKENS})
    ears, table_VD = model.speech_adapter.readout, model.lm.embed_tokens.weight
    x_BUD = torch.randn(1, 3, table_VD.shape[1], generator=torch.Generator().manual_seed(5))
    before = ears.scores(x_BUD, ears.embeddings(table_VD))
    model.read_speech(more)
    after = ears.scores(x_BUD, ears.embeddings(table_VD))
    known = [0, *(1 + more.index(token) for token in TOKENS)]
    torch.testing.assert_close(after[..., known], before)
    model.save_pretrained(tmp_path)
    loaded = MultimodalLlama.from_pretrained(tmp_path)
    assert loaded.speech_adapter.readout.token_ids.tolist() == more and loaded.config == model.config


def test_a_model_without_ears_has_nothing_to_read():
    with pytest.raises(ValueError, match="read_speech: this model has no speech part"):
        compose("debug", image="debug").read_speech(TOKENS)


def test_gradients_reach_adapter_and_readout(model):
    heard_KD, _ = model.encode_speech(model.processor.collate([model.processor.encode(turn(SAID))]))
    (heard_KD * torch.randn(heard_KD.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    moved = {
        name for name, p in model.speech_adapter.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert moved == {name for name, _ in model.speech_adapter.named_parameters()} - {"readout.blank"}
