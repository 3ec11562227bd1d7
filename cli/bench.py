"""`qvl bench`: how fast a model runs on this machine."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from qvl.cli import options
from qvl.cli.layout import format_table
from qvl.cli.output import Output, human_bytes, human_seconds
from qvl.runtime.errors import InputError

if TYPE_CHECKING:
    from qvl.runtime.measure.machine import Machine
    from qvl.runtime.measure.speed import Size, Speed, Timing
    from qvl.runtime.model import Model

_N_CTX: Final = 4096

Sizes = Annotated[
    str,
    typer.Option(
        "--sizes", metavar="N,WxH,…", help="Picture sizes to encode; the first is also asked about."
    ),
]
Repeat = Annotated[
    int,
    typer.Option("-r", "--repeat", metavar="N", min=1, help="At most N repetitions; the median is shown."),
]
Read = Annotated[int, typer.Option("--read", metavar="N", min=1, help="Prompt length in tokens.")]
Write = Annotated[int, typer.Option("--write", metavar="N", min=1, help="Reply length in tokens.")]


@options.grouped
def bench(
    *,
    sizes: Sizes = "224,448,896",
    read: Read = 512,
    write: Write = 128,
    repeat: Repeat = 3,
    model: options.ModelOptions,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how fast a model runs here.

    Encoding pictures, reading a prompt, writing a reply, the wait for a first token, loading, memory.
    What takes long is repeated less often. `--image-detail auto` goes by what was measured last.
    """
    pictures = [parse_size(size) for size in sizes.split(",") if size.strip()]
    from qvl.cli.engine import open_model
    from qvl.runtime.detail.throughput import keep_throughput
    from qvl.runtime.measure.machine import describe_machine
    from qvl.runtime.measure.speed import measure

    out = Output(quiet, verbose)
    start = time.perf_counter()
    with open_model(replace(model, n_ctx=model.n_ctx or _N_CTX), out) as loaded:
        load_seconds = time.perf_counter() - start
        with out.progress("measuring", "steps") as bar:
            speed = measure(
                loaded,
                sizes=pictures if loaded.has_vision else [],
                n_read=read,
                n_write=write,
                repeat=repeat,
                progress=bar,
            )
        subject = Subject.of(loaded, load_seconds)
        if throughput := speed.throughput:
            keep_throughput(loaded, throughput)
    if json:
        out.json(as_json(subject, describe_machine(), speed), indent=2)
    else:
        out.page(as_text(subject, describe_machine(), speed, out.width))


@dataclass(frozen=True)
class Subject:
    """Model and setting of a measurement.

    Attributes:
        precision: of the image encoder; None without one.
        encoder: whose kernels it runs on, and on what device, in words.
        device: that holds the image encoder, or would.
    """

    model: str
    mmproj: str | None
    precision: str | None
    encoder: str | None
    device: str
    threads: int
    load_seconds: float

    @classmethod
    def of(cls, model: Model, load_seconds: float) -> Subject:
        from qvl.cli.engine import encoder_text
        from qvl.runtime.resources import default_threads

        vision = model.vision if model.has_vision else None
        return cls(
            model.path.name,
            vision.path.name if vision else None,
            vision.precision if vision else None,
            encoder_text(vision) if vision else None,
            vision.device.name if vision else "",
            model.threads or default_threads(),
            load_seconds,
        )


def parse_size(text: str) -> Size:
    """ "448" is a square, "1600x400" a width and a height.

    Raises:
        InputError: neither.
    """
    match = re.fullmatch(r"\s*([1-9]\d*)(?:x([1-9]\d*))?\s*", text)
    if match is None:
        raise InputError(f"{text!r} is not the size of a picture", hint="for example --sizes 448,1600x400")
    return int(match[1]), int(match[2] or match[1])


def as_text(subject: Subject, machine: Machine, speed: Speed, width: int | None = None) -> str:
    """The table for people."""
    rows = [("load", "", human_seconds(subject.load_seconds), "")]
    rows += [
        (f"picture of {w} x {h}", f"{t.amount} patches", f"{t.median:.3f} s", f"{t.rate:.0f} patches/s")
        for (w, h), t in speed.encode.items()
    ]
    for label, timing in (("read", speed.read), ("write", speed.write)):
        if timing is not None:
            seconds, rate = f"{timing.median:.3f} s", f"{timing.rate:.1f} tokens/s"
            rows.append((label, f"{timing.amount} tokens", seconds, rate))
    if speed.first_token is not None and speed.asked is not None:
        (w, h), first = speed.asked, speed.first_token
        rows.append((f"first token about {w} x {h}", f"{first.amount} tokens", f"{first.median:.3f} s", ""))
    rows.append(("peak memory", "", human_bytes(speed.peak_bytes), ""))
    return "\n".join([*_setting(subject, machine), "", format_table(rows, width=width)])


def _setting(subject: Subject, machine: Machine) -> list[str]:
    """Describe the model, the machine and the kernels."""
    instructions = f" ({', '.join(machine.instructions)})" if machine.instructions else ""
    lines = [
        " + ".join(name for name in (subject.model, subject.mmproj) if name),
        f"{machine.cpu}{instructions}, {machine.cores} cores, {machine.system}, ggml {machine.ggml}",
        *machine.devices,
    ]
    if subject.encoder is not None:
        lines.append(f"image encoder: {subject.encoder}")
    return [*lines, f"{subject.threads} threads"]


def as_json(subject: Subject, machine: Machine, speed: Speed) -> dict[str, Any]:
    """The measurement for scripts, with the seconds of every repetition."""

    def timing(t: Timing | None) -> dict[str, Any] | None:
        if t is None:
            return None
        return {"amount": t.amount, "seconds": list(t.seconds), "median": t.median, "rate": t.rate}

    asked = dict(zip(("width", "height"), speed.asked, strict=True)) if speed.asked else {}
    return {
        **asdict(subject),
        "machine": machine.as_dict(),
        "encode": [{"width": w, "height": h, **(timing(t) or {})} for (w, h), t in speed.encode.items()],
        "read": timing(speed.read),
        "write": timing(speed.write),
        "first_token": {**asked, **(timing(speed.first_token) or {})} if speed.first_token else None,
        "peak_bytes": speed.peak_bytes,
    }
