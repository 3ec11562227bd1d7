"""A mutation fuzzer: `python -m fuzz [--cases N] [--first N] [KIND…]`, in tests/.

Cases of a kind run in a child that reports each by a line; when it dies, hangs or is out of memory, the case
it was at is a finding, and another child goes on behind it. A case is its number:
`--first 123 --cases 1 KIND` repeats it.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

SECONDS: Final = 60  # wall time of a case, on a machine that others use too
CPU_SECONDS: Final = 20
MEMORY: Final = 3 << 30
LISTED: Final = 20
REFUSED: Final = "refused"
FINE: Final = ("ok", REFUSED)


def child(kind_name: str, first: int, last: int, work: Path) -> None:
    """Run cases and print `NUMBER VERDICT` for each."""
    from fuzz.kinds import KINDS
    from qvl.runtime.errors import ContextFullError, QvlError

    kind = KINDS[kind_name]
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a debugger's, for each failed assertion
    limit()
    for number in range(first, last):
        rng = Random(f"{kind_name} {number}")
        path = kind.make(work, rng)
        started = time.process_time()
        try:
            kind.use(path)
            verdict = "ok"
        except QvlError as error:
            verdict = REFUSED
            if kind.named and path.name not in str(error) and not isinstance(error, ContextFullError):
                verdict = f"unnamed file: {type(error).__name__}: {error}"
        except MemoryError:
            verdict = "out of memory"
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            verdict = f"traceback: {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
        if (spent := time.process_time() - started) > CPU_SECONDS:
            verdict = f"slow: {spent:.0f} s"
        print(number, " ".join(ascii(verdict)[1:-1].split())[:400], flush=True)


def limit() -> None:
    """Bound this process's memory, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(kind: str, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Each case's number and verdict."""
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing waits for a disk there
    with tempfile.TemporaryDirectory(prefix=f"qvl-fuzz-{kind}-", dir=in_memory) as folder:
        while first < last:
            command = [sys.executable, "-m", "fuzz", "--child", folder, "--first", str(first)]
            command += ["--cases", str(last - first), kind]
            with tempfile.TemporaryFile() as said:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=Path(__file__).parent.parent
                )
                done = yield from _lines(process, first)
                first = done
                if first < last:
                    said.seek(0)
                    text = said.read().decode("utf-8", "replace")
                    asserted = [line for line in text.splitlines() if "ASSERT" in line or "terminate" in line]
                    words = (asserted[0] if asserted else text[-300:]).split()
                    code = process.returncode
                    yield first, ("hang" if code is None else f"ended with {code}: {' '.join(words)}")
                    first += 1


def _lines(process: subprocess.Popen[str], first: int) -> Iterator[tuple[int, str]]:
    """What a child reports until it ends or hangs; returns the number it did not report."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    waited = 0  # in steps, not by the clock: with this process its child may have been stopped too
    while waited < SECONDS:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            waited += 1
            continue
        waited = 0
        if line is None:
            break
        number, _, verdict = line.partition(" ")
        if number.isdigit():
            first = int(number) + 1
            yield int(number), verdict.strip()
    process.kill()
    process.wait()
    reader.join()
    if process.stdout is not None:
        process.stdout.close()
    if waited >= SECONDS:
        process.returncode = None  # type: ignore[assignment]
    return first  # type: ignore[return-value]


def main() -> int:
    """Fuzz, list what was found, and return 1 if that is anything."""
    parser = argparse.ArgumentParser(description="Mutated inputs of every kind.")
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all kinds together")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    last = given.first + given.cases
    if given.child is not None:
        child(given.kinds[0], given.first, last, given.child)
        return 0
    from fuzz.kinds import KINDS

    until = time.monotonic() + given.seconds
    n_found = 0
    for kind in given.kinds or KINDS:
        n, found, accepted = 0, Counter[str](), 0
        for number, verdict in run(kind, given.first, last):
            n += 1
            if n % 2000 == 0:
                print(f"{kind}: {n} …", file=sys.stderr, flush=True)
            accepted += verdict == "ok"
            if verdict not in FINE:
                found[verdict] += 1
                if sum(found.values()) <= LISTED:
                    print(f"  {kind} {number}: {verdict}", flush=True)
            if time.monotonic() > until:
                break
        n_found += sum(found.values())
        print(f"{kind}: {n} cases, {accepted} accepted, {sum(found.values())} findings", flush=True)
    return 1 if n_found else 0


if __name__ == "__main__":
    sys.exit(main())
