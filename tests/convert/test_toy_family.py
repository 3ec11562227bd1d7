"""A family added in a test: a row of the table and a module of its own, and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from gguf import GGUFReader
from support.checkpoint import Shape, Style, encode, weights, write_checkpoint, write_weights

from qvl.convert import convert
from qvl.convert.families import qwen2_vl
from qvl.convert.rows import Mapped
from qvl.runtime.families import table


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Qwen2-VL's neighbour that stores its final norm negated, under another name."""
    module = ModuleType("qvl.convert.families.toy")
    vars(module).update({name: value for name, value in vars(qwen2_vl).items() if not name.startswith("__")})

    def text_rows(config: object) -> Iterator[Mapped]:
        for mapped in qwen2_vl.text_rows(config):  # type: ignore[arg-type]
            if mapped.name == "output_norm.weight":
                source = "last.weight"  # canonical: without what wraps it
                mapped = Mapped(mapped.name, mapped.shape, source, values=lambda values, row: -values)
            yield mapped

    vars(module)["text_rows"] = text_rows
    monkeypatch.setitem(sys.modules, module.__name__, module)
    family = table.Family("toy", "Toy", ("toy_vl",), ("qwen2vl",), "toy_merger")
    monkeypatch.setattr(table, "FAMILIES", (*table.FAMILIES, family))
    vars(module)["read"] = lambda root: replace(qwen2_vl.read(root), family=family)
    return module


def test_a_family_is_a_row_and_a_module(tmp_path: Path, toy: ModuleType) -> None:
    folder = write_checkpoint(tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "toy_vl"}))
    tensors = dict(weights(Shape(), Style()))
    norm = tensors.pop("model.norm.weight")
    write_weights(folder, {**tensors, "model.last.weight": encode(-norm, "F32")}, Style())
    done = convert(folder, tmp_path / "g", "f32", "f32")
    found = {t.name: t.data for t in GGUFReader(done.text).tensors}
    assert (found["output_norm.weight"] == norm).all()
    assert GGUFReader(done.mmproj).fields["clip.projector_type"].contents() == "toy_merger"
