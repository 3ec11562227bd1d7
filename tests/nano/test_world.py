"""The nano model's world: answers are true of the pictures drawn, and the samples say what they show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from qvl.models.nano.train import questions
from qvl.models.nano.train.answer import SINK
from qvl.models.nano.train.draw import coverage, draw_scene
from qvl.models.nano.train.lexicon import KINDS, PLACES
from qvl.models.nano.train.sequences import sample_clip, sample_pair
from qvl.models.nano.train.vision_input import MEAN, STD, Things, patches, resized, smart_resize, targets
from qvl.models.nano.train.world import RGB, Scene, Shape, sample_scene
from qvl.runtime.vision.preprocess import Preprocessor

NANO = Path(__file__).resolve().parents[2] / "models" / "nano"
SAMPLES = NANO.parent / "samples"


def scenes(count: int, shapes: int) -> list[Scene]:
    rng = np.random.default_rng((5, shapes))
    return [sample_scene(rng, shapes) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_fills_its_box(kind: str) -> None:
    """The box asked for is the box drawn: every side of the mask is touched."""
    mask = coverage(kind, 40) > 0.1
    assert all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


@pytest.mark.parametrize("shapes", [1, 2, 3, 8])
def test_shapes_are_whole_and_apart(shapes: int) -> None:
    for scene in scenes(40, shapes):
        taken = np.zeros((scene.height, scene.width), int)
        for s in scene.shapes:
            x1, y1, x2, y2 = s.box
            assert x1 >= 0 and y1 >= 0 and x2 <= scene.width and y2 <= scene.height
            taken[y1:y2, x1:x2] += 1
        assert taken.max() == 1


def test_places_are_thirds() -> None:
    scene = Scene(300, 150, "plain", 200, (0, 0, 0), ())
    centres = [
        (50, 25),
        (150, 25),
        (250, 25),
        (50, 75),
        (150, 75),
        (250, 75),
        (50, 125),
        (150, 125),
        (250, 125),
    ]
    assert [scene.place(Shape("circle", "red", "small", x - 5, y - 5, 10)) for x, y in centres] == list(
        PLACES
    )


def test_the_colour_is_where_the_box_says() -> None:
    rng = np.random.default_rng(11)
    for scene in scenes(30, 1):
        shape = scene.shapes[0]
        if shape.kind in ("ring", "star", "cross", "triangle") or scene.background == "noisy":
            continue
        pixels = draw_scene(rng, scene)[0]
        x1, y1, x2, y2 = shape.box
        centre = pixels[(y1 + y2) // 2, (x1 + x2) // 2].astype(float)
        nearest = min(RGB, key=lambda name: float(np.abs(centre - RGB[name]).sum()))
        assert nearest == shape.colour


def test_counts_are_true_and_not_mostly_one() -> None:
    rng = np.random.default_rng(3)
    answers = []
    for scene in scenes(150, 6):
        question, answer = questions.count_some(rng, scene) or ("", "")
        colour = next((c for c in RGB if c in question.split()), None)
        kind = next((k for k in KINDS if re.search(rf"\b{k}", question)), None)
        true = sum(colour in (None, s.colour) and kind in (None, s.kind) for s in scene.shapes)
        assert int(answer) == true, question
        answers.append(answer)
    assert answers.count("1") < 0.4 * len(answers)


@pytest.mark.parametrize("shapes", [1, 4, 6])
def test_what_is_counted_is_pointed_at(shapes: int) -> None:
    """The group behind a number: as many things as it says, each with a token of its own."""
    rng = np.random.default_rng((4, shapes))
    for scene in scenes(30, shapes):
        answer = questions.count_some(rng, scene)
        assert answer is not None
        ((start, end, bits),) = answer.groups
        assert (start, end) == (0, 1) and bits & SINK
        assert (bits ^ SINK).bit_count() == int(answer[1])
        ids, n = draw_scene(rng, scene)[1], shapes
        centres = targets(ids, Things([1] * n, [1] * n, [0] * n, [s.box for s in scene.shapes]))["centre"]
        h, w = smart_resize(scene.height, scene.width)
        for token, shape in zip(centres, scene.shapes, strict=False):
            row, col = divmod(int(token), w // 28)
            x, y = (shape.x + shape.side / 2) / scene.width, (shape.y + shape.side / 2) / scene.height
            assert col <= x * w / 28 <= col + 1 and row <= y * h / 28 <= row + 1
        assert len(set(centres[:shapes].tolist())) == shapes and (centres[shapes:] == -1).all()


def test_every_pair_question_is_answerable() -> None:
    rng = np.random.default_rng(8)
    for _ in range(60):
        clip = sample_pair(rng, 3)
        for task, (question, answer) in clip.qa:
            if task == "which":
                colour, kind = (
                    question.rstrip("?.").split(" the ")[-1].split()[:2]
                    if "is the" in question
                    else (question.rstrip("?.").split()[-2:])
                )
                has = [any((s.colour, s.kind) == (colour, kind) for s in c.shapes) for c in clip.scenes]
                assert has == [answer == "The first picture.", answer == "The second picture."]


def test_a_clip_moves_the_way_it_says() -> None:
    rng = np.random.default_rng(9)
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for _ in range(60):
        clip = sample_clip(rng, 8)
        if clip.qa[0][0] != "motion":
            continue
        first, last = clip.scenes[0].shapes[0], clip.scenes[-1].shapes[0]
        word = clip.qa[0][1][1].rstrip(".").split()[-1]
        moved = int(np.sign(last.x - first.x)), int(np.sign(last.y - first.y))
        assert moved == signs[word]


def test_preprocessing_is_the_runtimes() -> None:
    """The patches trained on, normalised and doubled, are what the runtime makes of a picture."""
    config = json.loads((NANO / "preprocessor_config.json").read_text())
    runtime = Preprocessor(min_pixels=config["min_pixels"], max_pixels=config["max_pixels"])
    rng = np.random.default_rng(2)
    for h, w in rng.integers(56, 337, (40, 2)).tolist():
        pixels = rng.integers(0, 256, (h, w, 3), np.uint8)
        theirs = runtime.image(pixels)
        assert smart_resize(h, w) == tuple(14 * n for n in theirs.grid_thw[1:])
        ours = patches(resized(pixels)).reshape(-1, 3, 1, 196) / 255
        ours = (ours - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        np.testing.assert_allclose(
            theirs.pixel_values.reshape(-1, 3, 2, 196), np.repeat(ours, 2, axis=2), atol=1e-5
        )


def test_patches_are_in_merge_order() -> None:
    """The second patch lies right of the first, the third below it: groups of 2 x 2."""
    picture = np.zeros((168, 168, 3), np.uint8)
    picture[:14, 14:28] = 10
    picture[14:28, :14] = 20
    rows = patches(resized(picture))
    assert rows.shape == (144, 588)
    assert [int(r.max()) for r in rows[:4]] == [0, 10, 20, 0]


def test_samples_are_there_and_have_their_sizes() -> None:
    records = json.loads((SAMPLES / "answers.json").read_text())
    assert len(records) >= 12
    for record in records:
        for name in [record[k] for k in ("file", "video") if k in record] + record.get("files", []):
            assert (SAMPLES / name).stat().st_size > 0
        if "file" in record:
            with Image.open(SAMPLES / record["file"]) as image:
                assert ImageOps.exif_transpose(image).size == tuple(record["size"])
    assert sum(f.stat().st_size for f in SAMPLES.iterdir()) < 1_000_000
