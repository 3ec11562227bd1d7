"""Which text files may be opened, and that none ends the process; llama.cpp's log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from support.checkpoint import BYTES_SIZE, Shape, Style, write_checkpoint
from support.gguf_edit import edit

from qvl.convert import Converted, convert
from qvl.runtime.errors import BackendError, Cancelled, GGUFError
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.llama.binding import complaints
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel


@pytest.fixture(scope="module")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with hardly any vocabulary, to be edited often."""
    folder = tmp_path_factory.mktemp("small")
    shape = Shape(vocab_size=BYTES_SIZE)
    checkpoint = write_checkpoint(folder / "small", shape, Style(tokenizer="bytes", chat_template="chatml"))
    return convert(checkpoint, folder, "f32", "f32").text


def test_sizes_and_vocabulary(model: LlamaModel, tiny_shape: Any) -> None:
    h = model.hparams
    assert (h.n_layer, h.n_embd, h.n_head, h.n_head_kv) == (
        tiny_shape.layers, tiny_shape.hidden, tiny_shape.heads, tiny_shape.kv_heads,
    )  # fmt: skip
    assert h.n_vocab == model.vocab.n_tokens == tiny_shape.vocab_size
    assert h.kv_bytes(1024) == 2 * 2 * h.n_layer * h.n_head_kv * h.head_dim * 1024
    ends = {model.vocab.control("<|im_end|>"), model.vocab.control("<|endoftext|>")}
    assert model.vocab.end_tokens == ends


F32 = np.float32
DAMAGE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "llama"}, {}, "architecture 'llama'"),
    "no architecture": ({"general.architecture": ""}, {}, "architecture 'not given'"),
    "no layers": ({"qwen2vl.block_count": 0}, {}, "block_count is 0"),
    "absurdly many layers": ({"qwen2vl.block_count": 4_000_000_000}, {}, "block_count is 4000000000"),
    "a layer too few": ({"qwen2vl.block_count": 1}, {}, "do not belong"),
    "a layer too many": ({"qwen2vl.block_count": 3}, {}, "are missing: blk.2"),
    "no width": ({"qwen2vl.embedding_length": None}, {}, "embedding_length is missing"),
    "a width that is text": ({"qwen2vl.embedding_length": "128"}, {}, "embedding_length is '128'"),
    "another width": ({"qwen2vl.embedding_length": 256}, {}, "expected a sum"),
    "no heads": ({"qwen2vl.attention.head_count": 0}, {}, "head_count is 0"),
    "heads that do not divide": ({"qwen2vl.attention.head_count": 3}, {}, "do not divide"),
    "key heads that do not divide": ({"qwen2vl.attention.head_count_kv": 3}, {}, "do not divide"),
    "no rope sections": ({"qwen2vl.rope.dimension_sections": None}, {}, "dimension_sections is None"),
    "zero rope sections": ({"qwen2vl.rope.dimension_sections": [0, 0, 0, 0]}, {}, "three positive"),
    "odd rope sections": ({"qwen2vl.rope.dimension_sections": [4, 4, 4, 0]}, {}, "expected a sum"),
    "another head width": ({"qwen2vl.attention.key_length": 64}, {}, "key_length is 64, expected 32"),
    "another rope width": ({"qwen2vl.rope.dimension_count": 16}, {}, "dimension_count is 16"),
    "no epsilon": ({"qwen2vl.attention.layer_norm_rms_epsilon": None}, {}, "rms_epsilon is missing"),
    "a negative epsilon": ({"qwen2vl.attention.layer_norm_rms_epsilon": -1.0}, {}, "positive number"),
    "a base that is no number": ({"qwen2vl.rope.freq_base": float("nan")}, {}, "freq_base is nan"),
    "an unknown rope scaling": ({"qwen2vl.rope.scaling.type": "spiral"}, {}, "'spiral'"),
    "experts": ({"qwen2vl.expert_count": 8}, {}, "expert_count is 8, expected 0"),
    "experts used": ({"qwen2vl.expert_used_count": [1, 1]}, {}, "expert_used_count is [1, 1]"),
    "groups of experts": ({"qwen2vl.expert_group_count": 2}, {}, "expert_group_count is 2"),
    "attention to what follows": ({"qwen2vl.attention.causal": False}, {}, "causal is False, expected True"),
    "another output width": ({"qwen2vl.embedding_length_out": 64}, {}, "embedding_length_out is 64"),
    "a scaling that is no number": ({"qwen2vl.rope.scaling.factor": float("inf")}, {}, "factor is inf"),
    "a context of nothing": ({"qwen2vl.rope.scaling.original_context_length": 0}, {}, "context_length is 0"),
    "an epsilon of nan": ({"qwen2vl.attention.layer_norm_rms_epsilon": float("nan")}, {}, "is nan"),
    "an epsilon of another type": ({"qwen2vl.attention.layer_norm_rms_epsilon": 1}, {}, "epsilon is 1"),
    "heads for each layer": ({"qwen2vl.attention.head_count": [4, 4]}, {}, "head_count is [4, 4]"),
    "a template that is a number": ({"tokenizer.chat_template": 7}, {}, "chat_template is 7, expected text"),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, {}, "tokens is not a list"),
    "a vocabulary too short": ({"tokenizer.ggml.tokens": ["a", "b"]}, {}, "2 tokens for an embedding"),
    "token types missing": ({"tokenizer.ggml.token_type": [1, 2]}, {}, "does not have a number for each"),
    "another tokenizer": ({"tokenizer.ggml.model": "llama"}, {}, "'llama', expected 'gpt2'"),
    "a tensor missing": ({}, {"blk.0.attn_q.weight": None}, "1 tensors are missing: blk.0.attn_q.weight"),
    "a tensor too many": ({}, {"blk.0.what.weight": np.ones((2, 2), F32)}, "do not belong"),
    "a tensor of another shape": ({}, {"blk.0.attn_k.weight": np.ones((32, 128), F32)}, "expected [64, 128]"),
    "a norm in half precision": ({}, {"output_norm.weight": np.ones(128, np.float16)}, "expected F32"),
    "a weight of integers": ({}, {"blk.1.ffn_up.weight": np.ones((256, 128), np.int32)}, "is I32"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(small_text: Path, tmp_path: Path, name: str) -> None:
    metadata, tensors, complaint = DAMAGE[name]
    damaged = edit(small_text, tmp_path / "damaged.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(GGUFError) as caught:
        LlamaModel(damaged, device="cpu")
    assert complaint in caught.value.message and str(damaged) in caught.value.message
    assert caught.value.hint


def test_a_token_twice_is_refused(small_text: Path, tmp_path: Path) -> None:
    tokens = list(read_gguf(small_text).metadata["tokenizer.ggml.tokens"])
    tokens[7] = tokens[8]
    damaged = edit(small_text, tmp_path / "twice.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(GGUFError, match="same token twice"):  # llama.cpp would abort
        LlamaModel(damaged, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer.ggml.pre", "klingon"), ("tokenizer.ggml.merges", None), ("tokenizer.ggml.merges", 7)],
)
def test_what_is_llama_cpps_to_refuse(small_text: Path, tmp_path: Path, key: str, value: Any) -> None:
    odd = edit(small_text, tmp_path / "odd.gguf", metadata={key: value})
    with pytest.raises(BackendError, match=rf"{value or 'merges'}|{key}"):
        LlamaModel(odd, device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_file_cut_short_is_refused(small_text: Path, tmp_path: Path, share: float) -> None:
    data = small_text.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(GGUFError, match=r"cut\.gguf"):
        LlamaModel(cut, device="cpu")


def test_every_end_token_of_the_file_ends_a_reply(small_text: Path, tmp_path: Path) -> None:
    odd = edit(small_text, tmp_path / "ends.gguf", metadata={"qvl.tokenizer.eos_token_ids": [3, 5, 10**6]})
    with LlamaModel(odd, device="cpu") as model:
        assert {3, 5} <= model.vocab.end_tokens
        assert 10**6 not in model.vocab.end_tokens
    wrong = edit(small_text, tmp_path / "wrong.gguf", metadata={"qvl.tokenizer.eos_token_ids": "3"})
    with pytest.raises(GGUFError, match="expected a list of token ids"):
        LlamaModel(wrong, device="cpu")


def test_a_reply_never_ends_in_half_a_character(model: LlamaModel) -> None:
    tokens = model.vocab.tokenize("a \U0001f9d9")
    whole = model.vocab.text(tokens)
    assert whole == "a \U0001f9d9" and len(tokens) > 2
    for n in range(len(tokens)):
        cut = model.vocab.text(tokens[:n])
        assert whole.startswith(cut) and "\ufffd" not in cut


def test_an_mmproj_is_no_text_model(tiny_model: Converted) -> None:
    with pytest.raises(GGUFError, match="this is an mmproj file") as caught:
        LlamaModel(tiny_model.mmproj)
    assert "`mmproj`" in (caught.value.hint or "")


def test_bytes_changed_anywhere_in_the_header_never_abort(small_text: Path, tmp_path: Path) -> None:
    """In a process of its own, since an assertion would end it."""
    script = """
import sys
import numpy as np
from pathlib import Path
from qvl.runtime.errors import QvlError
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
data = bytearray(source.read_bytes())
rng = np.random.default_rng(0)
opened = refused = 0
for i in range(60):
    # the metadata before the vocabulary, and the tensor directory after it, are where the numbers are
    start, end = ((0, 1400), (TENSORS, TENSORS + 1800))[i % 2]
    changed = bytearray(data)
    changed[rng.integers(start, end)] = rng.integers(256)
    (folder / "fuzz.gguf").write_bytes(changed)
    try:
        with LlamaModel(folder / "fuzz.gguf", device="cpu") as model, Context(model, n_ctx=256) as context:
            context.decode_tokens([1, 2, 3], 0, outputs="last")
        opened += 1
    except QvlError:
        refused += 1
print(opened, refused)
"""
    gguf = read_gguf(small_text, arrays=False)
    names = small_text.read_bytes().find(b"token_embd.weight")
    assert 0 < names < gguf.data_offset
    found = subprocess.run(
        [sys.executable, "-c", script.replace("TENSORS", str(names)), str(small_text), str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    opened, refused = map(int, found.stdout.split())
    assert opened + refused == 60 and refused > 10


def test_progress_and_stopping(tiny_model: Converted) -> None:
    fractions: list[float] = []
    LlamaModel(tiny_model.text, device="cpu", progress=fractions.append).close()
    assert fractions[-1] == 1.0 and fractions == sorted(fractions)

    def stop(_: float) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        LlamaModel(tiny_model.text, device="cpu", progress=stop)


def test_a_closed_model_says_so(tiny_model: Converted) -> None:
    model = LlamaModel(tiny_model.text, device="cpu")
    model.close()
    model.close()
    with pytest.raises(BackendError, match="is closed"):
        Context(model, n_ctx=64)


def test_a_split_model(small_text: Path, tmp_path: Path) -> None:
    gguf = read_gguf(small_text, arrays=False)
    names = list(gguf.tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    u16 = GGUFValueType.UINT16

    def part(i: int, without: list[str]) -> Path:
        split = {
            "split.no": (i, u16, None), "split.count": (2, u16, None),
            "split.tensors.count": (len(names), GGUFValueType.INT32, None),
        }  # fmt: skip
        target = tmp_path / f"tiny-{i + 1:05}-of-00002.gguf"
        return edit(small_text, target, metadata=split, tensors=dict.fromkeys(without))

    parts = part(0, second), part(1, first)
    with LlamaModel(parts[0], device="cpu") as model, Context(model, n_ctx=64) as context:
        context.decode_tokens([1, 2, 3], 0, outputs="last")
        split_logits = context.logits()
    with LlamaModel(small_text, device="cpu") as model, Context(model, n_ctx=64) as context:
        context.decode_tokens([1, 2, 3], 0, outputs="last")
        assert np.array_equal(split_logits, context.logits())
    with pytest.raises(GGUFError, match="one of 2 parts") as caught:
        LlamaModel(parts[1])
    assert "00001-of-00002" in (caught.value.hint or "")
    parts[1].unlink()
    with pytest.raises(GGUFError, match="00002-of-00002"):
        LlamaModel(parts[0])


def test_llama_cpp_logs_to_python(tiny_model: Converted, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "qvl.llama"):
        LlamaModel(tiny_model.text, device="cpu").close()
    assert any("loaded meta data" in record.message for record in caplog.records)
    assert complaints() == "" or "error" not in complaints()


def test_importing_stays_light() -> None:
    code = (
        "import sys; from qvl.runtime.llama.binding import llama; llama(); "
        "print([m for m in ('jinja2', 'diskcache', 'llama_cpp.llama') if m in sys.modules]); "
        "import llama_cpp; print(llama_cpp.Llama.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:2] == ["[]", "Llama"]
