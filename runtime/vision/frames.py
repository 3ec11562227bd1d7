"""Frames by their place: from a video file, an animated picture, a folder of pictures, or memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl.runtime.errors import ImageError, VideoError, shown
from qvl.runtime.files import open_file
from qvl.runtime.vision.clip import Clip
from qvl.runtime.vision.filetype import HINTS, file_kind
from qvl.runtime.vision.image import ImageSource, open_picture
from qvl.runtime.vision.preprocess import Picture

VideoSource: TypeAlias = str | os.PathLike[str] | Sequence[ImageSource] | NDArray[np.uint8]
"""A video: a file, a folder of frames, frames, or uint8 [n, h, w, 3]."""

_ANIMATED = ("a GIF picture", "a PNG picture", "a WebP picture", "an AVIF picture")
_PICTURES = frozenset(
    ("avif", "bmp", "gif", "heic", "heif", "jp2", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp")
)


class Frames(Protocol):
    """Frames that can be read by their place."""

    n_frames: int
    fps: float | None

    def read(self, indices: Sequence[int]) -> Iterator[Picture]: ...
    def close(self) -> None: ...


def video_name(source: VideoSource) -> str:
    """Name a source in an error text: the path, or the number of frames passed."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"a video of {len(source)} frames" if isinstance(source, Sized) else "a video"


def open_frames(source: VideoSource, source_fps: float | None = None) -> Frames:
    """Open a video; see `VideoSource`.

    Args:
        source_fps: frames a second of a folder or of frames; a file has its own.

    Raises:
        VideoError: no such file, a folder without pictures, or a file that is no video.
    """
    if not isinstance(source, str | os.PathLike):
        given: object = source
        if not isinstance(given, Sequence | np.ndarray) or isinstance(given, bytes | bytearray):
            raise VideoError(f"a video is {shown(source)}, expected a path, a list of pictures or an array")
        return Stills(source, source_fps)
    name, path = os.fspath(source), Path(source)
    if os.path.isdir(path):  # noqa: PTH112 - that of Path raises for a name too long
        files = [p for p in path.iterdir() if p.suffix[1:].lower() in _PICTURES and p.name[0] != "."]
        if not files:
            raise VideoError(f"{name}: a folder without pictures", hint="expected frames such as 0001.png")
        files.sort(key=_natural)
        return Stills(files, source_fps)
    try:
        with open_file(path) as file:
            kind = file_kind(file.read(512))
    except FileNotFoundError as error:
        hint = "check the path; quote it when it contains spaces"
        raise VideoError(f"{name}: no such file", hint=hint) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{name}: cannot be read: {reason}") from error
    # A text could be a playlist, which FFmpeg would follow to other files.
    if kind in ("an empty file", "text", "a web page", "a Git LFS pointer, not the file itself"):
        hint = HINTS.get(kind, "its content is no video, whatever its name says: name the video itself")
        raise VideoError(f"{name}: expected a video, found {kind}", hint=hint)
    if kind in _ANIMATED:
        return Animation(path, name, kind)
    if kind.endswith("picture"):
        raise VideoError(f"{name}: expected a video, found {kind}", hint="pass it as a picture (`image`)")
    return Clip(path, name, kind)


def _natural(path: Path) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key by which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts], path.name


class Stills:
    """Pictures as frames, opened one at a time."""

    def __init__(self, sources: Sequence[ImageSource] | NDArray[np.uint8], fps: float | None) -> None:
        self.sources = sources
        self.n_frames = len(sources)
        self.fps = fps

    def read(self, indices: Sequence[int]) -> Iterator[Picture]:
        for index in indices:
            yield open_picture(self.sources[index])

    def close(self) -> None:
        pass


class Animation:
    """An animated picture; a frame's place is among those in the file, the rate their average.

    Raises:
        VideoError: it has a single frame, or is damaged.
    """

    def __init__(self, path: Path, name: str, kind: str) -> None:
        self._name = name
        try:
            self._image = Image.open(path)
            self.n_frames: int = getattr(self._image, "n_frames", 1)
            milliseconds = sum(self._duration(at) for at in range(self.n_frames))
        except Exception as error:  # a plugin that trips over a damaged file raises anything
            raise VideoError(f"{name}: {kind} that is damaged or cut short: {error}") from error
        if self.n_frames < 2:
            self.close()
            hint = "pass it as a picture (`image`)"
            raise VideoError(f"{name}: expected a video, found {kind} that does not move", hint=hint)
        self.fps: float | None = 1000 * self.n_frames / milliseconds if milliseconds > 0 else 10.0

    def _duration(self, at: int) -> float:
        self._image.seek(at)
        shown = float(self._image.info.get("duration", 0))
        return shown if shown > 10 else 100.0  # as browsers show frames that are said to take no time

    def read(self, indices: Sequence[int]) -> Iterator[Picture]:
        for index in indices:
            try:
                self._image.seek(index)
            except Exception as error:
                raise ImageError(f"frame {index} is damaged: {error}") from error
            yield open_picture(self._image).copy()

    def close(self) -> None:
        self._image.close()
