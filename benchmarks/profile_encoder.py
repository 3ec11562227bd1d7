"""Where the time of an image encoder goes, by kind of operation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

from qvl.runtime.ggml import library as ggml
from qvl.runtime.native import kernels
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.preprocess import Patches

_KINDS: Final = {
    "MUL_MAT": "matrix products",
    "FLASH_ATTN_EXT": "attention",
    "SOFT_MAX": "attention",
    "NORM": "layer norms",
    "ROPE": "rotary positions",
    "ADD": "biases and residuals",
    "MUL": "biases and residuals",
    "CPY": "copies",
    "CONT": "copies",
    "CONCAT": "copies",
    "PAD": "copies",
    "SILU": "activations",
    "GELU_ERF": "activations",
}
_OURS: Final = {
    "linear": "matrix products",
    "attention": "attention",
    "norm": "norms",
    "prepare": "activations rounded",
}


class NodeTimes:
    """An `Observer` that adds up the seconds of every node by kind; nodes then run one by one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        found = kernels()
        self._ours = {getattr(found, name): kind for name, kind in _OURS.items()} if found else {}
        self._node, self._since = 0, 0.0

    def wants(self, node: int) -> bool:
        if node != self._node:  # the runner asks again when the node is done
            self._node, self._since = node, self._clock()
        return True

    def take(self, node: int) -> None:
        self.seconds[self._kind(node)] += self._clock() - self._since

    def _kind(self, node: int) -> str:
        struct = ggml.tensor(node)
        op: str = ggml.lib().ggml_op_desc(node).decode()
        if op == "CUSTOM":  # op_params begins with the function's address
            low, high = (value & 0xFFFFFFFF for value in struct.op_params[:2])
            return self._ours.get(high << 32 | low, "other")
        if op == "MUL_MAT" and ggml.tensor(struct.src[0]).name.startswith(b"v.patch_embd"):
            return "patch embedding"
        return _KINDS.get(op, "other")


def profile(
    encoder: VisionEncoder, inputs: Sequence[Patches], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of encoding by kind of operation, the largest first.

    Args:
        clock: `time.process_time` tells more on a busy machine, with one thread.
    """
    encoder.encode_patches(inputs)
    times = NodeTimes(clock)
    encoder.observer = times
    try:
        encoder.encode_patches(inputs)
    finally:
        encoder.observer = None
    return dict(sorted(times.seconds.items(), key=lambda item: -item[1]))
