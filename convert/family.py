"""Interface of a family's module, `qvl.convert.families.NAME`, which the table of families leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Protocol, cast

import numpy as np

from qvl.convert.hyperparameters import ModelConfig, Section
from qvl.convert.rows import Mapped
from qvl.runtime.families.table import Family

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float] | np.int32
Metadata = dict[str, Value]


class Conversion(Protocol):
    """The module of a family.

    Attributes:
        CONTROL_TOKENS: tokens without which the runtime cannot build a prompt.
        MIN_PIXELS, MAX_PIXELS, IMAGE_MEAN, IMAGE_STD: what the family publishes, for a checkpoint without
            preprocessor_config.json.
    """

    CONTROL_TOKENS: tuple[str, ...]
    MIN_PIXELS: int
    MAX_PIXELS: int
    IMAGE_MEAN: tuple[float, float, float]
    IMAGE_STD: tuple[float, float, float]

    def read(self, root: Section) -> ModelConfig:
        """Hyperparameters from config.json.

        Raises:
            CheckpointError: a value out of range, or one that GGUF cannot express.
        """

    def text_rows(self, config: ModelConfig) -> Iterator[Mapped]:
        """The decoder's tensors in file order; `output.weight` only for a model that is not tied."""

    def vision_rows(self, config: ModelConfig) -> Iterator[Mapped]:
        """The image encoder's tensors in file order."""

    def text_metadata(self, config: ModelConfig) -> Metadata:
        """Keys of the decoder's architecture."""

    def vision_metadata(self, config: ModelConfig) -> Metadata:
        """Keys `clip.*` and `qvl.*` of the image encoder, without those of the preprocessor."""


def conversion(family: Family) -> Conversion:
    """The family's module, imported when it is needed."""
    return cast(Conversion, import_module(f"qvl.convert.families.{family.name}"))
