"""Two pictures, and clips of 2 to 16 frames: what differs, which has what, what moves where; order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qvl.models.nano.train.answer import THINGS, Answer
from qvl.models.nano.train.draw import draw_scene
from qvl.models.nano.train.lexicon import KINDS
from qvl.models.nano.train.questions import description, pick
from qvl.models.nano.train.world import SIZE_RANGE, Scene, Shape, picture_size, sample_scene, visible_colours

WHICH = (
    "Which picture has the {}?",
    "Which image has the {}?",
    "In which picture is the {}?",
    "Which one has the {}?",
)
DIFFERS = (
    "What differs?",
    "What is different?",
    "What changed?",
    "What is the difference?",
    "What has changed?",
)
MOVES = (
    "What moves where?", "Describe the video.", "Describe this video.", "What happens?",
    "What happens in the video?",
    "What moves?",
)  # fmt: skip
DIRECTION = ("Which way does the {} move?", "Where does the {} move?", "In which direction does the {} go?")
ORDER = (
    "In what order do the shapes appear?", "Describe the video.", "What happens?", "Describe this video.",
    "What happens in the video?",
)  # fmt: skip
ONE_OF_TWO = ("Describe the {} picture.", "What is in the {} picture?", "What does the {} picture show?")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ORDINALS = ("first", "second")


@dataclass(frozen=True)
class Clip:
    """Scenes of the frames, and the questions about them."""

    scenes: tuple[Scene, ...]
    qa: tuple[tuple[str, Answer], ...]

    def draw(self, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """One seed for all frames: background and colours stay as they are."""
        seed = int(rng.integers(1 << 31))
        return [draw_scene(np.random.default_rng(seed), s) for s in self.scenes]


def sample_pair(rng: np.random.Generator, most: int = 3) -> Clip:
    """Either two unrelated pictures, or the same one with a single change."""
    if rng.random() < 0.5:
        a, b = (sample_scene(rng, int(rng.integers(1, most + 1))) for _ in range(2))
        has = [{(s.colour, s.kind) for s in x.shapes} for x in (a, b)]
        qa: list[tuple[str, Answer]] = []
        for n in range(2):
            for colour, kind in sorted(has[n] - has[1 - n]):
                thing = next(
                    k for k, s in enumerate((a, b)[n].shapes) if (s.colour, s.kind) == (colour, kind)
                )
                asked = pick(rng, WHICH).format(f"{colour} {kind}")
                answer = Answer.about(asked, f"The {ORDINALS[n]} picture.", n * THINGS + thing)
                qa.append(("which", answer))
        if qa:
            qa = [qa[k] for k in rng.permutation(len(qa))][:4]
            qa += [("one_of_two", _one_of_two(rng, n, (a, b))) for n in range(2)]
            return Clip((a, b), tuple(qa))
        return sample_pair(rng, most)
    a = sample_scene(rng, int(rng.integers(1, most + 1)))
    n = int(rng.integers(len(a.shapes)))
    old = a.shapes[n]
    change = ("colour", "kind", "gone", "new", "none")[int(rng.choice(5, p=(0.28, 0.28, 0.17, 0.17, 0.10)))]
    shapes, text = list(a.shapes), "Nothing, they are the same."
    if change == "colour":
        colour = str(rng.choice([c for c in visible_colours(a.tone) if c != old.colour]))
        shapes[n] = replace(old, colour=colour)
        text = f"The {old.colour} {old.kind} became {colour}."
    elif change == "kind":
        kind = str(rng.choice([k for k in KINDS if k != old.kind]))
        shapes[n] = replace(old, kind=kind)
        text = f"The {old.colour} {old.kind} became a {kind}."
    elif change in ("gone", "new") and len(shapes) > 1:
        del shapes[n]
        text = f"The {old.colour} {old.kind} is missing."
        if change == "new":
            text = f"The {old.colour} {old.kind} is new."
    b = replace(a, shapes=tuple(shapes))
    scenes = (b, a) if change == "new" else (a, b)
    question, there = pick(rng, DIFFERS), n + (THINGS if change == "new" else 0)
    same = text.startswith("Nothing")
    answer = Answer(question, text) if same else Answer.about(question, text, there)
    if change in ("colour", "kind"):  # what it was is in the first picture, what it became in the second
        cut = text.index(" became")
        answer = Answer.parts(question, [(text[:cut], n), (text[cut:], THINGS + n)])
    n = int(rng.integers(2))
    return Clip(scenes, (("differs", answer), ("one_of_two", _one_of_two(rng, n, scenes))))


def _one_of_two(rng: np.random.Generator, n: int, scenes: tuple[Scene, Scene]) -> Answer:
    return description(pick(rng, ONE_OF_TWO).format(ORDINALS[n]), scenes[n], n)


def sample_clip(rng: np.random.Generator, frames: int) -> Clip:
    return _order(rng, frames) if rng.random() < 0.45 else _motion(rng, frames)


def _span(start: float, end: float, length: int, side: int) -> tuple[int, int]:
    room = length - side
    return round(start * room), round(end * room)


def _motion(rng: np.random.Generator, frames: int) -> Clip:
    """One shape crosses; another may stand still. Never along a side too short to move in."""
    for _ in range(100):
        width, height = picture_size(rng)
        name = str(rng.choice(list(DIRECTIONS)))
        dx, dy = DIRECTIONS[name]
        if (width if dx else height) >= 0.75 * (height if dx else width):
            break
    still = sample_scene(rng, 1, (width, height))
    other = still.shapes[0]
    side = min(
        round(rng.uniform(*SIZE_RANGE["small"]) * 1.2 * (width * height) ** 0.5), width - 2, height - 2
    )
    choices = [
        (c, k) for c in visible_colours(still.tone) for k in KINDS if c != other.colour and k != other.kind
    ]
    colour, kind = choices[int(rng.integers(len(choices)))]
    with_other = rng.random() < 0.4
    for _ in range(60):
        start, end = rng.uniform(0, 0.3), rng.uniform(0.7, 1)
        fixed = rng.uniform(0, 1)
        xs = _span(start, end, width, side) if dx else _span(fixed, fixed, width, side)
        ys = _span(start, end, height, side) if dy else _span(fixed, fixed, height, side)
        if dx + dy < 0:
            xs, ys = xs[::-1], ys[::-1]
        swept = (min(xs), min(ys), max(xs) + side, max(ys) + side)
        x1, y1, x2, y2 = other.box
        if not with_other or swept[2] < x1 or x2 < swept[0] or swept[3] < y1 or y2 < swept[1]:
            break
    else:
        with_other = False
    scenes = []
    for n in range(frames):
        part = n / (frames - 1)
        x, y = round(xs[0] + part * (xs[1] - xs[0])), round(ys[0] + part * (ys[1] - ys[0]))
        mover = Shape(kind, colour, "small", x, y, side)
        scenes.append(replace(still, shapes=(mover, other) if with_other else (mover,)))
    word = f"to the {name}" if dx else name
    text = f"The {colour} {kind} moves {word}."
    asked = pick(rng, DIRECTION).format(f"{colour} {kind}")
    end = (frames // 2 - 1) * THINGS  # the mover, where it has come to
    qa: list[tuple[str, Answer]] = [("motion", Answer.about(pick(rng, MOVES), text, end))]
    qa.append(("motion", Answer.about(asked, word[0].upper() + word[1:] + ".", end)))
    if with_other:
        asked = f"Does the {other.colour} {other.kind} move?"
        qa.append(("motion", Answer(asked, "No, it stays still.")))
    return Clip(tuple(scenes), tuple(qa))


def _order(rng: np.random.Generator, frames: int) -> Clip:
    """One shape after another, each alone."""
    count = 2 if frames < 6 or rng.random() < 0.5 else 3
    size = picture_size(rng)
    base = sample_scene(rng, 1, size)
    colours = [str(c) for c in rng.choice(visible_colours(base.tone), count, replace=False)]
    kinds = [str(k) for k in rng.choice(KINDS, count, replace=False)]
    shown = [
        replace(sample_scene(rng, 1, size).shapes[0], colour=c, kind=k)
        for c, k in zip(colours, kinds, strict=True)
    ]
    pairs = frames // 2
    cuts = (
        np.sort(rng.choice(np.arange(1, pairs), count - 1, replace=False))
        if pairs > count
        else np.arange(1, count)
    )
    # two frames: one each
    which = [0, 1] if pairs < count else [int((cuts <= n // 2).sum()) for n in range(frames)]
    scenes = tuple(replace(base, shapes=(shown[w],)) for w in which)
    names = [f"a {s.colour} {s.kind}".replace("a o", "an o") for s in shown]
    # The first of each pair of frames tells its tokens what they show.
    things = [next((n // 2 * THINGS for n in range(0, frames, 2) if which[n] == w), -1) for w in range(count)]
    parts = [(f", then {name}" if n else f"First {name}", things[n]) for n, name in enumerate(names)]
    qa: list[tuple[str, Answer]] = [("order", Answer.parts(pick(rng, ORDER), [*parts, (".", -1)]))]
    for question, n in (("What appears first?", 0), ("What appears last?", count - 1)):
        qa.append(("order", Answer.parts(question, [(names[n][0].upper() + names[n][1:] + ".", things[n])])))
    return Clip(scenes, tuple(qa))
