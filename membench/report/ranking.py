"""Ranks with ties: who is above whom where the comparison can tell, and who shares a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from membench.compare import excess_by_pairs
from membench.report.records import Estimate, Row, Section
from membench.report.table import BANDS, MAIN_BAND


@dataclass(frozen=True)
class Ranking:
    """The rows of a section in one calibrated band.

    excess: by label, highest first, those that have an interval. above: by label, whose excess AMS
    is higher than its own and distinguishable from it. paired: whether images were compared one by
    one (all pairs, Holm's correction) or only intervals, which must not touch.
    """

    excess: Mapping[str, Estimate]
    above: Mapping[str, frozenset[str]]
    paired: bool

    def rank(self, label: str) -> int | None:
        """1 + how many rows are distinguishably above; None where nothing is known."""
        return 1 + len(self.above[label]) if label in self.above else None

    def shown(self, label: str) -> str:
        """`1`, `2=` where the place is shared, or `–`."""
        rank = self.rank(label)
        if rank is None:
            return "–"
        shared = sum(self.rank(other) == rank for other in self.above) > 1
        return f"{rank}=" if shared else str(rank)

    @property
    def best(self) -> str | None:
        """The highest excess, whether or not it can be told from the next."""
        return next(iter(self.excess), None)

    def reaches_zero(self, label: str) -> bool:
        """Whether a row shows no extraction: the interval of its excess reaches zero."""
        interval = self.excess[label].interval
        return interval is None or interval[0] <= 0


def rank_rows(rows: Sequence[Row], band: str = MAIN_BAND) -> Ranking:
    """Ranks by excess AMS; ties where the paired comparison cannot tell.

    A rank counts who is distinguishably above, so that it never rests on a difference that could
    be chance; of three rows, the outer two may differ while both tie with the middle one.
    """
    found = {row.label: row.band("calibrated", band, "excess") for row in rows}
    known = {label: e for label, e in found.items() if e is not None and e.interval is not None}
    excess = dict(sorted(known.items(), key=lambda item: (-item[1].value, item[0])))
    above: dict[str, set[str]] = {label: set() for label in excess}
    pairs = excess_by_pairs(rows, band) if len(excess) == len(rows) else None
    if pairs is not None:
        for (first, second), difference in pairs.items():
            if difference.distinguishable:
                higher, lower = (first, second) if difference.value > 0 else (second, first)
                above[lower].add(higher)
    else:
        for label, mine in excess.items():
            above[label] = {
                name for name, e in excess.items() if e.value > mine.value and not e.overlaps(mine)
            }
    return Ranking(excess, {k: frozenset(v) for k, v in above.items()}, pairs is not None)


@dataclass(frozen=True)
class Ranked:
    """A section with its rows in order, best first, and a ranking for each band."""

    section: Section
    rows: tuple[Row, ...]
    by_band: Mapping[str, Ranking]

    @property
    def main(self) -> Ranking:
        return self.by_band[MAIN_BAND]


def rank_section(section: Section) -> Ranked:
    by_band = {band: rank_rows(section.rows, band) for band in BANDS}
    main = by_band[MAIN_BAND]

    def place(row: Row) -> tuple[int, float, str]:
        excess = main.excess.get(row.label)
        return main.rank(row.label) or 10**6, -excess.value if excess else 1.0, row.label

    return Ranked(section, tuple(sorted(section.rows, key=place)), by_band)
