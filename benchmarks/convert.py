"""Conversion against llama.cpp's converter and llama-quantize: time, memory, temporary bytes.

    python benchmarks/convert.py --checkpoint FOLDER --peers "$(benchmarks/peers.sh)" --source FOLDER

FOLDER is a BF16 checkpoint of Qwen2-VL (for the published figures one of random weights in the 2B's
shape), --source an unpacked llama-cpp-python, for its convert_hf_to_gguf.py, which needs torch and
transformers (the extra qvl[parity]) and sentencepiece. Both sides make a Q4_K_M text file and a Q8_0
mmproj, in turns, with the source's pages in the cache. Writes convert.json, and from it a section of
README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qvl.runtime.ggml.library import directory
from qvl.runtime.measure.machine import describe_machine

HERE = Path(__file__).resolve().parent
GOAL_TIME, GOAL_MEMORY = 0.6, 1e9
BEGIN, END = "<!-- convert: begin -->", "<!-- convert: end -->"


@dataclass(frozen=True)
class Run:
    """One side's work: seconds by the clock and of the processor, and bytes.

    Attributes:
        memory: largest resident set of any of its processes.
        anonymous: largest part of it that is not a mapped file.
        temporary: bytes on disk that are not the result.
    """

    seconds: float
    cpu_seconds: float
    memory: int
    anonymous: int
    temporary: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files, which take 8 GB for the 2B")
    args = parser.parse_args()
    for shard in args.checkpoint.glob("*.safetensors"):
        with shard.open("rb") as file:
            while file.read(1 << 24):
                pass  # into the cache
    runs: dict[str, list[Run]] = {"qvl": [], "llama.cpp": []}
    for _ in range(args.rounds):
        for name, side in (("qvl", ours), ("llama.cpp", theirs)):
            with tempfile.TemporaryDirectory(prefix="qvl-convert-", dir=args.folder) as folder:
                runs[name].append(side(args, Path(folder)))
            print(name, runs[name][-1], flush=True)
    results = {
        "machine": asdict(describe_machine()),
        "date": datetime.date.today().isoformat(),
        "checkpoint_bytes": sum(p.stat().st_size for p in args.checkpoint.glob("*.safetensors")),
        "runs": {name: [asdict(run) for run in made] for name, made in runs.items()},
    }
    (HERE / "convert.json").write_text(json.dumps(results, indent=1) + "\n")
    write_section(HERE / "README.md", report(results, runs))


def ours(args: argparse.Namespace, folder: Path) -> Run:
    return watch(
        [[sys.executable, "-m", "qvl.cli", "convert", args.checkpoint, "-o", folder, "-q"]], folder, ()
    )


def theirs(args: argparse.Namespace, folder: Path) -> Run:
    converter = args.source / "vendor/llama.cpp/convert_hf_to_gguf.py"
    whole, mmproj = folder / "whole.gguf", folder / "mmproj.gguf"
    convert = [sys.executable, converter, args.checkpoint, "--outfile"]
    return watch(
        [
            [*convert, whole, "--outtype", "bf16"],
            [args.peers / "llama-quantize", whole, folder / "text.gguf", "Q4_K_M"],
            [*convert, mmproj, "--outtype", "q8_0", "--mmproj"],
        ],
        folder,
        (whole,),
    )


def watch(commands: Sequence[Sequence[object]], folder: Path, temporary: Sequence[Path]) -> Run:
    """Run commands one after the other."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory())}
    before = time.monotonic()
    cpu = 0.0
    memory = anonymous = 0
    for command in commands:
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)
        peak = _Anonymous(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{command[0]} failed:\n{(folder / 'log').read_text()[-2000:]}")
        cpu += usage.ru_utime + usage.ru_stime
        memory, anonymous = max(memory, usage.ru_maxrss * 1024), max(anonymous, peak.stop())
    seconds = time.monotonic() - before
    return Run(seconds, cpu, memory, anonymous, sum(p.stat().st_size for p in temporary))


class _Anonymous:
    """Watches a process' memory without the files that it maps."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self._peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            try:
                lines = dict(
                    line.split(":", 1) for line in self._path.read_text().splitlines() if ":" in line
                )
            except OSError:
                return
            if "RssAnon" in lines:
                self._peak = max(self._peak, int(lines["RssAnon"].split()[0]) * 1024)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak


def write_section(page: Path, section: str) -> None:
    """Put the section between its markers, or at the end of a page that has none."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        before, rest = text + "\n", END
    page.write_text(f"{before}{BEGIN}\n{section}{END}{rest.partition(END)[2] or chr(10)}", encoding="utf-8")


def report(results: dict[str, object], runs: dict[str, list[Run]]) -> str:
    """The section."""
    machine = results["machine"]
    assert isinstance(machine, dict)
    ratios = {
        what: statistics.median(
            getattr(a, what) / getattr(b, what) for a, b in zip(runs["qvl"], runs["llama.cpp"], strict=True)
        )
        for what in ("seconds", "cpu_seconds")
    }
    lines = [
        "## Conversion", "",
        f"Written by `python benchmarks/convert.py`: a BF16 checkpoint of "
        f"{_gb(results['checkpoint_bytes'])} to Q4_K_M with a Q8_0 mmproj, against convert_hf_to_gguf.py and "
        "llama-quantize, in turns.", "",
        f"{results['date']}, {machine['cpu']}, {machine['cores']} cores; medians of {len(runs['qvl'])}.", "",
        "| | seconds | CPU seconds | peak memory | without mapped files | temporary bytes |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, made in runs.items():
        middle = {k: statistics.median(asdict(run)[k] for run in made) for k in asdict(made[0])}
        lines.append(
            f"| {name} | {middle['seconds']:.1f} | {middle['cpu_seconds']:.1f} | {_gb(middle['memory'])} | "
            f"{_gb(middle['anonymous'])} | {_gb(middle['temporary'])} |"
        )
    memory = max(run.memory for run in runs["qvl"])
    lines += [
        "",
        f"qvl takes {ratios['seconds']:.2f} of their time (aim: {GOAL_TIME}), {ratios['cpu_seconds']:.2f} of "
        f"their CPU time, and {_gb(memory)} of memory at most (aim: {_gb(GOAL_MEMORY)}).",
    ]
    return "\n".join(lines) + "\n"


def _gb(n: object) -> str:
    return f"{float(str(n)) / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
