"""Divergence of two models' predictions: KL divergence, agreement, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class VisionError:
    """Of embeddings, over all pictures.

    Attributes:
        relative: length of the difference by length of the reference.
        worst_cosine: of the token whose direction is furthest off.
    """

    relative: float
    worst_cosine: float
    n_tokens: int


@dataclass(frozen=True)
class Divergence:
    """Of predictions of the reference's replies, token by token.

    Attributes:
        kl_mean, kl_p99, kl_max: KL(reference ‖ model) of the next token, in nats.
        top1: share of tokens for which both have the same favourite.
        perplexity: of the reference's greedy replies, by the model.
        perplexity_change: relative to the reference's own.
        n_tokens: predictions compared.
        parted: for each reply the first token, from 0, that the model would say otherwise; None if it would
            say the same to the end.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity: float
    perplexity_change: float
    n_tokens: int
    parted: tuple[int | None, ...]

    @property
    def same_replies(self) -> float:
        """Share of replies that are the same to the end."""
        return sum(p is None for p in self.parted) / len(self.parted)


@dataclass
class Predictions:
    """Collects predictions, reply by reply."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    agree: list[NDArray[np.bool_]] = field(default_factory=list)
    nll: list[NDArray[np.float64]] = field(default_factory=list)
    own_nll: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, reference: Logits, model: Logits, reply: Sequence[int]) -> None:
        """Predictions of one reply, float32 [len(reply), n_vocab] each."""
        n = min(reference.shape[1], model.shape[1])  # a padded vocabulary has rows that say nothing
        p, q = log_softmax(reference[:, :n]), log_softmax(model[:, :n])
        rows = np.arange(len(reply))
        self.kl.append(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))
        self.agree.append(p.argmax(axis=1) == q.argmax(axis=1))
        self.nll.append(-q[rows, list(reply)])
        self.own_nll.append(-p[rows, list(reply)])

    def result(self) -> Divergence:
        """Figures over everything added."""
        kl, agree = np.concatenate(self.kl), np.concatenate(self.agree)
        nll, own = np.concatenate(self.nll).mean(), np.concatenate(self.own_nll).mean()
        return Divergence(
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            top1=float(agree.mean()),
            perplexity=float(np.exp(nll)),
            perplexity_change=float(np.expm1(nll - own)),
            n_tokens=len(kl),
            parted=tuple(None if a.all() else int(a.argmin()) for a in self.agree),
        )


@dataclass
class VisionTally:
    """Collects embeddings, picture by picture."""

    difference: float = 0.0
    length: float = 0.0
    worst: float = 1.0
    n_tokens: int = 0

    def add(self, reference: NDArray[np.float32], model: NDArray[np.float32]) -> None:
        """Embeddings of one picture, float32 [n_tokens, n_embd] each."""
        a, b = reference.astype(np.float64), model.astype(np.float64)
        self.difference += float(np.square(a - b).sum())
        self.length += float(np.square(a).sum())
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
        self.worst = min(self.worst, float(cosines.min()))
        self.n_tokens += len(a)

    def result(self) -> VisionError:
        """Figures over everything added."""
        relative = (self.difference / self.length) ** 0.5 if self.length else 0.0
        return VisionError(relative, self.worst, self.n_tokens)


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Natural logarithms of probabilities, float64 [n, n_vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x
