"""Sampling: the chain against the definitions, grammars."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qvl.runtime.errors import InputError
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.sampler import Sampler, Sampling

TOKENS = [40, 200, 17, 9, 1000, 999, 41, 5, 300, 77, 12, 64]


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


def test_presence_penalty_is_that_of_openai(context: Context) -> None:
    """Subtracted once from every token that the whole reply has, however often, however long ago."""
    logits = logits_in(context).astype(np.float64)
    seen = set[int]()
    with Sampler(context.model.vocab, Sampling(presence_penalty=0.5)) as sampler:
        for _ in range(150):
            punished = logits.copy()
            punished[list(seen)] -= 0.5
            expected = int(punished.argmax())
            assert sampler.sample(context) == expected
            seen.add(expected)
    assert len(seen) > 3


def test_sampling_settings_of_a_file() -> None:
    qwen = {
        "general.sampling.temp": 0.1, "general.sampling.top_k": 1, "general.sampling.top_p": 0.001,
        "general.sampling.penalty_repeat": 1.05, "qvl.sampling.presence_penalty": 1.5,
    }  # fmt: skip
    own = Sampling.from_metadata(qwen)
    assert (own.temperature, own.top_k, own.top_p, own.repeat_penalty) == (0.1, 1, 0.001, 1.05)
    assert own.presence_penalty == 1.5
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


MALFORMED = [b"\xc1\xa1", b"\xe0\x82\xa2", b"\xf0\x80\x82\xa2", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff"]


@pytest.mark.parametrize("wanted", [*MALFORMED, "é".encode(), "\u0800".encode(), "\U0001f600".encode()])
def test_a_grammar_lets_only_utf_8_pass(model: LlamaModel, wanted: bytes) -> None:
    """A model that insists on these bytes, under a grammar that takes every character."""
    byte = {
        piece: token for token in range(model.vocab.n_tokens) if len(piece := model.vocab.piece(token)) == 1
    }
    others = [byte[bytes([b])] for b in (0x80, 0xA2, 0xBF, 0x61)]  # what may follow instead

    class Insisting:
        def row(self, row: int) -> NDArray[np.float32]:
            logits = np.full(model.vocab.n_tokens, -50, np.float32)
            logits[others] = -10
            logits[byte[wanted[len(written) : len(written) + 1] or b"a"]] = 10
            return logits

    written = b""
    with Sampler(model.vocab, Sampling(temperature=0.0), "root ::= [^\\n]*") as sampler:
        while len(written) < len(wanted) + 4:
            token = sampler.sample(Insisting())  # type: ignore[arg-type]
            assert token is not None
            written += model.vocab.piece(token)
    written.decode("utf-8")
    assert (written[: len(wanted)] == wanted) == (wanted not in MALFORMED)
