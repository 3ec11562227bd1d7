"""One slot gives what a session gave before there were slots."""

from __future__ import annotations

import json

from support.session_golden import FILE, replies

from qvl.runtime.llama.model import LlamaModel


def test_one_slot_gives_the_tokens_of_a_session(model: LlamaModel) -> None:
    assert replies(model) == json.loads(FILE.read_text())
