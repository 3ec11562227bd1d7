"""The vision tower's layers, in two makes: ggml's operations alone, or with our own kernels on the CPU.

`Exact` multiplies what the file stores and attends in float32 where the device can. `Fast` rounds
activations to bfloat16, as the model was trained, and fuses what follows each product into it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Protocol

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.graph import Graph, KernelParams, Tensor
from qvl.runtime.ggml.weights import Weights
from qvl.runtime.native import Kernels
from qvl.runtime.vision.attention import Attention
from qvl.runtime.vision.grid import Runs

Activation = Literal["", "silu", "gelu", "gelu_tanh"]
"""What follows a product: nothing, x σ(x), x Φ(x), or GELU's tanh approximation."""

_ACTIVATIONS: Final = {"silu": Tensor.silu, "gelu": Tensor.gelu, "gelu_tanh": Tensor.gelu_tanh}


class Layers(Protocol):
    """What a tower is built from.

    x is [n_in, n]; names are those of the weights, without their suffix. A layer without a bias in the
    weights has none.
    """

    def max_nodes(self, runs: Runs) -> int:
        """A bound on the nodes of one block."""

    def norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        """Layer norm of x, as the linear layer `then` wants it."""

    def rms_norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        """RMS norm of x, as the linear layer `then` wants it."""

    def linear(
        self,
        g: Graph,
        x: Tensor,
        name: str,
        *,
        act: Activation = "",
        residual: Tensor | None = None,
        then: str = "",
    ) -> Tensor:
        """W x + b, an activation or a residual after it if asked, as the linear layer `then` wants it."""

    def gated(self, g: Graph, x: Tensor, gate: str, up: str, then: str) -> Tensor:
        """silu(W_gate x + b) · (W_up x + b), SwiGLU, as the linear layer `then` wants it."""

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        """Attention within segments, [n_embd, n].

        q, k and v are [head_dim, n_head, n]. q may hold another number of queries than k has keys: then
        there is one segment, and every query sees every key.
        """


@dataclass(frozen=True)
class Exact:
    """ggml's own operations."""

    weights: Weights
    attention: Attention

    def max_nodes(self, runs: Runs) -> int:
        return 48 + self.attention.n_nodes(runs)

    def norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        return _scaled(g, self.weights, x.norm(eps), name)

    def rms_norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        return _scaled(g, self.weights, x.rms_norm(eps), name)

    def linear(
        self,
        g: Graph,
        x: Tensor,
        name: str,
        *,
        act: Activation = "",
        residual: Tensor | None = None,
        then: str = "",
    ) -> Tensor:
        return _linear(g, self.weights, x, name, act, residual)

    def gated(self, g: Graph, x: Tensor, gate: str, up: str, then: str) -> Tensor:
        return self.linear(g, x, gate, act="silu") * self.linear(g, x, up)

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        return self.attention(q, k, v, runs, scale)


@dataclass(frozen=True)
class Fast:
    """Our kernels (`qvl.runtime.native`), and ggml's operations for what they do not cover.

    Attributes:
        attention: for heads and queries that the kernel does not take.
    """

    weights: Weights
    kernels: Kernels
    attention: Attention

    def max_nodes(self, runs: Runs) -> int:
        return 48 + self.attention.n_nodes(runs)

    def norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        if self._input(then) is ggml.Type.F32:
            return _scaled(g, self.weights, x.norm(eps), name)
        weight, bias = (g.weight(self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        params = KernelParams(scalar=eps)
        return g.custom(self.kernels.layer_norm, ggml.Type.BF16, x.shape, (x, weight, bias), params)

    def rms_norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        return _scaled(g, self.weights, x.rms_norm(eps), name)

    def linear(
        self,
        g: Graph,
        x: Tensor,
        name: str,
        *,
        act: Activation = "",
        residual: Tensor | None = None,
        then: str = "",
    ) -> Tensor:
        if self._input(name) is ggml.Type.F32:
            return _linear(g, self.weights, x, name, act, residual)
        if f"{name}.bias" not in self.weights:
            return _linear(g, self.weights, x.cast(ggml.Type.F32), name, act, residual)
        if act not in ("", "silu"):
            return _activated(self.linear(g, x, name), act)
        weight, bias = (g.weight(self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        sources = [weight, x.cast(ggml.Type.BF16), bias, *([] if residual is None else [residual])]
        kind, shape = self._input(then), (weight.shape[1], x.shape[1])
        return g.custom(self.kernels.linear, kind, shape, sources, KernelParams(choice=int(act == "silu")))

    def gated(self, g: Graph, x: Tensor, gate: str, up: str, then: str) -> Tensor:
        return self.linear(g, x, gate, act="silu") * self.linear(g, x, up)

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        if q.shape[0] > self.kernels.max_head or q.shape[2] != k.shape[2]:
            return self.attention(q, k, v, runs, scale)
        params = _attention_params(runs, scale)
        shape = (q.shape[0] * q.shape[1], q.shape[2])
        return g.custom(self.kernels.attention, self._input(then), shape, (q, k, v), params)

    def _input(self, name: str) -> ggml.Type:
        """The type of activations that a linear layer takes."""
        if not name:
            return ggml.Type.F32
        kind = ggml.tensor(self.weights[f"{name}.weight"]).type
        return ggml.Type.BF16 if kind in self.kernels.types else ggml.Type.F32


def _scaled(g: Graph, weights: Weights, x: Tensor, name: str) -> Tensor:
    """A normalized x with the norm's weight and, where there is one, its bias."""
    y = x * g.weight(weights[f"{name}.weight"])
    return y + g.weight(weights[f"{name}.bias"]) if f"{name}.bias" in weights else y


def _linear(
    g: Graph, weights: Weights, x: Tensor, name: str, act: Activation, residual: Tensor | None
) -> Tensor:
    y = g.weight(weights[f"{name}.weight"]) @ x
    y = y + g.weight(weights[f"{name}.bias"]) if f"{name}.bias" in weights else y
    y = _activated(y, act)
    return y if residual is None else residual + y


def _activated(y: Tensor, act: Activation) -> Tensor:
    return _ACTIVATIONS[act](y) if act else y


def _attention_params(runs: Runs, scale: float) -> KernelParams:
    class Params(KernelParams):
        _fields_: ClassVar[Any] = (("runs", ctypes.c_int64 * (2 * len(runs))),)

    flat = [value for run in runs for value in run]
    return Params(scalar=scale, choice=len(runs), runs=(ctypes.c_int64 * len(flat))(*flat))
