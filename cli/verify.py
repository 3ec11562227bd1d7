"""`qvl verify`: what a model's files have lost against a reference, and where."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from qvl.cli import options
from qvl.cli.layout import format_table
from qvl.cli.output import Output

if TYPE_CHECKING:
    from qvl.runtime.measure.divergence import Divergence
    from qvl.runtime.measure.verify import Report

FAILED: Final = 1
_HEADER: Final = ("", "KL mean", "KL 99%", "KL max", "top-1", "perplexity", "change", "same replies")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A text GGUF, a folder, or a checkpoint.")]
Against = Annotated[
    str, typer.Option("--against", metavar="REFERENCE", help="The model to compare with, given likewise.")
]
AgainstMmproj = Annotated[
    Path | None, typer.Option("--against-mmproj", metavar="FILE", help="The reference's vision GGUF.")
]
Images = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", help="Pictures to ask about. Default: qvl's samples."),
]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="A question a line, or JSON lines {image, prompt}."),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Ask at most N questions.")]
Parts = Annotated[bool, options.flag("--parts/--no-parts", help="Measure what each part loses.")]
MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", metavar="X", min=0.0, help="Exit with 1 if the mean KL is higher."),
]


def verify(
    model: Model,
    against: Against,
    mmproj: options.Mmproj = None,
    against_mmproj: AgainstMmproj = None,
    images: Images = None,
    prompts: Prompts = None,
    limit: Limit = None,
    max_tokens: options.MaxTokens = 64,
    parts: Parts = True,
    max_kl: MaxKl = None,
    ctx_size: options.CtxSize = 4096,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure what a model lost against a reference.

    The reference answers questions about pictures; both say, token by token, what they expect of its
    replies. A checkpoint folder runs in transformers (needs the extra qvl[parity]).
    """
    from contextlib import ExitStack

    from qvl.cli.comparands import open_subject
    from qvl.runtime.measure.samples import load_samples
    from qvl.runtime.measure.verify import verify as run

    out = Output(quiet, verbose)
    samples = load_samples(images, prompts, limit)
    with ExitStack() as stack:
        shared = {"n_ctx": ctx_size, "device": device, "threads": threads}
        reference = stack.enter_context(open_subject(against, against_mmproj, out, **shared))
        measured = stack.enter_context(open_subject(model, mmproj, out, **shared))
        progress = stack.enter_context(out.progress("verifying", unit="steps"))
        report = run(
            measured.pair,
            reference.pair,
            samples,
            subject=measured.subject,
            truth=reference.subject,
            max_tokens=max_tokens,
            attribute=parts,
            progress=progress,
        )
    if json:
        out.json(as_json(report), indent=2)
    else:
        out.page(as_text(report, verbose, out.width))
    if max_kl is not None and report.together.kl_mean > max_kl:
        out.error(f"mean KL is {report.together.kl_mean:.3g}, expected at most {max_kl:g}")
        raise typer.Exit(FAILED)


def as_json(report: Report) -> dict[str, Any]:
    """The report for scripts: KL in nats, shares from 0 to 1."""
    value = asdict(report)
    for divergence in (value["decoder"], value["together"], *value["parts"].values()):
        divergence.pop("parted")
    for name in ("decoder", "together"):
        value[name]["same_replies"] = getattr(report, name).same_replies
    return value


def as_text(report: Report, verbose: bool = False, width: int | None = None) -> str:
    """The report for people."""
    n = len(report.answers)
    blocks = [f"{report.model}\nagainst {report.reference}, on {n} questions"]
    if report.vision is not None:
        blocks.append(
            f"vision embeddings: relative error {report.vision.relative:.4f}, worst cosine "
            f"{report.vision.worst_cosine:.5f}, over {report.vision.n_tokens} tokens"
        )
    rows = [("decoder alone", *_cells(report.decoder)), ("together", *_cells(report.together))]
    blocks.append(format_table(rows, _HEADER, width=width))
    if report.parts:
        ranked = sorted(report.parts.items(), key=lambda item: -item[1].kl_mean)
        cells = [(name, *_cells(part)) for name, part in ranked]
        table = format_table(cells, ("part", *_HEADER[1:]), width=width)
        blocks.append(f"the reference with one part taken from the model\n{table}")
    parting = [a for a in report.answers if a.parted is not None]
    if parting:
        first = min(parting, key=lambda a: a.parted or 0)
        blocks.append(
            f"{len(parting)} of {n} replies differ, the first at token {first.parted}: {first.sample}"
        )
    if verbose:
        rows = [("-" if a.parted is None else str(a.parted), a.sample, a.reply) for a in report.answers]
        blocks.append("\n".join(f"{at:>4}  {sample}\n      {reply}" for at, sample, reply in rows))
    return "\n\n".join(blocks)


def _cells(d: Divergence) -> tuple[str, ...]:
    return (
        f"{d.kl_mean:.2e}",
        f"{d.kl_p99:.2e}",
        f"{d.kl_max:.2e}",
        f"{d.top1:.2%}",
        f"{d.perplexity:.4f}",
        f"{d.perplexity_change:+.2%}",
        f"{d.same_replies:.0%}",
    )
