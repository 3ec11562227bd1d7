"""Units to batches: what a prompt looks like to the decoder, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.units import Unit, VisionUnit, n_cells, n_positions
from qvl.runtime.llama.batch import Batch, Outputs
from qvl.runtime.prompt.positions import mrope_positions


class Embedded(Protocol):
    """What has the embeddings of vision units ready (`EmbeddingStore`)."""

    def embeddings(self, unit: VisionUnit) -> NDArray[np.float32]:
        """float32 [n_tokens, n_embd]."""


def batches(
    units: Sequence[Unit],
    store: Embedded,
    *,
    position: int,
    n_batch: int,
    outputs: Outputs = "none",
    sequence: int = 0,
) -> Iterator[tuple[Batch, list[Unit]]]:
    """The units as batches of at most n_batch cells, tokens and embeddings apart, with M-RoPE positions.

    Args:
        store: has the embeddings of the vision units ready.
        position: of the first unit.
        outputs: rows of logits wanted: "last" is that of the last unit alone.

    Yields:
        A batch, and the units that the cache holds whole once it is decoded: none while a vision span is
        still in parts.
    """
    left = n_cells(units)
    for run in _runs(units, n_batch):
        left -= n_cells(run)
        wanted: Outputs = outputs if outputs != "last" or left == 0 else "none"
        if isinstance(run[0], VisionUnit):
            yield from _vision_batches(run[0], store, position, n_batch, wanted, sequence)
        else:
            tokens = [unit for unit in run if isinstance(unit, int)]
            yield Batch.of_tokens(tokens, position, sequence, wanted), run
        position += n_positions(run)


def _vision_batches(
    unit: VisionUnit, store: Embedded, position: int, n_batch: int, outputs: Outputs, sequence: int
) -> Iterator[tuple[Batch, list[Unit]]]:
    embeddings = store.embeddings(unit)
    positions, _ = mrope_positions([unit.span], position)
    for i in range(0, len(embeddings), n_batch):
        part = slice(i, i + n_batch)
        end = i + n_batch >= len(embeddings)
        rows: Outputs = outputs if end or outputs == "all" else "none"
        yield Batch.of_embeddings(embeddings[part], positions[:, part], sequence, rows), [unit] if end else []


def _runs(units: Sequence[Unit], n_batch: int) -> Iterator[list[Unit]]:
    """Text in lists of at most n_batch tokens, vision units one by one, in order."""
    text: list[Unit] = []
    for unit in units:
        if text and (isinstance(unit, VisionUnit) or len(text) == n_batch):
            yield text
            text = []
        if isinstance(unit, VisionUnit):
            yield [unit]
        else:
            text.append(unit)
    if text:
        yield text
