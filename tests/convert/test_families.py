"""Every family from its published layout: llama.cpp's converter and quantizer, transformers, and plain
numpy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from support.families import NAMES, VOCAB, family_config, family_tensors, write_family
from support.llama_log import silent_llama
from support.llama_quantize import llama_quantize, llama_types
from support.make_upstream import FAMILIES, record, source, upstream

from qvl.convert import Converted, convert
from qvl.convert.checkpoint import Checkpoint
from qvl.convert.config import read_config
from qvl.convert.mixtures import TEXT_RECIPES
from qvl.convert.recipe import plan_text
from qvl.convert.tensor_map import map_tensors
from qvl.runtime.errors import CheckpointError
from qvl.runtime.ggml.library import Type

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RECORDED: dict[str, Any] = json.loads((FIXTURES / "upstream_families.json").read_text(encoding="utf-8"))
# Upstream has its own names, and sampling in both files; its width of Qwen2-VL's MLPs is the decoder's.
APART = {"general.name", "general.size_label"}
WIDTH = "clip.vision.feed_forward_length"


def from_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 of BF16's bits."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    return {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in GGUFReader(path).tensors}


def compare(done: Converted, kind: str, theirs: dict[str, Any]) -> None:
    for part, path in (("text", done.text), ("mmproj", done.mmproj)):
        ours, upstreams = record(path), theirs[f"{part}-{kind}"]
        assert ours["tensors"] == upstreams["tensors"]
        apart = APART | (
            {WIDTH} if ours["metadata"].get("clip.projector_type") == "qwen2vl_merger" else set()
        )
        apart |= {k for k in upstreams["metadata"] if "sampling" in k} if part == "mmproj" else set()
        held = upstreams["metadata"].keys() - apart
        assert {k: ours["metadata"].get(k) for k in held} == {k: upstreams["metadata"][k] for k in held}


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_metadata_are_upstreams(tmp_path: Path, name: str, kind: str) -> None:
    """As recorded by tests/support/make_upstream.py."""
    folder = write_family(tmp_path / name, name)
    compare(convert(folder, tmp_path / "out", kind, kind), kind, RECORDED[name])


@pytest.mark.parity
@pytest.mark.skipif(source() is None, reason="no source of llama.cpp: .ci/setup VENV parity unpacks it")
def test_tensors_and_metadata_are_upstreams_now(tmp_path: Path) -> None:
    llama_cpp, names = source(), ("qwen2_vl", *FAMILIES)
    assert llama_cpp is not None
    folders = [write_family(tmp_path / name, name, seed=7) for name in names]
    for folder, theirs in zip(folders, upstream(llama_cpp, folders, ("f16",)), strict=True):
        compare(convert(folder, tmp_path / "out", "f16", "f16"), "f16", theirs)


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen_vl"])
def test_transformers_loads_the_layout(tmp_path: Path, name: str) -> None:
    """So that names and shapes of the tests' checkpoints are the published ones."""
    transformers = pytest.importorskip("transformers")
    folder = write_family(tmp_path / name, name)
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def wide(name: str, *, layers: int, width: int = 256, experts: int = 0) -> dict[str, Any]:
    """config.json of a family whose decoder's rows are `width` long, with a very small encoder."""
    config = family_config(name)
    text = config.get("text_config", config)
    text |= {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
    if name == "qwen2_5_vl":
        text["num_attention_heads"] = width // 32  # as the rotary sections have it
    text |= {"moe_intermediate_size": width} if "num_experts" in text else {}
    text |= {"num_experts": experts} if experts else {}
    config["vision_config"] |= {"out_hidden_size": width, "depth": 1}
    config["tie_word_embeddings"] = True
    one = {"fullatt_block_indexes": [0]} if name == "qwen2_5_vl" else {"deepstack_visual_indexes": []}
    config["vision_config"] |= one
    return config


WIDE_IQ = (Type.IQ4_XS, Type.IQ3_S, Type.IQ3_XXS)  # blocks of 256, as the K-quants have
FAMILY_TYPES = [("qwen2_5_vl", 0), ("qwen3_vl", 0), ("qwen3_vl_moe", 8), ("qwen3_vl_moe", 5)]
QUANTIZED = [k for k, r in TEXT_RECIPES.items() if k not in ("f32", "f16", "bf16") and not r.needs_imatrix]


@pytest.mark.parametrize("width", [256, 128])
@pytest.mark.parametrize(("name", "experts"), FAMILY_TYPES)
def test_types_are_libllamas(tmp_path: Path, name: str, experts: int, width: int) -> None:
    """Eight layers, so that all rules of a mixture apply; eight experts have rules of their own.

    Rows of 128 fall back, and are named.
    """
    config = wide(name, layers=8, width=width, experts=experts)
    folder = write_family(tmp_path / name, name, config=config)
    whole = convert(folder, tmp_path / "whole", "f32", "f32").text
    read = read_config(folder)
    with Checkpoint(folder) as checkpoint:
        tensors = map_tensors(read, checkpoint).text
    gqa = read.text.num_attention_heads // read.text.num_key_value_heads
    for kind in QUANTIZED:
        plan = plan_text(tensors, TEXT_RECIPES[kind], n_layer=8, gqa=gqa, n_expert=experts)
        theirs = llama_types(whole, TEXT_RECIPES[kind].file_type)
        assert {p.tensor.name: p.type.name for p in plan if p.type is not Type.F32} == theirs, kind
        of_256 = [p for p in plan if p.wanted.name.endswith("_K") or p.wanted in WIDE_IQ]
        fall_back = {p.tensor.name for p in of_256 if p.tensor.n_per_row % 256}
        assert {p.tensor.name for p in plan if p.type != p.wanted} == fall_back
    assert width == 256 or fall_back


@pytest.mark.parametrize(
    ("name", "kinds", "narrow"),
    [
        ("qwen2_5_vl", ("q3_k_m", "q5_k_m"), "q4_k_m"),
        ("qwen3_vl", ("q6_k", "q2_k"), "iq4_xs"),
        ("qwen3_vl_moe", ("q4_k_m", "iq4_xs"), "q5_k_m"),
    ],
)
def test_bytes_are_libllamas(tmp_path: Path, name: str, kinds: tuple[str, ...], narrow: str) -> None:
    """Also where rows fall back (`narrow`), with the vocabulary in one matrix."""
    for width, types in ((256, kinds), (128, (narrow,))):
        config = wide(name, layers=1, width=width, experts=3 if name == "qwen3_vl_moe" else 0)
        folder = write_family(tmp_path / f"{width}", name, config=config)
        whole = convert(folder, tmp_path / "whole", "f32", "f32", name="whole", force=True).text
        for kind in types:
            ours = convert(folder, tmp_path / "ours", kind, "f32", force=True).text
            theirs = llama_quantize(whole, tmp_path / "theirs.gguf", TEXT_RECIPES[kind].file_type)
            assert digests(ours) == digests(theirs), kind


def digests(path: Path) -> dict[str, tuple[str, str]]:
    return {
        t.name: (t.tensor_type.name, hashlib.sha256(np.ascontiguousarray(t.data)).hexdigest())
        for t in GGUFReader(path).tensors
    }


@pytest.mark.parametrize("name", NAMES)
def test_llama_opens_the_text(tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    done = convert(write_family(tmp_path / name, name), tmp_path, "q4_k_m", "q8_0")
    with silent_llama():
        model = llama_cpp.Llama(str(done.text), n_ctx=64, verbose=False)
    assert model.detokenize(model.tokenize(b"one red", add_bos=False)) == b"one red"


def test_rows_that_do_not_divide_fall_back(tmp_path: Path) -> None:
    """3420 and 4304, the widths of the encoders' MLPs: F16, by name."""
    for name, inner in (("qwen2_5_vl", 3420), ("qwen3_vl", 4304)):
        config = family_config(name)
        config["vision_config"] |= {"intermediate_size": inner, "depth": 2}
        config["vision_config"] |= (
            {"fullatt_block_indexes": [1]} if name == "qwen2_5_vl" else {"deepstack_visual_indexes": [0]}
        )
        done = convert(write_family(tmp_path / name, name, config=config), tmp_path, "q8_0", "q8_0")
        said = {(f.name, f.n_per_row, f.used) for f in done.files[1].fallbacks}
        assert said == {(f"v.blk.{i}.ffn_down.weight", inner, "F16") for i in range(2)}


def test_experts_saved_as_modules_hold_them(tmp_path: Path) -> None:
    """transformers 5 saves a model that it made itself without transposing; the same experts come out."""
    from support.checkpoint import write_safetensors

    folder = write_family(tmp_path / "moe", "qwen3_vl_moe")
    first = arrays(convert(folder, tmp_path / "a", "f32", "f32").text)
    tensors = family_tensors(folder, "qwen3_vl_moe")
    for name, values in tensors.items():
        if ".experts." in name:
            tensors[name] = np.ascontiguousarray(values.swapaxes(1, 2))
    write_safetensors(folder / "model.safetensors", tensors, "BF16")
    again = arrays(convert(folder, tmp_path / "b", "f32", "f32").text)
    for name, values in first.items():
        np.testing.assert_array_equal(again[name], values)


def test_qwen_vl_rows(tmp_path: Path) -> None:
    """Cuts, de-interleaving by head, the gate and the transposed projection, written out in numpy."""
    folder = write_family(tmp_path / "c", "qwen_vl")
    done = convert(folder, tmp_path / "g", "f32", "f32")
    text, vision = arrays(done.text), arrays(done.mmproj)
    source = {name: from_bits(values) for name, values in family_tensors(folder, "qwen_vl").items()}
    same = np.testing.assert_array_equal
    for i, letter in enumerate("qkv"):
        block, visual = (
            "transformer.h.1.attn.c_attn.",
            "transformer.visual.transformer.resblocks.2.attn.in_proj.",
        )
        pool = "transformer.visual.attn_pool.attn.in_proj_"
        for kind in ("weight", "bias"):
            same(text[f"blk.1.attn_{letter}.{kind}"], source[block + kind][128 * i : 128 * (i + 1)])
            by_head = source[visual + kind].reshape(2, 3, 32, *source[visual + kind].shape[1:])[:, i]
            same(vision[f"v.blk.2.attn_{letter}.{kind}"], by_head.reshape(64, *by_head.shape[2:]))
            same(vision[f"resampler.attn.{letter}.{kind}"], source[pool + kind][128 * i : 128 * (i + 1)])
    same(text["blk.0.ffn_gate.weight"], source["transformer.h.0.mlp.w2.weight"])
    same(text["blk.0.ffn_up.weight"], source["transformer.h.0.mlp.w1.weight"])
    same(vision["resampler.proj.weight"], source["transformer.visual.proj"].T)
    same(vision["resampler.query"], source["transformer.visual.attn_pool.query"])


@pytest.mark.parametrize(("chat", "end"), [(True, "<|im_end|>"), (False, "<|endoftext|>")])
def test_qwen_vl_tokens(tmp_path: Path, chat: bool, end: str) -> None:
    done = convert(write_family(tmp_path / "c", "qwen_vl", chat=chat), tmp_path, "q8_0", "q8_0")
    value = {name: field.contents() for name, field in GGUFReader(done.text).fields.items()}
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    base = json.loads((FIXTURES / "tokenizer" / "vocab.json").read_text())
    assert tokens[: len(base)] == list(base)
    merges = (FIXTURES / "tokenizer" / "merges.txt").read_text(encoding="utf-8")
    assert sorted(value["tokenizer.ggml.merges"]) == sorted(merges.split("\n")[:-1])
    first = len(base)
    assert tokens[first : first + 4] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"]
    assert tokens[first + 208 : first + 217][-3:] == ["<img>", "</img>", "<imgpad>"]
    assert set(types[first : first + 217]) == {3} and set(types[first + 217 :]) == {5}
    assert tokens[value["tokenizer.ggml.eos_token_id"]] == end
    assert value["qvl.chat_format"] == ("chatml" if chat else "raw")
    assert ("tokenizer.chat_template" in value) is chat


def test_a_tokenizer_without_the_prompts_tokens_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "c", "qwen3_vl")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for value in settings["added_tokens_decoder"].values():
        value["content"] = value["content"].replace("im_start", "start")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"no <\|im_start\|>, which prompts"):
        convert(folder, tmp_path)


def test_every_stop_token_is_written(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "c", "qwen2_5_vl")
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = [*generation["eos_token_id"], 77, VOCAB + 5]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    value = {n: f.contents() for n, f in GGUFReader(convert(folder, tmp_path).text).fields.items()}
    assert value["qvl.tokenizer.eos_token_ids"] == generation["eos_token_id"][:3]
    assert value["tokenizer.ggml.eot_token_id"] == 77


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [0, 3]}, "fullatt_block_indexes is"),
        ("qwen2_5_vl", "vision_config", {"window_size": 100}, "window_size is 100"),
        ("qwen2_5_vl", "vision_config", {"hidden_act": "gelu"}, "expected 'silu'"),
        ("qwen3_vl", "vision_config", {"num_position_embeddings": 65}, "expected a square"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [4, 1]}, "in rising order"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [1, 6]}, "below 6"),
        ("qwen3_vl", "text_config", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_vl_moe", "text_config", {"mlp_only_layers": [0]}, "experts in every layer"),
        ("qwen3_vl_moe", "text_config", {"num_experts_per_tok": 9}, "at most 8"),
        ("qwen_vl", "visual", {"image_size": 140}, "image_size is 140"),
        ("qwen_vl", "visual", {"heads": 3}, "heads is 3"),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    tmp_path: Path, name: str, section: str, change: dict[str, Any], message: str
) -> None:
    config = family_config(name)
    config[section] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)
