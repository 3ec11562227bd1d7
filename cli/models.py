"""`qvl models`: the models on this machine, and the checkpoints that are known to work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qvl.cli import options
from qvl.cli.layout import format_table
from qvl.cli.output import Output, human_bytes

if TYPE_CHECKING:
    from qvl.cli.local import Local

_TYPE: Final = "q4_k_m"  # what `qvl convert` makes when it is not told otherwise


def models(json: options.Json = False) -> None:
    """List the models on this machine, and those to download."""
    from qvl.cli.local import local_models

    out = Output()
    known, here = registry(), local_models()
    if json:
        out.json({"local": [_local_json(model) for model in here], "known": known}, indent=2)
    else:
        out.page("\n\n".join(filter(None, (local_text(here, out.width), as_text(known, out.width)))))


def local_text(here: Sequence[Local], width: int | None = None) -> str:
    """The table of models on this machine; empty without one."""
    from qvl.cli.chat.attachments import shown

    rows = [
        (f"{'* ' if model.is_default else '  '}{shown(model.text)}", human_bytes(model.n_bytes))
        for model in here
    ]
    if not rows:
        return ""
    note = "* the default, used without -m; set QVL_MODEL to choose another"
    return f"{format_table(rows, ('  on this machine', 'size'), width=width)}\n{note}"


def _local_json(model: Local) -> dict[str, Any]:
    mmproj = str(model.mmproj) if model.mmproj else None
    return {"text": str(model.text), "mmproj": mmproj, "bytes": model.n_bytes, "default": model.is_default}


def registry() -> list[dict[str, Any]]:
    """The entries of models/registry.toml."""
    import tomllib

    import qvl.models

    path = Path(qvl.models.__path__[0]) / "registry.toml"
    with path.open("rb") as f:
        return list(tomllib.load(f)["model"])


def as_text(known: list[dict[str, Any]], width: int | None = None) -> str:
    """The table, and how to get one of them."""
    rows = []
    for model in known:
        sizes = model.get("types", {}).get(_TYPE, {})
        files = sizes.get("text_bytes", 0) + sizes.get("mmproj_bytes", 0)
        rows.append(
            (
                (model["hub"] or model["title"]) + ("" if model.get("verified", True) else " (untried)"),
                f"{model['parameters'] / 1e6:,.0f} M",
                human_bytes(model["bf16_bytes"]),
                human_bytes(files) if files else "-",
                human_bytes(sizes["memory_bytes"]) if sizes else "-",
                model["licence"],
            )
        )
    header = ("checkpoint", "parameters", "download", "converted", "memory", "licence")
    example = next((m["hub"] for m in known if m["hub"]), "REPOSITORY")
    return (
        f"{format_table(rows, header, width=width)}\n\n"
        f"untried: not yet converted and run by this project; sizes are rounded.\n"
        f"converted: both files, with the default types q4_k_m and q8_0. To convert and use one:\n"
        f"  qvl convert {example} -o models && qvl chat -m models"
    )
