"""Checks of a text GGUF's header before llama.cpp opens it.

llama.cpp answers some damage with an exception and some with an assertion that ends the process, or reads
beyond an array. So everything its loader and its graph take for granted is checked here, on the header
alone, by the row of its architecture (`architectures`).
"""

from __future__ import annotations

from typing import Any, Final

from qvl.runtime.errors import GGUFError
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo
from qvl.runtime.ggml.library import Type
from qvl.runtime.llama.architectures import ARCHITECTURES, KEYS, MAX_SIZE, Architecture, Key, TextHparams
from qvl.runtime.llama.vocab import END_TOKENS

# arrays that are checked here; the merges, as long as the tokens, llama.cpp checks well enough
ARRAYS: Final = (
    *(f"{name}.{key}" for name in ARCHITECTURES for key in (*KEYS, "rope.dimension_sections")),
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", END_TOKENS,
)  # fmt: skip
_NOT_WEIGHTS: Final = frozenset({Type.I8, Type.I16, Type.I32, Type.I64, Type.F64})
_DAMAGED: Final = "the file is damaged or was made by a broken converter: download or convert it again"


def check_text_file(gguf: GGUFFile) -> TextHparams:
    """Refuse a file that llama.cpp could not run, or not survive; it was read with the arrays `ARRAYS`.

    Raises:
        GGUFError: another architecture, metadata missing or out of bounds, tensors missing, left over or
            of another shape or type than the metadata says, a vocabulary that does not fit.
    """
    hparams = _hparams(gguf, _architecture(gguf))
    _check_tensors(gguf, hparams)
    _check_vocabulary(gguf, hparams)
    return hparams


def _architecture(gguf: GGUFFile) -> Architecture:
    found = gguf.architecture
    if found in ARCHITECTURES:
        return ARCHITECTURES[found]
    if found == "clip":
        raise GGUFError(
            f"{gguf.path}: this is an mmproj file (the image encoder), expected the text model",
            hint="pass the other file as the model and this one as `mmproj`",
        )
    known = ", ".join(map(repr, ARCHITECTURES))
    raise GGUFError(
        f"{gguf.path}: architecture {found or 'not given'!r}, expected one of {known}",
        hint="qvl runs Qwen's vision models; see `qvl inspect` for what this file is",
    )


def _hparams(gguf: GGUFFile, architecture: Architecture) -> TextHparams:
    keys = {**KEYS, **architecture.keys}
    values: dict[str, Any] = {name: _value(gguf, architecture, name, key) for name, key in keys.items()}
    n_embd, n_head = values["embedding_length"], values["attention.head_count"]
    n_head_kv = values["attention.head_count_kv"] or n_head
    embedding = gguf.tensors.get("token_embd.weight")
    hparams = TextHparams(
        architecture=architecture,
        n_layer=values["block_count"],
        n_ctx_train=values["context_length"],
        n_embd=n_embd,
        n_ff=values["feed_forward_length"],
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=_head_dim(architecture, values),
        rope_sections=_sections(gguf, architecture),
        rope_freq_base=values["rope.freq_base"] or 1e4,
        rms_epsilon=values["attention.layer_norm_rms_epsilon"],
        n_vocab=embedding.shape[0] if embedding is not None else 0,
        n_deepstack=values["n_deepstack_layers"] or 0,
        n_expert=values["expert_count"] or 0,
        n_expert_used=values["expert_used_count"] or 0,
        n_ff_exp=values["expert_feed_forward_length"] or 0,
    )
    _check_sizes(gguf, hparams, values)
    return hparams


def _head_dim(architecture: Architecture, values: dict[str, Any]) -> int:
    shared: int = max(1, values["embedding_length"] // values["attention.head_count"])
    return (values["attention.key_length"] or shared) if architecture.own_head else shared


def _value(gguf: GGUFFile, architecture: Architecture, name: str, key: Key) -> Any:
    full = f"{architecture.name}.{name}"
    value = gguf.metadata.get(full)
    if value is None and key.required:
        raise _error(gguf, f"{full} is missing")
    if value is not None and not key.accepts(value):
        raise _error(gguf, f"{full} is {value!r:.80}, expected {key.expected}")
    return value


def _sections(gguf: GGUFFile, architecture: Architecture) -> tuple[int, ...]:
    if architecture.position_rows == 1:
        return ()
    key = f"{architecture.name}.rope.dimension_sections"
    value = gguf.metadata.get(key)
    if (
        not isinstance(value, list)
        or len(value) not in (3, 4)
        or not all(type(n) is int and 0 <= n <= MAX_SIZE for n in value)
        or any(value[3:])
        or min(value[:3]) == 0
    ):
        raise _error(gguf, f"{key} is {value!r:.80}, expected three positive numbers and a zero")
    return tuple(value[:3])


def _check_sizes(gguf: GGUFFile, h: TextHparams, values: dict[str, Any]) -> None:
    """Check what the sizes must be to each other."""
    shared, own = h.n_embd / h.n_head, h.architecture.own_head
    if h.n_head % h.n_head_kv or (not own and h.n_embd % h.n_head):
        heads = f"{h.n_embd} wide, {h.n_head} heads, {h.n_head_kv} of them for keys"
        raise _error(gguf, f"{heads}: these do not divide")
    expected: dict[str, float] = {
        # llama.cpp takes embedding_length / head_count for a missing length, of keys and values alike
        "attention.key_length": h.head_dim if values["attention.value_length"] else shared,
        "attention.value_length": h.head_dim,
        "rope.dimension_count": h.head_dim,
        "attention.key_length_swa": h.head_dim,
        "attention.value_length_swa": h.head_dim,
        "rope.dimension_count_swa": h.head_dim,
        "embedding_length_out": h.n_embd,
    }
    for name, size in expected.items():
        if values[name] not in (None, size):
            raise _error(gguf, f"{h.architecture.name}.{name} is {values[name]}, expected {size:g}")
    if h.head_dim % 2:
        raise _error(gguf, f"a head is {h.head_dim} wide, expected an even number")
    if h.rope_sections and 2 * sum(h.rope_sections) != h.head_dim:
        half = f"expected a sum of {h.head_dim / 2:g} (half a head)"
        raise _error(gguf, f"rope sections {h.rope_sections}, {half}")
    if h.architecture.name == "qwen" and (h.n_ff % 2 or h.n_head_kv != h.n_head):
        raise _error(
            gguf, f"feed_forward_length is {h.n_ff}, expected an even number; one key per query head"
        )
    if h.n_expert_used > h.n_expert:
        raise _error(gguf, f"{h.n_expert_used} experts are used of {h.n_expert}")
    if h.n_deepstack >= h.n_layer:  # the last layer's output has the rows of the sampled tokens alone
        raise _error(gguf, f"{h.n_deepstack} deepstack layers of {h.n_layer}, expected fewer")


def _check_tensors(gguf: GGUFFile, hparams: TextHparams) -> None:
    expected = dict(hparams.architecture.tensors(hparams))
    if "output.weight" in gguf.tensors:  # an untied head, as the 7B model has
        expected["output.weight"] = (hparams.n_vocab, hparams.n_embd)
    missing, extra = expected.keys() - gguf.tensors.keys(), gguf.tensors.keys() - expected.keys()
    for names, what in (
        (missing, "are missing"),
        (extra, f"do not belong to architecture {hparams.architecture.name}"),
    ):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise GGUFError(f"{gguf.path}: {len(names)} tensors {what}: {some}", hint=_DAMAGED)
    for name, shape in expected.items():
        _check_tensor(gguf, gguf.tensors[name], shape)


def _check_tensor(gguf: GGUFFile, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        found, wanted = list(tensor.shape), list(shape)
        raise _error(gguf, f"tensor {tensor.name} is {found}, expected {wanted}")
    # ggml adds and multiplies vectors of F32 only; anything that is not a weight type has no product
    if (len(shape) == 1 and tensor.type is not Type.F32) or tensor.type in _NOT_WEIGHTS:
        name, kind = tensor.name, "F32" if len(shape) == 1 else "a float or quantized type"
        raise _error(gguf, f"tensor {name} is {tensor.type.name}, expected {kind}")


def _check_vocabulary(gguf: GGUFFile, hparams: TextHparams) -> None:
    if (model := gguf.metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise _error(gguf, f"tokenizer.ggml.model is {model!r:.80}, expected 'gpt2' (byte-level BPE)")
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise _error(gguf, "tokenizer.ggml.tokens is not a list of strings")
    if len(tokens) != hparams.n_vocab:
        raise _error(gguf, f"{len(tokens)} tokens for an embedding of {hparams.n_vocab} rows")
    if len(set(tokens)) != len(tokens):
        raise _error(gguf, "tokenizer.ggml.tokens has the same token twice")
    kinds = gguf.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or {*map(type, kinds)} - {int}:
        raise _error(
            gguf, f"tokenizer.ggml.token_type does not have a number for each of {len(tokens)} tokens"
        )
    ends = gguf.metadata.get(END_TOKENS, [])
    if not isinstance(ends, list) or {*map(type, ends)} - {int}:
        raise _error(gguf, f"{END_TOKENS} is {ends!r:.80}, expected a list of token ids")
    template = gguf.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise _error(gguf, f"tokenizer.chat_template is {template!r:.80}, expected text")


def _error(gguf: GGUFFile, what: str) -> GGUFError:
    return GGUFError(f"{gguf.path}: {what}", hint=_DAMAGED)
