"""Routes about the server: models, health, metrics, the cost of a picture."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from qvl.runtime.detail.bounds import Bounds
from qvl.runtime.detail.cost import Cost
from qvl.runtime.detail.estimator import Estimator
from qvl.runtime.model import Model
from qvl.runtime.serve.documented import ERRORS
from qvl.runtime.serve.errors import ApiError
from qvl.runtime.serve.schemas import CostRequest
from qvl.runtime.serve.state import State
from qvl.runtime.vision.video import VideoPlan

router = APIRouter()


@router.get("/health", responses={503: ERRORS[503]}, tags=["Server"])
async def health(request: Request) -> dict[str, str]:
    """Answer 200 once requests are taken, 503 while the model loads."""
    state: State = request.app.state.qvl
    state.ready()
    return {"status": "ok"}


@router.get("/metrics", tags=["Server"])
async def metrics(request: Request) -> Response:
    """Counters in Prometheus's text format."""
    state: State = request.app.state.qvl
    state.metrics.waiting.set(state.worker.n_active if state.worker else 0)
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models", responses=ERRORS, tags=["OpenAI"])
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    state: State = request.app.state.qvl
    model, _ = state.ready()
    return {"object": "list", "data": [_model(state, model)]}


@router.get("/v1/models/{name:path}", responses={**ERRORS, 404: ERRORS[400]}, tags=["OpenAI"])
async def model(name: str, request: Request) -> dict[str, Any]:
    """The served model by its name."""
    state: State = request.app.state.qvl
    found, _ = state.ready()
    if name != state.name:
        raise ApiError(404, f"no model {name!r}, expected {state.name!r}", code="model_not_found")
    return _model(state, found)


def _model(state: State, model: Model) -> dict[str, Any]:
    modalities = ["text", "image", "video"] if model.has_vision else ["text"]
    meta: dict[str, Any] = {"n_ctx": model.n_ctx, "n_ctx_train": model.text.hparams.n_ctx_train}
    if model.has_vision:
        preprocessor = model.vision.preprocessor
        meta["pixels_per_token"] = preprocessor.factor**2
        meta["auto_tokens"] = state.max_pixels("auto") // preprocessor.factor**2
        meta["fixed_size"] = preprocessor.min_pixels == preprocessor.max_pixels
    return {
        "id": state.name,
        "object": "model",
        "created": state.created,
        "owned_by": "qvl",
        "architecture": {"input_modalities": modalities, "output_modalities": ["text"]},
        "meta": meta,
    }


@router.post("/v1/vision/cost", responses=ERRORS, tags=["Extras"])
async def vision_cost(body: CostRequest, request: Request) -> Response:
    """Size of a picture or video after resizing, its tokens, and about how many seconds it takes."""
    state: State = request.app.state.qvl
    model, _ = state.ready()
    found = await run_in_threadpool(_cost, model, state.costs or Estimator(model), body)
    width, height = found.size
    seconds = None if found.seconds is None else round(found.seconds, 2)
    return JSONResponse({"width": width, "height": height, "tokens": found.tokens, "seconds": seconds})


def _cost(model: Model, estimator: Estimator, body: CostRequest) -> Cost:
    if body.kind == "image":
        return estimator.picture(body.width, body.height, Bounds(max_pixels=body.max_pixels))
    preprocessor = model.vision.preprocessor
    options = preprocessor.sampling
    if body.max_pixels is not None:
        options = options.given([("max_pixels", body.max_pixels)])
    frames = max(1, round((body.duration or 0) * options.fps))
    size = (body.height, body.width)
    return estimator.video(VideoPlan.of(frames, options.fps, size, preprocessor, options))
