"""The image encoder of an mmproj GGUF: pictures in, embeddings out."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, cast

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import GGUFError, InputError, Unpicklable, shown
from qvl.runtime.families.table import FAMILIES, Family, of_projector
from qvl.runtime.files import MappedFile
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import Device, find_device
from qvl.runtime.ggml.gguf import GGUFFile, read_gguf
from qvl.runtime.ggml.graph import Graph, get_data, set_data
from qvl.runtime.ggml.scheduler import GraphRunner, Observer
from qvl.runtime.ggml.weights import Weights
from qvl.runtime.native import Precision, kernels
from qvl.runtime.resources import default_threads
from qvl.runtime.vision.attention import Attention, FlashAttention, TiledAttention
from qvl.runtime.vision.frames import VideoSource
from qvl.runtime.vision.grid import Grid, merged, n_patches
from qvl.runtime.vision.image import ImageSource, open_picture
from qvl.runtime.vision.layers import Exact, Fast, Layers
from qvl.runtime.vision.preprocess import Patches, Preprocessor
from qvl.runtime.vision.tower import PIXELS, Config, Tower, TowerGraph
from qvl.runtime.vision.video import Watch, load_video
from qvl.runtime.vision.video_options import VideoOptions

PACK_PATCHES: Final = 4096
_WAIT: Final = 0.02  # seconds for the encoder before other work is let in
_READING: Final = 0.1  # of a video's progress


@dataclass(frozen=True)
class VisionEmbedding:
    """Embeddings that the decoder reads in place of a picture or a video.

    Attributes:
        embeddings: float32 [n_tokens, n_embd_inp], in reading order of the merged grid; with deepstack
            features after the merger's output.
        grid_thw: temporal patches, rows and columns of patches, before merging.
        merge_size: patches merged along each side into one token.
    """

    embeddings: NDArray[np.float32]
    grid_thw: Grid
    merge_size: int = 2

    def __repr__(self) -> str:
        n, width = self.embeddings.shape
        return f"VisionEmbedding({n} tokens of {width} values, grid_thw={tuple(self.grid_thw)})"

    @property
    def n_tokens(self) -> int:
        """Rows of the embeddings, one a token."""
        return int(self.embeddings.shape[0])

    @property
    def merged(self) -> Grid:
        """The grid (t, h, w) of tokens."""
        return merged(self.grid_thw, self.merge_size)


class VisionEncoder(Unpicklable):
    """The vision tower of an mmproj file, on a device. Use it as a context manager, or `close` it.

    Args:
        path: the mmproj GGUF.
        device: a name for `find_device`.
        threads: CPU threads; by default the physical cores.
        min_pixels, max_pixels: in place of the file's own bounds on a resized picture.
        precision: "exact" multiplies in the file's types and attends in float32; "auto" takes our own
            kernels where the CPU has them (`qvl.runtime.native`) and the file stores no float32 matrices.

    Attributes:
        family: whose tower it is.

    Raises:
        GGUFError: the file is damaged or not an mmproj of a family that is known.
        BackendError: the device has too little memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        precision: Precision = "auto",
    ) -> None:
        file = read_gguf(path)
        self.path = file.path
        self._file = MappedFile(file.path)
        self.metadata = file.metadata
        self.family = _family(file)
        self._tower: Tower = cast("Tower", self.family.tower)
        self.config: Config = self._tower.read_config(file)
        published = self._tower.PREPROCESSOR
        preprocessor = Preprocessor.from_metadata(file.metadata, published, path=file.path)
        self.preprocessor = preprocessor.with_pixels(min_pixels, max_pixels)
        self.device = find_device(device)
        self._weights = self._tower.load(file, self.config, self.device)
        self._threads = threads or default_threads()
        self._runner = GraphRunner(self.device, self._threads)
        self._layers = _layers(precision, self._weights, self.device, self.config)
        self._last: tuple[tuple[Grid, ...], TowerGraph] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.observer: Observer | None = None
        self.on_encoded: Callable[[int, float], None] | None = None
        """Called with the patches of a picture (or of one step of a video) and the seconds it took."""

    @property
    def precision(self) -> str:
        """Arithmetic: "exact", or the name of our own kernels in use ("avx2", …)."""
        return self._layers.kernels.name if isinstance(self._layers, Fast) else "exact"

    def spare_threads(self, n: int) -> None:
        """Leave n of its CPU threads to others from now on; a run that reports progress does so half-way."""
        self._runner.set_threads(max(1, self._threads - n))

    @property
    def n_embd(self) -> int:
        """Width of an embedding row."""
        return self.config.n_out

    @property
    def weight_bytes(self) -> int:
        return self._weights.n_bytes

    @property
    def buffer_bytes(self) -> int:
        """Memory beside the weights that the last run took."""
        return self._runner.buffer_bytes()

    def stored(self, name: str) -> tuple[Sequence[str], float]:
        """The file's names of a weight of the graph, and the factor by which its inputs are enlarged."""
        return self._tower.stored(name)

    def planned_bytes(self, grid: Grid) -> int:
        """Memory beside the weights that a picture of this grid would take, found without taking it."""
        self._check_usable()
        with self._lock:
            encoding = self._tower.build(self.config, self._weights, (grid,), self._layers)
            try:
                return self._runner.planned_bytes(encoding.graph)
            finally:
                encoding.graph.close()

    def __repr__(self) -> str:
        return f"VisionEncoder({self.path.name!r}, {self.device.name!r}, {self.precision!r})"

    def encode(self, images: Sequence[ImageSource], progress: Watch | None = None) -> list[VisionEmbedding]:
        """Embeddings of pictures, packed into as few runs as their sizes allow.

        Args:
            images: paths, bytes, PIL images or uint8 arrays [h, w, 3].
            progress: called with the fraction done, after every layer; returning False stops.

        Raises:
            InputError: the encoder is closed, or images are no list.
            ImageError: a picture cannot be read or is out of bounds.
            BackendError: the encoder was loaded in another process.
            Cancelled: progress asked to stop.
        """
        self._check_usable()
        if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Iterable):
            raise InputError(f"images are {shown(images)}, expected a list of pictures")
        return self.encode_patches(
            [self.preprocessor.image(open_picture(image)) for image in images], progress
        )

    def encode_video(
        self, video: VideoSource, options: VideoOptions | None = None, progress: Watch | None = None
    ) -> VisionEmbedding:
        """Embeddings of a video: frames at 2 a second, two to a temporal patch.

        Args:
            video: a file that FFmpeg reads, a folder of frames, a sequence of pictures, or uint8
                [n, h, w, 3].
            options: of sampling.
            progress: called with the fraction done, to a tenth after every frame read, then after every
                layer; returning False stops.

        Raises:
            InputError: the encoder is closed.
            VideoError: the video cannot be read.
            BackendError: the encoder was loaded in another process.
            Cancelled: progress asked to stop.
        """
        self._check_usable()
        frames = load_video(video, self.preprocessor, options, _part(progress, 0.0, _READING))
        patches = self.preprocessor.patchify(frames.frames)
        return self.encode_patches([patches], _part(progress, _READING, 1.0))[0]

    def encode_patches(
        self, inputs: Sequence[Patches], progress: Watch | None = None
    ) -> list[VisionEmbedding]:
        """Embeddings of preprocessed pictures and videos; see `encode`."""
        self._check_usable()
        results: list[VisionEmbedding] = []
        total, done = sum(n_patches(p.grid_thw) for p in inputs) or 1, 0
        with self._lock:
            for pack in _packs(inputs):
                size = sum(n_patches(p.grid_thw) for p in pack)
                watch = _watcher(progress, done / total, size / total, self.config.n_layer)
                results += self._run(pack, watch)
                done += size
        return results

    def encode_steps(self, inputs: Sequence[Patches]) -> Generator[float, None, list[VisionEmbedding]]:
        """The same a few layers at a time: yields the fraction done, and returns the embeddings.

        Until it ends or is closed, others who use the encoder wait.
        """
        self._check_usable()
        results: list[VisionEmbedding] = []
        total, done = sum(n_patches(p.grid_thw) for p in inputs) or 1, 0
        while not self._lock.acquire(timeout=_WAIT):
            yield 0.0
        try:
            for pack in _packs(inputs):
                size = sum(n_patches(p.grid_thw) for p in pack)
                start, spent = time.perf_counter(), 0.0
                encoding = self._fill(pack)
                for share in self._runner.steps(encoding.graph):
                    spent += time.perf_counter() - start
                    yield (done + share * size) / total
                    start = time.perf_counter()
                results += self._results(pack, encoding)
                self._report(pack, spent + time.perf_counter() - start)
                done += size
        finally:
            self._lock.release()
        return results

    def _run(self, pack: Sequence[Patches], watch: Callable[[str], bool] | None) -> list[VisionEmbedding]:
        start = time.perf_counter()
        encoding = self._fill(pack)
        self._runner.run(encoding.graph, watch, self.observer)
        results = self._results(pack, encoding)
        self._report(pack, time.perf_counter() - start)
        return results

    def _report(self, pack: Sequence[Patches], seconds: float) -> None:
        if self.on_encoded is not None and len(pack) == 1:  # attention is within each of several
            self.on_encoded(n_patches(pack[0].grid_thw) // pack[0].grid_thw[0], seconds / pack[0].grid_thw[0])

    def _fill(self, pack: Sequence[Patches]) -> TowerGraph:
        """The graph for a pack, placed, with its inputs."""
        self._check_usable()
        self._file.check()
        grids = tuple(p.grid_thw for p in pack)
        encoding = self._encoding(grids)
        pixels = np.concatenate([p.pixel_values for p in pack]) if len(pack) > 1 else pack[0].pixel_values
        arrays = {PIXELS: pixels, **self._tower.inputs(self.config, grids)}
        if pixels.size != math.prod(encoding.inputs[PIXELS].shape):
            raise GGUFError(
                f"{self.path}: its metadata cut patches of {pixels.shape[-1]} values, "
                f"its encoder takes {encoding.inputs[PIXELS].shape[-1]}"
            )
        for name, tensor in encoding.inputs.items():
            set_data(tensor, arrays[name])
        return encoding

    def _results(self, pack: Sequence[Patches], encoding: TowerGraph) -> list[VisionEmbedding]:
        grids = tuple(p.grid_thw for p in pack)
        rows = get_data(encoding.output)
        size = self.config.merge_size
        ends = np.cumsum([n_patches(merged(grid, size)) for grid in grids])
        parts = [part.copy() for part in np.split(rows, ends[:-1])] if len(pack) > 1 else [rows]
        return [VisionEmbedding(part, grid, size) for part, grid in zip(parts, grids, strict=True)]

    def _encoding(self, grids: tuple[Grid, ...]) -> TowerGraph:
        last = self._last
        if last is None or last[0] != grids or not self._runner.is_placed(last[1].graph):
            encoding = self._tower.build(self.config, self._weights, grids, self._layers)
            self._forget()
            self._last = last = (grids, encoding)
        self._runner.prepare(last[1].graph)
        return last[1]

    def _forget(self) -> None:
        if self._last is not None:
            self._last[1].graph.close()
            self._last = None

    def _check_usable(self) -> None:
        self._file.check_process()
        if self._closed:
            raise InputError(f"{self.path}: the image encoder is closed", hint="load the model again")

    def close(self) -> None:
        """Free the weights and buffers. In a forked child it does nothing: they are the parent's."""
        if not self._file.is_ours:
            return
        with self._lock:
            self._closed = True
            self._runner.close()
            self._forget()
            self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _family(file: GGUFFile) -> Family:
    """The family of a vision file.

    Raises:
        GGUFError: another architecture, or an unknown projector.
    """
    projector = file.metadata.get("clip.projector_type", file.metadata.get("clip.vision.projector_type"))
    family = of_projector(projector) if file.architecture == "clip" else None
    if family is None:
        known = ", ".join(f"{family.projector!r} ({family.title})" for family in FAMILIES)
        raise GGUFError(
            f"{file.path}: architecture {file.architecture or 'none'!r} with projector {projector!r}, "
            f"expected 'clip' with one of {known}",
            hint="give the mmproj file that belongs to the model",
        )
    return family


def _part(progress: Watch | None, start: float, end: float) -> Watch | None:
    """Progress of a part of the work."""
    return None if progress is None else lambda share: progress(start + share * (end - start))


def _packs(inputs: Sequence[Patches]) -> Iterator[list[Patches]]:
    """Neighbours together while they hold at most PACK_PATCHES patches."""
    pack: list[Patches] = []
    size = 0
    for patches in inputs:
        n = n_patches(patches.grid_thw)
        if pack and size + n > PACK_PATCHES:
            yield pack
            pack, size = [], 0
        pack.append(patches)
        size += n
    if pack:
        yield pack


def _watcher(
    progress: Watch | None, start: float, share: float, n_layer: int
) -> Callable[[str], bool] | None:
    if progress is None:
        return None
    return lambda layer: progress(start + share * int(layer) / n_layer) is not False


def _layers(precision: Precision, weights: Weights, device: Device, config: Config) -> Layers:
    found = kernels() if device.is_cpu and precision == "auto" else None
    attention = _attention(device, config)
    if found is not None and config.head_dim <= found.max_head and not _stores_float32(weights, config):
        return Fast(weights, found, attention)
    return Exact(weights, attention)


def _stores_float32(weights: Weights, config: Config) -> bool:
    names = [f"v.blk.{i}.ffn_up.weight" for i in range(config.n_layer)]
    return any(ggml.tensor(weights[name]).type == ggml.Type.F32 for name in names)


def _attention(device: Device, config: Config) -> Attention:
    """Flash attention where the device has it for this head, otherwise tiles."""
    kind = ggml.Type.F32 if device.is_cpu else ggml.Type.F16
    n_head = config.n_embd // config.head_dim
    graph = Graph(max_nodes=64)
    try:
        q, k, v = (graph.input(ggml.Type.F32, config.head_dim, 32, n_head) for _ in range(3))
        node = q.flash_attention(k.cast(kind), v.cast(kind), 1.0)
        has = ggml.lib().ggml_backend_dev_supports_op(device.handle, node.pointer)
    finally:
        graph.close()
    return FlashAttention(kind) if has else TiledAttention()
