"""What a picture is known by, and how long its embeddings stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.sessions import FakeBackend, unit

from qvl.runtime.engine.store import EmbeddingStore, source_key
from qvl.runtime.engine.units import common_prefix
from qvl.runtime.errors import ImageError
from qvl.runtime.prompt.messages import VisionChunk


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    picture = tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")
    picture.touch()
    assert source_key(VisionChunk("image", picture)) != source_key(VisionChunk("image", tmp_path / "b.png"))


def test_source_keys(tmp_path: Path) -> None:
    array = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    picture = Image.fromarray(array)
    file = tmp_path / "a.png"
    picture.save(file)
    sources: list[Any] = [
        array, array + 1, array.reshape(1, 4, 3), picture, picture.convert("L"), file, file.read_bytes(),
        [array, array], [array], str(tmp_path),
    ]  # fmt: skip
    keys = [source_key(VisionChunk("image", source)) for source in sources]
    assert len(set(keys)) == len(keys)
    assert keys == [source_key(VisionChunk("image", source)) for source in sources]
    assert source_key(VisionChunk("image", str(file))) == source_key(VisionChunk("image", file))
    assert source_key(VisionChunk("video", file)) != source_key(VisionChunk("image", file))
    assert source_key(VisionChunk("image", file, (("max_pixels", 784),))) != keys[5]
    before = source_key(VisionChunk("image", file))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file)
    assert source_key(VisionChunk("image", file)) != before
    assert source_key(VisionChunk("image", tmp_path / "missing.png"))


def test_a_store_stays_within_its_bound(backend: FakeBackend) -> None:
    store = EmbeddingStore(backend, max_bytes=3 * 4 * 4 * backend.n_embd)
    units = [unit(store, VisionChunk("image", np.full((56, 56, 3), i, np.uint8))) for i in range(6)]
    store.encode(units)
    assert backend.encoded == [6]
    store.encode([units[-1], units[-2]])
    assert backend.encoded == [6]
    unit(store, VisionChunk("image", np.full((56, 56, 3), 0, np.uint8)))
    store.encode([units[0]])
    assert backend.encoded == [6, 1] and backend.prepared == 7


def _grey(value: int) -> VisionChunk:
    return VisionChunk("image", np.full((56, 56, 3), value, np.uint8))


def test_what_was_looked_at_ahead_is_waited_for_and_counted_once(backend: FakeBackend) -> None:
    backend.pause = 0.01
    store = EmbeddingStore(backend)
    store.look_ahead(lambda: [_grey(1), _grey(2)])
    units = [unit(store, _grey(value)) for value in (2, 3)]  # waits
    assert backend.encoded == [2]
    encoded = store.encode(units)
    assert backend.encoded == [2, 1] and len(encoded.made) == 2
    expected = EmbeddingStore(FakeBackend(backend.n_embd))
    alone = expected.encode([unit(expected, _grey(2))])
    assert np.array_equal(encoded.vectors[units[0].key], alone.vectors[units[0].key])
    assert not store.encode(units).made


def test_what_is_looked_at_ahead_is_called_off(backend: FakeBackend) -> None:
    backend.pause, backend.steps = 0.02, 10_000
    store = EmbeddingStore(backend)
    store.look_ahead(lambda: [_grey(value) for value in range(100)])
    store.close()
    assert backend.finished == 0  # the first alone would take minutes
    backend.steps = 10
    assert len(store.encode([unit(store, _grey(1))]).made) == 1


def test_what_cannot_be_read_ahead_says_so_when_it_is_asked_about(backend: FakeBackend) -> None:
    store = EmbeddingStore(backend)
    missing = VisionChunk("image", "missing.png")
    store.look_ahead(lambda: [missing])
    store.encode([unit(store, _grey(1))])
    with pytest.raises(ImageError, match=r"missing\.png"):
        unit(store, missing)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
