"""config.json, flat and nested, into the same hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoint import Shape, Style, config_json, special_ids

from qvl.convert.config import Yarn, read_config
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
        (put(model_type="qwen2_5_vl"), "model_type is 'qwen2_5_vl', expected 'qwen2_vl'"),
        (drop("model_type"), "model_type is None"),
        (drop("hidden_size"), "hidden_size is nothing, expected a whole number"),
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
        (put(rope_scaling=None), "rope_scaling is None, expected an object"),
        (put_rope(mrope_section=[1, 2, 3]), r"section is \[1, 2, 3\], expected three counts with the sum 16"),
        (put_rope(mrope_section=[16]), "mrope_section"),
        (put_rope(type="linear"), "rope_scaling.type is 'linear'"),
        (put_rope(type="yarn"), "rope_scaling.factor is nothing"),
        (drop("vision_config"), "vision_config is nothing"),
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


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"a": 1, "a": 2}'])
def test_damaged_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        read_config(tmp_path)
