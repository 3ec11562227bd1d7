"""Slots over a cache that counts its cells: what they say is what it holds, and it never overflows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.runtime.engine.slot import Slot, Slots

N_CTX = 40


class Cells:
    """A KV cache for tokens: each sequence has a cell at each of its positions, shared or not."""

    def __init__(self, n_ctx: int, n_seq_max: int) -> None:
        self.n_ctx, self.n_seq_max = n_ctx, n_seq_max
        self.at: list[dict[int, object]] = [{} for _ in range(n_seq_max)]

    def remove(self, sequence: int, start: int) -> None:
        self.at[sequence] = {p: cell for p, cell in self.at[sequence].items() if p < start}

    def copy(self, source: int, target: int) -> None:
        self.at[target] = dict(self.at[source])

    def put(self, sequence: int, position: int) -> None:
        assert position not in self.at[sequence]
        self.at[sequence][position] = object()
        assert self.n_used <= self.n_ctx

    @property
    def n_used(self) -> int:
        return len({cell for cells in self.at for cell in cells.values()})


class Machine:
    """Jobs that read and write at random."""

    def __init__(self, n_slots: int, can_cut: bool) -> None:
        self.cells = Cells(N_CTX, n_slots)
        self.slots = Slots(self.cells, can_cut=can_cut)  # type: ignore[arg-type]
        self.jobs: list[list[Slot]] = []

    def submit(self, units: list[int], n: int, max_tokens: int) -> None:
        room = (N_CTX - len(units)) // n
        slots = self.slots.take(units, n, len(units) + min(room, max_tokens), len(units) - 1)
        if slots is None:
            assert self.jobs, "an empty cache has room for everything"
            return
        job: Any = SimpleNamespace(units=units)
        for slot in slots:
            slot.job = job
        self.jobs.append(slots)

    def step(self, which: int) -> None:
        slots = self.jobs[which % len(self.jobs)]
        first = slots[0]
        if first.leader is not None:
            if not self.slots.follow(first):
                self.end(which)
            return
        for slot in slots:
            if slot.queue:
                for unit in list(slot.queue)[:3]:
                    self.cells.put(slot.sequence, slot.position)
                    slot.hold([unit])
            elif slot is not first and not slot.units:
                if not first.queue:
                    self.slots.copy(first, slot, len(first.units))
            elif slot.n_cells < slot.limit:
                slot.queue = [slot.n_cells + 1000 * slot.sequence]

    def end(self, which: int, keep: int | None = None) -> None:
        for slot in self.jobs.pop(which % len(self.jobs)):
            self.slots.release(slot, keep)

    def check(self) -> None:
        assert self.slots.n_used == self.cells.n_used
        for slot in self.slots.all:
            held = list(self.cells.at[slot.sequence])
            assert held == list(range(slot.position)) and len(slot.units) == slot.n_cells
        promised = sum(slot.committed for slot in self.slots.busy)
        assert promised + sum(s.n_cells - s.shared for s in self.slots.free) <= N_CTX


PROMPT = st.builds(
    lambda head, body, tail: [1] * head + body + [2] * tail,
    st.integers(1, 9), st.lists(st.integers(3, 4), max_size=6), st.integers(0, 6),
)  # fmt: skip
ACTION = st.one_of(
    st.tuples(st.just("submit"), PROMPT, st.integers(1, 3), st.integers(1, 9)),
    st.tuples(st.just("step"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 9), st.one_of(st.none(), st.integers(0, 5))),
)


@settings(max_examples=150)
@given(st.integers(3, 5), st.booleans(), st.lists(ACTION, max_size=60))
def test_slots_know_their_cells(n_slots: int, can_cut: bool, actions: list[tuple[Any, ...]]) -> None:
    machine = Machine(n_slots, can_cut)
    for name, *arguments in actions:
        if name == "submit" or machine.jobs:
            getattr(machine, name)(*arguments)
        machine.check()


@pytest.mark.parametrize("can_cut", [True, False])
def test_a_prefix_is_reused(can_cut: bool) -> None:
    """Where the state cannot be cut back, only if the whole of it is the prefix."""
    machine = Machine(3, can_cut)
    machine.submit([1, 2, 3, 4], 1, 1)
    while machine.jobs[0][0].queue:
        machine.step(0)
    machine.submit([1, 2, 3, 4, 5], 1, 1)
    assert len(machine.jobs[1][0].queue) == 1
    machine.submit([1, 2, 9], 1, 1)
    assert len(machine.jobs[2][0].queue) == (1 if can_cut else 3)
    machine.check()


def test_siblings_keep_what_is_promised_while_the_first_follows_a_leader() -> None:
    machine = Machine(4, can_cut=True)
    machine.submit([1, 3, 2, 2, 2, 2, 2], 2, 1)
    machine.submit([1, 1, 1, 4, 4, 3, 4, 2, 2, 2, 2, 2, 2], 2, 5)
    _, sibling = machine.jobs[1]
    before = sibling.committed
    machine.step(0)
    machine.step(1)  # the first copies what both prompts begin with
    assert machine.jobs[1][0].n_cells == 1
    assert sibling.committed == before
    machine.check()


def test_cells_of_a_cleared_slot_go_to_one_that_holds_them() -> None:
    """Not to one that still waits for more of them."""
    machine = Machine(5, can_cut=True)
    machine.submit([1] * 8 + [2], 1, 1)
    machine.step(0)
    machine.submit([1] * 6 + [4], 1, 1)  # waits for the six
    machine.step(0)
    machine.end(0)
    machine.submit([1, 3], 1, 1)  # a copy of one
    [first] = [slot for slot in machine.slots.free if slot.units]
    machine.slots.cut(first, 0)
    machine.check()
