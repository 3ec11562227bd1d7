"""A row for each `general.architecture` that runs: its tensors, its keys, and what its batches look like.

llama.cpp answers some wrong values with an exception and some with an assertion that ends the process. So
`KEYS` lists every key that its loader reads for these architectures (src/llama-model.cpp, `load_hparams`;
src/models/NAME.cpp, `load_arch_hparams`) with the kind and range that it survives. What is not listed is not
read by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

MAX_LAYERS: Final = 512  # llama-hparams.h, LLAMA_MAX_LAYERS
MAX_EXPERTS: Final = 1024  # llama-hparams.h, LLAMA_MAX_EXPERTS
MAX_SIZE: Final = 1 << 24  # no width of a tensor is near it, and no product of two overflows
Shapes: TypeAlias = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class TextHparams:
    """The decoder's sizes, named as llama.cpp names them.

    Attributes:
        architecture: the row of the table.
        n_ctx_train: the context it was trained with, in tokens.
        n_head_kv: key-value heads (grouped-query attention).
        head_dim: width of a head.
        rope_sections: rotary pairs of the time, height and width positions; their sum is head_dim / 2.
            Empty where a token has one position.
        rope_freq_base: theta of the rotary embedding.
        rms_epsilon: of the RMS norms.
        n_vocab: rows of the embedding, padding rows included.
        n_deepstack: layers that add features of their own at vision positions (Qwen3-VL).
        n_expert, n_expert_used, n_ff_exp: of a mixture of experts; 0 for none.
    """

    architecture: Architecture
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rope_sections: tuple[int, ...]
    rope_freq_base: float
    rms_epsilon: float
    n_vocab: int
    n_deepstack: int = 0
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0

    @property
    def n_embd_inp(self) -> int:
        """Width of an embedding row: the token's, then the features that each deepstack layer adds."""
        return self.n_embd * (1 + self.n_deepstack)

    def kv_bytes(self, n_ctx: int, bytes_per_value: float = 2.0) -> int:
        """Bytes of the KV cache for n_ctx cells; F16 has 2 bytes a value."""
        return int(2 * self.n_layer * self.n_head_kv * self.head_dim * n_ctx * bytes_per_value)


@dataclass(frozen=True)
class Architecture:
    """An architecture that llama.cpp runs.

    Attributes:
        layer: name and shape, rows first, of the tensors of each layer, without "blk.N.".
        position_rows: positions of an embedding: 4 (time, height, width, unused) or 1.
        keys: read beside `KEYS`, or under other rules.
        tied: the head may be missing, and is the embedding then.
        own_head: whether `attention.key_length` may differ from embedding_length / head_count.
        can_rewind: whether a sequence's last tokens can be forgotten.
        reads_epsilon: whether the loader reads `attention.layer_norm_rms_epsilon`; see `epsilon`.
    """

    name: str
    layer: Callable[[TextHparams], Shapes]
    position_rows: int = 4
    keys: Mapping[str, Key] = field(default_factory=dict)
    tied: bool = True
    own_head: bool = False
    can_rewind: bool = True
    reads_epsilon: bool = True

    def tensors(self, h: TextHparams) -> Shapes:
        """Name and shape, rows first, of the tensors that must be there; the head only if it must."""
        yield "token_embd.weight", (h.n_vocab, h.n_embd)
        yield "output_norm.weight", (h.n_embd,)
        if not self.tied:
            yield "output.weight", (h.n_vocab, h.n_embd)
        layer = dict(self.layer(h))
        for i in range(h.n_layer):
            for name, shape in layer.items():
                yield f"blk.{i}.{name}", shape


@dataclass(frozen=True)
class Key:
    """Type and bounds of a key: one value, never a list.

    Attributes:
        kind: int, float, bool or str.
        least, most: bounds of a number; `least` itself is excluded for floats.
        choices: the values allowed, where these are few.
        required: the file is refused without it.
    """

    kind: type
    least: float = 0
    most: float = math.inf
    choices: tuple[Any, ...] = ()
    required: bool = False

    def accepts(self, value: object) -> bool:
        """True if a value is of the kind and in bounds."""
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            return False
        if isinstance(value, float):
            return math.isfinite(value) and self.least < value <= self.most
        return not isinstance(value, int) or isinstance(value, bool) or self.least <= value <= self.most

    @property
    def expected(self) -> str:
        """In words."""
        if self.choices:
            return " or ".join(map(repr, self.choices))
        if self.kind is int:
            return f"a whole number from {self.least} to {self.most}"
        words: dict[type, str] = {float: "a positive number", bool: "true or false"}
        return words.get(self.kind, "text")


_SIZE: Final = Key(int, 1, MAX_SIZE)
_REQUIRED: Final = Key(int, 1, MAX_SIZE, required=True)
_REAL: Final = Key(float)
_NONE: Final = Key(int, choices=(0,))
KEYS: Final[Mapping[str, Key]] = {
    "block_count": Key(int, 1, MAX_LAYERS, required=True),
    "context_length": Key(int, 1, 1 << 30, required=True),
    "embedding_length": _REQUIRED,
    "feed_forward_length": _REQUIRED,
    "attention.head_count": _REQUIRED,
    "attention.head_count_kv": _SIZE,
    "attention.key_length": _SIZE,
    "attention.value_length": _SIZE,
    "attention.key_length_swa": _SIZE,
    "attention.value_length_swa": _SIZE,
    "attention.layer_norm_rms_epsilon": Key(float, 0, 1, required=True),
    "attention.causal": Key(bool, choices=(True,)),
    "attention.sliding_window": _NONE,
    "embedding_length_out": _SIZE,
    "pooling_type": Key(int, 0, 4),
    "classifier.pooling_type": Key(int, 0, 4),
    "rope.dimension_count": _SIZE,
    "rope.dimension_count_swa": _SIZE,
    "rope.freq_base": _REAL,
    "rope.scale_linear": _REAL,
    "rope.scaling.type": Key(str, choices=("none", "linear", "yarn", "longrope")),
    "rope.scaling.factor": _REAL,
    "rope.scaling.attn_factor": _REAL,
    "rope.scaling.alpha": _REAL,
    "rope.scaling.original_context_length": Key(int, 1, 1 << 30),
    "rope.scaling.finetuned": Key(bool),
    "nextn_predict_layers": _NONE,
    "expert_count": _NONE,
    "expert_used_count": _NONE,
    "expert_feed_forward_length": Key(int, 0, MAX_SIZE),
    "expert_group_count": _NONE,
    "expert_group_used_count": _NONE,
    "n_deepstack_layers": Key(int, 0, MAX_LAYERS),
}


def _attention(h: TextHparams, *, biases: bool, norms: bool) -> Shapes:
    q, kv = h.n_head * h.head_dim, h.n_head_kv * h.head_dim
    yield "attn_norm.weight", (h.n_embd,)
    for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
        yield f"{name}.weight", (rows, h.n_embd)
        if biases:
            yield f"{name}.bias", (rows,)
    if norms:
        yield "attn_q_norm.weight", (h.head_dim,)
        yield "attn_k_norm.weight", (h.head_dim,)
    yield "attn_output.weight", (h.n_embd, q)
    yield "ffn_norm.weight", (h.n_embd,)


def _mlp(h: TextHparams) -> Shapes:
    yield "ffn_gate.weight", (h.n_ff, h.n_embd)
    yield "ffn_up.weight", (h.n_ff, h.n_embd)
    yield "ffn_down.weight", (h.n_embd, h.n_ff)


def _qwen2(h: TextHparams) -> Shapes:
    yield from _attention(h, biases=True, norms=False)
    yield from _mlp(h)


def _qwen3(h: TextHparams) -> Shapes:
    yield from _attention(h, biases=False, norms=True)
    yield from _mlp(h)


def _qwen3_moe(h: TextHparams) -> Shapes:
    yield from _attention(h, biases=False, norms=True)
    yield "ffn_gate_inp.weight", (h.n_expert, h.n_embd)
    yield "ffn_gate_exps.weight", (h.n_expert, h.n_ff_exp, h.n_embd)
    yield "ffn_up_exps.weight", (h.n_expert, h.n_ff_exp, h.n_embd)
    yield "ffn_down_exps.weight", (h.n_expert, h.n_embd, h.n_ff_exp)


def _qwen(h: TextHparams) -> Shapes:
    # src/models/qwen.cpp: feed_forward_length counts gate and up together
    yield "attn_norm.weight", (h.n_embd,)
    yield "attn_qkv.weight", (3 * h.n_embd, h.n_embd)
    yield "attn_qkv.bias", (3 * h.n_embd,)
    yield "attn_output.weight", (h.n_embd, h.n_embd)
    yield "ffn_norm.weight", (h.n_embd,)
    yield "ffn_gate.weight", (h.n_ff // 2, h.n_embd)
    yield "ffn_up.weight", (h.n_ff // 2, h.n_embd)
    yield "ffn_down.weight", (h.n_embd, h.n_ff // 2)


_EXPERTS: Final = {
    "expert_count": Key(int, 1, MAX_EXPERTS, required=True),
    "expert_used_count": Key(int, 1, MAX_EXPERTS, required=True),
    "expert_feed_forward_length": _REQUIRED,
}
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    row.name: row
    for row in (
        Architecture("qwen2vl", _qwen2, reads_epsilon=False),
        Architecture("qwen3vl", _qwen3, own_head=True),
        Architecture("qwen3vlmoe", _qwen3_moe, keys=_EXPERTS, own_head=True),
        Architecture("qwen2", _qwen2, position_rows=1),
        Architecture("qwen", _qwen, position_rows=1, tied=False),
    )
}
