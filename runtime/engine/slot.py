"""Slots of a KV cache: which units each sequence holds, which cells it shares, and who waits for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qvl.runtime.engine.units import Unit, bare, common_prefix, n_cells, n_positions
from qvl.runtime.llama.context import Context

if TYPE_CHECKING:
    from qvl.runtime.engine.request import Job, Sample


@dataclass(eq=False)
class Slot:
    """A sequence of the context.

    Attributes:
        units: what its cells hold.
        n_cells, position: of these units; the position is where the next unit begins.
        queue: units that are still to be read, or the token that was sampled last.
        rows: of the vision unit at the head of the queue, how many went through the decoder.
        limit: most cells that the job may bring it to.
        source, shared: the slot whose leading cells it shares, and how many.
        leader: while set, wait until that slot has read so many units, and copy them.
        used: when it was taken last, by a running count.
    """

    sequence: int
    units: list[Unit] = field(default_factory=list)
    n_cells: int = 0
    position: int = 0
    job: Job | None = None
    sample: Sample | None = None
    queue: list[Unit] = field(default_factory=list)
    rows: int = 0
    limit: int = 0
    source: Slot | None = None
    shared: int = 0
    leader: tuple[Slot, int] | None = None
    used: int = 0

    @property
    def free(self) -> bool:
        """True if it has no job."""
        return self.job is None

    @property
    def plan(self) -> Sequence[Unit]:
        """Units that it holds once its queue has been read."""
        return [*self.units, *self.queue] if self.queue else self.units

    @property
    def committed(self) -> int:
        """Cells of its own that it has or may still take."""
        return max(self.n_cells, self.limit) - self.shared

    def hold(self, units: Sequence[Unit]) -> None:
        """Note that the cache now ends with these, the head of the queue."""
        self.units.extend(map(bare, units))
        self.n_cells += n_cells(units)
        self.position += n_positions(units)
        del self.queue[: len(units)]
        self.rows = 0


class Slots:
    """All sequences of a context, and the cells that they share.

    Args:
        can_cut: whether a sequence can be cut back to any of its units; where a decoder has recurrent state,
            it can only be kept whole or cleared.
    """

    def __init__(self, context: Context, *, can_cut: bool = True) -> None:
        self.all = [Slot(sequence) for sequence in range(context.n_seq_max)]
        self.n_cells = context.n_ctx
        self.can_cut = can_cut
        self._context = context
        self._clock = 0

    @property
    def free(self) -> list[Slot]:
        """Those without a job, the one that was used longest ago first."""
        return sorted((slot for slot in self.all if slot.free), key=lambda slot: slot.used)

    @property
    def busy(self) -> list[Slot]:
        """Those at work."""
        return [slot for slot in self.all if not slot.free]

    @property
    def reading(self) -> list[Slot]:
        """Those with something to decode."""
        return [slot for slot in self.busy if slot.queue and slot.leader is None]

    @property
    def n_used(self) -> int:
        """Cells that hold something."""
        return sum(slot.n_cells - min(slot.shared, slot.n_cells) for slot in self.all)

    def cut(self, slot: Slot, keep: int) -> None:
        """Cut a slot back to its first `keep` units, and remove what a batch left half-way beyond them."""
        if not self.can_cut and (keep < len(slot.units) or slot.rows):
            keep = 0
        if keep < len(slot.units):
            del slot.units[keep:]
            slot.n_cells, slot.position = n_cells(slot.units), n_positions(slot.units)
        slot.rows = 0
        self._bequeath(slot)
        self._context.remove(slot.sequence, slot.position)

    def _bequeath(self, slot: Slot) -> None:
        """Cells that others share with a slot which no longer holds them belong to one of the others.

        To the one that holds most of them: those that wait for a copy hold none yet.
        """
        cells = slot.n_cells
        heirs = [other for other in self.all if other.source is slot and other.shared > cells]
        if heirs:
            heir = max(heirs, key=lambda other: (min(other.n_cells, other.shared), other.shared))
            before = heir.shared
            if slot.shared > cells:
                heir.source, heir.shared = slot.source, min(before, slot.shared)
            else:
                heir.source, heir.shared = (slot if cells else None), cells
            for other in heirs:
                if other is not heir:
                    other.source, other.shared = heir, min(other.shared, before)
        slot.shared = min(slot.shared, cells)
        if not slot.shared:
            slot.source = None

    def copy(self, source: Slot, target: Slot, keep: int) -> None:
        """Let a slot begin with the first units of another. The cells are shared, so it takes no room."""
        if target.n_cells:  # an empty one may have promised cells to its siblings
            self.cut(target, 0)
        self._context.copy(source.sequence, target.sequence)
        target.units = source.units[:keep]
        target.n_cells, target.position = n_cells(target.units), n_positions(target.units)
        target.source, target.shared = source, target.n_cells
        self._context.remove(target.sequence, target.position)

    def reusable(self, slot: Slot, units: Sequence[Unit], most: int) -> int:
        """Number of the units, at most `most`, that a slot holds or will hold and can share."""
        if self.can_cut:
            return min(common_prefix(slot.plan, units), most)
        whole = 0 < len(slot.units) <= most and not slot.rows
        return len(slot.units) if whole and common_prefix(slot.units, units) == len(slot.units) else 0

    def best(self, units: Sequence[Unit], most: int) -> tuple[Slot, int]:
        """The slot with the longest prefix of the units, and its length; a free one if there are several."""
        found = [(self.reusable(slot, units, most), slot.free, -slot.used, slot) for slot in self.all]
        n, _, _, slot = max(found, key=lambda entry: entry[:3])
        return slot, n

    def take(self, units: Sequence[Unit], n: int, limit: int, most: int) -> list[Slot] | None:
        """Slots for n samples of a prompt; the first begins with what the cache has of it.

        Args:
            units: the prompt.
            limit: cells that each of them may come to hold.
            most: units of the prompt that may be taken from the cache.

        Returns:
            None where slots or cells are short. The first slot's queue holds the unread rest; it may
            have a leader. The others are empty, and are to become copies of it.
        """
        free = self.free
        if len(free) < n:
            return None
        source, shared = self.best(units, most)
        prefix, prompt = n_cells(units[:shared]), n_cells(units)
        needed = limit - prefix + (n - 1) * (limit - prompt)
        if self.n_cells - sum(slot.committed for slot in self.busy) < needed:
            return None
        others = [slot for slot in free if slot is not source]
        in_place = source.free and (2 * prefix >= source.n_cells or len(others) < n)
        first, *siblings = [source, *others[: n - 1]] if in_place else others[:n]
        for slot in (first, *siblings):
            self.cut(slot, shared if slot is source else 0)
        if not self._make_room(needed, source):
            if in_place or not source.free:
                return None
            first = source
            self.cut(source, shared)
            if not self._make_room(needed, source):
                return None
        self._begin(first, source, units, shared)
        for slot in (first, *siblings):
            self._clock += 1
            slot.used, slot.limit = self._clock, limit
        for slot in siblings:
            slot.source, slot.shared = first, prompt
        return [first, *siblings]

    def _begin(self, slot: Slot, source: Slot, units: Sequence[Unit], shared: int) -> None:
        slot.queue = list(units)
        if slot is source:
            slot.queue = list(units[shared:])
        elif shared and len(source.units) < shared:
            slot.leader = (source, shared)
            slot.source, slot.shared = source, n_cells(units[:shared])
        elif shared:
            self.copy(source, slot, shared)
            slot.queue = list(units[shared:])

    def follow(self, slot: Slot) -> bool:
        """Copy from the leader if it has read far enough; False if it never will."""
        assert slot.leader is not None
        leader, shared = slot.leader
        if common_prefix(leader.units, slot.queue) >= shared:
            units, slot.leader = slot.queue, None
            self.copy(leader, slot, shared)
            slot.queue = units[shared:]
            return True
        return common_prefix(leader.plan, slot.queue) >= shared and not leader.free

    def release(self, slot: Slot, keep: int | None = None) -> None:
        """Free a slot; what it holds, or `keep` units of it, stays for other prompts."""
        slot.job = slot.sample = slot.leader = None
        slot.queue, slot.limit = [], 0
        self.cut(slot, len(slot.units) if keep is None else min(keep, len(slot.units)))

    def _make_room(self, cells: int, kept: Slot) -> bool:
        """Clear free slots, the one used longest ago first, until so many cells can be promised."""
        spare = [slot for slot in self.free if slot.n_cells and slot is not kept]
        while self._room() < cells and spare:
            self.cut(spare.pop(0), 0)
        return self._room() >= cells

    def _room(self) -> int:
        idle = sum(slot.n_cells - slot.shared for slot in self.all if slot.free)
        return self.n_cells - idle - sum(slot.committed for slot in self.busy)
