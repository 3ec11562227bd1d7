"""The safetensors reader: what it reads, and everything that it must refuse."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint import Shape, Style, write_checkpoint, write_safetensors

from qvl.convert.checkpoint import Checkpoint, read_header
from qvl.runtime.errors import CheckpointError


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from a header that need not be right."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_reads_every_tensor_where_it_lies(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float32)}
    write_safetensors(tmp_path / "model.safetensors", tensors, "F32")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}
        for name, entry in checkpoint.tensors.items():
            held = bytes(checkpoint.map(entry.path)[entry.offset : entry.offset + entry.nbytes])
            np.testing.assert_array_equal(np.frombuffer(held, "<f4").reshape(entry.shape), tensors[name])
            checkpoint.release()
        assert checkpoint.nbytes == 44


def test_agrees_with_the_reference_reader(tiny_checkpoint: Path) -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    with (
        safe_open(tiny_checkpoint / "model.safetensors", "np") as reference,
        Checkpoint(tiny_checkpoint) as ours,
    ):
        assert set(reference.keys()) == set(ours.tensors)
        for name, entry in ours.tensors.items():
            held = np.frombuffer(ours.map(entry.path), "<f4", entry.nbytes // 4, entry.offset).copy()
            np.testing.assert_array_equal(held.reshape(entry.shape), reference.get_tensor(name))


DAMAGED = {
    "empty": b"",
    "short prefix": b"\x01\x02",
    "header longer than the file": safetensors({}, length=10**6),
    "huge header": safetensors({}, length=2**63),
    "all ones length": b"\xff" * 64,
    "not JSON": safetensors(b"{'a': 1}"),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "a list": safetensors([1, 2]),
    "nested too deep": safetensors(b"[" * 100_000),
    "number too long": safetensors(b'{"a": ' + b"1" * 5000 + b"}"),
    "key twice": safetensors(b'{"a": {}, "a": {}}'),
    "tensor is a number": safetensors({"a": 3}),
    "no dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": safetensors({"a": tensor("F99")}, bytes(8)),
    "dtype is a list": safetensors({"a": tensor(["F32"])}, bytes(8)),
    "shape is a string": safetensors({"a": tensor(shape="2")}, bytes(8)),
    "negative dimension": safetensors({"a": tensor(shape=[-2])}, bytes(8)),
    "dimension is true": safetensors({"a": tensor(shape=[True, 2])}, bytes(8)),
    "dimension is a float": safetensors({"a": tensor(shape=[2.0])}, bytes(8)),
    "too many dimensions": safetensors({"a": tensor(shape=[1] * 9 + [2])}, bytes(8)),
    "shape larger than its bytes": safetensors({"a": tensor(shape=[3])}, bytes(8)),
    "shape that overflows": safetensors({"a": tensor(shape=[2**62, 2**62])}, bytes(8)),
    "shape with thousands of digits": safetensors(
        b'{"a": {"dtype": "F32", "shape": [' + b",".join([b"9" * 4000] * 8) + b'], "data_offsets": [0, 8]}}',
        bytes(8),
    ),
    "one offset": safetensors({"a": tensor(offsets=[0])}, bytes(8)),
    "offsets backwards": safetensors({"a": tensor(offsets=[8, 0])}, bytes(8)),
    "negative offset": safetensors({"a": tensor(offsets=[-8, 0])}, bytes(8)),
    "beyond the file": safetensors({"a": tensor(offsets=[8, 16])}, bytes(8)),
    "truncated": safetensors({"a": tensor(shape=[4], offsets=[0, 16])}, bytes(12)),
    "bytes left over": safetensors({"a": tensor()}, bytes(12)),
    "overlap": safetensors({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)),
    "overlap that adds up": safetensors({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(16)),
    "same range twice": safetensors({"a": tensor(), "b": tensor()}, bytes(8)),
    "hole": safetensors({"a": tensor(), "b": tensor(offsets=[12, 20])}, bytes(20)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "model.safetensors", content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError):
        read_header(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_header_gets_a_range_outside_of_the_file(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the bytes are, the result is a CheckpointError or entries that lie in the file."""
    count = st.one_of(
        st.integers(-4, 40), st.integers(-(2**70), 2**70), st.booleans(), st.floats(), st.none()
    )
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "", 3, None]),
            "shape": st.lists(count, max_size=3),
            "data_offsets": st.lists(count, max_size=3),
        },
    )
    header = data.draw(
        st.one_of(st.binary(max_size=60), st.dictionaries(st.text(max_size=3), entry, max_size=4))
    )
    length = data.draw(st.one_of(st.none(), st.integers(0, 2**64 - 1), st.integers(0, 100)))
    content = safetensors(header, data.draw(st.binary(max_size=40)), length=length)
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = write(tmp_path / "fuzz.safetensors", content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    for found in entries.values():
        assert 8 <= found.offset <= found.offset + found.nbytes <= len(content)
        assert (
            found.nbytes
            == int(np.prod(found.shape, dtype=object)) * {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[found.dtype]
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5), data=st.data())
def test_every_sound_file_is_read(tmp_path: Path, shapes: list[list[int]], data: st.DataObject) -> None:
    """Tensors in any order in the header, empty ones too."""
    header, at = {}, 0
    for i, shape in enumerate(shapes):
        nbytes = 2 * int(np.prod(shape, dtype=int))
        header[f"t{i}"] = tensor("BF16", shape, [at, at + nbytes])
        at += nbytes
    names = data.draw(st.permutations(list(header)))
    content = safetensors({"__metadata__": {}, **{n: header[n] for n in names}}, bytes(at))
    entries = read_header(write(tmp_path / "sound.safetensors", content))
    assert {n: list(e.shape) for n, e in entries.items()} == {n: header[n]["shape"] for n in header}


def test_shards_are_read_by_the_index(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", Shape())
    parts = write_checkpoint(tmp_path / "parts", Shape(), Style(shards=3))
    with Checkpoint(whole) as one, Checkpoint(parts) as three:
        assert {n: e.shape for n, e in one.tensors.items()} == {n: e.shape for n, e in three.tensors.items()}
        assert len({e.path for e in three.tensors.values()}) == 3


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", style=Style(shards=3))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 shards are missing: model-00002-of-00003"):
        Checkpoint(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3, None])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="no shard's name"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', "{", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", style=Style(shards=2))
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    value["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="is not in model-0000"):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for k in (1, 2):
        write_safetensors(tmp_path / f"m{k}.safetensors", {"a": np.ones(2, np.float32)}, "F32")
    weight_map = {"a": "m1.safetensors", "b": "m2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"'a' is also in m1\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("model-00001-of-00002.safetensors", "its index is missing"),
        ("tiny-Q4_K_M.gguf", "need no conversion"),
        ("adapter_config.json", "merge it"),
        ("x.txt", "folder that holds"),
    ],
)
def test_other_weights_get_a_hint(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="neither model") as caught:
        Checkpoint(tmp_path)
    assert hint in str(caught.value.hint)
