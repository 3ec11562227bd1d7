"""Layers of vision towers, in two implementations: ggml's operations, or our own kernels on the CPU.

`Exact` multiplies what the file stores and attends in float32 where the device can. `Fast` rounds
activations to what the processor multiplies fastest, and fuses what follows each product into it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Protocol

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.graph import Graph, KernelParams, Tensor
from qvl.runtime.ggml.weights import Weights
from qvl.runtime.native import Activation as Code
from qvl.runtime.native import Format, Kernels
from qvl.runtime.vision.attention import Attention
from qvl.runtime.vision.grid import Runs

Activation = Literal["", "silu", "gelu", "gelu_tanh"]
"""Activation after a product: none, x σ(x), x Φ(x), or GELU's tanh approximation."""

_ACTIVATIONS: Final = {"silu": Tensor.silu, "gelu": Tensor.gelu, "gelu_tanh": Tensor.gelu_tanh}
_CODES: Final = {"": Code.NONE, "silu": Code.SILU, "gelu": Code.GELU_ERF, "gelu_tanh": Code.GELU_TANH}
_MERGER: Final = "mm."  # begins the names of its matrices
_ADD, _MULTIPLY = 0, 1  # what a linear layer does with a further tensor (kernels.h)


class Layers(Protocol):
    """Layers that towers are built from.

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

    def common(self, *names: str) -> str:
        """The first of linear layers that take one input in one format; "" if their formats differ."""

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

    def common(self, *names: str) -> str:
        return names[0]

    def gated(self, g: Graph, x: Tensor, gate: str, up: str, then: str) -> Tensor:
        return self.linear(g, x, gate, act="silu") * self.linear(g, x, up)

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        return self.attention(q, k, v, runs, scale)


@dataclass(frozen=True)
class Fast:
    """Our kernels (`qvl.runtime.native`), and ggml's operations for what they do not cover.

    Between two layers x lies in the format that the second one multiplies: integers of 8 or 13 bits with a
    scale for each block, or bfloat16, as an I8 tensor of as many bytes.

    Attributes:
        attention: for heads that the kernel does not take.
    """

    weights: Weights
    kernels: Kernels
    attention: Attention

    def max_nodes(self, runs: Runs) -> int:
        return 48 + self.attention.n_nodes(runs)

    def norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        return self._normalize(g, x, name, eps, then, kind=0)

    def rms_norm(self, g: Graph, x: Tensor, name: str, eps: float, then: str) -> Tensor:
        return self._normalize(g, x, name, eps, then, kind=1)

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
        if self._format(name) is Format.F32:
            return _linear(g, self.weights, x, name, act, residual)
        return self._multiply(g, x, name, act, residual, _ADD, then)

    def common(self, *names: str) -> str:
        return names[0] if len({self._format(name) for name in names}) == 1 else ""

    def gated(self, g: Graph, x: Tensor, gate: str, up: str, then: str) -> Tensor:
        if Format.F32 in (self._format(gate), self._format(up)):
            return self.linear(g, x, gate, act="silu") * self.linear(g, x, up)
        return self._multiply(g, x, gate, "silu", self.linear(g, x, up), _MULTIPLY, then)

    def attend(
        self, g: Graph, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, then: str
    ) -> Tensor:
        if q.shape[0] > self.kernels.max_head:
            return self.attention(q, k, v, runs, scale)
        shape = (q.shape[0] * q.shape[1], q.shape[2])
        return g.custom(
            self.kernels.attention, ggml.Type.F32, shape, (q, k, v), _attention_params(runs, scale)
        )

    def _normalize(self, g: Graph, x: Tensor, name: str, eps: float, then: str, kind: int) -> Tensor:
        weight, bias = self._parameters(g, name)
        # a merger reads several columns as one
        target = Format.F32 if then and self._n_in(then) != x.shape[0] else self._format(then)
        params = KernelParams(scalar=eps, choice=kind | target << 16)
        return self._custom(g, self.kernels.norm, target, x.shape[0], x.shape[1], (x, weight, bias), params)

    def _multiply(
        self, g: Graph, x: Tensor, name: str, act: Activation, other: Tensor | None, how: int, then: str
    ) -> Tensor:
        weight, bias = self._parameters(g, name)
        target = self._format(then)
        params = KernelParams(choice=_CODES[act] | how << 8 | target << 16 | self._format(name) << 24)
        sources = (weight, self._prepared(g, x, name), bias, other)
        return self._custom(g, self.kernels.linear, target, weight.shape[1], x.shape[1], sources, params)

    def _prepared(self, g: Graph, x: Tensor, name: str) -> Tensor:
        """x in the format that a linear layer takes."""
        kind, n_in = self._format(name), self._n_in(name)
        if x.type is ggml.Type.F32:
            params = KernelParams(choice=kind << 16)
            x = self._custom(g, self.kernels.prepare, kind, n_in, x.shape[1], (x,), params)
        if x.shape[0] != self.kernels.row_bytes(kind, n_in):
            raise ValueError(f"{name}: x was made for a layer of another format")
        return x

    def _custom(
        self,
        g: Graph,
        kernel: int,
        kind: Format,
        n_in: int,
        n: int,
        sources: Sequence[Tensor | None],
        params: KernelParams,
    ) -> Tensor:
        """A node of a kernel that makes n columns in a format."""
        if kind is Format.F32:
            return g.custom(kernel, ggml.Type.F32, (n_in, n), sources, params)
        return g.custom(kernel, ggml.Type.I8, (self.kernels.row_bytes(kind, n_in), n), sources, params)

    def _parameters(self, g: Graph, name: str) -> tuple[Tensor, Tensor | None]:
        bias = f"{name}.bias"
        return g.weight(self.weights[f"{name}.weight"]), (
            g.weight(self.weights[bias]) if bias in self.weights else None
        )

    def _format(self, name: str) -> Format:
        """The format of activations that a linear layer takes.

        The merger's errors reach the embeddings undamped, and it is a hundredth of the work: its 8-bit
        weights are multiplied with activations of 13 bits.
        """
        if not name:
            return Format.F32
        kind = ggml.Type(ggml.tensor(self.weights[f"{name}.weight"]).type)
        if kind is ggml.Type.Q8_0 and name.startswith(_MERGER) and kind in self.kernels.formats:
            return Format.WIDE
        return self.kernels.formats.get(kind, Format.F32)

    def _n_in(self, name: str) -> int:
        return int(ggml.tensor(self.weights[f"{name}.weight"]).ne[0])


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
