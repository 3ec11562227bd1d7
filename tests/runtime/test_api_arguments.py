"""Arguments of another type or out of bounds become errors of qvl's own, whoever passes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from qvl.models import embedded
from qvl.runtime import load
from qvl.runtime.engine.store import source_key
from qvl.runtime.errors import InputError, PromptError, check_number, check_text, check_whole, shown
from qvl.runtime.model import Model
from qvl.runtime.prompt.messages import VisionChunk

PICTURE = str(embedded.path().parent / "samples" / "one.png")
HELLO = [{"role": "user", "content": "Hi"}]
ODD: tuple[Any, ...] = (
    "x", "", "\0", "\udcff", 5, -1, 1.5, math.inf, math.nan, 10**400, True, [], [1], {}, {"a": 1}, b"x",
    object(),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load(device="cpu") as opened:
        yield opened


def refused_or_done(call: Any) -> bool:
    """Whether a call ended with qvl's own InputError (which others are of); False if it was served."""
    try:
        call()
    except InputError as error:
        assert str(error)
        return True
    return False


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty",
     "seed", "stop", "grammar", "schema"],
)  # fmt: skip
def test_settings_of_a_reply(model: Model, name: str) -> None:
    refused = [
        refused_or_done(lambda v=value: model.generate(HELLO, **{"max_tokens": 1, name: v}).result())
        for value in ODD
    ]
    assert sum(refused) >= len(ODD) - 7  # some fit some settings


def part(**given: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [given]}]


MESSAGES = {
    "messages": lambda v: v,
    "message": lambda v: [v],
    "role": lambda v: [{"role": v, "content": "x"}],
    "content": lambda v: [{"role": "user", "content": v}],
    "part": lambda v: [{"role": "user", "content": [v]}],
    "type": lambda v: part(type=v),
    "text": lambda v: part(type="text", text=v),
    "image": lambda v: part(type="image", image=v),
    "video": lambda v: part(type="video", video=v),
    "image_url": lambda v: part(type="image_url", image_url=v),
    "url": lambda v: part(type="image_url", image_url={"url": v}),
    "max_pixels": lambda v: part(type="image", image=PICTURE, max_pixels=v),
    "min_pixels": lambda v: part(type="image", image=PICTURE, min_pixels=v),
    "fps": lambda v: part(type="video", video=[PICTURE, PICTURE], fps=v),
    "frames": lambda v: part(type="video", video=[PICTURE, PICTURE], min_frames=v, max_frames=v),
    "total_pixels": lambda v: part(type="video", video=[PICTURE], total_pixels=v),
    "source_fps": lambda v: part(type="video", video=[PICTURE], source_fps=v),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(model: Model, name: str) -> None:
    made = [MESSAGES[name](value) for value in ODD]
    refused = [refused_or_done(lambda m=m: model.generate(m, max_tokens=1).result()) for m in made]
    assert any(refused)


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,éé", "data:image/png;base64,abc", "data:", "data:,x", "file://[", "file:///%00",
     "https://x/y.png", "a\0b", "x" * 5000, "/dev/zero", ".", "~nobody/x"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["image", "video"])
def test_addresses_that_name_no_picture(model: Model, kind: str, url: str) -> None:
    with pytest.raises(InputError):
        model.generate(part(**{"type": kind, kind: url}), max_tokens=1).result()


@pytest.mark.parametrize(
    "name", ["path", "mmproj", "device", "n_ctx", "threads", "min_pixels", "max_pixels", "kv_type"]
)
def test_arguments_of_load(name: str) -> None:
    for value in ODD:
        if name == "n_ctx" and value == 5:
            continue

        def call(value: Any = value) -> None:
            with load(**{"device": "cpu", "n_ctx": 64, name: value}) as opened:
                opened.generate(HELLO, max_tokens=1).result()

        served = not refused_or_done(call)
        assert not served or (name, value) == ("threads", 5), value


def test_messages_name_the_argument_the_value_and_what_was_expected() -> None:
    assert check_number("top_p", 0.5, 0, 1) == 0.5
    assert check_whole("seed", 3) == 3
    for value in (math.inf, "x", True, 2, 10**5000):
        with pytest.raises(InputError, match=r"^top_p is .+, expected a number from 0 to 1$"):
            check_number("top_p", value, 0, 1)
    with pytest.raises(PromptError, match=r"^n is 1\.5, expected 1 or more$"):
        check_whole("n", 1.5, 1, error=PromptError)
    with pytest.raises(InputError, match="expected a whole number"):
        check_whole("n", "1")
    with pytest.raises(InputError, match="grammar holds a NUL character at 1"):
        check_text("grammar", "a\0")
    assert shown(10**5000) == "int"
    assert len(shown("x" * 1000)) == 80


def test_a_palettes_transparency_belongs_to_a_pictures_identity() -> None:
    pictures = [Image.new("P", (28, 28)) for _ in range(3)]
    for picture, transparency in zip(pictures, (None, 0, 1), strict=True):
        picture.putpalette([255, 0, 0, 0, 255, 0])
        if transparency is not None:
            picture.info["transparency"] = transparency
    assert len({source_key(VisionChunk("image", picture)) for picture in pictures}) == 3
