"""Matches a checkpoint's tensors with the rows to write.

The list of rows is made from the hyperparameters, not from the file: what a checkpoint lacks and what it
    has beyond them are both known, as sets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from qvl.convert.checkpoint import Checkpoint
from qvl.convert.config import incomplete
from qvl.convert.entries import DERIVED, HEAD, READABLE, TensorEntry
from qvl.convert.family import conversion
from qvl.convert.hyperparameters import ModelConfig
from qvl.convert.rows import Mapped
from qvl.runtime.errors import CheckpointError

# Prefixes that tools and versions of transformers put before a tensor's name, repeatedly: 5.5 doubled
# some (huggingface/transformers#45357), torch.compile and data parallel training leave theirs.
WRAPPERS: Final = ("model.", "language_model.", "_orig_mod.", "module.", "base_model.")
DECODER: Final = ("layers.", "embed_tokens.", "norm.")
# Tensors that change what the model computes, if they are there.
OWN: Final = re.compile(r"^(model\.|visual\.|transformer\.)")
ADAPTER: Final = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\.")
QUANTIZED: Final = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_scale(_inv|_2)?|weight_packed|(weight\.)?(absmax|quant_map|SCB)|quant_state\..*)$"
)
EMBEDDING: Final = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TensorMap:
    """Every tensor of both files, and the checkpoint's tensors by canonical name.

    Attributes:
        ignored: tensors that are not used, by canonical name.
        notes: what a person should know about the choice.
    """

    text: tuple[Mapped, ...]
    vision: tuple[Mapped, ...]
    entries: Mapping[str, TensorEntry]
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def canonical(name: str) -> str:
    """The name that rows call a tensor by: `visual.…`, `model.…` or `lm_head.weight`, whatever stands
    before it."""
    while prefix := next((each for each in WRAPPERS if name.startswith(each)), None):
        name = name[len(prefix) :]
    return f"model.{name}" if name.startswith(DECODER) else name


def map_tensors(config: ModelConfig, checkpoint: Checkpoint) -> TensorMap:
    """Match a checkpoint's tensors with the files to write.

    Raises:
        CheckpointError: tensors missing, or left over where they would change the result (all named), two
            names for one
            tensor, a shape other than the hyperparameters say, an adapter's or another quantizer's weights.
    """
    where, entries = str(checkpoint.folder), _by_name(checkpoint)
    config, notes = _choose_head(config, checkpoint, entries)
    family = conversion(config.family)
    text, vision = tuple(family.text_rows(config)), tuple(family.vision_rows(config))
    wanted = {mapped.source for mapped in (*text, *vision)}
    spare, missing = entries.keys() - wanted, wanted - entries.keys()
    ignored = {n for n in spare if DERIVED.search(n) or n == HEAD or not OWN.match(n)}
    _refuse_other_formats(where, spare)
    if missing or spare - ignored:
        # With a tensor missing, an unknown one may be the same under another name.
        left_over = {n for n in spare if not DERIVED.search(n) and n != HEAD} if missing else spare - ignored
        parts = [f"{len(s)} tensors {w}: {_some(s)}" for w, s in
                 (("left over", left_over), ("missing", missing)) if s]  # fmt: skip
        raise CheckpointError(f"{where}: " + "; ".join(parts), hint=_mismatch(config, checkpoint, missing))
    text = tuple(mapped.of(entries[mapped.source].shape) for mapped in text)
    for source, shape in {mapped.source: mapped.source_shape for mapped in (*text, *vision)}.items():
        entry = entries[source]
        if entry.shape != shape:
            raise CheckpointError(
                f"{where}: {source} has shape {list(entry.shape)}, expected {list(shape)} by config.json",
                hint=incomplete(checkpoint.folder / "config.json", config.left_out),
            )
        if entry.dtype not in READABLE:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} is {entry.dtype}, "
                f"expected one of {', '.join(READABLE)}",
                hint="convert the original checkpoint, not one that is already quantized",
            )
    return TensorMap(text, vision, entries, tuple(sorted(ignored)), notes)


def _by_name(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        if (known := canonical(name)) in entries:
            raise CheckpointError(
                f"{checkpoint.folder}: {name!r} and {entries[known].name!r} are the same tensor"
            )
        entries[known] = entry
    return entries


def _choose_head(
    config: ModelConfig, checkpoint: Checkpoint, entries: Mapping[str, TensorEntry]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Keep a head that differs from the embedding it is said to be tied to, as transformers 5 does
    (`tie_weights`)."""
    head, embedding = entries.get(HEAD), entries.get(EMBEDDING)
    if not config.text.tie_word_embeddings or head is None or embedding is None:
        return config, ()
    if head.shape == embedding.shape and checkpoint.same(head, embedding):
        return config, ()
    note = (
        f"{head.name} differs from the embedding, although config.json ties them (tie_word_embeddings): "
        "it is kept as a head of its own"
    )
    return replace(config, text=replace(config.text, tie_word_embeddings=False)), (note,)


def _refuse_other_formats(where: str, spare: set[str]) -> None:
    for pattern, what, hint in (
        (
            ADAPTER,
            "weights of an adapter",
            "merge the adapter into its base model and convert what that saves",
        ),
        (QUANTIZED, "weights that are quantized already", "convert the checkpoint that these were made from"),
    ):
        if found := {name for name in spare if pattern.search(name)}:
            raise CheckpointError(f"{where}: {what}: {_some(found, 3)}", hint=hint)


def _mismatch(config: ModelConfig, checkpoint: Checkpoint, missing: set[str]) -> str:
    if missing == {HEAD}:
        return (
            "config.json says that the head is a matrix of its own: if the model shares its embedding, "
            "set tie_word_embeddings to true there"
        )
    return incomplete(checkpoint.folder / "config.json", config.left_out) or (
        "config.json and the weights do not belong together, or this is another architecture"
    )


def _some(names: set[str], limit: int = 40) -> str:
    """Names in order, a long set cut short with its count."""
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return "{" + ", ".join(listed[:limit]) + "}" + rest
