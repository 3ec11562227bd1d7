"""Sessions without an image encoder: backend that count, and a reference that has seen nothing."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from qvl.runtime.engine.session import Session
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.units import Unit, VisionUnit
from qvl.runtime.errors import ImageError
from qvl.runtime.families.qwen2_vl.prompt import rules
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message, VisionChunk
from qvl.runtime.prompt.rules import one_span
from qvl.runtime.vision.encoder import VisionEmbedding
from qvl.runtime.vision.preprocess import Patches

RULES = rules({}, {})
GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}


class FakeBackend:
    """Embeddings made of the picture's mean colour and size: no encoder, and every call is counted."""

    merge_size = 2
    token_pixels = 28 * 28
    layout = staticmethod(one_span)

    def __init__(self, n_embd: int) -> None:
        self.n_embd = n_embd
        self.encoded: list[int] = []
        self.prepared = 0
        self.pause, self.steps = 0.0, 10
        self.finished = 0

    def prepare(self, chunk: VisionChunk, progress: Any = None) -> Patches:
        self.prepared += 1
        if isinstance(chunk.source, str):
            raise ImageError(f"{chunk.source}: cannot be read")
        frames = np.asarray(chunk.source)
        height, width = frames.shape[-3:-1]
        t = 1 if chunk.kind == "image" else len(frames) // 2
        values = np.full((1, 1), frames.mean(), np.float32)
        return Patches(values, (t, height // 14, width // 14))

    def encode_steps(self, inputs: Sequence[Patches]) -> Generator[float, None, list[VisionEmbedding]]:
        self.encoded.append(len(inputs))
        out = []
        for patches in inputs:
            for step in range(self.steps):
                time.sleep(self.pause)
                yield step / self.steps
            t, h, w = patches.grid_thw
            rng = np.random.default_rng(int(patches.pixel_values[0, 0] * 1000))
            rows = rng.standard_normal((t * h * w // 4, self.n_embd), dtype=np.float32)
            out.append(VisionEmbedding(rows, patches.grid_thw))
        self.finished += 1
        return out


def new_session(model: LlamaModel, backend: FakeBackend, n_ctx: int = 1024, **options: Any) -> Session:
    context = Context(model, n_ctx=n_ctx, n_batch=64, kv_type="f32", threads=1)
    return Session(context, EmbeddingStore(backend), ChatTemplate(model.vocab, None, RULES), **options)


def fresh(model: LlamaModel, messages: Sequence[Message], **options: Any) -> tuple[int, ...]:
    """The reply's tokens from a session that has seen nothing."""
    session = new_session(model, FakeBackend(model.hparams.n_embd))
    try:
        return session.generate(messages, **GREEDY, **options).result().tokens
    finally:
        session.close()


def held(session: Session) -> list[Unit]:
    """The units that the session's only slot holds."""
    [slot] = session.engine._slots.all
    return slot.units


def unit(store: EmbeddingStore, chunk: VisionChunk) -> VisionUnit:
    """The one unit that a picture is."""
    [placed] = store.place(chunk)
    assert isinstance(placed, VisionUnit)
    return placed
