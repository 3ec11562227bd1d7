"""A text GGUF and its mmproj, opened to be measured: every step by itself, nothing remembered between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.place import placed
from qvl.runtime.engine.store import source_key
from qvl.runtime.engine.units import Unit, VisionUnit, n_cells
from qvl.runtime.errors import InputError
from qvl.runtime.families.matching import rules_of
from qvl.runtime.find import ModelFiles, find_model
from qvl.runtime.ggml.scheduler import Observer
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.measure.decoder import Decoder, Vectors
from qvl.runtime.measure.samples import Example
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.prompt.rules import Vision
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.grid import merged
from qvl.runtime.vision.image import open_image
from qvl.runtime.vision.preprocess import Patches

StepProgress: TypeAlias = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and the current one's name."""


@dataclass(frozen=True)
class Question:
    """A sample as it stands in the KV cache.

    Attributes:
        patches: by the key of their vision unit.
    """

    sample: Example
    units: tuple[Unit, ...]
    patches: dict[str, Patches] = field(default_factory=dict)

    @property
    def n_cells(self) -> int:
        return n_cells(self.units)


class Subject(Protocol):
    """A model to compare: a pair of files, or another program's."""

    @property
    def name(self) -> str:
        """For people."""

    def encode(self, question: Question) -> Vectors:
        """Embeddings of the question's pictures."""

    def greedy(self, units: Sequence[Unit], vectors: Vectors, max_tokens: int) -> list[int]:
        """The likeliest reply, with its end token."""

    def logits(self, units: Sequence[Unit], vectors: Vectors, reply: Sequence[int]) -> NDArray[np.float32]:
        """Logits for each token of the reply, float32 [len(reply), n_vocab]."""


class Pair:
    """A decoder and, where there is one, an image encoder. Use as a context manager, or call `close`.

    Args:
        files: the two files.
        n_ctx: cells for a prompt with its reply.
        observer: is shown the nodes of the decoder's graph.

    Raises:
        GGUFError: a damaged file, or two that do not belong together.
        BackendError: no such device, or too little memory.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        n_ctx: int = 4096,
        device: str = "auto",
        threads: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.files = files
        self.vision: VisionEncoder | None = None
        self.text = LlamaModel(files.text, device=device, optimize="prefill")
        try:
            if files.mmproj is not None:
                self.vision = VisionEncoder(files.mmproj, device=device, threads=threads, precision="exact")
            self.template = ChatTemplate(
                self.text.vocab,
                self.text.metadata.get("tokenizer.chat_template"),
                rules_of(self.text, self.vision),
            )
            self.decoder = Decoder(self.text, n_ctx=n_ctx, threads=threads, observer=observer)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | Path | None, mmproj: str | Path | None = None, **options: object) -> Pair:
        """The pair that a path stands for; see `find_model`."""
        return cls(find_model(path, mmproj), **options)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The names of both files."""
        return " + ".join(p.name for p in (self.files.text, self.files.mmproj) if p is not None)

    def read(self, sample: Example) -> Question:
        """A sample's prompt, and its picture cut into patches.

        Raises:
            ImageError: the picture cannot be read.
            InputError: it does not fit the context.
        """
        patches: dict[str, Patches] = {}

        def place(chunk: VisionChunk) -> list[str | VisionUnit]:
            if self.vision is None:
                raise InputError(f"{self.files.text}: has no mmproj, so that no picture can be shown to it")
            key = source_key(chunk)
            patches[key] = self.vision.preprocessor.image(open_image(chunk.source))
            grid = merged(patches[key].grid_thw, self.vision.preprocessor.merge_size)
            return placed(self.template.rules.layout, Vision("image", grid), key)

        units = self.template.units(sample.messages, place)
        question = Question(sample, tuple(units), patches)
        if question.n_cells >= self.decoder.n_ctx:
            raise InputError(
                f"{sample.name}: takes {question.n_cells} tokens of a context of {self.decoder.n_ctx}",
                hint="use smaller pictures, or a larger context (`n_ctx`)",
            )
        return question

    def encode(self, question: Question) -> Vectors:
        """Embeddings of the question's pictures by key."""
        if self.vision is None or not question.patches:
            return {}
        made = self.vision.encode_patches(list(question.patches.values()))
        return {key: e.embeddings for key, e in zip(question.patches, made, strict=True)}

    def greedy(self, units: Sequence[Unit], vectors: Vectors, max_tokens: int) -> list[int]:
        """See `Decoder.greedy`."""
        return self.decoder.greedy(units, vectors, max_tokens)

    def logits(self, units: Sequence[Unit], vectors: Vectors, reply: Sequence[int]) -> NDArray[np.float32]:
        """See `Decoder.logits`."""
        return self.decoder.logits(units, vectors, reply)

    def close(self) -> None:
        """Free everything."""
        with suppress(AttributeError):
            self.decoder.close()
        if self.vision is not None:
            self.vision.close()
            self.vision = None
        self.text.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
