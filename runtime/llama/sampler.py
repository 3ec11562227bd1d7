"""Choosing the next token: llama.cpp's sampler chain, and grammars."""

from __future__ import annotations

import ctypes
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final

import numpy as np

from qvl.runtime.errors import InputError, check_number, check_text, check_whole
from qvl.runtime.llama.binding import complaints, llama
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.vocab import Vocab

_TOKEN_DATA: Final = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # struct llama_token_data
_RANDOM_SEED: Final = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED
# Unicode 15.0, table 3-7: bytes that are in no character, and second bytes that make an overlong form, half a
# surrogate pair or a character beyond the last. llama.cpp's grammars decode and take all of them.
_MALFORMED: Final = re.compile(
    rb"[\xc0\xc1\xf5-\xff]|\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]"
)
# Settings of generation_config.json, under the keys of llama.cpp's converter where it has one
_METADATA: Final = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
    "repeat_last_n": "general.sampling.penalty_last_n",
    "presence_penalty": "qvl.sampling.presence_penalty",
}
_WHOLE_REPLY: Final = 1 << 17  # tokens; longer than any context that llama.cpp is given here
_BOUNDS: Final = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 30),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
    "repeat_last_n": (0, 1 << 20),
    "presence_penalty": (-2.0, 2.0),
    "seed": (0, _RANDOM_SEED),
}


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The samplers apply in the order of the attributes, temperature last.

    Attributes:
        repeat_penalty: divides the logits of tokens already in the reply; 1 is off.
        repeat_last_n: how many of the reply's last tokens count for that.
        presence_penalty: subtracted from the logits of tokens already in the reply; 0 is off.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the most likely that together have this probability; 1 keeps all.
        min_p: keep those at least this likely, relative to the most likely; 0 keeps all.
        temperature: 0 takes the most likely token always.
        seed: None draws one.
    """

    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None:
                (check_whole if isinstance(least, int) else check_number)(name, value, least, most)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Sampling:
        """The model's own settings (keys of `_METADATA`); greedy where the file has none.

        Qwen publishes top_k 1 for Qwen2-VL, which is greedy as well.
        """
        found = {name: metadata.get(key) for name, key in _METADATA.items()}
        known: dict[str, Any] = {k: v for k, v in found.items() if isinstance(v, int | float)}
        try:
            return cls(**known)
        except InputError:
            return cls()  # a file's odd defaults are no reason to refuse it

    @property
    def is_greedy(self) -> bool:
        """True if every token is the most likely one, so that replies to one prompt are equal."""
        return self.temperature == 0 or self.top_k == 1

    def override(self, **given: float | None) -> Sampling:
        """With what the caller has chosen; None leaves a setting as it is.

        A caller who asks for a temperature wants variety. If the model's own top_k of 1 stands against it,
        that and its top_p give way to llama.cpp's usual 40 and 0.95.

        Raises:
            InputError: a value out of bounds.
        """
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        replace(self, **chosen)  # checks them
        if chosen.get("temperature", 0) > 0 and self.top_k == 1:
            chosen = {"top_k": 40, "top_p": 0.95} | chosen
        return replace(self, **chosen)


class Sampler:
    """A sampler chain with its state (random numbers, tokens seen, place in the grammar).

    Use as a context manager, or call `close`.

    Attributes:
        seed: the seed in use.
    """

    def __init__(self, vocab: Vocab, sampling: Sampling, grammar: str | None = None) -> None:
        """grammar: GBNF with a rule `root`.

        Raises:
            InputError: the grammar cannot be parsed.
        """
        self._c = c = llama()
        self._vocab = vocab
        seed = secrets.randbelow(_RANDOM_SEED) if sampling.seed is None else sampling.seed
        self.seed = seed % _RANDOM_SEED
        self._chain = self._grammar = None
        self._last_byte = b""
        if grammar is not None:
            self._grammar = self._parse(grammar)
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for sampler in self._links(sampling):
            c.llama_sampler_chain_add(self._chain, sampler)

    def close(self) -> None:
        """Free the chain. Doing it twice is harmless."""
        for name in ("_chain", "_grammar"):
            if (sampler := getattr(self, name, None)) is not None:
                setattr(self, name, None)
                self._c.llama_sampler_free(sampler)

    def __del__(self) -> None:
        self.close()  # of a stream that nobody read

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sample(self, context: Context, row: int = -1) -> int | None:
        """The token after a row of the context's last batch; None when the grammar allows no token.

        row: index of the token in the batch, -1 for the last row of logits.
        """
        if self._grammar is None:
            return int(self._c.llama_sampler_sample(self._chain, context.handle, row))
        return self._sample_in_grammar(context.row(row))

    def _links(self, sampling: Sampling) -> list[Any]:
        c, links = self._c, []
        if sampling.repeat_penalty != 1.0 and sampling.repeat_last_n:
            n, last_n = self._vocab.n_tokens, sampling.repeat_last_n
            links.append(c.llama_sampler_init_penalties(n, last_n, sampling.repeat_penalty, 0.0, 0.0))
        if sampling.presence_penalty:
            n = self._vocab.n_tokens
            links.append(c.llama_sampler_init_penalties(n, _WHOLE_REPLY, 1.0, 0.0, sampling.presence_penalty))
        if sampling.temperature == 0 or sampling.top_k == 1:
            return [*links, c.llama_sampler_init_greedy()]
        if sampling.top_k > 0:
            links.append(c.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            links.append(c.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            links.append(c.llama_sampler_init_min_p(sampling.min_p, 1))
        return [*links, c.llama_sampler_init_temp(sampling.temperature), c.llama_sampler_init_dist(self.seed)]

    def _parse(self, grammar: str) -> Any:
        complaints()
        check_text("grammar", grammar)
        sampler = self._c.llama_sampler_init_grammar(self._vocab.handle, grammar.encode(), b"root")
        if not sampler or not grammar.strip():  # llama.cpp takes an empty one for no grammar
            reason = complaints() or "it has no rule root"
            raise InputError(f"the grammar cannot be parsed: {reason}", hint="it must be GBNF")
        return sampler

    def _sample_in_grammar(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> int | None:
        """Let the chain choose, and only when the grammar refuses that, choose from what it allows.

        Asking the grammar about one token is cheap, about all of them it is not (llama.cpp's
        common/sampling.cpp does the same).
        """
        token = self._apply(self._chain, _Candidates(logits))
        if token is not None and not self._allowed(token):
            token = self._choose_allowed(logits)
        if token is None:
            return None
        self._c.llama_sampler_accept(self._chain, token)
        if token not in self._vocab.end_tokens:
            self._c.llama_sampler_accept(self._grammar, token)
            self._last_byte = self._vocab.piece(token)[-1:] or self._last_byte
        return token

    def _choose_allowed(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> int | None:
        refused: list[int] = []  # one at a time: most of the vocabulary has no such bytes
        while True:
            candidates = _Candidates(logits)
            candidates.data["logit"][refused] = -np.inf
            self._c.llama_sampler_apply(self._grammar, candidates.pointer)
            token = self._apply(self._chain, candidates)
            if token is None or not self._is_malformed(token):
                return token
            refused.append(token)

    def _apply(self, sampler: Any, candidates: _Candidates) -> int | None:
        if not np.isfinite(candidates.data["logit"].max()):
            return None
        self._c.llama_sampler_apply(sampler, candidates.pointer)
        return candidates.chosen()

    def _is_malformed(self, token: int) -> bool:
        """True if a token would make a character that UTF-8 does not have, which the grammar lets pass."""
        return _MALFORMED.search(self._last_byte + self._vocab.piece(token)) is not None

    def _allowed(self, token: int) -> bool:
        if self._is_malformed(token):
            return False
        one = _Candidates(np.zeros(1, np.float32), first_id=token)
        self._c.llama_sampler_apply(self._grammar, one.pointer)
        return bool(np.isfinite(one.data["logit"][0]))


class _Candidates:
    """A `llama_token_data_array` over a row of logits."""

    def __init__(self, logits: np.ndarray[Any, np.dtype[np.float32]], first_id: int = 0) -> None:
        c = llama()
        self.data = np.empty(len(logits), _TOKEN_DATA)
        self.data["id"] = np.arange(first_id, first_id + len(logits))
        self.data["logit"] = logits
        self.data["p"] = 0
        pointer = ctypes.cast(self.data.ctypes.data, ctypes.POINTER(c.llama_token_data))
        self._array = c.llama_token_data_array(data=pointer, size=len(logits), selected=-1, sorted=False)
        self.pointer = ctypes.byref(self._array)

    def chosen(self) -> int | None:
        """The id that a sampler selected. Samplers may sort and cut the array, in place or elsewhere."""
        i = self._array.selected
        if not 0 <= i < self._array.size:
            return None
        entry = self._array.data[i]
        return int(entry.id) if math.isfinite(entry.logit) else None
