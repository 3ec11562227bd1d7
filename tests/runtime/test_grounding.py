"""Boxes in replies: parsed however the stream is cut, mapped to pixels, drawn so that they can be seen."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from support.patterns import pattern

from qvl.runtime.errors import ImageError
from qvl.runtime.grounding.box import Box, Event, Grounding
from qvl.runtime.grounding.draw import COLOURS, draw
from qvl.runtime.grounding.tags import GroundingParser, parse_grounding

CUP = "<|object_ref_start|>the cup<|object_ref_end|>"
BOX = "<|box_start|>(120,40),(300,512)<|box_end|>"
QUAD = "<|quad_start|>(10,20),(910,0),(900,500),(0,480)<|quad_end|>"

tags = st.sampled_from(
    [
        *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
        *("<|quad_start|>", "<|quad_end|>", "<|im_end|>", "<|", "<|box", "start|>"),
    ]
)
coordinates = st.one_of(st.integers(-50, 1100), st.floats(-10, 1010).map(lambda x: round(x, 2)))
points = st.tuples(coordinates, coordinates).map(lambda point: f"({point[0]},{point[1]})")
digits = st.text("0123456789-.,() ", max_size=230)
replies = st.lists(st.one_of(tags, points, st.just(","), digits, st.text(max_size=8), st.just(BOX))).map(
    "".join
)


def parse_in(pieces: list[str]) -> Grounding:
    parser = GroundingParser((640, 480))
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish()
    return Grounding(
        "".join(event.text for event in events),
        tuple(event.box for event in events if event.box),
        tuple(event.problem for event in events if event.problem),
    )


# Parsing


def test_a_box_with_its_label() -> None:
    got = parse_grounding(f"I see {CUP}{BOX}, I think.", (500, 1000))
    assert got.text == "I see the cup [60, 40, 150, 512], I think."
    assert got.boxes == (Box("the cup", ((120, 40), (300, 512))),)
    assert got.problems == ()


def test_a_label_holds_until_the_next() -> None:
    spoon = "<|object_ref_start|> a\nspoon <|object_ref_end|>"
    got = parse_grounding(f"{BOX}{CUP}{BOX}{QUAD}{spoon}{BOX}")
    assert [box.label for box in got.boxes] == ["", "the cup", "the cup", "a spoon"]
    assert [box.shape for box in got.boxes] == ["box", "box", "quad", "box"]
    assert got.problems == ()


def test_a_quad_keeps_the_order_of_its_corners() -> None:
    got = parse_grounding(QUAD, (100, 200))
    assert got.boxes[0].points == ((10, 20), (910, 0), (900, 500), (0, 480))
    assert got.boxes[0].json(100, 200) == {"label": "", "quad": [[1, 4], [91, 0], [90, 100], [0, 96]]}
    assert got.text == "[(1, 4) (91, 0) (90, 100) (0, 96)]"


def test_forms_that_mean_the_same() -> None:
    for form in (
        "(300,512),(120,40)",
        "(120,512),(300,40)",
        " ( 120 , 40 ) ,\n(300,512) ",
        "(120,40)(300,512)",
    ):
        got = parse_grounding(f"<|box_start|>{form}<|box_end|>")
        assert got.boxes == (Box("", ((120, 40), (300, 512))),) and not got.problems
    assert parse_grounding("<|box_start|>(1.5,2),(3,4.25)<|box_end|>").boxes[0].points == (
        (1.5, 2),
        (3, 4.25),
    )


def test_text_without_boxes_is_left_alone() -> None:
    for text in ("", "plain", "a < b | c <| d |> <|im_end|>", "<|box_startle|>", "[1, 2, 3, 4] (5,6)"):
        assert parse_grounding(text) == Grounding(text, (), ())


def test_text_comes_at_once_and_a_box_when_it_is_complete() -> None:
    parser = GroundingParser((1000, 1000))
    assert parser.feed("Here <") == [Event("Here ")]
    assert parser.feed("3 <|obj") == [Event("<3 ")]
    assert parser.feed("ect_ref_start|>cu") == [Event("cu")]
    assert parser.feed("p<|object_ref_end|><|box_start|>(1") == [Event("p")]
    assert parser.feed("0,20),(30,40)<|box_end") == []
    box = Box("cup", ((10, 20), (30, 40)))
    assert parser.feed("|>.") == [Event(" [10, 20, 30, 40]", box), Event(".")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("reply", "shown", "problem"),
    [
        ("<|box_start|>(1,2)<|box_end|>", "(1,2)", "2 points"),
        ("<|box_start|>(1,2),(3,4),(5,6)<|box_end|>", "(1,2),(3,4),(5,6)", "2 points"),
        ("<|quad_start|>(1,2),(3,4)<|quad_end|>", "(1,2),(3,4)", "4 points"),
        ("<|box_start|>nowhere<|box_end|>", "nowhere", "2 points"),
        ("<|box_start|>(1,2),(3,4) or so<|box_end|>", "(1,2),(3,4) or so", "2 points"),
        ("<|box_start|><|box_end|>", "", "2 points"),
        ("<|box_start|>(5,5),(5,9)<|box_end|>", "(5,5),(5,9)", "no area"),
        ("<|box_start|>(2000,5),(3000,9)<|box_end|>", "(2000,5),(3000,9)", "no area"),
        ("<|box_start|>(1,2),(3", "(1,2),(3", "cut off"),
        ("<|box_start|>", "", "no end"),
        ("<|object_ref_start|>the c", "the c", "no end"),
        ("<|box_start|>(1,2),(3,4)<|quad_end|>", "(1,2),(3,4)", "ends with <|quad_end|>"),
        ("a<|box_end|>b", "ab", "without its start"),
        ("a<|object_ref_end|>b", "ab", "without its start"),
        ("<|object_ref_start|>cup" + BOX, "cup [120, 40, 300, 512]", "ends with <|box_start|>"),
        ("<|box_start|>" + "(1,2)," * 1000, "(1,2)," * 1000, "no end"),
    ],
)
def test_malformed_boxes_are_kept_as_text_and_reported(reply: str, shown: str, problem: str) -> None:
    got = parse_grounding(reply)
    assert got.text == shown
    assert len(got.problems) == 1 and problem in got.problems[0]
    assert len(got.problems[0]) < 200


def test_a_box_after_a_malformed_one_is_still_found() -> None:
    got = parse_grounding(f"<|box_start|>(1,{BOX} and <|box_start|>oops<|box_end|>{BOX}")
    assert len(got.boxes) == 2 and len(got.problems) == 2


def test_out_of_range_is_moved_inside_and_reported() -> None:
    got = parse_grounding("<|box_start|>(-20,100),(500,1000)<|box_end|>", (1000, 1000))
    assert got.boxes == (Box("", ((0, 100), (500, 999))),)
    assert len(got.problems) == 1 and "out of range" in got.problems[0] and "(-20,100)" in got.problems[0]


@given(replies, st.data())
@example("<|box_start|>" + "1" * 199 + "<|box_end|>", None)
@example("<|box_start|>" + "1" * 200 + "<|box_end|>", None)
@example("<|box_start|>" + "1" * 201 + "<|box_end|>", None)
@example("<|box_start|>" + "1" * 215 + "<|box_end|>", None)
@example("<|box_start|>" + "1" * 230 + "<|box_end|>", None)
def test_any_cut_of_any_reply_gives_the_same(reply: str, data: st.DataObject | None) -> None:
    whole = parse_grounding(reply, (640, 480))
    assert parse_in(list(reply)) == whole
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=6)))
        pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
        assert parse_in(pieces) == whole
    for box in whole.boxes:
        assert all(0 <= value < 1000 for point in box.points for value in point)


@given(st.text())
def test_other_text_passes_unchanged(text: str) -> None:
    got = parse_in(list(text))
    if "<|" not in text:
        assert got == Grounding(text, (), ())


@given(st.text(max_size=12).filter(lambda s: "<|" not in s), *[st.integers(0, 999)] * 4)
def test_what_is_written_is_read_back(label: str, a: int, b: int, c: int, d: int) -> None:
    if a == c or b == d:
        return
    reply = f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({a},{b}),({c},{d})<|box_end|>"
    got = parse_grounding(reply)
    expected = Box(" ".join(label.split()), ((min(a, c), min(b, d)), (max(a, c), max(b, d))))
    assert got.boxes == (expected,) and got.problems == ()


# Mapping and drawing


def test_pixels_and_json() -> None:
    box = Box("cup", ((0, 250), (500, 999)))
    assert box.pixels(640, 480) == ((0, 120), (320, 480))
    assert box.json(640, 480) == {"label": "cup", "box": [0, 120, 320, 480]}


def test_drawn_where_the_box_is_in_the_picture_as_it_is_shown() -> None:
    stored = Image.new("RGB", (600, 1000), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned, 1000 wide
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    drawn = np.asarray(draw(buffer.getvalue(), [Box("", ((100, 200), (400, 800)))]))
    assert drawn.shape == (600, 1000, 3)
    changed = np.argwhere((drawn != 255).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    np.testing.assert_allclose([left, top, right, bottom], [100, 120, 400, 480], atol=8)
    assert (drawn[300, 250] == 255).all()


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255), (128, 128, 128), *COLOURS])
def test_lines_and_labels_stand_out_from_any_background(background: tuple[int, int, int]) -> None:
    luma = np.array([0.299, 0.587, 0.114])
    boxes = [Box(f"thing {i}", ((90 * i + 20, 300), (90 * i + 80, 700))) for i in range(len(COLOURS))]
    drawn = np.asarray(draw(Image.new("RGB", (1200, 800), background), boxes)) @ luma
    for box in boxes:
        (left, _), (_, bottom) = box.pixels(1200, 800)
        line = drawn[bottom - 60, left - 8 : left + 8]
        assert line.max() - line.min() > 60
        plate = drawn[205:240, left : left + 60]
        assert plate.max() - plate.min() > 60


def test_labels_have_their_own_colour_and_do_not_cover_each_other() -> None:
    boxes = [Box("one", ((100, 300), (400, 600))), Box("two", ((100, 300), (410, 610)))]
    drawn = np.asarray(draw(Image.new("RGB", (800, 800)), boxes)).reshape(-1, 3)
    counts = {colour: int((drawn == colour).all(axis=1).sum()) for colour in COLOURS[:2]}
    assert all(count > 900 for count in counts.values())


def test_one_label_one_colour() -> None:
    boxes = [Box("cat", ((100, 100), (200, 200))), Box("cat", ((500, 500), (700, 700)))]
    drawn = np.asarray(draw(Image.new("RGB", (800, 800)), boxes))
    assert (drawn == COLOURS[0]).all(axis=2).any() and not (drawn == COLOURS[1]).all(axis=2).any()


def test_the_picture_given_is_not_drawn_into() -> None:
    picture = Image.fromarray(pattern(500, 500))
    before = picture.tobytes()
    assert draw(picture, [Box("x", ((1, 1), (900, 900)))]).tobytes() != before
    assert picture.tobytes() == before


def test_small_pictures_are_enlarged() -> None:
    assert draw(pattern(60, 100), [Box("x", ((1, 1), (900, 900)))]).size == (500, 300)
    assert draw(pattern(480, 640), []).size == (640, 480)


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.lists(
        st.builds(
            Box,
            st.text(max_size=40),
            st.one_of(
                st.tuples(*[st.tuples(st.floats(0, 999), st.floats(0, 999))] * 2).map(
                    lambda p: tuple(zip(*map(sorted, zip(*p, strict=True)), strict=True))
                ),
                st.tuples(*[st.tuples(st.floats(0, 999), st.floats(0, 999))] * 4),
            ),
        ),
        max_size=4,
    ),
)
@example(1, 1, [Box("杯子\n\x00é" * 90, ((0, 0), (1, 1)))])
def test_drawing_never_fails(height: int, width: int, boxes: list[Box]) -> None:
    drawn = draw(np.zeros((height, width, 3), np.uint8), boxes)
    assert drawn.width * height == drawn.height * width  # enlarged alike


def test_a_picture_that_cannot_be_read() -> None:
    with pytest.raises(ImageError, match=r"none\.png"):
        draw("none.png", [])
