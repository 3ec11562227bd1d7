"""From the options of a command to a loaded model, with words about it on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qvl.cli.options import ModelOptions
from qvl.cli.output import Output
from qvl.runtime.errors import InputError

if TYPE_CHECKING:
    from qvl.runtime.model import Model


@contextmanager
def open_model(options: ModelOptions, out: Output) -> Iterator[Model]:
    """The model that the options name, loaded, and freed at the end.

    Raises:
        InputError: no such file, or no embedded model in this installation.
    """
    path = model_path(options.path, out)
    from qvl.runtime import load

    with load(path, **options.kwargs()) as model:
        yield model


def model_path(name: str | None, out: Output) -> Path:
    """The file or folder of a model given by `-m`; without it, the embedded one, which introduces itself."""
    if name is None:
        from qvl.models import embedded

        out.dim(embedded.INTRODUCTION)
        return embedded.path()
    path = Path(name).expanduser()
    if path.exists():
        if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.gguf")):
            raise InputError(
                f"{path}: a checkpoint, not GGUF files", hint=f"qvl convert {name} -o OUT, then -m OUT"
            )
        return path
    hint = (
        f"qvl convert {name} -o OUT, then -m OUT" if _is_hub_id(name) else "qvl models lists what to convert"
    )
    raise InputError(f"{name}: no such file or folder", hint=hint)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith(".gguf")
