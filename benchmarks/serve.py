"""Measures `qvl serve`: captions a minute beside llama-server, the longest gap of a stream, memory.

    python benchmarks/serve.py --text T.gguf --mmproj M.gguf --peers "$(benchmarks/peers.sh)"
    python benchmarks/serve.py --text T.gguf --mmproj M.gguf --memory 2000

Each round both servers caption the same pictures in turn, each asked by eight clients through
`/v1/chat/completions`. Then, on qvl alone, one client streams a reply while another sends a picture: the
longest wait between two of its tokens is the gap. `--memory N` sends N requests with pictures of mixed sizes
and prints what the server has resident as it goes.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caption import SLOTS, pictures, server

PROMPT = "Describe this image."


@contextmanager
def qvl_server(text: Path, mmproj: Path, threads: int) -> Iterator[tuple[str, int]]:
    """`qvl serve`, ready; its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qvl.cli", "serve", "-q", "-m", text, "--mmproj", mmproj, "--port", port]
    command += ["-t", threads, "--parallel", SLOTS, "-c", 2048 * SLOTS, "--device", "cpu"]
    environment = {**os.environ, "XDG_CACHE_HOME": tempfile.mkdtemp()}  # no picture is known beforehand
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, env=environment) as process:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=1):
                    break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("qvl serve ended before it was ready") from None
                time.sleep(0.2)
        try:
            yield address, process.pid
        finally:
            process.terminate()
            assert process.wait(30) == 0, "qvl serve did not exit with 0 on SIGTERM"


def message(path: Path) -> dict[str, Any]:
    """A question about a picture."""
    url = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    return {"role": "user", "content": parts}


def post(address: str, body: dict[str, Any]) -> Any:
    """The open response of a chat completion."""
    data = json.dumps({"model": "any", "temperature": 0, **body}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
    return urllib.request.urlopen(request, timeout=900)


def captions_a_minute(address: str, paths: list[Path], tokens: int, clients: int) -> tuple[float, int]:
    """Rate of captions, and tokens written in all."""

    def one(path: Path) -> int:
        with post(address, {"messages": [message(path)], "max_tokens": tokens, "ignore_eos": True}) as reply:
            return int(json.load(reply)["usage"]["completion_tokens"])

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        written = sum(pool.map(one, paths))
    return 60 * len(paths) / (time.perf_counter() - started), written


def longest_gap(address: str, path: Path, tokens: int) -> tuple[float, float]:
    """Seconds between tokens of a stream while a picture is encoded beside it: longest, median."""
    times: list[float] = []
    began = threading.Event()

    def stream() -> None:
        question = {"role": "user", "content": "Count from one to a thousand."}
        with post(address, {"messages": [question], "max_tokens": tokens, "stream": True}) as reply:
            for line in reply:
                if b'"content"' in line and b'"role"' not in line:
                    times.append(time.perf_counter())
                    if len(times) == 4:
                        began.set()

    reader = threading.Thread(target=stream)
    reader.start()
    began.wait(60)
    with post(address, {"messages": [message(path)], "max_tokens": 1}) as reply:
        reply.read()
    reader.join()
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return max(gaps), statistics.median(gaps)


def memory(address: str, pid: int, n: int, clients: int) -> None:
    """Print what the server has resident while n requests come."""

    def resident() -> float:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(clients) as pool:
        for done in range(0, n, n // 10):
            sizes = [64 + 32 * (i % 9) for i in range(n // 10)]
            paths = [pictures(Path(folder), 1, size, 10_000 + done + i)[0] for i, size in enumerate(sizes)]

            def one(path: Path) -> None:
                with post(address, {"messages": [message(path)], "max_tokens": 4}) as reply:
                    reply.read()

            list(pool.map(one, paths))
            print(f"{done + len(paths)} requests: {resident():.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--mmproj", type=Path, required=True, help="of both servers")
    parser.add_argument("--own-mmproj", type=Path, action="append", default=[], help="also qvl with this")
    parser.add_argument("--peers", type=Path, help="folder of llama-server")
    parser.add_argument("--peer-option", action="append", default=[], help="for llama-server")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=int, metavar="N", help="send N requests and watch the memory")
    args = parser.parse_args()
    if args.memory:
        with qvl_server(args.text, args.mmproj, args.threads) as (address, pid):
            memory(address, pid, args.memory, args.clients)
        return
    rates: dict[str, list[float]] = {}
    gaps: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            paths = pictures(Path(folder), args.images, args.size, number)
            warm = pictures(Path(folder), 1, args.size, 1000 + number)
            for mmproj in (args.mmproj, *args.own_mmproj):
                with qvl_server(args.text, mmproj, args.threads) as (address, _):
                    captions_a_minute(address, warm, 2, 1)
                    rate, _ = captions_a_minute(address, paths, args.tokens, args.clients)
                    rates.setdefault(f"qvl serve, {mmproj.name}", []).append(rate)
                    fresh = pictures(Path(folder), 1, args.size, 2000 + number)
                    gaps.append(longest_gap(address, fresh[0], args.tokens))
            if args.peers:
                with server(args.peers, args.text, args.mmproj, args.threads, *args.peer_option) as address:
                    captions_a_minute(address, warm, 2, 1)
                    rate, _ = captions_a_minute(address, paths, args.tokens, args.clients)
                    rates.setdefault(" ".join(["llama-server", *args.peer_option]), []).append(rate)
    print(f"{args.images} pictures of {args.size}x{args.size}, {args.tokens} tokens, {args.clients} clients")
    print("| server | captions a minute |\n| --- | ---: |")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.2f} |")
    longest, usual = max(gap for gap, _ in gaps), statistics.median(gap for _, gap in gaps)
    print(f"longest gap of a stream beside an encode {longest:.2f} s, median {usual:.3f} s")


if __name__ == "__main__":
    main()
