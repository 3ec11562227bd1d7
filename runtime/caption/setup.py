"""Builds a runner from a loaded model and options: pictures at once, and the context that they share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from qvl.runtime.caption.activity import Activity
from qvl.runtime.caption.bookkeeping import Results, Stop
from qvl.runtime.caption.captioner import BatchCaptioner, CaptionRequest
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.caption.prepare import Preparer, return_large_blocks
from qvl.runtime.caption.runner import Plan, Runner
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.detail.estimator import Estimator
from qvl.runtime.engine.engine import Engine
from qvl.runtime.resources import default_threads, free_memory
from qvl.runtime.vision.preprocess import Preprocessor

if TYPE_CHECKING:
    from qvl.runtime.model import Model

LOGGER: Final = logging.getLogger("qvl.caption")
MAX_PARALLEL: Final = 64
_ON_CPU: Final = 16  # 1.6 times the tokens a second of 8, and 32 give little more: benchmarks/README.md
_ON_GPU: Final = 16
_WORDS: Final = 256  # tokens set aside for the words of a prompt
_VIDEO_CELLS: Final = 8192
_SHARE: Final = 0.5  # of the free memory


@dataclass(frozen=True)
class Parallelism:
    """Number of sequences of a run, and the KV cells that they share."""

    sequences: int
    n_ctx: int


def choose_parallelism(
    model: Model,
    options: CaptionOptions,
    preprocessor: Preprocessor,
    *,
    parallel: int | None = None,
    n_ctx: int | None = None,
    has_videos: bool = False,
) -> Parallelism:
    """Choose as many sequences as the device gains from and the memory has room for.

    Args:
        parallel: pictures at once; None chooses.
        n_ctx: KV cells for all of them; None makes room for each at its largest.
    """
    device = model.text.devices[0] if model.text.devices else None
    picture = preprocessor.max_pixels // preprocessor.factor**2
    cells = picture + _WORDS + options.samples * options.max_tokens
    least = max(cells, _VIDEO_CELLS) if has_videos else cells
    if parallel is None:
        free = device.memory()[0] if device else free_memory()
        room = int(_SHARE * free) // model.text.hparams.kv_bytes(cells)
        best = _ON_GPU if device else _ON_CPU
        parallel = max(1, min(best, room, (n_ctx or 1 << 30) // cells))
    sequences = max(parallel, 1) * options.samples
    return Parallelism(sequences, n_ctx or max(parallel * cells, least) + _WORDS)


def open_run(
    model: Model,
    items: Sequence[Item],
    options: CaptionOptions,
    results: Results,
    *,
    parallel: int | None = None,
    n_ctx: int | None = None,
    sidecars: Sidecars | None = None,
    stop: Stop | None = None,
) -> tuple[Runner, BatchCaptioner]:
    """A runner and the captioner it drives, which the caller closes.

    Raises:
        InputError: a template, table or schema that cannot be used; a model without an image encoder.
        BackendError: too little memory for the context.
    """
    return_large_blocks()
    stop = stop or Stop()
    if options.samples > 1 and model.sampling.override(**options.sampling).is_greedy:
        what = f"the {options.samples} samples of a picture are equal: each token is the most likely one"
        LOGGER.warning(f"{what}; `temperature` 0.7 makes them differ")
    preprocessor = Estimator(model).preprocessor(options.bounds)
    plan = plan_for(model, items, options, preprocessor, sidecars)
    has_videos = any(item.kind == "video" for item in items)
    chosen = choose_parallelism(
        model, options, preprocessor, parallel=parallel, n_ctx=n_ctx, has_videos=has_videos
    )
    captioner = open_captioner(model, options, chosen, stop, plan.prepare.activity)
    return Runner(plan, captioner, results, stop), captioner


def plan_for(
    model: Model,
    items: Sequence[Item],
    options: CaptionOptions,
    preprocessor: Preprocessor,
    sidecars: Sidecars | None = None,
) -> Plan:
    """The plan of a run. Raises InputError for a template or table that cannot be used."""
    return Plan(
        items,
        Preparer(preprocessor, options.prompts(model.template.rules.caption)),
        model.path.name,
        wording=options.wording,
        seed=options.seed,
        samples=options.samples,
        grounding=model.template.rules.grounding,
        json=options.schema is not None,
        sidecars=sidecars,
        threads=max(1, min(4, default_threads())),
    )


def open_captioner(
    model: Model,
    options: CaptionOptions,
    parallelism: Parallelism,
    stop: Stop,
    activity: Activity | None = None,
) -> BatchCaptioner:
    """Open a captioner, which the caller closes.

    Raises:
        InputError: a schema that cannot be used, or a model without an image encoder.
        BackendError: too little memory for the context.
    """
    request = CaptionRequest(
        system=options.system,
        start=options.start_with,
        sampling=replace(model.sampling.override(**options.sampling), seed=0),
        max_tokens=options.max_tokens,
        grammar=options.grammar(),
    )
    context = model.context(n_ctx=parallelism.n_ctx, n_seq_max=parallelism.sequences)
    return BatchCaptioner(
        Engine(context, model.embedder(), interleave=False),
        model.text.vocab,
        model.template,
        model.vision.preprocessor,
        request,
        cancelled=lambda: stop.now,
        activity=activity,
        n_trained=model.text.hparams.n_ctx_train,
    )
