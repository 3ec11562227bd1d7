"""Preprocesses RGB into the input of the image encoder: `pixel_values` and `grid_thw`.

The steps are those of transformers' `Qwen2VLImageProcessorPil`, and so are the numbers: `smart_resize`,
Pillow's own bicubic with antialias, rescale by 1/255 and normalize, cut into patches. The picture stays in
bytes until it lies in patch order; one pass then makes the floats and writes each where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl.runtime.errors import GGUFError, ImageError, InputError, check_whole
from qvl.runtime.vision.dynamic_resolution import MAX_PIXELS, MIN_PIXELS, smart_resize
from qvl.runtime.vision.grid import MERGE_SIZE, PATCH_SIZE, Grid, merged, n_patches
from qvl.runtime.vision.header import value
from qvl.runtime.vision.size import PictureInfo
from qvl.runtime.vision.video_options import VideoOptions

Picture: TypeAlias = Image.Image | NDArray[np.uint8]
"""A decoded picture: a PIL image of mode RGB, or uint8 [h, w, 3]."""

# preprocessor_config.json of Qwen/Qwen2-VL-2B and its siblings
_MOST_TOKENS = 1 << 18  # max_position_embeddings of Qwen3-VL
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_KEYS: Final = {
    "patch_size": "clip.vision.patch_size",
    "merge_size": "clip.vision.spatial_merge_size",
    "temporal_patch_size": "qvl.vision.temporal_patch_size",
    "min_pixels": "clip.vision.image_min_pixels",
    "max_pixels": "clip.vision.image_max_pixels",
    "mean": "clip.vision.image_mean",
    "std": "clip.vision.image_std",
}
_SAMPLING: Final = VideoOptions()
_SIDE: Final = "clip.vision.image_size"  # nominal, where pictures keep their aspect ratio


@dataclass(frozen=True)
class Patches:
    """Input of the image encoder.

    Attributes:
        pixel_values: float32 [t*h*w, 3 * temporal_patch_size * patch_size²], the patches in merge order
            (each 2x2 group contiguous), within a patch channel, time, row, column. The frames of a
            picture's temporal patch are equal.
        grid_thw: (t, h, w), the grid in patches, before merging.
        seconds, fps: of a video: the time of each frame, and how many were taken of each second.
        picture: sizes and name of the picture; None for videos, and where they are not known.
    """

    pixel_values: NDArray[np.float32]
    grid_thw: Grid
    seconds: tuple[float, ...] = ()
    fps: float = 2.0
    picture: PictureInfo | None = None


@dataclass(frozen=True)
class Preprocessor:
    """Cuts pictures and frames into normalized patches.

    Attributes:
        patch_size: side of a patch, in pixels.
        merge_size: patches a token spans in each direction.
        temporal_patch_size: frames a patch spans.
        min_pixels, max_pixels: bounds of a picture's area after resizing, in pixels.
        mean, std: of each channel, for samples in [0, 1].
        side: every picture is stretched to a square of this side, in pixels; 0 keeps the aspect ratio.
        sampling: how videos are sampled.
    """

    patch_size: int = PATCH_SIZE
    merge_size: int = MERGE_SIZE
    temporal_patch_size: int = 2
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    side: int = 0
    sampling: VideoOptions = _SAMPLING

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], published: Preprocessor | None = None, *, path: Path | None = None
    ) -> Preprocessor:
        """Read the parameters from the metadata of an mmproj GGUF.

        Args:
            published: the values of keys that are absent. llama.cpp's converter writes neither the bounds
                nor the temporal patch size for Qwen2-VL.
            path: the file, for messages.

        Raises:
            GGUFError: a value is of the wrong type or out of range.
        """
        own = published or cls()
        fields: dict[str, Any] = {}
        for field, key in _KEYS.items():
            if key in metadata:
                found = value(metadata, key, path=path)
                fields[field] = tuple(map(float, found)) if isinstance(found, list) else found
        if own.side and _SIDE in metadata:
            fields["side"] = value(metadata, _SIDE, path=path)
        preprocessor = replace(own, **fields)
        if preprocessor.min_pixels > preprocessor.max_pixels:
            raise GGUFError(
                f"{'' if path is None else f'{path}: '}clip.vision.image_min_pixels is "
                f"{preprocessor.min_pixels}, over image_max_pixels, {preprocessor.max_pixels}"
            )
        return preprocessor

    def with_pixels(self, min_pixels: int | None = None, max_pixels: int | None = None) -> Preprocessor:
        """The same with other bounds; None keeps a bound, moved only where it would cross the other.

        Raises:
            InputError: a bound under one token's area or over a context's, or the lower over the upper.
        """
        token = self.factor**2
        for name, given in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if given is not None and check_whole(name, given, most=1 << 40) < token:
                raise InputError(f"{name} is {given}, expected at least {token}, the area of one token")
        if min_pixels is not None and min_pixels > _MOST_TOKENS * token:
            raise InputError(
                f"min_pixels is {min_pixels}: every picture would have {min_pixels // token} tokens or more, "
                f"over {_MOST_TOKENS}, the longest context of any model"
            )
        if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
            raise InputError(f"min_pixels is {min_pixels}, over max_pixels, {max_pixels}")
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if min_pixels is None:
            low = min(low, high)
        return replace(self, min_pixels=low, max_pixels=max(low, high))

    @property
    def factor(self) -> int:
        """Side of the square that becomes one token, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def token_pixels(self) -> int:
        """Pixels that become one token; 0 where every picture has one size, whatever the bounds."""
        return 0 if self.side else self.factor**2

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in pixels to which a picture of this size is resized; see `smart_resize`."""
        if self.side:
            return self.side, self.side
        return smart_resize(
            height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )

    def grid(self, height: int, width: int) -> Grid:
        """The grid in patches of a picture of this size in pixels, after resizing."""
        h, w = self.size(height, width)
        return 1, h // self.patch_size, w // self.patch_size

    def n_tokens(self, height: int, width: int) -> int:
        """Tokens that a picture of this size, in pixels, takes in the prompt."""
        return n_patches(merged(self.grid(height, width), self.merge_size))

    def resize(self, picture: Picture, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Resize to (height, width) in pixels, by default to `self.size` of it: uint8 [h, w, 3].

        The embeddings depend on these pixels alone, so a cache is keyed by them.
        """
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        height, width = self.size(picture.height, picture.width) if size is None else size
        if picture.size == (width, height):
            return np.asarray(picture)
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))

    def image(self, picture: Picture) -> Patches:
        """Patches of one picture; its temporal patch is the picture repeated.

        Raises:
            ImageError: see `smart_resize`.
        """
        return self.patchify(self.resize(picture)[None])

    def video(self, frames: Iterable[Picture]) -> Patches:
        """Patches of a video's frames, all of one size, resized as one; the last is repeated to fill.

        Frames are resized as they arrive, so an iterator keeps memory to the resized frames.

        Raises:
            ImageError: no frames, frames of different sizes, or see `smart_resize`.
        """
        resized: list[NDArray[np.uint8]] = []
        first: tuple[int, int] | None = None
        for frame in frames:
            shape = frame.shape[:2] if isinstance(frame, np.ndarray) else (frame.height, frame.width)
            if first is not None and shape != first:
                raise ImageError(
                    f"frame {len(resized)} is {shape[1]}x{shape[0]}, the first {first[1]}x{first[0]}"
                )
            first = (shape[0], shape[1])
            resized.append(self.resize(frame))
        if not resized:
            raise ImageError("a video without frames")
        return self.patchify(resized)

    def patchify(self, frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> Patches:
        """Normalize resized frames and cut them into patches.

        Args:
            frames: uint8 [n, h, w, 3], or n of [h, w, 3]; h and w multiples of `factor`. The last frame is
                repeated until n is a multiple of `temporal_patch_size`.
        """
        height, width, _ = frames[0].shape
        p, m, tp = self.patch_size, self.merge_size, self.temporal_patch_size
        t, h, w = -(-len(frames) // tp), height // p, width // p
        out = np.empty((t, h // m, w * m, 3, tp, p * p), np.float32)
        mean = np.array(self.mean, np.float32)[:, None]
        std = np.array(self.std, np.float32)[:, None]
        values = np.empty((w * m, 3, p * p), np.float32)
        for i, frame in enumerate(frames):
            slots = slice(i % tp, tp if i == len(frames) - 1 else i % tp + 1)
            # A band is the m*p rows of pixels in one row of tokens; in merge order [w/m, m, m, 3, p, p].
            # One band at a time stays in the cache between the steps.
            bands = frame.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            for row, band in enumerate(bands):
                # Dividing in single precision rounds as transformers' product in double does, for all
                # 256 samples; so the result is equal to the last bit.
                np.divide(band.reshape(values.shape), np.float32(255), out=values)
                np.subtract(values, mean, out=values)
                np.divide(values, std, out=values)
                for slot in range(tp)[slots]:
                    out[i // tp, row, :, :, slot] = values
        return Patches(out.reshape(t * h * w, 3 * tp * p * p), (t, h, w))
