"""Write tests/fixtures/golden/text.npz: what transformers makes of the conversations in support/chatml.py.

    python tests/support/make_golden.py        # needs the `parity` extra

Of each conversation: the token ids, and at every position the logits of some columns with the largest and
the log of the sum of all, which is enough for the divergence on those columns and the rest as one.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.chatml import CONVERSATIONS, PLAIN, logit_columns
from support.checkpoint import Shape, Style, write_checkpoint

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "text.npz"
GREEDY = ("one image", "turns")
GREEDY_TOKENS = 64


def main() -> None:
    from support import text_reference as reference

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "tiny", Shape(), Style(chat_template="chatml"))
        golden: dict[str, NDArray[Any]] = {"weights": fingerprint(checkpoint)}
        columns = logit_columns(Shape().vocab_size)
        for name, messages in CONVERSATIONS.items():
            golden[f"tokens/{name}"] = np.array(reference.tokens(checkpoint, messages), np.int32)
            rows = reference.logits(checkpoint, messages)
            golden[f"logits/{name}"] = rows[:, columns]
            golden[f"best/{name}"] = rows.argmax(axis=1).astype(np.int32)
            golden[f"log_sum/{name}"] = np.log(np.exp(rows.astype(np.float64)).sum(axis=1))
        for name in GREEDY:
            tokens = reference.greedy(checkpoint, CONVERSATIONS[name], GREEDY_TOKENS)
            golden[f"greedy/{name}"] = np.array(tokens, np.int32)
        golden["numbered"] = np.array(
            reference.tokens(checkpoint, CONVERSATIONS["several images"], number_images=True), np.int32
        )
        for i, text in enumerate(PLAIN):
            golden[f"plain/{i}"] = np.array(reference.plain_tokens(checkpoint, text), np.int32)
    np.savez_compressed(GOLDEN, **golden)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size >> 10} kB")


def fingerprint(checkpoint: Path) -> NDArray[np.uint8]:
    """The weights that a golden file was made with."""
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes())
    return np.frombuffer(digest.digest(), np.uint8)


if __name__ == "__main__":
    main()
