"""How long 64 frames of a clip take, and how much memory, by the length of the clip.

    python examples/bench_frames.py

Makes clips of a moving pattern, opens each in a process of its own, and prints a table in Markdown.
"""

from __future__ import annotations

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
    print(json.dumps([n_frames, n_all, decoded[0], seconds, everything, megabytes]))


def main() -> None:
    print("| clip | frames | taken | decoded | seconds | seconds to decode all | MB added |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in LENGTHS.items():
            path = Path(folder) / f"{seconds}.mp4"
            make(path, seconds)
            done = subprocess.run([sys.executable, __file__, str(path)], check=True, capture_output=True, text=True)
            taken, n_all, decoded, quick, everything, megabytes = json.loads(done.stdout)
            cells = [name, n_all, taken, decoded, f"{quick:.2f}", f"{everything:.2f}", f"{megabytes:.0f}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
