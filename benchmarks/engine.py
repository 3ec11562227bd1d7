"""Engine: captions a minute, wait for a first token, prefill and generation rates.

    python benchmarks/engine.py [-m MODEL] [--checkout DIR]… [--rounds 3] [--large] [--json]

Each round starts the Python of every checkout (`DIR/.venv`, by default this one alone) one after the other,
so that a slow moment of the machine meets all of them. A round takes some ten seconds with the embedded
model, a minute with a 2B (`--large`: less work). Figures are medians over rounds.

- captions: pictures of noise, greedy, several at a time as `qvl caption` chooses;
- first token: a new picture and a question in a conversation;
- prefill: a long text; generate: short replies to text, one at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvl.runtime import load
from qvl.runtime.caption.api import caption
from qvl.runtime.engine.session import Session

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}


@dataclass(frozen=True)
class Work:
    """Amounts of work of one round.

    Attributes:
        pictures, side: to caption, with sides of so many pixels.
        words: of the text that is prefilled.
        replies, tokens: texts to reply to, and the longest reply.
        asked: pictures whose first token is timed.
    """

    pictures: int
    side: int
    words: int
    replies: int
    tokens: int
    asked: int


SMALL = Work(pictures=64, side=224, words=1500, replies=24, tokens=48, asked=8)
LARGE = Work(pictures=6, side=224, words=250, replies=2, tokens=24, asked=2)


def measure(model: str | None, work: Work) -> dict[str, float]:
    """One round in this process: captions a minute, seconds to a first token, tokens a second."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, load(model, optimize="prefill", device="cpu") as loaded:
        paths = [_noise(Path(folder) / f"{i:03}.png", work.side, i) for i in range(work.pictures + 1)]
        list(caption(loaded, paths[:1], max_tokens=4))
        start = time.perf_counter()
        records = list(caption(loaded, paths[1:], max_tokens=24, **GREEDY))
        found["captions"] = 60 * len(records) / (time.perf_counter() - start)
        found["caption_tokens"] = sum(record.completion_tokens for record in records)
    with load(model, device="cpu") as loaded:
        session = loaded.session()
        found["prefill"] = _prefill_rate(session, work)
        found["generate"] = _generate_rate(session, work)
        found["first_token"] = _first_token(session, work)
    return found


def _noise(path: Path, side: int, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def _prefill_rate(session: Session, work: Work) -> float:
    rates = []
    for word in ("warm ", "some ", "more "):
        messages = [{"role": "user", "content": word * work.words}]
        rates.append(session.generate(messages, max_tokens=1, **GREEDY).result().prefill_rate)
    return statistics.median(rates[1:])


def _generate_rate(session: Session, work: Work) -> float:
    tokens, seconds = 0, 0.0
    for i in range(work.replies):
        messages = [{"role": "user", "content": f"Tell me about the number {i}."}]
        reply = session.generate(messages, max_tokens=work.tokens, **GREEDY).result()
        tokens += reply.usage.completion_tokens
        seconds += reply.timings.generate_seconds
    return tokens / seconds


def _first_token(session: Session, work: Work) -> float:
    seconds = []
    for i in range(work.asked + 1):
        picture = np.random.default_rng(1000 + i).integers(0, 256, (work.side, work.side, 3), np.uint8)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
        start = time.perf_counter()
        next(session.generate([{"role": "user", "content": content}], max_tokens=2, **GREEDY))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


UNITS = {
    "captions": "captions/min",
    "caption_tokens": "tokens of them",
    "first_token": "s to first token",
    "prefill": "prefill tokens/s",
    "generate": "generated tokens/s",
}


def main() -> None:
    """Run the rounds and print a table in Markdown, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("--checkout", type=Path, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure(args.model, LARGE if args.large else SMALL)))
        return
    pythons = {str(d): str(d / ".venv" / "bin" / "python") for d in args.checkout or ()}
    pythons = pythons or {"this checkout": sys.executable}
    options = [*(("-m", args.model) if args.model else ()), *(("--large",) if args.large else ())]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for _ in range(args.rounds):
        for name, python in pythons.items():
            once = [python, __file__, "--once", *options]
            done = subprocess.run(once, stdout=subprocess.PIPE, text=True, check=True)
            rounds[name].append(json.loads(done.stdout))
    if args.json:
        print(json.dumps(rounds, indent=1))
        return
    print(f"| checkout | {' | '.join(UNITS.values())} |")
    print(f"| --- | {' | '.join('---:' for _ in UNITS)} |")
    for name, found in rounds.items():
        medians = (statistics.median(one[key] for one in found) for key in UNITS)
        print(f"| {name} | {' | '.join(f'{median:.4g}' for median in medians)} |")


if __name__ == "__main__":
    main()
