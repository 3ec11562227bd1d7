"""Pickled weights: as torch saves them, and pickles that ask for more than weights."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoint import encode
from support.families import write_torch_zip

from qvl.convert.checkpoint import Checkpoint
from qvl.convert.pickle import read_pickle
from qvl.runtime.errors import CheckpointError


def test_hand_made_tensors_are_found(tmp_path: Path) -> None:
    tensors = {
        "a": encode(np.arange(12, dtype=np.float32).reshape(3, 4), "F16"),
        "b": encode(np.ones(5), "F16"),
    }
    write_torch_zip(tmp_path / "pytorch_model.bin", tensors, "F16")
    with Checkpoint(tmp_path) as checkpoint:
        for name, values in tensors.items():
            found = checkpoint.array(checkpoint.tensors[name])
            np.testing.assert_array_equal(found, values.view(np.uint16))


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read(tmp_path: Path, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.randn(6, 8)
    state = {
        "plain": torch.randn(3, 5), "half": torch.randn(4).half(), "brain": torch.randn(2, 3).bfloat16(),
        "double": torch.randn(2).double(), "transposed": whole.T, "part": whole[2:4, 1:3],
        "parameter": torch.nn.Parameter(torch.randn(7)), "ids": torch.arange(3), "empty": torch.empty(0, 4),
        "number": torch.tensor(2.5),
    }  # fmt: skip
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in state.items():
            entry = checkpoint.tensors[name]
            assert entry.shape == tuple(tensor.shape)
            if name == "ids":
                assert entry.dtype == "I64"
                continue
            bits = tensor.detach().contiguous()
            bits = bits.view(torch.int16) if bits.element_size() == 2 else bits
            expected = bits.numpy()
            np.testing.assert_array_equal(checkpoint.array(entry).view(expected.dtype), expected)


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


MALICIOUS = {
    "os.system": (pickle.dumps(Runs(os.system, "touch ran")), "system"),
    "eval": (pickle.dumps(Runs(eval, "1")), "builtins.eval"),
    "getattr": (pickle.dumps(Runs(getattr, 1, "real")), "builtins.getattr"),
    "in a dict": (pickle.dumps({"a": Runs(exec, "1")}), "builtins.exec"),
    "torch's loader": (b"ctorch.storage\n_load_from_bytes\n(C\x01xtR.", "torch.storage._load_from_bytes"),
    "a class of torch": (b"ctorch.nn.modules.linear\nLinear\n.", "Linear"),
    "by INST": (b"(S'touch ran'\nios\nsystem\n.", "os.system"),
    "by a stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "a dotted name": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "fromkeys"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_what_is_no_weight_is_refused_by_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, asked = MALICIOUS[name]
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(CheckpointError, match="the pickle asks for") as caught:
        read_pickle(path)
    assert asked in str(caught.value)
    assert not (tmp_path / "ran").exists()
    if content.startswith(b"\x80"):
        path.write_bytes(content)  # the legacy format
        with pytest.raises(CheckpointError, match="the pickle asks for"):
            read_pickle(path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"x", b"\x80", b"\x80\x02.", pickle.dumps(5), pickle.dumps({}), b"PK\x05\x06" + bytes(18)),
        b"\x80\x02X" + struct.pack("<I", 2**31) + b"abc",
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_pickle(path)


def test_cut_and_changed_archives_are_refused_or_lie_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    write_torch_zip(path, {"a": encode(np.ones((8, 8)), "F32")}, "F32")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            content[place] = rng.integers(0, 256)
        path.write_bytes(bytes(content[: len(whole) - int(rng.integers(0, 40)) * int(rng.integers(0, 2))]))
        try:
            entries = read_pickle(path)
        except CheckpointError:
            continue
        for entry in entries.values():
            assert entry.offset + entry.nbytes <= path.stat().st_size


@pytest.mark.parametrize(
    ("shape", "strides", "offset"), [((3, 5), (5, 1), 0), ((2, 4), (8, 1), 1), ((4,), (1,), 2**40)]
)
def test_a_tensor_outside_of_its_storage_is_refused(
    tmp_path: Path, shape: Any, strides: Any, offset: int
) -> None:
    from qvl.convert.pickle import _entry, _Storage, _Tensor

    tensor = _Tensor(_Storage("0", "F32", 12), offset, shape, strides)
    with pytest.raises(CheckpointError, match="outside of its storage"):
        _entry(tmp_path / "x.bin", "a", tensor, {"0": 64}, 1 << 20)
