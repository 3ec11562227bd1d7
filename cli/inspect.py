"""`qvl inspect`: what a GGUF file holds, and what memory it takes to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from qvl.cli import options
from qvl.cli.layout import format_table
from qvl.cli.output import Output, human_bytes, printable
from qvl.runtime.errors import InputError

if TYPE_CHECKING:
    from qvl.runtime.ggml.gguf import GGUFFile

_CONTEXTS: Final = (2048, 8192, 32768)
_DEFAULT_CONTEXT: Final = 8192  # of chat
_CTX_PAD: Final = 256  # llama.cpp rounds a context up to this (llama-context.cpp)
_KV_BYTES: Final = 2  # K and V are kept as F16
_CONTROL: Final = 3  # LLAMA_TOKEN_TYPE_CONTROL (llama.h)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A GGUF file, or a folder of them.")],
    ctx_size: Annotated[
        int | None, typer.Option("-c", "--ctx-size", metavar="N", min=1, help="Tokens of the context.")
    ] = None,
    memory: Annotated[
        bool, options.flag("--memory", help="Show only the predicted peak memory of running the model.")
    ] = False,
    mmproj: options.Mmproj = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", metavar="WxH", help="Picture size for --memory.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a GGUF file holds.

    Hyperparameters, tensors and bytes by type, tokenizer, and the memory a context takes.
    """
    if memory:
        show_memory(path, mmproj, ctx_size or _DEFAULT_CONTEXT, image_size, json, Output(quiet))
        return
    from qvl.runtime.ggml.gguf import read_gguf

    out = Output(quiet)
    contexts = (ctx_size,) if ctx_size else _CONTEXTS
    reports = [report(read_gguf(file), contexts) for file in gguf_files(path)]
    if json:
        out.json(reports if path.is_dir() else reports[0], indent=2)
    else:
        out.page(printable("\n\n".join(as_text(report, out.width) for report in reports)))


def show_memory(
    path: Path, mmproj: Path | None, n_ctx: int, image_size: str | None, json: bool, out: Output
) -> None:
    """Print what a run of the model takes at its peak, on the CPU.

    Raises:
        InputError: no such model, or not a size.
    """
    from qvl.cli.fit import memory_rows
    from qvl.runtime.find import find_model
    from qvl.runtime.measure.memory import predict_memory

    size = None
    if image_size is not None:
        sides = image_size.lower().split("x")
        if len(sides) != 2 or not all(side.isdigit() and 0 < int(side) < 1 << 16 for side in sides):
            raise InputError(f"{image_size!r} is not a size", hint="for example --image-size 1280x720")
        size = int(sides[0]), int(sides[1])
    found = predict_memory(find_model(path, mmproj), n_ctx=n_ctx, image_size=size)
    if json:
        out.json({**asdict(found), "total": found.total}, indent=2)
        return
    rows = [(name, human_bytes(size)) for name, size in memory_rows(found, n_ctx)]
    out.page(format_table([*rows, ("peak", human_bytes(found.total))], width=out.width))


def gguf_files(path: Path) -> list[Path]:
    """The file itself, or every GGUF file in the folder, by name.

    Raises:
        InputError: nothing there to inspect.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.gguf"))
    if files:
        return files
    if (path / "config.json").is_file():
        raise InputError(
            f"{path}: a checkpoint, not GGUF files", hint=f"qvl convert {path} -o OUT makes them"
        )
    raise InputError(f"{path}: no .gguf file in this folder", hint="give the path of a GGUF file")


def report(file: GGUFFile, contexts: tuple[int, ...]) -> dict[str, Any]:
    """Everything `qvl inspect --json` says about one file; sizes in bytes."""
    meta, prefix = file.metadata, f"{file.architecture}."
    n_parameters = sum(t.n_elements for t in file.tensors.values())
    tensor_bytes = sum(t.nbytes for t in file.tensors.values())
    return {
        "path": str(file.path),
        "bytes": file.n_bytes,
        "name": meta.get("general.name"),
        "architecture": file.architecture,
        "parameters": n_parameters,
        "bits_per_weight": round(8 * tensor_bytes / n_parameters, 3) if n_parameters else None,
        "hyperparameters": {
            key.removeprefix(prefix): value
            for key, value in meta.items()
            if key.startswith(prefix) and not (isinstance(value, list) and len(value) > 16)
        },
        "tensors": _by_type(file),
        "sampling": {
            key.split(".")[-1]: value
            for key, value in meta.items()
            if key.startswith(("general.sampling.", "qvl.sampling."))
        },
        "tokenizer": _tokenizer(meta),
        "picture_tokens": _picture_tokens(meta),
        "memory": {
            "weights": tensor_bytes,
            "kv_cache": {str(n): size for n in contexts if (size := kv_cache_bytes(meta, n)) is not None},
        },
    }


def kv_cache_bytes(metadata: Mapping[str, Any], n_ctx: int) -> int | None:
    """Bytes of the KV cache of a context of n_ctx tokens; None for a file that has none.

    llama.cpp (llama-kv-cache.cpp): a row of K and one of V, n_head_kv heads wide, for each layer and cell.
    """
    arch = metadata.get("general.architecture")
    n_layer, n_head = metadata.get(f"{arch}.block_count"), metadata.get(f"{arch}.attention.head_count")
    n_embd = metadata.get(f"{arch}.embedding_length")
    if not (isinstance(n_layer, int) and isinstance(n_head, int) and isinstance(n_embd, int) and n_head > 0):
        return None
    n_head_kv = int(metadata.get(f"{arch}.attention.head_count_kv", n_head))
    head_k = int(metadata.get(f"{arch}.attention.key_length", n_embd // n_head))
    head_v = int(metadata.get(f"{arch}.attention.value_length", n_embd // n_head))
    cells = -(-n_ctx // _CTX_PAD) * _CTX_PAD
    return n_layer * cells * n_head_kv * (head_k + head_v) * _KV_BYTES


def _by_type(file: GGUFFile) -> list[dict[str, Any]]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor in file.tensors.values():
        count[tensor.type.name] += 1
        size[tensor.type.name] += tensor.nbytes
    return [{"type": kind, "tensors": count[kind], "bytes": nbytes} for kind, nbytes in size.most_common()]


def _tokenizer(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens = meta.get("tokenizer.ggml.tokens")
    if not tokens:
        return None

    def token(key: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    return {
        "model": meta.get("tokenizer.ggml.model"),
        "pre": meta.get("tokenizer.ggml.pre"),
        "tokens": len(tokens),
        "merges": len(meta.get("tokenizer.ggml.merges", ())),
        "control_tokens": sum(kind == _CONTROL for kind in meta.get("tokenizer.ggml.token_type", ())),
        "bos": token("bos"),
        "eos": token("eos"),
        "chat_template": "tokenizer.chat_template" in meta,
    }


def _picture_tokens(meta: Mapping[str, Any]) -> dict[str, int] | None:
    """Tokens of the smallest and the largest picture in the prompt."""
    patch = meta.get("clip.vision.patch_size")
    bounds = [meta.get(f"clip.vision.image_{end}_pixels") for end in ("min", "max")]
    if not isinstance(patch, int) or not all(isinstance(b, int) for b in bounds):
        return None
    side = patch * int(meta.get("clip.vision.spatial_merge_size", 2))
    low, high = (int(b) // side**2 for b in bounds if b is not None)
    return {"min": low, "max": high}


def as_text(report: Mapping[str, Any], width: int | None = None) -> str:
    """The report for people."""
    title = report["name"] or Path(report["path"]).stem
    hyperparameters = [(key, _brief(value)) for key, value in report["hyperparameters"].items()]
    blocks = [
        f"{report['path']}  ({human_bytes(report['bytes'])})\n"
        f"  {title}: {report['architecture']}, {report['parameters'] / 1e6:,.1f} M parameters, "
        f"{report['bits_per_weight']} bits per weight",
        "hyperparameters\n" + format_table(hyperparameters, indent=2, width=width),
        "tensors\n"
        + format_table(
            [(row["type"], str(row["tensors"]), human_bytes(row["bytes"])) for row in report["tensors"]],
            header=("type", "tensors", "size"),
            indent=2,
            width=width,
        ),
    ]
    if tokenizer := report["tokenizer"]:
        rows = [(k, _brief(v)) for k, v in tokenizer.items()]
        blocks.append("tokenizer\n" + format_table(rows, indent=2, width=width))
    if report["sampling"]:
        rows = [(name, _brief(value)) for name, value in report["sampling"].items()]
        blocks.append("sampling by default\n" + format_table(rows, indent=2, width=width))
    if tokens := report["picture_tokens"]:
        blocks.append(f"a picture takes {tokens['min']} to {tokens['max']} tokens of the context")
    memory = [("weights", human_bytes(report["memory"]["weights"]))]
    memory += [(f"context of {n} tokens", human_bytes(b)) for n, b in report["memory"]["kv_cache"].items()]
    blocks.append("memory\n" + format_table(memory, indent=2, width=width))
    return "\n\n".join(blocks)


def _brief(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(map(_brief, value))
    return "-" if value is None else str(value)
