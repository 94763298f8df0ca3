"""The summary board: methods across data sets, and what the worst of them gets out of each target.

`leaderboards/README.md`, from the same records as the boards it leads to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from membench.report.board import GENERATED, mitigated
from membench.report.cells import bold_names, bracketed, code_text, count_of, percent_cell
from membench.report.markdown import escaped, table
from membench.report.ranking import Ranked
from membench.report.records import Row
from membench.report.table import MAIN_BAND, percent

NAME = "README.md"


@dataclass(frozen=True)
class Standing:
    """One method over all the sections in which it was run.

    ranks: its rank in each; first: in how many of them nobody is distinguishably above it, though
    something was extracted at all; excess: mean over sections, of the main band.
    """

    method: str
    ranks: tuple[int, ...]
    first: int
    excess: float | None
    calls: float

    @property
    def mean_rank(self) -> float:
        return sum(self.ranks) / len(self.ranks)


def standings(boards: Mapping[str, Sequence[Ranked]]) -> tuple[list[Standing], int]:
    """Every method's standing, best mean rank first, and how many sections there are.

    A method that stands in a section with several settings counts there by its best one.
    """
    sections = [ranked for _, found in sorted(boards.items()) for ranked in found]
    names = sorted({_method(row) for ranked in sections for row in ranked.rows})
    found = []
    for name in names:
        ranks, excess, calls, first = [], [], [], 0
        for ranked in sections:
            mine = [row for row in ranked.rows if _method(row) == name]
            places = [(rank, row) for row in mine if (rank := ranked.main.rank(row.label))]
            if not places:
                continue
            rank, row = min(places, key=lambda place: place[0])
            ranks.append(rank)
            first += rank == 1 and not ranked.main.reaches_zero(row.label)
            excess.append(ranked.main.excess[row.label].value)
            costs = [record["cost"] for record in row.records]
            calls.append(sum(c["unet_calls"] + c.get("classifier_calls", 0) for c in costs)
                         / len(costs))  # fmt: skip
        if ranks:
            mean = sum(excess) / len(excess)
            found.append(Standing(name, tuple(ranks), first, mean, sum(calls) / len(calls)))
    found.sort(key=lambda s: (-len(s.ranks), s.mean_rank, -(s.excess or 0), s.method))
    return found, len(sections)


def _method(row: Row) -> str:
    return str(row.records[0]["identity"]["method"]["name"])


def summary(boards: Mapping[str, Sequence[Ranked]], others: Sequence[str] = ()) -> str:
    """The Markdown of the summary board.

    boards: ranked sections by data set; others: data sets that have a board, but no runs yet.
    """
    runs = sum(len(r.records) for found in boards.values() for ranked in found for r in ranked.rows)
    found, total = standings(boards)
    parts = [
        "\n".join([
            "# What comes back out of diffusion models",
            "",
            GENERATED,
            "",
            f"{count_of(runs, 'run')} of {count_of(len(found), 'method')} on "
            f"{count_of(total, 'target')} of {count_of(len(boards), 'data set')}. Percentages are "
            f"of generated images, in the calibrated {MAIN_BAND} band; excess is members minus "
            "held-out images; brackets are 95 % intervals.",
        ])
    ]  # fmt: skip
    parts += ["## Methods", _method_rule(), _methods(found, total)]
    parts += _worst_part(boards)
    links = [f"- [{escaped(name)}]({_link(name)}.md)" for name in sorted(boards)]
    links += [
        f"- [{escaped(name)}]({_link(name)}.md): what chance gives; no runs yet"
        for name in sorted(set(others) - boards.keys())
    ]
    parts += ["## Boards", "\n".join(links)]
    return "\n\n".join(parts) + "\n"


def _method_rule() -> str:
    return (
        "Ranked by the mean of a method's ranks over all targets; in each, a rank is 1 + how many "
        "methods are higher by more than chance, so methods that cannot be told apart share it. A "
        "method that was not run on every target is listed, but has no place. *First*: targets "
        "where nothing is distinguishably above it and its excess is."
    )


def _methods(found: Sequence[Standing], total: int) -> str:
    whole = [s.mean_rank for s in found if len(s.ranks) == total]
    body = []
    for s in found:
        place = "–"
        if len(s.ranks) == total:
            place = f"{1 + sum(rank < s.mean_rank for rank in whole)}"
            place += "=" if whole.count(s.mean_rank) > 1 else ""
        body.append([
            place,
            escaped(s.method),
            f"{len(s.ranks)} of {total}",
            f"{s.mean_rank:.2f}",
            f"{s.first} of {len(s.ranks)}",
            percent(s.excess),
            f"{s.calls:,.0f}",
        ])  # fmt: skip
    headers = ["place", "method", "targets", "mean rank", "first", "mean excess AMS, %",
               "network calls a run"]  # fmt: skip
    return table(headers, body, left=2)


def _worst_part(boards: Mapping[str, Sequence[Ranked]]) -> list[str]:
    """Per target, the method that gets most out of it: what its owner has to reckon with."""
    body = []
    for dataset, found in sorted(boards.items()):
        for ranked in found:
            best, section = ranked.main.best, ranked.section
            if best is None:
                continue
            row = next(row for row in ranked.rows if row.label == best)
            tied = [
                name for name in ranked.main.excess
                if name != best and best not in ranked.main.above[name]
            ]  # fmt: skip
            excess = ranked.main.excess[best]
            body.append((
                -excess.value,
                [
                    escaped(dataset),
                    f"`{code_text(section.target)}`{mitigated(section)}",
                    escaped(best),
                    f"**{bracketed(excess)}**",
                    percent_cell(row.band("calibrated", MAIN_BAND, "heldout")),
                    bracketed(row.band("calibrated", MAIN_BAND, "members", "ums")),
                    str(len(ranked.rows)),
                    bold_names(tied) if tied else "none",
                ],
            ))  # fmt: skip
    if not body:
        return []
    headers = ["data set", "target", "worst case", "**excess AMS, %**", "held-out, %", "UMS, %",
               "methods tried", "cannot be told from it"]  # fmt: skip
    return [
        "## Targets",
        "The worst case over methods: the one that extracted most, by excess AMS. Its interval is "
        "that of one method and does not allow for its having been picked as the highest; a target "
        "is as safe as the attacks that were tried.",
        table(headers, [cells for _, cells in sorted(body)], left=3),
    ]


def _link(name: str) -> str:
    """A data set's name in an address; `add` lets no other characters in."""
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in name)
