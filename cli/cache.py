"""`qvl cache`: what is kept of pictures from one run to the next."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Final

from qvl.cli import options
from qvl.cli.output import Output, human_bytes

_SHOWN: Final = ("directory", "entries", "n_bytes", "max_bytes")

Clear = Annotated[bool, options.flag("--clear", help="Delete all of it.")]


def cache(clear: Clear = False, json: options.Json = False) -> None:
    """Show or clear the cache of encoded pictures.

    `qvl chat` keeps encoded pictures, so that asking about one again starts at once.
    """
    from qvl.runtime.files import default_directory
    from qvl.runtime.vision.cache import EmbeddingCache

    out = Output()
    kept = EmbeddingCache(default_directory(), memory_bytes=0)
    freed = kept.clear() if clear else 0
    stats = asdict(kept.stats())
    if json:
        out.json({name: str(stats[name]) if name == "directory" else stats[name] for name in _SHOWN})
    elif clear:
        out.page(f"{human_bytes(freed)} freed in {stats['directory']}")
    else:
        size = f"{human_bytes(stats['n_bytes'])} of at most {human_bytes(stats['max_bytes'])}"
        out.page(f"{stats['entries']} pictures and videos, {size}, in {stats['directory']}")
