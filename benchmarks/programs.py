"""Measure qvl beside llama.cpp's programs on the same files: llama-mtmd-cli and llama-bench."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import contenders
import numpy as np
from PIL import Image

from qvl.runtime import load
from qvl.runtime.ggml.features import cpu_features
from qvl.runtime.llama.binding import import_part
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.repack import Optimize
from qvl.runtime.measure.speed import read_seconds, write_seconds
from qvl.runtime.model import Model

READ, WRITE = 512, 32  # tokens
QUESTION = "What is in this picture?"
SIZE = 448
THEIRS = "f16"  # of the mmproj files, the one that llama.cpp's converter writes
COLD = "--no-warmup"  # without it the program runs every graph once before it begins
PARTS = ("cold", "warm", "rates")
InTurns = Callable[..., dict[str, list[float]]]


def measure(
    args: argparse.Namespace, text: Path, mmprojs: dict[str, Path], in_turns: InTurns
) -> Iterator[dict[str, Any]]:
    """Measure cold starts and warm answers in seconds, and rates in tokens a second."""
    options = {"rounds": args.rounds, "budget": args.budget}
    if "cold" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            runs = cold_runs(args, text, mmprojs, Path(folder))
            yield {"size": SIZE, "cold": in_turns(runs, **options, warm=False)}
    if "warm" in args.parts:
        yield {"size": SIZE, "warm": warm(args, text, mmprojs, in_turns, options)}
    if "rates" in args.parts:
        yield {"rates": rates(args, text, in_turns, options)}


def peer_flags(program: str) -> list[str]:
    """Flags that keep llama.cpp's programs from ggml's AMX kernels (`qvl.runtime.llama.repack`)."""
    if "AMX_INT8" not in cpu_features():
        return []
    return ["--repack", "0"] if program == "llama-bench" else ["--no-repack"]


def noise(n: int) -> Any:
    return np.random.default_rng(n).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def cold_runs(
    args: argparse.Namespace, text: Path, mmprojs: dict[str, Path], folder: Path
) -> dict[str, Callable[[int], Any]]:
    """Whole processes, from their start to the end after one token."""
    shared = ["-m", text, "-p", QUESTION, "-n", 1, "--temp", 0, "-c", 2048, "-t", args.threads]

    def run(program: list[str], mmproj: Path) -> Callable[[int], Any]:
        def once(n: int) -> None:
            picture = folder / f"{n}.png"
            Image.fromarray(noise(n)).save(picture)
            command = [*program, *shared, "--mmproj", mmproj, "--image", picture]
            subprocess.run([str(part) for part in command], check=True, capture_output=True)

        return once

    mtmd = [str(args.peers / "llama-mtmd-cli"), "--chat-template", "chatml", *peer_flags("llama-mtmd-cli")]
    qvl = [sys.executable, "-m", "qvl.cli", "chat", "--no-cache"]
    programs = (("qvl", qvl), ("llama-mtmd-cli", mtmd), (f"llama-mtmd-cli {COLD}", [*mtmd, COLD]))
    return {
        f"{name} {kind.upper()}": run(program, mmproj)
        for kind, mmproj in mmprojs.items()
        for name, program in programs
        if name == "qvl" or kind == THEIRS
    }


def warm(
    args: argparse.Namespace, text: Path, mmprojs: dict[str, Path], in_turns: InTurns, options: dict[str, Any]
) -> dict[str, list[float]]:
    """Encoding and prefill of a picture and a question with everything loaded.

    llama-mtmd-cli's part is done by the functions that it calls (`mtmd_tokenize`,
    `mtmd_helper_eval_chunks`), on the prompt that its chat template makes.
    """
    turns: dict[str, Callable[[int], Any]] = {}
    with ExitStack() as stack:
        for kind, mmproj in mmprojs.items():
            model = stack.enter_context(load(text, mmproj, device="cpu", threads=args.threads, n_ctx=2048))
            turns[f"qvl {kind.upper()}"] = _our_answer(model)
            if kind == THEIRS:
                answer = contenders.mtmd_answer(stack, model.text.handle, mmproj, args.threads)
                turns[f"llama-mtmd-cli {kind.upper()}"] = lambda n, a=answer: a(noise(n), _prompt(n))
        return in_turns(turns, **options)


def _our_answer(model: Model) -> Callable[[int], Any]:
    def once(n: int) -> None:
        session = model.session()
        part = {"type": "text", "text": f"{QUESTION} ({n})"}
        message = {"role": "user", "content": [{"type": "image", "image": noise(n)}, part]}
        stream = session.generate([message], max_tokens=1, temperature=0.0)
        next(stream, None)
        stream.cancel()
        stream.result()
        session.close()

    return once


def _prompt(n: int) -> bytes:
    marker = import_part("mtmd_cpp").mtmd_default_marker().decode()
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{marker}{QUESTION} ({n})<|im_end|>\n<|im_start|>assistant\n"
    ).encode()


def rates(
    args: argparse.Namespace, text: Path, in_turns: InTurns, options: dict[str, Any]
) -> dict[str, list[float]]:
    """Measure tokens a second of prefill and generation, ours and llama-bench's."""
    command = [args.peers / "llama-bench", "-m", text, "-t", args.threads, "-r", 1, "-o", "json"]
    command += peer_flags("llama-bench")

    def peer(flags: list[Any]) -> float:
        whole = [str(part) for part in (*command, *flags)]
        done = subprocess.run(whole, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)[0]["avg_ts"])

    with ExitStack() as stack:

        def context(optimize: Optimize) -> Context:
            model = stack.enter_context(LlamaModel(text, device="cpu", optimize=optimize, precision="auto"))
            return stack.enter_context(Context(model, n_ctx=READ, threads=args.threads))

        chat, captions = context("decode"), context("prefill")
        turns: dict[str, Callable[[int], Any]] = {
            "qvl prefill": lambda n: READ / read_seconds(chat, READ),
            "llama-bench prefill": lambda n: peer(["-p", READ, "-n", 0]),
            "qvl prefill for captions": lambda n: READ / read_seconds(captions, READ),
            "qvl generation": lambda n: WRITE / write_seconds(chat, WRITE),
            "llama-bench generation": lambda n: peer(["-p", 0, "-n", WRITE]),
        }
        return in_turns(turns, **options)
