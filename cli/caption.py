"""`qvl caption`: one JSON object for each picture, failures included."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli import options
from qvl.cli.output import Output, human_seconds
from qvl.runtime.errors import BackendError, QvlError

if TYPE_CHECKING:
    from qvl.runtime.caption.inputs import Item
    from qvl.runtime.caption.record import Record
    from qvl.runtime.session import Session

Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH…", help="Files, folders, globs, @list.txt, or - for paths on stdin."),
]
Prompt = Annotated[
    str, typer.Option("-p", "--prompt", metavar="TEXT", help="What to ask about each picture.")
]


def caption(
    paths: Paths,
    prompt: Prompt = "Describe this image.",
    system: options.System = None,
    model: options.Model = None,
    mmproj: options.Mmproj = None,
    device: options.Device = "auto",
    n_gpu_layers: options.GpuLayers = None,
    ctx_size: options.CtxSize = 8192,
    threads: options.Threads = None,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    kv_type: options.KvType = None,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Write a caption for each picture, as JSON lines."""
    from qvl.cli.engine import open_model
    from qvl.runtime.caption.inputs import find_inputs

    out = Output(quiet, verbose)
    found = find_inputs(paths)
    for note in found.notes:
        out.warn(note)
    model_options = options.ModelOptions(
        model, mmproj, device, n_gpu_layers, ctx_size, threads, min_pixels, max_pixels, kv_type
    )
    sampling = options.SamplingOptions(max_tokens, temp, top_k, top_p, min_p, repeat_penalty, seed)
    failed, started = 0, time.monotonic()
    with open_model(model_options, out) as loaded, out.progress("captioning", "pictures") as bar:
        session = loaded.session()
        for i, item in enumerate(found.items):
            bar(i, len(found.items), Path(item.path).name)
            record = _caption(session, item, prompt, system, sampling.kwargs())
            failed += record.failed
            out.line(record.as_json())
    done = len(found.items) - failed
    words = f"{done} captioned in {human_seconds(time.monotonic() - started)}"
    out.note(f"{words}, {failed} failed" if failed else words)
    return 1 if failed else 0


def _caption(
    session: Session, item: Item, prompt: str, system: str | None, sampling: dict[str, Any]
) -> Record:
    """The record of one picture; what is wrong with it becomes the record's error."""
    from qvl.runtime.caption.record import Record

    question = [{"type": item.kind, item.kind: item.path}, {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    started = time.monotonic()
    try:
        reply = session.generate(messages, **sampling).result()
    except BackendError:
        raise
    except QvlError as e:
        return Record(item.path, error=str(e))
    return Record(
        item.path,
        caption=reply.text.strip(),
        prompt=prompt,
        prompt_tokens=reply.usage.prompt_tokens,
        completion_tokens=reply.usage.completion_tokens,
        finish_reason=reply.finish_reason,
        seconds=round(time.monotonic() - started, 3),
    )
