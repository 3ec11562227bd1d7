"""`qvl models`: the checkpoints that are known to work, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvl.cli import options
from qvl.cli.output import Output


def models(json: options.Json = False) -> None:
    """List the checkpoints that are known to work."""
    out = Output()
    known = registry()
    if json:
        out.json(known, indent=2)
        return
    out.line(str(known))


def registry() -> list[dict[str, Any]]:
    """The entries of models/registry.toml."""
    import tomllib

    import qvl.models

    path = Path(qvl.models.__path__[0]) / "registry.toml"
    with path.open("rb") as f:
        return list(tomllib.load(f)["model"])
