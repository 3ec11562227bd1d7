"""What a reply cost, for people and for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl.cli.chat.conversation import size_of
from qvl.cli.output import human_seconds
from qvl.runtime.grounding.box import SCALE, Box

if TYPE_CHECKING:
    from qvl.cli.chat.conversation import Conversation


def reply_json(conversation: Conversation) -> dict[str, Any]:
    """The last reply as `--json` prints it: text, finish reason, usage, timings in seconds."""
    reply = conversation.reply
    assert reply is not None
    grounded = bool(conversation.boxes or conversation.problems)
    return {
        "text": conversation.shown,
        "finish_reason": reply.finish_reason,
        "model": str(conversation.model.path),
        "usage": asdict(reply.usage),
        "boxes": [_box_json(box, conversation.pictures) for box in conversation.boxes],
        **({"raw": reply.text} if grounded else {}),
        **({"problems": conversation.problems} if conversation.problems else {}),
        "timings": {name: round(value, 4) for name, value in asdict(reply.timings).items()},
    }


def _box_json(box: Box, pictures: Sequence[Path]) -> dict[str, Any]:
    """A box in pixels, with the picture that it is in; in thousandths if there is none."""
    if box.picture is None:
        return box.json(SCALE, SCALE)
    path = pictures[box.picture - 1]
    return {**box.json(*size_of(path)), "picture": box.picture, "image": str(path)}


def stats_text(conversation: Conversation) -> str:
    """The last reply's tokens, times and rates as a table."""
    reply = conversation.reply
    assert reply is not None
    usage, timings = reply.usage, reply.timings
    encoded = human_seconds(timings.encode_seconds)
    read = f"{human_seconds(timings.prefill_seconds)} ({reply.prefill_rate:.0f}/s)"
    written = f"{human_seconds(timings.generate_seconds)} ({reply.generate_rate:.1f}/s)"
    used = usage.prompt_tokens + usage.completion_tokens
    rows = (
        ("pictures", usage.image_tokens, f"tokens, {usage.images_encoded} encoded in {encoded}"),
        ("prompt", usage.prompt_tokens, f"tokens, {usage.cached_tokens} kept, the others read in {read}"),
        ("reply", usage.completion_tokens, f"tokens in {written}"),
        ("context", used, f"of {conversation.n_ctx} tokens in use"),
    )
    lines = [f"{name:<8}  {n:>6} {rest}" for name, n, rest in rows]
    if len(usage.tokens_by_image) > 1:
        names = [path.name for path in conversation.media]
        lines[1:1] = [f"{n:>16} {name}" for name, n in zip(names, usage.tokens_by_image, strict=True)]
    return "\n".join(lines)
