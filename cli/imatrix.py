"""`qvl imatrix`: what matters in a model's matrices, found by running it on pictures and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvl.cli import options
from qvl.cli.output import Output

Images = Annotated[
    Path | None, typer.Option("--images", metavar="DIR", help="Pictures to calibrate on; more are better.")
]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="A question a line, or JSON lines {image, prompt}."),
]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Text to calibrate on, alone or with pictures.")
]
Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="FILE", help="The importance matrix (GGUF) to write.")
]
ReplyTokens = Annotated[
    int,
    typer.Option("-n", "--max-tokens", metavar="N", min=0, help="Tokens of the reply to each picture."),
]
Chunk = Annotated[int, typer.Option("--chunk", metavar="N", min=16, help="Tokens per piece of text.")]
SaveEvery = Annotated[int, typer.Option("--save-every", metavar="N", min=1, help="Prompts between saves.")]
Head = Annotated[bool, options.flag("--head", help="Include the output matrix.")]
Squares = Annotated[
    bool,
    options.flag("--squares-only", help="Leave out products of inputs: a small file, as llama-imatrix's."),
]
Force = Annotated[bool, options.flag("--force", help="Start over if the file exists.")]


def imatrix(
    out_file: Out,
    model: options.Model = None,
    mmproj: options.Mmproj = None,
    images: Images = None,
    prompts: Prompts = None,
    text: Text = None,
    max_tokens: ReplyTokens = 64,
    chunk: Chunk = 512,
    head: Head = False,
    squares_only: Squares = False,
    save_every: SaveEvery = 16,
    force: Force = False,
    ctx_size: options.CtxSize = 4096,
    device: options.Device = "auto",
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Calibrate on pictures, for convert --imatrix.

    llama-quantize reads the file too. Pictures calibrate the image encoder and the decoder, text the decoder
    alone. After an interruption, run the same command again to resume.
    """
    from qvl.runtime.atomic import refuse_input
    from qvl.runtime.errors import InputError
    from qvl.runtime.find import find_model
    from qvl.runtime.measure.calibrate import CalibrationPlan, calibrate
    from qvl.runtime.measure.samples import load_samples

    out = Output(quiet)
    pictures = images is not None or prompts is not None
    words = ""
    if text is not None:
        try:
            words = text.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"{text}: not a text in UTF-8 (byte {e.start})", hint="convert it first") from e
    plan = CalibrationPlan(
        samples=tuple(load_samples(images, prompts)) if pictures else (),
        text=words,
        text_name=text.name if text is not None else "",
        reply_tokens=max_tokens,
        chunk=chunk,
        head=head,
        products=not squares_only,
    )
    files = find_model(model, mmproj)
    read = [files.text, files.mmproj, text, prompts, *(s.image for s in plan.samples)]
    refuse_input(out_file, [Path(path) for path in read if path is not None])
    with out.progress("calibrating", unit="prompts") as progress:
        made = calibrate(
            files,
            plan,
            out_file,
            device=device,
            threads=threads,
            n_ctx=ctx_size,
            save_every=save_every,
            force=force,
            progress=progress,
            warn=out.warn,
        )
    seen = [sum(n.startswith(start) for n in made.entries) for start in ("blk.", ("v.", "mm."))]
    parts = f"{seen[0]} matrices of the decoder, {seen[1]} of the image encoder"
    out.note(f"{out_file}: {made.chunks} prompts, {parts}\n  qvl convert SRC --imatrix {out_file}")
