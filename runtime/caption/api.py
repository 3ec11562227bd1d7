"""Captions from Python: `qvl.runtime.caption(model, paths)`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qvl.runtime.atomic import refuse_input
from qvl.runtime.caption.bookkeeping import Results
from qvl.runtime.caption.inputs import Item, find_inputs
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.options import MAX_TOKENS, CaptionOptions, schema_of
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.setup import MAX_PARALLEL, open_run
from qvl.runtime.caption.state import Mode
from qvl.runtime.caption.stdout import JsonLines
from qvl.runtime.detail.bounds import Detail
from qvl.runtime.errors import InputError, check_choice, check_path, check_whole, shown

if TYPE_CHECKING:
    from qvl.runtime.model import Model


def caption(
    model: Model,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    prompt: str | None = None,
    system: str | None = None,
    output: str | os.PathLike[str] | None = None,
    mode: Mode = "skip",
    accept_changes: bool = False,
    parallel: int | None = None,
    n_ctx: int | None = None,
    max_tokens: int = MAX_TOKENS,
    samples: int = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repeat_penalty: float | None = None,
    presence_penalty: float | None = None,
    seed: int = 0,
    schema: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    variables: str | os.PathLike[str] | None = None,
    prefix: str = "",
    suffix: str = "",
    triggers: Sequence[str] = (),
    start_with: str = "",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    image_detail: Detail | None = None,
) -> Iterator[Record]:
    """Caption pictures and videos, several at a time, in the order in which they are done.

    >>> for record in caption(model, "photos/", output="captions.jsonl"):  # doctest: +SKIP
    ...     print(record.path, record.caption or record.error)

    Some CPUs do so sooner with a model that was loaded with optimize="prefill".

    Args:
        paths: files, folders, globs, or `@list.txt` with one of these a line.
        prompt: a question about each picture; `{name}`, `{stem}`, `{dir}`, `{width}`, `{height}` and columns
            of `variables` are filled in. None asks to describe it.
        system: the system prompt; None leaves the model's default.
        output: a JSONL file, or a CSV file by its suffix; each record is safe on disk before it is yielded,
            and records that the file has are not made again.
        mode: for records that `output` has: "skip" them, "retry-errors", "overwrite" them, or "append" or
            "prepend" the new caption to the old one.
        accept_changes: continue a file that was begun with other settings.
        parallel: pictures at once; None chooses by memory and cores.
        n_ctx: KV cells that they share; None makes room for each.
        max_tokens: longest caption.
        samples: captions of each picture.
        temperature, top_k, top_p, min_p, repeat_penalty, presence_penalty: as for `Model.generate`.
        seed: each picture's own seed derives from it and from the picture's content.
        schema: JSON schema that every caption must fit: a mapping, JSON text, or a file.
        variables: a CSV file; one of its columns (path, file, …) names the picture.
        prefix, suffix: put around every caption.
        triggers: words that every caption must have; those that it lacks are put before it.
        start_with: the beginning of every caption; the model continues it.
        min_pixels, max_pixels: bounds of a picture's area after resizing.
        image_detail: "low", "auto" or "high" in place of max_pixels.

    Raises:
        InputError: nothing to caption, or an option that cannot be used; raised at once.
        OutputError: see `Ledger`. A picture that cannot be captioned has its error in its record.
    """
    from qvl.runtime.model import Model

    if not isinstance(model, Model):
        raise InputError(f"model is {shown(model)}, expected a Model", hint="`qvl.runtime.load` opens one")
    items = find_inputs(_names(paths)).items
    sampling = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repeat_penalty": repeat_penalty, "presence_penalty": presence_penalty,
    }  # fmt: skip
    chosen = CaptionOptions(
        prompt=prompt,
        variables=None if variables is None else check_path("variables", variables),
        system=system,
        prefix=prefix,
        suffix=suffix,
        triggers=triggers,
        start_with=start_with,
        schema=schema_of(schema),
        samples=samples,
        max_tokens=max_tokens,
        sampling={name: value for name, value in sampling.items() if value is not None},
        seed=seed,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        image_detail=image_detail,
    )
    # these raise before any file is made
    chosen.prompts(), chosen.grammar(), model.vision.preprocessor.with_pixels(min_pixels, max_pixels)
    check_choice("mode", mode, get_args(Mode))
    for name, value, most in (("parallel", parallel, MAX_PARALLEL), ("n_ctx", n_ctx, 1 << 22)):
        if value is not None:
            check_whole(name, value, 1, most)
    target = None if output is None else check_path("output", output)
    if target is None and mode != "skip":
        raise InputError(f"mode is {mode!r}, which needs an output", hint="`output` names its file")
    if target is not None:
        read = (model.path, model.vision.path, chosen.variables, chosen.schema)
        refuse_input(target, [path for path in read if isinstance(path, Path)])
        refuse_input(target, [Path(item.path) for item in items])
    return _records(model, items, chosen, target, mode, accept_changes, parallel, n_ctx)


def _records(
    model: Model,
    items: Sequence[Item],
    options: CaptionOptions,
    output: Path | None,
    mode: Mode,
    accept_changes: bool,
    parallel: int | None,
    n_ctx: int | None,
) -> Iterator[Record]:
    with ExitStack() as stack:
        results: Results = JsonLines()
        if output is not None:
            settings = options.settings(model.path, model.vision.path)
            results = stack.enter_context(Ledger(output, settings, mode, accept_changes=accept_changes))
        runner, captioner = open_run(model, items, options, results, parallel=parallel, n_ctx=n_ctx)
        stack.enter_context(captioner)
        yield from runner.run()


def _names(paths: Any) -> list[str]:
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(several, Iterable) or isinstance(several, bytes | Mapping):
        raise InputError(f"paths are {shown(paths)}, expected a path or a list of paths")
    return [os.fspath(check_path("a path", path)) if not isinstance(path, str) else path for path in several]
