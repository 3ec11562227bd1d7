"""Sizes of pictures from their headers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.patterns import pattern

from qvl.runtime.errors import ImageError
from qvl.runtime.vision import size
from qvl.runtime.vision.image import open_picture
from qvl.runtime.vision.size import size_of


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tiff", "bmp", "gif"])
def test_a_size_is_that_of_the_decoded_picture(suffix: str, orientation: int | None, tmp_path: Path) -> None:
    picture, exif = Image.fromarray(pattern(30, 50)), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    picture.save(path, **({} if suffix in ("bmp", "gif") else {"exif": exif}))
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


def test_a_png_is_not_decoded_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, turned = tmp_path / "a.png", tmp_path / "turned.png"
    picture, texts, exif = Image.fromarray(pattern(30, 50)), PngInfo(), Image.Exif()
    texts.add_text("Comment", "made for a test")
    picture.save(path, pnginfo=texts)
    exif[0x0112] = 6
    picture.save(turned, exif=exif)
    turned.write_bytes(_exif_behind_pixels(turned.read_bytes()))
    assert size_of(turned) == open_picture(turned).size == (30, 50)
    monkeypatch.setattr(size, "open_picture", lambda path: pytest.fail("decoded"))
    assert size_of(path) == (50, 30)


def _exif_behind_pixels(png: bytes) -> bytes:
    at = png.index(b"eXIf") - 4
    chunk = png[at : at + 12 + int.from_bytes(png[at : at + 4], "big")]
    return png.replace(chunk, b"").replace(png[-12:], chunk + png[-12:])


def test_a_png_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pattern(300, 500)).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError, match="cut short"):
        size_of(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp"])
def test_a_size_out_of_bounds_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (1005, 5)).save(path)
    with pytest.raises(ImageError, match="aspect ratio of 201"):
        size_of(path)
