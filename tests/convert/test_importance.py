"""Conversion with an importance matrix, against llama.cpp's own quantizer given the same one."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoint import Shape, Style, write_checkpoint
from support.gguf_bytes import tensor_bytes

from qvl.convert import Converted, convert
from qvl.convert.checkpoint import Checkpoint
from qvl.convert.config import read_config
from qvl.convert.mixtures import TEXT_RECIPES
from qvl.convert.recipe import Choices, plan_text
from qvl.convert.tensor_map import map_tensors
from qvl.runtime.errors import GGUFError, InputError
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qvl.runtime.ggml.library import Type
from qvl.runtime.llama.binding import llama

# Eight layers, so that "the first eighth" is one of them; rows of whole 256-blocks.
WIDE = Shape(hidden=256, inner=256, heads=4, kv_heads=1, layers=8, dim=256, depth=1, mlp_ratio=1)
NEED = [name for name, recipe in TEXT_RECIPES.items() if recipe.needs_imatrix]
# For bytes: the ones that quantize fast, and of those that do not, one of each kind in one layer.
FAST = ("q4_0", "q5_0", "q4_k_m", "q3_k_m", "q2_k_s", "iq4_xs")
SLOW = ("iq2_xxs",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE, Style(dtype="BF16"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Converted:
    return convert(checkpoint, tmp_path_factory.mktemp("f32"), "f32", "f32")


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory, reference: Converted) -> Path:
    """Statistics of any size for every matrix of both files, the embedding's left out."""
    rng = np.random.default_rng(7)
    entries = {}
    for path in (reference.text, reference.mmproj):
        for name, info in read_gguf(path).tensors.items():
            if len(info.shape) == 2 and name != "token_embd.weight":
                entries[name] = Entry(np.exp(2 * rng.standard_normal(info.shape[-1])) * 99, 99)
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    write_imatrix(path, Imatrix(entries, ("made up",), 3))
    return path


def quantize_by_llama(source: Path, out: Path, name: str, imatrix: Path, dry_run: bool = False) -> None:
    c = llama()
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = TEXT_RECIPES[name].file_type, 2, dry_run
    held = read_imatrix(imatrix).importance()
    array = (c.llama_model_imatrix_data * (len(held) + 1))()
    for item, (key, values) in zip(array, held.items(), strict=False):
        item.name = key.encode()
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = values.size
    params.imatrix = array
    assert c.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0


@pytest.mark.parametrize("name", [n for n in TEXT_RECIPES if n not in ("f32", "f16", "bf16")])
def test_types_equal_llama_cpps_mixture(
    name: str, checkpoint: Path, reference: Converted, imatrix: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp says in its log what it would make of each tensor, without doing it."""
    with caplog.at_level("INFO", "qvl.llama"):
        quantize_by_llama(reference.text, Path("none"), name, imatrix, dry_run=True)
    log = "\n".join(record.getMessage() for record in caplog.records)
    theirs = dict(re.findall(r"\] +(\S+) +- \[.*-> .* MiB \((\S+)\)", log))
    config = read_config(checkpoint)
    with Checkpoint(checkpoint) as held:
        tensors = map_tensors(config, held).text
    recipe = TEXT_RECIPES[name]
    plan = plan_text(tensors, recipe, n_layer=8, gqa=4, choices=Choices(calibrated=True))
    ours = {p.tensor.name: p.type.name.lower() for p in plan if p.type is not Type.F32}
    assert len(ours) == 1 + 8 * 7
    assert ours == {name: kind.lower() for name, kind in theirs.items()}


@pytest.mark.parametrize("name", FAST)
def test_bytes_equal_llama_cpps_quantizer(
    name: str, checkpoint: Path, reference: Converted, imatrix: Path, tmp_path: Path
) -> None:
    quantize_by_llama(reference.text, tmp_path / "theirs.gguf", name, imatrix)
    ours = tensor_bytes(convert(checkpoint, tmp_path, name, "f32", imatrix).text)
    theirs = tensor_bytes(tmp_path / "theirs.gguf")
    assert {n: t for n, (t, _) in ours.items()} == {n: t for n, (t, _) in theirs.items()}
    assert [n for n in ours if ours[n] != theirs[n]] == []


@pytest.mark.parametrize("name", SLOW)
def test_bytes_of_few_bits_equal_llama_cpps(
    name: str, reference: Converted, imatrix: Path, tmp_path: Path
) -> None:
    small = write_checkpoint(tmp_path / "small", replace(WIDE, layers=1), Style(dtype="BF16"))
    source = convert(small, tmp_path, "f32", "f32").text
    quantize_by_llama(source, tmp_path / "theirs.gguf", name, imatrix)
    ours = tensor_bytes(convert(small, tmp_path, name, "q8_0", imatrix).text)
    assert ours == tensor_bytes(tmp_path / "theirs.gguf")


def test_vision_uses_it_too(checkpoint: Path, imatrix: Path, tmp_path: Path) -> None:
    plain = convert(checkpoint, tmp_path / "a", "f32", "q4_k")
    weighed = convert(checkpoint, tmp_path / "b", "f32", "q4_k", imatrix)
    a, b = tensor_bytes(plain.mmproj), tensor_bytes(weighed.mmproj)
    changed = {n for n in a if a[n] != b[n]}
    assert changed == {n for n, (kind, _) in a.items() if kind == "Q4_K"}
    assert read_gguf(weighed.mmproj).metadata["quantize.imatrix.entries_count"] > 0


@pytest.mark.parametrize("name", NEED)
def test_types_that_need_one_say_so_before_any_work(name: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"type {name}.*needs an importance matrix.*none|no importance"):
        convert(checkpoint, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_type_chosen_by_hand_needs_one_as_well(checkpoint: Path, tmp_path: Path) -> None:
    for options in ({"token_embedding_type": "iq2_xs"}, {"tensor_types": ["ffn_up=iq3_xxs"]}):
        with pytest.raises(InputError, match="importance matrix"):
            convert(checkpoint, tmp_path / "out", "q4_k_m", **options)  # type: ignore[arg-type]


def test_one_of_another_model_is_refused(imatrix: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 256 columns, expected 128"):
        convert(tiny_checkpoint, tmp_path, "q4_k_m", imatrix=imatrix)


def test_tensors_without_statistics_are_named(checkpoint: Path, imatrix: Path, tmp_path: Path) -> None:
    whole = read_imatrix(imatrix)
    part = {n: e for n, e in whole.entries.items() if n != "blk.3.ffn_up.weight"}
    write_imatrix(tmp_path / "part.gguf", Imatrix(part))
    done = convert(checkpoint, tmp_path, "q4_k_m", "q8_0", tmp_path / "part.gguf")
    assert [w for w in done.warnings if "blk.3.ffn_up.weight" in w]
    with pytest.raises(InputError, match=r"blk.3.ffn_up.weight would be IQ3_XXS.*has nothing on it"):
        convert(checkpoint, tmp_path / "no", "iq3_xxs", "q8_0", tmp_path / "part.gguf")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": Entry(np.arange(5.0), 7), "mm.0.weight": Entry(np.zeros(3), 0)}
    write_imatrix(tmp_path / "i.gguf", Imatrix(entries, ("ä", "b"), 4, 512, {"qvl.imatrix.seen": 4}))
    found = read_imatrix(tmp_path / "i.gguf")
    assert (found.datasets, found.chunks, found.extra) == (("ä", "b"), 4, {"qvl.imatrix.seen": 4})
    assert [list(e.sums) for e in found.entries.values()] == [[0, 1, 2, 3, 4], [0, 0, 0]]
    assert list(found.importance()["mm.0.weight"]) == [1, 1, 1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(np.array([1.0, np.nan]), 3), "not finite"),
        (Entry(np.array([1.0, -1.0]), 3), "negative"),
    ],
)
def test_damaged_statistics_are_refused(entry: Entry, message: str, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", Imatrix({"blk.0.attn_q.weight": entry}))
    with pytest.raises(GGUFError, match=message):
        read_imatrix(tmp_path / "i.gguf")


def test_another_gguf_file_is_refused(tiny_model: Converted) -> None:
    with pytest.raises(GGUFError, match="not an importance matrix"):
        read_imatrix(tiny_model.text)
