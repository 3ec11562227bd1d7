"""Pages of digits and words: drawn with the exact cell of every character."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qvl.models.nano.train.answer import THINGS, Answer, Ref
from qvl.models.nano.train.draw import blend
from qvl.models.nano.train.lexicon import READ_WORDS
from qvl.models.nano.train.questions import DESCRIBE, pick
from qvl.models.nano.train.world import RGB, picture_size

# Found by name on any system with the DejaVu fonts (apt: fonts-dejavu); "" is the font inside Pillow.
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif-Bold.ttf",
    "",
)
CHARS = "0123456789abcdefghijklmnopqrstuvwxyz"

ORDINALS = ("first", "second", "third", "fourth")
READ = (
    "Read the text.",
    "What does it say?",
    "What is written here?",
    "Read this.",
    "What does the text say?",
)
READ_DIGITS = ("What number is written?", "Read the digits.", "Read the number.", "What digits do you see?")
READ_WORD = ("What word is written?", "Read the word.", "Which word is this?", "Read the words.")


@dataclass(frozen=True)
class Page:
    """Lines of text; `cells` are (character index, x1, y1, x2, y2) in pixels."""

    lines: tuple[str, ...]
    pixels: np.ndarray
    ids: np.ndarray
    cells: tuple[tuple[int, int, int, int, int], ...]

    @property
    def digits(self) -> bool:
        return self.lines[0][0].isdigit()


@lru_cache(maxsize=256)
def _font(name: str, px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(name, px) if name else ImageFont.load_default(px)


@lru_cache(maxsize=20000)
def _glyph(name: str, px: int, char: str) -> np.ndarray:
    """float32 [px, advance], from the top of the tallest letter to below the deepest."""
    font = _font(name, px)
    width = max(1, round(font.getlength(char)))
    image = Image.new("L", (width, round(px * 1.0)))
    top = font.getbbox("bdfl0")[1]
    ImageDraw.Draw(image).text((0, -top), char, font=font, fill=255)
    return np.asarray(image, np.float32) / 255


def sample_lines(rng: np.random.Generator, digits: bool, level: int) -> tuple[str, ...]:
    """`level` 1: one short line; 2: one line; 3 and more: up to three lines."""
    count = 1 if level < 3 else int(rng.choice((1, 2, 3), p=(0.5, 0.32, 0.18)))
    if not digits:
        return tuple(str(rng.choice(READ_WORDS)) for _ in range(min(count, 2)))
    longest = {1: 2, 2: 4}.get(level, 5 if count < 3 else 4)
    return tuple(
        "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(1, longest + 1)))) for _ in range(count)
    )


def sample_page(
    rng: np.random.Generator, digits: bool, level: int = 3, size: tuple[int, int] | None = None
) -> Page:
    lines = sample_lines(rng, digits, level)
    columns, rows = max(map(len, lines)), len(lines)
    for _ in range(200):
        width, height = size or picture_size(rng)
        root = (width * height) ** 0.5
        px = min(height / (1.15 * rows + 0.1), width / (0.72 * columns + 0.3)) * rng.uniform(0.75, 1.0)
        px = min(px, 0.62 * root)
        if px / root >= (0.17 if level < 2 else 0.14):
            break
    px = int(px)
    name = FONTS[int(rng.integers(len(FONTS)))]
    dark = rng.random() < 0.4
    tone = rng.uniform(5, 75) if dark else rng.uniform(165, 250)
    pixels = np.full((height, width, 3), tone, np.float32) + rng.uniform(-9, 9, 3).astype(np.float32)
    if rng.random() < 0.3:
        pixels += rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(3, 14)
    ink_names = ("white", "yellow", "orange") if dark else ("black", "red", "green", "blue", "purple")
    ink = RGB[str(rng.choice(ink_names))] if rng.random() < 0.5 else RGB[ink_names[0]]
    return _lay_out(rng, lines, name, px, pixels, np.asarray(ink, np.float32))


def _lay_out(
    rng: np.random.Generator, lines: tuple[str, ...], name: str, px: int, pixels: np.ndarray, ink: np.ndarray
) -> Page:
    height, width = pixels.shape[:2]
    step = int(px * 1.12)
    glyphs = [[_glyph(name, px, c) for c in line] for line in lines]
    wide = max(sum(g.shape[1] for g in row) for row in glyphs)
    x0 = int(rng.integers(0, max(1, width - wide + 1)))
    y = int(rng.integers(0, max(1, height - step * len(lines) + 1)))
    ids, cells = np.zeros((height, width), np.uint8), []
    for line, row in zip(lines, glyphs, strict=True):
        x = x0
        for char, glyph in zip(line, row, strict=True):
            room = glyph[: max(0, height - y), : max(0, width - x)]
            if room.size:
                blend(pixels, room, x, y, ink)
                cells.append(
                    (CHARS.index(char), x, y, min(width, x + glyph.shape[1]), min(height, y + int(px * 0.8)))
                )
                ids[cells[-1][2] : cells[-1][4], cells[-1][1] : cells[-1][3]] = len(cells)
            x += glyph.shape[1]
        y += step
    return Page(lines, np.clip(pixels, 0, 255).astype(np.uint8), ids, tuple(cells))


def _letters(page: Page, between: str) -> list[tuple[str, int]]:
    """Every character with the index of its cell; a word is one token, so its letters have none."""
    out: list[tuple[str, int]] = []
    n = 0
    for line in page.lines:
        if out and between:
            out.append((between, -1))
        for char in line:
            out.append((char, n if page.digits else -1))
            n += 1
    return out if n == len(page.cells) else [(text, -1) for text, _ in out]


def _words(page: Page, text: str) -> tuple[Ref, ...]:
    """Each word of the reply with the cells of its letters: seen together they tell it from the others."""
    if len(page.cells) != sum(map(len, page.lines)):
        return ()
    out, at, cell = [], 0, 0
    for line in page.lines:
        at = text.index(line, at)
        bits = sum(1 << k for k in range(cell, min(THINGS, cell + len(line))))
        out.append((at, at + len(line), bits))
        at, cell = at + len(line), cell + len(line)
    return tuple(out)


def read(rng: np.random.Generator, page: Page) -> Answer:
    special = READ_DIGITS if page.digits else READ_WORD
    question = pick(rng, READ if rng.random() < 0.6 else special)
    answer = Answer.parts(question, _letters(page, "\n"))
    return answer if page.digits else Answer(*answer, groups=_words(page, answer[1]))


def describe_page(rng: np.random.Generator, page: Page) -> Answer:
    answer = Answer.parts(pick(rng, DESCRIBE), [('The text "', -1), *_letters(page, " "), ('".', -1)])
    return answer if page.digits else Answer(*answer, groups=_words(page, answer[1]))


def spell_at(rng: np.random.Generator, page: Page) -> Answer:
    """The first or last character, or how many lines: cheap questions that teach where to look."""
    kind = int(rng.integers(5))
    what = "digit" if page.digits else "letter"
    if kind == 3:
        last = _letters(page, "")[-len(page.lines[-1]) :]
        return Answer.parts("Read the last line.", last)
    if kind == 4:
        n = int(rng.integers(min(4, len(page.lines[0]))))
        return Answer.parts(f"What is the {ORDINALS[n]} {what}?", [_letters(page, "")[n]])
    if kind == 0:
        return Answer.parts(f"What is the first {what}?", _letters(page, "")[:1])
    if kind == 1:
        return Answer.parts(f"What is the last {what}?", _letters(page, "")[-1:])
    return Answer("How many lines are there?", str(len(page.lines)))
