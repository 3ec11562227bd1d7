"""The image encoder as an `EmbeddingStore` uses it: pictures and videos to patches, patches to embeddings."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from qvl.runtime.files import file_identity
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.prompt.rules import Layout
from qvl.runtime.vision.encoder import VisionEmbedding, VisionEncoder
from qvl.runtime.vision.image import open_picture
from qvl.runtime.vision.preprocess import Patches
from qvl.runtime.vision.size import PictureInfo
from qvl.runtime.vision.video import Watch, load_video


class EncoderBackend:
    """Adapts the encoder to `EmbeddingStore`."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self.merge_size = encoder.preprocessor.merge_size
        self.token_pixels = encoder.preprocessor.token_pixels
        self.layout: Layout = encoder.family.prompt.rules({}, encoder.metadata).layout

    @cached_property
    def identity(self) -> str:
        return f"{file_identity(self._encoder.path)} {self._encoder.precision} {self._encoder.device.name}"

    def prepare(self, chunk: VisionChunk, progress: Watch | None = None) -> Patches:
        preprocessor, options = self._encoder.preprocessor, dict(chunk.options)
        if chunk.kind == "video":
            sampling = preprocessor.sampling.given(chunk.options)
            video = load_video(chunk.source, preprocessor, sampling, progress)
            return replace(preprocessor.patchify(video.frames), seconds=video.seconds, fps=video.fps)
        if options:
            preprocessor = preprocessor.with_pixels(
                *(int(options[name]) if name in options else None for name in ("min_pixels", "max_pixels"))
            )
        picture = open_picture(chunk.source)
        patches = preprocessor.image(picture)
        _, rows, columns = patches.grid_thw
        seen = (columns * preprocessor.patch_size, rows * preprocessor.patch_size)
        name = Path(chunk.source).name if isinstance(chunk.source, str | os.PathLike) else ""
        return replace(patches, picture=PictureInfo(picture.size, seen, name))

    def encode_steps(self, inputs: Sequence[Patches]) -> Generator[float, None, list[VisionEmbedding]]:
        return self._encoder.encode_steps(inputs)
