"""Reads tokenizer files into the values of `tokenizer.ggml.*`.

Reads `tokenizer.json`, or `vocab.json` with `merges.txt`; added tokens from there, from
tokenizer_config.json and from added_tokens.json. The result is the table llama.cpp's converter would
write (conversion/base.py, `get_vocab_base`): ids without a token become unused `[PADn]`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from qvl.convert.checkpoint import read_json
from qvl.convert.hyperparameters import TextHyperparameters
from qvl.convert.tiktoken import SPECIAL_TOKENS, read_tiktoken
from qvl.runtime.errors import CheckpointError

PRE: Final = "qwen2"
# The split that pre = "qwen2" stands for (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN2).
SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


TIKTOKEN: Final = "qwen.tiktoken"
# Tokens at which llama.cpp ends a reply whatever the metadata says (llama-vocab.cpp, special_eog_ids).
LLAMA_ENDS: Final = ("<|im_end|>", "<|endoftext|>")
# Qwen-VL-Chat's form, which its code has in place of a template.
CHATML: Final = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Added tokens: id to (text, special).
Added = dict[int, tuple[str, bool]]


class TokenType(IntEnum):
    """`enum llama_token_type` (llama.h), the ones that a byte-level BPE vocabulary has."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class TokenizerVocab:
    """A byte-level BPE vocabulary.

    Attributes:
        tokens: by id; byte-level letters, as in vocab.json.
        types: by id.
        merges: "left right", best first.
        eos_token_ids: every token that ends a reply, of generation_config.json too.
        eot_token_id: one of these that llama.cpp would not end a reply at by itself.
        chat_format: of Qwen-VL's generation_config.json, "chatml" or "raw".
        notes: what a person should know.
    """

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None
    eos_token_ids: tuple[int, ...] = ()
    eot_token_id: int | None = None
    chat_format: str | None = None
    notes: tuple[str, ...] = ()


def read_vocab(folder: Path, config: TextHyperparameters, required: Sequence[str] = ()) -> TokenizerVocab:
    """The vocabulary of a checkpoint, padded to the embedding's rows.

    Args:
        required: control tokens that prompts are made of.

    Raises:
        CheckpointError: tokenizer files missing, damaged, of another kind, or larger than the embedding; a
            required
            token is missing.
    """
    settings = _optional(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        base, merges, added = _from_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        base, merges, added = read_json(folder / "vocab.json"), _read_merges(folder / "merges.txt"), {}
    elif (folder / TIKTOKEN).is_file():
        base, merges = read_tiktoken(folder / TIKTOKEN)
        added = {len(base) + i: (token, True) for i, token in enumerate(SPECIAL_TOKENS)}
    else:
        raise CheckpointError(
            f"{folder}: neither tokenizer.json nor vocab.json with merges.txt nor {TIKTOKEN}",
            hint="copy the tokenizer files of the original model into the folder",
        )
    added = {**_added_tokens(folder, settings), **added}
    added, notes = _with_rows(added, config.vocab_size)
    tokens, types = _table(folder, base, added, config.vocab_size)
    ids = {token: i for i, token in enumerate(tokens)}

    def special(kind: str, fallback: int | None) -> int | None:
        value = settings.get(f"{kind}_token")
        value = value.get("content") if isinstance(value, dict) else value
        found = ids.get(value) if isinstance(value, str) else None
        found = fallback if found is None else found
        return found if found is None or found < len(tokens) else None

    if absent := [
        token for token in required if ids.get(token) is None or types[ids[token]] is TokenType.NORMAL
    ]:
        raise CheckpointError(
            f"{folder}: the tokenizer has no {', '.join(absent)}, which prompts of this family are made of",
            hint="copy the tokenizer files of the original model into the folder",
        )
    generation = _optional(folder / "generation_config.json")
    chat_format = generation.get("chat_format")
    chat_format = chat_format if chat_format in ("chatml", "raw") else None
    end = ids.get("<|im_end|>" if chat_format == "chatml" else "<|endoftext|>")
    eos = special("eos", config.eos_token_id if config.eos_token_id is not None else end)
    stops = _stops(folder, generation, eos, ids if chat_format == "chatml" else {}, len(tokens))
    template = read_chat_template(folder, settings) or (CHATML if chat_format == "chatml" else None)
    return TokenizerVocab(
        tokens=tokens,
        types=types,
        merges=merges,
        bos_token_id=special("bos", config.bos_token_id),
        eos_token_id=eos,
        pad_token_id=special("pad", config.pad_token_id),
        chat_template=template,
        eos_token_ids=stops,
        eot_token_id=next((i for i in stops if i != eos and tokens[i] not in LLAMA_ENDS), None),
        chat_format=chat_format,
        notes=notes,
    )


def _with_rows(added: Added, size: int) -> tuple[Added, tuple[str, ...]]:
    """Added tokens that have a row in the embedding; others cannot be used."""
    beyond = {i: text for i, (text, _) in added.items() if i >= size}
    if not beyond:
        return added, ()
    names = ", ".join(repr(text) for text in list(beyond.values())[:5])
    note = (
        f"left out, since the embedding has {size} rows: {len(beyond)} added tokens from id {min(beyond)} on "
        f"({names}); resize_token_embeddings makes room for them"
    )
    return {i: token for i, token in added.items() if i < size}, (note,)


def _stops(
    folder: Path, generation: Mapping[str, Any], eos: int | None, ids: Mapping[str, int], size: int
) -> tuple[int, ...]:
    """Every token that ends a reply: the tokenizer's, those of generation_config.json, and ChatML's."""
    value = generation.get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for found in listed:
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise CheckpointError(
                f"{folder / 'generation_config.json'}: eos_token_id is {json.dumps(value)}, "
                "expected token ids"
            )
    chatml = (ids.get(token) for token in ("<|im_end|>", "<|im_start|>"))
    known = (i for i in (eos, *listed, *chatml) if i is not None and i < size)
    return tuple(dict.fromkeys(known))


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default chat template, looked for in the order transformers does: .jinja, .json, config."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for source in (_optional(folder / "chat_template.json"), settings):
        value = source.get("chat_template")
        if isinstance(value, str):
            return value
        if isinstance(value, list):  # several, by name
            named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
            if isinstance(named.get("default"), str):
                return str(named["default"])
    return None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _from_tokenizer_json(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...], Added]:
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"{path}: not a byte-level BPE tokenizer, which Qwen's models have")
    pattern = _split_pattern(data.get("pre_tokenizer"))
    if pattern is not None and pattern != SPLIT:
        raise CheckpointError(f"{path}: words are split by {pattern!r}, expected Qwen2's {SPLIT!r}")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{path}: model.vocab or model.merges is missing")
    added: Added = {}
    for item in data.get("added_tokens") or []:
        if not isinstance(item, dict) or not isinstance(item.get("id"), int):
            raise CheckpointError(f"{path}: added_tokens has {item!r}, which is no token")
        added[item["id"]] = (str(item.get("content")), bool(item.get("special")))
    # Pairs since tokenizers 0.20, strings before.
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return vocab, _joined(path, pairs), added


def _split_pattern(pre_tokenizer: object) -> str | None:
    """The regular expression of a Split pre-tokenizer, alone or in a sequence."""
    if not isinstance(pre_tokenizer, dict):
        return None
    for part in pre_tokenizer.get("pretokenizers") or [pre_tokenizer]:
        if isinstance(part, dict) and part.get("type") == "Split" and isinstance(part.get("pattern"), dict):
            return str(part["pattern"].get("Regex"))
    return None


def _read_merges(path: Path) -> tuple[str, ...]:
    """merges.txt; only a first line "#version…" is a comment, since "#" takes part in real merges."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if lines and lines[0].startswith("#version"):
        del lines[0]
    return _joined(path, (line.rstrip("\r").split(" ") for line in lines if line.strip()))


def _joined(path: Path, pairs: Iterable[object]) -> tuple[str, ...]:
    merges = []
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p for p in pair)):
            raise CheckpointError(f"{path}: merge {i + 1} is {pair!r}, expected two pieces")
        merges.append(f"{pair[0]} {pair[1]}")
    return tuple(merges)


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> Added:
    """Added tokens outside of tokenizer.json."""
    added: Added = {}
    for text, token_id in _optional(folder / "added_tokens.json").items():
        if not isinstance(token_id, int):
            raise CheckpointError(f"{folder / 'added_tokens.json'}: {text!r} has the id {token_id!r}")
        added[token_id] = (text, False)
    decoder = settings.get("added_tokens_decoder") or {}
    for token_id, value in decoder.items() if isinstance(decoder, dict) else ():
        if not str(token_id).isdecimal() or not isinstance(value, dict):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: added token {token_id!r}: {value!r}")
        added[int(token_id)] = (str(value.get("content")), bool(value.get("special")))
    return added


def _table(
    folder: Path, base: Mapping[str, Any], added: Added, size: int
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    tokens: list[str] = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    normal = ((token, i, TokenType.NORMAL) for token, i in base.items())
    extra = ((text, i, _added_type(text, special)) for i, (text, special) in added.items())
    for token, token_id, kind in (*normal, *extra):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < size:
            raise CheckpointError(
                f"{folder}: token {token!r} has the id {token_id!r}, expected less than vocab_size {size}",
                hint="tokenizer and weights do not belong together",
            )
        if kind is TokenType.NORMAL and types[token_id] is TokenType.NORMAL:
            raise CheckpointError(f"{folder}: tokens {tokens[token_id]!r} and {token!r} share id {token_id}")
        tokens[token_id], types[token_id] = token, kind
    if len(set(tokens)) != size:
        twice = Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"{folder}: token {twice!r} has two ids")
    return tuple(tokens), tuple(types)


def _added_type(text: str, special: bool) -> TokenType:
    """Type of an added token; as upstream, `<|name|>` is a control token whatever its flag says."""
    control = special or (text.startswith("<|") and text.endswith("|>"))
    return TokenType.CONTROL if control else TokenType.USER_DEFINED


def generation_defaults(folder: Path) -> dict[str, int | float]:
    """Sampling settings of generation_config.json by metadata key.

    Keys are llama.cpp's `general.sampling.*`; it has none for presence_penalty, which stands under `qvl.`.

    Raises:
        CheckpointError: the file is damaged, or a value is not a number.
    """
    path = folder / "generation_config.json"
    settings = _optional(path)
    defaults: dict[str, int | float] = {}
    for source, name, kind in (
        ("top_k", "general.sampling.top_k", int),
        ("top_p", "general.sampling.top_p", float),
        ("min_p", "general.sampling.min_p", float),
        ("temperature", "general.sampling.temp", float),
        ("repetition_penalty", "general.sampling.penalty_repeat", float),
        ("presence_penalty", "qvl.sampling.presence_penalty", float),
    ):
        value = settings.get(source)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise CheckpointError(f"{path}: {source} is {json.dumps(value)}, expected a number from 0")
        defaults[name] = kind(value)
    if settings.get("do_sample") is False:
        defaults["general.sampling.temp"] = 0.0  # greedy decoding
    return defaults
