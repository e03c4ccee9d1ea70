"""`mm data make pictures`: reproducible shards, splits that share nothing, answers that the pixels bear out."""

import colorsys
import io
import json
import math
import random
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.make import build, canvas, charts, emoji, pictures, shapes, stamps, words
from data.make.canvas import HELDOUT_HUES, Ground
from data.shards import open_source

SPLITS = ("train", "heldout")
#: Pictures of so few samples that a test is quick, over several shards.
SCALE, SHARD_SIZE = 0.001, 13


def kind_or_skip(kind):
    try:
        return kind()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def dejavu() -> Path:
    return Path(canvas.plain_font(10).path)


@pytest.fixture(scope="module")
def small_words(dejavu) -> words.Words:
    fonts = {"train": [[dejavu]], "heldout": [[dejavu.with_name("DejaVuSerif.ttf")]]}
    return words.Words(fonts=fonts, vocabulary={"train": ["house", "Wm"], "heldout": ["abc", "river"]})


# --- shards -----------------------------------------------------------------------------------------------------------


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".index.npy")}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SHARD_SIZE", SHARD_SIZE)
        pictures.make_pictures(out, seed=3, kinds=["shapes", "charts"], scale=SCALE, workers=1)
    return out


def test_two_workers_write_the_bytes_of_one(made, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SHARD_SIZE", SHARD_SIZE)
    pictures.make_pictures(tmp_path, seed=3, kinds=["shapes", "charts"], scale=SCALE, workers=2)
    assert folder_bytes(tmp_path) == folder_bytes(made)


def test_seed_changes_the_pictures():
    kind = charts.Charts()
    assert build.sample(kind, "train", 0, 5) == build.sample(kind, "train", 0, 5)
    assert build.sample(kind, "train", 0, 5) != build.sample(kind, "train", 1, 5)
    assert build.sample(kind, "train", 0, 5) != build.sample(kind, "train", 0, 6)


def test_manifest_counts_what_the_shards_hold(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["seed"] == 3
    for name, entry in manifest["kinds"].items():
        for split in SPLITS:
            source = open_source(made / f"{split}-{name}-*.tar", name=name)
            assert len(source) == entry["pictures"][split] == max(1, round(pictures.KINDS[name].sizes[split] * SCALE))
        assert sorted(entry["shards"]) == sorted(path.name for path in made.glob(f"*-{name}-*.tar"))
        assert Image.open(made / f"contact-sheet-{name}.png").size == (1200, 1600)
    assert not list(made.glob("*.tmp"))


def test_shards_read_as_conversations(made):
    source = open_source(made / "train-shapes-*.tar", name="shapes")
    for i in range(len(source)):
        sample = source[i]
        first, *texts = [part for message in sample.messages for part in message["content"]]
        assert min(Image.open(io.BytesIO(first["image"])).size) >= 128
        questions = sample.metadata["questions"]
        assert [part["text"] for part in texts] == [q[side] for q in questions for side in ("question", "answer")]
        assert [m["role"] for m in sample.messages] == ["user", "assistant"] * len(questions)


def test_resume_keeps_finished_shards_and_redoes_the_rest(made, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SHARD_SIZE", SHARD_SIZE)
    pictures.make_pictures(tmp_path, seed=3, kinds=["charts"], scale=SCALE, workers=1)
    lost, kept = tmp_path / "heldout-charts-0000.tar", tmp_path / "train-charts-0000.tar"
    lost.unlink()
    kept.write_bytes(b"finished")
    pictures.make_pictures(tmp_path, seed=3, kinds=["charts"], scale=SCALE, workers=1)
    assert kept.read_bytes() == b"finished"
    assert lost.read_bytes() == (made / lost.name).read_bytes()
    with pytest.raises(ValueError, match="seed 3"):
        pictures.make_pictures(tmp_path, seed=4, kinds=["charts"], scale=SCALE)


@pytest.mark.parametrize(("argument", "value"), [("kinds", ["cats"]), ("scale", 0.0), ("workers", 0)])
def test_wrong_arguments_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=argument):
        pictures.make_pictures(tmp_path, **{argument: value})


def test_missing_packages_are_all_named_and_an_unpacked_one_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "PACKAGE_ROOTS", (tmp_path / "nothing", tmp_path))
    with pytest.raises(ValueError, match=r"apt-get install fonts-cantarell .*fonts-texgyre"):
        words.installed_fonts()
    with pytest.raises(ValueError, match="apt-get download wordnet-base"):
        words.wordnet_vocabulary()
    index = tmp_path / "usr/share/wordnet/index.noun"
    index.parent.mkdir(parents=True)
    index.write_text("  1 licence\nhouse n 1 2\nice_cream n 1 2\nox n 1\n")
    vocabulary = words.wordnet_vocabulary()
    assert [*vocabulary["train"], *vocabulary["heldout"]] == ["house"]


# --- canvas -----------------------------------------------------------------------------------------------------------


def test_held_out_backgrounds_have_hues_of_their_own():
    low, high = HELDOUT_HUES
    for split in SPLITS:
        for i in range(300):
            ground = Ground.draw(random.Random(i), split)
            for shade in ground.shades:
                hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in shade))
                if saturation * value > 0.2:  # rounding to 8 bits blurs the hue of darker and greyer shades
                    assert (
                        (low - 0.01 < hue < high + 0.01) if split == "heldout" else not low + 0.01 < hue < high - 0.01
                    )


@pytest.mark.parametrize("texture", canvas.TEXTURES["heldout"])
def test_every_texture_blends_between_its_shades(texture):
    ground = Ground(shades=((10, 60, 110), (200, 160, 120)), texture=texture, grain=0.0)
    pixels = np.asarray(ground.paint(random.Random(0), (131, 67)))
    assert pixels.shape == (67, 131, 3)
    assert (pixels.min((0, 1)) >= [10, 60, 110]).all() and (pixels.max((0, 1)) <= [200, 160, 120]).all()
    assert (np.ptp(pixels[..., 0]) == 0) if texture == "plain" else (np.ptp(pixels[..., 0]) > 60)


def test_hsv_equals_colorsys():
    for h in np.linspace(0, 1, 13):
        for s, v in [(0.0, 0.7), (0.3, 1.0), (1.0, 0.6)]:
            np.testing.assert_allclose(canvas.hsv(h, s, v), np.array(colorsys.hsv_to_rgb(h, s, v)) * 255, atol=0.51)


def test_cutouts_are_pasted_whole():
    cutout = Image.new("RGBA", (90, 50), (0, 0, 0, 0))
    cutout.paste((255, 0, 0, 255), (10, 10, 80, 40))  # transparent rim: only what shows counts
    for i in range(40):
        image = Image.new("RGB", (131, 173), "white")
        canvas.paste_cutout(random.Random(i), image, cutout, tilt=0, extent=(0.5, 1.0))
        left, top, right, bottom = Image.fromarray(np.asarray(image)[..., 1] < 128).getbbox()
        assert 0.5 * 131 - 3 <= right - left <= 131
        assert (right - left) / (bottom - top) == pytest.approx(70 / 30, rel=0.08)


# --- shapes -----------------------------------------------------------------------------------------------------------


def blobs(image: Image.Image) -> list[np.ndarray]:
    """Connected regions (pixel coordinates, `(n, 2)` of y, x) that differ from the upper left pixel."""
    pixels = np.asarray(image).astype(int)
    left = set(map(tuple, np.argwhere(np.abs(pixels - pixels[0, 0]).sum(-1) > 30)))
    found = []
    while left:
        queue, blob = deque([left.pop()]), []
        while queue:
            y, x = queue.popleft()
            blob.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue.extend(near)
        found.append(np.array(blob))
    return found


def read_scene(image: Image.Image) -> list[tuple[str, float, float]]:
    """Colour name and centre of every object, from the pixels alone."""
    pixels = np.asarray(image)
    read = []
    for blob in blobs(image):
        colour = np.median(pixels[tuple(blob.T)], axis=0)
        y, x = (blob.min(0) + blob.max(0)) / 2
        palette = shapes.PALETTES["train"]
        read.append((min(palette, key=lambda name: math.dist(palette[name], colour)), x, y))
    return read


@pytest.mark.parametrize("split", SPLITS)
def test_shape_answers_agree_with_the_pixels(split):
    plain = Ground(shades=((0, 255, 255),) * 2, texture="plain", grain=0.0)
    asked: Counter[str] = Counter()
    for i in range(60):
        rng = random.Random(i)
        scene = shapes.random_scene(rng, split)
        seen = read_scene(shapes.paint(rng, scene, plain))
        colour_of = {group.shape: group.colour for group in scene.groups}
        assert Counter(colour for colour, _, _ in seen) == {g.colour: len(g.things) for g in scene.groups}
        where = {colour: (x, y) for colour, x, y in seen}
        for q in shapes.all_questions(scene):
            named = [shape for shape in colour_of if shape in q.question]
            asked[q.task] += 1
            if q.task == "count":
                wanted = [c for c, _, _ in seen if not named or c == colour_of[named[0]]]
                assert q.answer == str(len(wanted))
            elif q.task == "colour":
                assert q.answer in where and q.answer == colour_of[named[0]]
            elif q.task == "shape":
                assert colour_of[q.answer] in q.question
            elif q.task == "position":
                x, y = where[colour_of[named[0]]]
                across, down = shapes.REGIONS[q.answer]
                assert abs(x / scene.size[0] - across) < 0.2 and abs(y / scene.size[1] - down) < 0.2
            else:
                one, other = sorted(named, key=q.question.index)
                (x1, y1), (x2, y2) = where[colour_of[one]], where[colour_of[other]]
                assert {"left": x1 < x2, "right": x1 > x2, "above": y1 < y2, "below": y1 > y2}[q.answer]
    assert set(asked) == {"count", "colour", "shape", "position", "relation"}


def test_shapes_are_large_enough_apart_and_inside():
    for i in range(300):
        scene = shapes.random_scene(random.Random(i), "train")
        things = scene.things
        for j, thing in enumerate(things):
            assert 2 * thing.radius >= 18
            assert min(thing.x, thing.y, scene.size[0] - thing.x, scene.size[1] - thing.y) >= thing.radius
            assert all(math.dist((thing.x, thing.y), (o.x, o.y)) > thing.radius + o.radius for o in things[:j])
        assert len({g.shape for g in scene.groups}) == len({g.colour for g in scene.groups}) == len(scene.groups)


def test_outlines_stay_in_the_circle_that_keeps_them_apart():
    assert [*shapes.FORMS["heldout"]] == [*shapes.SHAPES]
    assert max(math.hypot(*corner) for outline in shapes.FORMS["train"].values() for corner in outline) < 1.01


def test_held_out_pairs_are_in_every_held_out_picture_and_in_no_training_one():
    assert len(shapes.HELDOUT_PAIRS) == 12
    assert {shape for shape, _ in shapes.HELDOUT_PAIRS} == set(shapes.SHAPES)
    assert {colour for _, colour in shapes.HELDOUT_PAIRS} == set(shapes.COLOURS)
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        for i in range(300):
            groups = shapes.random_scene(random.Random(i), split).groups
            assert any((g.shape, g.colour) in shapes.HELDOUT_PAIRS for g in groups) == (split == "heldout")
            seen.setdefault(split, set()).update(name for group in groups for name in (group.shape, group.colour))
    assert seen["heldout"] == {*shapes.SHAPES, *shapes.COLOURS}
    assert seen["train"] == {*shapes.FORMS["train"], *shapes.PALETTES["train"]}


def test_questions_cover_the_tasks_without_repeats():
    for i in range(100):
        rng = random.Random(i)
        asked = canvas.choose_questions(rng, list(shapes.all_questions(shapes.random_scene(rng, "train"))))
        assert 3 <= len(asked) <= 5 and len({q.question for q in asked}) == len(asked)
        assert len({q.task for q in asked}) >= 3


def test_places_are_all_that_is_asked():
    for i in range(40):
        picture = shapes.Places().draw(random.Random(i), "train", i)
        assert picture.questions and {q.task for q in picture.questions} == {"position"}
        assert {q.answer for q in picture.questions} <= set(shapes.REGIONS)


def test_tallies_ask_how_many_there_are_of_each_of_two_shapes():
    for i in range(40):
        picture = shapes.Tallies().draw(random.Random(i), "train", i)
        counts, names = zip(*(group.split()[::2] for group in picture.caption.split(" and ")), strict=True)
        assert tuple(q.answer for q in picture.questions) == counts
        assert all(f"How many {name}" in q.question for name, q in zip(names, picture.questions, strict=True))
        assert len(counts) == 2 and {q.task for q in picture.questions} == {"count"}


@pytest.mark.parametrize("kind", ["places", "tallies"])
def test_some_kinds_are_for_training_alone(kind, tmp_path, monkeypatch):
    splits, random_scene = set(), shapes.random_scene
    monkeypatch.setattr(shapes, "random_scene", lambda rng, split: splits.add(split) or random_scene(rng, split))
    manifest = pictures.make_pictures(tmp_path, kinds=[kind], scale=0.0005, workers=1)
    assert manifest["kinds"][kind]["pictures"] == {"train": 10, "heldout": 0}
    assert [path.name for path in tmp_path.glob("*.tar")] == [f"train-{kind}-0000.tar"]
    assert splits == {"train"}  # on the contact sheet, too


# --- words ------------------------------------------------------------------------------------------------------------


def test_word_pictures_have_the_promised_size_and_contrast(dejavu):
    for i, word in enumerate(["on", "WWWWWWWWWW", "Jumping", "a", "house"] * 12):
        image = words.paint_word(random.Random(i), word, dejavu)
        assert words.MIN_HEIGHT <= image.height <= 100 and image.width <= 512
        assert np.ptp(np.asarray(image.convert("L")).astype(int)) >= 60


def test_words_are_spelt_and_random_letters_never_held_out_words(small_words):
    assert words.spelling("House") == "h o u s e"
    drawn = [small_words.random_word(random.Random(i), "train") for i in range(2000)]
    known = sum(word in small_words.vocabulary["train"] for word in drawn)
    assert 0.46 < known / len(drawn) < 0.54
    assert not set(drawn) & set(small_words.vocabulary["heldout"])
    picture = small_words.draw(random.Random(1), "heldout", 0)
    assert picture.caption in ("a b c", "r i v e r")
    assert [q.answer for q in picture.questions] == [picture.caption]


def test_random_letters_are_redrawn_when_held_out(small_words, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(rng, "random", lambda: 0.0)
    answers = iter([list("abc"), list("xyz")])
    monkeypatch.setattr(rng, "choices", lambda *args, **kwargs: next(answers))
    assert small_words.random_word(rng, "train") == "xyz"


def test_font_families_and_vocabulary_are_disjoint():
    names = {split: {family.name for family in words.FAMILIES[split]} for split in SPLITS}
    packages = {split: {family.package for family in words.FAMILIES[split]} for split in SPLITS}
    assert not names["train"] & names["heldout"] and not packages["train"] & packages["heldout"]
    kind = kind_or_skip(words.Words)
    faces = {split: {face for family in kind.fonts[split] for face in family} for split in SPLITS}
    assert all(family for split in SPLITS for family in kind.fonts[split]) and not faces["train"] & faces["heldout"]
    vocabulary = {split: set(kind.vocabulary[split]) for split in SPLITS}
    assert len(vocabulary["train"]) > 50_000 and len(vocabulary["heldout"]) > 2_000
    assert not vocabulary["train"] & vocabulary["heldout"]


# --- charts -----------------------------------------------------------------------------------------------------------


def test_chart_answers_follow_the_table_and_labels_are_disjoint():
    assert not set(charts.LABELS["train"]) & set(charts.LABELS["heldout"])
    for i in range(200):
        rng = random.Random(i)
        chart = charts.random_chart(rng, SPLITS[i % 2])
        values = list(chart.table.values())
        assert set(chart.table) <= set(charts.LABELS[SPLITS[i % 2]])
        assert chart.form == "bar" or (sum(values) == 100 and min(values) >= 10)
        extreme, count, value = charts.questions(rng, chart)
        best = max(values) if "largest" in extreme.question else min(values)
        assert chart.table[extreme.answer] == best and values.count(best) == 1
        assert count.answer == str(len(values))
        label = value.question.removeprefix("What is the value of ").removesuffix("?")
        assert value.answer.rstrip("%") == str(chart.table[label])


def test_bars_are_as_many_and_as_high_as_the_table_says():
    chart = charts.Chart(form="bar", table={"tea": 5, "rice": 20, "figs": 10})
    image = charts.paint_bars(chart, (256, 192), [(200, 0, 0)] * 3)
    bars = [blob for blob in blobs(image.point(lambda v: 255 if v > 230 else v)) if len(blob) > 200]
    red = (np.asarray(image) == [200, 0, 0]).all(-1)
    heights = red.sum(0)
    middles = [int(6 + (i + 0.5) * 244 / 3) for i in range(3)]
    assert len(bars) == 1  # the base line joins them
    assert [heights[m] / heights[middles[1]] for m in middles] == pytest.approx([0.25, 1, 0.5], abs=0.03)
    assert sum(np.diff((heights > 0).astype(int)) == 1) == 3


def test_pie_slices_have_their_share_of_the_area():
    chart = charts.Chart(form="pie", table={"tea": 60, "rice": 25, "figs": 15})
    fills = [(200, 0, 0), (0, 150, 0), (0, 0, 250)]
    pixels = np.asarray(charts.paint_pie(chart, (256, 256), fills))
    area = np.array([(pixels == fill).all(-1).sum() for fill in fills])
    np.testing.assert_allclose(area / area.sum(), [0.6, 0.25, 0.15], atol=0.04)


# --- emoji and stamps, where their packages are installed -------------------------------------------------------------


def test_emoji_have_unique_clean_names_and_different_pictures():
    kind = kind_or_skip(emoji.Emoji)
    names = [name for _, name in kind.names]
    assert len(names) == len(set(names)) == 1377 == kind.sizes["heldout"]
    assert all(name == name.lower().strip() and not set(name) & set(":_") for name in names)
    glyphs = {kind.glyph(character).tobytes() for character, _ in kind.names[:200]}
    assert len(glyphs) == 200


def test_each_emoji_is_drawn_forty_times_and_held_out_once():
    kind = kind_or_skip(emoji.Emoji)
    named = Counter(kind.names[i % len(kind.names)][1] for i in range(kind.sizes["train"]))
    assert set(named.values()) == {40}
    picture = kind.draw(random.Random(0), "train", 1378)
    assert picture.caption == picture.questions[0].answer == kind.names[1][1]


def test_first_sentence_of_a_caption():
    assert stamps.first_sentence("A frog.\nUna rana.\n") == "A frog."
    assert stamps.first_sentence("King. Can move one step in any direction.") == "King."
    assert stamps.first_sentence("Grandma\u2019s old rag doll.") == "Grandma's old rag doll."
    for unfit in (
        "",
        "Excited!",
        "A quarter ($.25).",
        "\u2013 Because",
        "A sign that was once used to warn of trains.",
    ):
        assert stamps.first_sentence(unfit) is None


def test_stamps_are_drawn_with_their_captions():
    kind = kind_or_skip(stamps.Stamps)
    assert len(kind.stamps) >= 600
    for split in SPLITS:
        picture = kind.draw(random.Random(0), split, 7)
        assert picture.image.mode == "RGB" and picture.caption == kind.stamps[7][1] == picture.questions[0].answer
