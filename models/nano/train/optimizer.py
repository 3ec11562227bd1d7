"""Muon for matrices and Adam for the rest, over flat shared memory: each rank updates its own share.

Muon: Jordan et al. 2024, momentum followed by a Newton-Schulz step towards the nearest orthogonal matrix.
Weights live in bfloat16 for the products and in float32 for the sum of small updates.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """bfloat16 [n, r, c] with r <= c: singular values pushed to about 1."""
    a, b, c = COEFFICIENTS
    x = (g / (g.float().norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        y = torch.bmm(x, x.transpose(1, 2))
        x = a * x + torch.bmm(torch.baddbmm(y, y, y, beta=b, alpha=c), x)
    return x


@dataclass(frozen=True)
class Piece:
    """One matrix of at most 256 rows or columns, somewhere in the flat buffer."""

    start: int
    rows: int
    cols: int


def pieces(name: str, start: int, shape: torch.Size) -> list[Piece]:
    """Muon's matrices of a parameter (none: Adam). Fused and wide ones are cut into 256-row blocks."""
    if len(shape) != 2 or not name.startswith(("visual.blocks", "visual.merger.mlp", "model.layers")):
        return []
    rows, cols = shape
    step = 256 if name.endswith("qkv.weight") or "merger.mlp.0" in name else rows
    return [Piece(start + k * cols, min(step, rows - k), cols) for k in range(0, rows, step)]


class Flat:
    """Parameters as views of one bfloat16 buffer; float32 masters, moments and an average beside it."""

    def __init__(self, model: nn.Module, ranks: int) -> None:
        sizes = [(n, p.shape, p.numel()) for n, p in model.named_parameters()]
        total = sum(s[2] for s in sizes)
        self.slices: dict[str, tuple[int, torch.Size]] = {}
        at = 0
        for name, shape, size in sizes:
            self.slices[name] = (at, shape)
            at += size
        self.master = torch.cat([p.detach().float().reshape(-1) for p in model.parameters()]).share_memory_()
        self.weights = self.master.bfloat16().share_memory_()
        self.grads = torch.zeros(ranks, total, dtype=torch.bfloat16).share_memory_()
        self.first = torch.zeros(total).share_memory_()
        self.second = torch.zeros(total).share_memory_()
        self.average = self.master.clone().share_memory_()
        self.groups: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        adam = torch.ones(total, dtype=torch.bool)
        for name, (start, shape) in self.slices.items():
            for piece in pieces(name, start, shape):
                self.groups[min(piece.rows, piece.cols), max(piece.rows, piece.cols)].append(piece)
                adam[piece.start : piece.start + piece.rows * piece.cols] = False
        self.adam_spans = self._spans(adam)
        self.slow = torch.ones(total)
        start, shape = self.slices["visual.patch_embed.proj.weight"]
        self.slow[start : start + shape.numel()] = 0.03
        self.slow.share_memory_()

    @staticmethod
    def _spans(mask: Tensor) -> list[tuple[int, int]]:
        raw = mask.float()
        edges = torch.diff(raw, prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten().tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def attach(self, model: nn.Module, rank: int) -> None:
        """Point the parameters of `model` at the shared weights, their gradients at this rank's row."""
        for name, p in model.named_parameters():
            start, shape = self.slices[name]
            p.data = self.weights[start : start + shape.numel()].view(shape)
            p.grad = self.grads[rank, start : start + shape.numel()].view(shape)

    def state(self) -> dict[str, Tensor]:
        return {k: getattr(self, k) for k in ("master", "first", "second", "average")}

    def load(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            getattr(self, key)[: len(value)].copy_(value)  # heads added since then start afresh
        self.weights.copy_(self.master)

    def step(self, rank: int, ranks: int, lr: float, muon_lr: float, decay: float, count: int) -> None:
        """Update this rank's share, once all gradients are there; whole when every rank is done."""
        for shape, group in sorted(self.groups.items()):
            mine = group[rank::ranks]
            if mine:
                self._muon(shape, mine, muon_lr, decay)
        spans = [s for k, s in enumerate(self._chunks()) if k % ranks == rank]
        for a, b in spans:
            self._adam(a, b, lr, decay, count)

    def _chunks(self, size: int = 100_000) -> list[tuple[int, int]]:
        return [(k, min(b, k + size)) for a, b in self.adam_spans for k in range(a, b, size)]

    def _grad(self, a: int, b: int) -> Tensor:
        return self.grads[:, a:b].float().mean(0)

    def _muon(
        self, shape: tuple[int, int], mine: list[Piece], lr: float, decay: float, momentum: float = 0.95
    ) -> None:
        stack = []
        for p in mine:
            a, b = p.start, p.start + p.rows * p.cols
            g, m = self._grad(a, b), self.first[a:b]
            m.mul_(momentum).add_(g)
            m2 = g.add_(m, alpha=momentum).view(p.rows, p.cols)
            stack.append(m2 if p.rows <= p.cols else m2.T)
        update = orthogonal(torch.stack(stack))
        for p, u in zip(mine, update, strict=True):
            a, b = p.start, p.start + p.rows * p.cols
            w = self.master[a:b].view(p.rows, p.cols)
            w.mul_(1 - lr * decay)
            w.add_((u if p.rows <= p.cols else u.T).float(), alpha=-lr * max(1.0, p.rows / p.cols) ** 0.5)
            self.weights[a:b].copy_(self.master[a:b])

    def _adam(
        self, a: int, b: int, lr: float, decay: float, count: int, betas: tuple[float, float] = (0.9, 0.97)
    ) -> None:
        g, m, v, w = self._grad(a, b), self.first[a:b], self.second[a:b], self.master[a:b]
        m.lerp_(g, 1 - betas[0])
        v.lerp_(g * g, 1 - betas[1])
        size = (v / (1 - betas[1] ** count)).sqrt_().add_(1e-8)
        update = (m / (1 - betas[0] ** count) / size).clamp_(-3, 3)
        w.sub_(lr * self.slow[a:b] * (update + decay * 0.2 * w))
        self.weights[a:b].copy_(w)
