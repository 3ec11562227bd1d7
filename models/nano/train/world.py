"""The world the nano model knows: shapes on a background, drawn at native size, with their exact boxes.

Every draw comes from a `numpy.random.Generator`, so a seed fixes a picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qvl.models.nano.train.lexicon import COLOURS, KINDS, PLACES, SIZES

RGB = {
    "red": (214, 36, 36), "green": (34, 150, 52), "blue": (36, 72, 214), "yellow": (240, 214, 40),
    "purple": (140, 44, 168), "orange": (242, 134, 24), "white": (250, 250, 250), "black": (12, 12, 12),
}  # fmt: skip
# Diameter as a share of the square root of the picture's area; the gap between the two keeps the words true.
SIZE_RANGE = {"small": (0.17, 0.22), "large": (0.31, 0.39)}
MARGIN = 0.035  # centres keep this share of a side away from the lines between thirds
BACKGROUNDS = ("plain", "dark", "noisy")


@dataclass(frozen=True)
class Shape:
    """One shape; the box is in pixels of the native picture, right and bottom exclusive."""

    kind: str
    colour: str
    size: str
    x: int
    y: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + self.side, self.y + self.side


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: size, background and shapes in reading order of their places."""

    width: int
    height: int
    background: str
    tone: int
    tint: tuple[int, int, int]
    shapes: tuple[Shape, ...]

    def place(self, shape: Shape) -> str:
        cx, cy = shape.x + shape.side / 2, shape.y + shape.side / 2
        return PLACES[int(cy * 3 / self.height) * 3 + int(cx * 3 / self.width)]


def picture_size(rng: np.random.Generator, snap: float = 0.5) -> tuple[int, int]:
    """(width, height), each 56 to 336. A share `snap` sits on the grid that the processor would choose."""
    if rng.random() < snap:
        while True:
            w, h = int(rng.integers(2, 13)), int(rng.integers(2, 13))
            if 24 <= w * h <= 36 and (abs(w - h) <= 3 or rng.random() < 0.5):
                return 28 * w, 28 * h
    while True:
        w, h = (int(np.exp(rng.uniform(np.log(56), np.log(337)))) for _ in range(2))
        if max(w, h) / min(w, h) <= 2.2 or rng.random() < 0.45:
            return w, h


def background(rng: np.random.Generator) -> tuple[str, int, tuple[int, int, int]]:
    kind = BACKGROUNDS[rng.choice(3, p=(0.45, 0.25, 0.30))]
    low, high = {"plain": (150, 245), "dark": (5, 75), "noisy": (70, 190)}[kind]
    tint = tuple(int(v) for v in rng.integers(-9, 10, 3))
    return kind, int(rng.integers(low, high)), (tint[0], tint[1], tint[2])


def visible_colours(tone: int) -> list[str]:
    """Colours that stand out on a grey of this tone."""
    return [c for c in COLOURS if not (c == "white" and tone > 185) and not (c == "black" and tone < 80)]


def _clear_of_thirds(centre: float, length: int) -> bool:
    return all(abs(centre / length - line) > MARGIN for line in (1 / 3, 2 / 3))


def _spot(
    rng: np.random.Generator, scene: Scene, size: str, taken: list[Shape], gap: int
) -> tuple[int, int, int] | None:
    root = (scene.width * scene.height) ** 0.5
    for _ in range(30):
        side = round(rng.uniform(*SIZE_RANGE[size]) * root)
        side = min(side, scene.width - 2, scene.height - 2)
        x, y = int(rng.integers(0, scene.width - side + 1)), int(rng.integers(0, scene.height - side + 1))
        if not (_clear_of_thirds(x + side / 2, scene.width) and _clear_of_thirds(y + side / 2, scene.height)):
            continue
        if all(
            x >= s.x + s.side + gap
            or s.x >= x + side + gap
            or y >= s.y + s.side + gap
            or s.y >= y + side + gap
            for s in taken
        ):
            return x, y, side
    return None


def sample_scene(
    rng: np.random.Generator, count: int, size: tuple[int, int] | None = None, distinct_places: bool = True
) -> Scene:
    """`count` shapes that do not touch; up to three of them stand in different places, no two alike."""
    while True:
        width, height = size or picture_size(rng)
        kind, tone, tint = background(rng)
        scene = Scene(width, height, kind, tone, tint, ())
        colours = visible_colours(tone)
        shapes: list[Shape] = []
        places: set[str] = set()
        few_colours = count > 3 and rng.random() < 0.6
        palette = (
            list(rng.choice(colours, size=int(rng.integers(1, 4)), replace=False)) if few_colours else colours
        )
        kinds = list(rng.choice(KINDS, size=int(rng.integers(1, 4)), replace=False)) if count > 3 else KINDS
        for _ in range(count * 6):
            if len(shapes) == count:
                break
            large = rng.random() < (0.5 if count < 3 else 0.35 if count == 3 else 0.15)
            label = SIZES[1] if large else SIZES[0]
            spot = _spot(rng, scene, label, shapes, gap=max(2, round(0.02 * (width * height) ** 0.5)))
            if spot is None:
                continue
            shape = Shape(str(rng.choice(kinds)), str(rng.choice(palette)), label, *spot)
            place = scene.place(shape)
            alike = any((s.kind, s.colour) == (shape.kind, shape.colour) for s in shapes)
            if distinct_places and count <= 3 and (place in places or alike):
                continue
            places.add(place)
            shapes.append(shape)
        if len(shapes) == count:
            shapes.sort(key=lambda s: (PLACES.index(scene.place(s)), s.y, s.x))
            return replace(scene, shapes=tuple(shapes))
