"""Frames by their place: from a video file through OpenCV, from a folder, or from memory.

OpenCV is imported when the first video file is opened, not before.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import VideoError
from qvl.runtime.files import open_file
from qvl.runtime.vision.image import HINTS, ImageSource, file_kind, open_picture
from qvl.runtime.vision.preprocess import Picture

VideoSource: TypeAlias = str | os.PathLike[str] | Sequence[ImageSource] | NDArray[np.uint8]
"""What stands for a video: a file, a folder of frames, frames, or uint8 [n, h, w, 3]."""

_STRIDE_TO_SEEK = 64  # frames; below it decoding on is faster than seeking to a key frame and from there
_PICTURES = frozenset(
    ("avif", "bmp", "gif", "heic", "heif", "jp2", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp")
)


class Frames(Protocol):
    """Frames that can be read by their place."""

    n_frames: int
    fps: float | None

    def read(self, indices: Sequence[int]) -> Iterator[Picture]: ...
    def close(self) -> None: ...


class CutShort(Exception):
    """A file ends before the frame count in its header."""


def video_name(source: VideoSource) -> str:
    """Name a source in an error text: the path, or the number of frames passed."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"a video of {len(source)} frames"


def open_frames(source: VideoSource, source_fps: float | None = None) -> Frames:
    """Open a video; see `VideoSource`.

    Args:
        source_fps: frames a second of a folder or of frames; a file has its own.

    Raises:
        VideoError: no such file, a folder without pictures, or a file that is no video.
    """
    if not isinstance(source, str | os.PathLike):
        return Stills(source, source_fps)
    name, path = os.fspath(source), Path(source)
    if path.is_dir():
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
    if kind in ("a PNG picture", "a JPEG picture"):
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


class Clip:
    """A video file through OpenCV's FFmpeg; frames come upright, by the file's rotation."""

    fps: float | None

    def __init__(self, path: Path, name: str, kind: str) -> None:
        self.path = path.resolve()  # absolute, so that no name reads as one of FFmpeg's protocols
        self.name = name
        self.cv2 = _import_cv2()
        self.capture = self._open()
        if not self.capture.isOpened():
            expected = "a video (MP4, MOV, WebM, MKV, AVI, GIF, …)"
            if kind.endswith("video"):
                expected, kind = "a video that can be decoded", f"{kind} that cannot"
            raise VideoError(
                f"{name}: expected {expected}, found {kind}",
                hint="it may be damaged or cut short; convert it with ffmpeg",
            )
        rate = float(self.capture.get(self.cv2.CAP_PROP_FPS))
        self.fps = rate if math.isfinite(rate) and rate > 0 else 30.0
        count = float(self.capture.get(self.cv2.CAP_PROP_FRAME_COUNT))
        self.n_frames = int(count) if math.isfinite(count) else 0
        if self.n_frames < 1:  # streams that were recorded live do not know their length
            self.recount()

    def recount(self) -> None:
        """Count the frames that can be decoded, by decoding them all."""
        self._rewind()
        self.n_frames = 0
        while self.capture.grab():
            self.n_frames += 1
        self._rewind()

    def read(self, indices: Sequence[int]) -> Iterator[Picture]:
        at = 0  # the frame that the next grab gives
        self._rewind()
        for index in indices:
            if index - at >= _STRIDE_TO_SEEK and self.capture.set(self.cv2.CAP_PROP_POS_FRAMES, index):
                at = index
            frame = None
            while at <= index:
                if not self.capture.grab():
                    raise CutShort
                at += 1
            ok, frame = self.capture.retrieve()
            if not ok or frame is None:
                raise CutShort
            yield self.cv2.cvtColor(frame, self.cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        self.capture.release()

    def _open(self) -> Any:
        capture = self.cv2.VideoCapture(str(self.path), self.cv2.CAP_FFMPEG)
        capture.set(self.cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        return capture

    def _rewind(self) -> None:
        self.capture.release()
        self.capture = self._open()


def _import_cv2() -> Any:
    """Import OpenCV, with FFmpeg's own messages off: what matters of them is in our errors."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    try:
        import cv2
    except ImportError as error:
        raise VideoError(
            f"OpenCV cannot be imported: {error}", hint="pip install opencv-python-headless"
        ) from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
