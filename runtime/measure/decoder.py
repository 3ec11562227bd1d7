"""A decoder that is asked for the logits of a given reply, and for its own greedy one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.batches import batches
from qvl.runtime.engine.units import Unit, n_cells, n_positions
from qvl.runtime.ggml.scheduler import Observer
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel

ROWS: Final = 64  # logits at a time: 39 MB for Qwen2-VL
Vectors = Mapping[str, NDArray[np.float32]]
"""Embeddings by the key of their vision unit."""


class Decoder:
    """A context on a text model, cleared before every prompt.

    Args:
        n_ctx: cells; prompts and replies must fit.
        observer: is shown the nodes of the graph.
    """

    def __init__(
        self, model: LlamaModel, *, n_ctx: int, threads: int | None = None, observer: Observer | None = None
    ) -> None:
        self.model = model
        self._context = Context(
            model, n_ctx=n_ctx, n_batch=512, n_outputs_max=ROWS, threads=threads, observer=observer
        )

    @property
    def n_ctx(self) -> int:
        return self._context.n_ctx

    def greedy(self, units: Sequence[Unit], vectors: Vectors, max_tokens: int) -> list[int]:
        """The likeliest reply, its end token included where it ends in time."""
        self._read(units, vectors)
        reply: list[int] = []
        position = n_positions(units)
        room = self.n_ctx - n_cells(units)
        while True:
            token = int(self._context.logits()[-1].argmax())
            reply.append(token)
            if token in self.model.vocab.end_tokens or len(reply) >= min(max_tokens, room):
                return reply
            self._context.decode_tokens([token], position, outputs="last")
            position += 1

    def logits(self, units: Sequence[Unit], vectors: Vectors, reply: Sequence[int]) -> NDArray[np.float32]:
        """Logits for each token of a reply, given the prompt and the tokens before it.

        Returns:
            float32 [len(reply), n_vocab].
        """
        self._read(units, vectors)
        rows = [self._context.logits()]
        position, given = n_positions(units), list(reply[:-1])
        for i in range(0, len(given), ROWS):
            part = given[i : i + ROWS]
            self._context.decode_tokens(part, position + i, outputs="all")
            rows.append(self._context.logits())
        return np.concatenate(rows)

    def run(self, units: Sequence[Unit], vectors: Vectors) -> None:
        """Put everything through the whole graph, the last layer and the head included."""
        self._context.clear()
        for batch in batches(units, vectors, n_batch=ROWS, outputs="all"):
            self._context.decode(batch)

    def _read(self, units: Sequence[Unit], vectors: Vectors) -> None:
        self._context.clear()
        for batch in batches(units, vectors, n_batch=512, outputs="last"):
            self._context.decode(batch)

    def close(self) -> None:
        self._context.close()
