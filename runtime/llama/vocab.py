"""Text to tokens and back, by llama.cpp's tokenizer.

llama.cpp leaves out one step that the published tokenizer has: Unicode normalization to NFC
(tokenizer.json, `normalizer`). It is done here, so that decomposed accents and Hangul give the trained
tokens.
"""

from __future__ import annotations

import codecs
import ctypes
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

from qvl.runtime.errors import BackendError, GGUFError, Unpicklable
from qvl.runtime.llama.binding import llama

END_TOKENS: Final = "qvl.tokenizer.eos_token_ids"
"""All tokens that end a reply (generation_config.json's eos_token_id); GGUF has a key for one alone."""
_CONTROL: Final = 3  # llama.h, LLAMA_TOKEN_TYPE_CONTROL


class Vocab(Unpicklable):
    """The vocabulary of an open model; it lives no longer than the model.

    Attributes:
        n_tokens: rows of the vocabulary, padding included.
        end_tokens: ids that end a reply, from the metadata.
        controls: names of the control tokens.
    """

    def __init__(self, handle: int, path: str, metadata: Mapping[str, Any] | None = None) -> None:
        """handle: the `llama_model *`; path: the file, for error texts; metadata: of the file."""
        self._c = llama()
        self._vocab: Any = self._c.llama_model_get_vocab(handle)
        self._path = path
        self.n_tokens: int = self._c.llama_vocab_n_tokens(self.handle)
        metadata = metadata or {}
        ends = [self._c.llama_vocab_eos(self.handle), self._c.llama_vocab_eot(self.handle)]
        ends += metadata.get(END_TOKENS) or []
        known = (self._find(name) for name in ("<|im_end|>", "<|endoftext|>"))
        self.end_tokens = frozenset(t for t in (*ends, *known) if t is not None and 0 <= t < self.n_tokens)
        names = zip(
            *(metadata.get(f"tokenizer.ggml.{key}") or () for key in ("tokens", "token_type")), strict=False
        )
        self.controls = tuple(name for name, kind in names if kind == _CONTROL)
        self.piece = lru_cache(maxsize=1 << 14)(self._piece)

    @property
    def handle(self) -> Any:
        """The `llama_vocab *`, for samplers.

        Raises:
            BackendError: the model is closed.
        """
        if self._vocab is None:
            raise BackendError(f"{self._path}: the model is closed")
        return self._vocab

    def close(self) -> None:
        """The model is about to be freed, and the vocabulary with it."""
        self._vocab = None

    def tokenize(self, text: str) -> list[int]:
        """Tokens of plain text: `<|im_start|>` in it is ten characters and no control token."""
        return self._tokenize(text, control=False)

    def control(self, name: str) -> int:
        """The id of a control token by its text.

        Raises:
            GGUFError: the vocabulary has no such token.
        """
        token = self._find(name)
        if token is None:
            raise GGUFError(
                f"{self._path}: the vocabulary has no token {name}, which the model's prompts need",
                hint="the tokenizer in the file is another model's: convert the checkpoint again",
            )
        return token

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Text of tokens, control tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece(t) for t in tokens).decode("utf-8", "replace")

    def text(self, tokens: Iterable[int]) -> str:
        """Text of a reply: as `detokenize`, without a last character that is cut short."""
        decoder = self.decoder()
        return "".join([decoder.feed(token) for token in tokens])

    def decoder(self) -> IncrementalText:
        """A fresh decoder for streaming."""
        return IncrementalText(self)

    def _find(self, name: str) -> int | None:
        tokens = self._tokenize(name, control=True)
        return tokens[0] if len(tokens) == 1 and self._piece(tokens[0]) == name.encode() else None

    def _tokenize(self, text: str, *, control: bool) -> list[int]:
        if not text:
            return []
        # a lone surrogate, as a terminal may hand over for bytes that are no UTF-8, has no encoding
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        data = unicodedata.normalize("NFC", text).encode()
        room = len(data)  # no token of a byte-level BPE is empty
        tokens = (ctypes.c_int32 * room)()
        n = self._c.llama_tokenize(self.handle, data, len(data), tokens, room, False, control)
        if n < 0:
            raise GGUFError(f"{self._path}: the tokenizer gave {-n} tokens for {room} bytes")
        return tokens[:n]

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self._c.llama_token_to_piece(self.handle, token, buffer, room, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            room = -n


class IncrementalText:
    """Tokens to text as they come: a character whose bytes span several tokens appears with the last."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token: int) -> str:
        return self._decode(self._vocab.piece(token))

    def finish(self) -> str:
        """Empty text: the rest are bytes of a character that was cut short."""
        self._decode(b"", True)
        return ""
