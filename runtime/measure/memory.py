"""Peak memory of a run, predicted from headers and planned graphs alone: nothing is computed for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qvl.runtime.errors import InputError
from qvl.runtime.find import ModelFiles
from qvl.runtime.llama.memory import TextMemory, text_memory
from qvl.runtime.resources import resident_bytes
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.grid import n_patches

USUAL_TOKENS: Final = 1280  # what a photograph is usually shrunk to
_FLOAT: Final = 4
_CHANNELS: Final = 3


@dataclass(frozen=True)
class Memory:
    """Bytes that a conversation with one picture takes at its peak, on the CPU.

    Attributes:
        process: Python and the libraries, before a model is loaded.
        vision_weights: the image encoder's file.
        vision_compute: its graph for the picture.
        picture: the pixels and patches of it.
        image_size: width and height, after resizing; None without a picture.
        image_tokens: what it takes of the context.
    """

    process: int
    text: TextMemory
    vision_weights: int = 0
    vision_compute: int = 0
    picture: int = 0
    image_size: tuple[int, int] | None = None
    image_tokens: int = 0

    @property
    def model(self) -> int:
        """Memory that the model adds to the process."""
        return self.text.total + self.vision_weights + self.vision_compute + self.picture

    @property
    def total(self) -> int:
        return self.process + self.model


def predict_memory(
    files: ModelFiles,
    *,
    n_ctx: int,
    image_size: tuple[int, int] | None = None,
    max_pixels: int | None = None,
) -> Memory:
    """Predicted memory of a model.

    Args:
        n_ctx: cells of the context.
        image_size: width and height of a picture; by default a square one, as large as the model takes.
        max_pixels: largest area, if the file's own bound is not smaller; None for `USUAL_TOKENS`.

    Raises:
        GGUFError: a damaged file, or one of an unknown family.
        InputError: a picture of an impossible size.
    """
    text = text_memory(files.text, n_ctx=n_ctx)
    if files.mmproj is None:
        if image_size is not None:
            raise InputError(f"{files.text}: has no mmproj, so that it sees no picture")
        return Memory(resident_bytes(), text)
    with VisionEncoder(files.mmproj, device="cpu") as encoder:
        preprocessor = encoder.preprocessor
        most = max_pixels or USUAL_TOKENS * preprocessor.factor**2
        width, height = image_size or _largest(min(most, preprocessor.max_pixels), preprocessor.factor)
        height, width = preprocessor.size(height, width)
        grid = preprocessor.grid(height, width)
        patches = n_patches(grid)
        compute = encoder.planned_bytes(grid)
        if encoder.precision != "exact":
            compute += 2 * 2 * patches * encoder.config.n_embd  # the kernels' copy of keys and values
        return Memory(
            resident_bytes(),
            text,
            encoder.weight_bytes,
            compute,
            picture=patches * encoder.config.n_patch_in * _FLOAT + height * width * _CHANNELS * _FLOAT,
            image_size=(width, height),
            image_tokens=preprocessor.n_tokens(height, width),
        )


def _largest(max_pixels: int, factor: int) -> tuple[int, int]:
    side = max(factor, int(max_pixels**0.5) // factor * factor)
    return side, side
