"""Video files whose frames show their own number, written with PyAV, and turned as phones turn them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

BITS = 12


def coded(index: int, height: int = 112, width: int = 168) -> NDArray[np.uint8]:
    """A frame that shows its own number in black and white bars under a red band, RGB."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        frame[:, bit * 14 : bit * 14 + 14] = 255 * (index >> bit & 1)
    frame[:28] = (220, 10, 10)
    return frame


def decoded(frame: NDArray[np.uint8]) -> int:
    """The number that a frame of `coded` shows."""
    return sum(int(frame[70, bit * 14 + 7].mean() > 128) << bit for bit in range(BITS))


def write_clip(
    path: Path,
    frames: int | Iterable[NDArray[np.uint8]],
    codec: str = "mpeg4",
    fps: float = 30.0,
    *,
    pixels: str = "yuv420p",
    container: str | None = None,
    times: Sequence[float] | None = None,
    options: Mapping[str, str] | None = None,
    writing: Mapping[str, str] | None = None,
) -> Path:
    """Write frames (uint8 RGB, or as many of `coded`) as a video.

    Args:
        times: in seconds, of each frame, for a variable rate.
        options: of the encoder; writing: of the container.
    """
    shown = map(coded, range(frames)) if isinstance(frames, int) else frames
    with av.open(str(path), "w", format=container, container_options=dict(writing or {})) as out:
        stream = None
        for i, pixels_of_frame in enumerate(shown):
            if stream is None:
                stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
                stream.height, stream.width, _ = pixels_of_frame.shape
                stream.pix_fmt = pixels
                stream.thread_count = 1
                stream.options = {"g": "100", **(options or {})}
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_of_frame))
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        assert stream is not None
        out.mux(stream.encode())
    return path


def rotate(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a rotation into an MP4's track header, as phones do (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
