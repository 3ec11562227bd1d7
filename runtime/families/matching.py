"""Family of a text file, and the check that it and an image encoder belong together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from qvl.runtime.errors import GGUFError
from qvl.runtime.families.table import FAMILIES, Family
from qvl.runtime.llama.architectures import TextHparams
from qvl.runtime.prompt.rules import PromptRules


def family_of(text: Mapping[str, Any], vision: Family | None = None) -> Family | None:
    """The family of a text file: the encoder's where there is one, as several families share an architecture.

    Args:
        text: metadata of the text file.
        vision: the encoder's family.
    """
    if vision is not None:
        return vision
    named = next((family for family in FAMILIES if family.name == text.get("qvl.family")), None)
    architecture = text.get("general.architecture")
    return named or next((family for family in FAMILIES if architecture in family.architectures), None)


class TextFile(Protocol):
    """A text model (`qvl.runtime.llama.model.LlamaModel`)."""

    path: Path
    metadata: Mapping[str, Any]
    hparams: TextHparams


class Encoder(Protocol):
    """An image encoder (`qvl.runtime.vision.encoder.VisionEncoder`)."""

    path: Path
    metadata: Mapping[str, Any]
    family: Family

    @property
    def n_embd(self) -> int:
        """Width of an embedding row."""


def rules_of(text: TextFile, vision: Encoder | None) -> PromptRules:
    """The family's rules for prompts.

    Raises:
        GGUFError: the two files do not belong together.
    """
    if vision is not None:
        _check_pair(text, vision)
    family = family_of(text.metadata, vision.family if vision is not None else None)
    if family is None:
        return PromptRules()
    rules: PromptRules = family.prompt.rules(text.metadata, vision.metadata if vision is not None else {})
    return rules


def _check_pair(text: TextFile, vision: Encoder) -> None:
    hint = "the mmproj belongs to another model"
    family, architecture = vision.family, text.metadata.get("general.architecture")
    name = text.metadata.get("qvl.family")
    if architecture not in family.architectures or name not in (None, family.name):
        found = f"{architecture!r}" if name is None else f"{architecture!r} of {name}"
        wanted = " or ".join(map(repr, family.architectures))
        raise GGUFError(
            f"{vision.path}: an image encoder of {family.title}, whose text models have architecture "
            f"{wanted}; {text.path.name} is {found}",
            hint=hint,
        )
    if vision.n_embd != text.hparams.n_embd_inp:
        message = f"{vision.path}: gives embeddings {vision.n_embd} wide"
        raise GGUFError(f"{message}, {text.path.name} takes {text.hparams.n_embd_inp}", hint=hint)
