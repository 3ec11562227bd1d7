"""Memory while pictures are decoded: threads share a budget of pixels, and wait in order."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from qvl.runtime.vision.turns import Budget, Turn

PEAK = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from qvl.runtime.caption.prepare import return_large_blocks
from qvl.runtime.vision.image import with_picture
from qvl.runtime.vision.preprocess import Preprocessor

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

return_large_blocks()
resize = Preprocessor(max_pixels=28 * 28 * 16).resize
with_picture(sys.argv[1], resize)
alone = peak()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda path: with_picture(path, resize), sys.argv[1:]))
print(alone, peak())
"""


def write_deep_png(path: Path, side: int) -> None:
    """A black picture of 16 bits a channel: a few kilobytes however large."""
    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + 6 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_four_large_pictures_take_hardly_more_than_one(tmp_path: Path) -> None:
    side = 5000
    write_deep_png(tmp_path / "a.png", side)
    command = [sys.executable, "-c", PEAK, *[str(tmp_path / "a.png")] * 4]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    alone, together = map(int, re.findall(r"\d+", done.stdout))
    assert alone < 100_000 + 12 * side**2 / 1024  # kB: Python and its libraries; RGB, source and bands
    assert together < 1.3 * alone


def test_pixels_in_use_stay_within_the_budget() -> None:
    budget, lock = Budget(100), threading.Lock()
    held, most, alone = 0, 0, []

    def use(n: int) -> None:
        nonlocal held, most
        for _ in range(50):
            with Turn(budget) as turn:
                turn.wait(n)
                turn.wait(n)  # counts once
                with lock:
                    held += n
                    most = max(most, held if n <= 100 else 0)
                    if n > 100:
                        alone.append(held == n)
                with lock:
                    held -= n

    threads = [threading.Thread(target=use, args=(n,)) for n in (10, 40, 60, 100, 250)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 100
    assert len(alone) == 50 and all(alone)


def test_who_asks_first_is_served_first_and_who_gives_up_is_forgotten() -> None:
    budget, served = Budget(10), []
    budget.take(8)

    def ask(n: int) -> None:
        budget.take(n)
        served.append(n)

    large = threading.Thread(target=ask, args=(10,))
    large.start()
    while len(budget._queue) < 1:
        pass
    small = threading.Thread(target=ask, args=(1,))  # would fit now, and stays behind the large one
    small.start()
    while len(budget._queue) < 2:
        pass
    assert served == []
    budget.give_back(8)
    large.join()
    budget.give_back(10)
    small.join()
    assert served == [10, 1]

    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*_: object) -> bool:
            raise KeyboardInterrupt

        patch.setattr(budget._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), Turn(budget) as turn:
            turn.wait(10)
    budget.take(9)  # nobody is before it, and 1 is held
