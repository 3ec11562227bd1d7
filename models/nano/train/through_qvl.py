"""Answers of GGUF files through `qvl` itself: the table that counts."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qvl.models.nano.train.evaluate import Item


def content(item: Item, question: str) -> list[dict[str, Any]]:
    if item.kind == "video":
        media: list[dict[str, Any]] = [{"type": "video", "video": list(item.pictures)}]
    else:
        media = [{"type": "image", "image": picture} for picture in item.pictures]
    return [*media, {"type": "text", "text": question}]


class Answerer:
    """A context manager; called with an item, it holds the whole conversation and returns every reply."""

    def __init__(self, model: Path, threads: int | None = None) -> None:
        from qvl.runtime import load

        self.model = load(model, device="cpu", n_ctx=1024, threads=threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close = getattr(self.model, "close", None)
        if close:
            close()

    def __call__(self, item: Item) -> list[str]:
        messages: list[dict[str, Any]] = []
        replies = []
        for n, (question, _) in enumerate(item.turns):
            messages.append({"role": "user", "content": content(item, question) if n == 0 else question})
            replies.append(self.model.generate(messages, max_tokens=120, temperature=0).result().raw)
            messages.append({"role": "assistant", "content": replies[-1]})
        return replies
