"""Every format in every mode, as other programs write it: the pixels that a second decoder gives."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from support.pictures import encoded, gray_of, scene, tiff

from qvl.runtime.errors import ImageError
from qvl.runtime.vision.image import open_image

WHITE = [255, 255, 255]


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    found = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", found)


def png(depth: int, color_type: int, rows: list[bytes], width: int, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


# What Pillow writes, decoded by Pillow in another mode or known from the samples

LOSSLESS = ("PNG", "BMP", "TIFF", "TGA", "PPM", "PCX", "SGI", "IM", "DIB", "MSP", "XBM", "QOI", "GIF", "ICO")
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F", "PA", "RGBX")


@pytest.mark.parametrize("kind", [*LOSSLESS, "WEBP", "JPEG2000", "DDS", "ICNS", "SPIDER", "BLP"])
@pytest.mark.parametrize("mode", MODES)
def test_every_format_that_pillow_writes_in_every_mode(kind: str, mode: str) -> None:
    rgb = scene(64, 64)
    if (kind == "ICNS" and mode == "P") or (kind in ("GIF", "WEBP") and mode in ("I;16", "I", "F")):
        pytest.skip("Pillow's writer clips the samples, or fails")
    if mode in ("I;16", "I", "F"):
        gray = gray_of(rgb)
        deep = {"I;16": gray.astype(np.uint16) * 257, "I": gray.astype(np.int32) * 257}
        image = Image.fromarray(deep[mode] if mode in deep else gray.astype(np.float32) / 255)
        expected = np.dstack([gray] * 3)
    elif mode in ("LAB", "HSV", "PA", "RGBX"):
        source = Image.fromarray(rgb)
        image = source.convert("RGBX").convert("RGBA").convert("PA") if mode == "PA" else None
        if mode == "LAB":
            image = Image.new("LAB", (64, 64), (255, 128, 128))
        image = source.convert(mode) if image is None else image
        expected = np.asarray(image.convert("RGB"))
    else:
        image = Image.fromarray(rgb).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    if kind == "SPIDER" and mode not in ("I;16", "I", "F"):  # grayscale alone
        if mode == "LAB":
            pytest.skip("Pillow does not convert it")
        expected = np.dstack([np.asarray(image.convert("F")).astype(np.uint8)] * 3)
    try:
        data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    except (OSError, ValueError, KeyError, struct.error):
        pytest.skip(f"Pillow writes no {kind} in mode {mode}")
    found = open_image(data)
    if kind == "ICNS" or found.shape != expected.shape:
        pytest.skip("another size is written")
    most = {"SPIDER": 1, "JPEG2000": 2, "ICO": 2, "GIF": 255, "BLP": 255}.get(kind, 1)
    if mode in ("LAB", "YCbCr", "CMYK", "HSV"):
        most = max(most, 3)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= most
    assert difference.mean() < 6  # GIF and BLP write palettes of their own choice


# PNG


def test_chunks_that_say_nothing_of_the_pixels_do_no_harm() -> None:
    rgb = scene()
    plain = encoded(Image.fromarray(rgb), "PNG")
    for text in ("zip", "itxt", "plain", "late"):
        info = PngImagePlugin.PngInfo()
        if text == "zip":
            info.add_text("workflow", "x" * 2**21, zip=True)
        elif text == "itxt":
            info.add_itxt("workflow", "x" * 2**21, zip=True)
        data = encoded(Image.fromarray(rgb), "PNG", pnginfo=info)
        if text == "plain":
            data = plain[:33] + chunk(b"tEXt", b"w\0" + b"y" * 900_000) * 78 + plain[33:]
        if text == "late":
            data = plain[:-12] + chunk(b"zTXt", b"w\0\0" + zlib.compress(b"x" * 2**21)) + plain[-12:]
        np.testing.assert_array_equal(open_image(data), rgb)
    profile = encoded(Image.fromarray(rgb), "PNG", icc_profile=bytes(2**21))
    np.testing.assert_array_equal(open_image(profile), rgb)


@pytest.mark.parametrize("kind", [b"pHYs", b"tIME", b"iCCP", b"tEXt", b"gAMA", b"eXIf", b"prVt", b"acTL"])
def test_a_wrong_checksum_of_an_ancillary_chunk_is_passed_over(kind: bytes) -> None:
    plain = encoded(Image.fromarray(scene()), "PNG")
    data = plain[:33] + chunk(kind, b"\0\0\x0b\x13\0\0\x0b\x13\1", checksum=0) + plain[33:]
    np.testing.assert_array_equal(open_image(data), scene())


@pytest.mark.parametrize("name", ["IHDR", "PLTE"])
def test_a_wrong_checksum_of_a_critical_chunk_is_not(name: str) -> None:
    data = bytearray(encoded(Image.fromarray(scene()).convert("P"), "PNG"))
    at = data.index(name.encode())
    length = int.from_bytes(data[at - 4 : at], "big")
    data[at + 4 + length] ^= 0xFF
    with pytest.raises(ImageError):
        open_image(bytes(data))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_gray_of_any_depth_is_white(depth: int) -> None:
    most = (1 << depth) - 1
    seen, hole = 0, min(most, 5) if depth > 2 else 1
    count = max(1, 8 // depth)
    for value, expected in ((hole, 255), (seen, 0)):
        sample = (
            value.to_bytes(2, "big")
            if depth == 16
            else bytes([sum(value << i * depth for i in range(count))])
        )
        data = png(depth, 0, [sample] * 8, count, chunk(b"tRNS", struct.pack(">H", hole)))
        assert open_image(data)[0, 0].tolist() == [expected] * 3


def test_a_transparent_colour_of_16_bits_is_compared_whole() -> None:
    hole, near = struct.pack(">HHH", 0, 40000, 0), struct.pack(">HHH", 0, 40001, 0)
    found = open_image(png(16, 2, [hole + near] * 4, 2, chunk(b"tRNS", hole)))
    assert found[0, 0].tolist() == WHITE and found[0, 1].tolist() == [0, 156, 0]


# TGA and BMP


def tga(alpha: int, bits: int, picture: NDArray[np.uint8]) -> bytes:
    height, width, _ = picture.shape
    bgra = np.dstack([picture[..., ::-1], np.full((height, width), alpha, np.uint8)])
    return (
        struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 32, 0x20 | bits) + bgra.tobytes()
    )


@pytest.mark.parametrize(
    ("alpha", "bits", "is_seen"), [(0, 0, True), (0, 8, True), (255, 8, True), (9, 0, True)]
)
def test_a_fourth_channel_that_is_no_alpha(alpha: int, bits: int, is_seen: bool) -> None:
    np.testing.assert_array_equal(open_image(tga(alpha, bits, scene())), scene())


def test_alpha_that_is_one_holds() -> None:
    data = bytearray(tga(255, 8, scene()))
    data[18 + 3] = 0  # the first pixel alone is transparent
    found = open_image(bytes(data))
    assert found[0, 0].tolist() == WHITE
    np.testing.assert_array_equal(found[0, 1:], scene()[0, 1:])


def test_a_bmp_whose_alpha_is_zero_throughout() -> None:
    picture = scene()
    height, width, _ = picture.shape
    bgra = np.dstack([picture[::-1, :, ::-1], np.zeros((height, width), np.uint8)]).tobytes()
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiIIIIII", 124, width, height, 1, 32, 3, len(bgra), 0, 0, 0, 0, *masks)
    header += b"BGRs" + bytes(124 - len(header) - 4)
    file = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(bgra), 0, 0, 14 + len(header)) + header + bgra
    np.testing.assert_array_equal(open_image(file), picture)


# TIFF


DEPTHS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.generic]]] = {
    "uint8": lambda a: a,
    "uint16": lambda a: a.astype(np.uint16) * 257,
    "uint32": lambda a: a.astype(np.uint32) * 16843009,
    "float32": lambda a: (a / np.float32(255)).astype(np.float32),
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["gray", "white is zero", "RGB", "planes"])
def test_tiff_as_the_file_says_or_an_error_that_names_it(depth: str, order: str, kind: str) -> None:
    rgb = scene()
    gray = gray_of(rgb)
    source, expected = (gray, np.dstack([gray] * 3)) if kind in ("gray", "white is zero") else (rgb, rgb)
    if (kind == "white is zero" and depth != "float32") or kind == "white is zero":
        source = 255 - source
    deep = DEPTHS[depth](source)
    planes = [deep[..., i] for i in range(3)] if kind == "planes" else [deep]
    data = tiff(planes, {"gray": 1, "white is zero": 0}.get(kind, 2), 3 if depth == "float32" else 1, order)
    try:
        found = open_image(data)
    except ImageError as error:
        assert "TIFF picture of a kind that cannot be decoded" in error.message
        assert depth in ("uint32", "float32")
        return
    np.testing.assert_allclose(found, expected, atol=1)


def test_kinds_that_cannot_be_decoded_are_named() -> None:
    double = tiff([np.full((16, 16), 0.5)], 1, 3)
    with pytest.raises(ImageError, match="a TIFF picture of a kind that cannot be decoded"):
        open_image(double)
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 16, 32, 3) + bytes(14)
    with pytest.raises(ImageError, match="a Photoshop picture of a kind that cannot be decoded"):
        open_image(psd)


def test_a_photoshop_file_of_16_bits() -> None:
    planes = (scene(16, 32).transpose(2, 0, 1).astype(">u2") * 257).astype(">u2")
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 32, 16, 3) + bytes(12) + bytes(2) + planes.tobytes()
    np.testing.assert_allclose(open_image(psd), scene(16, 32), atol=1)


# JPEG


def test_a_jpeg_that_lacks_its_end_marker_alone() -> None:
    for options in ({}, {"subsampling": 0}, {"restart_marker_blocks": 2}, {"progressive": True}):
        data = encoded(Image.fromarray(scene(130, 170)), "JPEG", quality=92, **options)
        np.testing.assert_array_equal(open_image(data[:-2]), open_image(data))
        np.testing.assert_array_equal(open_image(data[:-2] + bytes(3)), open_image(data))
    gray = encoded(Image.fromarray(gray_of(scene())), "JPEG")
    np.testing.assert_array_equal(open_image(gray[:-2]), open_image(gray))


@pytest.mark.parametrize("missing", [12, 40, 200, 800])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_pixels_is_refused(missing: int, progressive: bool) -> None:
    noisy = np.random.default_rng(3).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noisy), "JPEG", quality=90, progressive=progressive)
    with pytest.raises(ImageError, match="damaged or cut short"):
        open_image(data[:-missing])


# What other programs are for


@pytest.mark.parametrize(
    ("head", "kind", "hint"),
    [
        (b"\xff\x0a\x10\x10\x09\x08\x06\x01\x00", "JPEG XL|Generic", None),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript drawing", "PNG"),
        (b"\x00\x00\x01\xba\x44\x00\x04", "an MPEG video", "video"),
        (b"v/1\x01\x02\0\0\0channels", "an OpenEXR picture", "PNG"),
    ],
)
def test_what_a_file_is(head: bytes, kind: str, hint: str | None) -> None:
    with pytest.raises(ImageError, match=kind) as caught:
        open_image(head + bytes(100))
    assert hint is None or hint in (caught.value.hint or "")


def test_jpeg_xl_is_read_where_its_extra_is_installed() -> None:
    pytest.importorskip("pillow_jxl")
    picture = Image.fromarray(scene())
    open_image(encoded(picture, "PNG"))  # looks for plugins
    np.testing.assert_array_equal(open_image(encoded(picture, "JXL", lossless=True)), scene())


def test_no_warning_of_pillow_reaches_the_terminal(recwarn: pytest.WarningsRecorder) -> None:
    data = encoded(Image.fromarray(scene()), "TIFF")
    open_image(data + b"junk")
    assert not recwarn.list


# Memory


def test_deep_pictures_are_converted_in_bands() -> None:
    side = 3000
    picture = Image.fromarray(np.zeros((side, side), np.uint16))
    tracemalloc.start()
    assert open_image(picture).shape == (side, side, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * side * side * 3  # numpy's part; the whole as floats would be six times the result's
