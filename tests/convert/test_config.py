"""config.json, flat and nested, into the same hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoint import Shape, Style, config_json, special_ids

from qvl.convert.config import Yarn, read_config
from qvl.convert.families import qwen2_vl
from qvl.runtime.errors import CheckpointError

Change = Callable[[dict[str, Any]], object]


def save(
    folder: Path, style: Style, change: Change = lambda config: None, shape: Shape | None = None
) -> Path:
    config = config_json(shape or Shape(), style, special_ids())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_both_layouts_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    flat = read_config(save(tmp_path / "a", Style(config="flat")))
    nested = read_config(save(tmp_path / "b", Style(config="nested")))
    assert flat == nested
    assert flat.text.mrope_section == (4, 6, 6)
    assert (flat.text.head_dim, flat.vision.mlp_size, flat.text.tie_word_embeddings) == (32, 256, True)


def test_the_published_config(tmp_path: Path) -> None:
    """Qwen2-VL-7B's numbers, as its config.json has them."""
    shape = Shape(3584, 18944, 28, 4, 28, 1280, 16, 32, tied=False, vocab_size=152064)
    config = read_config(save(tmp_path, Style(), shape=shape))
    assert config.text.mrope_section == (16, 24, 24)
    assert config.text.head_dim == 128
    assert config.text.rope_theta == 1e6
    assert config.vision.embed_dim // config.vision.num_heads == 80


@pytest.mark.parity
def test_transformers_reads_and_saves_what_we_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("flat", "again"):
        (tmp_path / name).mkdir()
    ours = read_config(save(tmp_path / "flat", Style(config="flat")))
    reference = transformers.Qwen2VLConfig.from_pretrained(tmp_path / "flat")
    reference.save_pretrained(tmp_path / "again")
    assert "text_config" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert read_config(tmp_path / "again") == ours


def test_a_token_list_gives_its_first(tmp_path: Path) -> None:
    config = read_config(save(tmp_path, Style(), lambda c: c.update(eos_token_id=[7, 8])))
    assert config.text.eos_token_id == 7


def test_yarn_is_carried(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["rope_scaling"] |= {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}

    assert read_config(save(tmp_path, Style(), change)).text.yarn == Yarn(4.0, 8192)

    def constants(config: dict[str, Any]) -> None:
        change(config)
        config["rope_scaling"] |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.1}

    config = read_config(save(tmp_path, Style(), constants))
    metadata = qwen2_vl.text_metadata(config)
    kept = {key.split(".")[-1]: value for key, value in metadata.items() if ".yarn_" in key}
    assert kept == {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_attn_factor": 1.1}


def drop(key: str) -> Change:
    return lambda config: config.pop(key)


def put(**values: Any) -> Change:
    return lambda config: config.update(values)


def put_vision(**values: Any) -> Change:
    return lambda config: config["vision_config"].update(values)


def put_rope(**values: Any) -> Change:
    return lambda config: config["rope_scaling"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(model_type="llava"), "model_type is 'llava', expected one of qwen, qwen2_vl"),
        (drop("model_type"), "model_type is None"),
        (put(hidden_size=[]), r"hidden_size is \[\], expected a whole number"),
        (put(hidden_size="128"), "hidden_size is '128'"),
        (put(hidden_size=0), "hidden_size is 0"),
        (put(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
        (put(num_hidden_layers=True), "num_hidden_layers is True"),
        (put(num_attention_heads=3), "num_attention_heads is 3, expected a divisor of 128"),
        (put(num_key_value_heads=3), "a multiple of 3"),
        (put(rms_norm_eps=-1), "rms_norm_eps is -1"),
        (put(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (put(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (put(use_sliding_window=True, max_window_layers=1), "no sliding window"),
        (put(eos_token_id="</s>"), "eos_token_id is '</s>', expected a token id"),
        (put(rope_scaling=[]), r"rope_scaling is \[\], expected an object"),
        (put(rope_scaling=None), "mrope_section is nothing, expected three counts with the sum 16"),
        (put_rope(mrope_section=[1, 2, 3]), r"section is \[1, 2, 3\], expected three counts with the sum 16"),
        (put_rope(mrope_section=[16]), "mrope_section"),
        (put_rope(type="linear"), "rope_scaling.type is 'linear'"),
        (put_rope(type="yarn"), "rope_scaling.factor is nothing"),
        (put(vision_config=[]), r"vision_config is \[\]"),
        (put_vision(hidden_size=64), "vision_config.hidden_size is 64, expected the decoder's 128"),
        (put_vision(num_heads=32), "vision_config.num_heads is 32"),
        (put_vision(in_chans=1), "vision_config.in_chans is 1, expected 3"),
        (put_vision(temporal_patch_size=1), "temporal_patch_size is 1"),
        (put_vision(hidden_act="gelu"), "vision_config.hidden_act is 'gelu'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(save(tmp_path, Style(), change))
    assert "config.json" in str(caught.value)


def test_what_is_left_out_gets_the_class_defaults(tmp_path: Path) -> None:
    """As transformers' Qwen2VLTextConfig and Qwen2VLVisionConfig have them."""
    shape = Shape(3584, 18944, 64, 8, 80, 1280, 16, 32, tied=False, vocab_size=152064)

    def change(config: dict[str, Any]) -> None:
        for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size"):
            del config[key]
        for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "rope_scaling"):
            del config[key]
        config |= {"hidden_size": 8192, "text_config": None, "vision_config": {"hidden_size": 8192}}

    text = read_config(save(tmp_path, Style(), change, shape)).text
    assert (text.num_attention_heads, text.num_key_value_heads, text.num_hidden_layers) == (64, 8, 80)
    assert (text.rope_theta, text.rms_norm_eps, text.mrope_section) == (1e6, 1e-5, (16, 24, 24))
    assert (text.vocab_size, text.max_position_embeddings) == (152064, 32768)
    vision = read_config(tmp_path).vision
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.mlp_size) == (32, 1280, 16, 5120)


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (drop("hidden_size"), "hidden_size"),
        (put(text_config={"vocab_size": 4352}), "text_config.hidden_size, text_config.num_attention_heads"),
        (drop("vision_config"), "vision_config.embed_dim"),
    ],
)
def test_sizes_left_out_that_do_not_fit_are_named(tmp_path: Path, change: Change, left_out: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(save(tmp_path, Style(), change))
    assert "is incomplete" in str(caught.value.hint)
    assert left_out in str(caught.value.hint)


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by gptq to 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "by awq to 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by bitsandbytes to 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "by fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "by compressed-tensors"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_quantized_weights_are_refused_by_name(
    tmp_path: Path, found: dict[str, Any], named: str, nested: bool
) -> None:
    def change(config: dict[str, Any]) -> None:
        (config["text_config"] if nested else config)["quantization_config"] = found

    with pytest.raises(CheckpointError, match=f"quantized already, {named}") as caught:
        read_config(save(tmp_path, Style(config="nested" if nested else "flat"), change))
    assert "made from" in str(caught.value.hint)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"a": 1, "a": 2}'])
def test_damaged_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        read_config(tmp_path)
