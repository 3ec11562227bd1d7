"""Captions for whole datasets: what to caption, with which prompt, and where the results are kept safe.

inputs.py       paths, folders, globs, lists, stdin
prompts.py      templates, columns, prompts beside pictures
assemble.py     prefix, trigger words, suffix, old captions
options.py      what a run is asked for
settings.py     what of it a file of results remembers; seeds
record.py       what is known of one picture at the end
table.py        records as JSONL or CSV, read back after any crash
state.py        the locked file beside the results
ledger.py       the file of results: append-only, durable, resumable
stdout.py       results to stdout
sidecar.py      a text file beside each picture
bookkeeping.py  what is left to do, what has come of it
prepare.py      reading, hashing and resizing ahead, in threads
runner.py       a run on this machine
distributed.py  a run on a Ray cluster
setup.py        from a loaded model to a runner
captioner.py    pictures to the engine's requests, replies to captions
api.py          qvl.runtime.caption, which this package can be called as
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """The package as the function of its name: `from qvl.runtime import caption` gives either."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `qvl.runtime.caption.api.caption`."""
        from qvl.runtime.caption.api import caption

        return caption(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
