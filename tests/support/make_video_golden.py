"""Write tests/fixtures/golden/video.npz: what transformers 4.57 makes of the conversations in video_chats.py.

    python tests/support/make_video_golden.py   # transformers==4.57.6 and torch

It is the last version whose processor takes videos without torchvision, and its positions after a video that
is longer than it is wide are those of the paper. Logits are kept as in make_golden.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.chatml import logit_columns
from support.checkpoint import Shape, Style, write_checkpoint
from support.make_golden import fingerprint
from support.video_chats import VIDEO_CHATS, videos

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "video.npz"


def main() -> None:
    from support import video_reference as reference

    if not reference.IS_4:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "tiny", Shape(), Style(chat_template="chatml"))
        golden: dict[str, NDArray[Any]] = {"weights": fingerprint(checkpoint)}
        for name, messages in VIDEO_CHATS.items():
            rows = reference.logits(checkpoint, messages)
            golden[f"tokens/{name}"] = np.asarray(
                reference.inputs(checkpoint, messages)["input_ids"][0], np.int32
            )
            golden[f"positions/{name}"] = reference.positions(checkpoint, messages)
            golden[f"logits/{name}"] = rows[:, logit_columns(Shape().vocab_size)]
            golden[f"best/{name}"] = rows.argmax(axis=1).astype(np.int32)
            golden[f"log_sum/{name}"] = np.log(np.exp(rows.astype(np.float64)).sum(axis=1))
            for i, part in enumerate(videos(messages)):
                golden[f"embeddings/{name}/{i}"] = reference.embeddings(checkpoint, part["video"])
    np.savez_compressed(GOLDEN, **golden)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size >> 10} kB")


if __name__ == "__main__":
    main()
