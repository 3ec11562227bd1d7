"""Batches for one call of the decoder, and their C structure."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Outputs: TypeAlias = Literal["none", "last", "all"]


@dataclass(frozen=True)
class Batch:
    """Input of one call of llama_decode.

    Attributes:
        tokens: int32 [n], or None.
        embeddings: float32 [n, n_embd_inp], or None. Exactly one of the two is given.
        positions: int32 [n] for tokens. For embeddings [3, n] (time, height, width) where the architecture
            has four rows of positions, else [n].
        sequences: int32 [n], the sequence each one belongs to.
        outputs: bool [n], whether its logits are wanted.
    """

    tokens: NDArray[np.int32] | None
    embeddings: NDArray[np.float32] | None
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    outputs: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.sequences)

    @classmethod
    def of_tokens(
        cls,
        tokens: NDArray[np.int32] | Sequence[int],
        position: int,
        sequence: int = 0,
        outputs: Outputs = "none",
    ) -> Batch:
        """Text of one sequence, its positions rising by one from `position`."""
        n = len(tokens)
        positions = np.arange(position, position + n, dtype=np.int32)
        return cls(
            np.asarray(tokens, np.int32), None, positions, _fill(n, sequence), _output_rows(n, outputs)
        )

    @classmethod
    def of_embeddings(
        cls,
        embeddings: NDArray[np.float32],
        positions: NDArray[np.int32],
        sequence: int = 0,
        outputs: Outputs = "none",
    ) -> Batch:
        """A vision span of one sequence, or a part of one: float32 [n, n_embd_inp], int32 [3, n] or [n]."""
        n = len(embeddings)
        return cls(None, embeddings, positions, _fill(n, sequence), _output_rows(n, outputs))


class DecodeCall:
    """llama_decode with its arguments, which it keeps alive while the call runs."""

    def __init__(self, c: Any, handle: int, batch: Batch) -> None:
        n = len(batch)
        sequences = np.ascontiguousarray(batch.sequences, np.int32)
        arrays: dict[str, NDArray[Any]] = {
            **_inputs(batch),
            "n_seq_id": np.ones(n, np.int32),
            "seq_id": sequences.ctypes.data + sequences.itemsize * np.arange(n, dtype=np.uintp),
            "logits": batch.outputs.astype(np.int8),
        }
        types = dict(c.llama_batch._fields_)
        pointers = {name: ctypes.cast(a.ctypes.data, types[name]) for name, a in arrays.items()}
        self._keep = (arrays, sequences)
        self._decode, self._handle = c.llama_decode, handle
        self._batch = c.llama_batch(n_tokens=n, **pointers)

    def __call__(self) -> int:
        return int(self._decode(self._handle, self._batch))


def _inputs(batch: Batch) -> dict[str, NDArray[Any]]:
    positions = np.ascontiguousarray(batch.positions, np.int32)
    if batch.embeddings is None:
        return {"token": np.ascontiguousarray(batch.tokens, np.int32), "pos": positions}
    if positions.ndim == 2:  # the sections of M-RoPE are four; the last stays unused
        positions = np.concatenate([positions, np.zeros((1, len(batch)), np.int32)])
    return {"embd": np.ascontiguousarray(batch.embeddings, np.float32), "pos": positions}


def _fill(n: int, sequence: int) -> NDArray[np.int32]:
    return np.full(n, sequence, np.int32)


def _output_rows(n: int, outputs: Outputs) -> NDArray[np.bool_]:
    rows = np.full(n, outputs == "all")
    if outputs == "last" and n:
        rows[-1] = True
    return rows
