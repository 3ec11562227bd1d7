"""Captions for whole datasets; the package can be called: `qvl.runtime.caption(model, paths)`.

api.py          the function behind that call
inputs.py       paths, folders, globs, lists, stdin
prompts.py      templates, columns, prompts beside pictures
assemble.py     prefix, trigger words, suffix, old captions
options.py      the options of a run
settings.py     those that a file of results remembers; seeds
record.py       the record of one picture
table.py        records as JSONL or CSV, read back after any crash
state.py        the locked file beside the results
ledger.py       the file of results: append-only, durable, resumable
stdout.py       results to stdout
sidecar.py      a text file beside each picture
bookkeeping.py  pictures left to do, and their results
prepare.py      reading, hashing and resizing ahead, in threads
runner.py       a run on this machine
distributed.py  a run on a Ray cluster
setup.py        from a loaded model to a runner
captioner.py    pictures to the engine's requests, replies to captions
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.runtime.caption.api import caption

__all__ = ["caption"]


class _Package(ModuleType):
    """The package as the function of its name: `from qvl.runtime import caption` gives either."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `qvl.runtime.caption.api.caption`."""
        return self.caption(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.caption)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "caption":
        from qvl.runtime.caption.api import caption

        return caption
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
