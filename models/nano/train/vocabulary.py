"""A trimmed Qwen vocabulary: the closure of the merges that the corpus needs, ids renumbered.

Byte-pair encoding applies the lowest-ranked merge that is available. A vocabulary that keeps, in rank order,
every merge that was applied while encoding the corpus, encodes that corpus exactly as the full one does.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

# Qwen2's pre-tokenizer, as its tokenizer.json has it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    spare = (b for b in range(256) if b not in table)
    table.update({b: chr(256 + n) for n, b in enumerate(spare)})
    return table


def applied_merges(word: str, ranks: dict[tuple[str, str], int]) -> tuple[list[str], list[tuple[str, str]]]:
    """Encode one pre-token (already in the byte alphabet); return its pieces and the merges applied."""
    pieces, used = list(word), []
    while len(pieces) > 1:
        pair = min(pairwise(pieces), key=lambda p: ranks.get(p, 1 << 60))
        if pair not in ranks:
            break
        used.append(pair)
        merged, i = [], 0
        while i < len(pieces):
            if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair:
                merged.append(pieces[i] + pieces[i + 1])
                i += 2
            else:
                merged.append(pieces[i])
                i += 1
        pieces = merged
    return pieces, used


def trim(
    source: Path, texts: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, dict[str, Any]]]:
    """(vocab, merges, added tokens by id): the trimmed vocabulary of the tokenizer files in `source`."""
    lines = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    merges = [(first, second) for first, second in pairs]
    ranks = {pair: n for n, pair in enumerate(merges)}
    full = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    letters = byte_alphabet()
    keep_merges: set[tuple[str, str]] = set()
    keep = set(letters.values())
    for text in texts:
        for match in regex.findall(PATTERN, text):
            word = "".join(letters[b] for b in match.encode())
            _, used = applied_merges(word, ranks)
            keep_merges.update(used)
    keep |= {a + b for a, b in keep_merges}
    vocab = {token: n for n, token in enumerate(sorted(keep, key=full.__getitem__))}
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {
        len(vocab) + n: entry
        for n, (_, entry) in enumerate(
            sorted(config["added_tokens_decoder"].items(), key=lambda kv: int(kv[0]))
        )
    }
    return vocab, sorted(keep_merges, key=ranks.__getitem__), added


def write_files(source: Path, out: Path, texts: list[str]) -> int:
    """Write the tokenizer's files (vocab, merges, config, chat template); return the vocabulary size."""
    vocab, merges, added = trim(source, texts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (out / "merges.txt").write_text(text, encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {str(k): v for k, v in added.items()}
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    (out / "chat_template.json").write_bytes((source / "chat_template.json").read_bytes())
    return len(vocab) + len(added)


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with vocab.json, merges.txt and tokenizer_config.json (full or trimmed)."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    merges = [(first, second) for first, _, second in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    entries = sorted(config["added_tokens_decoder"].items(), key=lambda kv: int(kv[0]))
    tokenizer.add_special_tokens(
        [AddedToken(e["content"], special=True, normalized=False) for _, e in entries]
    )
    return tokenizer
