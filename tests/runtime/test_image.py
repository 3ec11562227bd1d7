"""Any picture Pillow opens becomes upright RGB; what cannot be read is an ImageError that says why."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from qvl.runtime.errors import ImageError
from qvl.runtime.vision.image import image_name, open_image, open_picture

WHITE = (255, 255, 255)


def colours(height: int = 20, width: int = 30, seed: int = 0) -> NDArray[np.uint8]:
    """Random RGB: no symmetry, so that every turn of it is another picture."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: what Pillow's own encoder does not offer (16 bit RGB, odd tRNS, lying sizes)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + idat + chunk(b"IEND", b"")


def trns(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))


pytestmark = pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning:PIL.TiffImagePlugin"
)


# What is accepted


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    rgb = colours()
    data = encode(Image.fromarray(rgb), "PNG")
    path = tmp_path / "photo of a cat.png"
    path.write_bytes(data)
    for source in (path, str(path), data, Image.fromarray(rgb), rgb, Image.open(path)):
        got = open_image(source)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, rgb)
        picture = open_picture(source)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), rgb)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    picture = Image.fromarray(colours())
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(picture, kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(open_image(data), np.asarray(expected))
    upright = open_image(data).shape[:2]
    assert upright == ((30, 20) if orientation >= 5 else (20, 30))


def test_orientation_6_of_a_phone_is_a_quarter_turn_clockwise() -> None:
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste((255, 0, 0), (0, 0, 10, 20))  # red at the left of the stored picture: the top of the shown
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = open_image(encode(picture, "JPEG", exif=exif, quality=95))
    assert shown.shape == (40, 20, 3)
    assert shown[3, 10, 0] > 200 and shown[30, 10, 0] < 50


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_a_nonsense_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    rgb = colours()
    np.testing.assert_array_equal(open_image(encode(Image.fromarray(rgb), "PNG", exif=exif)), rgb)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(Image.fromarray(colours()), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7fgarbage")
    assert open_image(data).shape == (20, 30, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_composited_over_white(mode: str) -> None:
    rgba = np.dstack([colours(), np.linspace(0, 255, 600).astype(np.uint8).reshape(20, 30)])
    layer = Image.fromarray(rgba, "RGBA")
    if mode in ("LA", "La"):
        layer = layer.convert("LA")
    elif mode == "PA":
        layer = layer.convert("PA")
    elif mode == "RGBa":
        layer = layer.convert("RGBa")
    if mode == "La":
        layer = layer.convert("La")
    straight = np.asarray(layer.convert("LA" if mode == "La" else "RGBA").convert("RGBA")).astype(float)
    alpha = straight[..., 3:] / 255
    expected = straight[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(open_image(layer), expected, atol=1)
    assert tuple(open_image(layer)[0, 0]) == WHITE


def test_palette_with_transparent_index_and_with_alpha_table() -> None:
    palette = Image.new("P", (4, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2, 0])
    one = open_image(encode(palette, "PNG", transparency=1))
    np.testing.assert_array_equal(one[0], [(255, 0, 0), WHITE, (0, 0, 255), (255, 0, 0)])
    table = open_image(encode(palette, "PNG", transparency=bytes([255, 0, 128])))
    np.testing.assert_array_equal(table[0, :2], [(255, 0, 0), WHITE])
    np.testing.assert_allclose(table[0, 2], (127, 127, 255), atol=1)
    opaque = open_image(encode(palette, "PNG"))
    np.testing.assert_array_equal(opaque[0, 1], (0, 255, 0))


def test_gray_and_rgb_with_one_transparent_colour() -> None:
    gray = png(3, 1, 8, 0, b"\x00\x00\x80\xff", trns(struct.pack(">H", 0x80)))
    np.testing.assert_array_equal(open_image(gray)[0], [(0, 0, 0), WHITE, WHITE])
    rgb = png(2, 1, 8, 2, b"\x00" + bytes([9, 8, 7, 1, 2, 3]), trns(struct.pack(">HHH", 9, 8, 7)))
    np.testing.assert_array_equal(open_image(rgb)[0], [WHITE, (1, 2, 3)])


def test_cmyk() -> None:
    inks = Image.new("CMYK", (2, 1))
    inks.putdata([(0, 255, 255, 0), (0, 0, 0, 255)])
    np.testing.assert_array_equal(open_image(inks)[0], [(255, 0, 0), (0, 0, 0)])
    photo = open_image(encode(Image.new("CMYK", (32, 32), (255, 0, 255, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(photo[16, 16], (0, 255, 0), atol=3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "HSV", "YCbCr", "LAB", "RGBX"])
def test_other_modes_become_what_pillow_shows(mode: str) -> None:
    source = Image.fromarray(colours()).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    if mode != "P":
        rgb = source.convert("RGB")
        source = rgb if mode == "LAB" else rgb.convert(mode)
    if mode == "LAB":
        source = Image.new("LAB", (30, 20), (255, 128, 128))  # the white of CIELAB
        np.testing.assert_allclose(open_image(source), 255, atol=2)
    else:
        np.testing.assert_array_equal(open_image(source), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    got = open_image(encode(Image.fromarray(ramp), kind))
    np.testing.assert_array_equal(got[..., 0], np.arange(256).reshape(16, 16))
    dark = np.full((8, 8), 200, np.uint16)  # nearly black must stay nearly black
    np.testing.assert_array_equal(open_image(encode(Image.fromarray(dark), kind)), 1)


def test_16_bit_gray_with_transparency() -> None:
    rows = b"\x00" + struct.pack(">HHH", 0, 30000, 65535)
    got = open_image(png(3, 1, 16, 0, rows, trns(struct.pack(">H", 30000))))
    np.testing.assert_array_equal(got[0], [(0, 0, 0), WHITE, WHITE])


def test_16_bit_rgb_png() -> None:
    rows = b"\x00" + struct.pack(">HHHHHH", 65535, 32768, 0, 257 * 7, 257 * 8, 257 * 9)
    np.testing.assert_allclose(open_image(png(2, 1, 16, 2, rows))[0], [(255, 128, 0), (7, 8, 9)], atol=1)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]),
        ([0.0, 100.0, 255.0, 12.0], [0, 100, 255, 12]),
        ([0.0, 65535.0, 257.0, np.inf], [0, 255, 1, 0]),
        ([-10.0, 0.0, 10.0, 5.0], [0, 128, 255, 191]),
        ([0.0, 1e6, 5e5, 0.0], [0, 255, 128, 0]),
    ],
)
def test_float_samples(samples: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([samples], np.float32))
    assert image.mode == "F"
    np.testing.assert_allclose(open_image(image)[0, :, 0], expected, atol=1)
    np.testing.assert_allclose(open_image(encode(image, "TIFF"))[0, :, 0], expected, atol=1)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),
        ([0, 32896, 65535], [0, 128, 255]),
        ([-100, 0, 100], [0, 128, 255]),
    ],
)
def test_32_bit_integer_samples(samples: list[int], expected: list[int]) -> None:
    image = Image.fromarray(np.array([samples], np.int32))
    assert image.mode == "I"
    np.testing.assert_allclose(open_image(image)[0, :, 0], expected, atol=1)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    np.testing.assert_array_equal(open_image(data)[8, 8], (255, 0, 0))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif() -> None:
    smooth = np.dstack([np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))] * 3)
    got = open_image(encode(Image.fromarray(smooth), "AVIF", quality=95))
    np.testing.assert_allclose(got.astype(int), smooth.astype(int), atol=6)


def test_threads_decode_independently(tmp_path: Path) -> None:
    paths = []
    for seed in range(24):
        path = tmp_path / f"{seed}.{('png', 'tiff', 'bmp')[seed % 3]}"
        Image.fromarray(colours(60, 80, seed)).save(path)
        paths.append(path)
    with ThreadPoolExecutor(8) as pool:
        for seed, got in enumerate(pool.map(open_image, paths)):
            np.testing.assert_array_equal(got, colours(60, 80, seed))


def test_the_callers_image_is_left_as_it_was() -> None:
    image = Image.fromarray(colours()).convert("RGBA")
    before = image.tobytes()
    open_image(image)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (30, 20), before)


# What is refused


def refused(source: object, *words: str, hint: str | None = None, **options: int) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source, **options)  # type: ignore[arg-type]
    for word in words:
        assert word in caught.value.message
    if hint is not None:
        assert caught.value.hint is not None and hint in caught.value.hint
    return caught.value


def test_missing_file_folder_and_url(tmp_path: Path) -> None:
    refused(tmp_path / "none.jpg", str(tmp_path / "none.jpg"), "no such file", hint="path")
    refused(tmp_path, str(tmp_path), "folder")
    refused("https://example.org/cat.jpg", "URL", hint="download")
    refused("nul\0byte.png", "cannot be read")


@pytest.mark.parametrize(
    ("content", "found", "hint"),
    [
        (b"", "empty", "anew"),
        (b"Dear diary,\nthis is no picture.\n", "text that begins 'Dear diary,'", "whatever its name"),
        (b"\n \n", "blank text", "whatever its name"),
        (b"<!DOCTYPE html>\n<title>404</title>", "a web page", "save the picture itself"),
        (b"%PDF-1.7\n...", "PDF", "PNG"),
        (b"GGUF\x03\x00\x00\x00", "GGUF", None),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC", "qvl[heif]"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00", "video", "`video`"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS", "git lfs pull"),
        (bytes(range(256)), "begins with", "whatever its name"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, found: str, hint: str | None) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    refused(path, str(path), found, "expected a picture", hint=hint)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "AVIF", "JPEG2000", "TGA"])
def test_truncated_at_any_length(kind: str, tmp_path: Path) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    data = encode(Image.fromarray(colours(40, 50)), kind)
    path = tmp_path / "cut.bin"
    refusals = 0
    for length in sorted({0, 1, 8, 20, len(data) // 4, len(data) // 2, len(data) * 3 // 4, len(data) - 60}):
        path.write_bytes(data[:length])
        try:
            assert open_image(path).shape == (40, 50, 3)
        except ImageError as error:
            refusals += 1
            assert str(path) in error.message
    assert refusals >= 5


def test_noise_in_a_header_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000", "ICO", "PPM", "DDS"):
        data = encode(Image.fromarray(colours(16, 16)), kind)
        for _ in range(40):
            bad = bytearray(data)
            for at in rng.integers(0, min(len(bad), 80), 3):
                bad[at] = rng.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert open_image(bytes(bad), max_source_pixels=10**6).dtype == np.uint8


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    bomb = png(12_000, 12_000, 8, 2, b"")  # 432 MB of RGB in 60 bytes; nothing there to decode
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    refused(path, str(path), "12000x12000", "144.0 million", "100.0 million", max_source_pixels=100_000_000)
    path.write_bytes(png(60_000, 60_000, 8, 2, b""))
    refused(path, str(path), "limit", hint="scale")


def test_pillows_bomb_warning_as_an_error_is_an_image_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(png(10_000, 10_000, 8, 2, b""), "limit")


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (10, 2001)])
def test_aspect_ratio_over_200(size: tuple[int, int]) -> None:
    refused(Image.new("RGB", size), f"{size[0]}x{size[1]}", "aspect ratio", "200", hint="crop")
    refused(np.zeros((size[1], size[0], 3), np.uint8), "aspect ratio")


def test_aspect_ratio_of_200_and_one_pixel_are_accepted() -> None:
    assert open_image(Image.new("RGB", (200, 1))).shape == (1, 200, 3)
    assert open_image(Image.new("RGB", (1, 1))).shape == (1, 1, 3)


def test_zero_size() -> None:
    refused(np.zeros((0, 5, 3), np.uint8), "5x0")
    refused(Image.new("RGB", (0, 4)), "0x4")


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
)
def test_arrays_of_another_layout(array: NDArray[np.uint8]) -> None:
    refused(array, "uint8 [height, width, 3]", str(array.dtype), hint="fromarray")


def test_objects_of_another_type() -> None:
    refused(3, "a picture is 3", "expected a path")


def test_names() -> None:
    assert image_name("a/b.png") == "a/b.png"
    assert image_name(Path("a/b.png")) == str(Path("a/b.png"))
    assert image_name(b"1234") == "image data of 4 bytes"
    assert image_name(Image.new("L", (3, 2))) == "PIL image 3x2"
    assert image_name(np.zeros((2, 3, 3), np.uint8)) == "array [2, 3, 3]"


def test_heic_is_read_when_the_extra_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (10, 200, 30))).save(buffer, quality=95)
    np.testing.assert_allclose(open_image(buffer.getvalue())[24, 32], (10, 200, 30), atol=6)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="expected a file, found a pipe"):
        open_picture(tmp_path / "pipe.png")
