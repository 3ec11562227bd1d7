"""That another llama-cpp-python is refused before its structs are touched."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from qvl.runtime.errors import BackendError
from qvl.runtime.ggml import library


@pytest.mark.parametrize("text", ['__version__ = "0.3.35"', "version = 1", ""])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / "__init__.py").write_text(text)
    monkeypatch.setattr(library, "directory", lambda: tmp_path / "lib")
    with pytest.raises(BackendError, match=r"expected 0\.3\.36") as caught:
        library._check_version()
    assert "pip install" in (caught.value.hint or "")


def test_tensors_of_another_size_are_refused() -> None:
    library._check_version()
    right = int(library.lib().ggml_tensor_overhead())
    library._check_struct(right)
    assert right > ctypes.sizeof(library.TensorStruct)
    with pytest.raises(BackendError, match="build of another version"):
        library._check_struct(right + 8)
