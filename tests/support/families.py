"""Tiny random checkpoints of every family in its published layout: numpy only.

    write_family(folder, "qwen3_vl")            # a folder that `convert` takes and transformers loads
    write_family(folder, "qwen_vl")             # ten pickled shards and qwen.tiktoken

Tensor names and shapes come from the conversion's own rows; that they are the published ones is held by
loading the checkpoints with transformers (tests/convert/test_families.py).
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from support.checkpoint import CHATML, PREPROCESSOR, TOKENIZER, encode, special_ids, write_safetensors

from qvl.convert.config import read_config
from qvl.convert.family import conversion

Tensors = dict[str, npt.NDArray[Any]]
NAMES: Final = ("qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
VOCAB: Final = 4352
_SECTIONS: Final = {"mrope_section": [4, 6, 6], "type": "mrope"}
_TEXT: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
}
_VISION: Final[dict[str, Any]] = {
    "depth": 4,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def family_config(name: str) -> dict[str, Any]:
    """config.json of a tiny model."""
    ids = special_ids()
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text = _TEXT | {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    if name == "qwen_vl":
        return {
            "architectures": ["QWenLMHeadModel"],
            "model_type": "qwen",
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "intermediate_size": 512,
            "vocab_size": 4480,
            "layer_norm_epsilon": 1e-6,
            "seq_length": 2048,
            "max_position_embeddings": 8192,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "kv_channels": 128,
            "no_bias": True,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "visual": {
                "heads": 2,
                "image_size": 112,
                "image_start_id": 4466,
                "layers": 3,
                "mlp_ratio": 4.9231,
                "output_dim": 128,
                "patch_size": 14,
                "width": 64,
                "n_queries": 16,
            },
        }
    if name == "qwen2_vl":
        vision = _VISION | {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 4, "patch_size": 14}
        return {
            **tokens,
            **text,
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "num_hidden_layers": 2,
            "rope_theta": 1e6,
            "rope_scaling": _SECTIONS,
            "tie_word_embeddings": True,
            "vision_config": vision,
        }
    if name == "qwen2_5_vl":
        vision = _VISION | {
            "hidden_size": 64,
            "out_hidden_size": 128,
            "intermediate_size": 108,
            "patch_size": 14,
            "hidden_act": "silu",
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "tokens_per_second": 2,
        }
        return {
            **tokens,
            **text,
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "num_hidden_layers": 2,
            "rope_theta": 1e6,
            "rope_scaling": _SECTIONS,
            "tie_word_embeddings": False,
            "vision_config": vision,
        }
    experts = name == "qwen3_vl_moe"
    text |= {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "attention_bias": False,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        "model_type": f"{name}_text",
        "max_position_embeddings": 262144,
    }
    if experts:
        text |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    vision = _VISION | {
        "hidden_size": 64,
        "out_hidden_size": 128,
        "intermediate_size": 108,
        "patch_size": 16,
        "depth": 6,
        "hidden_act": "gelu_pytorch_tanh",
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 2, 4],
        "model_type": name,
    }
    kind = "Qwen3VLMoeForConditionalGeneration" if experts else "Qwen3VLForConditionalGeneration"
    return {
        **tokens,
        "architectures": [kind],
        "model_type": name,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": not experts,
    }


def write_family(
    folder: Path, name: str, *, dtype: str = "BF16", seed: int = 0, chat: bool = True, config: Any = None
) -> Path:
    """Write a checkpoint into a folder, which is made; returns the folder.

    Args:
        name: one of `NAMES`.
        chat: Qwen-VL-Chat rather than Qwen-VL; for the others ChatML as template.
        config: another config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "config.json", config or family_config(name))
    tensors = family_tensors(folder, name, dtype=dtype, seed=seed)
    if name == "qwen_vl":
        _dump(
            folder / "generation_config.json",
            {
                "chat_format": "chatml" if chat else "raw",
                "eos_token_id": 4252,
                "pad_token_id": 4252,
                "top_p": 0.5,
                "top_k": 0,
                "max_new_tokens": 512,
            },
        )
        vocab = json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
        (folder / "qwen.tiktoken").write_text(tiktoken_lines(vocab), encoding="ascii")
        write_pickles(folder, tensors, dtype)
        return folder
    ids = special_ids()
    _dump(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "presence_penalty": 1.5,
        },
    )
    later = name.startswith("qwen3")
    _dump(
        folder / "preprocessor_config.json",
        PREPROCESSOR
        | (
            {
                "patch_size": 16,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "min_pixels": None,
                "max_pixels": None,
                "size": {"shortest_edge": 65536, "longest_edge": 16777216},
            }
            if later
            else {}
        ),
    )
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    if chat:
        settings["chat_template"] = CHATML
    _dump(folder / "tokenizer_config.json", settings)
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    write_safetensors(folder / "model.safetensors", tensors, dtype)
    return folder


def family_tensors(folder: Path, name: str, *, dtype: str = "BF16", seed: int = 0) -> Tensors:
    """Random tensors by published name for the folder's config.json; BF16 as its bits."""
    config = read_config(folder)
    module = conversion(config.family)
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for mapped in (*module.text_rows(config), *module.vision_rows(config)):
        published = mapped.source
        if name.startswith("qwen3") and published != "lm_head.weight":
            published = published.replace("model.", "model.language_model.", 1)
            published = f"model.{published}" if published.startswith("visual.") else published
        if published not in tensors:
            values = 0.06 * rng.standard_normal(mapped.source_shape, dtype=np.float32)
            if "norm" in mapped.name or ".ln" in mapped.name or "_ln." in mapped.name:
                values += 1.0 if published.endswith("weight") else 0.0
            tensors[published] = encode(values, dtype)
    return tensors


def tiktoken_lines(vocab: Mapping[str, int]) -> str:
    """qwen.tiktoken of a vocabulary in byte letters."""
    printable = [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    tokens = sorted(vocab.items(), key=lambda item: item[1])
    return "".join(
        f"{base64.b64encode(bytes(byte[letter] for letter in token)).decode()} {rank}\n"
        for token, rank in tokens
    )


def write_pickles(folder: Path, tensors: Tensors, dtype: str, shards: int = 10) -> None:
    """pytorch_model-000NN-of-000MM.bin and their index, in the zip format of torch.save."""
    names, weight_map = list(tensors), {}
    for k in range(shards):
        part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        file = f"pytorch_model-{k + 1:05}-of-{shards:05}.bin"
        write_torch_zip(folder / file, {name: tensors[name] for name in part}, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    _dump(folder / "pytorch_model.bin.index.json", index)


def write_torch_zip(path: Path, tensors: Tensors, dtype: str) -> None:
    """A state dict as torch.save writes it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", state_pickle(tensors, dtype))
        archive.writestr("archive/byteorder", "little")
        for i, tensor in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", np.ascontiguousarray(tensor).tobytes())
        archive.writestr("archive/version", "3\n")


def state_pickle(tensors: Tensors, dtype: str) -> bytes:
    """The pickle of an OrderedDict of tensors, opcode by opcode (protocol 2)."""
    storage = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}[dtype]
    out = io.BytesIO()
    out.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for i, (name, tensor) in enumerate(tensors.items()):
        strides = [int(np.prod(tensor.shape[k + 1 :])) for k in range(tensor.ndim)]
        out.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(")
        out.write(b"(" + _text("storage") + f"ctorch\n{storage}\n".encode() + _text(str(i)) + _text("cpu"))
        out.write(_int(tensor.size) + b"tQ" + _int(0) + _tuple(tensor.shape) + _tuple(strides) + b"\x89")
        out.write(b"ccollections\nOrderedDict\n)RtR")
    out.write(b"u.")
    return out.getvalue()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _tuple(values: Any) -> bytes:
    return b"(" + b"".join(_int(int(value)) for value in values) + b"t"


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
