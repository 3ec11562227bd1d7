"""Batches through the decoder and the KV cache that they fill."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qvl.runtime.errors import BackendError, Cancelled, ContextFullError, InputError
from qvl.runtime.ggml.devices import Device
from qvl.runtime.llama.batch import Batch
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.prompt.positions import VisionSpan, mrope_positions

TOKENS = [40, 200, 17, 9, 1000, 999, 41, 5, 300, 77, 12, 64]


def embeddings(n: int, model: LlamaModel, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, model.hparams.n_embd), dtype=np.float32)


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
    context.decode(Batch.of_embeddings(values, before, outputs="all"))
    whole = context.logits()
    for cut in (1, span.n_tokens // 2, span.n_tokens - 1):
        context.remove(0, 3)
        context.decode(Batch.of_embeddings(values[:cut], before[:, :cut], outputs="all"))
        first = context.logits()
        context.decode(Batch.of_embeddings(values[cut:], before[:, cut:], outputs="all"))
        np.testing.assert_allclose(np.concatenate([first, context.logits()]), whole, atol=1e-5)
    context.decode_tokens(TOKENS[:2], after, outputs="last")
    assert context.last_position() == after + 1


def test_a_later_embedding_does_not_change_earlier_logits(context: Context) -> None:
    span = VisionSpan(1, 4, 6)
    positions, _ = mrope_positions([span])
    values = embeddings(24, context.model)
    context.decode(Batch.of_embeddings(values, positions, outputs="all"))
    one = context.logits()
    context.clear()
    values[20:] += 1
    context.decode(Batch.of_embeddings(values, positions, outputs="all"))
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
        context.decode(Batch.of_embeddings(np.zeros((4, 99), np.float32), positions))
    with pytest.raises(InputError, match="positions of shape"):
        context.decode(Batch.of_embeddings(embeddings(4, model), positions[0]))
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
    assert "`n_ctx`" in (caught.value.hint or "")


def test_abort_from_another_thread(model: LlamaModel) -> None:
    with Context(model, n_ctx=16384, n_batch=16384, threads=1) as context:
        tokens = np.ones(16000, np.int32)
        stopper = threading.Timer(0.15, context.abort)
        stopper.start()
        start = time.process_time()
        with pytest.raises(Cancelled):
            context.decode_tokens(tokens, 0)
        aborted = time.process_time() - start
        context.remove(0, 0)
        assert context.last_position() == -1
        start = time.process_time()
        context.decode_tokens(tokens[:2048], 0)
        assert aborted < 8 * (time.process_time() - start)  # all of it would take far over 8 times as long


def test_cancelled_is_asked_meanwhile(model: LlamaModel) -> None:
    with Context(model, n_ctx=16384, n_batch=16384, threads=1) as context:
        asked: list[float] = []

        def cancelled() -> bool:
            asked.append(time.perf_counter())
            return len(asked) >= 2

        with pytest.raises(Cancelled):
            context.decode_tokens(np.ones(16000, np.int32), 0, cancelled=cancelled)
        assert len(asked) >= 2
