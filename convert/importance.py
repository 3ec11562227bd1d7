"""Importance matrices in a conversion: checked against the tensors to write and the types that need one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from qvl.convert.family import Metadata
from qvl.convert.recipe import FLOATS, Planned
from qvl.runtime.errors import InputError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.imatrix import read_imatrix
from qvl.runtime.ggml.library import Type

# Below about three bits a block without one is noise (llama-quant.cpp, `tensor_requires_imatrix`).
_NEEDED_BY: Final = (Type.IQ3_XXS, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS, Type.IQ1_M, Type.IQ1_S)
_TABLES: Final = ("token_embd.weight", "output.weight")
_HINT: Final = "`imatrix` takes what qvl imatrix makes of pictures and text"


@dataclass(frozen=True)
class Importance:
    """Weights of the quantization error, by tensor name.

    Attributes:
        values: float32 [n_per_row], or [n_experts, n_per_row] for a stack of experts.
        products: float32 [n_per_row / 256, 256, 256], for tensors that have them.
        metadata: keys that llama-quantize writes into files made with an importance matrix.
        warnings: tensors that are quantized without one.
    """

    values: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    products: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def load_importance(path: str | Path | None, plans: Sequence[tuple[str, Sequence[Planned]]]) -> Importance:
    """Read an importance matrix and check it against the tensors to write.

    Args:
        path: a file, or None for no calibration.
        plans: type name and tensors of each output file.

    Raises:
        GGUFError: the file is damaged or something else.
        InputError: it belongs to another model, or a type needs statistics that are not there.
    """
    found = None if path is None else read_imatrix(Path(path).expanduser())
    values = {} if found is None else _fitted(found.importance(), plans, path)
    missing = [
        p for name, plan in plans for p in plan if p.type not in FLOATS and p.tensor.name not in values
    ]
    for name, plan in plans:
        for planned in plan:
            if planned.tensor.name not in values and _needs(planned.type, name, planned.tensor.name):
                what = "no importance matrix was given" if found is None else f"{path} has nothing on it"
                raise InputError(
                    f"type {name}: {planned.tensor.name} would be {planned.type.name}, which needs an "
                    f"importance matrix, but {what}",
                    hint=_HINT,
                )
    if found is None:
        return Importance()
    metadata: Metadata = {
        "quantize.imatrix.file": Path(str(path)).name,
        "quantize.imatrix.dataset": ", ".join(found.datasets),
        "quantize.imatrix.entries_count": len(found.entries),
        "quantize.imatrix.chunks_count": found.chunks,
    }
    products = {n: e.products for n, e in found.entries.items() if e.products is not None}
    return Importance(values, products, metadata, tuple(_warnings(missing)))


def _fitted(
    values: Mapping[str, npt.NDArray[np.float32]],
    plans: Sequence[tuple[str, Sequence[Planned]]],
    path: object,
) -> Mapping[str, npt.NDArray[np.float32]]:
    """The values in the shape of their tensors: a stack of experts has a row for each.

    Raises:
        InputError: a tensor that will be quantized has another shape.
    """
    fitted = dict(values)
    for planned in (p for _, plan in plans for p in plan if p.type not in FLOATS and p.tensor.name in values):
        tensor, held = planned.tensor, values[planned.tensor.name]
        shape = (*tensor.shape[:-2], tensor.n_per_row)
        if held.size != math.prod(shape):
            found, wanted = ("x".join(map(str, s)) for s in (held.shape, shape))
            raise InputError(
                f"{path}: {tensor.name} has {found} columns, expected {wanted}",
                hint="this importance matrix was made with another model",
            )
        fitted[tensor.name] = held.reshape(shape)
    return fitted


def _needs(kind: Type, file_type: str, name: str) -> bool:
    if ggml.lib().ggml_quantize_requires_imatrix(int(kind)):
        return True  # ggml ends the process
    return name not in _TABLES and (kind in _NEEDED_BY or (file_type == "q2_k_s" and kind is Type.Q2_K))


def _warnings(missing: Sequence[Planned]) -> list[str]:
    names = [p.tensor.name for p in missing if p.tensor.name not in _TABLES]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"quantized without statistics, which the importance matrix lacks: {', '.join(names[:3])}{more}"]
