"""Evaluation of speech: error rates against other implementations, controls that expose who does not listen, whole runs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from rich.console import Console
from sacrebleu import corpus_bleu
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from typer.testing import CliRunner

from data.audio import encode_flac, load_audio
from data.shards import open_source, write_shard
from lm.generate import generate_text
from lm.sampling import SamplingParams
from mm.checkpoint import debug_model
from mm.cli import app
from mm.eval.asking import SLACK
from mm.eval.files import heldout_sources
from mm.eval.metrics import (
    Estimate,
    bleu,
    cer,
    contains_answer,
    recognition_errors,
    wer,
    wer_by_ear,
    whisper_normaliser,
)
from mm.eval.speech import REPLY_TOKENS, SpeechResult, answer, choose_utterances, draw, evaluate, score, table
from mm.generate import Generation
from mm.model import MultimodalLlama

#: What a recording says, by its number of tenths of seconds.
SAID = {2: "the red bus stops here", 3: "two cats slept", 5: "we saw a car", 7: "what is the opposite of hot"}
QUESTIONS = {"what is the opposite of hot": "It is cold.", "what is two plus two": "I think that it is 5."}
RATE = 16000


def recording(text: str) -> bytes:
    """A tone whose length says which text it is, as `Listener` knows."""
    tenths = next(n for n, said in SAID.items() if said == text)
    return encode_flac(0.3 * torch.sin(torch.arange(tenths * RATE // 10) * 0.3))


def sample(key: str, audio: str, said: str, **about: Any) -> dict[str, Any]:
    about = {"task": "asr", "language": "English", "voice": "ann"} | about
    return {"__key__": key, "flac": recording(audio), "txt": said, "json": about}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two sets: one recording of `seen` differs from its transcript in a word; a voice of `questions` is misheard."""
    folder = tmp_path / "shards"
    folder.mkdir()
    seen = [
        sample("a", SAID[2], "The red bus stops HERE."),
        sample("b", SAID[3], "2 cats slept", voice="bob"),
        sample("c", SAID[5], "we saw the car", voice="bob"),
    ]
    hot, sum_ = QUESTIONS
    asked = [
        sample("d", SAID[7], hot, task="dialogue", answer="cold"),
        sample("e", SAID[5], hot, task="dialogue", answer="Cold", voice="bob"),
        sample("f", SAID[7], sum_, task="dialogue", answer="four"),
        sample("g", SAID[7], hot, task="dialogue", answer=None),
    ]
    write_shard(folder / "heldout-seen-0000.tar", seen)
    write_shard(folder / "heldout-questions-0000.tar", asked)
    return folder


class Listener:
    """Knows recordings by their length; without one it says something else. Remembers how it was called."""

    def __init__(self) -> None:
        self.processor = debug_model().processor
        self.calls: list[tuple[int, int]] = []

    def generate(self, *, messages: list[Any], max_new_tokens: int) -> list[Generation]:
        self.calls.append((len(messages), max_new_tokens))
        return [Generation(text=self._say(*conversation), tokens=[], reason="stop") for conversation in messages]

    def _say(self, turn: dict[str, Any]) -> str:
        heard = [SAID[round(10 * len(load_audio(p["audio"])) / RATE)] for p in turn["content"] if p["type"] == "audio"]
        texts = [p["text"] for p in turn["content"] if p["type"] == "text"]
        if texts == ["Repeat after me in English:"]:
            return heard[0] if heard else "after me"
        return QUESTIONS.get((heard + texts or ["nothing"])[0], "Hello! What do you want?")


# --- error rates ---------------------------------------------------------------------------------------------------


def test_by_ear_any_way_of_writing_what_was_said_is_right() -> None:
    ways = ("call one four five at H T T P S", "Call 145 at https.")
    assert wer_by_ear(["Call 145 at https!", "call 1 4 5 at h t t p s"], [ways, ways]).value == 0
    assert wer(["Call 145 at https!"], ways[:1]).value > 0.5
    assert wer_by_ear(["call 145 https"], [ways]).value == 0.25  # of the four words of the nearer way
    with pytest.raises(ValueError, match="no words"):
        wer_by_ear(["a"], [("b", "")])


def test_normaliser_agrees_with_another_copy_of_whispers() -> None:
    english = whisper_normaliser("English")
    theirs = EnglishTextNormalizer(english.standardize_spellings.mapping)  # type: ignore[attr-defined]
    for text in (
        "Mr. Brown's colour, uh, WON'T change [noise]!",
        "It cost $20 million in the 1960s (not two).",
        "Ça va?",
    ):
        assert english(text) == theirs(text)
    for text in ("Où est l'été, déjà ?", "Это — дом.", "我喜欢,猫 和狗。", "हिन्दी भाषा"):
        assert whisper_normaliser("French")(text) == BasicTextNormalizer()(text)


def test_wer_counts_edits_of_words_per_word() -> None:
    # Spelling, case, punctuation and digits cost nothing; then one word is wrong, one is missing and two are too many.
    predictions = ["Colours of two cars?", "a bus stops", "hello my dear"]
    references = ["colors of 2 cars", "the bus stops here", "Hello"]
    assert wer(predictions, references).value == pytest.approx(4 / 9)
    assert wer(["a b c"], ["d"]).value == 3  # chatter is not capped
    assert wer([""], ["one two"]).value == 1


def test_wer_interval_depends_on_the_utterances_and_not_on_the_run() -> None:
    predictions, references = ["a b", "a c", "x y", "a b"] * 5, ["a b"] * 20
    estimate = wer(predictions, references)
    assert estimate == wer(predictions, references)
    assert estimate.value == pytest.approx(15 / 40) and 0 < estimate.low < 15 / 40 < estimate.high < 1
    wider = wer(predictions[:4], references[:4])
    assert wider.high - wider.low > estimate.high - estimate.low


def test_cer_sets_every_letter_apart_as_whisper_does() -> None:
    predictions, references = ["我喜欢,小猫。", "나는 고양이"], ["我 喜欢 狗", "너는고양이!"]
    letters = BasicTextNormalizer(split_letters=True)
    pairs = [(letters(p).split(), letters(r).split()) for p, r in zip(predictions, references, strict=True)]
    edits = sum(Levenshtein.distance(p, r) for p, r in pairs)
    assert edits == 3
    assert cer(predictions, references, "Chinese").value == pytest.approx(edits / sum(len(r) for _, r in pairs))


def test_the_papers_four_languages_are_scored_by_character() -> None:
    predictions, references = ["ab cd"], ["ab ce"]
    for language, right in (("Thai", 1 / 4), ("Japanese", 1 / 4), ("French", 1 / 2), ("English", 1 / 2)):
        assert recognition_errors(predictions, references, language).value == pytest.approx(right)


@pytest.mark.parametrize("measure", [wer, cer])
def test_wrong_texts_are_named(measure: Any) -> None:
    with pytest.raises(ValueError, match=r"'\(laughs\)' has no words"):
        measure(["ha", "b"], ["(laughs)", "b"], "English")
    with pytest.raises(ValueError, match="did you mean 'English'"):
        measure(["a"], ["a"], "Englisch")


@pytest.mark.parametrize(
    ("target", "tokenizer", "predictions", "references"),
    [
        (
            "English",
            "13a",
            ["The cat sat on a mat.", "It rains, again"],
            ["The cat sat on the mat.", "It rains again."],
        ),
        ("Chinese", "zh", ["我喜欢猫和狗。"], ["我喜欢猫和小狗。"]),
        ("Japanese", "ja-mecab", ["私は猫がとても好きです。"], ["私は猫が好きです。"]),
        ("Korean", "ko-mecab", ["나는 고양이를 아주 좋아합니다."], ["나는 고양이를 좋아합니다."]),
        ("Thai", "char", ["ฉันชอบแมวมาก"], ["ฉันชอบแมว"]),
    ],
)
def test_bleu_takes_the_tokenizer_of_the_target(
    target: str, tokenizer: str, predictions: list[str], references: list[str]
) -> None:
    estimate = bleu(predictions, references, target)
    theirs = corpus_bleu(predictions, [references], tokenize=tokenizer)
    assert estimate.value == pytest.approx(theirs.score / 100) and 0.1 < estimate.value < 1
    assert estimate.low <= estimate.value <= estimate.high


def test_bleu_interval_agrees_with_sacrebleus() -> None:
    references = [f"the {a} {b} and the {c} of {a} {c}" for a in "abc" for b in "defg" for c in "hijk"]
    predictions = [text.replace("h", "x").replace("d ", "") for text in references]
    estimate, theirs = bleu(predictions, references, "English"), corpus_bleu(predictions, [references])
    assert estimate == bleu(predictions, references, "English")
    assert estimate.value == pytest.approx(theirs.score / 100)
    from sacrebleu.metrics import BLEU

    interval = BLEU().corpus_score(predictions, [references], n_bootstrap=1000)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(interval._ci / 100, rel=0.15)


def test_a_missing_tokenizer_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'sacrebleu\[ja\]'"):
        bleu(["猫"], ["猫"], "Japanese")


@pytest.mark.parametrize(
    ("reply", "right", "contained"),
    [
        ("It is Cold.", "cold", True),
        ("Two plus two is four.", "4", True),
        ("The capital is New York, I think.", "new york", True),
        ("It is colder.", "cold", False),
        ("It is New-York!", "new york", True),
        ("New and York", "new york", False),
        ("", "cold", False),
    ],
)
def test_an_answer_is_contained_as_whole_words_in_their_order(reply: str, right: str, contained: bool) -> None:
    assert contains_answer(reply, right) is contained


# --- what is asked -------------------------------------------------------------------------------------------------


def test_who_listens_is_right_with_the_recording_only(shards: Path) -> None:
    model = Listener()
    answered = answer(model, choose_utterances(heldout_sources(shards, "speech"), limit=9), batch_size=2)  # type: ignore[arg-type]
    results = {(r.source, r.voice, r.metric): r for r in score(answered)}

    def scores(*key: Any) -> tuple[int, float, float, float | None]:
        r = results.pop(key)
        return r.n, r.speech.value, r.no_speech.value, r.text and r.text.value

    # "after me" for 5, 3 and 4 words: all are wrong, and none too many.
    assert scores("seen", None, "WER") == (3, pytest.approx(1 / 12), 1, None)
    assert scores("seen", "ann", "WER") == (1, 0, 1, None)
    assert scores("seen", "bob", "WER") == (2, pytest.approx(1 / 7), 1, None)
    # Of d, e, f the text is answered rightly for d and e; of these, e is misheard. g has no right answer.
    assert scores("questions", None, "right") == (3, pytest.approx(1 / 3), 0, pytest.approx(2 / 3))
    assert scores("questions", None, "same answer") == (2, 0.5, 0, None)
    assert scores("questions", None, "same reply") == (4, 0.5, 0, None)
    assert scores("questions", "ann", "same answer") == (1, 1, 0, None)
    assert scores("questions", "bob", "same answer") == (1, 0, 0, None)
    assert {voice for _, voice, _ in results} == {"ann", "bob"}
    assert [a.utterance.key for a in answered if a.is_right] == ["d", "g", "a", "b"]


def test_controls_are_asked_once_and_answers_have_room(shards: Path) -> None:
    model, utterances = Listener(), choose_utterances(heldout_sources(shards, "speech"), limit=9)
    answered = answer(model, utterances, batch_size=3)  # type: ignore[arg-type]
    assert [a.utterance for a in answered] == utterances
    questions = [(3, REPLY_TOKENS), (1, REPLY_TOKENS)]
    # The debug tokenizer has a token per byte.
    longest = len("The red bus stops HERE.") + SLACK
    assert model.calls == [*questions, (1, REPLY_TOKENS), *questions, (3, longest), (1, longest)]
    assert len({a.predictions["no_speech"] for a in answered}) == 2


def test_choice_is_limited_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "many.tar", (sample(f"{i:03d}", SAID[2], SAID[2]) for i in range(31)))
    sources = [open_source(tmp_path / "many.tar", name="many")]
    keys = [u.key for u in choose_utterances(sources, limit=7)]
    assert len(keys) == 7 and keys == sorted(set(keys))
    assert keys == [u.key for u in choose_utterances(sources, limit=7)]
    assert keys != [u.key for u in choose_utterances(sources, limit=7, seed=1)]
    assert len(choose_utterances(sources, limit=99)) == 31


def test_a_plain_corpus_is_transcribed_and_its_languages_are_kept_apart(tmp_path: Path) -> None:
    """Without `task`; other corpora have codes and speakers for languages and voices."""
    rows = [
        {"__key__": f"{i}", "flac": recording(SAID[2]), "txt": said, "json": {"language": language, "speaker": f"{i}"}}
        for i, (said, language) in enumerate([("The red bus stops here", "en"), ("这里", "Chinese")])
    ]
    write_shard(tmp_path / "corpus.tar", rows)
    results = evaluate(Listener(), [open_source(tmp_path / "corpus.tar", name="corpus")], batch_size=1)  # type: ignore[arg-type]
    assert [(r.language, r.metric, r.n, r.voice) for r in results] == [
        ("English", "WER", 1, None), ("Chinese", "CER", 1, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"json": {"language": "Klingon"}}, "Klingon"),
        ({"json": {}}, "language"),
        ({"json": {"language": "English", "task": "singing"}}, "singing"),
        ({"txt": " "}, "transcript"),
    ],
)
def test_unsuitable_samples_are_named(tmp_path: Path, changed: dict[str, Any], complaint: str) -> None:
    write_shard(tmp_path / "heldout-odd-0000.tar", [sample("a", SAID[2], SAID[2]) | changed])
    with pytest.raises(ValueError, match=rf"source 'odd': sample 'a'.*{complaint}"):
        choose_utterances(heldout_sources(tmp_path, "speech"), limit=1)


def test_wrong_arguments_are_named(shards: Path, tmp_path: Path) -> None:
    sources = heldout_sources(shards, "speech")
    with pytest.raises(ValueError, match="limit"):
        choose_utterances(sources, limit=0)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(Listener(), sources, batch_size=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mm data make speech"):
        heldout_sources(tmp_path, "speech")


def test_a_model_with_ears_answers_alike_in_any_batch_and_text_by_its_language_model(shards: Path) -> None:
    model = debug_model(seed=4)  # of the random models, one whose words change with what it hears
    utterances = choose_utterances(heldout_sources(shards, "speech"), limit=9)[:3]
    answered = answer(model, utterances, batch_size=3)
    assert answered == answer(model, utterances, batch_size=1)
    assert all(a.predictions["speech"] != a.predictions["no_speech"] for a in answered)
    prompts = [model.processor.tokenize(u.messages("text"), add_generation_prompt=True).ids for u in utterances]
    params = SamplingParams(max_new_tokens=REPLY_TOKENS)
    alone = generate_text(model.lm, model.processor.chat.tokenizer, prompts, params, model.processor.chat.stop_ids)
    assert [a.predictions["text"] for a in answered] == [row.text for row in alone]


# --- what is written -----------------------------------------------------------------------------------------------


def test_table_fits_a_terminal_of_80_columns() -> None:
    most, worst = Estimate(0.9876, 0.9765, 1.0), Estimate(12.345, 11.5, 13.25)
    about = {"task": "dialogue", "language": "English", "n": 2000, "no_speech": worst, "text": most}
    rows = [
        SpeechResult(source="unseen-voice", voice=None, metric="same answer", speech=worst, **about),  # type: ignore[arg-type]
        SpeechResult(source="unseen-voice", voice="flite-rms", metric="same reply", speech=most, **about),  # type: ignore[arg-type]
    ]
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(rows))
    assert "98.8% [97.7, 100.0]" in capture.get() and "  flite-rms" in capture.get()
    assert "…" not in capture.get() and max(map(len, capture.get().splitlines())) <= 80


def test_picture_shows_right_transcripts_in_green_and_wrong_ones_in_red(shards: Path, tmp_path: Path) -> None:
    utterances = choose_utterances(heldout_sources(shards, "speech"), limit=9)
    answered = {a.utterance.key: a for a in answer(Listener(), utterances, batch_size=9)}  # type: ignore[arg-type]

    def shows(colour: tuple[int, int, int]) -> bool:
        pixels = np.asarray(Image.open(tmp_path / "examples.png").convert("RGB"), np.int64)
        return bool((np.abs(pixels - colour).sum(-1) < 20).any())  # the edges of letters are smooth

    for keys, is_right in ((("a", "d"), True), (("c", "e"), False)):
        draw([answered[key] for key in keys], tmp_path / "examples.png")
        assert shows((20, 130, 60)) is is_right and shows((190, 30, 30)) is not is_right


def test_the_command_writes_scores_transcripts_and_a_picture(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultimodalLlama, "from_pretrained", lambda _: Listener())
    out = tmp_path / "new" / "out"
    arguments = ["eval", "speech", "--shards", str(shards), "--limit", "2", "--batch-size", "2", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in ("seen", "WER", "questions", "same reply"))
    report = json.loads((out / "results.json").read_text())
    assert (report["model"], report["limit"]) == ("bundled", 2)
    assert [(r["metric"], r["n"]) for r in report["results"] if r["source"] == "seen" and not r["voice"]] == [
        ("WER", 2)
    ]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and "audio" not in lines[0]
    assert [set(line["predictions"]) for line in lines if line["task"] == "dialogue"] == [
        {"speech", "no_speech", "text"}
    ] * 2
    assert Image.open(out / "examples.png").width > 1000
