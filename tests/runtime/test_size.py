"""Sizes of pictures from their headers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from support.patterns import pattern

from qvl.runtime.errors import ImageError
from qvl.runtime.vision.image import open_picture
from qvl.runtime.vision.size import size_of


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tiff", "bmp"])
def test_a_size_is_that_of_the_decoded_picture(suffix: str, orientation: int | None, tmp_path: Path) -> None:
    picture, exif = Image.fromarray(pattern(30, 50)), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    picture.save(path, **({} if suffix == "bmp" else {"exif": exif}))
    assert size_of(path) == open_picture(path).size


def test_a_photograph_is_read_no_further_than_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(pattern(300, 500)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert size_of(path) == (500, 300)
    with pytest.raises(ImageError):
        open_picture(path)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    with pytest.raises(ImageError, match=r"a\.jpg"):
        size_of(path)
    path.write_text("text")
    with pytest.raises(ImageError, match=r"a\.jpg"):
        size_of(path)
