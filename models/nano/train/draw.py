"""Scenes to pixels. Coverage masks are made once a kind and side: a picture takes a millisecond."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from qvl.models.nano.train.world import RGB, Scene

OVERSAMPLE = 8


def _polygon(kind: str) -> list[tuple[float, float]]:
    if kind == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if kind == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if kind == "cross":
        a, b = 0.33, 0.67
        return [
            (a, 0),
            (b, 0),
            (b, a),
            (1, a),
            (1, b),
            (b, b),
            (b, 1),
            (a, 1),
            (a, b),
            (0, b),
            (0, a),
            (a, a),
        ]
    points = []
    for n in range(10):  # star
        radius = 1.0 if n % 2 == 0 else 0.40
        angle = np.pi * (n / 5 - 0.5)
        points.append((radius * np.cos(angle), radius * np.sin(angle)))
    xs, ys = np.array(points).T  # stretched to fill its box, so that the box is exact
    return list(zip((xs - xs.min()) / np.ptp(xs), (ys - ys.min()) / np.ptp(ys), strict=True))


@lru_cache(maxsize=4096)
def coverage(kind: str, side: int) -> np.ndarray:
    """float32 [side, side], the share of each pixel that the shape covers."""
    full = side * OVERSAMPLE
    mask = Image.new("L", (full, full))
    draw = ImageDraw.Draw(mask)
    if kind in ("circle", "ring"):
        draw.ellipse((0, 0, full - 1, full - 1), fill=255)
        if kind == "ring":
            inner = 0.27 * full
            draw.ellipse((inner, inner, full - 1 - inner, full - 1 - inner), fill=0)
    else:
        draw.polygon([(x * (full - 1), y * (full - 1)) for x, y in _polygon(kind)], fill=255)
    small = np.asarray(mask, np.float32).reshape(side, OVERSAMPLE, side, OVERSAMPLE).mean((1, 3))
    return small / 255


def canvas(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """float32 [h, w, 3], the background alone."""
    h, w = scene.height, scene.width
    base = np.float32(scene.tone) + np.asarray(scene.tint, np.float32)
    out = np.empty((h, w, 3), np.float32)
    out[:] = base
    if scene.background == "noisy":
        cell = int(rng.integers(1, 5))
        grey = rng.standard_normal((h // cell + 1, w // cell + 1), dtype=np.float32) * rng.uniform(8, 26)
        grey = np.repeat(np.repeat(grey, cell, 0), cell, 1)[:h, :w]
        out += grey[..., None]
    elif rng.random() < 0.3:  # a gentle slope of light
        slope = np.linspace(-1, 1, w, dtype=np.float32) * rng.uniform(-22, 22)
        out += slope[None, :, None]
    return out


def jitter(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.clip(np.asarray(RGB[colour], np.float32) + rng.uniform(-16, 16, 3).astype(np.float32), 0, 255)


def blend(out: np.ndarray, mask: np.ndarray, x: int, y: int, rgb: np.ndarray) -> None:
    h, w = mask.shape
    window = out[y : y + h, x : x + w]
    window += mask[: window.shape[0], : window.shape[1], None] * (rgb - window)


def draw_scene(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [h, w, 3], uint8 [h, w]): the picture, and 1 + the index of the shape that covers each pixel."""
    out = canvas(rng, scene)
    ids = np.zeros(out.shape[:2], np.uint8)
    for n, shape in enumerate(scene.shapes):
        mask = coverage(shape.kind, shape.side)
        blend(out, mask, shape.x, shape.y, jitter(rng, shape.colour))
        window = ids[shape.y : shape.y + shape.side, shape.x : shape.x + shape.side]
        window[mask > 0.5] = n + 1
    return np.clip(out, 0, 255).astype(np.uint8), ids
