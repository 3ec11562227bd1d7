"""Options of a reply: their names, types and defaults, for every function that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypedDict, TypeVar

from qvl.runtime.engine.reply import StageProgress

MAX_TOKENS: Final = 1024
F = TypeVar("F", bound=Callable[..., Any])


class ReplyOptions(TypedDict, total=False):
    """Options of `Model.generate`, which documents them, `Model.ask` and `Session.generate`."""

    max_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    stop: Sequence[str]
    grammar: str | None
    schema: Mapping[str, Any] | str | None
    number_images: bool
    progress: StageProgress | None


DEFAULTS: Final = ReplyOptions(
    max_tokens=MAX_TOKENS,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    repeat_penalty=None,
    presence_penalty=None,
    seed=None,
    stop=(),
    grammar=None,
    schema=None,
    number_images=False,
    progress=None,
)


def with_defaults(options: ReplyOptions) -> ReplyOptions:
    """All options, those that are absent by their defaults.

    Raises:
        TypeError: an unknown one.
    """
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(f"unexpected keyword argument {name!r}, expected one of {', '.join(DEFAULTS)}")
    return ReplyOptions(**{**DEFAULTS, **options})


def explicit(function: F) -> F:
    """Spell out `**options: Unpack[ReplyOptions]` in the signature that `help` and notebooks show."""
    shown = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=DEFAULTS[name],  # type: ignore[literal-required]
            annotation=getattr(kind, "__forward_arg__", kind),
        )
        for name, kind in ReplyOptions.__annotations__.items()
    ]
    signature = inspect.signature(function)
    *kept, _ = signature.parameters.values()
    function.__signature__ = signature.replace(parameters=[*kept, *shown])  # type: ignore[attr-defined]
    return function
