"""Hugging Face tensor names to GGUF ones, with the cuts that GGUF's layout wants.

The list of tensors is made from the hyperparameters, not from the file: so what a checkpoint lacks and
what it has too much are both known, as sets. Names and cuts are those of llama.cpp's converter
(conversion/qwenvl.py): attn.qkv is cut into q, k and v; the patch embedding, a convolution over two
frames, is cut into one kernel a frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from qvl.convert.checkpoint import TensorEntry
from qvl.convert.config import ModelConfig, TextConfig, VisionConfig
from qvl.runtime.errors import CheckpointError

# transformers' class names differ by version; the published names come first in each pair.
PREFIXES: Final = (("model.visual.", "visual."), ("model.language_model.", "model."))
# Rotary tables that old versions saved: recomputed from the hyperparameters.
DERIVED: Final = re.compile(r"\.(rotary_emb|rotary_pos_emb)\.inv_freq$")
HEAD: Final = "lm_head.weight"

TEXT_BLOCK: Final = (
    ("input_layernorm.weight", "attn_norm.weight", ("hidden",)),
    ("self_attn.q_proj.weight", "attn_q.weight", ("hidden", "hidden")),
    ("self_attn.q_proj.bias", "attn_q.bias", ("hidden",)),
    ("self_attn.k_proj.weight", "attn_k.weight", ("kv", "hidden")),
    ("self_attn.k_proj.bias", "attn_k.bias", ("kv",)),
    ("self_attn.v_proj.weight", "attn_v.weight", ("kv", "hidden")),
    ("self_attn.v_proj.bias", "attn_v.bias", ("kv",)),
    ("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "hidden")),
    ("post_attention_layernorm.weight", "ffn_norm.weight", ("hidden",)),
    ("mlp.gate_proj.weight", "ffn_gate.weight", ("inner", "hidden")),
    ("mlp.up_proj.weight", "ffn_up.weight", ("inner", "hidden")),
    ("mlp.down_proj.weight", "ffn_down.weight", ("hidden", "inner")),
)
VISION_BLOCK: Final = (
    ("norm1", "ln1", ("dim",)),
    ("attn.proj", "attn_out", ("dim", "dim")),
    ("norm2", "ln2", ("dim",)),
    ("mlp.fc1", "ffn_up", ("mlp", "dim")),
    ("mlp.fc2", "ffn_down", ("dim", "mlp")),
)
MERGER: Final = (
    ("merger.ln_q", "v.post_ln", ("dim",)),
    ("merger.mlp.0", "mm.0", ("merged", "merged")),
    ("merger.mlp.2", "mm.2", ("out", "merged")),
)


@dataclass(frozen=True)
class Mapped:
    """One tensor to write.

    Attributes:
        name: in the GGUF file.
        shape: in the GGUF file, rows first.
        source: the canonical name in the checkpoint.
        source_shape: what the checkpoint's tensor must have.
        row: first row of the source that belongs here (parts of attn.qkv).
        frame: which frame of the patch embedding, or None.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    source_shape: tuple[int, ...]
    row: int = 0
    frame: int | None = None

    @property
    def n_per_row(self) -> int:
        return self.shape[-1]

    @property
    def n_elements(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class TensorMap:
    """Every tensor of both files, and the checkpoint's tensors by canonical name."""

    text: tuple[Mapped, ...]
    vision: tuple[Mapped, ...]
    entries: Mapping[str, TensorEntry]
    ignored: tuple[str, ...]


def canonical(name: str) -> str:
    """The published name for any version's name."""
    for prefix, published in PREFIXES:
        if name.startswith(prefix):
            return published + name[len(prefix) :]
    return name


def text_tensors(config: TextConfig) -> Iterator[Mapped]:
    """The decoder's tensors in file order."""
    sizes = {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "kv": config.num_key_value_heads * config.head_dim,
    }
    table = (config.vocab_size, config.hidden_size)
    yield Mapped("token_embd.weight", table, "model.embed_tokens.weight", table)
    for i in range(config.num_hidden_layers):
        for source, name, dims in TEXT_BLOCK:
            shape = tuple(sizes[d] for d in dims)
            yield Mapped(f"blk.{i}.{name}", shape, f"model.layers.{i}.{source}", shape)
    norm = (config.hidden_size,)
    yield Mapped("output_norm.weight", norm, "model.norm.weight", norm)
    if not config.tie_word_embeddings:
        yield Mapped("output.weight", table, HEAD, table)


def vision_tensors(config: VisionConfig) -> Iterator[Mapped]:
    """The image encoder's and merger's tensors in file order."""
    dim = config.embed_dim
    sizes = {
        "dim": dim,
        "mlp": config.mlp_size,
        "merged": dim * config.spatial_merge_size**2,
        "out": config.hidden_size,
    }
    kernel = (dim, config.in_channels, config.patch_size, config.patch_size)
    conv = (*kernel[:2], config.temporal_patch_size, *kernel[2:])
    for frame, suffix in enumerate(("", ".1")):
        name = f"v.patch_embd.weight{suffix}"
        yield Mapped(name, kernel, "visual.patch_embed.proj.weight", conv, frame=frame)
    for i in range(config.depth):
        block, out = f"visual.blocks.{i}.", f"v.blk.{i}."
        for part, letter in enumerate("qkv"):
            for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
                whole = (3 * dim, *shape[1:])
                yield Mapped(
                    f"{out}attn_{letter}.{kind}", shape, f"{block}attn.qkv.{kind}", whole, row=part * dim
                )
        yield from _pairs(VISION_BLOCK, block, out, sizes)
    yield from _pairs(MERGER, "visual.", "", sizes)


def _pairs(
    rules: tuple[tuple[str, str, tuple[str, ...]], ...], block: str, out: str, sizes: Mapping[str, int]
) -> Iterator[Mapped]:
    """A weight and a bias for every rule; the bias is as long as the weight has rows."""
    for source, name, dims in rules:
        shape = tuple(sizes[d] for d in dims)
        yield Mapped(f"{out}{name}.weight", shape, f"{block}{source}.weight", shape)
        yield Mapped(f"{out}{name}.bias", shape[:1], f"{block}{source}.bias", shape[:1])


def map_tensors(config: ModelConfig, tensors: Mapping[str, TensorEntry], where: str) -> TensorMap:
    """Match a checkpoint's tensors with the files to write.

    Args:
        tensors: the checkpoint's, by any version's name.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: tensors left over or missing (both named), two names for one tensor, or a shape
            other than the hyperparameters say.
    """
    text, vision = tuple(text_tensors(config.text)), tuple(vision_tensors(config.vision))
    wanted = {mapped.source: mapped.source_shape for mapped in (*text, *vision)}
    entries: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        if (known := canonical(name)) in entries:
            raise CheckpointError(f"{where}: {name!r} and {entries[known].name!r} are the same tensor")
        entries[known] = entry
    # A tied head that was saved as well is a copy: transformers does not read it either.
    ignorable = {n for n in entries if DERIVED.search(n) or (n == HEAD and config.text.tie_word_embeddings)}
    left_over, missing = entries.keys() - wanted.keys() - ignorable, wanted.keys() - entries.keys()
    if left_over or missing:
        parts = [f"{len(s)} tensors {w}: {_some(s)}" for w, s in
                 (("left over", left_over), ("missing", missing)) if s]  # fmt: skip
        raise CheckpointError(
            f"{where}: " + "; ".join(parts),
            hint="config.json and the weights do not belong together, or this is another architecture",
        )
    for source, shape in wanted.items():
        if entries[source].shape != shape:
            raise CheckpointError(
                f"{where}: {source} has shape {list(entries[source].shape)}, "
                f"expected {list(shape)} by config.json"
            )
    return TensorMap(text, vision, entries, tuple(sorted(ignorable)))


def _some(names: set[str], limit: int = 40) -> str:
    """Names in order, a long set cut short with its count."""
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return "{" + ", ".join(listed[:limit]) + "}" + rest
