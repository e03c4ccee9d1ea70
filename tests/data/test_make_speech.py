"""`mm data make speech`: reproducible shards, splits that share nothing, voices that say what the transcript has."""

import gzip
import io
import json
import math
import random
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.audio import SAMPLE_RATE
from data.make import acoustics, canvas, recordings, sentences, speech, templates, voices
from data.make.sentences import Pool, spoken, transcript
from data.speech import open_speech

VOCABULARY = templates.Vocabulary(nouns=("apple", "beetle", "church", "dog", "elbow", "fern", "igloo", "river"))
POOLS = {"one": Pool(1.0, ("Good morning, Anna.", "It is 21 degrees in Rome.", "a gloss without an end"))}
ONE_OF_EACH = (voices.SLT, voices.KED, voices.JOE, voices.ESPEAK[8])


def sine(hertz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def strongest_hertz(waveform: torch.Tensor) -> float:
    return float(torch.fft.rfft(waveform).abs().argmax()) * SAMPLE_RATE / len(waveform)


@pytest.fixture
def generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The packages of human speech, as a user without root unpacks them."""
    root = tmp_path_factory.mktemp("debian")
    stamps, letters = root / "usr/share/tuxpaint/stamps/animals", root / "usr/share/klettres"
    sounds, texts = root / "usr/share/asterisk/sounds", root / "usr/share/doc/asterisk-core-sounds-en"
    for i, name in enumerate(["cat_desc_fr", "cat_desc_ro", "dog_desc_fr", "cat_desc_en"]):
        write_ogg(stamps / f"{name}.ogg", hertz=200 + 50 * i)
    for i, folder in enumerate(["pt_BR/alpha", "ml/syllab", "en_GB/alpha", "cs/syllab"]):
        write_ogg(letters / folder / "a-1.ogg", hertz=410 + 50 * i)
    for i, name in enumerate(
        ["fr_CA_f_June/oui", "it_IT_m_Carlo/digits/1", "ru_RU_f_IvrvoiceRU/da", "es_MX_f_Allison/si"]
    ):
        write_g722(sounds / f"{name}.g722", seed=i)
    for i, name in enumerate(["activated", "digits/20", "beep", "has-left", "silence/1", "unlisted"]):
        write_g722(sounds / f"en_US_f_Allison/{name}.g722", seed=10 + i)
    texts.mkdir(parents=True)
    lines = "; a comment\n\nactivated: Activated.\ndigits/20: 20\nbeep: [a tone]\nhas-left: ...has left,  at 3:\n"
    with gzip.open(texts / "core-sounds-en.txt.gz", "wt") as file:
        file.write(lines + "silence/1: (1 second of silence)\n")
    return root


def write_ogg(path: Path, hertz: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sine(hertz, 0.7).numpy(), SAMPLE_RATE, format="OGG")


def write_g722(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.random.default_rng(seed).bytes(4_000))  # any bytes are G.722: here half a second of noise


@pytest.fixture
def packages(root, monkeypatch) -> None:
    monkeypatch.setattr(canvas, "PACKAGE_ROOTS", (root,))


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Hello, World!", "hello, world!"),
        ("In 1987, he paid 1,500 dollars.", "in nineteen eighty seven, he paid one thousand five hundred dollars."),
        ("On the 21st, 2.5% of it", "on the twenty first, two point five percent of it"),
        ("A 'good' day -- truly; he's Ann\u2019s well-known uncle", "a good day, truly, he's ann's well known uncle"),
        ("Wait... what?!", "wait. what?"),
        ("It is 7 45.", "it is seven forty five."),
        ("5 0 2.", "five zero two."),
    ],
)
def test_spoken_words(written, said):
    assert spoken(written) == said
    assert transcript(said) == " ".join("".join(c if c.isalpha() or c == "'" else " " for c in said).split())


@pytest.mark.parametrize(
    "written", ["$5", "x = 3", "see [1]", "caf\u00e9", "3rd2", "v1.2", "192.168.0.1", "a_b", "", "?"]
)
def test_what_no_voice_can_read_is_refused(written):
    assert spoken(written) is None


def test_prose_is_whole_sentences_of_plain_words():
    paragraph = (
        "The  cat\nsat down. NASA flew there. See `this` now. It is. " + "word " * 20 + "end. X is 3. Is it late?"
    )
    assert prose_of(paragraph) == ["The cat sat down.", "Is it late?"]
    assert list(sentences.prose(["Is it late?", "is it late"])) == ["is it late"]  # the same words once


def prose_of(*paragraphs: str) -> list[str]:
    return list(sentences.prose(paragraphs).values())


def test_corpora_read_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "PACKAGE_ROOTS", (tmp_path,))
    files = {
        "usr/share/wordnet/data.noun": "  1 licence\n00000001 05 n 02 dog 0 hound 0 000 | a tame (often) animal; "
        '"the dog barked"\n00000002 18 n 01 Bach 0 000 | a German composer; of fugues\n',
        "usr/share/wordnet/index.noun": "  1 licence\ndog n 1 1 @ 1 1 00000001  \nhound n 1 1 @ 1 0 00000001  \n"
        "bach n 1 0 1 1 00000002  \nhot_dog n 1 0 1 1 00000001  \n",
        "usr/share/doc/python3.11/html/_sources/a/b.rst.txt": "Title\n=====\n\nOne line\nof it.\n",
        "usr/share/games/fortunes/literature": "To be\nor not.\n\t\t-- Hamlet\n%\nSecond.\n",
        "usr/share/games/fortunes/literature.dat": "no text",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    glosses = [gloss for some, _ in sentences.definitions() for gloss in some]
    assert [" ".join(gloss.split()) for gloss in glosses if gloss] == [
        "a tame animal",
        "a German composer",
        "of fugues",
    ]
    assert [examples for _, examples in sentences.definitions() if examples] == [["the dog barked"]]
    assert sentences.common_nouns() == ["dog"]  # met in texts, concrete, and no name
    assert prose_of(*sentences.manual()) == ["One line of it."]
    assert [" ".join(saying.split()) for saying in sentences.fortunes()] == ["To be or not.", "Second."]


def test_missing_corpora_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "PACKAGE_ROOTS", (tmp_path, tmp_path))
    for read, package in ((sentences.common_nouns, "wordnet-base"), (sentences.fortunes, "fortunes-min")):
        with pytest.raises(ValueError, match=f"apt-get install {package}"):
            list(read())


def test_each_sentence_is_in_one_split():
    texts = {transcript(spoken(text)): text for text in templates.questions(VOCABULARY)}
    split = {name: sentences._of_split({"all": (1.0, texts)}, name)["all"].sentences for name in ("train", "heldout")}
    assert Counter(split["train"]) + Counter(split["heldout"]) == Counter(texts.values())
    assert 0.05 < len(split["heldout"]) / len(texts) < 0.15


def test_sentences_are_drawn_by_share_and_used_up_before_they_repeat():
    pools = {"many": Pool(3.0, tuple(map(str, range(37)))), "few": Pool(1.0, ("a", "b", "c")), "none": Pool(9.0, ())}
    drawn = sentences.draw_sentences(random.Random(0), pools, 400)
    of_few = [text for text in drawn if text in "abc"]
    assert 70 < len(of_few) < 130
    for i in range(0, len(of_few) - 3, 3):
        assert set(of_few[i : i + 3]) == {"a", "b", "c"}
    assert drawn == sentences.draw_sentences(random.Random(0), pools, 400)


def test_patterns_can_all_be_spoken_and_ordinals_are_right():
    made = templates.short_sentences(random.Random(0), VOCABULARY, 3000)
    made += templates.questions(VOCABULARY) + list(templates.closed_questions())
    assert all(map(spoken, made)) and len(set(made)) > 1500
    ordinals = {n: templates.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 20, 21, 22, 23, 111)}
    assert " ".join(ordinals.values()) == "1st 2nd 3rd 4th 11th 12th 13th 20th 21st 22nd 23rd 111th"


def test_closed_questions_have_the_right_answer():
    answers = templates.closed_questions()
    assert answers["What is the capital of Norway?"] == "Oslo"
    assert answers["What comes after Sunday?"] == "Monday" and answers["What comes before March?"] == "February"
    assert answers["What is the opposite of cold?"] == "hot"
    assert answers["What is 7 plus 8?"] == "15" and all(answers.values())


# --- acoustics --------------------------------------------------------------------------------------------------------


def test_trim_cuts_silence_alone():
    frame = SAMPLE_RATE // 100
    voice = torch.cat(
        [torch.zeros(7 * frame), sine(440, 0.31), torch.zeros(3 * frame), sine(440, 0.2), torch.zeros(99)]
    )
    assert torch.equal(acoustics.trim(voice), voice[7 * frame : -99])
    assert torch.equal(acoustics.trim(torch.zeros(700)), torch.zeros(700))


@pytest.mark.parametrize("rate", [16_000, 22_050])
@pytest.mark.parametrize("factor", [0.88, 1.0, 1.13])
def test_a_smaller_head_raises_and_quickens(rate, factor):
    tone = torch.sin(2 * math.pi * 500 * torch.arange(rate) / rate)
    heard = acoustics.vocal_tract(tone, rate, factor)
    assert len(heard) / SAMPLE_RATE == pytest.approx(1 / factor, rel=0.01)
    assert strongest_hertz(heard) == pytest.approx(500 * factor, rel=0.01)


def test_rooms_fade_and_start_with_the_voice(generator):
    click = torch.zeros(SAMPLE_RATE)
    click[100] = 1
    heard = acoustics.reverberate(click, decay_seconds=0.3, loudness=0.5)
    assert heard[100] == pytest.approx(1, abs=1e-4) and heard[:100].abs().max() < 1e-5
    assert heard[101:].square().sum() == pytest.approx(0.5, rel=1e-3)
    early, late = heard[200:1700].square().sum(), heard[3200:4700].square().sum()
    assert 0 < late < early / 100
    assert heard[100 + 4800 :].abs().max() < 1e-5


def test_telephones_keep_the_middle():
    low, middle, high = (acoustics.telephone(sine(hertz) + 0.01 * sine(1000)) for hertz in (60, 1000, 5000))
    for outside in (low, high):
        assert strongest_hertz(outside) == pytest.approx(1000, abs=2)
    assert len(middle.unique()) <= 255 and middle.abs().max() <= 1


def test_babble_mixes_voices_equally_loud(generator):
    heard = acoustics.babble([sine(300, 0.31), 0.01 * sine(700, 0.53)], SAMPLE_RATE)
    spectrum = torch.fft.rfft(heard).abs()
    assert heard.shape == (SAMPLE_RATE,)
    assert 0.1 < spectrum[290:310].max() / spectrum[690:710].max() < 10


def test_disturbed_voices_keep_length_and_loudness_order(generator):
    voice, changed = acoustics.add_silence(sine(220, 0.83)), 0
    assert 0.83 + 0.2 <= len(voice) / SAMPLE_RATE <= 0.83 + 0.8
    for _ in range(60):
        heard = acoustics.disturb(voice, [sine(330), sine(440)])
        assert heard.shape == voice.shape and heard.isfinite().all()
        changed += not torch.equal(heard, voice)
        assert acoustics.to_peak(heard, -6).abs().max() == pytest.approx(10 ** (-6 / 20), rel=1e-4)
    assert 20 < changed < 60


# --- voices -----------------------------------------------------------------------------------------------------------


def pitch_hertz(said: voices.Said) -> float:
    """Median of the autocorrelation's peak over voiced frames."""
    samples, rate = said
    n, found = round(0.05 * rate), []
    for start in range(0, len(samples) - n, n):
        frame = samples[start : start + n] * np.hanning(n)
        lags = np.fft.irfft(np.abs(np.fft.rfft(frame, 4 * n)) ** 2)
        shortest, longest = rate // 400, rate // 60
        lag = shortest + int(lags[shortest:longest].argmax())
        if lags[lag] > 0.5 * lags[0] > 0.1:
            found.append(rate / lag)
    return float(np.median(found))


@pytest.mark.parametrize("voice", ONE_OF_EACH, ids=lambda voice: voice.name)
def test_voices_repeat_themselves_and_obey(voice):
    try:
        voices.require_programs()
    except ValueError as error:
        pytest.skip(str(error))
    text = "the emergency room was overrun with many people."
    samples, _ = voice.say(text)
    assert samples.dtype == np.float32 and samples.ndim == 1 and 0.05 < np.abs(samples).max() <= 1
    np.testing.assert_array_equal(samples, voice.say(text)[0])
    slow = acoustics.trim(torch.from_numpy(voice.say(text, tempo=0.8)[0]))
    fast = acoustics.trim(torch.from_numpy(voice.say(text, tempo=1.25)[0]))
    assert 1.25 < len(slow) / len(fast) < 1.8
    if voice is not voices.JOE:
        low, high = (pitch_hertz(voice.say(text, pitch=pitch)) for pitch in (0.85, 1.15))
        assert 1.1 < high / low < 1.6


def test_the_unseen_voice_is_nobody_of_the_training():
    seen = [voice for group in voices.SEEN for voice in group]
    assert voices.UNSEEN.speaker not in {voice.speaker for voice in seen}
    assert len(voices.VOICES) == len(seen) + 1  # no two share a name
    drawn = Counter(voices.draw_voice(random.Random(i)) for i in range(2000))
    assert voices.UNSEEN.name not in drawn and drawn["flite-slt"] == pytest.approx(560, abs=80)


def test_missing_synthesisers_are_all_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt-get install flite festival espeak-ng"):
        voices.require_programs()


# --- recordings -------------------------------------------------------------------------------------------------------


def test_foreign_recordings_leave_out_english_and_its_speaker(packages):
    found = recordings.foreign_recordings()
    assert sorted((r.voice, r.language) for r in found) == [
        ("asterisk-fr", "French"),
        ("asterisk-it", "Italian"),
        ("asterisk-ru", "Russian"),
        ("klettres-ml", "Malayalam"),
        ("klettres-pt", "Portuguese"),
        ("tuxpaint-fr", "French"),
        ("tuxpaint-fr", "French"),
        ("tuxpaint-ro", "Romanian"),
    ]


def test_english_recordings_come_with_their_words(packages):
    assert {r.path.stem: r.text for r in recordings.english_recordings()} == {
        "activated": "activated.",
        "20": "twenty",
        "has-left": "has left, at three,",
    }


# --- shards -----------------------------------------------------------------------------------------------------------


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".index.npy")}


@pytest.fixture(scope="module")
def made(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "PACKAGE_ROOTS", (root,))
        patch.setattr(speech, "SHARD_SIZE", 5)
        speech.make_speech(out, seed=3, kinds=["human"], workers=2)
    return out


def test_shards_do_not_depend_on_workers(made, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "SHARD_SIZE", 5)
    shards = [shard for part in speech.PARTS[-2:] for shard in speech.plan(part, tmp_path, 3, 1.0)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have, because sums over several threads round differently
    try:
        for shard in shards:
            speech.speak_shard(shard)
    finally:
        torch.set_num_threads(n_threads)
    written = folder_bytes(tmp_path)
    assert sorted(written) == ["heldout-human-en-0000.tar", "train-human-0000.tar", "train-human-0001.tar"]
    assert {name: folder_bytes(made)[name] for name in written} == written


def test_manifest_tells_what_the_shards_hold(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["seed"] == 3
    assert "klettres-data" in {source["package"] for source in manifest["kinds"]["human"]["sources"]}
    parts = manifest["kinds"]["human"]["parts"]
    for name, n_clips in (("train-human", 8), ("heldout-human-en", 3)):
        source = open_speech(made / f"{name}-*.tar", format="webdataset")
        hours = sum(source[i].metadata["duration"] for i in range(len(source))) / 3600
        assert len(source) == parts[name]["clips"] == n_clips
        assert parts[name]["hours"] == pytest.approx(hours, abs=1e-3)
    assert not list(made.glob("*.tmp"))


def test_samples_read_as_16_khz_conversations(made):
    for name in ("train-human", "heldout-human-en"):
        source = open_speech(made / f"{name}-*.tar", format="webdataset")
        for sample in (source[i] for i in range(len(source))):
            audio, *prompt = sample.messages[0]["content"]
            waveform, rate = soundfile.read(io.BytesIO(audio["audio"]))
            assert rate == SAMPLE_RATE and waveform.ndim == 1 and 0.05 < np.abs(waveform).max() < 0.99
            assert len(waveform) / rate == pytest.approx(sample.metadata["duration"], abs=1e-3)
            texts = [part["text"] for message in sample.messages for part in message["content"] if "text" in part]
            if name == "train-human":
                assert texts == [] and prompt == [] and sample.metadata["task"] == "pre-training"
            else:
                assert texts == ["Repeat after me in English:", sample.caption] and sample.metadata["task"] == "asr"


def test_resume_redoes_lost_shards_alone_and_refuses_another_seed(made, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "SHARD_SIZE", 5)
    for name, content in folder_bytes(made).items():
        (tmp_path / name).write_bytes(content)
    kept, lost = tmp_path / "train-human-0000.tar", tmp_path / "heldout-human-en-0000.tar"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    speech.make_speech(tmp_path, seed=3, kinds=["human"], workers=1)
    assert kept.stat().st_mtime_ns == stamp
    assert folder_bytes(tmp_path) == folder_bytes(made)
    with pytest.raises(ValueError, match="seed 3"):
        speech.make_speech(tmp_path, seed=4, kinds=["human"])


@pytest.mark.parametrize(("argument", "value"), [("kinds", ["song"]), ("scale", 0.0), ("workers", 0)])
def test_wrong_arguments_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=argument):
        speech.make_speech(tmp_path, **{argument: value})


def test_missing_recordings_are_all_named(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "PACKAGE_ROOTS", (tmp_path, tmp_path))
    with pytest.raises(ValueError, match=r"asterisk-core-sounds-fr-g722 .*klettres-data tuxpaint-stamps-default"):
        speech.make_speech(tmp_path / "out", kinds=["human"])
    assert not (tmp_path / "out").exists()


# --- what a clip says -------------------------------------------------------------------------------------------------


def part(name: str, task: str, voice: voices.Voice) -> speech.Part:
    choose = partial(speech._spoken_clips, pools=POOLS, voice=lambda rng: voice.name)
    return speech.Part(name=name, kind="read", task=task, n_clips=3, choose=choose)


def test_read_clips_are_varied_in_training_and_clean_when_held_out(tmp_path):
    try:
        voices.require_programs()
    except ValueError as error:
        pytest.skip(str(error))
    (training,) = speech.plan(part("train-read", "asr", voices.KAL16), tmp_path, 0, 1.0)
    (heldout,) = speech.plan(part("heldout-seen", "asr", voices.KAL16), tmp_path, 0, 1.0)
    others = [sine(310), sine(470)]
    twice = [speech.sample(training, 1, others) for _ in range(2)]
    assert twice[0] == twice[1] != speech.sample(training, 2, others)
    clean = speech.sample(heldout, 0, [])
    assert clean["txt"] == clean["json"]["transcript"] == transcript(spoken(heldout.clips[0].text))
    waveform, _ = soundfile.read(io.BytesIO(clean["flac"]))
    said, _ = voices.KAL16.say(spoken(heldout.clips[0].text))
    similarity = np.correlate(waveform, said, "valid" if len(waveform) >= len(said) else "same").max()
    assert similarity > 0.999 * np.linalg.norm(waveform) * np.linalg.norm(said)  # the voice itself, later and louder


def test_a_question_is_kept_as_written_and_waits_for_its_reply():
    asked = speech.Clip(voice="flite-slt", language="English", text="What is 7 plus 8?", answer="15")
    about = speech.annotation(part("heldout-questions", "dialogue", voices.SLT), asked, {"duration": 1.5})
    assert about["txt"] == about["json"]["question"] == "What is 7 plus 8?"
    assert about["json"]["transcript"] == "what is seven plus eight"
    assert about["json"]["conversations"] == [{"from": "human", "value": "<audio>"}]
    assert about["json"]["answer"] == "15" and about["json"]["duration"] == 1.5
