"""A conversation that outgrows the context: what goes, what stays, what is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chatml import assistant, image, system, text, user
from support.sessions import GREEDY, FakeBackend, held, new_session

from qvl.runtime.engine.session import Session
from qvl.runtime.engine.units import Unit, VisionUnit, n_cells
from qvl.runtime.engine.window import Fitter
from qvl.runtime.errors import ContextFullError
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.prompt.messages import Message
from qvl.runtime.prompt.positions import VisionSpan


def test_the_oldest_turns_go(model: LlamaModel, backend: FakeBackend) -> None:
    dropped: list[int] = []
    session = new_session(model, backend, n_ctx=256, on_drop=dropped.append)
    conversation = [system("You count.")]
    lost = []
    for i in range(12):
        conversation.append(user(image(56, 84, i), text(f"Number {i} of a dozen, please")))
        reply = session.generate(conversation, max_tokens=8, **GREEDY).result()
        conversation.append(assistant("Well then."))
        lost.append(reply.dropped_messages)
        tokens = [u for u in held(session) if isinstance(u, int)]
        said = model.vocab.detokenize(tokens)
        assert "<|im_start|>system\nYou count.<|im_end|>" in said  # never the system prompt
        assert f"Number {i} of" in said
        assert (
            said.count("<|im_start|>user") == said.count("<|vision_start|>") == said.count("<|vision_end|>")
        )
        assert n_cells(held(session)) <= 256
    assert lost == sorted(lost) and lost[-1] > 0 and lost[-1] % 2 == 0
    assert dropped == sorted(set(lost) - {0})  # told once for each time, not every turn
    assert len(dropped) < 6  # more goes than must, so that not every turn starts over
    session.close()


def test_after_dropping_a_turn_is_cheap_again(model: LlamaModel, backend: FakeBackend) -> None:
    session = new_session(model, backend, n_ctx=256)
    conversation: list[Message] = []
    costs = []
    for i in range(14):
        conversation.append(user(f"Question number {i}, of many questions that there are"))
        reply = session.generate(conversation, max_tokens=4, **GREEDY).result()
        conversation.append(reply.message)
        costs.append((reply.dropped_messages, reply.usage.prefilled_tokens))
    changed = {i for i in range(1, 14) if costs[i][0] != costs[i - 1][0]}
    assert changed
    assert all(cost < 40 for i, (_, cost) in enumerate(costs) if i and i not in changed)
    session.close()


def test_undoing_brings_dropped_turns_back(model: LlamaModel, backend: FakeBackend) -> None:
    session = new_session(model, backend, n_ctx=256)
    conversation = [message for i in range(10) for message in (user(f"Question {i} " * 8), assistant("Yes"))]
    long = session.generate([*conversation, user("?")], max_tokens=2, **GREEDY).result()
    assert long.dropped_messages > 0
    short = session.generate([*conversation[:2], user("?")], max_tokens=2, **GREEDY).result()
    assert short.dropped_messages == 0
    session.close()


def test_a_picture_that_cannot_fit_says_what_would(session: Session, backend: FakeBackend) -> None:
    with pytest.raises(ContextFullError, match="1 picture of 1024 tokens") as caught:
        session.generate([user(image(896, 896), text("?"))], max_tokens=64).result()
    hint = caught.value.hint or ""
    assert "`max_pixels`" in hint and "`n_ctx`" in hint
    pixels = int(hint.split("`max_pixels` ")[1].split()[0])
    side = int((pixels**0.5) // 28 * 28)
    assert backend.encoded == []  # said before the work
    session.generate([user(image(side, side), text("?"))], max_tokens=64, **GREEDY).result()


def test_a_text_that_cannot_fit(session: Session) -> None:
    with pytest.raises(ContextFullError, match="the message takes") as caught:
        session.generate([user("word " * 2000)]).result()
    assert caught.value.n_ctx == 1024 and caught.value.n_tokens > 1024
    assert "pixels" not in (caught.value.hint or "")


def test_a_reply_ends_where_the_context_does(model: LlamaModel, backend: FakeBackend) -> None:
    session = new_session(model, backend, n_ctx=256)
    reply = session.generate(
        [user("x")], max_tokens=10_000, temperature=2.0, seed=1, grammar='root ::= "a" root'
    ).result()
    assert reply.finish_reason == "length"
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 256 + 1
    session.close()


@given(
    words=st.integers(0, 6000),
    side=st.integers(0, 80),
    frames=st.integers(1, 3),
    n_ctx=st.integers(256, 5000),
)
def test_what_is_advised_lies_within_the_length_of_training(
    words: int, side: int, frames: int, n_ctx: int
) -> None:
    """A larger context is no way out beyond 4096 tokens; there is always one that is."""
    units: list[Unit] = [1] * words
    if side:
        units.append(VisionUnit("a", VisionSpan(frames, side, side)))
    try:
        Fitter(n_ctx, 784, n_trained=4096).fit([user("?")], lambda _: units, 64)
    except ContextFullError as error:
        hint = str(error.hint)
        needed = n_cells(units) + 64
        assert (f"a context (`n_ctx`) of {needed} would do" in hint) == (needed <= 4096)
        assert hint and not hint.startswith(", ")
    else:
        assert n_cells(units) + 64 <= n_ctx
