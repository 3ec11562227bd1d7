"""The text model: a GGUF file opened by llama.cpp."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol
from weakref import WeakSet

from qvl.runtime.errors import BackendError, GGUFError, InputError, Unpicklable, shown
from qvl.runtime.files import MappedFile
from qvl.runtime.ggml.devices import Device, find_device
from qvl.runtime.ggml.gguf import GGUFFile, read_gguf
from qvl.runtime.interrupt import CallbackGuard, held_interrupts
from qvl.runtime.llama.architectures import TextHparams
from qvl.runtime.llama.binding import complaints, llama, log_guard
from qvl.runtime.llama.epsilon import restore_epsilon
from qvl.runtime.llama.header import ARRAYS, check_text_file
from qvl.runtime.llama.products import product_types
from qvl.runtime.llama.repack import Optimize, wants_repacking
from qvl.runtime.llama.vocab import Vocab
from qvl.runtime.native import Precision
from qvl.runtime.resources import require_address_space

ALL_LAYERS: Final = -1
_SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class Closing(Protocol):
    """Memory of llama.cpp that must be freed before the model's weights."""

    def close(self) -> None:
        """Free it."""


class LlamaModel(Unpicklable):
    """Weights and vocabulary of the decoder; contexts (`Context`) are opened on it.

    Use as a context manager, or call `close`.

    Attributes:
        path: the file.
        hparams: sizes, from the header.
        metadata: the header's key-value pairs; of its arrays, `header.ARRAYS`.
        vocab: the tokenizer.
        devices: where layers are placed, in order; the CPU alone when it is empty.
        n_gpu_layers: layers placed there, counted from the last; -1 is all.
        own_products: whether contexts compute products of many columns by our own kernels (`products`).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | Sequence[Device] = "auto",
        n_gpu_layers: int = ALL_LAYERS,
        use_mmap: bool = True,
        optimize: Optimize = "decode",
        precision: Precision = "exact",
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Open a text GGUF.

        Args:
            device: a name that `find_device` knows, or devices.
            optimize: what is to be fast where a CPU cannot have both; see `repack`.
            precision: "auto" reads prompts with our own kernels where the CPU has them and no device is used;
                "exact" computes with ggml alone.
            progress: called with the fraction loaded, from 0 to 1. What it raises stops the loading.

        Raises:
            GGUFError: not a text GGUF of an architecture that runs here, or damaged.
            InputError: no such device.
            BackendError: llama.cpp refused it; usually memory is short.
        """
        gguf, self._files = _read_shards(read_gguf(path, arrays=ARRAYS))
        self.path = gguf.path
        self.hparams: TextHparams = check_text_file(gguf)
        self.metadata = gguf.metadata
        self.n_bytes = sum(t.nbytes for t in gguf.tensors.values())
        is_list = isinstance(device, list | tuple)
        if not isinstance(device, str) and not (is_list and all(isinstance(d, Device) for d in device)):
            raise InputError(f"device is {shown(device)}, expected a name or devices")
        found = [find_device(device)] if isinstance(device, str) else list(device)
        self.devices = [d for d in found if not d.is_cpu]
        self.n_gpu_layers = n_gpu_layers if self.devices else 0
        self.own_products = precision == "auto" and not self.devices
        self._c = llama()
        self._contexts: WeakSet[Closing] = WeakSet()
        repack = wants_repacking(gguf, optimize, product_types() if self.own_products else ())
        self._handle: int | None = self._load(use_mmap, repack, progress)
        if not self.hparams.architecture.reads_epsilon:
            restore_epsilon(self.handle, self.hparams.rms_epsilon, self.hparams.rope_freq_base)
        self.vocab = Vocab(self.handle, str(self.path), self.metadata)

    def __repr__(self) -> str:
        where = self.devices[0].name if self.devices else "CPU"
        return f"LlamaModel({self.path.name!r}, {where!r})"

    @property
    def handle(self) -> int:
        """The `llama_model *`.

        Raises:
            BackendError: the model is closed, or was loaded in another process.
        """
        self.check_process()
        if self._handle is None:
            raise BackendError(f"{self.path}: the model is closed")
        return self._handle

    @property
    def is_ours(self) -> bool:
        """True if this process loaded it; False in a forked child."""
        return self._files[0].is_ours

    def check_process(self) -> None:
        """See that this process loaded the model.

        Raises:
            BackendError: another one did, and this was forked from it.
        """
        self._files[0].check_process()

    def register(self, context: Closing) -> None:
        """Close a context before the weights are freed."""
        self._contexts.add(context)

    def check_files(self) -> None:
        """See that no file was shortened since it was opened: its pages are read while the model runs.

        Raises:
            FormatError: one was.
            BackendError: another process loaded the model.
        """
        for file in self._files:
            file.check()

    def close(self) -> None:
        """Free the weights, and the contexts on them. Doing it twice is harmless.

        In a forked child it does nothing: they are the parent's.
        """
        if not self.is_ours:
            return
        for context in list(self._contexts):
            context.close()
        handle, self._handle = self._handle, None
        if handle is not None:
            self.vocab.close()
            self._c.llama_model_free(handle)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, use_mmap: bool, repack: bool, progress: Callable[[float], None] | None) -> int:
        require_address_space(self.path.stat().st_size + (256 << 20), "the text model")
        c = self._c
        params = c.llama_model_default_params()
        # an empty list keeps every layer on the CPU; NULL would mean every device there is
        handles = (ctypes.c_void_p * (len(self.devices) + 1))(*(d.handle for d in self.devices), None)
        params.devices = ctypes.cast(handles, ctypes.c_void_p)
        params.n_gpu_layers = self.n_gpu_layers
        params.load_mode = c.LLAMA_LOAD_MODE_MMAP if use_mmap else c.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = repack
        guard = CallbackGuard()

        def report(fraction: float, _: Any) -> bool:
            if progress is not None:
                progress(fraction)
            return not interrupted()

        callback = c.llama_progress_callback(guard.wrap(report, lambda fraction, _: False))
        params.progress_callback = callback
        complaints()
        handle = None
        try:
            with held_interrupts() as interrupted:
                handle = c.llama_model_load_from_file(os.fsencode(self.path), params)
            guard.check()
            log_guard.check()
        except BaseException:
            if handle:
                c.llama_model_free(handle)
            raise
        if not handle:
            raise BackendError(
                f"{self.path}: llama.cpp cannot load it: {complaints() or 'no reason given'}",
                hint="if memory is short: a smaller type (q4_k_m), fewer layers (`n_gpu_layers`), or the CPU",
            )
        return int(handle)


def _read_shards(first: GGUFFile) -> tuple[GGUFFile, list[MappedFile]]:
    """The file with the tensors of all its parts, and these; a split model is `NAME-00001-of-00003.gguf`."""
    n_parts = first.metadata.get("split.count", 1)
    if n_parts in (0, 1):
        return first, [MappedFile(first.path)]
    match = _SHARD.search(first.path.name)
    if match is None or int(match[1]) != 1 or int(match[2]) != n_parts:
        raise GGUFError(
            f"{first.path}: one of {n_parts} parts of a split model",
            hint=f"name the first part, ending in -00001-of-{n_parts:05}.gguf",
        )
    tensors = dict(first.tensors)
    files = [MappedFile(first.path)]
    for i in range(2, n_parts + 1):
        name = first.path.name[: match.start()] + f"-{i:05}-of-{n_parts:05}.gguf"
        part = read_gguf(first.path.with_name(name), arrays=False)
        tensors.update(part.tensors)
        files.append(MappedFile(part.path))
    return replace(first, tensors=tensors), files
