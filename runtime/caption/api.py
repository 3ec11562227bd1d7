"""Captions from Python: `qvl.runtime.caption(model, paths)`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qvl.runtime.caption.bookkeeping import Results
from qvl.runtime.caption.inputs import find_inputs
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.setup import open_run
from qvl.runtime.caption.state import Mode
from qvl.runtime.caption.stdout import Stream

if TYPE_CHECKING:
    from qvl.runtime.model import Model

_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")


def caption(
    model: Model,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str] | None = None,
    mode: Mode = "skip",
    accept_changes: bool = False,
    parallel: int | None = None,
    n_ctx: int | None = None,
    **options: Any,
) -> Iterator[Record]:
    """Caption pictures and videos, several at a time, in the order in which they are done.

    Some CPUs do so sooner with a model that was loaded with optimize="prefill".

    Args:
        paths: as for `qvl caption`: files, folders, globs, `@list.txt`.
        output: a JSONL or CSV file; then each record is safe on disk before it is yielded, and what the file
            has already is not done again.
        mode: what to do about records that `output` has.
        parallel: pictures at once; None chooses by memory and cores.
        options: of `CaptionOptions`, and temperature, top_k, top_p, min_p and repeat_penalty.

    Raises:
        InputError: nothing to caption, or options that cannot be used. OutputError: see `Ledger`.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    items = find_inputs([os.fspath(path) for path in several]).items
    sampling = {name: options.pop(name) for name in _SAMPLING if options.get(name) is not None}
    chosen = CaptionOptions(**options, sampling=sampling)
    with ExitStack() as stack:
        results: Results = Stream()
        if output is not None:
            settings = chosen.settings(model.path, model.vision.path)
            ledger = Ledger(Path(output), settings, mode, accept_changes=accept_changes)
            results = stack.enter_context(ledger)
        runner, captioner = open_run(model, items, chosen, results, parallel=parallel, n_ctx=n_ctx)
        stack.enter_context(captioner)
        yield from runner.run()
