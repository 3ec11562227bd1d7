"""Replies of one session, turn after turn; run as a program, it writes the file that tests compare with.

The file was recorded with the engine that had one conversation and no slots.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.chatml import image, system, text, user
from support.checkpoint import Shape, Style, write_checkpoint
from support.sessions import FakeBackend, new_session

from qvl.runtime.llama.model import LlamaModel

FILE = Path(__file__).parents[1] / "fixtures" / "golden" / "session.json"
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0}
SEEDED = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "repeat_penalty": 1.1, "seed": 11}
TURNS: list[list[Any]] = [
    [image(140, 196), text("What is this?")],
    [text("And now?")],
    [image(84, 84, 1), text("Compare it with "), image(56, 112, 2), text(" please.")],
    ["word " * 90],
]


def replies(model: LlamaModel) -> dict[str, list[dict[str, Any]]]:
    """Tokens and costs of each turn, greedy and seeded."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, sampling in (("greedy", GREEDY), ("seeded", SEEDED)):
        session = new_session(model, FakeBackend(model.hparams.n_embd))
        messages: list[Any] = [system("Short.")]
        found[name] = []
        for turn in TURNS:
            messages.append(user(*turn))
            reply = session.generate(messages, max_tokens=20, **sampling).result()  # type: ignore[arg-type]
            usage = reply.usage
            found[name].append(
                {
                    "tokens": list(reply.tokens),
                    "prompt": usage.prompt_tokens,
                    "cached": usage.cached_tokens,
                    "encoded": usage.images_encoded,
                }
            )
            messages.append(reply.message)
        session.close()
    return found


def main() -> None:
    """`python -m support.session_golden`, in `tests/`."""
    from qvl.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "tiny", Shape(), Style(chat_template="chatml"))
        pair = convert(checkpoint, Path(folder), "f32", "f32")
        with LlamaModel(pair.text, device="cpu") as model:
            lines = [f' "{name}": {json.dumps(turns)}' for name, turns in replies(model).items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
