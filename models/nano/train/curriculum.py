"""Curriculum of the training data: stages that open as accuracy grows, never by the clock."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """Shares of a step's kind of batch, of pictures within it, and the tasks asked."""

    shapes: tuple[float, ...]  # weight of 1, 2, 3, … shapes
    gate: tuple[str, float] | None  # (metric, accuracy) that opens the next stage
    buckets: dict[str, float] = field(default_factory=lambda: {"single": 1.0})
    read: float = 0.0
    words: float = 0.0  # share of words among pages
    read_level: int = 1
    pair_shapes: int = 1
    aux: float = 1.0


MIX = {"single": 0.745, "pair": 0.10, "video2": 0.10, "video4": 0.04, "video8": 0.015}
LAST = {"single": 0.50, "pair": 0.20, "video2": 0.06, "video4": 0.12, "video8": 0.12}
STAGES = (
    Stage((1.0,), ("describe1", 0.60)),
    Stage(
        (0.5, 0.5), ("describe2", 0.30), {"single": 0.86, "pair": 0.05, "video2": 0.09}, read=0.18, aux=1.0
    ),
    Stage((0.25, 0.3, 0.25, 0.08, 0.07, 0.05), ("read", 0.60), MIX, 0.18, 0.0, 2, 2, 0.6),
    Stage((0.17, 0.25, 0.30, 0.1, 0.09, 0.09), ("read", 0.75), MIX, 0.25, 0.0, 3, 2, 0.4),
    Stage((0.17, 0.22, 0.31, 0.1, 0.1, 0.1), None, LAST, 0.43, 0.27, 3, 3, 0.25),
)
# Weight of each task where the scene allows it; grounding in its forms is a large share on purpose.
TASK_WEIGHTS = {
    "describe": 1.5, "count_all": 1.2, "count_some": 3.0, "ground": 2.5, "ground_all": 1.2, "in_box": 0.6,
    "where": 0.8, "kind_of": 0.8, "colour_of": 0.7, "size_of": 0.4, "exists": 0.6,
}  # fmt: skip
