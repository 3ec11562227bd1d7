"""Embeddings kept in memory and on disk: bounded, shared between processes, never wrong, never in the way."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.patterns import pattern

from qvl.runtime.files import default_directory, file_identity
from qvl.runtime.vision.cache import CachedEmbedding, EmbeddingCache, embedding_key
from qvl.runtime.vision.preprocess import Preprocessor


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def entry(i: int = 0, n_tokens: int = 12, n_embd: int = 32) -> CachedEmbedding:
    values = np.random.default_rng(i).normal(0, 3, (n_tokens, n_embd)).astype(np.float32)
    return CachedEmbedding(values, (1, 2, 2 * n_tokens))


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


# Keeping


def test_memory_gives_back_the_same_floats(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    made = entry()
    assert cache.get(key(0)) is None
    cache.put(key(0), made)
    got = cache.get(key(0))
    assert got is not None and got.grid_thw == made.grid_thw
    np.testing.assert_array_equal(got.embeddings, made.embeddings)
    with pytest.raises(ValueError, match="read-only"):
        got.embeddings[0, 0] = 1.0


def test_the_next_process_finds_them_to_the_precision_of_float16(tmp_path: Path) -> None:
    made = entry(1, 500, 256)
    EmbeddingCache(tmp_path / "new" / "folder").put(key(1), made)
    got = EmbeddingCache(tmp_path / "new" / "folder").get(key(1))
    assert got is not None and got.grid_thw == made.grid_thw
    assert got.embeddings.dtype == np.float32
    error = np.linalg.norm(got.embeddings - made.embeddings) / np.linalg.norm(made.embeddings)
    assert 1e-5 < error < 3e-4
    np.testing.assert_array_equal(got.embeddings, made.embeddings.astype(np.float16).astype(np.float32))


def test_values_beyond_float16_are_kept_whole(tmp_path: Path) -> None:
    for i, value in enumerate((1e5, -7e4, np.inf, np.nan)):
        made = entry(i)
        made.embeddings[3, 4] = value
        EmbeddingCache(tmp_path).put(key(i), made)
        got = EmbeddingCache(tmp_path).get(key(i))
        assert got is not None
        np.testing.assert_array_equal(got.embeddings, made.embeddings)


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    made = entry()
    EmbeddingCache(tmp_path).put(key(0), made)
    path = only_file(tmp_path)
    assert path.name == key(0) + ".safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["embeddings"] == {"dtype": "F16", "shape": [12, 32], "data_offsets": [0, 768]}
    assert all(isinstance(value, str) for value in header["__metadata__"].values())
    assert len(data) == 8 + length + 768 and length % 8 == 0


@pytest.mark.parity
def test_safetensors_itself_reads_the_file(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    made = entry()
    EmbeddingCache(tmp_path).put(key(0), made)
    loaded = load_file(only_file(tmp_path))["embeddings"]
    np.testing.assert_array_equal(loaded, made.embeddings.astype(np.float16))


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = EmbeddingCache(None)
    cache.put(key(0), entry())
    assert cache.get(key(0)) is not None and cache.clear() == 0
    assert cache.get(key(0)) is None and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_cannot_read_what_is_in_our_pictures(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path / "private").put(key(0), entry())
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) & 0o077 == 0


def test_stats_and_clear(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, 10_000, 20_000)
    for i in range(3):
        cache.put(key(i), entry(i))
    cache.get(key(0))
    cache.get(key(9))
    EmbeddingCache(tmp_path).get(key(1))
    stats = cache.stats()
    assert (stats.entries, stats.memory_entries, stats.memory_n_bytes) == (3, 3, 3 * 12 * 32 * 4)
    assert stats.n_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (stats.max_bytes, stats.memory_bytes, stats.directory) == (10_000, 20_000, tmp_path)
    assert (stats.memory_hits, stats.disk_hits, stats.misses) == (1, 0, 1)
    (tmp_path / "notes.txt").write_text("not ours")
    assert cache.clear() == stats.n_bytes
    assert cache.get(key(0)) is None and cache.stats().entries == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# Bounds


def test_memory_is_bounded_and_the_longest_unused_goes(tmp_path: Path) -> None:
    cache = EmbeddingCache(None, memory_bytes=3 * 12 * 32 * 4)
    for i in range(3):
        cache.put(key(i), entry(i))
    cache.get(key(0))
    cache.put(key(3), entry(3))
    assert [cache.get(key(i)) is not None for i in range(4)] == [True, False, True, True]
    cache.put(key(4), entry(4, 100))  # larger than all of the memory
    assert cache.get(key(4)) is None and cache.stats().memory_entries == 3
    cache.put(key(0), entry(0, 1))
    assert cache.stats().memory_n_bytes == 2 * 12 * 32 * 4 + 32 * 4


def test_the_disk_is_bounded_and_the_longest_unused_goes(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).put(key(0), entry(0))
    size = only_file(tmp_path).stat().st_size
    cache = EmbeddingCache(tmp_path, 3 * size, memory_bytes=0)
    for i in (1, 2):
        cache.put(key(i), entry(i))
    for age, i in ((300, 0), (200, 1), (100, 2)):
        path = tmp_path / f"{key(i)}.safetensors"
        os.utime(path, (time.time() - age, time.time() - age))
    assert cache.get(key(0)) is not None  # used just now
    cache.put(key(3), entry(3))
    assert [cache.get(key(i)) is not None for i in range(4)] == [True, False, True, True]
    cache.put(key(5), entry(5, 1000))  # larger than the bound
    assert cache.get(key(5)) is None and cache.stats().entries == 3


def test_temporary_files_of_killed_processes_are_swept(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.1.part", tmp_path / ".a.2.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache = EmbeddingCache(tmp_path)
    cache.put(key(0), entry())
    assert not old.exists() and new.exists()
    assert cache.stats().entries == 1


# Damage


@given(data=st.data())
def test_a_damaged_file_is_dropped_or_whole(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    made = entry(0, 3, 8)
    EmbeddingCache(directory).put(key(0), made)
    path = only_file(directory)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    got = EmbeddingCache(directory).get(key(0))
    if got is None:
        assert not path.exists()
    else:  # a change that means nothing, such as of white space in the header
        assert got.grid_thw == made.grid_thw
        np.testing.assert_array_equal(got.embeddings, made.embeddings.astype(np.float16))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 40,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 5000) + b"[" * 5000,
        struct.pack("<Q", 20) + b'{"__metadata__": 123}',
    ],
)
def test_other_files_in_our_place_are_dropped(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"{key(0)}.safetensors"
    path.write_bytes(content)
    assert EmbeddingCache(tmp_path).get(key(0)) is None
    assert not path.exists()


def test_a_file_under_another_name_is_not_taken(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).put(key(0), entry())
    only_file(tmp_path).rename(tmp_path / f"{key(1)}.safetensors")
    assert EmbeddingCache(tmp_path).get(key(1)) is None


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("where the folder should be")
    cache = EmbeddingCache(blocked, memory_bytes=0)
    cache.put(key(0), entry())
    assert cache.get(key(0)) is None and cache.stats().entries == 0 and cache.clear() == 0
    (tmp_path / "is a folder" / f"{key(0)}.safetensors").mkdir(parents=True)
    cache = EmbeddingCache(tmp_path / "is a folder", memory_bytes=0)
    cache.put(key(0), entry())
    assert cache.get(key(0)) is None


def test_a_key_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no key"):
        EmbeddingCache(tmp_path).get("../../etc/passwd")


# Several at once

_WORKER = """
import sys
import numpy as np
from qvl.runtime.vision.cache import EmbeddingCache, CachedEmbedding
directory, bound = sys.argv[1], int(sys.argv[2])
cache = EmbeddingCache(directory, bound, memory_bytes=0)
wrong = 0
for turn in range(150):
    i = turn * 7 % 20
    made = CachedEmbedding(np.full((16, 64), i, np.float32), (1, 4, 16))
    got = cache.get(f"{i:064x}")
    wrong += got is not None and not (got.embeddings.shape == (16, 64) and (got.embeddings == i).all())
    cache.put(f"{i:064x}", made)
print(wrong)
"""


def test_several_processes_share_a_directory(tmp_path: Path) -> None:
    """Writing, reading and evicting the same few keys at once, nobody reads a half or another's entry."""
    bound = 25_000  # ten of the twenty entries
    command = [sys.executable, "-c", _WORKER, str(tmp_path), str(bound)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for worker in workers:
        assert worker.communicate() == ("0\n", "")
    stats = EmbeddingCache(tmp_path, bound).stats()
    assert 0 < stats.n_bytes <= bound
    assert not list(tmp_path.glob(".*.part"))


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, 40_000, 10_000)

    def use(turn: int) -> bool:
        i = turn % 8
        cache.put(key(i), entry(i))
        got = cache.get(key(i))
        return got is None or np.allclose(got.embeddings, entry(i).embeddings, rtol=1e-3, atol=1e-6)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(200)))
    assert cache.stats().memory_n_bytes <= 10_000


# Keys


def test_keys_depend_on_pixels_preprocessing_grid_and_encoder() -> None:
    base = Preprocessor()
    picture = pattern(120, 160)
    other = picture.copy()
    other[-1, -1, 0] ^= 255
    keys = [
        embedding_key(base.image(picture), "a"),
        embedding_key(base.image(other), "a"),
        embedding_key(base.image(picture), "b"),
        embedding_key(base.with_pixels(max_pixels=8 * 784).image(picture), "a"),
        embedding_key(Preprocessor(mean=(0.5, 0.5, 0.5)).image(picture), "a"),
        embedding_key(base.image(np.ascontiguousarray(picture.transpose(1, 0, 2))), "a"),
        embedding_key(base.video([picture, other]), "a"),
    ]
    assert len(set(keys)) == len(keys)
    assert embedding_key(base.image(picture.copy()), "a") == keys[0]


def test_identity_of_an_encoder_file(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    content = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    first = file_identity(path)
    os.utime(path, (1, 1))
    assert file_identity(path) == first  # a copy is the same file
    for at in (0, 500_000, -1):
        changed = content.copy()
        changed[at] ^= 1
        path.write_bytes(changed.tobytes())
        assert file_identity(path) != first
    path.write_bytes(content[:-1].tobytes())
    assert file_identity(path) != first
    path.write_bytes(b"")
    assert len(file_identity(path)) == 64


def test_the_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "qvl" / "embeddings"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_directory() == Path.home() / ".cache" / "qvl" / "embeddings"
