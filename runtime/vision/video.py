"""Frames of a video, as its family was trained to see them: two a second, within a budget.

Which frames, and how large, follows qwen-vl-utils 0.0.14 (`vision_process.smart_nframes`, `fetch_video`) for
Qwen2-VL and Qwen2.5-VL, and transformers' `Qwen3VLVideoProcessor` (`sample_frames`, `smart_resize`) for
Qwen3-VL. Qwen2-VL's budget of pixels is that of the versions published for it (to 0.0.8), a fifth of what
later models may use. Frames are resized as they are read, so memory is that of the resized frames, however
long the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl.runtime.errors import Cancelled, ImageError, VideoError
from qvl.runtime.vision.clip import Clip, CutShort
from qvl.runtime.vision.dynamic_resolution import smart_resize
from qvl.runtime.vision.frames import Frames, VideoSource, open_frames, video_name
from qvl.runtime.vision.image import MAX_ASPECT_RATIO
from qvl.runtime.vision.preprocess import Picture, Preprocessor
from qvl.runtime.vision.video_options import VideoOptions

Watch: TypeAlias = Callable[[float], bool | None]
"""Called with the fraction done; returning False stops."""

FRAME_FACTOR = 2
"""Frames are taken in multiples of this: a patch spans two frames."""


@dataclass(frozen=True)
class VideoFrames:
    """Frames sampled from a video, resized for the model.

    Attributes:
        frames: uint8 [n, h, w, 3], h and w multiples of 28; what `Preprocessor.patchify` takes.
        indices: place of each in the video, counted from 0.
        seconds: time of each; for frames without a rate, as if they came at `VideoOptions.fps`.
        source_size: (height, width) of the video as shown, in pixels.
        fps: how many were taken of each second.
    """

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    source_size: tuple[int, int]
    fps: float = 2.0


def frame_indices(n_frames: int, source_fps: float | None, options: VideoOptions) -> list[int]:
    """Places of the frames to take, rising, spread evenly from the first to the last.

    An even number of them, unless the video has one frame or its rate is None (frames sampled already: all
    of them, up to `max_frames`). Equal to qwen-vl-utils', single precision of torch.linspace included.
    """
    most = min(options.max_frames, n_frames)
    if options.by_volume and source_fps is not None:
        count = min(max(int(n_frames / source_fps * options.fps), options.min_frames), most)
        return np.linspace(0, n_frames - 1, count).round().astype(int).tolist()  # type: ignore[no-any-return]
    if source_fps is None:
        count = most
    else:
        least = math.ceil(options.min_frames / FRAME_FACTOR) * FRAME_FACTOR
        wanted = max(n_frames / source_fps * options.fps, least)
        count = math.floor(min(wanted, most) / FRAME_FACTOR) * FRAME_FACTOR
    count = max(count, 1)
    if source_fps is None and count == n_frames:
        return list(range(n_frames))
    last = np.float32(n_frames - 1)
    step = last / np.float32(max(count - 1, 1))
    place = np.arange(count, dtype=np.float32)
    forward, backward = step * place, last - step * (np.float32(count - 1) - place)
    return np.rint(np.where(place < count // 2, forward, backward)).astype(int).tolist()  # type: ignore[no-any-return]


def frame_size(
    height: int, width: int, n: int, preprocessor: Preprocessor, options: VideoOptions
) -> tuple[int, int]:
    """The (height, width) in pixels to which each of n frames of this size is resized.

    The budget is qwen-vl-utils'; the preprocessor's own bound of a picture holds as well.

    Raises:
        ImageError: an aspect ratio over 200.
    """
    if options.by_volume:
        most = min(options.total_pixels * FRAME_FACTOR, min(options.max_pixels, preprocessor.max_pixels) * n)
        least = options.min_pixels * 4  # the fewest frames that are taken
        return resize_volume(n, height, width, factor=preprocessor.factor, min_pixels=least, max_pixels=most)
    share = options.total_pixels / n * FRAME_FACTOR
    high = max(min(options.max_pixels, share), int(options.min_pixels * 1.05))
    high = min(high, preprocessor.max_pixels)
    # a model made for smaller pictures than that says so by its own bounds
    fits = options.min_pixels <= preprocessor.max_pixels
    low = options.min_pixels if fits else preprocessor.min_pixels
    return smart_resize(height, width, factor=preprocessor.factor, min_pixels=low, max_pixels=high)


def resize_volume(
    n: int, height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The (height, width) of each of n frames that keeps all of them within bounds, in pixels.

    Equal to `smart_resize` of transformers' models/qwen3_vl/video_processing_qwen3_vl.py; one frame counts as
    the two that it becomes.

    Raises:
        ImageError: an aspect ratio over 200.
    """
    n = max(n, FRAME_FACTOR)
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        ratio = max(height, width) / min(height, width)
        raise ImageError(
            f"aspect ratio {ratio:g}, expected at most {MAX_ASPECT_RATIO}", hint="crop the video"
        )
    h, w = round(height / factor) * factor, round(width / factor) * factor
    volume = round(n / FRAME_FACTOR) * FRAME_FACTOR * h * w
    if volume > max_pixels:
        shrink = math.sqrt(n * height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / (n * height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


@dataclass(frozen=True)
class VideoPlan:
    """Frames that will be taken of a video.

    Attributes:
        n_frames: how many are taken.
        size: (height, width) in pixels to which each is resized.
        seconds: that the video lasts; None for frames without a rate.
    """

    n_frames: int
    size: tuple[int, int]
    seconds: float | None

    @classmethod
    def of(
        cls,
        n_frames: int,
        fps: float | None,
        size: tuple[int, int],
        preprocessor: Preprocessor,
        options: VideoOptions,
    ) -> VideoPlan:
        """The plan of a video with so many frames of (height, width), so many of them a second.

        Raises:
            ImageError: an aspect ratio over 200.
        """
        n = len(frame_indices(n_frames, fps, options))
        return cls(n, frame_size(*size, n, preprocessor, options), n_frames / fps if fps else None)


def plan_video(
    source: VideoSource, preprocessor: Preprocessor, options: VideoOptions | None = None
) -> VideoPlan:
    """Plan `load_video` for a video, reading only its first frame.

    Raises:
        VideoError: as `load_video`, as far as the first frame shows it.
    """
    options = options or preprocessor.sampling
    _check_options(options)
    name = video_name(source)
    reader = open_frames(source, options.source_fps)
    try:
        if reader.n_frames < 1:
            raise VideoError(f"{name}: a video without frames")
        shape = _shape(next(iter(reader.read([0]))))
        return VideoPlan.of(reader.n_frames, reader.fps, shape, preprocessor, options)
    except CutShort as error:
        raise VideoError(f"{name}: the frames cannot be read", hint="convert the video again") from error
    except ImageError as error:
        raise VideoError(f"{name}: {error.message}", hint=error.hint) from error
    finally:
        reader.close()


def load_video(
    source: VideoSource,
    preprocessor: Preprocessor,
    options: VideoOptions | None = None,
    progress: Watch | None = None,
) -> VideoFrames:
    """Sample a video's frames and resize them.

    Args:
        source: a file that FFmpeg reads, an animated picture, a folder of pictures (in natural order of
            their names), a sequence of pictures, or uint8 [n, h, w, 3]. Pictures must be of one size; a
            file whose size changes is shown at its first.
        preprocessor: gives the patch geometry and the bound of a frame's area.
        options: see `VideoOptions`.
        progress: called after every frame with the fraction done; returning False stops.

    Raises:
        VideoError: no such file, not a video, damaged, without frames, or with frames of several sizes.
        Cancelled: progress asked to stop.
    """
    options = options or preprocessor.sampling
    _check_options(options)
    name = video_name(source)
    reader = open_frames(source, options.source_fps)
    try:
        for attempt in (1, 2):
            try:
                return _load(reader, name, preprocessor, options, progress)
            except CutShort as error:
                if attempt == 2 or not isinstance(reader, Clip):
                    raise VideoError(
                        f"{name}: the frames cannot be read", hint="convert the video again"
                    ) from error
                reader.recount()
        raise AssertionError("unreachable")
    except ImageError as error:
        raise VideoError(f"{name}: {error.message}", hint=error.hint) from error
    finally:
        reader.close()


def _load(
    reader: Frames, name: str, preprocessor: Preprocessor, options: VideoOptions, progress: Watch | None
) -> VideoFrames:
    if reader.n_frames < 1:
        raise VideoError(f"{name}: a video without frames")
    indices = frame_indices(reader.n_frames, reader.fps, options)
    frames = np.empty(0, np.uint8)
    shown = size = (0, 0)
    for done, frame in enumerate(reader.read(indices)):
        now = _shape(frame)
        if done == 0:
            shown = now
            size = frame_size(*shown, len(indices), preprocessor, options)
            frames = np.empty((len(indices), *size, 3), np.uint8)
        elif now != shown and not isinstance(reader, Clip):
            raise VideoError(
                f"{name}: frame {indices[done]} is {now[1]}x{now[0]}, the first is {shown[1]}x{shown[0]}",
                hint="all frames must have one size",
            )
        frames[done] = preprocessor.resize(frame, size)
        if progress is not None and progress((done + 1) / len(indices)) is False:
            raise Cancelled(f"{name}: stopped while reading frames")
    rate = reader.fps or options.fps
    seconds = tuple(i / rate for i in indices)
    taken = len(indices) / reader.n_frames * reader.fps if reader.fps else options.fps
    return VideoFrames(frames, tuple(indices), seconds, shown, taken)


def _shape(frame: Picture) -> tuple[int, int]:
    return (frame.height, frame.width) if isinstance(frame, Image.Image) else frame.shape[:2]


def _check_options(options: VideoOptions) -> None:
    rates = [options.fps] if options.source_fps is None else [options.fps, options.source_fps]
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise VideoError(f"fps is {rates}, expected a positive number")
    if not 1 <= options.min_frames <= options.max_frames:
        raise VideoError(f"frames from {options.min_frames} to {options.max_frames} are no range")
    if min(options.min_pixels, options.max_pixels, options.total_pixels) < 1:
        raise VideoError("a bound of pixels is under 1")
