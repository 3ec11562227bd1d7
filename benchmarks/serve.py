"""Measures `qvl serve`: captions a minute beside llama-server, gaps in a stream, memory.

    python benchmarks/serve.py --text T.gguf --mmproj M.gguf --peers "$(benchmarks/peers.sh)"
    python benchmarks/serve.py --text T.gguf --mmproj M.gguf --gap
    python benchmarks/serve.py --text T.gguf --mmproj M.gguf --memory 2000

Each round the servers caption the same pictures in turn, each asked by eight clients through
`/v1/chat/completions`. Prompts and replies have the same tokens on both sides: llama-server is given the
ChatML template, and no reply ends early.

`--gap` streams a reply on qvl while another client's picture is encoded and read, and prints the seconds
between tokens, and what the stream costs the picture. QVL_NATIVE=avx2 and `--threads 1` make a fast machine
a slow one. `--memory N` sends N requests with pictures of mixed sizes and prints the resident memory.
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
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caption import SLOTS, pictures, server

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
PROMPT = "Describe this image."
CHATML = ("--chat-template", "chatml")  # a base model's own template leaves pictures out in llama-server


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


def about(path: Path) -> list[dict[str, Any]]:
    """A conversation that asks about a picture."""
    url = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    return [SYSTEM, {"role": "user", "content": parts}]


def post(address: str, body: dict[str, Any]) -> Any:
    """The open response of a chat completion.

    Raises:
        RuntimeError: the server refused it, with what it said.
    """
    data = json.dumps({"model": "any", "temperature": 0, "ignore_eos": True, **body}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
    try:
        return urllib.request.urlopen(request, timeout=900)
    except urllib.error.HTTPError as e:
        raise RuntimeError(f"{e.code}: {e.read().decode(errors='replace')}") from e


@dataclass
class Captions:
    """Rounds of one server.

    Attributes:
        rates: captions a minute, one a round.
        tokens: (prompt, completion) of each reply, as the server counts them.
    """

    rates: list[float] = field(default_factory=list)
    tokens: set[tuple[int, int]] = field(default_factory=set)

    def run(self, address: str, paths: list[Path], warm: list[Path], tokens: int, clients: int) -> None:
        """Caption one picture to warm up, then all by several clients, and note the rate."""

        def one(path: Path, most: int = tokens) -> tuple[int, int]:
            with post(address, {"messages": about(path), "max_tokens": most}) as reply:
                usage = json.load(reply)["usage"]
            return usage["prompt_tokens"], usage["completion_tokens"]

        one(warm[0], 2)
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            self.tokens.update(pool.map(one, paths))
        self.rates.append(60 * len(paths) / (time.perf_counter() - started))


@dataclass
class Gaps:
    """Seconds between the tokens of a stream beside pictures, and the pictures' own seconds.

    Attributes:
        encode, read: gaps while a picture was encoded, and while its embeddings were read.
        alone, beside: (whole, encode, prefill) seconds of a picture without a stream, and with one.
    """

    encode: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    alone: list[tuple[float, float, float]] = field(default_factory=list)
    beside: list[tuple[float, float, float]] = field(default_factory=list)

    def run(self, address: str, paths: list[Path], tokens: int) -> None:
        """Ask about a picture alone, then about each of the others beside a stream."""
        ask(address, paths[0])  # first use touches every weight
        self.alone.append(ask(address, paths[1])[0])
        for path in paths[2:]:
            times: list[float] = []
            began, over = threading.Event(), threading.Event()
            reader = threading.Thread(target=stream, args=(address, tokens, times, began, over))
            reader.start()
            began.wait(60)
            cost, started, encoded, ended = ask(address, path)
            self.beside.append(cost)
            over.set()
            reader.join()
            if times[-1] < ended:
                print(f"the stream ended {ended - times[-1]:.1f} s too early", file=sys.stderr)
            for before, after in itertools.pairwise(times):
                if started < after and before < ended:
                    (self.encode if before < encoded else self.read).append(after - before)

    def report(self) -> None:
        """Print it."""
        print("| seconds between tokens while a picture is | longest | p99 | median |")
        print("| --- | ---: | ---: | ---: |")
        for name, gaps in (("encoded", self.encode), ("read", self.read)):
            found = (max(gaps), statistics.quantiles(gaps, n=100)[98], statistics.median(gaps))
            print(f"| {name} ({len(gaps)} tokens) | " + " | ".join(f"{s:.2f}" for s in found) + " |")
        for name, costs in (("alone", self.alone), ("beside a stream", self.beside)):
            whole, encode, read = (statistics.median(part) for part in zip(*costs, strict=True))
            print(f"a picture {name}: {whole:.2f} s, of it encode {encode:.2f}, prefill {read:.2f}")


def events(reply: Any) -> Iterator[dict[str, Any]]:
    """The chunks of a stream."""
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def ask(address: str, path: Path) -> tuple[tuple[float, float, float], float, float, float]:
    """One token about a picture: its seconds, and when it was sent, encoded and answered."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
    started = time.perf_counter()
    encoded, timings = started, {}
    with post(address, {"messages": about(path), "max_tokens": 1, **options}) as reply:
        for chunk in events(reply):
            if chunk.get("progress", {}).get("stage") == "encode":
                encoded = time.perf_counter()
            timings = chunk.get("timings", timings)
    ended = time.perf_counter()
    cost = (ended - started, timings["encode_ms"] / 1000, timings["prompt_ms"] / 1000)
    return cost, started, encoded, ended


def stream(address: str, tokens: int, times: list[float], began: Any, over: Any) -> None:
    """Note when each piece of a reply comes, until `over` is set."""
    question = {"role": "user", "content": "Count from one to a thousand."}
    with post(address, {"messages": [SYSTEM, question], "max_tokens": tokens, "stream": True}) as reply:
        for chunk in events(reply):
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                times.append(time.perf_counter())
                if len(times) == 4:
                    began.set()
                if over.is_set():
                    return


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
                with post(address, {"messages": about(path), "max_tokens": 4}) as reply:
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
    parser.add_argument("--only-peers", action="store_true", help="leave qvl out, for runs of bounded time")
    parser.add_argument("--peer-option", action="append", default=[], help="for llama-server")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gap", action="store_true", help="measure gaps in a stream, one a round")
    parser.add_argument("--memory", type=int, metavar="N", help="send N requests and watch the memory")
    args = parser.parse_args()
    if args.memory:
        with qvl_server(args.text, args.mmproj, args.threads) as (address, pid):
            memory(address, pid, args.memory, args.clients)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.gap:
            gaps = Gaps()
            with qvl_server(args.text, args.mmproj, args.threads) as (address, _):
                gaps.run(address, pictures(Path(folder), 2 + args.rounds, args.size, 3000), 1000)
            gaps.report()
            return
        found: dict[str, Captions] = {}
        for number in range(args.rounds):
            paths = pictures(Path(folder), args.images, args.size, number)
            warm = pictures(Path(folder), 1, args.size, 1000 + number)
            for mmproj in () if args.only_peers else (args.mmproj, *args.own_mmproj):
                captions = found.setdefault(f"qvl serve, {mmproj.name}", Captions())
                with qvl_server(args.text, mmproj, args.threads) as (address, _):
                    captions.run(address, paths, warm, args.tokens, args.clients)
            if args.peers:
                options = (*CHATML, *args.peer_option)
                captions = found.setdefault(" ".join(["llama-server", *args.peer_option]), Captions())
                with server(args.peers, args.text, args.mmproj, args.threads, *options) as address:
                    captions.run(address, paths, warm, args.tokens, args.clients)
    print(f"{args.images} pictures of {args.size}x{args.size}, {args.tokens} tokens, {args.clients} clients")
    print("| server | captions a minute | tokens in, out |\n| --- | ---: | --- |")
    for name, captions in found.items():
        print(f"| {name} | {statistics.median(captions.rates):.2f} | {sorted(captions.tokens)} |")


if __name__ == "__main__":
    main()
