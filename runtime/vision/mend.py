"""Picture files that viewers show and Pillow refuses, rewritten so that it takes them.

PNG: chunks that do not bear on the pixels are left out, so that neither their size nor their checksums matter
(libpng discards an ancillary chunk with a wrong checksum), and a transparent sample of 2 or 4 bits is written
in the 8 bits to which Pillow expands the pixels. JPEG: an end marker that is missing is added, if nothing
else is missing.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Final

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_END_OF_IMAGE: Final = b"\xff\xd9"
_JUNK: Final = (b"", b"\xaa" * 600, b"\xf0" * 600)  # no code of Huffman's goes on alike with all of these
_MOST_TABLE: Final = 1 << 20  # bytes of a chunk that is kept besides the pixels


@dataclass(frozen=True)
class PngHeader:
    """Header fields on which the decoding of a PNG depends (PNG specification, 11.2.2 and 11.3.2).

    Attributes:
        depth: bits of a sample; color_type: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA.
        has_transparency: whether a tRNS chunk precedes the pixels.
    """

    depth: int
    color_type: int
    has_transparency: bool


def mended_png(file: IO[bytes]) -> tuple[IO[bytes], PngHeader]:
    """A PNG with the chunks alone that decide its pixels and which way is up, and its header.

    A file that ends early, or is damaged in what matters, stays so: Pillow says what is wrong.
    """
    parts, kept = [_PNG], PngHeader(8, 2, False)
    for kind, data in _chunks(file):
        if kind == b"IHDR" and len(data) == 13:
            kept = PngHeader(data[8], data[9], False)
        elif kind == b"tRNS":
            kept = PngHeader(kept.depth, kept.color_type, True)
            if kept.color_type == 0 and kept.depth in (2, 4) and len(data) == 2:
                most = (1 << kept.depth) - 1
                data = struct.pack(">H", (int.from_bytes(data, "big") & most) * 255 // most)
        if kind in (b"IHDR", b"tRNS"):
            parts.append(_chunk(kind, data))
        elif kind == b"":
            parts.append(data)  # a chunk that is cut short, or pixels with a wrong checksum
        else:
            parts.append(_chunk(kind, data))
    return io.BytesIO(b"".join(parts)), kept


def _chunks(file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(kind, data) of critical chunks, tRNS and eXIf; a damaged critical one raw, as (b"", bytes)."""
    size = file.seek(0, io.SEEK_END)
    file.seek(len(_PNG))
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        is_critical = not kind[0] & 0x20  # the case of the first letter says so (5.4)
        if not is_critical and (kind not in (b"tRNS", b"eXIf") or length > _MOST_TABLE):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        data = file.read(min(length, size - file.tell()))  # Python makes room for what is asked
        checksum = file.read(4)
        is_whole = len(data) == length and int.from_bytes(checksum, "big") == zlib.crc32(kind + data)
        if is_whole:
            yield kind, data
        elif is_critical:
            yield b"", head + data + checksum
        if kind == b"IEND":
            return


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def ended_jpegs(file: IO[bytes]) -> list[IO[bytes]]:
    """A JPEG that lacks its end marker with the marker, and with junk before it; none if it has one.

    If pixels are missing, libjpeg makes them up from what follows, so all decode to the same only where
    nothing but the marker is missing.
    """
    file.seek(0)
    data = file.read().rstrip(b"\0")
    if data.endswith(_END_OF_IMAGE):
        return []
    return [io.BytesIO(data + junk + _END_OF_IMAGE) for junk in _JUNK]
