"""What a picture is known by, and how long its embeddings stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.sessions import FakeEyes

from qvl.runtime.embeddings import EmbeddingStore, source_key
from qvl.runtime.prompt import VisionChunk
from qvl.runtime.tokens import common_prefix


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


def test_a_store_stays_within_its_bound(eyes: FakeEyes) -> None:
    store = EmbeddingStore(eyes, max_bytes=3 * 4 * 4 * eyes.n_embd)
    units = [store.unit(VisionChunk("image", np.full((56, 56, 3), i, np.uint8))) for i in range(6)]
    store.encode(units)
    assert eyes.encoded == [6]
    store.trim()
    store.encode([units[-1], units[-2]])
    assert eyes.encoded == [6]
    store.unit(VisionChunk("image", np.full((56, 56, 3), 0, np.uint8)))
    store.encode([units[0]])
    assert eyes.encoded == [6, 1] and eyes.prepared == 7


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
