"""What a captioning run is asked for, in one value that can be compared, pickled and sent elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qvl.runtime.caption.assemble import Wording
from qvl.runtime.caption.prompts import Prompts, Template, Variables
from qvl.runtime.caption.settings import Settings, file_identity, model_identity
from qvl.runtime.detail.bounds import Bounds, Detail
from qvl.runtime.errors import InputError
from qvl.runtime.grammar.schema import read_schema, schema_to_grammar

MAX_TOKENS: Final = 256
MAX_IMAGE_TOKENS: Final = 1280
"""Larger pictures are shrunk to so many tokens unless other bounds are given: Qwen's own advice for
a balance of cost and detail (model card of Qwen2-VL, "Image Resolution for performance boost"), and what
keeps the memory of a run small. A model whose own bound is lower keeps it."""


@dataclass(frozen=True)
class CaptionOptions:
    """Everything that decides what captions say, but for the model.

    Attributes:
        prompt: a template, see `Template`; None asks to describe the image, or the video,
            in the words that the model has learned, if it has (`PromptRules.caption`).
        variables: CSV file of its columns.
        sampling: temperature, top_k, top_p, min_p, repeat_penalty; what is absent is the model's own.
        seed: each picture's own seed derives from it and from the picture's content.
        schema: JSON schema file that every caption must fit.
        image_detail: in place of max_pixels, see `qvl.runtime.detail.bounds`.
    """

    prompt: str | None = None
    variables: Path | None = None
    system: str | None = None
    prefix: str = ""
    suffix: str = ""
    triggers: tuple[str, ...] = ()
    start_with: str = ""
    schema: Path | None = None
    samples: int = 1
    max_tokens: int = MAX_TOKENS
    sampling: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_detail: Detail | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        # A space at the end of what the model continues is a token of its own, which no text was trained on.
        object.__setattr__(self, "start_with", self.start_with.rstrip())

    def settings(self, text: Path, mmproj: Path | None) -> Settings:
        """What a file of results remembers, by the names of the flags.

        Raises:
            InputError: a file that cannot be read.
        """
        found = {
            "model": model_identity(text),
            "mmproj": model_identity(mmproj) if mmproj else None,
            "prompt": self.prompt,
            "vars": file_identity(self.variables) if self.variables else None,
            "system": self.system,
            "prefix": self.prefix,
            "suffix": self.suffix,
            "trigger": list(self.triggers),
            "start-with": self.start_with,
            "schema": file_identity(self.schema) if self.schema else None,
            "samples": self.samples,
            "max-tokens": self.max_tokens,
            **{name.replace("_", "-"): value for name, value in self.sampling.items()},
            "seed": self.seed,
            "min-pixels": self.min_pixels,
            "max-pixels": self.max_pixels,
            "image-detail": self.image_detail,
        }
        return {name: value for name, value in found.items() if value not in (None, "", [])}

    def prompts(self, caption: str | None = None) -> Prompts:
        """The prompt of every picture. Raises InputError for a template or table that does not fit.

        Args:
            caption: the words by which the model has learned to caption a picture, if it has
                (`PromptRules.caption`); they stand in where no prompt was given.
        """
        variables = Variables.read(self.variables) if self.variables else None
        columns = variables.columns if variables else ()
        template = None if self.prompt is None else Template(self.prompt, columns)
        return Prompts(template, variables, caption=caption)

    def grammar(self) -> str | None:
        """What captions in JSON are held to. Raises InputError for a schema that cannot be used."""
        return schema_to_grammar(read_schema(self.schema)) if self.schema else None

    @property
    def bounds(self) -> Bounds:
        """Bounds of every picture's area."""
        return Bounds(self.min_pixels, self.max_pixels, self.image_detail, MAX_IMAGE_TOKENS)

    @property
    def wording(self) -> Wording:
        return Wording(self.prefix, self.suffix, self.triggers, self.start_with)
