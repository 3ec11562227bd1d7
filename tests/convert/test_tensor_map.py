"""Names and cuts: against llama.cpp's own name table, and against the checkpoint's values."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from support.checkpoint import Shape, Style, encode, weights, write_checkpoint, write_weights

from qvl.convert import Converted, convert
from qvl.convert.checkpoint import Checkpoint
from qvl.convert.config import read_config
from qvl.convert.families import qwen2_vl
from qvl.convert.tensor_map import canonical, map_tensors
from qvl.runtime.errors import CheckpointError

Arrays = dict[str, npt.NDArray[np.float32]]


def arrays(path: Path) -> Arrays:
    """Float32 tensors of a file by gguf's reader, rows first."""
    return {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in GGUFReader(path).tensors}


def test_text_names_are_upstreams(tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, config.text.num_hidden_layers)
    for mapped in qwen2_vl.text_rows(config):
        assert table.get_name(mapped.source, try_suffixes=(".weight", ".bias")) == mapped.name


def test_vision_names_are_upstreams(tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 3)  # mm.{bid} counts to 2
    for mapped in qwen2_vl.vision_rows(config):
        letter = re.search(r"attn_([qkv])\.", mapped.name)
        source = mapped.source.replace("qkv", letter[1]) if letter else mapped.source
        name = mapped.name.removesuffix(".1")
        assert table.get_name(source, try_suffixes=(".weight", ".bias")) == name


def test_values_land_where_they_belong(tiny_model: Converted) -> None:
    source = dict(weights(Shape(), Style(chat_template="chatml")))
    text, vision = arrays(tiny_model.text), arrays(tiny_model.mmproj)
    same = np.testing.assert_array_equal
    same(text["token_embd.weight"], source["model.embed_tokens.weight"])
    same(text["blk.1.ffn_down.weight"], source["model.layers.1.mlp.down_proj.weight"])
    same(text["blk.0.attn_k.bias"], source["model.layers.0.self_attn.k_proj.bias"])
    same(text["output_norm.weight"], source["model.norm.weight"])
    assert "output.weight" not in text
    conv = source["visual.patch_embed.proj.weight"]
    same(vision["v.patch_embd.weight"], conv[:, :, 0])
    same(vision["v.patch_embd.weight.1"], conv[:, :, 1])
    for kind in ("weight", "bias"):
        whole = [vision[f"v.blk.1.attn_{letter}.{kind}"] for letter in "qkv"]
        same(np.concatenate(whole), source[f"visual.blocks.1.attn.qkv.{kind}"])
    same(vision["v.blk.0.ffn_up.weight"], source["visual.blocks.0.mlp.fc1.weight"])
    same(vision["v.blk.0.ln2.bias"], source["visual.blocks.0.norm2.bias"])
    same(vision["v.post_ln.weight"], source["visual.merger.ln_q.weight"])
    same(vision["mm.2.weight"], source["visual.merger.mlp.2.weight"])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_layout_gives_the_same_tensors(tmp_path: Path, dtype: str, tied: bool) -> None:
    shape = Shape(tied=tied)
    files = []
    for i, style in enumerate(
        (
            Style(dtype=dtype),  # type: ignore[arg-type]
            Style(dtype=dtype, config="nested", names="modules", tokenizer="fast", shards=3),  # type: ignore[arg-type]
            Style(dtype=dtype, config="nested", names="published", shards=2),  # type: ignore[arg-type]
        )
    ):
        folder = write_checkpoint(tmp_path / f"c{i}", shape, style)
        files.append(convert(folder, tmp_path / f"g{i}", "f32", "f32"))
    first = arrays(files[0].text) | arrays(files[0].mmproj)
    assert ("output.weight" in first) is not tied
    for other in files[1:]:
        again = arrays(other.text) | arrays(other.mmproj)
        assert again.keys() == first.keys()
        for name in first:
            np.testing.assert_array_equal(again[name], first[name])


def test_the_source_type_is_read_exactly(tmp_path: Path) -> None:
    for dtype in ("BF16", "F16"):
        style = Style(dtype=dtype)  # type: ignore[arg-type]
        folder = write_checkpoint(tmp_path / dtype, style=style)
        done = convert(folder, tmp_path / f"out-{dtype}", "f32", "f32")
        stored = dict(weights(Shape(), style))["model.layers.0.mlp.up_proj.weight"]
        if dtype == "BF16":
            expected = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            expected = stored.astype(np.float32)
        np.testing.assert_array_equal(arrays(done.text)["blk.0.ffn_up.weight"], expected)


def rewrite(folder: Path, change: dict[str, npt.NDArray[np.float32] | None]) -> None:
    tensors = dict(weights(Shape(), Style()))
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = encode(value, "F32")
    write_weights(folder, tensors, Style())


def test_left_over_and_missing_are_named_as_sets(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    extra = np.zeros(3, np.float32)
    rewrite(
        folder, {"model.norm.weight": None, "visual.merger.ln_q.bias": None, "audio.x": extra, "b.y": extra}
    )
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out")
    assert "2 tensors left over: {audio.x, b.y}" in str(caught.value)
    assert "2 tensors missing: {model.norm.weight, visual.merger.ln_q.bias}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", Shape(tied=False))
    rewrite(folder, {})
    with pytest.raises(CheckpointError, match=r"missing: \{lm_head\.weight\}"):
        convert(folder, tmp_path / "out")


def test_a_tied_head_and_rotary_tables_are_ignored_and_said(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    head, table = dict(weights(Shape(), Style()))["model.embed_tokens.weight"], np.zeros(16, np.float32)
    rewrite(folder, {"lm_head.weight": head, "visual.rotary_pos_emb.inv_freq": table})
    done = convert(folder, tmp_path / "out", "f32", "f32")
    assert done.warnings == ("not used: lm_head.weight, visual.rotary_pos_emb.inv_freq",)


def test_a_shape_other_than_the_configs_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    rewrite(folder, {"model.layers.1.mlp.up_proj.weight": np.zeros((256, 127), np.float32)})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \[256, 127\], expected"
    ):
        convert(folder, tmp_path / "out")


def test_weights_of_integers_are_refused_by_type(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    path = folder / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(
            b'"model.norm.weight":{"dtype":"F32"', b'"model.norm.weight":{"dtype":"I32"'
        )
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight' is I32, expected one of BF16") as caught:
        convert(folder, tmp_path / "out")
    assert "quantized" in str(caught.value.hint)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    rewrite(folder, {"model.language_model.norm.weight": np.zeros(128, np.float32)})
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="are the same tensor"):
        map_tensors(read_config(folder), checkpoint)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("model.visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_canonical(name: str, published: str) -> None:
    assert canonical(name) == published
