"""How long the frames of a clip take, and how much memory, by the length of the clip.

    python examples/bench_frames.py                  # 64 frames of a file
    python examples/bench_frames.py --model bundled  # an answer about a file, from the call to the eighth token

Makes clips of a moving pattern, opens each in a process of its own, and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from video.frames import MAX_FRAMES, load_frames

LENGTHS = {"5 s": 5, "1 min": 60, "10 min": 600, "1 h": 3600}
RATE, WIDTH, HEIGHT = 12, 320, 180


def make(path: Path, seconds: int) -> None:
    """H.264 with a keyframe every 250 frames, as encoders have it by default."""
    pattern = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", 250
        for i in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(np.roll(pattern, i, axis=1), format="gray")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def measure(path: str) -> None:
    """Prints seconds, frames decoded and MB added, and the seconds of decoding everything, as JSON."""
    decoded: list[int] = []
    handler = logging.Handler()
    handler.emit = lambda record: decoded.append(record.args[0])  # type: ignore[method-assign, index, misc]
    logger = logging.getLogger("video.frames")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    n_frames = len(load_frames(path, MAX_FRAMES))
    seconds = time.perf_counter() - started
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    started = time.perf_counter()
    with av.open(path) as container:
        n_all = sum(1 for _ in container.decode(video=0))
    everything = time.perf_counter() - started
    print(json.dumps([n_frames, n_all, decoded[0], seconds, everything, round(megabytes)]))


def measure_answer(path: str, source: str) -> None:
    """Prints the frames that a model takes, the seconds until they are there and until it has answered, and MB added, as JSON."""
    from mm import MultimodalLlama

    model = MultimodalLlama.from_pretrained(source)
    if model.config.video is None:
        raise SystemExit(f"model: {source} has no video part")
    model.generate("What happens?", max_new_tokens=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    n_frames = len(load_frames(path, model.config.video.max_frames))
    decoding = time.perf_counter() - started
    started = time.perf_counter()
    model.generate("What happens?", video=path, max_new_tokens=8)
    answering = time.perf_counter() - started
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([n_frames, decoding, answering, round(before / 1024), round(megabytes)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whatever MultimodalLlama.from_pretrained takes; decoding alone if left out")
    parser.add_argument("--clip", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clip:
        measure_answer(arguments.clip, arguments.model) if arguments.model else measure(arguments.clip)
        return
    answered = ["taken", "seconds to decode", "seconds to answer", "MB of the model", "MB added"]
    decoded = ["taken", "frames", "decoded", "seconds", "seconds to decode all", "MB added"]
    columns = answered if arguments.model else decoded
    print("|", " | ".join(["clip", *columns]), "|\n|---|" + "---:|" * len(columns))
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in LENGTHS.items():
            path = Path(folder) / f"{seconds}.mp4"
            make(path, seconds)
            command = [sys.executable, __file__, "--clip", str(path)]
            command += ["--model", arguments.model] if arguments.model else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in json.loads(done.stdout)]
            print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
