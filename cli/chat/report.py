"""Cost of a reply, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qvl.cli.output import human_seconds

if TYPE_CHECKING:
    from qvl.cli.chat.conversation import Conversation


def reply_json(conversation: Conversation) -> dict[str, Any]:
    """The last reply as `--json` prints it: text, finish reason, usage, timings in seconds."""
    reply = conversation.reply
    assert reply is not None
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "model": str(conversation.model.path),
        "usage": asdict(reply.usage),
        "boxes": [conversation.box_json(box) for box in conversation.boxes],
        **({"raw": reply.raw} if reply.raw != reply.text else {}),
        **({"problems": conversation.problems} if conversation.problems else {}),
        "timings": {name: round(value, 4) for name, value in asdict(reply.timings).items()},
    }


def stats_text(conversation: Conversation) -> str:
    """The last reply's tokens, times and rates as a table."""
    reply = conversation.reply
    assert reply is not None
    usage, timings = reply.usage, reply.timings
    new = usage.prompt_tokens - usage.cached_tokens
    read = f"{new:,} read ({reply.prefill_rate:,.0f} tokens/s)" if new else "none read"
    used = usage.prompt_tokens + usage.completion_tokens
    encoded = "none encoded"
    if usage.images_encoded:
        encoded = f"{usage.images_encoded} encoded in {human_seconds(timings.encode_seconds)}"
    written = f"in {human_seconds(timings.generate_seconds)} ({reply.generate_rate:,.1f} tokens/s)"
    rows = (
        (
            "pictures",
            usage.image_tokens,
            f"tokens: {encoded}" if usage.images_encoded else "tokens: none encoded",
        ),
        ("prompt", usage.prompt_tokens, f"tokens: {usage.cached_tokens:,} cached, {read}"),
        ("reply", usage.completion_tokens, f"tokens {written}"),
        ("context", used, f"of {conversation.n_ctx:,} tokens in use"),
    )
    lines = [f"{name:<8}  {n:>6,} {rest}" for name, n, rest in rows]
    if len(usage.tokens_by_image) > 1:
        names = [path.name for path in conversation.media]
        lines[1:1] = [f"{n:>16,} {name}" for name, n in zip(names, usage.tokens_by_image, strict=True)]
    return "\n".join(lines)
