"""`qvl caption`: captions for whole datasets, resumable at any point."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from qvl.cli import options
from qvl.cli.output import Output
from qvl.runtime.errors import InputError
from qvl.runtime.files import expanded

if TYPE_CHECKING:
    from qvl.runtime.caption.state import Mode

_SUFFIX: Final = re.compile(r"\.\w+$")
_ADDRESS: Final = re.compile(r"ray://\S+|auto|local|[\w.-]+:\d+$")

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH…",
        help="Files, folders, globs in quotes, @list.txt (# begins a comment), or - for paths on stdin.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="What to ask; {name} {stem} {dir} {width} {height} and columns of --vars are filled in. "
        "Default: Describe this image, or video, or the model's own words.",
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a file.")
]
Vars = Annotated[
    Path | None,
    typer.Option("--vars", metavar="CSV", help="Columns for the prompt; one (path, file) names the picture."),
]
Prefix = Annotated[str, typer.Option("--prefix", metavar="TEXT", help="Put before every caption.")]
Suffix = Annotated[str, typer.Option("--suffix", metavar="TEXT", help="Put after every caption.")]
Trigger = Annotated[
    list[str] | None,
    typer.Option("--trigger", metavar="WORD", help="Put first where a caption lacks it; can be repeated."),
]
StartWith = Annotated[
    str,
    typer.Option("--start-with", metavar="TEXT", help="Begin every caption with this; the model continues."),
]
Schema = Annotated[
    Path | None, typer.Option("--schema", metavar="FILE", help="Captions in JSON that fits this JSON schema.")
]
Samples = Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Captions per picture.")]
OutputFile = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="JSONL, or CSV by its suffix. Default: stdout."),
]
Sidecar = Annotated[
    bool,
    options.flag("--sidecar", help="A text file beside each picture: .txt, or the suffix given after it."),
]
OutDir = Annotated[
    Path | None,
    typer.Option(
        "--out-dir", metavar="DIR", help="Text files below this folder, in subfolders like the pictures'."
    ),
]
Overwrite = Annotated[bool, options.flag("--overwrite", help="Replace existing captions.")]
Append = Annotated[bool, options.flag("--append", help="Add to existing captions.")]
Prepend = Annotated[bool, options.flag("--prepend", help="Put before existing captions.")]
RetryErrors = Annotated[bool, options.flag("--retry-errors", help="Try again what failed.")]
AcceptChanges = Annotated[
    bool, options.flag("--accept-changes", help="Continue a file that was made with other settings.")
]
Parallel = Annotated[
    str, typer.Option("--parallel", metavar="N", help="Pictures at a time; auto chooses by memory and cores.")
]
Ray = Annotated[
    bool, options.flag("--ray", help="Run on a Ray cluster; its address may follow. Needs qvl[ray].")
]
Actors = Annotated[
    int | None,
    typer.Option(
        "--actors", metavar="N", min=1, help="Models on the cluster. Default: one per GPU, else per machine."
    ),
]


@dataclass(frozen=True)
class ModelOptions(options.ModelOptions):
    """Options of `qvl chat`, with a context that all pictures under way share."""

    n_ctx: Annotated[int | None, options.ctx_size(help="Context size in tokens, shared by all pictures.")] = (
        None
    )


@dataclass(frozen=True)
class SamplingOptions(options.SamplingOptions):
    """Options of `qvl chat`, with the length of a caption as default."""

    max_tokens: options.MaxTokens = 256


@options.grouped
def caption(
    paths: Paths,
    *,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    vars_: Vars = None,
    system: options.System = None,
    prefix: Prefix = "",
    suffix: Suffix = "",
    trigger: Trigger = None,
    start_with: StartWith = "",
    schema: Schema = None,
    samples: Samples = 1,
    output: OutputFile = None,
    sidecar: Sidecar = False,
    out_dir: OutDir = None,
    overwrite: Overwrite = False,
    append: Append = False,
    prepend: Prepend = False,
    retry_errors: RetryErrors = False,
    accept_changes: AcceptChanges = False,
    parallel: Parallel = "auto",
    ray: Ray = False,
    actors: Actors = None,
    model: ModelOptions,
    image_detail: options.ImageDetail = None,
    sampling: SamplingOptions,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Write a caption for each picture and video.

    Run the same command again to resume where the last one stopped, however it ended. Existing captions are
    kept, errors are records, and the exit code is 1 if any picture failed. A terminal shows each caption with
    its path; a pipe gets JSON lines.
    """
    from qvl.cli.caption_run import CaptionRun, Destination
    from qvl.cli.inputs import refuse_stdout
    from qvl.runtime.atomic import refuse_input
    from qvl.runtime.caption.inputs import find_inputs
    from qvl.runtime.caption.options import CaptionOptions

    out = Output(quiet, verbose)
    if actors is not None and not ray:
        raise typer.BadParameter("needs --ray", param_hint="--actors")
    paths, sidecar_suffix = _take(paths, _SUFFIX, sidecar)
    paths, address = _take(paths, _ADDRESS, ray)
    found = find_inputs(paths)
    for note in found.notes:
        out.warn(note)
    chosen = CaptionOptions(
        prompt=_prompt(prompt, prompt_file),
        variables=vars_,
        system=system,
        prefix=prefix,
        suffix=suffix,
        triggers=tuple(trigger or ()),
        start_with=start_with,
        schema=schema,
        samples=samples,
        max_tokens=sampling.max_tokens,
        sampling={n: v for n, v in sampling.kwargs().items() if n not in ("max_tokens", "seed")},
        seed=sampling.seed or 0,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        image_detail=image_detail,
    )
    chosen.prompts(), chosen.grammar()  # what is wrong with them is said before the model loads
    destination = Destination(
        output,
        out_dir,
        (sidecar_suffix or ".txt") if sidecar or out_dir else None,
        _mode(overwrite=overwrite, append=append, prepend=prepend, retry_errors=retry_errors),
        accept_changes,
        json,
    )
    given = _given(paths, vars_, prompt_file, schema, model.path, model.mmproj)
    read = [*(Path(item.path) for item in found.items), *given]
    refuse_stdout(read)
    if output is not None:
        refuse_input(output, read)
    if destination.sidecars is not None:
        destination.sidecars.refuse_inputs(found.items, given)
    run = CaptionRun(found.items, chosen, destination, out, _parallel(parallel), model.n_ctx)
    loading = replace(model, n_ctx=None, min_pixels=None, max_pixels=None)  # the run sees to these
    return run.on_ray(loading, address, actors) if ray else run.here(loading)


def _given(lists: list[str], *files: str | Path | None) -> list[Path]:
    """The files that arguments (`@list`) and options name: lists, tables, prompts, schemas, models."""
    named = [*(word[1:] for word in lists if word.startswith("@")), *(file for file in files if file)]
    return [expanded(name) for name in named]


def _take(paths: list[str], pattern: re.Pattern[str], wanted: bool) -> tuple[list[str], str | None]:
    """Part the value that may follow a flag (`--sidecar .caption`) from the paths."""
    if not wanted:
        return paths, None
    values = [path for path in paths if pattern.fullmatch(path) and not Path(path).exists()]
    return [path for path in paths if path not in values[:1]], values[0] if values else None


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    if prompt is not None and file is not None:
        raise typer.BadParameter("--prompt and --prompt-file, expected one of them")
    if prompt == "-":
        return sys.stdin.read().strip("\n")
    if file is not None:
        from qvl.runtime.caption.prompts import read_prompt

        try:
            return read_prompt(file)
        except FileNotFoundError as e:
            raise InputError(f"{file}: the prompt cannot be read: {e.strerror}") from e
    return prompt


def _mode(**given: bool) -> Mode:
    chosen = [name.replace("_", "-") for name, value in given.items() if value]
    if len(chosen) > 1:
        raise typer.BadParameter(f"--{' and --'.join(chosen)}, expected one of them")
    return chosen[0] if chosen else "skip"  # type: ignore[return-value]


def _parallel(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 64:  # MAX_PARALLEL
        raise typer.BadParameter(f"{text!r}, expected auto or a number from 1 to 64", param_hint="--parallel")
    return int(text)
