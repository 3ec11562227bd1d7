"""Text under a schema's grammar, by llama.cpp; and the schema's own validator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import regress
from jsonschema import Draft202012Validator, ValidationError, validators

from qvl.runtime.grammar.schema import schema_to_grammar
from qvl.runtime.llama.binding import llama
from qvl.runtime.llama.sampler import Sampler, Sampling, _Candidates
from qvl.runtime.llama.vocab import Vocab

_END = -1


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """`pattern` as the standard has it: ECMA-262 with the u flag, where jsonschema takes Python's `re`."""
    if isinstance(instance, str) and regress.Regex(pattern, "u").find(instance) is None:
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


Validator = validators.extend(Draft202012Validator, {"pattern": _pattern})


def is_valid(value: Any, schema: Any) -> bool:
    return bool(Validator(schema).is_valid(value))


class GrammarText:
    """Follows a grammar byte by byte, with tokens that are one byte each."""

    def __init__(self, vocab: Vocab, schema: Any) -> None:
        self._vocab = vocab
        pieces = {vocab.piece(token): token for token in range(vocab.n_tokens)}
        self._tokens = [pieces[bytes([byte])] for byte in range(256)]
        self._end_token = min(vocab.end_tokens)
        self._sampler = Sampler(vocab, Sampling(), schema_to_grammar(schema))

    def accepts(self, text: str) -> bool:
        """True if the grammar allows the whole text, and no more after it is needed."""
        for byte in text.encode():
            if not self._sampler._allowed(self._tokens[byte]):
                return False
            llama().llama_sampler_accept(self._sampler._grammar, self._tokens[byte])
        return self._sampler._allowed(self._end_token)

    def walk(self, seed: int, most: int = 400) -> str | None:
        """A random text; None if it does not come to an end. Ends, quotes and brackets come early."""
        rng, text = random.Random(seed), bytearray()
        while len(text) < most:
            allowed = self._allowed(text)
            if _END in allowed and (len(allowed) == 1 or rng.random() < 0.5):
                return text.decode()
            closing = [b for b in b'"}]' if b in allowed]
            byte = (
                rng.choice(closing)
                if closing and rng.random() < 0.2
                else rng.choice([b for b in allowed if b != _END])
            )
            text.append(byte)
            llama().llama_sampler_accept(self._sampler._grammar, self._tokens[byte])
        return None

    def _allowed(self, text: bytearray) -> list[int]:
        """The bytes that may follow, and _END. Overlong UTF-8, which llama.cpp takes, is left out."""
        ids = [*self._tokens, self._end_token]
        candidates = _Candidates(np.zeros(len(ids), np.float32))
        candidates.data["id"] = ids
        llama().llama_sampler_apply(self._sampler._grammar, candidates.pointer)
        found = [
            byte
            for byte, logit in zip([*range(256), _END], candidates.data["logit"], strict=True)
            if np.isfinite(logit)
        ]
        least = {0xE0: 0xA0, 0xF0: 0x90}.get(text[-1] if text else 0, 0)
        return [byte for byte in found if byte == _END or byte >= least]

    def __enter__(self) -> GrammarText:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.close()
