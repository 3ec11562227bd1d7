"""Results of a conversion, for the table at its end and for scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvl.convert.quantize import Odd
from qvl.convert.recipe import FLOATS, Planned


@dataclass(frozen=True)
class TypeTotal:
    """All tensors of one type in one file. type: as ggml names it, upper case."""

    type: str
    n_tensors: int
    n_elements: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_elements


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows the wanted type's blocks do not divide."""

    name: str
    n_per_row: int
    wanted: str
    used: str


@dataclass(frozen=True)
class FileSummary:
    """One written file.

    Attributes:
        n_bytes: of the whole file, header and vocabulary included.
        by_type: largest first.
    """

    path: Path
    n_bytes: int
    by_type: tuple[TypeTotal, ...]
    fallbacks: tuple[Fallback, ...]

    @property
    def n_tensors(self) -> int:
        return sum(total.n_tensors for total in self.by_type)

    @property
    def n_elements(self) -> int:
        return sum(total.n_elements for total in self.by_type)

    @property
    def bits_per_weight(self) -> float:
        """Of the weights, without header and vocabulary."""
        return 8 * sum(total.n_bytes for total in self.by_type) / self.n_elements


@dataclass(frozen=True)
class Converted:
    """The result of `convert`.

    Attributes:
        text: path of the decoder's file.
        mmproj: path of the image encoder's file.
        files: a summary of each, in that order.
        warnings: sentences that a person should read: odd weights by name, tensors not used.
        seconds: wall time.
    """

    text: Path
    mmproj: Path
    files: tuple[FileSummary, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def summarize(path: Path, plan: Sequence[Planned]) -> FileSummary:
    """Totals of a written file."""
    kinds = {planned.type for planned in plan}
    totals = []
    for kind in kinds:
        same = [planned for planned in plan if planned.type is kind]
        totals.append(
            TypeTotal(
                kind.name,
                len(same),
                sum(planned.tensor.n_elements for planned in same),
                sum(planned.nbytes for planned in same),
            )
        )
    fallbacks = tuple(
        Fallback(p.tensor.name, p.tensor.n_per_row, p.wanted.name, p.type.name)
        for p in plan
        if p.type is not p.wanted
    )
    by_type = tuple(sorted(totals, key=lambda total: -total.n_bytes))
    return FileSummary(path, path.stat().st_size, by_type, fallbacks)


def warn(odd: Mapping[str, Odd], ignored: Sequence[str], plans: Sequence[Sequence[Planned]]) -> Iterator[str]:
    """Warnings, worst first."""
    types = {planned.tensor.name: planned.type for plan in plans for planned in plan}
    for name, found in odd.items():
        if found.not_finite:
            kind = types[name]
            fate = "kept" if kind in FLOATS else f"written as 0, since {kind.name} cannot hold them"
            yield f"{name}: {found.not_finite} weights are NaN or infinite ({fate})"
        if found.too_large:
            yield f"{name}: {found.too_large} weights are too large for {types[name].name}"
    if ignored:
        yield f"not used: {', '.join(ignored)}"
