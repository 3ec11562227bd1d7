"""Boxes drawn into a picture, legible whatever the picture shows.

Every line is a colour between two dark edges, so it stands out from light and dark alike; every label is dark
or light text, whichever reads better, on a plate of its box's colour. Sizes follow the picture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from qvl.runtime.errors import InputError, shown
from qvl.runtime.grounding.box import Box
from qvl.runtime.vision.image import ImageSource, open_picture

Colour: TypeAlias = tuple[int, int, int]
Rectangle: TypeAlias = tuple[int, int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

COLOURS: tuple[Colour, ...] = (  # bright, and far apart in hue from one to the next
    (255, 82, 82),
    (64, 196, 255),
    (255, 214, 0),
    (105, 240, 120),
    (224, 104, 255),
    (255, 152, 40),
    (29, 233, 200),
    (255, 128, 190),
    (170, 190, 60),
    (140, 158, 255),
)
_SMALL = 480  # pixels of the longer side, below which a picture is enlarged
_DARK, _LIGHT = (16, 16, 16), (255, 255, 255)

# Pillow's own font has Latin letters only; for others, the first of these that the system has.
_WORLD_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DejaVuSans.ttf",
)


def draw(image: ImageSource, boxes: Sequence[Box | Mapping[str, Any]]) -> Image.Image:
    """Draw boxes and their labels into a copy of a picture.

    Boxes with the same label have one colour; boxes without a label each have their own.

    Args:
        image: see `qvl.runtime.vision.image.ImageSource`.
        boxes: as parsed or as in `Reply.boxes`, in pixels of this picture. They are drawn in this order; the
            first is on top where labels would overlap.

    Returns:
        A PIL image of mode RGB, upright, of the picture's size; a small picture is enlarged, so that the
        labels leave something of it to see.

    Raises:
        ImageError: the picture cannot be read. InputError: a box has another form.
    """
    if not isinstance(boxes, list | tuple):
        raise InputError(f"boxes are {shown(boxes)}, expected a list")
    picture = open_picture(image).copy()
    placed = [box if isinstance(box, Box) else Box.from_json(box, *picture.size) for box in boxes]
    enlarge = -(-_SMALL // max(picture.size))
    if enlarge > 1:
        size = (picture.width * enlarge, picture.height * enlarge)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    line = max(2, round((picture.width * picture.height) ** 0.5 / 200))
    colours = _colours(placed)
    for box, colour in zip(placed, colours, strict=True):
        _outline(pen, box.pixels(*picture.size), line, colour)
    taken: list[Rectangle] = []
    for box, colour in zip(placed, colours, strict=True):
        if box.label:
            _label(pen, picture.size, box, line, colour, taken)
    return picture


def _colours(boxes: Sequence[Box]) -> list[Colour]:
    names = list(dict.fromkeys(box.label or f"\0{i}" for i, box in enumerate(boxes)))
    return [COLOURS[names.index(box.label or f"\0{i}") % len(COLOURS)] for i, box in enumerate(boxes)]


def _outline(
    pen: ImageDraw.ImageDraw, points: tuple[tuple[int, int], ...], line: int, colour: Colour
) -> None:
    """A closed line within the picture, with edges that set it off from what is behind it."""
    width, height = pen.im.size
    edge = max(1, line // 2)
    inset = line // 2 + edge  # so that a line along the border is not half outside
    if len(points) == 1:  # a point is drawn as a small square around it
        (x, y), half = points[0], 2 * line
        points = ((x - half, y - half), (x + half, y + half))
    if len(points) == 2:
        (left, top), (right, bottom) = points
        points = ((left, top), (right, top), (right, bottom), (left, bottom))
    inside = [
        (
            min(max(x, inset), max(inset, width - 1 - inset)),
            min(max(y, inset), max(inset, height - 1 - inset)),
        )
        for x, y in points
    ]
    loop = [*inside, *inside[:2]]  # on to the second point, so that the first corner is joined as well
    pen.line(loop, _DARK, line + 2 * edge, joint="curve")
    pen.line(loop, colour, line, joint="curve")


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Box,
    line: int,
    colour: Colour,
    taken: list[Rectangle],
) -> None:
    """A plate with the box's label: above its top left corner if there is room, else inside or below."""
    width, height = size
    font_size = max(12, round((width * height) ** 0.5 / 36))
    font = _font(font_size, box.label)
    pad = max(2, font_size // 5)
    xs, ys = zip(*box.pixels(width, height), strict=True)
    text = _fit(pen, box.label, font, max(max(xs) - min(xs), width * 0.45) - 2 * pad)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    ascent, descent = pen.textbbox((0, 0), "Ag", font=font)[1::2]  # one height for all plates
    top, bottom = min(top, ascent), max(bottom, descent)
    w, h = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    x = min(max(min(xs) - line, 0), max(width - w, 0))
    places = [min(ys) - h, min(ys) + line, max(ys) + line, max(ys) - line - h]
    places += [min(ys) - h + step * h for step in range(1, 12)]
    room = [min(max(y, 0), max(height - h, 0)) for y in places]
    plates = [(x, y, x + w, y + h) for y in room]
    fits = (
        plate for plate, y in zip(plates, places, strict=True) if plate[1] == y and not _hits(plate, taken)
    )
    plate = next(fits, next((plate for plate in plates if not _hits(plate, taken)), plates[0]))
    taken.append(plate)
    pen.rectangle((plate[0] - 1, plate[1] - 1, plate[2], plate[3]), fill=_DARK)
    pen.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=colour)
    ink = _DARK if _luminance(colour) > 110 else _LIGHT
    pen.text((plate[0] + pad - left, plate[1] + pad - top), text, fill=ink, font=font)


def _hits(plate: Rectangle, taken: Sequence[Rectangle]) -> bool:
    return any(
        plate[0] < other[2] and other[0] < plate[2] and plate[1] < other[3] and other[1] < plate[3]
        for other in taken
    )


def _fit(pen: ImageDraw.ImageDraw, label: str, font: Font, room: float) -> str:
    """The label in one line, shortened to `room` pixels."""
    label = "".join(c if c.isprintable() else " " for c in label[:200])
    if pen.textlength(label, font=font) <= room:
        return label
    length = next(
        (n for n in range(len(label), 0, -1) if pen.textlength(label[:n] + "…", font=font) <= room), 0
    )
    return label[:length].rstrip() + "…"


def _font(size: int, text: str) -> Font:
    if not text.isascii() and any(ord(c) > 0x24F for c in text):
        for name in _WORLD_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _luminance(colour: Colour) -> float:
    """Perceived brightness, 0 to 255 (ITU-R BT.601)."""
    r, g, b = colour
    return 0.299 * r + 0.587 * g + 0.114 * b
