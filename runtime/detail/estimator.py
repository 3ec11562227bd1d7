"""Sizes and costs of pictures and videos for a model on this machine: for chat, captions and the server."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final

from qvl.runtime.detail.bounds import Bounds
from qvl.runtime.detail.cost import Cost, Throughput, cost, seconds
from qvl.runtime.detail.throughput import keep_throughput, known_throughput, refined
from qvl.runtime.prompt.rules import Vision
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.video import FRAME_FACTOR, VideoPlan
from qvl.runtime.vision.video_options import VideoOptions

if TYPE_CHECKING:
    from qvl.runtime.model import Model

_OWN: Final = Bounds()
_CHANGE: Final = 0.1  # smaller changes of the throughput are not written down


class Estimator:
    """Bounds and costs of a model's pictures; the throughput is read when first needed.

    Args:
        n_ctx: a picture of detail "auto" may fill half of it; None sets no such bound.
        refine: learn the throughput from every picture that the model encodes, and keep it for later runs.
    """

    def __init__(self, model: Model, *, n_ctx: int | None = None, refine: bool = False) -> None:
        self._model, self._n_ctx = model, n_ctx
        if refine and model.has_vision:
            model.vision.on_encoded = self._refine

    @cached_property
    def throughput(self) -> Throughput:
        """Kept from earlier runs, else estimated."""
        return known_throughput(self._model)

    def preprocessor(self, bounds: Bounds = _OWN) -> Preprocessor:
        """The model's preprocessor within bounds.

        Raises:
            InputError: see `Bounds.apply`.
        """
        vision = self._model.vision
        throughput = self.throughput if bounds.detail == "auto" and bounds.max_pixels is None else None
        return bounds.apply(vision.preprocessor, vision.config, throughput, n_ctx=self._n_ctx)

    def picture(self, width: int, height: int, bounds: Bounds = _OWN) -> Cost:
        """Cost of a picture of this size, in pixels.

        Raises:
            InputError: see `Bounds.apply`. ImageError: an aspect ratio over 200.
        """
        return cost(self.preprocessor(bounds), width, height, self._model.vision.config, self.throughput)

    def video(self, plan: VideoPlan) -> Cost:
        """Cost of a video, the text of its times included; attention stays within each temporal patch."""
        vision, template = self._model.vision, self._model.template
        steps, factor = -(-plan.n_frames // FRAME_FACTOR), vision.preprocessor.factor
        height, width = plan.size
        grid = (steps, height // factor, width // factor)
        cells = template.n_cells(template.rules.layout(Vision("video", grid, _times(plan))))
        tokens = height * width // factor**2
        spent = steps * seconds(vision.config, self.throughput, tokens)
        return Cost((width, height), cells, spent, cells - steps * tokens)

    def _refine(self, patches: int, spent: float) -> None:
        before = self.throughput
        found = self.throughput = refined(before, self._model.vision.config, patches, spent)
        change = abs(found.encode_seconds / before.encode_seconds - 1)
        if found.measured and (not before.measured or change > _CHANGE):
            keep_throughput(self._model, found)


def _times(plan: VideoPlan) -> tuple[float, ...]:
    """Seconds of each frame; frames without a rate are taken as two a second."""
    lasts = plan.n_frames / VideoOptions.fps if plan.seconds is None else plan.seconds
    return tuple(i * lasts / plan.n_frames for i in range(plan.n_frames))
