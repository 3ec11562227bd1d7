"""What the server is and has: models, health, metrics, the cost of a picture."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from qvl.runtime.model import Model
from qvl.runtime.serve.documented import ERRORS
from qvl.runtime.serve.errors import ApiError
from qvl.runtime.serve.schemas import CostRequest
from qvl.runtime.serve.state import State

router = APIRouter()


@router.get("/health", responses={503: ERRORS[503]}, tags=["Server"])
async def health(request: Request) -> dict[str, str]:
    """Whether requests can be taken; 503 while the model loads."""
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
    """How large a picture or video will be looked at, in how many tokens, and in about how many seconds."""
    state: State = request.app.state.qvl
    model, _ = state.ready()
    return JSONResponse(await run_in_threadpool(_cost, model, body))


def _cost(model: Model, body: CostRequest) -> dict[str, Any]:
    from qvl.runtime.detail.cost import cost
    from qvl.runtime.detail.pace import stored_pace

    vision = model.vision
    preprocessor = vision.preprocessor
    high = body.max_pixels
    if high is not None:
        low = min(high, preprocessor.min_pixels)
        preprocessor = preprocessor.with_pixels(low, high)
    found = cost(preprocessor, body.width, body.height, vision.config, stored_pace(model))
    steps = 1
    if body.kind == "video":
        steps = max(1, round(body.duration or 0))  # two frames a second, two frames to a step
    return {
        "width": found.size[0],
        "height": found.size[1],
        "tokens": found.tokens * steps,
        "seconds": None if found.seconds is None else round(found.seconds * steps, 2),
    }
