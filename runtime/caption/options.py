"""Options of a captioning run, in one value that can be compared, pickled and sent to other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

from qvl.runtime.caption.assemble import Wording
from qvl.runtime.caption.prompts import Prompts, Template, Variables
from qvl.runtime.caption.settings import Settings, model_identity, schema_identity, small_file_identity
from qvl.runtime.detail.bounds import Bounds, Detail
from qvl.runtime.errors import InputError, check_choice, check_path, check_text, check_whole, shown
from qvl.runtime.files import parse_json
from qvl.runtime.grammar.schema import read_schema, schema_to_grammar
from qvl.runtime.llama.sampler import Sampling

MAX_TOKENS: Final = 256
MAX_IMAGE_TOKENS: Final = 1280
"""Larger pictures are shrunk to so many tokens unless other bounds are given: Qwen's own advice for
a balance of cost and detail (model card of Qwen2-VL, "Image Resolution for performance boost"), and what
keeps the memory of a run small. A model whose own bound is lower keeps it."""


@dataclass(frozen=True)
class CaptionOptions:
    """Everything apart from the model that decides the captions. `qvl.runtime.caption` takes the same names.

    Attributes:
        prompt: a template, see `Template`; None asks to describe the image, or the video, or uses the words
            by which the model has learned to caption (`PromptRules.caption`).
        variables: CSV file with columns for the template.
        system: the system prompt; None leaves the model's default.
        prefix, suffix: put around every caption.
        triggers: words that every caption must have; those that it lacks are put before it.
        start_with: the beginning of every caption; the model continues it.
        schema: JSON schema that every caption must fit, or its file.
        samples: captions of each picture.
        max_tokens: longest caption.
        sampling: temperature, top_k, top_p, min_p and the penalties; the model's own where they are absent.
        seed: each picture's own seed derives from it and from the picture's content.
        min_pixels, max_pixels: bounds of a picture's area after resizing.
        image_detail: "low", "auto" or "high" in place of max_pixels; see `qvl.runtime.detail.bounds`.

    Raises:
        InputError: a value of another type or out of bounds.
    """

    prompt: str | None = None
    variables: Path | None = None
    system: str | None = None
    prefix: str = ""
    suffix: str = ""
    triggers: Sequence[str] = ()
    start_with: str = ""
    schema: Path | Mapping[str, Any] | None = None
    samples: int = 1
    max_tokens: int = MAX_TOKENS
    sampling: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_detail: Detail | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "min_pixels", "max_pixels"):
            if getattr(self, name) is not None or name in ("samples", "max_tokens"):
                check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
        for name in ("prompt", "system", "prefix", "suffix", "start_with"):
            if getattr(self, name) is not None or name not in ("prompt", "system"):
                check_text(name, getattr(self, name))
        if not isinstance(self.triggers, list | tuple):
            raise InputError(f"triggers are {shown(self.triggers)}, expected a list of words")
        for trigger in self.triggers:
            check_text("a trigger", trigger)
        if self.image_detail is not None:
            check_choice("image_detail", self.image_detail, get_args(Detail))
        Sampling().override(**self.sampling)
        # A space at the end of the start would be a token of its own, which no text was trained on.
        object.__setattr__(self, "start_with", self.start_with.rstrip())

    def settings(self, text: Path, mmproj: Path | None) -> Settings:
        """The settings that a file of results keeps, by the names of the flags.

        Raises:
            InputError: a file that cannot be read.
        """
        found = {
            "model": model_identity(text),
            "mmproj": model_identity(mmproj) if mmproj else None,
            "prompt": self.prompt,
            "vars": small_file_identity(self.variables) if self.variables else None,
            "system": self.system,
            "prefix": self.prefix,
            "suffix": self.suffix,
            "trigger": list(self.triggers),
            "start-with": self.start_with,
            "schema": schema_identity(self.schema) if self.schema else None,
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
        """The grammar of captions in JSON. Raises InputError for a schema that cannot be used."""
        if self.schema is None:
            return None
        return schema_to_grammar(read_schema(self.schema) if isinstance(self.schema, Path) else self.schema)

    @property
    def bounds(self) -> Bounds:
        """Bounds of every picture's area."""
        return Bounds(self.min_pixels, self.max_pixels, self.image_detail, MAX_IMAGE_TOKENS)

    @property
    def wording(self) -> Wording:
        return Wording(self.prefix, self.suffix, self.triggers, self.start_with)


def schema_of(given: Any) -> Path | Mapping[str, Any] | None:
    """A schema as `CaptionOptions` takes it, from a file's name, a mapping or JSON text.

    Raises:
        InputError: something else.
    """
    if given is None or isinstance(given, Mapping):
        schema: Mapping[str, Any] | None = given
        return schema
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            found: Mapping[str, Any] = parse_json(given)
        except (ValueError, RecursionError) as e:
            raise InputError(f"schema is {shown(given)}: not JSON: {e}") from e
        return found
    return check_path("schema", given)
