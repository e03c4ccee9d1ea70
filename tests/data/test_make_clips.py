"""`mm data make clips`: answers that the decoded pixels bear out, a middle frame that tells nothing, splits that share nothing."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.make import actors, build, clips, events, film, motions, stills
from data.make.actors import Cast
from data.make.shapes import COLOURS, HELDOUT_PAIRS
from data.shards import open_source
from video.frames import load_frames

SPLITS = ("train", "heldout")
CAST = Cast(troupes=(actors.shapes(),))
KINDS = {name: kind(cast=CAST) for name, kind in clips.KINDS.items() if name != "stills"}
KINDS["stills"] = stills.Stills(troupes=CAST.troupes)


def made(kind: str, split: str, index: int, seed: int = 0) -> dict:
    return build.sample(KINDS[kind], split, seed, index)


def areas(frames: Sequence[Image.Image], caption: str) -> dict[str, np.ndarray]:
    """Of every colour that the caption names, what frames show of it: pixels and centre `(T, 3)`."""
    pixels = np.stack([np.asarray(frame) for frame in frames]).astype(int)
    y, x = np.mgrid[: film.SIDE, : film.SIDE]
    found = {}
    for colour in dict.fromkeys(re.findall("|".join(COLOURS), caption)):
        near = np.abs(pixels - COLOURS[colour]).max(-1) < 40
        n = near.sum((1, 2))
        found[colour] = np.stack([n, *((near * axis).sum((1, 2)) / np.maximum(n, 1) for axis in (x, y))], axis=1)
    return found


def distinct(caption: str) -> bool:
    """Whether the things in a clip differ in colour, so that colours tell who is who."""
    colours = "|".join(COLOURS)
    return len(set(re.findall(colours, caption))) == len(re.findall(f"the (?:{colours})", caption))


def asked(kind: str, n: int) -> Iterator[tuple[dict, list[str], dict[str, np.ndarray]]]:
    """Question, the colours that it names, and areas by colour, for clips whose things differ in colour."""
    for i in range(n):
        sample = made(kind, "train", i)
        if distinct(sample["txt"]):
            found = areas(load_frames(sample["mp4"]), sample["txt"])
            for q in sample["json"]["questions"]:
                yield q, re.findall("|".join(COLOURS), q["question"]), found


# --- answers and pixels ------------------------------------------------------------------------------------------------


def test_motions_are_seen_in_the_pixels() -> None:
    seen: Counter[str] = Counter()
    for q, colours, found in asked("motions", 14):
        if q["task"] == "open":
            colours = [next(colour for colour in found if q["answer"].startswith((colour, f"the {colour}")))]
        n, x, y = found[colours[0]].T
        if q["task"] == "direction":
            dx, dy = motions.DIRECTIONS[q["answer"]]
            moved = np.array([x[-1] - x[0], y[-1] - y[0]])
            assert moved @ (dx, dy) > 15 and abs(moved @ (dy, -dx)) < 12
        elif q["task"] == "growth":
            assert (n[-1] > 1.5 * n[0]) == (q["answer"] == "grow")
        elif q["task"] == "which":
            continue
        elif q["question"] in ("What grows?", "What shrinks?"):
            assert (n[-1] > 1.5 * n[0]) == ("grows" in q["question"])
        elif q["question"].startswith("What moves"):
            dx, dy = motions.DIRECTIONS[q["question"][len("What moves ") : -1]]
            assert np.array([x[-1] - x[0], y[-1] - y[0]]) @ (dx, dy) > 15
        elif q["answer"] in ("turns clockwise", "turns counterclockwise", "stays still"):
            assert math.hypot(x[-1] - x[0], y[-1] - y[0]) < 6 and 0.7 < n[-1] / n[0] < 1.4
        seen[q["task"]] += 1
    assert set(seen) == {"direction", "growth", "rotation", "action", "open"}


@pytest.mark.parametrize("deed", ["clockwise", "counterclockwise"])
def test_turning_follows_the_clock(deed: str) -> None:
    """The long axis of a diamond, by its second moments."""
    role = film.Role(actor=actors.paint_shape("red diamond"), poses=motions.path(random.Random(0), deed, 17, 0))
    axes = []
    for frame in film.shoot(random.Random(0), "train", [role]):
        y, x = np.nonzero(np.abs(np.asarray(frame).astype(int) - COLOURS["red"]).max(-1) < 60)
        (xx, xy), (_, yy) = np.cov(x, y)
        axes.append(math.atan2(2 * xy, xx - yy) / 2)
    turned = np.unwrap(axes, period=math.pi)
    turn = math.degrees(turned[-1] - turned[0])  # y points down
    assert 85 < (turn if deed == "clockwise" else -turn) < 165


def test_races_are_won_by_the_longer_way() -> None:
    for q, colours, found in asked("races", 8):
        ways = {colour: math.hypot(*(f[-1, 1:] - f[0, 1:])) for colour, f in found.items()}
        if q["task"] == "speed" or (q["task"] == "open" and q["question"].startswith("What is")):
            best = (max if "faster" in q["question"] else min)(ways, key=ways.__getitem__)
            assert q["answer"].startswith(best)
        elif q["task"] == "faster":
            assert (ways[colours[0]] > ways[colours[1]]) == (q["answer"] == "faster")


def test_pairs_pass_or_turn_back() -> None:
    for q, named, found in asked("pairs", 8):
        one, other = named or found
        _, dx, dy = (found[one] - found[other]).T
        if q["task"] == "open":
            if q["answer"].startswith(one) and q["question"] != "What happens?":
                axis = dx if "left" in q["question"] or "right" in q["question"] else dy
                value = axis[0] if "start" in q["question"] else axis[-1]
                assert (value < 0) == ("left" in q["question"] or "top" in q["question"])
            continue
        axis = dy if "above" in q["question"] else dx
        if q["task"] == "place":
            value = axis[0] if "start" in q["question"] else axis[-1]
            assert (value < 0) == (q["answer"] in ("left", "above"))
        else:
            along = dx if abs(dx[0]) > abs(dy[0]) else dy
            assert (along[0] * along[-1] < 0) == (q["answer"] in ("yes", "pass each other"))


def test_order_is_that_of_first_and_last_frames() -> None:
    for q, colours, found in asked("order", 10):
        there = {colour: f[:, 0] > 60 for colour, f in found.items()}
        deed = "appear" if there[next(iter(there))][-1] else "disappear"
        times = {colour: int(np.argmax(shown if deed == "appear" else ~shown)) for colour, shown in there.items()}
        ordered = sorted(times, key=times.__getitem__)
        if q["task"] == "event":
            assert q["answer"] == deed
        elif q["task"] == "open":
            nth = ordered[{"first": 0, "second": 1}.get(q["question"][:-1].split()[-1], -1)]
            assert q["question"] == "What happens?" or q["answer"].startswith(nth)
        elif q["task"] == "order":
            best = (min if "first" in q["question"] else max)(colours, key=times.__getitem__)
            assert q["answer"].startswith(best)
        else:
            assert q["answer"].startswith(ordered[ordered.index(colours[0]) - 1])


def test_blinks_are_counted() -> None:
    for q, colours, found in asked("blinks", 7):
        dark = {colour: f[:, 0] < 60 for colour, f in found.items()}
        times = {colour: int((d[1:] & ~d[:-1]).sum()) for colour, d in dark.items()}
        if q["task"] == "count":
            assert q["answer"] == str(times[colours[0]])
        elif q["question"] != "What happens?":
            best = (max if "more" in q["question"] else min)(found, key=times.__getitem__)
            assert q["answer"].startswith(best)


def test_changes_come_in_order() -> None:
    for q, _, found in asked("changes", 6):
        n = len(next(iter(found.values())))
        first, second, last = (max(found, key=lambda colour: found[colour][at, 0]) for at in (0, n // 2, -1))
        if q["question"] != "What happens?":
            assert q["answer"].startswith({"before": first, "after": last, "open": second}[q["task"]])


def test_stills_show_what_is_where() -> None:
    asked_of = Counter()
    for q, colours, found in asked("stills", 20):
        at = {colour: f[0, 1:] for colour, f in found.items()}
        if q["task"] == "places":
            axis = 0 if "left" in q["question"] else 1
            assert (at[colours[0]][axis] < film.SIDE / 2) == (q["answer"] in ("left", "top"))
        elif "from left" in q["question"]:
            across = [at[colour][0] for colour in re.findall("|".join(COLOURS), q["answer"])]
            assert len(across) == len(at) and across == sorted(across)
        elif q["question"] != "What is there?":
            axis = 0 if re.search("left|right", q["question"]) else 1
            sign = 1 if re.search("left|top", q["question"]) else -1
            assert q["answer"].startswith(min(at, key=lambda colour: sign * at[colour][axis]))
        asked_of[q["task"]] += 1
    assert min(asked_of.values()) > 5 and len(asked_of) == 2


def test_training_alone_asks_without_naming_candidates_and_shows_stills() -> None:
    for kind in motions.Motions, motions.Races, motions.Pairs, events.Order, events.Blinks, events.Changes:
        for split in SPLITS:
            questions = made(kind.name, split, 1)["json"]["questions"]
            assert ("open" in [q["task"] for q in questions]) == (split == "train")
    assert set(stills.Stills.sizes) == {"train"}


#: Of each task, whether a fact about a name in the question says the answer.
SAYS: dict[str, Callable[[dict[str, str], dict], bool]] = {
    "action": lambda said, q: said["deed"] == q["answer"],
    "direction": lambda said, q: said["deed"] == f"moves {q['answer']}",
    "growth": lambda said, q: said["deed"] == f"{q['answer']}s",
    "rotation": lambda said, q: said["deed"] == f"turns {q['answer']}",
    "faster": lambda said, q: said["pace"] == q["answer"],
    "count": lambda said, q: said["blinks"] == q["answer"],
    "place": lambda said, q: (
        {"on the left": "left", "on the right": "right", "at the top": "above", "at the bottom": "below"}[
            said[re.match("At the (start|end)", q["question"])[1]]
        ]
        == q["answer"]
    ),
    "places": lambda said, q: said["across" if "left" in q["options"] else "down"] == q["answer"],
}
#: And whether a fact about the answer, where that is a name, says what was asked for.
CHOSEN: dict[str, Callable[[dict[str, str], dict], bool]] = {
    "which": lambda said, q: said["deed"] in q["question"],
    "speed": lambda said, q: said["pace"] in q["question"],
    "more": lambda said, q: said["than the other"] == "more",
    "before": lambda said, q: said["there"] == "at the start",
    "after": lambda said, q: said["there"] == "at the end",
    "order": lambda said, q: said["turn"] == "second" or said["turn"] in q["question"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_facts_say_what_answers_say(kind: str) -> None:
    checked: Counter[str] = Counter()
    for i in range(12):
        sample = made(kind, "train", i)["json"]
        facts = sample["facts"]
        for q in sample["questions"]:
            first = min(facts, key=lambda name: (q["question"].find(f"the {name}") % 1000, -len(name)))
            if q["task"] in SAYS:
                assert SAYS[q["task"]](facts[first], q), q
            elif q["task"] in CHOSEN:
                assert CHOSEN[q["task"]](facts[q["answer"]], q), q
            else:
                continue
            checked[q["task"]] += 1
    assert len(checked) >= 1 and checked.total() >= 10


# --- one frame does not tell ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_middle_of_a_path_does_not_depend_on_the_deed(seed: int) -> None:
    middles = {motions.path(random.Random(seed), deed, 17, 40)[8] for deed in motions.VERBS}
    assert len(middles) == 1
    for upright in (False, True):
        one, other = (
            [poses[8] for poses in motions.meeting(random.Random(seed), 17, swap=swap, upright=upright)]
            for swap in (False, True)
        )
        assert one == other


def test_the_middle_of_events_shows_all_or_nothing() -> None:
    shown: Counter[tuple[str, bool]] = Counter()
    for i in range(40):
        clip = KINDS["order"].draw(random.Random(i), "train", i)
        if distinct(clip.caption):
            middle = clip.frames[len(clip.frames) // 2]
            there = {bool(f[0, 0] > 60) for f in areas([middle], clip.caption).values()}
            assert len(there) == 1
            shown["disappear" if "disappear" in clip.caption else "appear", there.pop()] += 1
    assert len(shown) == 4  # either deed with either sight
    for i in range(200):
        rng = random.Random(i)
        n_frames, count = rng.randint(24, 32), rng.randint(1, 4)
        dark = events.blinking(rng, n_frames, count)
        assert len(dark) == count * (n_frames // 12)
        assert not dark & {0, n_frames // 2 - 1, n_frames // 2, n_frames - 1}


def test_answers_are_balanced() -> None:
    rng = random.Random(0)
    deeds = Counter(motions.random_deed(rng) for _ in range(8000))
    assert all(400 < deeds[direction] < 600 for direction in motions.DIRECTIONS)
    assert all(720 < deeds[deed] < 880 for deed in ("grow", "shrink", "clockwise", "counterclockwise", "still"))
    mentioned = Counter(motions.either(rng, ["dog", "cat"]) for _ in range(1000))
    assert all(430 < n < 570 for n in mentioned.values()) and len(mentioned) == 2


# --- splits and shards ----------------------------------------------------------------------------------------------------


def test_training_has_no_unseen_thing_and_no_unseen_deed() -> None:
    unseen = {f"{colour} {shape}" for shape, colour in HELDOUT_PAIRS}
    for i in range(400):
        rng = random.Random(i)
        deeds = [motions.random_deed(rng) for _ in range(2)]
        for split in SPLITS:
            names = [actor.name for actor in CAST.draw(rng, split, i, deeds)]
            pairs = list(zip(names, deeds, strict=True))
            assert len(set(names)) == 2 and not any(map(actors.is_invisible, pairs))
            if split == "train":
                assert not unseen & set(names) and not any(map(actors.is_heldout, pairs))
            elif i % 2 == 0:
                assert unseen >= set(names)
            else:
                assert not unseen & set(names) and any(map(actors.is_heldout, pairs))


@pytest.mark.parametrize("troupe", [actors.emoji, actors.stamps])
def test_emoji_and_stamps_have_plain_names_and_fill_their_cutout(troupe) -> None:
    try:
        things = troupe()
    except ValueError as error:
        pytest.skip(str(error))
    train, heldout = (set(things.names[split]) for split in SPLITS)
    assert not train & heldout and len(train) > 200 and 0.08 < len(heldout) / len(train) < 0.2
    for name in sorted(heldout)[:20]:
        cutout = things.paint(name).cutout
        left, top, right, bottom = cutout.getchannel("A").getbbox()
        assert cutout.size == (actors.CUTOUT,) * 2
        assert max(right - left, bottom - top) == pytest.approx(actors.CONTENT, abs=2)
        assert re.fullmatch("[a-z' -]+", name) and not {"left", "red", "arrow"} & set(name.split())


def test_cutouts_may_turn_without_being_cut_off() -> None:
    for name in ("red square", "blue cross", "green star"):
        cutout = actors.paint_shape(name).cutout
        area = np.asarray(cutout.getchannel("A")).sum()
        for angle in (30, 45, 100):
            turned = np.asarray(cutout.rotate(angle, Image.Resampling.BICUBIC).getchannel("A")).sum()
            assert turned == pytest.approx(area, rel=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips")
    known = {"order": lambda: KINDS["order"]}
    build.make_shards(out, known, "clips", seed=3, kinds=["order"], scale=0.003, workers=1)
    return out


def test_shards_read_as_conversations(folder: Path) -> None:
    for split in SPLITS:
        source = open_source(folder / f"{split}-*.tar", name="clips")
        for sample in (source[i] for i in range(len(source))):
            first, *texts = [part for message in sample.messages for part in message["content"]]
            questions = sample.metadata["questions"]
            assert 16 <= len(load_frames(first["video"])) <= 32
            assert [part["text"] for part in texts] == [q[side] for q in questions for side in ("question", "answer")]
            choices = [q for q in questions if q["task"] != "open"]
            assert all(q["answer"] in q["options"] and len(set(q["options"])) > 1 for q in choices)
            assert len(questions) >= 3


def test_the_same_sample_has_the_same_bytes_and_others_do_not(folder: Path) -> None:
    assert made("order", "train", 5, seed=3) == made("order", "train", 5, seed=3)
    assert made("order", "train", 5, seed=3)["mp4"] != made("order", "train", 5, seed=4)["mp4"]
    source = open_source(folder / "train-order-*.tar", name="order")
    parts = [part for message in source[5].messages for part in message["content"]]
    assert parts[0]["video"] == made("order", "train", 5, seed=3)["mp4"]


def test_wrong_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kinds: \['cats'\] unknown"):
        clips.make_clips(tmp_path, kinds=["cats"])
