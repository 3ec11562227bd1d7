"""Requests in slots: what comes out is what each alone gives, and what it costs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.chatml import image, system, text, user
from support.sessions import RULES, FakeBackend

from qvl.runtime.engine.batches import batches
from qvl.runtime.engine.engine import Engine
from qvl.runtime.engine.request import Job, Request
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.units import Unit, VisionUnit
from qvl.runtime.errors import BackendError, ContextFullError, InputError
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message

HOT = Sampling(temperature=1.2, top_k=40)


class Bench:
    """Engines on one model and one store."""

    def __init__(self, model: LlamaModel, backend: FakeBackend) -> None:
        self.model, self.store = model, EmbeddingStore(backend)
        self.template = ChatTemplate(model.vocab, None, RULES)

    def engine(self, slots: int, n_ctx: int = 1024, n_batch: int = 64, **options: Any) -> Engine:
        context = Context(self.model, n_ctx=n_ctx, n_batch=n_batch, n_seq_max=slots, kv_type="f32", threads=1)
        return Engine(context, self.store, **options)

    def units(self, *messages: Message) -> list[Unit]:
        return self.template.units(messages, self.store.place)

    def request(self, units: list[Unit], *seeds: int, max_tokens: int = 12, **options: Any) -> Request:
        samplers = tuple(Sampler(self.model.vocab, Sampling(**{**vars(HOT), "seed": seed})) for seed in seeds)
        return Request(units, samplers, max_tokens, **options)

    def alone(self, units: list[Unit], seed: int, max_tokens: int = 12) -> list[int]:
        with self.engine(1) as engine:
            job = engine.submit(self.request(units, seed, max_tokens=max_tokens))
            run(engine)
            return job.samples[0].tokens


@pytest.fixture
def bench(model: LlamaModel, backend: FakeBackend) -> Iterator[Bench]:
    yield Bench(model, backend)


def run(engine: Engine, most: int = 2000) -> list[Job]:
    ended = []
    while engine.busy:
        ended += engine.step()
        most -= 1
        assert most, "it does not end"
    return ended


def prompts(bench: Bench) -> list[list[Unit]]:
    return [
        bench.units(system("Short."), user(image(56 + 28 * i, 84, i), text(f"What is number {i}?")))
        for i in range(5)
    ] + [bench.units(user("word " * 150)), bench.units(system("Short."), user("Nothing to see"))]


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("slots", [2, 4])
def test_many_at_once_give_what_each_alone_gives(bench: Bench, slots: int, interleave: bool) -> None:
    asked = prompts(bench)
    expected = [bench.alone(units, 5 + i) for i, units in enumerate(asked)]
    with bench.engine(slots, interleave=interleave) as engine:
        jobs = [engine.submit(bench.request(units, 5 + i)) for i, units in enumerate(asked)]
        assert {id(job) for job in run(engine)} == {id(job) for job in jobs}
        assert [job.samples[0].tokens for job in jobs] == expected
        assert engine.free == slots


def test_a_prefix_is_copied_from_a_busy_slot(bench: Bench, backend: FakeBackend) -> None:
    """Also one that the busy slot has not read yet: the picture is encoded and read once."""
    picture = image(140, 196)
    asked = [bench.units(user(picture, text(f"Question {i}"))) for i in range(3)]
    expected = [bench.alone(units, 1) for units in asked]
    backend.encoded.clear()
    bench.store = EmbeddingStore(backend)
    with bench.engine(3) as engine:
        jobs = [engine.submit(bench.request(units, 1)) for units in asked]
        run(engine)
    assert [job.samples[0].tokens for job in jobs] == expected
    assert jobs[0].cached_tokens == 0 and all(job.cached_tokens > 35 for job in jobs[1:])
    assert backend.encoded == [1] and [job.images_encoded for job in jobs] == [1, 0, 0]


def test_a_conversation_keeps_its_slot(bench: Bench) -> None:
    """Another that shares only the system prompt does not take it away."""
    head = system("A system prompt of some length, which all of them share.")
    first, other = bench.units(head, user("one " * 60)), bench.units(head, user("two " * 60))
    with bench.engine(2) as engine:
        for units in (first, other, first, other):
            job = engine.submit(bench.request(units, 1))
            run(engine)
        assert job.cached_tokens == job.prompt_tokens - 1


def test_samples_read_the_prompt_once(bench: Bench) -> None:
    units = bench.units(user(image(84, 84), text("?")))
    expected = [bench.alone(units, seed) for seed in (3, 4, 5)]
    with bench.engine(3) as engine:
        job = engine.submit(bench.request(units, 3, 4, 5))
        run(engine)
    assert [sample.tokens for sample in job.samples] == expected and len(set(map(tuple, expected))) > 1
    assert job.read_tokens == job.prompt_tokens


@pytest.mark.parametrize("slots", [3, 4, 5])
def test_samples_are_the_same_whichever_slot_reads_the_prompt(bench: Bench, slots: int) -> None:
    units = bench.units(user(image(84, 84), text("?")))
    expected = [bench.alone(units, seed) for seed in (3, 4, 5)]
    with bench.engine(slots) as engine:
        for _ in range(6):  # the slot with the longest prefix is another one each time
            job = engine.submit(bench.request(units, 3, 4, 5))
            run(engine)
            assert [sample.tokens for sample in job.samples] == expected


def test_log_probabilities(bench: Bench) -> None:
    units = bench.units(user("Hello"))
    sampler = Sampler(bench.model.vocab, Sampling())
    with bench.engine(1) as engine:
        job = engine.submit(Request(units, (sampler,), 3, logprobs=4))
        run(engine)
    [sample] = job.samples
    with Context(bench.model, n_ctx=256, kv_type="f32", threads=1) as context:
        for batch in batches(units, {}, n_batch=64, outputs="last"):
            context.decode(batch)
        row = context.logits()[0].astype(np.float64)
    row -= np.log(np.exp(row - row.max()).sum()) + row.max()
    first = sample.logprobs[0]
    assert first.token == sample.tokens[0] == int(row.argmax())
    assert first.logprob == pytest.approx(row.max(), abs=1e-4)
    assert [value for _, value in first.top] == pytest.approx(sorted(row, reverse=True)[:4], abs=1e-4)
    assert [entry for piece in sample.pieces for entry in piece.logprobs] == sample.logprobs


def test_cancelling_a_prompt_half_way_leaves_the_others_alone(bench: Bench) -> None:
    long, short = bench.units(user("word " * 800)), bench.units(user("Hello"))
    expected = bench.alone(short, 9, max_tokens=60)
    with bench.engine(2, n_ctx=2048, n_batch=512) as engine:
        other = engine.submit(bench.request(short, 9, max_tokens=60))
        engine.step()
        cancelled = engine.submit(bench.request(long, 1))
        threading.Timer(0.02, cancelled.cancel).start()
        run(engine)
        assert cancelled.samples[0].reason == "cancelled" and not cancelled.samples[0].tokens
        assert other.samples[0].tokens == expected
        again = engine.submit(bench.request(long, 1))
        run(engine)
        assert again.samples[0].tokens == bench_alone(bench, long)


def bench_alone(bench: Bench, units: list[Unit]) -> list[int]:
    with bench.engine(1, n_ctx=2048) as engine:
        job = engine.submit(bench.request(units, 1))
        run(engine)
        return job.samples[0].tokens


def test_replies_go_on_while_a_picture_is_encoded(bench: Bench, backend: FakeBackend) -> None:
    with bench.engine(2) as engine:
        reply = engine.submit(bench.request(bench.units(user("Hello")), 1, max_tokens=100))
        engine.step()
        backend.pause = 0.12
        engine.submit(bench.request(bench.units(user(image(140, 140))), 1))
        before, steps = len(reply.samples[0].tokens), 0
        while engine.encoding is not None or not steps:
            engine.step()
            steps += 1
        assert steps >= 5 and len(reply.samples[0].tokens) >= before + steps - 1
        backend.pause = 0.0


def test_a_step_beside_replies_encodes_or_reads(bench: Bench, backend: FakeBackend) -> None:
    """Not both: a reply waits for one of them at a time, and neither of the two stands still."""
    with bench.engine(3, n_ctx=2048, n_batch=512) as engine:
        reply = engine.submit(bench.request(bench.units(user("Hello")), 1, max_tokens=200))
        engine.step()
        backend.pause = 0.07
        pictured = engine.submit(bench.request(bench.units(user(image(140, 140))), 1))
        long = engine.submit(bench.request(bench.units(user("word " * 200)), 1))
        done = []
        while not (pictured.done and long.done):
            before = dict(engine.seconds)
            tokens, read = len(reply.samples[0].tokens), long.read_tokens
            engine.step()
            done.append((engine.seconds["encode"] > before["encode"], long.read_tokens > read))
            assert len(reply.samples[0].tokens) == tokens + 1
        backend.pause = 0.0
    both, encoded, read = (sum(map(kind, done)) for kind in (all, lambda d: d[0], lambda d: d[1]))
    assert both == 0 and encoded >= 2 and read >= 2
    first_encoded, first_read = ([d[i] for d in done].index(True) for i in (0, 1))
    assert abs(first_encoded - first_read) <= 1


def test_a_picture_that_fails_fails_its_job_only(bench: Bench, backend: FakeBackend) -> None:
    def broken() -> Any:
        raise InputError("broken.png: cannot be read")

    asked = [bench.units(user(image(56, 56, i), text("?"))) for i in range(3)]
    expected = bench.alone(asked[2], 1)
    asked[1] = [
        VisionUnit("broken", unit.span, broken) if isinstance(unit, VisionUnit) else unit for unit in asked[1]
    ]
    with bench.engine(3) as engine:
        jobs = [engine.submit(bench.request(units, 1)) for units in asked]
        run(engine)
    assert isinstance(jobs[1].error, InputError) and jobs[0].error is None
    assert jobs[2].samples[0].tokens == expected


def test_what_cannot_be_answered(bench: Bench) -> None:
    with bench.engine(2, n_ctx=256) as engine:
        with pytest.raises(ContextFullError):
            engine.submit(bench.request(bench.units(user("word " * 300)), 1))
        with pytest.raises(InputError, match="3 replies"):
            engine.submit(bench.request(bench.units(user("Hello")), 1, 2, 3))
        with pytest.raises(InputError, match="0 units"):
            engine.submit(bench.request([], 1))
        waiting = engine.submit(bench.request(bench.units(user("Hello")), 1))
    assert waiting.done and waiting.samples[0].reason == "cancelled"
    with pytest.raises(BackendError, match="closed"):
        engine.submit(bench.request(bench.units(user("Hello")), 1))


def test_more_prompts_than_cells_wait(bench: Bench) -> None:
    asked = [bench.units(user(f"{i} " + "word " * 80)) for i in range(6)]
    expected = [bench.alone(units, 2) for units in asked]
    with bench.engine(4, n_ctx=256) as engine:
        jobs = [engine.submit(bench.request(units, 2)) for units in asked]
        run(engine)
        assert [job.samples[0].tokens for job in jobs] == expected
        assert engine.n_cached <= 256
