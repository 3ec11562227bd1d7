"""Qwen's tiktoken vocabulary: a line `BASE64 RANK` for each token, without the merges that GGUF wants."""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from pathlib import Path
from typing import Final

from qvl.runtime.errors import CheckpointError

# tokenization_qwen.py's special tokens, which follow the ranks in this order.
SPECIAL_TOKENS: Final = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte (openai/gpt-2, src/encoder.py, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def read_tiktoken(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Tokens in byte letters with their ids, and merges "left right", best first.

    The merge of a token is what byte-pair encoding does last to its bytes with the ranks below its own
    (llama.cpp, conversion/qwen.py, `QwenModel.bpe`).

    Raises:
        CheckpointError: a damaged line, ranks with gaps, a token that no merge makes.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            text, count = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(count)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}:{number}: {line[:40]!r} is no token and its rank") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: {len(ranks)} tokens whose ranks do not count from 0")
    letters = byte_letters()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts(token, ranks, rank)
            if len(parts) != 2:
                raise CheckpointError(f"{path}: no merge makes the token {token!r} of rank {rank}")
            merges.append(" ".join("".join(letters[b] for b in part) for part in parts))
    return {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}, tuple(merges)


def _parts(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """A token's bytes after byte-pair encoding with the ranks below one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = below, -1
        for i, (left, right) in enumerate(pairwise(parts)):
            if (rank := ranks.get(left + right, below)) < best:
                best, at = rank, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
