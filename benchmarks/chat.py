"""What a conversation about a picture costs: the wait from Enter to the first token.

    python benchmarks/chat.py TEXT.gguf MMPROJ.gguf [--size 448] [--runs 3] [--json]

Three figures, medians over runs in turns, a new picture in every run:

- the first and the second question about a picture, here and with llama-cpp-python's Qwen25VLChatHandler
  on the same files;
- a question about a picture that was attached ten seconds before, against one attached with the question.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvl.runtime import load
from qvl.runtime.model import Model
from qvl.runtime.resources import default_threads

QUESTIONS = ("What is in this picture?", "And what colour is it?")
REPLY = 16  # tokens of the first reply, so that both sides carry the same history
AHEAD = 10.0

Message = dict[str, Any]
Answer = Callable[[list[Message]], Iterator[str]]


def picture(size: int, seed: int) -> bytes:
    """A PNG of coloured noise, which nobody has cached."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def conversation(answer: Answer, image: Message) -> list[float]:
    """Seconds to the first token of two questions about one picture."""
    messages: list[Message] = []
    waits = []
    for i, question in enumerate(QUESTIONS):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [image, text] if i == 0 else question})
        start = time.perf_counter()
        pieces = answer(messages)
        said = [next(pieces)]
        waits.append(time.perf_counter() - start)
        said += list(pieces)
        messages.append({"role": "assistant", "content": "".join(said)})
    return waits


def ours(model: Model) -> Answer:
    session = model.session()

    def answer(messages: list[Message]) -> Iterator[str]:
        for piece in session.generate(messages, max_tokens=REPLY, temperature=0.0):
            yield piece.raw

    return answer


def theirs(text: Path, mmproj: Path, threads: int) -> Answer:
    """llama-cpp-python's high-level API, as its documentation shows it."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Qwen25VLChatHandler

    with quiet():
        handler = Qwen25VLChatHandler(clip_model_path=str(mmproj), verbose=False)
        llama = Llama(
            str(text),
            chat_handler=handler,
            n_ctx=4096,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def answer(messages: list[Message]) -> Iterator[str]:
        with quiet():
            chunks = llama.create_chat_completion(messages, max_tokens=REPLY, temperature=0.0, stream=True)
        for chunk in chunks:
            if piece := chunk["choices"][0]["delta"].get("content"):
                yield piece

    return answer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the C libraries print is not part of the result."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def attached(model: Model, image: bytes, ahead: float) -> float:
    """Seconds from Enter to the first token, when the picture was attached so many seconds before."""
    session = model.session()
    part = {"type": "image", "image": image}
    look = threading.Thread(target=session.prefill, args=([{"role": "user", "content": [part]}],))
    if ahead:
        look.start()
        time.sleep(ahead)
    start = time.perf_counter()
    if ahead:
        look.join()
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTIONS[0]}]}]
    stream = session.generate(messages, max_tokens=1, temperature=0.0)
    next(iter(stream), None)
    wait = time.perf_counter() - start
    stream.result()
    session.close()
    return wait


def measure(text: Path, mmproj: Path, size: int, runs: int, threads: int | None) -> dict[str, list[float]]:
    """Seconds of every run, by what was measured."""
    waits: dict[str, list[float]] = defaultdict(list)
    threads = threads or default_threads()  # llama-cpp-python would take half of them
    peer = theirs(text, mmproj, threads)
    with load(text, mmproj, threads=threads) as model:
        for run in range(runs):
            for name, answer, key in (("qvl", ours(model), "image"), ("peer", peer, "url")):
                raw = picture(size, seed=2 * run + (key == "url"))
                url = {"url": f"data:image/png;base64,{base64.b64encode(raw).decode()}"}
                image = (
                    {"type": "image", "image": raw}
                    if key == "image"
                    else {"type": "image_url", "image_url": url}
                )
                first, second = conversation(answer, image)
                waits[f"{name} first"].append(first)
                waits[f"{name} second"].append(second)
            for ahead in (0.0, AHEAD):
                image_seed = 10_000 + 2 * run + bool(ahead)
                waits[f"attached {ahead:.0f} s before"].append(
                    attached(model, picture(size, image_seed), ahead)
                )
            seconds = ", ".join(f"{name} {values[-1]:.2f}" for name, values in waits.items())
            print(f"run {run + 1} of {runs}: {seconds}", file=sys.stderr, flush=True)
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("mmproj", type=Path)
    parser.add_argument("--size", type=int, default=448, help="side of the picture in pixels")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    waits = measure(args.text, args.mmproj, args.size, args.runs, args.threads)
    median = {name: statistics.median(values) for name, values in waits.items()}
    if args.json:
        print(json.dumps({"size": args.size, "seconds": waits, "medians": median}))
        return
    print(f"| {args.size} x {args.size} pixels, {args.text.name} | first | second | second / first |")
    print("| --- | --- | --- | --- |")
    for name, title in (("qvl", "qvl"), ("peer", "llama-cpp-python, Qwen25VLChatHandler")):
        first, second = median[f"{name} first"], median[f"{name} second"]
        print(f"| {title} | {first:.2f} s | {second:.2f} s | {second / first:.2f} |")
    late, early = median["attached 0 s before"], median[f"attached {AHEAD:.0f} s before"]
    print(
        f"\nFrom Enter to the first token: {late:.2f} s, and {early:.2f} s if attached {AHEAD:.0f} s before."
    )


if __name__ == "__main__":
    main()
