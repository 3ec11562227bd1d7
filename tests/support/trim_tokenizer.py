"""Cut a published Qwen2 tokenizer down to what the tests need.

    python tests/support/trim_tokenizer.py PUBLISHED tests/fixtures/tokenizer

Kept are the 256 bytes, the first merges of the published list, every merge that tokenizing the words of
corpus.txt takes, and all special tokens, renumbered to follow. A merge of the short list is one of the
full list, in the same order, and each one that the full list applies to a word of the corpus is kept: so
the corpus falls into the same pieces as with the published tokenizer. Needs the `regex` package.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def apply(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding applies to a word, in order."""
    pieces, applied = list(word), []
    while len(pieces) > 1:
        pairs = [(ranks.get(pair, len(ranks)), pair) for pair in pairwise(pieces)]
        rank, best = min(pairs)
        if rank == len(ranks):
            break
        applied.append(best)
        merged, i = [], 0
        while i < len(pieces):
            if tuple(pieces[i : i + 2]) == best:
                merged.append(best[0] + best[1])
                i += 2
            else:
                merged.append(pieces[i])
                i += 1
        pieces = merged
    return applied


def words(corpus: str, split: Any) -> set[str]:
    """Pieces of the corpus: whole, line by line, and each word with and without a space before it."""
    found = set(split.findall(corpus))
    for line in corpus.split("\n"):
        found.update(split.findall(line))
    bare = {word.strip() for word in found if word.strip()}
    return found | bare | {" " + word for word in bare} | {word.capitalize() for word in bare}


def trim(published: Path, out: Path, *, first: int) -> None:
    import regex

    lines = (published / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    ranks = {(a, b): i for i, (a, b) in enumerate(merges)}
    letters = byte_letters()
    corpus = unicodedata.normalize("NFC", (out / "corpus.txt").read_text(encoding="utf-8"))
    kept = set(range(first))
    for word in words(corpus, regex.compile(SPLIT)):
        kept.update(ranks[pair] for pair in apply("".join(letters[b] for b in word.encode()), ranks))

    order = [merges[i] for i in sorted(kept)]
    vocab_ids = json.loads((published / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted({*letters.values(), *(a + b for a, b in order)}, key=lambda token: vocab_ids[token])
    settings = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = [
        value for _, value in sorted(settings["added_tokens_decoder"].items(), key=lambda kv: int(kv[0]))
    ]
    settings["added_tokens_decoder"] = {str(len(tokens) + i): value for i, value in enumerate(special)}

    (out / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in order), encoding="utf-8")
    vocab = json.dumps(
        {token: i for i, token in enumerate(tokens)}, ensure_ascii=False, separators=(",", ":")
    )
    (out / "vocab.json").write_text(vocab, encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    print(f"{len(tokens)} tokens, {len(order)} merges, {len(special)} special")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "published", type=Path, help="folder with vocab.json, merges.txt, tokenizer_config.json"
    )
    parser.add_argument("out", type=Path, help="folder that holds corpus.txt")
    parser.add_argument("--first", type=int, default=2000, help="merges kept whatever the corpus says")
    args = parser.parse_args()
    trim(args.published, args.out, first=args.first)


if __name__ == "__main__":
    main()
