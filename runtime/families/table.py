"""The one list of model families, read by conversion and runtime alike.

A family is a row here, `families/NAME/tower.py` (the image encoder), `families/NAME/prompt.py` (what
pictures and videos become in a prompt) and `qvl.convert.families.NAME` (its checkpoints). Modules are
imported when needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Final


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: folder, and `model.family`.
        title: the name that people know.
        model_types: `model_type` in config.json.
        architectures: `general.architecture` of text GGUF files.
        projector: `clip.projector_type` of vision GGUF files.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    projector: str

    @property
    def tower(self) -> ModuleType:
        """`qvl.runtime.families.NAME.tower`."""
        return import_module(f"qvl.runtime.families.{self.name}.tower")

    @property
    def prompt(self) -> ModuleType:
        """`qvl.runtime.families.NAME.prompt`."""
        return import_module(f"qvl.runtime.families.{self.name}.prompt")


FAMILIES: Final = (
    Family("qwen_vl", "Qwen-VL", ("qwen",), ("qwen2",), "qwenvl_resampler"),
    Family("qwen2_vl", "Qwen2-VL", ("qwen2_vl",), ("qwen2vl",), "qwen2vl_merger"),
    Family("qwen2_5_vl", "Qwen2.5-VL", ("qwen2_5_vl",), ("qwen2vl",), "qwen2.5vl_merger"),
    Family("qwen3_vl", "Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"), ("qwen3vl", "qwen3vlmoe"), "qwen3vl_merger"),
)


def of_projector(projector: object) -> Family | None:
    """The family whose vision files have this `clip.projector_type`."""
    return next((family for family in FAMILIES if family.projector == projector), None)


def of_model_type(model_type: object) -> Family | None:
    """The family whose checkpoints have this `model_type`."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def named(name: str) -> Family:
    """The family of a name.

    Raises:
        KeyError: no such family.
    """
    return {family.name: family for family in FAMILIES}[name]
