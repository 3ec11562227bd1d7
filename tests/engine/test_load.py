"""One model in many threads: replies as if each had been made alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.chatml import image, text, user

from qvl.convert import Converted
from qvl.runtime import Model, caption, load

N = 20


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Iterator[Model]:
    with load(
        tiny_model.text, tiny_model.mmproj, device="cpu", n_ctx=4096, kv_type="f32", threads=1
    ) as opened:
        yield opened


def question(i: int) -> list[dict[str, Any]]:
    pictures = [image(56 + 28 * (k % 3), 84, 10 * i + k) for k in range(4 if i % 2 else 0)]
    return [user(*pictures, text(f"What about number {i}?"))]


def reply(model: Model, i: int) -> tuple[int, ...]:
    return model.generate(question(i), max_tokens=16, temperature=1.1, top_k=50, seed=i).result().tokens


def test_twenty_threads_generate(model: Model) -> None:
    """Half of them with four pictures each."""
    with ThreadPoolExecutor(N) as pool:
        together = list(pool.map(lambda i: reply(model, i), range(N)))
    session = model.session()
    alone = [
        session.generate(question(i), max_tokens=16, temperature=1.1, top_k=50, seed=i).result().tokens
        for i in range(N)
    ]
    assert together == alone and all(together)


def test_everything_at_once(model: Model, tmp_path: Path) -> None:
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (56, 84, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    picture = np.random.default_rng(7).integers(0, 256, (112, 84, 3), np.uint8)

    def captions(i: int) -> list[str | None]:
        records = caption(model, tmp_path, max_tokens=6, parallel=2, temperature=0.0)
        return [record.caption for record in sorted(records, key=lambda record: record.path)]

    work: list[Callable[[int], Any]] = [
        lambda i: reply(model, i),
        lambda i: model.logits(question(1)).argmax(axis=1).tolist(),
        lambda i: model.vision.encode([picture])[0].embeddings.tobytes(),
        captions,
    ]
    expected = [make(i) for i, make in enumerate(work)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: work[n % 4](n % 4), range(8)))
    assert found == expected * 2
