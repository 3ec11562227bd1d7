"""The vision tower's layers, in two makes: ggml's operations alone, or with our own kernels on the CPU.

`Exact` multiplies what the file stores and attends in float32 where the device can. `Fast` rounds
activations to bfloat16, as the model was trained, and fuses what follows each product into it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.graph import Graph, KernelParams, Tensor
from qvl.runtime.ggml.weights import Weights
from qvl.runtime.native import Kernels
from qvl.runtime.vision.attention import Attention
from qvl.runtime.vision.grid import Runs


class Layers(Protocol):
    """What a tower is built from. x is [n_in, n]; names are those of the weights, without their suffix."""

    def max_nodes(self, runs: Runs) -> int:
        """A bound on the nodes of one block."""

    def norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        """Layer norm of x, as the linear layer `then` wants it."""

    def linear(
        self,
        g: Graph,
        x: Tensor,
        name: str,
        *,
        silu: bool = False,
        residual: Tensor | None = None,
        then: str = "",
    ) -> Tensor:
        """W x + b, SiLU or a residual after it if asked, as the linear layer `then` wants it."""

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        """Attention within segments, [n_embd, n]."""


@dataclass(frozen=True)
class Exact:
    """ggml's own operations."""

    weights: Weights
    attention: Attention

    def max_nodes(self, runs: Runs) -> int:
        return 40 + self.attention.n_nodes(runs)

    def norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        return x.norm(eps) * g.weight(self.weights[f"{name}.weight"]) + g.weight(self.weights[f"{name}.bias"])

    def linear(
        self,
        g: Graph,
        x: Tensor,
        name: str,
        *,
        silu: bool = False,
        residual: Tensor | None = None,
        then: str = "",
    ) -> Tensor:
        y = g.weight(self.weights[f"{name}.weight"]) @ x + g.weight(self.weights[f"{name}.bias"])
        y = y.silu() if silu else y
        return y if residual is None else residual + y

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        return self.attention(q, k, v, runs, scale)


@dataclass(frozen=True)
class Fast:
    """Our kernels (`qvl.runtime.native`), and ggml's products for types that it is faster at."""

    weights: Weights
    kernels: Kernels

    def max_nodes(self, runs: Runs) -> int:
        return 40

    def norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        weight, bias = (g.weight(self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        if self._input(then) is ggml.Type.F32:
            return x.norm(eps) * weight + bias
        params = KernelParams(scalar=eps)
        return g.custom(self.kernels.layer_norm, ggml.Type.BF16, x.shape, (x, weight, bias), params)

    def linear(
        self,
        g: Graph,
        x: Tensor,
        name: str,
        *,
        silu: bool = False,
        residual: Tensor | None = None,
        then: str = "",
    ) -> Tensor:
        weight, bias = (g.weight(self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        if self._input(name) is ggml.Type.F32:
            y = weight @ x + bias
            y = y.silu() if silu else y
            return y if residual is None else residual + y
        sources = [weight, x.cast(ggml.Type.BF16), bias, *([] if residual is None else [residual])]
        kind, shape = self._input(then), (weight.shape[1], x.shape[1])
        return g.custom(self.kernels.linear, kind, shape, sources, KernelParams(choice=int(silu)))

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        params = _attention_params(runs, scale)
        shape = (q.shape[0] * q.shape[1], q.shape[2])
        return g.custom(self.kernels.attention, self._input(then), shape, (q, k, v), params)

    def _input(self, name: str) -> ggml.Type:
        """The type of activations that a linear layer takes."""
        if not name:
            return ggml.Type.F32
        kind = ggml.tensor(self.weights[f"{name}.weight"]).type
        return ggml.Type.BF16 if kind in self.kernels.types else ggml.Type.F32


def _attention_params(runs: Runs, scale: float) -> KernelParams:
    class Params(KernelParams):
        _fields_: ClassVar[Any] = (("runs", ctypes.c_int64 * (2 * len(runs))),)

    flat = [value for run in runs for value in run]
    return Params(scalar=scale, choice=len(runs), runs=(ctypes.c_int64 * len(flat))(*flat))
