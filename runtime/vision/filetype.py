"""Names the kind of a file from its first bytes, for errors about files of another kind."""

from __future__ import annotations

from typing import Final

HEAD: Final = 512
"""Bytes of a file's beginning that tell its kind."""

_KINDS: Final[tuple[tuple[int, bytes, str], ...]] = (  # offset, magic, what the file is
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript drawing"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript drawing"),
    (0, b"GGUF", "a GGUF model file"),
    (0, b"PK\x03\x04", "a zip archive or office document"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"\x00\x00\x01\xba", "an MPEG video"),
    (0, b"\x00\x00\x01\xb3", "an MPEG video"),
    (8, b"AVI ", "an AVI video"),
    (0, b"FLV\x01", "a Flash video"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!DOCTYPE html", "a web page"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (4, b"JXL \r\n\x87\n", "a JPEG XL picture"),
    (4, b"ftypheic", "a HEIC picture"),
    (4, b"ftypheix", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyp", "an MP4 or QuickTime video"),
    (4, b"jP  \r\n\x87\n", "a JPEG 2000 picture"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"II*\x00", "a TIFF picture"),
    (0, b"MM\x00*", "a TIFF picture"),
    (0, b"II+\x00", "a TIFF picture"),
    (0, b"MM\x00+", "a TIFF picture"),
    (0, b"8BPS", "a Photoshop picture"),
    (0, b"8BPB", "a Photoshop picture"),
    (0, b"\x01\xda", "an SGI picture"),
    (0, b"PF\n", "a PFM picture"),
    (0, b"v/1\x01", "an OpenEXR picture"),
    (0, b"#?RADIANCE", "a Radiance HDR picture"),
    (0, b"\x00\x05\x16\x07", "a Mac's AppleDouble file of attributes, not the file itself"),
)
_SAVE: Final = "save it as a PNG with 8 bits a channel"
HINTS: Final = {  # for files that are no pictures, or none that can be decoded here
    "a HEIC picture": "install support for it: pip install 'qvl[heif]'",
    "a HEIF picture": "install support for it: pip install 'qvl[heif]'",
    "a JPEG XL picture": "install support for it: pip install 'qvl[jxl]'",
    "an AVIF picture": "install a Pillow that was built with AVIF (11.3 and later wheels are)",
    "a PDF document": "save the page as a PNG first",
    "a PostScript drawing": "save the drawing as a PNG first",
    "an SVG drawing": "save the drawing as a PNG first",
    "an MP4 or QuickTime video": "pass it as a video (`video`)",
    "a Matroska or WebM video": "pass it as a video (`video`)",
    "an MPEG video": "pass it as a video (`video`)",
    "an AVI video": "pass it as a video (`video`)",
    "a Flash video": "pass it as a video (`video`)",
    "a Git LFS pointer, not the file itself": "run `git lfs pull`",
    "a web page": "what was downloaded is a page, or an error: save the picture itself",
    "an empty file": "it may not have been written or fetched to its end: save or fetch it anew",
    "a TIFF picture": _SAVE,
    "a Photoshop picture": _SAVE,
    "a PFM picture": _SAVE,
    "a JPEG 2000 picture": _SAVE,
    "an OpenEXR picture": _SAVE,
    "a Radiance HDR picture": _SAVE,
}


def file_kind(head: bytes) -> str:
    """Say in words what a file is, from its first bytes (64 do)."""
    if not head:
        return "an empty file"
    kind = next((kind for at, magic, kind in _KINDS if head[at : at + len(magic)] == magic), None)
    if kind is None:
        is_text = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
        kind = "text" if is_text else f"a file that begins with {head[:8]!r}"
    return kind
