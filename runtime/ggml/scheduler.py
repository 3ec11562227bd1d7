"""Running a ggml graph on a device, and watching it run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from qvl.runtime.errors import BackendError, Cancelled
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import Device, cpu_device
from qvl.runtime.ggml.graph import Graph, piece
from qvl.runtime.interrupt import CallbackGuard, held_interrupts
from qvl.runtime.resources import require_address_space

_HEADROOM = 256 << 20  # address space that ggml takes beside the tensors of a graph
_NODE_BYTES = 2 * 30 * 400  # of the tables of ggml_backend_sched_new (GGML_SCHED_MAX_SPLIT_INPUTS is 30)

_PIECE_SECONDS: Final = 0.03
_FIRST_NODES: Final = 4


class Observer(Protocol):
    """Sees nodes of a running graph, as pointers to `ggml_tensor`."""

    def wants(self, node: int) -> bool:
        """Whether to be shown this node when it is done; asked before it is computed."""

    def take(self, node: int) -> None:
        """The node is done, and what it was computed from is still there."""


def eval_callback(observer: Observer, guard: CallbackGuard) -> Any:
    """An observer as the callback of a scheduler (`ggml_backend_sched_eval_callback`).

    The C side holds a pointer only: keep what is returned. Check the guard after each call that computes:
    ggml reports success when a callback stops it.
    """

    def on_node(pointer: int, ask: bool, _: int) -> bool:
        if ask:
            return observer.wants(pointer)
        observer.take(pointer)
        return True

    return _as_callback(on_node, guard)


def _as_callback(on_node: Callable[[int, bool, int], bool], guard: CallbackGuard) -> Any:
    def stop(pointer: int, ask: bool, _: int) -> bool:
        return ask  # each split of the graph ends with its first node, which is wanted and not accepted

    return ggml.EvalCallback(guard.wrap(on_node, stop))


class GraphRunner:
    """Runs graphs on a device, the CPU helping out with what the device lacks.

    Args:
        device: where weights live and nodes run.
        threads: CPU threads.
    """

    def __init__(self, device: Device, threads: int) -> None:
        require_address_space(_HEADROOM, "the image encoder")
        lib = ggml.lib()
        self.device = device
        chain = [device] if device.is_cpu else [device, cpu_device()]
        self._backends = [lib.ggml_backend_dev_init(d.handle, None) for d in chain]
        if not all(self._backends):
            raise BackendError(f"device {device.name} cannot be started", hint="use `device` cpu")
        self._cpus = [pair for pair in zip(self._backends, chain, strict=True) if pair[1].is_cpu]
        self.set_threads(threads)
        self._buffer_types = [lib.ggml_backend_dev_buffer_type(d.handle) for d in chain]
        self._sched: int | None = None
        self._capacity = 0
        self._ready: Graph | None = None

    def set_threads(self, threads: int) -> None:
        """Another number of CPU threads; a run that is watched takes it over with its next named node."""
        for backend, device in self._cpus:
            _set_threads(backend, device, threads)

    def _scheduler(self, graph: Graph) -> int:
        """A scheduler with room for a graph: its tables take 24 kB of address space for each node."""
        size = 2 * graph.max_nodes  # its nodes, and as many leaves
        require_address_space(size * _NODE_BYTES + _HEADROOM, "the image encoder")
        n = len(self._backends)
        backends, types = (ctypes.c_void_p * n)(*self._backends), (ctypes.c_void_p * n)(*self._buffer_types)
        made: int = ggml.lib().ggml_backend_sched_new(
            ctypes.addressof(backends), ctypes.addressof(types), n, size, False, True
        )
        return made

    def _reset(self, graph: Graph) -> None:
        """Make the scheduler forget the placed graph, and give it room for another."""
        lib = ggml.lib()
        self._ready = None
        if graph.max_nodes <= self._capacity:
            lib.ggml_backend_sched_reset(self._sched)
            return
        if self._sched:
            lib.ggml_backend_sched_free(self._sched)
            self._sched, self._capacity = None, 0
        self._sched = self._scheduler(graph)
        self._capacity = graph.max_nodes

    def is_placed(self, graph: Graph) -> bool:
        """True if a graph's nodes are in memory; once another took its place, it has to be built anew."""
        return self._ready is graph

    def prepare(self, graph: Graph) -> None:
        """Place a new graph's nodes in memory; it stays placed until another graph is.

        Raises:
            BackendError: not enough memory.
        """
        if self.is_placed(graph):
            return
        require_address_space(_HEADROOM, "this picture")
        lib = ggml.lib()
        self._reset(graph)
        if not lib.ggml_backend_sched_alloc_graph(self._sched, graph.pointer):
            raise BackendError(
                f"device {self.device.name} has too little memory for this picture", hint="lower `max_pixels`"
            )
        self._ready = graph

    def planned_bytes(self, graph: Graph) -> int:
        """Bytes that a graph's nodes would take, found without taking them.

        With a scheduler of its own: after `ggml_backend_sched_reserve_size` ggml takes a graph of the same
        shape for placed, and writes to buffers that do not exist.
        """
        lib = ggml.lib()
        sizes = (ctypes.c_size_t * len(self._backends))()
        scheduler = self._scheduler(graph)
        lib.ggml_backend_sched_reserve_size(scheduler, graph.pointer, ctypes.addressof(sizes))
        lib.ggml_backend_sched_free(scheduler)
        return sum(sizes)

    def run(
        self, graph: Graph, watch: Callable[[str], bool] | None = None, observer: Observer | None = None
    ) -> None:
        """Compute a prepared graph.

        Args:
            watch: called with the name of every named node as it is done; False stops the run.
            observer: is shown the nodes it wants.

        Raises:
            Cancelled: watch asked for it. Whatever watch or the observer raise.
            BackendError: the device failed.
        """
        lib = ggml.lib()
        stopped = False
        guard = CallbackGuard()
        interrupted: Callable[[], bool]

        def on_node(pointer: int, ask: bool, _: int) -> bool:
            nonlocal stopped
            name: bytes = ggml.tensor(pointer).name
            watched = name.startswith(b"@")
            observed = observer is not None and observer.wants(pointer)
            if ask:
                return watched or observed or stopped
            if observed and observer is not None:
                observer.take(pointer)
            if interrupted() or (watched and watch is not None and not watch(name[1:].decode())):
                stopped = True
            return not stopped

        callback = _as_callback(on_node, guard) if watch or observer else None
        address = ctypes.cast(callback, ctypes.c_void_p) if callback else None
        lib.ggml_backend_sched_set_eval_callback(self._sched, address, None)
        try:
            with held_interrupts() as interrupted:
                status = lib.ggml_backend_sched_graph_compute(self._sched, graph.pointer)
        finally:
            lib.ggml_backend_sched_set_eval_callback(self._sched, None, None)
        guard.check()
        if stopped:
            raise Cancelled("the encoding was stopped")
        self._check(graph, status)

    def steps(self, graph: Graph) -> Iterator[float]:
        """Compute a prepared graph piece by piece: yields the fraction done about every 30 ms.

        A node that takes longer is one piece, as is a graph that lies on several devices. Other graphs may
        run elsewhere in between.

        Raises:
            BackendError: the device failed.
        """
        if len(self._backends) > 1:
            self.run(graph)
            yield 1.0
            return
        nodes = graph.nodes()
        done, size = 0, _FIRST_NODES
        while done < len(nodes):
            part = nodes[done : done + size]
            started = time.perf_counter()
            with held_interrupts(), piece(part) as pointer:
                status = ggml.lib().ggml_backend_graph_compute(self._backends[0], pointer)
            self._check(graph, status)
            done += len(part)
            wanted = size * _PIECE_SECONDS / max(time.perf_counter() - started, 1e-6)
            size = max(1, min(int(wanted), 2 * size))
            yield done / len(nodes)

    def _check(self, graph: Graph, status: int) -> None:
        if status != ggml.Status.SUCCESS or graph.take_failure():
            raise BackendError(
                f"device {self.device.name} failed: {ggml.Status(status).name.lower()}",
                hint="if memory is short, lower `max_pixels`",
            )

    def buffer_bytes(self) -> int:
        """Bytes that the placed graph's nodes take."""
        lib = ggml.lib()
        if self._sched is None:
            return 0
        return sum(lib.ggml_backend_sched_get_buffer_size(self._sched, b) for b in self._backends)

    def close(self) -> None:
        lib = ggml.lib()
        if self._sched:
            lib.ggml_backend_sched_free(self._sched)
        for backend in self._backends:
            lib.ggml_backend_free(backend)
        self._sched, self._backends = None, []


def _set_threads(backend: int, device: Device, threads: int) -> None:
    lib = ggml.lib()
    reg = lib.ggml_backend_dev_backend_reg(device.handle)
    address = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
    if address:
        # void ggml_backend_set_n_threads(ggml_backend_t backend, int n_threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, threads)
