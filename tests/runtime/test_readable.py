"""One text for people, everywhere: replies, their streams, captions, sidecars and sessions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvl.runtime import caption, load
from qvl.runtime.grounding.box import Box
from qvl.runtime.grounding.draw import draw
from qvl.runtime.grounding.readable import ReadableReply, read_reply
from qvl.runtime.grounding.tags import GroundingParser
from qvl.runtime.model import Model
from qvl.runtime.vision.size import PictureInfo

SAMPLES = Path(__file__).parents[2] / "models" / "samples"
ONE, TALL = SAMPLES / "one.png", SAMPLES / "tall.png"
FIND = "Find the red star."
CAT = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>"
A = PictureInfo((200, 100), (196, 112), "a.png")
B = PictureInfo((1000, 500), (1008, 504), "b.png")


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load(device="cpu", threads=1) as opened:
        yield opened


def test_boxes_come_in_pixels_of_the_picture_that_is_meant() -> None:
    one = read_reply(CAT, GroundingParser, [A])
    assert one.text == "cat [20, 20, 100, 60]"
    assert one.boxes == [{"label": "cat", "box": [20, 20, 100, 60], "picture": 1}]
    in_first = read_reply(CAT, GroundingParser, [A, B], "Where is the cat in a.png?")
    last = read_reply(CAT, GroundingParser, [A, B], "Where is the cat?")
    assert (in_first.boxes[0]["picture"], last.boxes[0]["picture"]) == (1, 2)
    assert last.text == "cat [100, 100, 500, 300]"
    none = read_reply(CAT, GroundingParser)
    assert none.boxes == [{"label": "cat", "box": [100, 200, 500, 600]}]  # thousandths


def test_pictures_without_a_name_are_not_mentioned_by_every_text() -> None:
    sent = [PictureInfo((10, 10), (28, 28)), PictureInfo((20, 20), (28, 28))]
    assert read_reply(CAT, GroundingParser, sent, "In picture 1").boxes[0]["picture"] == 1
    assert read_reply(CAT, GroundingParser, sent, "Where?").boxes[0]["picture"] == 2


@given(st.data())
def test_pieces_cut_anywhere_give_the_whole_text(data: st.DataObject) -> None:
    raw = data.draw(st.lists(st.sampled_from([CAT, "a ", "<|box_start|>(1,", "é"]), max_size=4).map("".join))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    reply, shown = ReadableReply(GroundingParser, [A]), ""
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        shown += "".join(event.text for event in reply.feed(raw[start:end]))
    shown += "".join(event.text for event in reply.finish())
    whole = read_reply(raw, GroundingParser, [A])
    assert (shown, reply.raw) == (whole.text, raw)
    assert (reply.text, reply.boxes, reply.problems) == (whole.text, whole.boxes, whole.problems)


@pytest.mark.parametrize(
    "points", [((10, 20),), ((0, 0), (500, 990)), ((0, 0), (900, 0), (900, 900), (0, 900))]
)
def test_boxes_are_drawn_as_replies_have_them(points: tuple[tuple[float, float], ...]) -> None:
    box, picture = Box("x", points), Image.new("RGB", (1000, 1000), "white")
    assert Box.from_json(box.json(1000, 1000), 1000, 1000) == box
    assert draw(picture, [box.json(1000, 1000)]).tobytes() == draw(picture, [box]).tobytes()


def test_a_reply_its_stream_and_its_caption_have_one_text(model: Model, tmp_path: Path) -> None:
    content = [{"type": "image", "image": str(ONE)}, {"type": "text", "text": FIND}]
    stream = model.generate([{"role": "user", "content": content}], temperature=0)
    pieces = list(stream)
    reply = stream.result()
    assert "<|box_start|>" in reply.raw and "<|" not in reply.text
    assert "".join(piece.text for piece in pieces) == reply.text
    assert "".join(piece.raw for piece in pieces) == reply.raw
    assert [box for piece in pieces for box in piece.boxes] == list(reply.boxes) != []
    assert reply.message["content"] == reply.raw
    expected = read_reply(reply.raw, GroundingParser, [PictureInfo(Image.open(ONE).size, (0, 0))])
    assert (reply.text, list(reply.boxes)) == (expected.text, expected.boxes)

    outputs = {suffix: tmp_path / f"out.{suffix}" for suffix in ("jsonl", "csv")}
    for path in outputs.values():
        [record] = caption(model, ONE, prompt=FIND, temperature=0, output=path)
        assert (record.caption, record.raw) == (reply.text.strip(), reply.raw)
        assert [{**box, "picture": 1} for box in record.boxes] == list(reply.boxes)
    line = json.loads(outputs["jsonl"].read_text())
    [row] = csv.DictReader(outputs["csv"].open(newline=""))
    assert (line["caption"], line["raw"]) == (row["caption"], row["raw"]) == (record.caption, record.raw)
    assert line["boxes"] == json.loads(row["boxes"]) == list(record.boxes)


def test_the_picture_that_is_meant_is_numbered(model: Model) -> None:
    pictures = [{"type": "image", "image": str(path)} for path in (TALL, ONE)]
    reply = model.generate([{"role": "user", "content": [*pictures, FIND]}], temperature=0).result()
    assert {box["picture"] for box in reply.boxes} == {2}
    width, height = Image.open(ONE).size
    assert all(box["box"][2] <= width and box["box"][3] <= height for box in reply.boxes)


def test_a_stream_left_early_has_a_readable_reply(model: Model) -> None:
    stream = model.generate(
        [{"role": "user", "content": [{"type": "image", "image": str(ONE)}, FIND]}], temperature=0
    )
    while "<|box_start|>" not in next(stream).raw:
        pass
    stream.cancel()
    reply = stream.result()
    assert reply.finish_reason == "cancelled" and "<|" not in reply.text and "<|box_start|>" in reply.raw


def test_pixels_of_the_picture_as_it_is_shown(model: Model, tmp_path: Path) -> None:
    """EXIF turns a photograph before anybody sees it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(ONE).convert("RGB").rotate(90, expand=True).save(
        tmp_path / "turned.jpg", exif=exif, quality=98, subsampling=0
    )
    straight, turned = (model.ask(path, FIND, temperature=0) for path in (ONE, tmp_path / "turned.jpg"))
    assert [box["label"] for box in turned.boxes] == [box["label"] for box in straight.boxes]
    for a, b in zip(turned.boxes, straight.boxes, strict=True):
        assert max(abs(x - y) for x, y in zip(a["box"], b["box"], strict=True)) < 20
