"""The text GGUF in llama.cpp: what may be opened, batches and the KV cache, sampling."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from numpy.typing import NDArray
from support.checkpoint import BYTES_SIZE, Shape, Style, write_checkpoint
from support.gguf_edit import edit

from qvl.convert import Converted, convert
from qvl.runtime.errors import BackendError, Cancelled, ContextFullError, GGUFError, InputError, QvlError
from qvl.runtime.ggml.devices import Device
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.llama.batch import Batch
from qvl.runtime.llama.binding import complaints, llama
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.header import check_text_file
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.positions import TextSpan, VisionSpan, mrope_positions

TOKENS = [40, 200, 17, 9, 1000, 999, 41, 5, 300, 77, 12, 64]


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_model.text, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with hardly any vocabulary, to be edited often."""
    folder = tmp_path_factory.mktemp("small")
    shape = Shape(vocab_size=BYTES_SIZE)
    checkpoint = write_checkpoint(folder / "small", shape, Style(tokenizer="bytes", chat_template="chatml"))
    return convert(checkpoint, folder, "f32", "f32").text


@pytest.fixture
def context(model: LlamaModel) -> Iterator[Context]:
    with Context(model, n_ctx=512, n_batch=512, n_outputs_max=512, kv_type="f32", threads=1) as opened:
        yield opened


def embeddings(n: int, model: LlamaModel, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, model.hparams.n_embd), dtype=np.float32)


# -- opening files


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
    "no epsilon": ({"qwen2vl.attention.layer_norm_rms_epsilon": None}, {}, "rms_epsilon is None"),
    "a negative epsilon": ({"qwen2vl.attention.layer_norm_rms_epsilon": -1.0}, {}, "positive number"),
    "a base that is no number": ({"qwen2vl.rope.freq_base": float("nan")}, {}, "freq_base is nan"),
    "an unknown rope scaling": ({"qwen2vl.rope.scaling.type": "spiral"}, {}, "'spiral'"),
    "experts": ({"qwen2vl.expert_count": 8}, {}, "expert_count is set"),
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


def test_an_mmproj_is_no_text_model(tiny_model: Converted) -> None:
    with pytest.raises(GGUFError, match="this is an mmproj file") as caught:
        LlamaModel(tiny_model.mmproj)
    assert "--mmproj" in (caught.value.hint or "")


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


# -- batches and the KV cache


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(context: Context) -> None:
    context.decode_tokens(TOKENS, 0, outputs="all")
    whole = context.logits()
    assert whole.shape == (len(TOKENS), context.model.hparams.n_vocab)
    context.clear()
    context.decode_tokens(TOKENS[:5], 0)
    context.decode_tokens(TOKENS[5:], 5, outputs="last")
    np.testing.assert_allclose(context.logits()[0], whole[-1], atol=1e-5)


def test_rewinding_and_going_on(context: Context) -> None:
    context.decode_tokens(TOKENS, 0, outputs="all")
    whole = context.logits()
    context.remove(0, 4)
    assert context.last_position() == 3
    context.decode_tokens(TOKENS[4:], 4, outputs="all")
    np.testing.assert_allclose(context.logits(), whole[4:], atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 4, 2), (5, 1, 1)])
def test_a_span_in_pieces_is_causal_in_token_order(context: Context, grid: tuple[int, int, int]) -> None:
    """Whole and cut anywhere the same, so llama.cpp orders a span's tokens as they come."""
    span = VisionSpan(*grid)
    values = embeddings(span.n_tokens, context.model)
    before, after = mrope_positions([span], 3)
    context.decode_tokens(TOKENS[:3], 0)
    context.decode_embeddings(values, before, outputs="all")
    whole = context.logits()
    for cut in (1, span.n_tokens // 2, span.n_tokens - 1):
        context.remove(0, 3)
        context.decode_embeddings(values[:cut], before[:, :cut], outputs="all")
        first = context.logits()
        context.decode_embeddings(values[cut:], before[:, cut:], outputs="all")
        np.testing.assert_allclose(np.concatenate([first, context.logits()]), whole, atol=1e-5)
    context.decode_tokens(TOKENS[:2], after, outputs="last")
    assert context.last_position() == after + 1


def test_a_later_embedding_does_not_change_earlier_logits(context: Context) -> None:
    span = VisionSpan(1, 4, 6)
    positions, _ = mrope_positions([span])
    values = embeddings(24, context.model)
    context.decode_embeddings(values, positions, outputs="all")
    one = context.logits()
    context.clear()
    values[20:] += 1
    context.decode_embeddings(values, positions, outputs="all")
    other = context.logits()
    np.testing.assert_allclose(one[:20], other[:20], atol=1e-5)
    assert np.abs(one[20:] - other[20:]).max() > 0.01


def test_sequences_share_a_copied_prefix(model: LlamaModel) -> None:
    with Context(model, n_ctx=256, n_seq_max=3, kv_type="f32", threads=1) as context:
        context.decode_tokens(TOKENS, 0)
        context.copy(0, 1)
        context.copy(0, 2)
        nexts = [7, 8, 9]
        n = len(TOKENS)
        batch = Batch(
            tokens=np.array(nexts, np.int32), embeddings=None, positions=np.full(3, n, np.int32),
            sequences=np.arange(3, dtype=np.int32), outputs=np.ones(3, np.bool_),
        )  # fmt: skip
        context.decode(batch)
        together = context.logits()
        context.keep(1)
        assert [context.last_position(i) for i in range(3)] == [-1, n, -1]
        for token, row in zip(nexts, together, strict=True):
            context.clear()
            context.decode_tokens([*TOKENS, token], 0, outputs="last")
            np.testing.assert_allclose(context.logits()[0], row, atol=1e-5)


def test_a_full_cache_is_an_error_and_stays_usable(model: LlamaModel) -> None:
    with Context(model, n_ctx=256, n_batch=256) as context:
        context.decode_tokens([1] * 250, 0)
        with pytest.raises(ContextFullError, match="no room for 20"):
            context.decode_tokens([1] * 20, 250)
        context.decode_tokens([1] * 6, 250, outputs="last")
        assert context.logits().shape[0] == 1


@pytest.mark.parametrize(
    ("tokens", "positions", "outputs", "complaint"),
    [
        ([], [], [], "a batch of 0 tokens"),
        ([1] * 600, range(600), [0] * 600, "a batch of 600 tokens"),
        ([-1], [0], [0], "token id beyond"),
        ([10**6], [0], [0], "token id beyond"),
        ([1, 2], [0], [0, 0], "positions of shape"),
    ],
)
def test_batches_that_llama_cpp_would_not_survive(
    context: Context, tokens: Any, positions: Any, outputs: Any, complaint: str
) -> None:
    n = len(tokens)
    batch = Batch(
        np.array(tokens, np.int32), None, np.array(positions, np.int32), np.zeros(n, np.int32),
        np.array(outputs, np.bool_),
    )  # fmt: skip
    with pytest.raises(InputError, match=complaint):
        context.decode(batch)


def test_more_batches_that_it_would_not_survive(model: LlamaModel, context: Context) -> None:
    positions, _ = mrope_positions([VisionSpan(1, 2, 2)])
    with pytest.raises(InputError, match="embeddings of shape"):
        context.decode_embeddings(np.zeros((4, 99), np.float32), positions)
    with pytest.raises(InputError, match="positions of shape"):
        context.decode_embeddings(embeddings(4, model), positions[0])
    with pytest.raises(InputError, match="sequence 1, expected 0 to 0"):
        context.remove(1, 0)
    with pytest.raises(InputError, match="a sequence beyond"):
        context.decode_tokens([1], 0, sequence=1)
    with pytest.raises(InputError, match="asked for no logits"):
        context.logits()
    with Context(model, n_ctx=64) as small, pytest.raises(InputError, match="logits of 2 tokens"):
        small.decode_tokens([1, 2], 0, outputs="all")
    with pytest.raises(BackendError, match="inconsistent sequence positions"):
        context.decode_tokens([1, 2], 5)
        context.decode_tokens([1, 2], 5)


@pytest.mark.parametrize(
    "options", [{"n_ctx": 0}, {"n_ctx": 1 << 40}, {"n_batch": 0}, {"n_seq_max": 10**6}, {"kv_type": "f8"}]
)
def test_impossible_contexts(model: LlamaModel, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Context(model, **options)


def test_a_context_too_large_for_memory(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "memory", lambda _: (1 << 20, 1 << 20))
    with pytest.raises(BackendError, match="a context of 8192 tokens takes 4 MB") as caught:
        Context(model, n_ctx=8192)
    assert "--ctx-size" in (caught.value.hint or "")


def test_abort_from_another_thread(model: LlamaModel) -> None:
    with Context(model, n_ctx=16384, n_batch=16384, threads=1) as context:
        tokens = np.ones(16000, np.int32)
        stopper = threading.Timer(0.15, context.abort)
        stopper.start()
        start = time.perf_counter()
        with pytest.raises(Cancelled):
            context.decode_tokens(tokens, 0)
        aborted = time.perf_counter() - start
        context.remove(0, 0)
        assert context.last_position() == -1
        start = time.perf_counter()
        context.decode_tokens(tokens[:2048], 0)
        assert aborted < 8 * (time.perf_counter() - start)  # all of it would take far over 8 times as long


def test_cancelled_is_asked_meanwhile(model: LlamaModel) -> None:
    with Context(model, n_ctx=16384, n_batch=16384, threads=1) as context:
        asked: list[float] = []

        def cancelled() -> bool:
            asked.append(time.perf_counter())
            return len(asked) >= 2

        with pytest.raises(Cancelled):
            context.decode_tokens(np.ones(16000, np.int32), 0, cancelled=cancelled)
        assert len(asked) >= 2


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


# -- sampling


def logits_in(context: Context) -> NDArray[np.float32]:
    context.clear()
    context.decode_tokens(TOKENS, 0, outputs="last")
    return context.logits()[0]


def shares(context: Context, n: int = 400, **options: Any) -> NDArray[np.float64]:
    """How often each token is sampled, over as many seeds."""
    counts = np.zeros(context.model.hparams.n_vocab)
    for seed in range(n):
        with Sampler(context.model.vocab, Sampling(seed=seed, **options)) as sampler:
            token = sampler.sample(context)
            assert token is not None
            counts[token] += 1
    return counts / n


def test_greedy_takes_the_best(context: Context) -> None:
    best = int(logits_in(context).argmax())
    for options in ({}, {"temperature": 5.0, "top_k": 1}):
        with Sampler(context.model.vocab, Sampling(**options)) as sampler:
            assert sampler.sample(context) == best


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3}, {"top_p": 0.02}, {"min_p": 0.75}, {"top_k": 5, "top_p": 0.6},
        {"top_k": 4, "temperature": 2.0},
    ],
)  # fmt: skip
def test_samplers_draw_from_the_distribution_they_define(context: Context, options: dict[str, Any]) -> None:
    logits = logits_in(context).astype(np.float64)
    settings = {"temperature": 1.0} | options
    expected = distribution(logits, **settings)
    found = shares(context, **settings)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    assert np.abs(found - expected).max() < 0.12  # five standard deviations of 400 draws


def distribution(
    logits: NDArray[np.float64], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> NDArray[np.float64]:
    """What the samplers stand for, by their definitions."""
    order = np.argsort(-logits)
    keep = order[:top_k] if top_k else order
    p = np.exp(logits[keep] - logits[keep].max())
    p /= p.sum()
    keep = keep[: int(np.searchsorted(np.cumsum(p), top_p) + 1)] if top_p < 1 else keep
    keep = keep[np.exp(logits[keep] - logits[keep].max()) >= min_p]
    out = np.zeros_like(logits)
    scaled = logits[keep] / temperature
    out[keep] = np.exp(scaled - scaled.max())
    return out / out.sum()


def test_a_seed_repeats_and_no_seed_is_told(context: Context) -> None:
    logits_in(context)
    with Sampler(context.model.vocab, Sampling(temperature=1.0)) as sampler:
        first = [sampler.sample(context) for _ in range(8)]
    with Sampler(context.model.vocab, Sampling(temperature=1.0, seed=sampler.seed)) as again:
        assert [again.sample(context) for _ in range(8)] == first


def test_repeat_penalty_is_that_of_ctrl(context: Context) -> None:
    """Keskar et al. 2019, section 4.1: positive logits of seen tokens are divided, negative multiplied."""
    logits = logits_in(context).astype(np.float64)
    penalty, seen = 1.5, set[int]()
    with Sampler(context.model.vocab, Sampling(repeat_penalty=penalty)) as sampler:
        for _ in range(12):
            punished = logits.copy()
            for token in seen:
                punished[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            expected = int(punished.argmax())
            assert sampler.sample(context) == expected
            seen.add(expected)
    assert len(seen) > 3


def test_sampling_settings_of_a_file() -> None:
    qwen = {
        "general.sampling.temp": 0.1, "general.sampling.top_k": 1, "general.sampling.top_p": 0.001,
        "general.sampling.penalty_repeat": 1.05,
    }  # fmt: skip
    own = Sampling.from_metadata(qwen)
    assert (own.temperature, own.top_k, own.top_p, own.repeat_penalty) == (0.1, 1, 0.001, 1.05)
    assert Sampling.from_metadata({}) == Sampling()
    assert Sampling.from_metadata({"general.sampling.temp": -3.0}) == Sampling()
    warm = own.override(temperature=0.8)
    assert (warm.top_k, warm.top_p, warm.repeat_penalty) == (40, 0.95, 1.05)
    assert own.override(temperature=0.8, top_k=7).top_k == 7
    assert own.override(temperature=0.0).top_k == 1
    assert own.override(seed=None) == own


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1}, {"seed": 1 << 40}],
)
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling().override(**wrong)


def test_a_grammar_that_cannot_be_parsed(model: LlamaModel) -> None:
    for grammar in ('root ::= "a', "other ::= [a-z]", ""):
        with pytest.raises(InputError, match="grammar cannot be parsed"):
            Sampler(model.vocab, Sampling(), grammar)


def test_a_grammar_holds(context: Context) -> None:
    vocab = context.model.vocab
    logits_in(context)
    with Sampler(vocab, Sampling(temperature=1.5, seed=3), 'root ::= ("yes" | "no") "!"') as sampler:
        tokens: list[int] = []
        while (token := sampler.sample(context)) is not None and token not in vocab.end_tokens:
            tokens.append(token)
            context.decode_tokens([token], context.last_position() + 1, outputs="last")
    assert vocab.detokenize(tokens) in ("yes!", "no!")


def test_text_positions_go_on_where_spans_end(context: Context) -> None:
    _, end = mrope_positions([TextSpan(2), VisionSpan(1, 2, 5)])
    assert end == 7
    assert isinstance(context, Context) and issubclass(Cancelled, QvlError)
    assert llama() is llama()
    assert check_text_file(read_gguf(context.model.path)).n_layer == context.model.hparams.n_layer
