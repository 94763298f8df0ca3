"""The head of a board: where the bands come from, and what fixed bands mean on real images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from membench.hashing import canonical_json
from membench.report.markdown import escaped, table
from membench.report.records import Record
from membench.report.table import BANDS, percent
from membench.similarity.measures import MEASURES, NL2


def calibration_lines(records: Iterable[Record]) -> list[str]:
    """One block per distinct calibration: a data set that was never revised has one."""
    found: dict[str, tuple[Any, Mapping[str, Any], Mapping[str, Any]]] = {}
    for record in records:
        calibration = record.get("calibration")
        if calibration:
            revision = record["identity"]["dataset"].get("revision", "?")
            block = (revision, calibration, record.get("null") or {})
            found.setdefault(canonical_json(block), block)
    parts = []
    for _, (revision, calibration, null) in sorted(found.items()):
        which = "" if len(found) == 1 else f", data set revision {escaped(revision)}"
        parts += [f"## Bands{which}", *_block(calibration, null)]
    return parts


def _block(calibration: Mapping[str, Any], null: Mapping[str, Any]) -> list[str]:
    measure = MEASURES[calibration.get("measure", NL2.name)]
    sign = "≤" if measure.sign == 1 else "≥"
    images = f"{calibration['n_heldout']:,} real held-out images"
    dropped = calibration.get("n_dropped")
    if dropped:
        images += f" ({dropped:,} near-duplicates of members dropped before)"
    text = (
        f"Calibrated bands: {images} that nobody trained on are scored against the "
        f"{calibration['n_members']:,} members; a band's threshold is the {measure.symbol} that "
        "only the given share of them reaches."
    )
    rows = []
    for name in BANDS:
        found = calibration["thresholds"][name]
        rows.append([
            name,
            f"{100 * found['rate']:g}",
            "–" if found["value"] is None else f"{sign} {found['value']:.3f}",
            _interval(found["interval"], 1, 3),
            percent(found["achieved"], 2),
            _interval(found["achieved_interval"], 100, 2),
        ])  # fmt: skip
    headers = ["band", "false matches asked for, %", measure.symbol, "95 % interval",
               "reached by, %", "95 % interval"]  # fmt: skip
    parts = [text, table(headers, rows)]
    for mode, levels in (null.get("bands") or {}).items():
        papers = [levels[name] for name in BANDS]
        bounds = " / ".join(_bounds(band) for band in papers)
        rates = " / ".join(percent(band["rate"]) for band in papers)
        parts.append(
            f"The papers' fixed bands ({escaped(mode)}), {measure.symbol} {bounds}, are reached by "
            f"**{rates} %** of the same "
            "real images: of what they count, that much would be counted without any extraction."
        )
    return parts


def _bounds(band: Mapping[str, Any]) -> str:
    """`≤ 1.5`, `≥ 0.6`, `0.4 to 0.5`."""
    lower, upper = band.get("lower"), band.get("upper")
    if lower is not None and upper is not None:
        return f"{lower:g} to {upper:g}"
    return f"≤ {upper:g}" if lower is None else f"≥ {lower:g}"


def _interval(bounds: Iterable[float | None], factor: float, digits: int) -> str:
    low, high = ("–" if b is None else f"{factor * b:.{digits}f}" for b in bounds)
    return f"\\[{low}, {high}\\]"
