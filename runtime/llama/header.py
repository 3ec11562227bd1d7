"""What a text GGUF must hold before llama.cpp may open it.

llama.cpp answers some damage with an exception and some with an assertion that ends the process, or reads
beyond an array. So everything its loader and its qwen2vl graph (src/models/qwen2vl.cpp) take for granted is
checked here, on the header alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qvl.runtime.errors import GGUFError
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo
from qvl.runtime.ggml.library import Type

ARCHITECTURE: Final = "qwen2vl"
# arrays that are looked at here; the merges, as long as the tokens, llama.cpp checks well enough
ARRAYS: Final = (
    "qwen2vl.rope.dimension_sections", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
)  # fmt: skip
_MAX_LAYERS: Final = 512  # llama-hparams.h, LLAMA_MAX_LAYERS
_MAX_SIZE: Final = 1 << 24  # no width of a tensor is near it, and no product of two overflows
_NOT_WEIGHTS: Final = frozenset({Type.I8, Type.I16, Type.I32, Type.I64, Type.F64})
_ROPE_SCALING: Final = frozenset({"none", "linear", "yarn", "longrope"})
_DAMAGED: Final = "the file is damaged or was made by a broken converter: download or convert it again"


@dataclass(frozen=True)
class TextHparams:
    """The decoder's sizes, named as llama.cpp names them.

    Attributes:
        n_ctx_train: the context it was trained with, in tokens.
        n_head_kv: key-value heads (grouped-query attention).
        rope_sections: rotary pairs of the time, height and width positions; their sum is head_dim / 2.
        rope_freq_base: theta of the rotary embedding.
        rms_epsilon: of the RMS norms.
        n_vocab: rows of the embedding, padding rows included.
    """

    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    rope_sections: tuple[int, int, int]
    rope_freq_base: float
    rms_epsilon: float
    n_vocab: int

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def kv_bytes(self, n_ctx: int, bytes_per_value: float = 2.0) -> int:
        """Bytes of the KV cache for n_ctx cells; F16 has 2 bytes a value."""
        return int(2 * self.n_layer * self.n_head_kv * self.head_dim * n_ctx * bytes_per_value)


def check_text_file(gguf: GGUFFile) -> TextHparams:
    """Refuse a file that llama.cpp could not run, or not survive; it was read with the arrays `ARRAYS`.

    Raises:
        GGUFError: another architecture, metadata missing or out of bounds, tensors missing, left over or
            of another shape or type than the metadata says, a vocabulary that does not fit.
    """
    _check_architecture(gguf)
    hparams = _hparams(gguf)
    _check_tensors(gguf, hparams)
    _check_vocabulary(gguf, hparams)
    return hparams


def _check_architecture(gguf: GGUFFile) -> None:
    found = gguf.architecture
    if found == ARCHITECTURE:
        return
    if found == "clip":
        raise GGUFError(
            f"{gguf.path}: this is an mmproj file (the image encoder), expected the text model",
            hint="pass the other file as the model and this one as `mmproj`",
        )
    raise GGUFError(
        f"{gguf.path}: architecture {found or 'not given'!r}, expected {ARCHITECTURE!r}",
        hint="qvl runs Qwen2-VL; see `qvl inspect` for what this file is",
    )


def _hparams(gguf: GGUFFile) -> TextHparams:
    get = _Reader(gguf)
    n_layer = get.size("block_count", most=_MAX_LAYERS)
    n_embd, n_head = get.size("embedding_length"), get.size("attention.head_count")
    n_head_kv = get.size("attention.head_count_kv", default=n_head)
    sections = get.sections("rope.dimension_sections")
    embedding = gguf.tensors.get("token_embd.weight")
    hparams = TextHparams(
        n_layer=n_layer,
        n_ctx_train=get.size("context_length", most=1 << 30),
        n_embd=n_embd,
        n_ff=get.size("feed_forward_length"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        rope_sections=sections,
        rope_freq_base=get.positive("rope.freq_base", default=1e4),
        rms_epsilon=get.positive("attention.layer_norm_rms_epsilon"),
        n_vocab=embedding.shape[0] if embedding is not None else 0,
    )
    if n_embd % n_head or n_head % n_head_kv:
        raise get.error(f"{n_embd} wide, {n_head} heads, {n_head_kv} of them for keys: these do not divide")
    head_dim = hparams.head_dim
    if 2 * sum(sections) != head_dim:
        raise get.error(f"rope sections {sections}, expected a sum of {head_dim / 2:g} (half a head)")
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if get.size(key, default=head_dim) != head_dim:
            raise get.error(f"{key} is {get.size(key)}, expected {head_dim} (embedding_length / head_count)")
    for key in ("expert_count", "expert_used_count", "nextn_predict_layers", "attention.sliding_window"):
        if gguf.metadata.get(f"{ARCHITECTURE}.{key}", 0) != 0:
            raise get.error(f"{key} is set, which Qwen2-VL does not have")
    scaling = gguf.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALING:
        raise get.error(f"rope.scaling.type is {scaling!r}, expected one of {sorted(_ROPE_SCALING)}")
    return hparams


class _Reader:
    """Metadata values of the architecture, checked for kind and bounds."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf

    def error(self, what: str) -> GGUFError:
        return GGUFError(f"{self.gguf.path}: {what}", hint=_DAMAGED)

    def size(self, key: str, *, default: int | None = None, most: int = _MAX_SIZE) -> int:
        value = self.gguf.metadata.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise self.error(f"{ARCHITECTURE}.{key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise self.error(f"{ARCHITECTURE}.{key} is {value!r}, expected a whole number from 1 to {most}")
        return value

    def positive(self, key: str, *, default: float | None = None) -> float:
        value = self.gguf.metadata.get(f"{ARCHITECTURE}.{key}", default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self.error(f"{ARCHITECTURE}.{key} is {value!r}, expected a positive number")
        return value

    def sections(self, key: str) -> tuple[int, int, int]:
        value = self.gguf.metadata.get(f"{ARCHITECTURE}.{key}")
        if (
            not isinstance(value, list)
            or len(value) not in (3, 4)
            or not all(isinstance(n, int) and 0 <= n <= _MAX_SIZE for n in value)
            or any(value[3:])
            or min(value[:3]) == 0
        ):
            raise self.error(f"{ARCHITECTURE}.{key} is {value!r}, expected three positive numbers and a zero")
        return value[0], value[1], value[2]


def _expected(h: TextHparams) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (rows first) of the tensors that must be there."""
    n_kv = h.n_head_kv * h.head_dim
    yield "token_embd.weight", (h.n_vocab, h.n_embd)
    yield "output_norm.weight", (h.n_embd,)
    layer: Mapping[str, tuple[int, ...]] = {
        "attn_norm.weight": (h.n_embd,),
        "attn_q.weight": (h.n_embd, h.n_embd),
        "attn_q.bias": (h.n_embd,),
        "attn_k.weight": (n_kv, h.n_embd),
        "attn_k.bias": (n_kv,),
        "attn_v.weight": (n_kv, h.n_embd),
        "attn_v.bias": (n_kv,),
        "attn_output.weight": (h.n_embd, h.n_embd),
        "ffn_norm.weight": (h.n_embd,),
        "ffn_gate.weight": (h.n_ff, h.n_embd),
        "ffn_up.weight": (h.n_ff, h.n_embd),
        "ffn_down.weight": (h.n_embd, h.n_ff),
    }
    for i in range(h.n_layer):
        for name, shape in layer.items():
            yield f"blk.{i}.{name}", shape


def _check_tensors(gguf: GGUFFile, hparams: TextHparams) -> None:
    expected = dict(_expected(hparams))
    if "output.weight" in gguf.tensors:  # an untied head, as the 7B model has
        expected["output.weight"] = (hparams.n_vocab, hparams.n_embd)
    missing, extra = expected.keys() - gguf.tensors.keys(), gguf.tensors.keys() - expected.keys()
    for names, what in ((missing, "are missing"), (extra, "do not belong to Qwen2-VL")):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise GGUFError(f"{gguf.path}: {len(names)} tensors {what}: {some}", hint=_DAMAGED)
    for name, shape in expected.items():
        _check_tensor(gguf, gguf.tensors[name], shape)


def _check_tensor(gguf: GGUFFile, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        found, wanted = list(tensor.shape), list(shape)
        raise GGUFError(f"{gguf.path}: tensor {tensor.name} is {found}, expected {wanted}", hint=_DAMAGED)
    # ggml adds and multiplies vectors of F32 only; anything that is not a weight type has no product
    if (len(shape) == 1 and tensor.type is not Type.F32) or tensor.type in _NOT_WEIGHTS:
        name, kind = tensor.name, "F32" if len(shape) == 1 else "a float or quantized type"
        raise GGUFError(f"{gguf.path}: tensor {name} is {tensor.type.name}, expected {kind}", hint=_DAMAGED)


def _check_vocabulary(gguf: GGUFFile, hparams: TextHparams) -> None:
    def error(what: str) -> GGUFError:
        return GGUFError(f"{gguf.path}: {what}", hint=_DAMAGED)

    if (model := gguf.metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise error(f"tokenizer.ggml.model is {model!r}, expected 'gpt2' (byte-level BPE)")
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    if len(tokens) != hparams.n_vocab:
        raise error(f"{len(tokens)} tokens for an embedding of {hparams.n_vocab} rows")
    if len(set(tokens)) != len(tokens):
        raise error("tokenizer.ggml.tokens has the same token twice")
    kinds = gguf.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or {*map(type, kinds)} - {int}:
        raise error(f"tokenizer.ggml.token_type does not have a number for each of {len(tokens)} tokens")


def _strings(gguf: GGUFFile, key: str) -> list[Any]:
    value = gguf.metadata.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise GGUFError(f"{gguf.path}: {key} is not a list of strings", hint=_DAMAGED)
    return value
