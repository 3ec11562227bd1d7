"""Importance matrices of mixtures of experts: counted by expert, and used by expert."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.families import family_config, write_family
from support.gguf_bytes import tensor_bytes
from support.llama_quantize import llama_quantize
from support.peers import run_peer

from qvl.convert import Converted, convert
from qvl.convert.mixtures import TEXT_RECIPES
from qvl.runtime.errors import InputError
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qvl.runtime.measure.activations import by_expert
from qvl.runtime.measure.calibrate import CalibrationPlan, calibrate
from qvl.runtime.measure.pair import Pair

N_EXPERTS, N_USED, LAYERS = 8, 2, 2
STACKS = [f"blk.{i}.ffn_{part}_exps.weight" for i in range(LAYERS) for part in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with rows of whole blocks of 256."""
    config = family_config("qwen3_vl_moe")
    config["text_config"] |= {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": LAYERS}
    config["vision_config"] |= {"out_hidden_size": 256, "depth": 1, "deepstack_visual_indexes": []}
    return write_family(tmp_path_factory.mktemp("moe") / "moe", "qwen3_vl_moe", config=config)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert(checkpoint, tmp_path_factory.mktemp("whole"), "f32", "f32")


def counted(whole: Converted, text: str, out: Path) -> tuple[Imatrix, list[str]]:
    warnings: list[str] = []
    files = ModelFiles(whole.text, whole.mmproj)
    calibrate(
        files, CalibrationPlan(text=text, chunk=64, products=False), out, n_ctx=128, warn=warnings.append
    )
    return read_imatrix(out), warnings


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1))
def test_inputs_go_to_the_experts_that_saw_them(n_tokens: int, used: int, shared: bool, seed: int) -> None:
    """As llama.cpp's `collect_imatrix` loops: over the ids, then over the tokens."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n_tokens, 1 if shared else used, 4)).astype(np.float32)
    ids = np.stack([rng.permutation(5)[:used] for _ in range(n_tokens)]).astype(np.int32)
    sums, counts = np.zeros((5, 4)), [0] * 5
    for i in range(used):
        for token in range(n_tokens):
            sums[ids[token, i]] += np.square(values[token, i % values.shape[1]].astype(np.float64))
            counts[ids[token, i]] += 1
    found = by_expert(values, ids, 5)
    assert list(np.asarray(found.count)) == counts
    np.testing.assert_allclose(found.sums, sums, rtol=1e-5)


def test_all_inputs_are_counted_once_for_each_expert_used(whole: Converted, tmp_path: Path) -> None:
    found, _ = counted(whole, "Hello there. " * 40, tmp_path / "i.gguf")
    n_tokens = found.entries["blk.0.attn_q.weight"].count
    for name in STACKS:
        entry = found.entries[name]
        assert entry.sums.shape == (N_EXPERTS, 256)
        assert np.sum(entry.count) == N_USED * n_tokens
    for i in range(LAYERS):  # the router and all of gate and up have the same input
        gate, up, router = (
            found.entries[f"blk.{i}.ffn_{part}.weight"] for part in ("gate_exps", "up_exps", "gate_inp")
        )
        np.testing.assert_array_equal(gate.sums, up.sums)
        np.testing.assert_allclose(gate.sums.sum(0), N_USED * router.sums, rtol=1e-4)


def test_files_quantize_as_llama_cpps(checkpoint: Path, whole: Converted, tmp_path: Path) -> None:
    """Two tokens leave experts without inputs: these have equal weights, upstream too."""
    found, warnings = counted(whole, "Hi", tmp_path / "i.gguf")
    assert set(found.partial) == set(STACKS)
    assert [w for w in warnings if "without data" in w]
    unused = np.asarray(found.entries[STACKS[0]].count) == 0
    importance = found.importance()[STACKS[0]]
    assert (importance[unused] == 1).all() and (importance[~unused] != 1).any()
    plain = tensor_bytes(convert(checkpoint, tmp_path / "plain", "q4_k_m", "f32").text)
    for kind in ("q4_k_m", "iq4_xs", "q3_k_m", "q2_k"):
        ours = tensor_bytes(convert(checkpoint, tmp_path / kind, kind, "f32", tmp_path / "i.gguf").text)
        theirs = llama_quantize(
            whole.text, tmp_path / "theirs.gguf", TEXT_RECIPES[kind].file_type, tmp_path / "i.gguf"
        )
        assert ours == tensor_bytes(theirs), kind
        if kind == "q4_k_m":
            assert all(ours[name] != plain[name] for name in STACKS)


def test_sums_of_a_single_count_are_shared_out(checkpoint: Path, whole: Converted, tmp_path: Path) -> None:
    """Old files of llama-imatrix count a stack once."""
    rng = np.random.default_rng(0)
    rows = {name: np.exp(rng.standard_normal((N_EXPERTS, 256))) for name in STACKS}
    files = []
    for path, flat in ((tmp_path / "one.gguf", True), (tmp_path / "each.gguf", False)):
        entries = {
            name: Entry(sums.ravel(), 3) if flat else Entry(sums, np.full(N_EXPERTS, 3))
            for name, sums in rows.items()
        }
        write_imatrix(path, Imatrix(entries))
        files.append(tensor_bytes(convert(checkpoint, tmp_path, "q4_0", "f32", path, force=True).text))
    assert files[0] == files[1]


def test_another_number_of_experts_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", Imatrix({STACKS[0]: Entry(np.ones((4, 256)), np.ones(4, np.int64))}))
    with pytest.raises(InputError, match="has 4x256 columns, expected 8x256"):
        convert(checkpoint, tmp_path, "q4_0", "f32", tmp_path / "i.gguf")


def test_llama_imatrix_finds_the_same(whole: Converted, tmp_path: Path) -> None:
    """The real program on the same text: the same sums and counts, expert by expert."""
    text = "Hello there, the quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "t.txt").write_text(text)
    out = tmp_path / "theirs.gguf"
    options = ("-c", 64, "--no-ppl", "-t", 1, "--no-repack", "-fa", "off", "--cache-type-k", "f32")
    run_peer("llama-imatrix", "-m", whole.text, "-f", tmp_path / "t.txt", "-o", out, *options)
    theirs = read_imatrix(out)
    with Pair(ModelFiles(whole.text, None), n_ctx=128) as pair:
        tokens = pair.text.vocab.tokenize(text)
        same = pair.text.vocab.detokenize(tokens[: len(tokens) // 64 * 64])
    ours, _ = counted(whole, same, tmp_path / "ours.gguf")
    assert ours.entries.keys() == theirs.entries.keys()
    for name, entry in ours.entries.items():
        np.testing.assert_array_equal(entry.count, theirs.entries[name].count, err_msg=name)
        expected: NDArray[np.float64] = theirs.entries[name].sums
        assert entry.sums.shape == expected.shape
        assert np.abs(entry.sums - expected).max() < 2e-3 * expected.max(), name
