"""config.json to the family of a checkpoint and its hyperparameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qvl.convert.checkpoint import read_json
from qvl.convert.family import conversion
from qvl.convert.hyperparameters import ModelConfig, Section, Yarn
from qvl.runtime.errors import CheckpointError
from qvl.runtime.families import table

__all__ = ["ModelConfig", "Yarn", "incomplete", "read_config"]


def read_config(folder: Path) -> ModelConfig:
    """Hyperparameters from `folder/config.json`, flat or nested.

    Raises:
        CheckpointError: the file is missing or damaged, another architecture, values out of range, weights
            that are
            quantized already.
    """
    path = folder / "config.json"
    if not path.is_file():
        hint = "pass the folder that holds the model's config.json"
        if (folder / "adapter_config.json").exists():
            hint = "this is an adapter: merge it into its base model and convert what that saves"
        raise CheckpointError(f"{path}: missing", hint=hint)
    values = read_json(path)
    family = table.of_model_type(values.get("model_type"))
    if family is None:
        known = ", ".join(kind for each in table.FAMILIES for kind in each.model_types)
        raise CheckpointError(
            f"{path}: model_type is {values.get('model_type')!r}, expected one of {known}",
            hint=f"checkpoints of {', '.join(each.title for each in table.FAMILIES)} can be converted",
        )
    _refuse_quantized(path, values)
    root = Section(path, "", values)
    try:
        config = replace(conversion(family).read(root), left_out=tuple(root.left_out))
        if config.vision.hidden_size != config.text.hidden_size:
            key = (
                "out_hidden_size"
                if "out_hidden_size" in (values.get("vision_config") or {})
                else "hidden_size"
            )
            raise CheckpointError(
                f"{path}: vision_config.{key} is {config.vision.hidden_size}, "
                f"expected the decoder's {config.text.hidden_size}"
            )
    except CheckpointError as error:
        error.hint = error.hint or incomplete(path, root.left_out)
        raise
    return config


def incomplete(path: Path, left_out: list[str] | tuple[str, ...]) -> str | None:
    """A hint for sizes that do not fit, where config.json leaves out some of them."""
    if not left_out:
        return None
    where = "text_config" if any(key.startswith("text_config.") for key in left_out) else path.name
    return (
        f"{where} is incomplete: it leaves out {', '.join(left_out)}, and transformers' defaults for these "
        "do not fit the rest"
    )


def _refuse_quantized(path: Path, values: dict[str, Any]) -> None:
    """Weights that another tool has quantized cannot be quantized again without loss."""
    for section in (values, values.get("text_config")):
        found = section.get("quantization_config") if isinstance(section, dict) else None
        if isinstance(found, dict):
            method = found.get("quant_method") or found.get("quant_algo") or "an unnamed method"
            bits = found.get("bits") or ("4" if found.get("load_in_4bit") else None)
            raise CheckpointError(
                f"{path}: the weights are quantized already, by {method}{f' to {bits} bits' if bits else ''}",
                hint="convert the checkpoint that these were made from, in BF16, F16 or F32",
            )
