"""Boxes and points as JSON, whole and in pieces, right and wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.runtime.grounding.box import Box
from qvl.runtime.grounding.draw import draw
from qvl.runtime.grounding.json_boxes import JsonBoxes
from qvl.runtime.grounding.tags import QWEN, GroundingParser, parse_grounding

REPLY = (
    "Here:\n```json\n[\n"
    '\t{"bbox_2d": [100, 200, 500, 800], "label": "the {cup}"},\n'
    '\t{"point_2d": [250, 500], "label": "its \\"handle\\""}\n]\n```\nThat is all.'
)


def found(text: str, cuts: tuple[int, ...] = (), **options: Any) -> tuple[str, list[Box]]:
    parser = JsonBoxes(**options)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    events = []
    for begin, end in zip([0, *ends], ends, strict=False):
        events += parser.feed(text[begin:end])
    events += parser.finish()
    return "".join(event.text for event in events), [event.box for event in events if event.box]


def test_thousandths_and_points() -> None:
    text, boxes = found(REPLY)
    assert text == REPLY
    assert boxes == [
        Box("the {cup}", ((100, 200), (500, 800))),
        Box('its "handle"', ((250, 500),)),
    ]
    assert boxes[0].json(640, 480) == {"label": "the {cup}", "box": [64, 96, 320, 384]}
    assert boxes[1].json(640, 480) == {"label": 'its "handle"', "point": [160, 240]}


def test_pixels_of_the_resized_picture_become_pixels_of_the_picture() -> None:
    reply = '{"bbox_2d": [28, 56, 280, 504], "label": "x"}'
    _, [box] = found(reply, size=(1000, 2000), resized=lambda size: (280, 560), unit="pixels")
    assert box.json(1000, 2000) == {"label": "x", "box": [100, 200, 999, 1800]}


def test_pictures_are_chosen_by_what_was_said() -> None:
    seen: list[str] = []

    def choose(text: str) -> tuple[int, tuple[int, int]]:
        seen.append(text)
        return 2, (100, 100)

    _, [box] = found('In picture 2: {"bbox_2d": [1, 2, 30, 40]}', choose=choose)
    assert box.picture == 2 and seen == ["In picture 2: "]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(REPLY)), max_size=8))
def test_cut_anywhere(cuts: list[int]) -> None:
    assert found(REPLY, tuple(cuts)) == found(REPLY)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]",:\\ 123bbox_2dpoint_2d', max_size=60) | st.text(max_size=40))
def test_no_text_raises_or_is_lost(text: str) -> None:
    assert found(text)[0] == text


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3], [1, 2, 3, 4, 5], "1,2,3,4", None, {}, [1, 2, 1, 40], [True, 1, 2, 3], [1e300, 1, 2, 3],
        ["1", "2", "3", "4"], [[1, 2], [3]], [1, None, 3, 4], [[[1, 2, 3, 4]]],
    ],
)  # fmt: skip
def test_no_box(value: Any) -> None:
    text = json.dumps({"bbox_2d": value, "label": 7})
    assert found(text) == (text, [])


@pytest.mark.parametrize(
    "text", ['{"bbox_2d": [1,2,3,4]', "{" * 9999, '{"bbox_2d": [NaN, 1, 2, 3]}', '{"a": "' * 3000]
)
def test_malformed_json_is_text(text: str) -> None:
    assert found(text) == (text, [])


def test_nested_objects_and_reversed_corners() -> None:
    _, boxes = found('{"objects": [{"bbox_2d": [[30, 40], [10, 20]], "label": "a  b"}], "n": 1}')
    assert boxes == [Box("a b", ((10, 20), (30, 40)))]


def test_points_are_drawn() -> None:
    from PIL import Image

    drawn = draw(Image.new("RGB", (500, 500)), [Box("p", ((500, 500),))])
    assert drawn.getpixel((250, 258)) != (0, 0, 0) or drawn.getpixel((258, 250)) != (0, 0, 0)


def test_qwen_vl_tags() -> None:
    reply = "See <ref>the cup</ref><box>(120,40),(300,512)</box> and <quad>(1,1),(9,1),(9,9),(1,9)</quad>."
    grounding = parse_grounding(reply, parser=GroundingParser((1000, 1000), tags=QWEN))
    assert grounding.text == "See the cup [120, 40, 300, 512] and [(1, 1) (9, 1) (9, 9) (1, 9)]."
    assert [box.label for box in grounding.boxes] == ["the cup", "the cup"]
