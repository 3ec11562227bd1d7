"""Images a minute: `qvl caption` against llama-server with parallel slots and a loop of llama-mtmd-cli.

    python benchmarks/caption.py --text T.gguf --mmproj mmproj-F16.gguf --peers "$(benchmarks/peers.sh)"

All run the same GGUF files (llama.cpp's programs others, with --their-text and --their-mmproj) on the same
pictures, of one size, with the same prompt, to the same number of tokens, greedily and without stopping
early; the token counts are compared. They take turns in one run, and every round has pictures of its own,
so that no cache helps. Loading is left out for qvl and the server and is part of the loop, which loads for
every picture. Prints the processor, its level of kernels and a table in Markdown, or JSON with --json.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from programs import peer_flags

from qvl.runtime import load
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.caption.setup import open_run
from qvl.runtime.caption.stdout import JsonLines
from qvl.runtime.measure.machine import describe_machine
from qvl.runtime.model import Model

PROMPT = "Describe this image."
SLOTS = 4
CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclass
class Measured:
    """Rounds of one program with one pair of files.

    Attributes:
        rates: images a minute, one a round.
        prompt_tokens, completion_tokens: of each picture, as the program counts them.
        stages: seconds by stage, of the last round.
    """

    name: str
    rates: list[float] = field(default_factory=list)
    prompt_tokens: set[int] = field(default_factory=set)
    completion_tokens: set[int] = field(default_factory=set)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def pictures(folder: Path, n: int, size: int, seed: int) -> list[Path]:
    """Pictures like photographs to a decoder: smooth, with noise."""
    random = np.random.default_rng(seed)
    paths = []
    for i in range(n):
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{seed}-{i}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=92)
    return paths


def run_qvl(model: Model, paths: list[Path], tokens: int, parallel: int | None, into: Measured) -> None:
    options = CaptionOptions(prompt=PROMPT, max_tokens=tokens, sampling={"temperature": 0.0})
    started = time.perf_counter()
    runner, captioner = open_run(
        model, [Item(str(p)) for p in paths], options, JsonLines(), parallel=parallel
    )
    with captioner:
        records = list(runner.run())
    seconds = time.perf_counter() - started
    assert len(records) == len(paths) and not any(record.failed for record in records)
    into.rates.append(60 * len(paths) / seconds)
    into.prompt_tokens |= {record.prompt_tokens or 0 for record in records}
    into.completion_tokens |= {record.completion_tokens or 0 for record in records}
    into.stages = dict(runner.tally.seconds | captioner.seconds)


@contextmanager
def server(bin_dir: Path, text: Path, mmproj: Path, threads: int) -> Iterator[str]:
    """The address of a llama-server whose slots are ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [bin_dir / "llama-server", "-m", text, "--mmproj", mmproj, "--port", port, "-np", SLOTS]
    command += [
        "-c",
        2048 * SLOTS,
        "-t",
        threads,
        "--cache-ram",
        0,
        "--no-webui",
        *peer_flags("llama-server"),
    ]
    with subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=1):
                    break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("llama-server ended before it was ready") from None
                time.sleep(0.2)
        try:
            yield address
        finally:
            process.terminate()
            process.wait()


def post(address: str, body: dict[str, object]) -> dict[str, int]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)  # type: ignore[no-any-return]


def ask(address: str, marker: str, path: Path, tokens: int) -> tuple[int, int]:
    """One picture through the server; its prompt and completion tokens. The prompt is that of qvl."""
    prompt = CHATML.format(marker + PROMPT)
    data = base64.b64encode(path.read_bytes()).decode()
    body = {"prompt": {"prompt_string": prompt, "multimodal_data": [data]}, "n_predict": tokens}
    found = post(f"{address}/completion", {**body, "temperature": 0, "ignore_eos": True})
    return found["tokens_evaluated"], found["tokens_predicted"]


def run_server(address: str, paths: list[Path], tokens: int, into: Measured) -> None:
    with urllib.request.urlopen(f"{address}/props") as reply:
        marker = json.load(reply)["media_marker"]
    started = time.perf_counter()
    with ThreadPoolExecutor(SLOTS) as pool:
        counts = list(pool.map(lambda path: ask(address, marker, path, tokens), paths))
    into.rates.append(60 * len(paths) / (time.perf_counter() - started))
    into.prompt_tokens |= {prompt for prompt, _ in counts}
    into.completion_tokens |= {completion for _, completion in counts}


def run_loop(
    bin_dir: Path, text: Path, mmproj: Path, threads: int, paths: list[Path], tokens: int, into: Measured
) -> None:
    command = [bin_dir / "llama-mtmd-cli", "-m", text, "--mmproj", mmproj, "-t", threads, "-c", 2048]
    command += ["-n", tokens, "--temp", 0, "--ignore-eos", *peer_flags("llama-mtmd-cli")]
    command += ["--chat-template", "chatml", "-p", PROMPT, "--image"]
    started = time.perf_counter()
    for path in paths:
        subprocess.run([*map(str, command), str(path)], check=True, capture_output=True)
    into.rates.append(60 * len(paths) / (time.perf_counter() - started))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--mmproj", type=Path, required=True)
    parser.add_argument("--own-mmproj", type=Path, action="append", default=[], help="also run qvl with this")
    parser.add_argument("--peers", type=Path, help="folder of llama-server and llama-mtmd-cli")
    parser.add_argument("--their-text", type=Path, help="text file for llama.cpp's programs")
    parser.add_argument("--their-mmproj", type=Path, help="mmproj for llama.cpp's programs")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--loop-images", type=int, default=4)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    own = [args.mmproj, *args.own_mmproj]
    qvl = [Measured(f"qvl, {path.name}") for path in own]
    theirs = (args.their_text or args.text, args.their_mmproj or args.mmproj)
    files = f"{theirs[0].name}, {theirs[1].name}"
    loop = Measured(f"llama-mtmd-cli in a loop, {files}")
    peer = Measured(f"llama-server, {SLOTS} slots, {files}")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            paths = pictures(Path(folder), args.images, args.size, number)
            warm = pictures(Path(folder), 1, args.size, 1000 + number)  # first use touches every weight
            for mmproj, measured in zip(own, qvl, strict=True):
                with load(args.text, mmproj, device="cpu", threads=args.threads, optimize="prefill") as model:
                    run_qvl(model, warm, 2, args.parallel, Measured("warm-up"))
                    run_qvl(model, paths, args.tokens, args.parallel, measured)
            if args.peers:
                with server(args.peers, *theirs, args.threads) as address:
                    run_server(address, warm, 2, Measured("warm-up"))
                    run_server(address, paths, args.tokens, peer)
                if few := paths[: args.loop_images]:
                    run_loop(args.peers, *theirs, args.threads, few, args.tokens, loop)
    report([m for m in (*qvl, peer, loop) if m.rates], args)


def report(measured: list[Measured], args: argparse.Namespace) -> None:
    if args.json:
        print(
            json.dumps(
                [
                    {
                        **vars(m),
                        "prompt_tokens": sorted(m.prompt_tokens),
                        "completion_tokens": sorted(m.completion_tokens),
                    }
                    for m in measured
                ]
            )
        )
        return
    machine = describe_machine()
    print(f"{machine.cpu}, level {machine.native}, instructions {', '.join(machine.instructions)}")
    print(
        f"{args.text.name}, {args.mmproj.name}; {args.images} pictures of {args.size}x{args.size}, "
        f"{args.tokens} tokens, {args.threads} threads"
    )
    print("| program | images a minute | tokens in, out |\n| --- | ---: | --- |")
    for m in measured:
        counts = f"{sorted(m.prompt_tokens)}, {sorted(m.completion_tokens)}" if m.prompt_tokens else ""
        print(f"| {m.name} | {m.rate:.1f} | {counts} |")
    for m in measured:
        if m.stages:
            print(f"{m.name}: " + ", ".join(f"{stage} {s:.1f} s" for stage, s in m.stages.items()))


if __name__ == "__main__":
    main()
