"""Batches of units that go through the decoder together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.slot import Slot
from qvl.runtime.engine.units import Unit, VisionUnit
from qvl.runtime.llama.batch import Batch, Outputs

Vectors: TypeAlias = Mapping[str, NDArray[np.float32]]
"""Embeddings by the key of their vision unit: float32 [n_tokens, n_embd]."""
Parts: TypeAlias = list[tuple[Slot, int]]
"""Slots, each with the number of cells of its queue that a batch has."""


def vision_batch(slots: Sequence[Slot], vectors: Vectors, limit: int) -> tuple[Batch, Parts] | None:
    """Vision spans at the heads of the slots' queues, end to end, at most `limit` cells of them.

    A slot gives one span at most; a span that does not fit is split over several batches.
    """
    parts: Parts = []
    rows, positions = [], []
    for slot in slots:
        unit = slot.queue[0]
        if not isinstance(unit, VisionUnit) or unit.key not in vectors or limit == 0:
            continue
        part = slice(slot.rows, min(slot.rows + limit, unit.span.n_tokens))
        rows.append(vectors[unit.key][part])
        positions.append(unit.span.positions(slot.position)[..., part])
        parts.append((slot, len(rows[-1])))
        limit -= len(rows[-1])
    if not parts:
        return None
    last = [_is_last(slot, slot.rows + n) for slot, n in parts]
    batch = Batch(
        None,
        np.concatenate(rows) if len(rows) > 1 else rows[0],
        np.concatenate(positions, axis=-1),
        _sequences(parts),
        _outputs(parts, last),
    )
    return batch, parts


def token_batch(slots: Sequence[Slot], limit: int) -> tuple[Batch, Parts] | None:
    """Text at the heads of the slots' queues, up to their next vision span, at most `limit` tokens."""
    parts: Parts = []
    tokens: list[list[int]] = []
    for slot in slots:
        text = _text(slot.queue, limit)
        if text:
            tokens.append(text)
            parts.append((slot, len(text)))
            limit -= len(text)
    if not parts:
        return None
    positions = [np.arange(slot.position, slot.position + n, dtype=np.int32) for slot, n in parts]
    batch = Batch(
        np.fromiter(chain.from_iterable(tokens), np.int32),
        None,
        np.concatenate(positions),
        _sequences(parts),
        _outputs(parts, [n == len(slot.queue) for slot, n in parts]),
    )
    return batch, parts


def _text(queue: Sequence[Unit], limit: int) -> list[int]:
    text: list[int] = []
    for unit in queue[:limit]:
        if not isinstance(unit, int):
            break
        text.append(unit)
    return text


def _is_last(slot: Slot, rows: int) -> bool:
    unit = slot.queue[0]
    return len(slot.queue) == 1 and isinstance(unit, VisionUnit) and rows == unit.span.n_tokens


def _sequences(parts: Parts) -> NDArray[np.int32]:
    return np.repeat([slot.sequence for slot, _ in parts], [n for _, n in parts]).astype(np.int32)


def _outputs(parts: Parts, last: Sequence[bool]) -> NDArray[np.bool_]:
    """The row after each part that ends a queue, where a token is sampled."""
    outputs = np.zeros(sum(n for _, n in parts), np.bool_)
    ends = np.cumsum([n for _, n in parts]) - 1
    outputs[ends] = [end and slot.sample is not None for (slot, _), end in zip(parts, last, strict=True)]
    return outputs


def batches(
    units: Sequence[Unit], vectors: Vectors, *, n_batch: int, outputs: Outputs = "none"
) -> Iterator[Batch]:
    """The units as batches of at most n_batch cells for sequence 0 of an empty cache.

    Args:
        outputs: rows of logits wanted: "last" is that of the last unit alone.
    """
    slot = Slot(0, queue=list(units))
    while slot.queue:
        found = vision_batch([slot], vectors, n_batch) or token_batch([slot], n_batch)
        assert found is not None, "a picture without embeddings"
        batch, [(_, n)] = found
        ends = advance(slot, n)
        batch.outputs[:] = outputs == "all"
        batch.outputs[-1] |= outputs == "last" and ends
        yield batch


def advance(slot: Slot, n: int) -> bool:
    """Note that n cells of a slot's queue were read; True when it is empty."""
    unit = slot.queue[0]
    if isinstance(unit, int):
        slot.hold(slot.queue[:n])
    elif slot.rows + n == unit.span.n_tokens:
        slot.hold([unit])
    else:
        slot.rows += n
    return not slot.queue
