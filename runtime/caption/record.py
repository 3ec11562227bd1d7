"""The record of one picture: its captions, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from qvl.runtime.errors import FormatError, shown
from qvl.runtime.files import as_json


@dataclass(frozen=True, slots=True)
class Record:
    """The result for one picture; a caption, or an error.

    Attributes:
        path: of the picture, as in `Item.path`.
        caption: the text for people, as it goes into the dataset (prefix and suffix included): where the
            model marked a box, its coordinates in pixels of the picture. None with an error.
        captions: all of them, when several samples were asked for; caption is the first.
        prompt: the words given with the picture.
        model: name of the text GGUF.
        prompt_tokens, completion_tokens: picture and words in, words out (of all samples).
        finish_reason: "stop" or "length" (of the first sample).
        seconds: from the picture's turn at the encoder to its last token.
        boxes: of the caption: {"label": …, "box": [left, top, right, bottom]} each, or "point": [x, y], or
            "quad": four of them; in pixels of the picture as it is shown.
        sha256: of the file's content.
        same_as: path of a picture with this content, captioned before, whose caption this is.
        error: why there is no caption.
        raw: the text as the model wrote it, markup of boxes included; None where that is the caption's.
    """

    path: str
    caption: str | None = None
    captions: tuple[str, ...] = ()
    prompt: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    seconds: float | None = None
    boxes: tuple[Mapping[str, Any], ...] = ()
    sha256: str | None = None
    same_as: str | None = None
    error: str | None = None
    raw: str | None = None

    def __repr__(self) -> str:
        what = f"error={shown(self.error)}" if self.failed else f"caption={shown(self.caption)}"
        return f"Record({self.path!r}, {what})"

    @property
    def failed(self) -> bool:
        """True if there is an error in place of a caption."""
        return self.error is not None

    def as_dict(self) -> dict[str, Any]:
        """The object of a line of JSONL: the fields that are known, and always the path and the caption."""
        found = {name: getattr(self, name) for name in FIELDS}
        return {k: v for k, v in found.items() if k in ("path", "caption") or (v is not None and v != ())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """The reverse of `as_dict`; fields that a user has added are left out.

        Raises:
            FormatError: this is no record.
        """
        known = {name: values[name] for name in FIELDS if values.get(name) is not None}
        path, caption, raw = (known.get(name) for name in ("path", "caption", "raw"))
        if not (isinstance(path, str) and isinstance(caption, str | None) and isinstance(raw, str | None)):
            raise FormatError('no record: "path" must be a text, "caption" and "raw" a text or null')
        for name in ("captions", "boxes"):
            if not isinstance(known.get(name, ()), list | tuple):
                raise FormatError(f'no record: "{name}" must be a list')
            known[name] = tuple(known.get(name, ()))
        return cls(**known)

    def as_json(self) -> str:
        """One line."""
        return as_json(self.as_dict())


FIELDS: Final = tuple(field.name for field in fields(Record))
