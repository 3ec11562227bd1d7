"""`qvl convert`: a checkpoint in, two GGUF files out, and a table of what became of the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli import options
from qvl.cli.layout import format_table
from qvl.cli.output import Output, human_bytes, human_seconds

if TYPE_CHECKING:
    from qvl.convert import Converted

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A folder with safetensors, or a repository id of the hub.")
]
OutDir = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the two files.")]
TextType = Annotated[
    str, typer.Option("--type", metavar="T", help="Type of the decoder: q4_k_m, q8_0, f16, …")
]
VisionType = Annotated[
    str, typer.Option("--vision-type", metavar="T", help="Type of the image encoder: q8_0, f16, q4_k, …")
]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="An importance matrix (GGUF) to weigh errors by."),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option("--tensor-type", metavar="REGEX=T", help="Another type for some tensors; can be repeated."),
]
EmbeddingType = Annotated[
    str | None, typer.Option("--token-embedding-type", metavar="T", help="Type of token_embd.weight.")
]
HeadType = Annotated[str | None, typer.Option("--output-type", metavar="T", help="Type of output.weight.")]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the files. Default: the source's."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of the repository.")
]
FitTo = Annotated[
    str | None,
    typer.Option(
        "--fit", metavar="SIZE", help="Choose the best types that run in SIZE of memory, such as 3GB."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        metavar="N",
        min=1,
        max=512,
        help="Threads to use. Default: one for each logical core.",
    ),
]
Force = Annotated[bool, options.flag("--force", help="Overwrite files that exist.")]


def convert(
    src: Source,
    out_dir: OutDir = Path(),
    text_type: TextType = "q4_k_m",
    vision_type: VisionType = "q8_0",
    imatrix: Imatrix = None,
    tensor_type: TensorType = None,
    token_embedding_type: EmbeddingType = None,
    output_type: HeadType = None,
    name: Name = None,
    revision: Revision = None,
    fit: FitTo = None,
    ctx_size: options.CtxSize = 8192,
    max_pixels: options.MaxPixels = None,
    force: Force = False,
    threads: Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn a checkpoint into two GGUF files.

    --fit counts weights, a context of --ctx-size, and the encoder at work on a picture of --max-pixels.
    """
    from qvl.convert import convert as run

    out = Output(quiet)
    if fit is not None:
        from qvl.cli.fit import fitting_types

        text_type, vision_type = fitting_types(
            src, out_dir, fit, out, n_ctx=ctx_size, max_pixels=max_pixels,
            imatrix=imatrix, revision=revision, tensor_types=tensor_type or (),
            token_embedding_type=token_embedding_type, output_type=output_type,
        )  # fmt: skip
    with out.progress("converting") as advance:
        done = run(
            src,
            out_dir,
            text_type,
            vision_type,
            imatrix,
            advance,
            force=force,
            threads=threads,
            name=name,
            revision=revision,
            tensor_types=tensor_type or (),
            token_embedding_type=token_embedding_type,
            output_type=output_type,
        )
    for warning in done.warnings:
        out.warn(warning)
    if json:
        out.json(as_json(done), indent=2)
    else:
        out.note(as_text(done, out.note_width))


def as_text(done: Converted, width: int | None = None) -> str:
    """The table at the end: for each file its tensors and bytes by type, then time and both paths."""
    blocks = []
    for file in done.files:
        rows = [
            (t.type, str(t.n_tensors), human_bytes(t.n_bytes), f"{t.bits_per_weight:.2f}")
            for t in file.by_type
        ]
        header_bytes = file.n_bytes - sum(t.n_bytes for t in file.by_type)
        rows.append(("header", "", human_bytes(header_bytes), ""))
        rows.append(("all", str(file.n_tensors), human_bytes(file.n_bytes), f"{file.bits_per_weight:.2f}"))
        header = ("type", "tensors", "size", "bits per weight")
        blocks.append(f"{file.path.name}\n{format_table(rows, header, indent=2, width=width)}")
        if file.fallbacks:
            names = ", ".join(f"{f.name} ({f.n_per_row} a row)" for f in file.fallbacks[:3])
            more = f" and {len(file.fallbacks) - 3} more" if len(file.fallbacks) > 3 else ""
            first = file.fallbacks[0]
            blocks[-1] += f"\n  {first.wanted} does not divide the rows, so {first.used}: {names}{more}"
    blocks.append(f"done in {human_seconds(done.seconds)}\n  {done.text}\n  {done.mmproj}")
    return "\n\n".join(blocks)


def as_json(done: Converted) -> dict[str, Any]:
    """The result for scripts: sizes in bytes, times in seconds."""
    return {
        "text": str(done.text),
        "mmproj": str(done.mmproj),
        "seconds": round(done.seconds, 3),
        "warnings": list(done.warnings),
        "files": [
            {
                "path": str(file.path),
                "bytes": file.n_bytes,
                "bits_per_weight": round(file.bits_per_weight, 3),
                "types": [{"type": t.type, "tensors": t.n_tensors, "bytes": t.n_bytes} for t in file.by_type],
                "fallbacks": [{"tensor": f.name, "wanted": f.wanted, "used": f.used} for f in file.fallbacks],
            }
            for file in done.files
        ],
    }
