"""Flags that several commands share, spelled as llama.cpp's and mlx's users know them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

flag = partial(typer.Option, metavar="")  # an option without a value

Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="FILE|DIR[:TYPE]",
        help="A text GGUF, or a folder with it and its mmproj (DIR:q8_0 for one of several types). "
        "Default: $QVL_MODEL, else the embedded model.",
    ),
]
Mmproj = Annotated[
    Path | None,
    typer.Option("--mmproj", metavar="FILE", help="The vision GGUF, if not beside the text file."),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="Device to run on: auto, cpu, cuda0, metal, rpc:HOST:PORT."
    ),
]
GpuLayers = Annotated[
    int | None,
    typer.Option("-ngl", "--n-gpu-layers", metavar="N", help="Layers on the device. Default: all."),
]
ctx_size = partial(typer.Option, "-c", "--ctx-size", metavar="N", min=64)
CtxSize = Annotated[int, ctx_size(help="Tokens the context holds.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        metavar="N",
        min=1,
        max=512,
        help="Threads to use. Default: one for each physical core.",
    ),
]
MinPixels = Annotated[
    int | None,
    typer.Option("--min-pixels", metavar="N", min=1, help="Enlarge smaller pictures to this area."),
]
MaxPixels = Annotated[
    int | None, typer.Option("--max-pixels", metavar="N", min=1, help="Shrink larger pictures to this area.")
]
ImageDetail = Annotated[
    Literal["low", "auto", "high"] | None,
    typer.Option(
        "--image-detail",
        metavar="low|auto|high",
        help="How large to encode pictures: at most 256 tokens, what takes seconds here, or in full.",
    ),
]
Precision = Annotated[
    Literal["auto", "exact"],
    typer.Option(
        "--precision",
        metavar="auto|exact",
        help="Kernels of the encoder and of prompts: the fastest, or ggml's alone.",
    ),
]
KvType = Annotated[
    Literal["f16", "f32", "q8_0"] | None,
    typer.Option("--kv-type", metavar="T", help="Type of the KV cache: f16, f32, q8_0."),
]

MaxTokens = Annotated[
    int, typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Longest reply, in tokens.")
]
Temperature = Annotated[
    float | None, typer.Option("--temp", metavar="X", min=0.0, help="0 is greedy. Default: the model's own.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="N", min=0, help="Sample from the N most likely tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="X",
        min=0.0,
        max=1.0,
        help="Sample from the most likely tokens that together have probability X.",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="X",
        min=0.0,
        max=1.0,
        help="Sample from tokens at least X times as likely as the most likely.",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option("--repeat-penalty", metavar="X", min=0.01, help="Above 1 discourages repetition."),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        metavar="X",
        min=-2.0,
        max=2.0,
        help="Above 0 discourages tokens that the reply already has.",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="The same seed gives the same text.")
]

System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")]
Json = Annotated[bool, flag("--json", help="Print JSON.")]
Quiet = Annotated[bool, flag("-q", "--quiet", help="Only warnings and errors on stderr.")]
Verbose = Annotated[bool, flag("-v", "--verbose", help="Also timings, and llama.cpp's log, on stderr.")]


@dataclass(frozen=True)
class ModelOptions:
    """Arguments of `load`; None leaves its default."""

    path: Model = None
    mmproj: Mmproj = None
    device: Device = "auto"
    n_gpu_layers: GpuLayers = None
    n_ctx: Annotated[int | None, ctx_size(help="Tokens the context holds. Default: 8192.")] = None
    threads: Threads = None
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    kv_type: KvType = None
    precision: Precision = "auto"

    def kwargs(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None and name != "path"}


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of `generate`; None leaves the model's own default."""

    max_tokens: MaxTokens = 1024
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    repeat_penalty: RepeatPenalty = None
    presence_penalty: PresencePenalty = None
    seed: Seed = None

    def kwargs(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take dataclasses of options: every field is an option, with its type and its default.

    typer reads the signature, in which the fields stand where the dataclass did.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    signature = inspect.signature(command, eval_str=True)
    for parameter in signature.parameters.values():
        if not is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        group = groups[parameter.name] = parameter.annotation
        types = get_type_hints(group, include_extras=True)
        parameters += [
            parameter.replace(name=field.name, default=field.default, annotation=types[field.name])
            for field in fields(group)
        ]

    @wraps(command)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
