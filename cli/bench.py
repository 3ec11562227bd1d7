"""`qvl bench`: how fast a model runs on this machine."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli import options
from qvl.cli.output import Output, format_table, human_bytes, human_seconds
from qvl.runtime.errors import InputError

if TYPE_CHECKING:
    from qvl.runtime.measure.speed import Machine, Size, Speed, Timing

Sizes = Annotated[
    str,
    typer.Option("--sizes", metavar="N,WxH,…", help="Pictures to look at; the first is asked about too."),
]
Runs = Annotated[
    int, typer.Option("-r", "--runs", metavar="N", min=1, help="Repetitions; medians are shown.")
]
Read = Annotated[int, typer.Option("--read", metavar="N", min=1, help="Tokens of a prompt.")]
Write = Annotated[int, typer.Option("--write", metavar="N", min=1, help="Tokens of a reply.")]


def bench(
    sizes: Sizes = "224,448,896",
    read: Read = 512,
    write: Write = 128,
    runs: Runs = 3,
    model: options.Model = None,
    mmproj: options.Mmproj = None,
    device: options.Device = "auto",
    n_gpu_layers: options.GpuLayers = None,
    threads: options.Threads = None,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    kv_type: options.KvType = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how fast a model runs here.

    Looking at pictures, reading a prompt, writing a reply, the wait for a first token, loading, memory.
    """
    pictures = [parse_size(size) for size in sizes.split(",") if size.strip()]
    from qvl.cli.engine import open_model
    from qvl.runtime.measure.speed import machine, measure

    out = Output(quiet, verbose)
    model_options = options.ModelOptions(
        model, mmproj, device, n_gpu_layers, 4096, threads, min_pixels, max_pixels, kv_type
    )
    start = time.perf_counter()
    with open_model(model_options, out) as loaded:
        load_seconds = time.perf_counter() - start
        with out.progress("measuring", "steps") as bar:
            speed = measure(
                loaded,
                sizes=pictures if loaded.has_vision else [],
                n_read=read,
                n_write=write,
                runs=runs,
                progress=bar,
            )
        name = loaded.path.name
    if json:
        out.json(as_json(name, machine(), load_seconds, speed), indent=2)
    else:
        out.line(as_text(name, machine(), load_seconds, speed))


def parse_size(text: str) -> Size:
    """ "448" is a square, "1600x400" a width and a height.

    Raises:
        InputError: neither.
    """
    match = re.fullmatch(r"\s*([1-9]\d*)(?:x([1-9]\d*))?\s*", text)
    if match is None:
        raise InputError(f"{text!r} is no size of a picture", hint="--sizes 448,1600x400")
    return int(match[1]), int(match[2] or match[1])


def as_text(name: str, machine: Machine, load_seconds: float, speed: Speed) -> str:
    """The table for people."""
    rows = [("load", "", human_seconds(load_seconds), "")]
    rows += [
        (f"picture of {w} x {h}", f"{t.amount} patches", f"{t.median:.3f} s", f"{t.rate:.0f} patches/s")
        for (w, h), t in speed.encode.items()
    ]
    for label, timing in (("read", speed.read), ("write", speed.write)):
        if timing is not None:
            seconds, rate = f"{timing.median:.3f} s", f"{timing.rate:.1f} tokens/s"
            rows.append((label, f"{timing.amount} tokens", seconds, rate))
    if speed.first_token is not None:
        (w, h), first = next(iter(speed.encode)), speed.first_token
        rows.append((f"first token about {w} x {h}", f"{first.amount} tokens", f"{first.median:.3f} s", ""))
    rows.append(("peak memory", "", human_bytes(speed.peak_bytes), ""))
    features = f" ({', '.join(machine.features)})" if machine.features else ""
    where = f"{machine.processor}{features}, {machine.threads} threads, {machine.system}"
    return "\n".join([name, where, *machine.devices, "", format_table(rows)])


def as_json(name: str, machine: Machine, load_seconds: float, speed: Speed) -> dict[str, Any]:
    """The same for scripts; every repetition's seconds."""

    def timing(t: Timing | None) -> dict[str, Any] | None:
        if t is None:
            return None
        return {"amount": t.amount, "seconds": list(t.seconds), "median": t.median, "rate": t.rate}

    return {
        "model": name,
        "machine": asdict(machine),
        "load_seconds": load_seconds,
        "encode": [{"width": w, "height": h, **(timing(t) or {})} for (w, h), t in speed.encode.items()],
        "read": timing(speed.read),
        "write": timing(speed.write),
        "first_token": timing(speed.first_token),
        "peak_bytes": speed.peak_bytes,
    }
