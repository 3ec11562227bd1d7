"""Questions about one scene of shapes, with their true answers. Each task is a function in a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from qvl.models.nano.train.answer import THINGS, Answer
from qvl.models.nano.train.lexicon import COLOURS, KINDS
from qvl.models.nano.train.world import Scene, Shape

DESCRIBE = (
    "Describe this image.", "Describe the picture.", "Describe this picture.", "Describe the image.",
    "What is in this picture?", "What is in this image?", "What is in the picture?", "What do you see?",
    "What does the picture show?", "Describe what you see.", "Give a short caption.", "What can you see?",
)  # fmt: skip
COUNT_ALL = (
    "How many shapes are there?", "How many shapes do you see?", "Count the shapes.",
    "How many objects are there?",    "How many shapes are in the picture?",
)  # fmt: skip
COUNT_SOME = (
    "How many {} are there?",
    "Count the {}.",
    "How many {} do you see?",
    "How many {} are in the picture?",
)
FIND = ("Find the {}.", "Locate the {}.", "Detect the {}.", "Give the box of the {}.", "Point to the {}.")
FIND_ALL = (
    "Find all shapes.",
    "Detect all objects.",
    "Find every shape.",
    "Locate all shapes.",
    "Find all the shapes.",
)
WHERE = ("Where is the {}?", "In which place is the {}?", "What place is the {} in?")
KIND_OF = ("What shape is at the {}?", "Which shape is at the {}?", "What is at the {}?")
COLOUR_OF = (
    "What color is the {}?",
    "What colour is the {}?",
    "Which color is the {}?",
    "Which colour is the {}?",
)
SIZE_OF = ("Is the {} small or large?", "What size is the {}?", "How large is the {}?")
EXISTS = ("Is there a{} in the picture?", "Is there a{}?", "Do you see a{}?", "Can you see a{}?")
IN_BOX = ("What is in {}?", "Describe {}.", "What is inside {}?")


def pick(rng: np.random.Generator, templates: tuple[str, ...]) -> str:
    return templates[int(rng.integers(len(templates)))]


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def phrase(shape: Shape) -> str:
    return f"{shape.size} {shape.colour} {shape.kind}"


def joined(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def describe_text(scene: Scene) -> str:
    if len(scene.shapes) <= 3:
        text = joined([f"a {phrase(s)} at the {scene.place(s)}" for s in scene.shapes])
        return "A" + text[1:] + "."
    counts = Counter(s.kind for s in scene.shapes)
    parts = [f"{counts[k]} {k if counts[k] == 1 else plural(k)}" for k in KINDS if counts[k]]
    return f"There are {len(scene.shapes)} shapes: {joined(parts)}."


def box_text(scene: Scene, shape: Shape) -> str:
    """Corners in [0, 1000), in steps of 10: finer digits would be noise at this resolution."""

    def unit(value: int, length: int) -> int:
        return min(990, round(100 * value / length) * 10)

    x1, y1, x2, y2 = shape.box
    a, b = unit(x1, scene.width), unit(y1, scene.height)
    c, d = unit(x2, scene.width), unit(y2, scene.height)
    return f"<|box_start|>({a},{b}),({c},{d})<|box_end|>"


def ground_text(scene: Scene, shape: Shape, name: str) -> str:
    return f"<|object_ref_start|>{name}<|object_ref_end|>{box_text(scene, shape)}"


def names(scene: Scene) -> list[tuple[str, Shape]]:
    """Phrases that fit exactly one shape of the scene."""
    out = []
    for s in scene.shapes:
        for name, same in (
            (f"{s.colour} {s.kind}", lambda o, s=s: (o.colour, o.kind) == (s.colour, s.kind)),
            (s.kind, lambda o, s=s: o.kind == s.kind),
            (f"{s.colour} shape", lambda o, s=s: o.colour == s.colour),
            (f"{s.size} {s.kind}", lambda o, s=s: (o.size, o.kind) == (s.size, s.kind)),
        ):
            if sum(same(o) for o in scene.shapes) == 1:
                out.append((name, s))
    return out


def _named(rng: np.random.Generator, scene: Scene, forbid: str = "") -> tuple[str, Shape] | None:
    found = [(n, s) for n, s in names(scene) if forbid not in n.split()] if forbid else names(scene)
    if not found:
        return None
    full = [(n, s) for n, s in found if n == f"{s.colour} {s.kind}"]
    if full and rng.random() < 0.6:
        found = full
    return found[int(rng.integers(len(found)))]


def describe(rng: np.random.Generator, scene: Scene) -> Answer | None:
    return description(pick(rng, DESCRIBE), scene)


def description(question: str, scene: Scene, frame: int = 0) -> Answer:
    """Phrases of `describe_text`, each with its shape."""
    text, shapes = describe_text(scene), scene.shapes
    if len(shapes) > 3:
        return Answer(question, text)
    parts, at = [], 0
    for n, s in enumerate(shapes):
        end = text.index(scene.place(s), text.index(phrase(s), at)) + len(scene.place(s))
        parts.append((text[at:end], frame * THINGS + n))
        at = end
    return Answer.parts(question, [*parts, (text[at:], -1)])


def count_all(rng: np.random.Generator, scene: Scene) -> Answer | None:
    return Answer.number(pick(rng, COUNT_ALL), list(range(len(scene.shapes))))


def count_some(rng: np.random.Generator, scene: Scene) -> Answer | None:
    """By colour, kind or both. The answer is drawn first, so that no number is the usual one."""
    by_answer: dict[int, list[tuple[str, list[int]]]] = {}

    def add(what: str, colour: str | None = None, kind: str | None = None) -> None:
        found = [
            k for k, s in enumerate(scene.shapes) if colour in (None, s.colour) and kind in (None, s.kind)
        ]
        by_answer.setdefault(len(found), []).append((what, found))

    for colour in COLOURS:
        add(f"{colour} shapes", colour=colour)
    for kind in KINDS:
        add(plural(kind), kind=kind)
    for s in scene.shapes:
        add(f"{s.colour} {plural(s.kind)}", s.colour, s.kind)
    values = sorted(by_answer)
    weights = np.array([{0: 0.5, 1: 0.6}.get(v, 1.0 + 0.2 * v) for v in values])
    value = values[int(rng.choice(len(values), p=weights / weights.sum()))]
    what, found = by_answer[value][int(rng.integers(len(by_answer[value])))]
    return Answer.number(pick(rng, COUNT_SOME).format(what), found)


def ground(rng: np.random.Generator, scene: Scene) -> Answer | None:
    found = _named(rng, scene)
    if found is None:
        return None
    name, shape = found
    if len(scene.shapes) == 1 and rng.random() < 0.2:
        name = "shape"
    text = ground_text(scene, shape, name)
    return Answer.about(pick(rng, FIND).format(name), text, scene.shapes.index(shape))


def ground_all(rng: np.random.Generator, scene: Scene) -> Answer | None:
    if len(scene.shapes) > 3:
        return None
    parts = [(ground_text(scene, s, f"{s.colour} {s.kind}"), n) for n, s in enumerate(scene.shapes)]
    return Answer.parts(pick(rng, FIND_ALL), parts)


def in_box(rng: np.random.Generator, scene: Scene) -> Answer | None:
    n = int(rng.integers(len(scene.shapes)))
    shape = scene.shapes[n]
    return Answer.about(pick(rng, IN_BOX).format(box_text(scene, shape)), f"A {phrase(shape)}.", n)


def where(rng: np.random.Generator, scene: Scene) -> Answer | None:
    found = _named(rng, scene)
    if found is None:
        return None
    question = pick(rng, WHERE).format(found[0])
    return Answer.about(question, f"At the {scene.place(found[1])}.", scene.shapes.index(found[1]))


def kind_of(rng: np.random.Generator, scene: Scene) -> Answer | None:
    shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
    place = scene.place(shape)
    if sum(scene.place(s) == place for s in scene.shapes) != 1:
        return None
    return Answer.about(pick(rng, KIND_OF).format(place), f"A {phrase(shape)}.", scene.shapes.index(shape))


def colour_of(rng: np.random.Generator, scene: Scene) -> Answer | None:
    found = [(s.kind, s) for s in scene.shapes if sum(o.kind == s.kind for o in scene.shapes) == 1]
    if len(scene.shapes) == 1:
        found.append(("shape", scene.shapes[0]))
    if not found:
        return None
    name, shape = found[int(rng.integers(len(found)))]
    question = pick(rng, COLOUR_OF).format(name)
    return Answer.about(question, shape.colour.capitalize() + ".", scene.shapes.index(shape))


def size_of(rng: np.random.Generator, scene: Scene) -> Answer | None:
    found = _named(rng, scene, "small")
    if found is None or found[0].split()[0] in ("small", "large"):
        return None
    question = pick(rng, SIZE_OF).format(found[0])
    return Answer.about(question, found[1].size.capitalize() + ".", scene.shapes.index(found[1]))


def exists(rng: np.random.Generator, scene: Scene) -> Answer | None:
    if rng.random() < 0.5:
        s = scene.shapes[int(rng.integers(len(scene.shapes)))]
        colour, kind = s.colour, s.kind
    else:  # half of the rest is a near miss: a colour and a kind that are both there
        here = rng.random() < 0.5
        colour = str(rng.choice([s.colour for s in scene.shapes] if here else COLOURS))
        kind = str(rng.choice([s.kind for s in scene.shapes] if here and rng.random() < 0.5 else KINDS))
    article = "n " if colour[0] in "aeiou" else " "
    question = pick(rng, EXISTS).format(f"{article}{colour} {kind}")
    there = [n for n, s in enumerate(scene.shapes) if (s.colour, s.kind) == (colour, kind)]
    return Answer.about(question, "Yes.", there[0]) if there else Answer(question, "No.")


TASKS: dict[str, Callable[[np.random.Generator, Scene], Answer | None]] = {
    "describe": describe, "count_all": count_all, "count_some": count_some, "ground": ground,
    "ground_all": ground_all, "in_box": in_box, "where": where, "kind_of": kind_of, "colour_of": colour_of,
    "size_of": size_of, "exists": exists,
}  # fmt: skip
