"""Pictures that other programs write, against what those programs read in them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from support.pictures import encoded, gray_of, scene, tiff

from qvl.runtime.errors import ImageError
from qvl.runtime.vision.image import open_image


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("png", "-depth 16"),
        ("png", "-type Palette"),
        ("png", "-type Grayscale -depth 4"),
        ("png", "-interlace PNG"),
        ("tif", "-depth 16"),
        ("tif", "-depth 16 -interlace plane"),
        ("tif", "-compress LZW"),
        ("tif", "-compress Zip"),
        ("tif", "-compress JPEG -quality 98"),
        ("tif", "-type Bilevel -compress Group4"),
        ("tif", "-depth 8 -interlace plane"),
        ("tif", "-type Grayscale -depth 16 -define quantum:polarity=min-is-white"),
        ("tif", "-type Palette"),
        ("tif", "-type Grayscale -define quantum:polarity=min-is-white"),
        ("tif", "-endian MSB -depth 16"),
        ("tif", "-define quantum:format=floating-point -depth 32 -type Grayscale"),
        ("tif", "-colorspace CMYK"),
        ("jp2", "-quality 100"),
        ("jp2", "-depth 16 -quality 100"),
        ("jpg", "-quality 98 -interlace JPEG"),
        ("jpg", "-colorspace CMYK -quality 98"),
        ("jpg", "-type Grayscale -quality 98"),
        ("bmp", ""),
        ("bmp3", ""),
        ("bmp", "-type Palette"),
        ("pcx", ""),
        ("psd", ""),
        ("psd", "-depth 16"),
        ("ppm", "-depth 16"),
        ("pgm", "-depth 16"),
        ("pfm", ""),
        ("sgi", ""),
        ("sgi", "-depth 16"),
        ("webp", "-define webp:lossless=true"),
        ("gif", ""),
        ("ico", ""),
        ("xpm", ""),
        ("dds", "-define dds:compression=none"),
        ("miff", ""),
        ("sun", ""),
        ("pam", "-depth 16"),
    ],
)
def test_files_of_imagemagick(suffix: str, options: str, tmp_path: Path) -> None:
    """Its own reading of them, as 8-bit PPM, is the second decoder's."""
    magick = tool("convert" if shutil.which("magick") is None else "magick")
    if (
        "ImageMagick"
        not in subprocess.run([magick, "-version"], capture_output=True, text=True, check=False).stdout
    ):
        pytest.skip("needs ImageMagick")
    (tmp_path / "in.ppm").write_bytes(encoded(Image.fromarray(scene()), "PPM"))
    path = tmp_path / f"a.{suffix.removesuffix('3')}"
    made = subprocess.run(
        [magick, tmp_path / "in.ppm", *options.split(), f"{suffix}:{path}"], capture_output=True, check=False
    )
    if made.returncode or not path.exists():
        pytest.skip("this ImageMagick does not write it")
    shown = [magick, f"{path}[0]", "-colorspace", "sRGB", "-depth", "8", f"ppm:{tmp_path / 'shown.ppm'}"]
    subprocess.run(shown, capture_output=True, check=True)
    expected = np.asarray(Image.open(tmp_path / "shown.ppm").convert("RGB")).astype(int)
    try:
        found = open_image(path).astype(int)
    except ImageError as error:
        assert suffix in ("miff", "pam", "sun", "xpm") or "of a kind that cannot be decoded" in error.message
        return
    difference = np.abs(found - expected)
    limit = 40 if "CMYK" in options else 3 if suffix in ("jpg", "jp2") or "JPEG" in options else 1
    assert difference.max() <= limit


@pytest.mark.parametrize(
    "pixels", ["gray", "gray16le", "rgb24", "rgb48le", "rgba64le", "ya16le", "gray12le", "gbrp16le"]
)
@pytest.mark.parametrize("suffix", ["png", "tiff", "jp2", "ppm", "sgi", "tga", "bmp"])
def test_files_of_ffmpeg(suffix: str, pixels: str, tmp_path: Path) -> None:
    ffmpeg = tool("ffmpeg")
    (tmp_path / "in.png").write_bytes(encoded(Image.fromarray(scene()), "PNG"))
    path = tmp_path / f"a.{suffix}"
    command = [ffmpeg, "-v", "error", "-y", "-i", tmp_path / "in.png", "-pix_fmt", pixels, "-frames:v", "1"]
    made = subprocess.run([*command, "-update", "1", path], capture_output=True, check=False)
    if made.returncode or not path.exists():
        pytest.skip("this ffmpeg does not write it")
    shown = subprocess.run(
        [ffmpeg, "-v", "error", "-i", path, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"],
        capture_output=True,
        check=True,
    ).stdout
    expected = np.frombuffer(shown, np.uint8).reshape(*scene().shape).astype(int)
    assert np.abs(open_image(path).astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    "options", ["", "-c lzw -s", "-c zip -t -w 16 -l 16", "-p separate", "-B", "-8", "-c packbits -r 5"]
)
@pytest.mark.parametrize("depth", [8, 16])
def test_files_of_libtiffs_tools(options: str, depth: int, tmp_path: Path) -> None:
    tiffcp = tool("tiffcp")
    deep = scene() if depth == 8 else scene().astype(np.uint16) * 257
    (tmp_path / "in.tif").write_bytes(tiff([deep], 2))
    command = [tiffcp, *options.split(), tmp_path / "in.tif", tmp_path / "a.tif"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this tiffcp does not write it")
    np.testing.assert_allclose(open_image(tmp_path / "a.tif"), scene(), atol=1)


@pytest.mark.parametrize("suffix", ["jp2", "j2k"])
@pytest.mark.parametrize("most", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_files_of_openjpegs_tools(suffix: str, most: int, kind: str, tmp_path: Path) -> None:
    compress = tool("opj_compress")
    source = scene() if kind == "P6" else gray_of(scene())
    deep = np.rint(source.astype(float) * most / 255).astype(">u2" if most > 255 else np.uint8)
    header = f"{kind}\n{source.shape[1]} {source.shape[0]}\n{most}\n".encode()
    name = tmp_path / ("in.ppm" if kind == "P6" else "in.pgm")
    name.write_bytes(header + deep.tobytes())
    path = tmp_path / f"a.{suffix}"
    subprocess.run([compress, "-i", name, "-o", path], capture_output=True, check=True)
    expected = source if kind == "P6" else np.dstack([source] * 3)
    np.testing.assert_allclose(open_image(path), expected, atol=1)


@pytest.mark.parametrize("depth", [8, 16])
def test_pngs_and_tiffs_of_opencv(depth: int, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    deep = scene()[..., ::-1] if depth == 8 else scene()[..., ::-1].astype(np.uint16) * 257
    for suffix in ("png", "tiff", "jp2", "ppm", "webp" if depth == 8 else "png"):
        assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), deep, [cv2.IMWRITE_WEBP_QUALITY, 101])
        np.testing.assert_allclose(open_image(tmp_path / f"a.{suffix}"), scene(), atol=1)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_of_10_bits(tmp_path: Path) -> None:
    avifenc = tool("avifenc")
    (tmp_path / "in.png").write_bytes(encoded(Image.fromarray(scene()), "PNG"))
    command = [
        avifenc,
        "-d",
        "10",
        "--min",
        "0",
        "--max",
        "0",
        "-y",
        "444",
        tmp_path / "in.png",
        tmp_path / "a.avif",
    ]
    subprocess.run(command, capture_output=True, check=True)
    np.testing.assert_allclose(open_image(tmp_path / "a.avif"), scene(), atol=3)
