"""A decoder context: the KV cache, and batches through the model.

The rules of llama.cpp that this module keeps, and a failed one of which would end the process or give
wrong numbers:

- A batch holds tokens or embeddings, never both, and at most `n_batch` of them.
- Tokens have one position each; llama.cpp repeats it over the rotary sections. Where an architecture has
  M-RoPE, embeddings have four rows of positions (time, height, width, zero), row after row
  (src/llama-batch.cpp, `llama_batch_compat::init`); otherwise they too have one each.
- Embedding rows are as wide as the model's input, deepstack features included (`TextHparams.n_embd_inp`).
- A vision span is decoded causally, as it was trained: among equal time positions the KV mask orders by
  row and column (src/llama-kv-cache.cpp, `set_input_kq_mask_impl`), which is the order of the tokens.
- Over one sequence positions never fall. Text must begin beyond what the cache holds; a span's embeddings
  may share its last time position, so a span can come in several batches.
- The cache knows cells by their time position only. A whole span is removed by removing from its first
  position on; part of a span cannot be removed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import (
    BackendError,
    Cancelled,
    ContextFullError,
    InputError,
    Unpicklable,
    check_whole,
    shown,
)
from qvl.runtime.ggml.devices import cpu_device
from qvl.runtime.ggml.library import Type, row_size
from qvl.runtime.ggml.scheduler import Observer, eval_callback
from qvl.runtime.interrupt import CallbackGuard, held_interrupts
from qvl.runtime.llama.batch import Batch, DecodeCall, Outputs
from qvl.runtime.llama.binding import complaints, llama, log_guard
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.products import own_products
from qvl.runtime.llama.worker import run
from qvl.runtime.resources import default_threads, require_address_space

_HEADROOM = 512 << 20  # address space for the compute buffers and the arenas of threads

KV_TYPES: Final = {"f16": Type.F16, "f32": Type.F32, "q8_0": Type.Q8_0}
_MAX_SIZE: Final = 1 << 22
_NO_SLOT, _ABORTED = 1, 2  # llama_decode's positive results


class Context(Unpicklable):
    """A KV cache of `n_ctx` cells over a model, for one or several sequences.

    One thread at a time may use it, except for `abort`, which any may call. Use as a context manager, or
    call `close`, before the model is closed.

    Attributes:
        n_ctx: KV cells, as llama.cpp rounded them.
        n_batch: most tokens a call of `decode` takes.
        n_outputs_max: most logit rows a call of `decode` may ask for.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int = 8192,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_outputs_max: int | None = None,
        threads: int | None = None,
        kv_type: str = "f16",
        observer: Observer | None = None,
    ) -> None:
        """Allocate the cache and the compute buffers.

        Args:
            n_batch: tokens a call takes; a cancel is noticed between two calls, at the latest.
            n_ubatch: tokens that go through the graph at once.
            n_seq_max: sequences; they share the cells (`kv_unified`), and a copied prefix takes none.
            n_outputs_max: n_seq_max unless given. Each row costs n_vocab floats twice, in the compute
                buffer and in the output buffer: 1.2 MB for Qwen2-VL.
            threads: CPU threads; physical cores unless given.
            kv_type: type of the cache's values: f16, f32 or q8_0. Flash attention works in f16 (src/
                llama-graph.cpp, `build_attn_mha`), so f32 does without it, slower.
            observer: is shown nodes of the graph as they are computed.

        Raises:
            InputError: a size out of bounds, or an unknown type.
            BackendError: the device has too little memory, or llama.cpp refused.
        """
        model.check_process()
        self.model = model
        self._c = c = llama()
        sizes = {"n_ctx": n_ctx, "n_batch": n_batch, "n_ubatch": n_ubatch, "n_seq_max": n_seq_max}
        limits = {"n_seq_max": c.llama_max_parallel_sequences()}
        for name, value in sizes.items():
            check_whole(name, value, 1, limits.get(name, _MAX_SIZE))
        if not isinstance(kv_type, str) or kv_type not in KV_TYPES:
            raise InputError(f"KV type {shown(kv_type)}, expected one of {', '.join(KV_TYPES)}")
        self.n_outputs_max = max(n_outputs_max or n_seq_max, n_seq_max)
        self.n_seq_max = n_seq_max
        self.threads = threads or default_threads()
        _check_memory(model, n_ctx, kv_type)
        # strlen(flag) is llama.cpp's abort callback: it runs for every node of the graph, where a Python
        # callback would cost more than the node. "" is 0, go on; "\1" is 1, stop.
        self._flag = ctypes.create_string_buffer(2)
        params = c.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = max(n_batch, self.n_outputs_max)
        params.n_ubatch = n_ubatch
        params.n_seq_max = n_seq_max
        params.n_outputs_max = self.n_outputs_max
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = KV_TYPES[kv_type].value
        if kv_type == "f32":
            params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        params.abort_callback = ctypes.cast(_libc_strlen(), type(params.abort_callback))
        params.abort_callback_data = ctypes.addressof(self._flag)
        self._keep: list[Any] = [params.abort_callback]
        self._guard = CallbackGuard()
        if observer is not None:
            show = eval_callback(observer, self._guard)
            params.cb_eval = ctypes.cast(show, type(params.cb_eval))
            self._keep.append(show)
        require_address_space(model.hparams.kv_bytes(n_ctx) + _HEADROOM, "the context")
        complaints()
        self._handle: int | None = None
        try:
            with (
                held_interrupts(),
                own_products(model.own_products and observer is None),
            ):  # the log's callback runs meanwhile
                self._handle = c.llama_init_from_model(model.handle, params)
            log_guard.check()
        except BaseException:
            self.close()
            raise
        if not self._handle:
            mb = model.hparams.kv_bytes(n_ctx) >> 20
            raise BackendError(
                f"{model.path}: no context of {n_ctx} tokens ({mb} MB): {complaints() or 'no reason given'}",
                hint="use a smaller context (`n_ctx`)",
            )
        model.register(self)
        self.n_ctx: int = c.llama_n_ctx(self._handle)
        self.n_batch: int = c.llama_n_batch(self._handle)
        self._n_rows = 0

    def __repr__(self) -> str:
        return f"Context({self.model.path.name!r}, n_ctx={self.n_ctx}, n_seq_max={self.n_seq_max})"

    @property
    def handle(self) -> int:
        """The `llama_context *`.

        Raises:
            BackendError: the context or its model is closed, or was loaded in another process.
        """
        self.model.check_process()
        if self._handle is None:
            raise BackendError(f"{self.model.path}: the context is closed")
        return self._handle

    def close(self) -> None:
        """Free the cache. Doing it twice is harmless; in a forked child it does nothing."""
        if not self.model.is_ours:
            return
        handle, self._handle = self._handle, None
        if handle is not None:
            self._c.llama_free(handle)

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- decoding

    def decode_tokens(
        self,
        tokens: NDArray[np.int32] | list[int],
        position: int,
        *,
        sequence: int = 0,
        outputs: Outputs = "none",
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Decode text, its positions rising by one from `position`."""
        self.decode(Batch.of_tokens(tokens, position, sequence, outputs), cancelled)

    def decode(self, batch: Batch, cancelled: Callable[[], bool] | None = None) -> None:
        """Run a batch through the model and put it into the cache.

        Args:
            cancelled: asked every 50 ms; when true, the computation stops.

        Raises:
            InputError: shapes, ids or positions that llama.cpp would not survive.
            ContextFullError: the cache has no room; it is as it was.
            Cancelled: stopped by `abort` or `cancelled`. What the cache has of the batch is not defined:
                remove from the batch's first position on.
            BackendError: the computation failed.
            Whatever the observer raises: what the cache has of the batch is not defined either.
        """
        self._check(batch)
        self.model.check_files()
        call = DecodeCall(self._c, self.handle, batch)
        self._flag.raw = b"\0\0"
        self._n_rows = 0
        complaints()
        self._guard.reset()
        result = run(call, len(batch), self.abort, cancelled)
        self._guard.check()
        log_guard.check()
        if result == _ABORTED:
            raise Cancelled("stopped while reading the prompt")
        if result == _NO_SLOT:
            raise ContextFullError(
                f"no room for {len(batch)} tokens in a context of {self.n_ctx}",
                n_tokens=len(batch), n_ctx=self.n_ctx, hint="use a larger context (`n_ctx`)",
            )  # fmt: skip
        if result != 0:
            raise BackendError(f"llama_decode failed with {result}: {complaints() or 'no reason given'}")
        self._n_rows = int(batch.outputs.sum())

    def logits(self) -> NDArray[np.float32]:
        """The logits that the last batch asked for, in its order: a copy, float32 [n_rows, n_vocab]."""
        if self._n_rows == 0:
            raise InputError("the last batch asked for no logits")
        rows = np.ctypeslib.as_array(
            ctypes.cast(self._c.llama_get_logits(self.handle), ctypes.POINTER(ctypes.c_float)),
            (self._n_rows, self.model.hparams.n_vocab),
        )
        return rows.astype(np.float32, copy=True)

    def row(self, index: int = -1) -> NDArray[np.float32]:
        """The logits after one token of the last batch: a copy, float32 [n_vocab].

        Args:
            index: of the token in the batch, which must have asked for them; -1 is the last that did.
        """
        pointer = self._c.llama_get_logits_ith(self.handle, index)
        if not pointer:
            raise InputError(f"token {index} of the last batch asked for no logits")
        return np.ctypeslib.as_array(pointer, (self.model.hparams.n_vocab,)).copy()

    def abort(self) -> None:
        """Stop a running `decode`, from any thread: at the next node on the CPU, after the batch on a GPU."""
        self._flag[0] = b"\1"

    # -- the cache

    @property
    def _memory(self) -> Any:
        return self._c.llama_get_memory(self.handle)

    def remove(self, sequence: int, start: int, end: int = -1) -> None:
        """Forget a sequence's cells at positions [start, end); end -1 means all that follow."""
        self._sequence(sequence)
        self._c.llama_memory_seq_rm(self._memory, sequence, start, end)

    def copy(self, source: int, target: int) -> None:
        """Let `target` begin with what `source` holds. The cells are shared, so it takes no room."""
        self._c.llama_memory_seq_cp(self._memory, self._sequence(source), self._sequence(target), -1, -1)

    def keep(self, sequence: int) -> None:
        """Forget every other sequence."""
        self._c.llama_memory_seq_keep(self._memory, self._sequence(sequence))

    def clear(self) -> None:
        """Forget everything."""
        self._c.llama_memory_clear(self._memory, False)

    def last_position(self, sequence: int = 0) -> int:
        """Largest time position that the cache holds of a sequence; -1 when it holds nothing."""
        return int(self._c.llama_memory_seq_pos_max(self._memory, self._sequence(sequence)))

    def _sequence(self, sequence: int) -> int:
        if not 0 <= sequence < self.n_seq_max:
            raise InputError(f"sequence {sequence}, expected 0 to {self.n_seq_max - 1}")
        return sequence

    def _check(self, batch: Batch) -> None:
        n, h = len(batch), self.model.hparams
        if not 0 < n <= self.n_batch:
            raise InputError(f"a batch of {n} tokens, expected 1 to {self.n_batch}")
        if int(batch.outputs.sum()) > self.n_outputs_max:
            raise InputError(
                f"logits of {int(batch.outputs.sum())} tokens, this context has {self.n_outputs_max}"
            )
        if batch.sequences.min() < 0 or batch.sequences.max() >= self.n_seq_max:
            raise InputError(f"a sequence beyond 0 to {self.n_seq_max - 1}")
        if (batch.tokens is None) == (batch.embeddings is None):
            raise InputError("a batch holds either tokens or embeddings")
        if batch.tokens is not None and (batch.tokens.min() < 0 or batch.tokens.max() >= h.n_vocab):
            raise InputError(f"a token id beyond 0 to {h.n_vocab - 1}")
        if batch.embeddings is not None and batch.embeddings.shape != (n, h.n_embd_inp):
            raise InputError(
                f"embeddings of shape {batch.embeddings.shape}, expected {(n, h.n_embd_inp)}",
                hint="the mmproj belongs to a model of another size",
            )
        rows = 1 if batch.tokens is not None else h.architecture.position_rows
        if batch.positions.shape != ((n,) if rows == 1 else (3, n)):
            raise InputError(f"positions of shape {batch.positions.shape} for {n} tokens")


def _check_memory(model: LlamaModel, n_ctx: int, kv_type: str) -> None:
    """llama.cpp writes to the whole cache at once: too large a one would bring the machine to its knees."""
    device = model.devices[0] if model.devices else cpu_device()
    needed = model.hparams.kv_bytes(n_ctx, row_size(KV_TYPES[kv_type], 256) / 256)
    _, total = device.memory()
    if needed > total > 0:
        raise BackendError(
            f"a context of {n_ctx} tokens takes {needed >> 20} MB, {device.name} has {total >> 20}",
            hint="use a smaller context (`n_ctx`)",
        )


def _libc_strlen() -> Any:
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return libc.strlen
