"""llama.cpp's own image encoder opens the vision files that are converted here, and sees the same."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from support.families import write_family
from support.patterns import pattern

from qvl.convert import convert

try:
    from llama_cpp import mtmd_cpp
except (ImportError, OSError, RuntimeError):  # compiled without it
    mtmd_cpp = None

SIZES = [(448, 448), (224, 672)]  # multiples of 28 and of 32: libmtmd pads nothing


@pytest.mark.skipif(mtmd_cpp is None, reason="no libmtmd: QVL_LLAMA=full .ci/setup compiles it")
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_libmtmd_gives_the_same_embeddings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deepstack's features included. Rounding to half precision inside libmtmd accounts for 4e-4."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    contenders = import_module("benchmarks.contenders")
    made = convert(write_family(tmp_path / "c", name), tmp_path, "f32", "f32")
    with ExitStack() as stack:
        ours = contenders.ours(stack, made.mmproj, "f32", 1, "exact")
        theirs = contenders.mtmd(stack, made.text, made.mmproj, "f32", 1)
        for height, width in SIZES:
            expected, found = (c.encode(pattern(height, width)) for c in (theirs, ours))
            assert found.shape == expected.shape
            assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
