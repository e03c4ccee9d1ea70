"""`mm eval speech`: what a model hears in held-out recordings, and what it says to spoken questions.

Recordings are transcribed with the paper's prompt, greedily, and scored by WER or CER after Whisper's normaliser (section
8.3.2). Spoken questions come without a prompt (section 8.3.1) and are asked as text too: a model that understood says
what its language model says to the words. Both are also done without the recording, which shows what a guess is worth.
"""

from __future__ import annotations

import itertools
import random
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data.audio import load_audio
from data.shards import Sample, Source
from mm.eval.asking import SLACK
from mm.eval.files import heldout_sources, write_report
from mm.eval.metrics import Estimate, contains_answer, exact_match, proportion, recognition_errors
from mm.languages import asr_prompt, find_language
from speech.features import FeaturesConfig, LogMel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mm.model import MultimodalLlama

Condition = Literal["speech", "no_speech", "text"]
#: What is asked of an utterance of each task.
CONDITIONS: Mapping[str, tuple[Condition, ...]] = {
    "asr": ("speech", "no_speech"),
    "dialogue": ("speech", "no_speech", "text"),
}
#: Tokens of a reply to a question, under every condition. The answer to a closed question comes early.
REPLY_TOKENS = 48
#: Recordings of each set that are drawn.
DRAWN = 3
GREEN, RED = "#14823c", "#be1e1e"


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """A held-out recording.

    Attributes:
        source: name of its set.
        task: "asr" to be transcribed, "dialogue" to be answered.
        language: English name.
        audio: whatever `data.audio.load_audio` opens.
        text: what is said.
        answer: to a question that has one right answer; else None.
    """

    key: str
    source: str
    task: str
    language: str
    voice: str
    audio: Any
    text: str
    answer: str | None

    def messages(self, condition: Condition) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        if condition == "speech":
            content.append({"type": "audio", "audio": self.audio})
        if condition == "text":
            content.append({"type": "text", "text": self.text})
        if self.task == "asr":
            content.append({"type": "text", "text": asr_prompt(self.language)})
        return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class Answered:
    """An utterance with what the model said under each condition of its task."""

    utterance: Utterance
    predictions: Mapping[Condition, str]

    @property
    def is_right(self) -> bool:
        """Transcribed without a mistake; or answered rightly, or, where no answer is right, as if it had been text."""
        said, asked = self.predictions["speech"], self.utterance
        if asked.task == "asr":
            return recognition_errors([said], [asked.text], asked.language).value == 0
        if asked.answer is None:
            return exact_match(said, self.predictions["text"])
        return contains_answer(said, asked.answer, asked.language)


@dataclass(frozen=True, kw_only=True)
class SpeechResult:
    """One metric of one set, or of one voice in it, over `n` utterances.

    Attributes:
        voice: None for all of the set.
        metric: "WER" or "CER" of a transcript. For questions: "right", the share whose reply has the right answer in it;
            "same answer", the same among those that are answered rightly when asked as text; "same reply", the share
            whose reply is, word for word, the one to the text.
        no_speech: the control without the recording.
        text: asked as text; None where that is no condition of its own.
    """

    source: str
    task: str
    language: str
    voice: str | None
    metric: str
    n: int
    speech: Estimate
    no_speech: Estimate
    text: Estimate | None = None


def main(
    model: str | Path, shards: str | Path, out: str | Path, limit: int = 300, batch_size: int = 16
) -> list[SpeechResult]:
    """Evaluates a model, prints the table, and writes `results.json`, `predictions.jsonl` and `examples.png`.

    Args:
        model: as `MultimodalLlama.from_pretrained`.
        shards: folder of `mm data make speech`.
        out: folder; made if missing.
        limit: utterances per set.
        batch_size: utterances that are heard together.

    Raises:
        ValueError: an argument is wrong, or the folder has no held-out shards.
    """
    from mm.model import MultimodalLlama

    utterances = choose_utterances(heldout_sources(shards, "speech"), limit=limit)
    answered = answer(MultimodalLlama.from_pretrained(model), utterances, batch_size=batch_size)
    results = score(answered)
    out = write_report(out, model=model, limit=limit, results=map(asdict, results), predictions=map(_record, answered))
    draw(answered, out / "examples.png")
    Console().print(table(results))
    return results


def evaluate(
    model: MultimodalLlama, sources: Sequence[Source], *, limit: int = 300, batch_size: int = 16, seed: int = 0
) -> list[SpeechResult]:
    """Scores of a model on held-out speech, whose samples have a transcript and, in their JSON, at least a `language`.

    Args:
        sources: one per set.
        limit: utterances per set; the choice depends on nothing but `seed`.
        batch_size: utterances that are heard together; a transcript does not depend on it.

    Raises:
        ValueError: an argument is wrong, or a sample lacks audio, transcript or language.
    """
    return score(answer(model, choose_utterances(sources, limit=limit, seed=seed), batch_size=batch_size))


def choose_utterances(sources: Sequence[Source], *, limit: int, seed: int = 0) -> list[Utterance]:
    """Up to `limit` utterances of each set, in the order in which they are stored."""
    if limit < 1:
        raise ValueError(f"limit: need at least one utterance per set, got {limit}")
    chosen = []
    for source in sources:
        rng = random.Random(f"{seed}/{source.name}")
        indices = sorted(rng.sample(range(len(source)), min(limit, len(source))))
        chosen += [_utterance(source[i]) for i in tqdm(indices, desc=f"reading {source.name}", leave=False, delay=2)]
    return chosen


def _utterance(sample: Sample) -> Utterance:
    parts = [part for message in sample.messages for part in message["content"] if part["type"] == "audio"]
    text, about = (sample.caption or "").strip(), sample.metadata
    task = about.get("task", "asr")
    try:
        if task not in CONDITIONS:
            raise ValueError(f"task: {task!r} is not one of {', '.join(CONDITIONS)}")
        if len(parts) != 1 or not text:
            raise ValueError("needs one recording and its transcript (`txt` in a shard)")
        return Utterance(
            key=sample.key,
            source=sample.source,
            task=task,
            language=find_language(str(about.get("language"))).name,
            voice=str(about.get("voice") or about.get("speaker") or "unknown"),
            audio=parts[0]["audio"],
            text=text,
            answer=about.get("answer"),
        )
    except ValueError as error:
        raise ValueError(f"source {sample.source!r}: sample {sample.key!r}: {error}") from error


def answer(model: MultimodalLlama, utterances: Sequence[Utterance], *, batch_size: int) -> list[Answered]:
    """Asks everything under the conditions of its task, greedily; the order of the utterances is kept."""
    if batch_size < 1:
        raise ValueError(f"batch_size: need at least 1, got {batch_size}")
    tokenizer = model.processor.chat.tokenizer
    predictions: list[dict[Condition, str]] = [{} for _ in utterances]
    for (source, task, _), group in _by_set(utterances).items():
        texts = [utterances[i].text for i in group]
        longest = max(len(tokenizer.encode(text)) for text in texts) + SLACK if task == "asr" else REPLY_TOKENS
        group.sort(key=lambda i: len(utterances[i].text))  # to pad little
        for condition in CONDITIONS[task]:
            # Without speech and text, all utterances of a set are the same question.
            asked = group[:1] if condition == "no_speech" else group
            conversations = [utterances[i].messages(condition) for i in asked]
            said = list(_generate(model, conversations, longest, batch_size, desc=f"{source}, {condition}"))
            for i, text in zip(group, said * (len(group) // len(asked)), strict=True):
                predictions[i][condition] = text
    return [Answered(*pair) for pair in zip(utterances, predictions, strict=True)]


def _generate(
    model: MultimodalLlama, conversations: list[Any], max_new_tokens: int, batch_size: int, *, desc: str
) -> Iterator[str]:
    for start in tqdm(range(0, len(conversations), batch_size), unit="batch", desc=desc, leave=False):
        rows = conversations[start : start + batch_size]
        generations = model.generate(messages=rows, max_new_tokens=max_new_tokens)
        assert isinstance(generations, list)
        yield from (generation.text for generation in generations)


def _by_set(utterances: Sequence[Utterance]) -> dict[tuple[str, str, str], list[int]]:
    """Indices of the utterances of each set, task and language."""
    groups = defaultdict(list)
    for i, utterance in enumerate(utterances):
        groups[utterance.source, utterance.task, utterance.language].append(i)
    return dict(groups)


def score(answered: Sequence[Answered]) -> list[SpeechResult]:
    """Every metric of every set, and after it of every voice where there are several."""
    results = []
    for (source, task, language), group in _by_set([a.utterance for a in answered]).items():
        voices: dict[str | None, list[Answered]] = {None: [answered[i] for i in group]}
        names = sorted({a.utterance.voice for a in voices[None]})
        if len(names) > 1:
            voices |= {name: [a for a in voices[None] if a.utterance.voice == name] for name in names}
        for voice, rows in voices.items():
            for metric, n, estimates in _recognised(rows, language) if task == "asr" else _replied(rows, language):
                about = {"source": source, "task": task, "language": language, "voice": voice}
                results.append(SpeechResult(**about, metric=metric, n=n, **estimates))  # type: ignore[arg-type]
    return results


_Score = tuple[str, int, dict[Condition, Estimate]]


def _recognised(rows: Sequence[Answered], language: str) -> Iterator[_Score]:
    spoken = [a.utterance.text for a in rows]
    yield (
        find_language(language).error_rate,
        len(rows),
        {c: recognition_errors([a.predictions[c] for a in rows], spoken, language) for c in CONDITIONS["asr"]},
    )


def _replied(rows: Sequence[Answered], language: str) -> Iterator[_Score]:
    closed = [(a.predictions, a.utterance.answer) for a in rows if a.utterance.answer is not None]
    right = {c: [contains_answer(said[c], answer, language) for said, answer in closed] for c in CONDITIONS["dialogue"]}
    controlled: tuple[Condition, Condition] = ("speech", "no_speech")
    if closed:
        yield "right", len(closed), {c: proportion(hits) for c, hits in right.items()}
    if n_known := sum(right["text"]):
        known = {c: list(itertools.compress(right[c], right["text"])) for c in controlled}
        yield "same answer", n_known, {c: proportion(hits) for c, hits in known.items()}
    same = {c: [exact_match(a.predictions[c], a.predictions["text"]) for a in rows] for c in controlled}
    yield "same reply", len(rows), {c: proportion(hits) for c, hits in same.items()}


def table(results: Sequence[SpeechResult]) -> Table:
    """For people: a row per metric, in 80 columns."""
    caption = "95% intervals; WER, CER: error rates, less is better; no speech: the same without the recording"
    view = Table(title="Held-out speech", caption=caption, box=SIMPLE, show_edge=False, pad_edge=False)
    for heading in ("set", "metric"):
        view.add_column(heading, no_wrap=True)
    for heading in ("n", "speech", "no speech", "text"):
        view.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        name = r.source if r.language == "English" else f"{r.source}, {r.language}"
        controls = (f"{r.no_speech.value:.1%}", f"{r.text.value:.1%}" if r.text else "")
        view.add_row(f"  {r.voice}" if r.voice else name, r.metric, str(r.n), str(r.speech), *controls)
    return view


def _record(answered: Answered) -> dict[str, Any]:
    about = {name: value for name, value in vars(answered.utterance).items() if name != "audio"}
    return about | {"predictions": answered.predictions}


def draw(answered: Sequence[Answered], path: Path) -> None:
    """A picture with a line of log-mel plots per set: above each what is said, below it what the model made of it."""
    from matplotlib.figure import Figure  # slow to import

    lines = [[answered[i] for i in group[:DRAWN]] for group in _by_set([a.utterance for a in answered]).values()]
    figure = Figure(figsize=(4.2 * DRAWN, 2.4 * len(lines)), layout="constrained")
    axes_LD = figure.subplots(len(lines), DRAWN, squeeze=False)
    for axes_D, line in zip(axes_LD, lines, strict=True):
        for axes, shown in itertools.zip_longest(axes_D, line):
            if shown is None:
                axes.axis("off")
            else:
                _draw_one(axes, shown)
    figure.savefig(path, dpi=100)


def _draw_one(axes: Axes, answered: Answered) -> None:
    asked, features = answered.utterance, FeaturesConfig()
    waveform_1N = load_audio(asked.audio, features.sample_rate)[None]
    mel_1TM, _ = LogMel(features)(waveform_1N, torch.tensor([waveform_1N.shape[1]]))
    seconds = mel_1TM.shape[1] * features.hop / features.sample_rate
    axes.imshow(mel_1TM[0].T, origin="lower", aspect="auto", extent=(0, seconds, 0, features.n_mels), cmap="magma")
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    # Dollar signs would start formulas.
    above = _lines(f"{asked.source}, {asked.voice}: {asked.text}")
    axes.set_title(above, fontsize=8, loc="left", parse_math=False)
    below = _lines(answered.predictions["speech"])
    axes.set_xlabel(below, fontsize=8, loc="left", parse_math=False, color=GREEN if answered.is_right else RED)


def _lines(text: str) -> str:
    return textwrap.fill(text, 60, max_lines=3, placeholder=" ...") or "(nothing)"
