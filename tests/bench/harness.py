"""Rows of measurements: what was measured, against which ceiling, and whether that is good enough."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any

from rich.table import Table


class Comparison(StrEnum):
    """How a figure must stand to a bound."""

    AT_LEAST = "≥"
    ABOVE = ">"
    AT_MOST = "≤"
    EXACTLY = "="


_HOLDS = {
    Comparison.AT_LEAST: operator.ge,
    Comparison.ABOVE: operator.gt,
    Comparison.AT_MOST: operator.le,
    Comparison.EXACTLY: operator.eq,
}


@dataclass(frozen=True, slots=True)
class Bound:
    """What a row's figure has to reach."""

    comparison: Comparison
    value: float

    def __str__(self) -> str:
        return f"{self.comparison} {_number(self.value)}"

    def holds(self, figure: float) -> bool:
        """Whether a figure is good enough."""
        return bool(_HOLDS[self.comparison](figure, self.value))


def at_least(value: float) -> Bound:
    """The figure or more."""
    return Bound(Comparison.AT_LEAST, value)


def above(value: float) -> Bound:
    """More than the figure."""
    return Bound(Comparison.ABOVE, value)


def at_most(value: float) -> Bound:
    """The figure or less."""
    return Bound(Comparison.AT_MOST, value)


def exactly(value: float) -> Bound:
    """That figure and no other."""
    return Bound(Comparison.EXACTLY, value)


@dataclass(slots=True)
class Row:
    """One line of the table, filled run by run.

    Args:
        name: What was measured.
        unit: Of the runs, and of the ceiling where there is one.
        must: What the figure has to reach: the ratio to the ceiling, or without one the median of the runs.
        aim: What it is meant to reach.
        inverse: Whether less is better; then the ratio is ceiling ÷ run, so that more is better again.
        runs: What each run measured.
        ceilings: What was measured beside each run, within the same seconds; empty: there is no ceiling.
        cpu: Microseconds of CPU an event, by process.
        note: What else the reader has to know.
    """

    name: str
    unit: str
    must: Bound | None = None
    aim: Bound | None = None
    inverse: bool = False
    runs: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    cpu: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def add(self, run: float, ceiling: float | None = None) -> None:
        """Note a run, and what its ceiling was right before or after it."""
        self.runs.append(run)
        if ceiling is not None:
            self.ceilings.append(ceiling)

    @property
    def value(self) -> float:
        """The median of the runs."""
        return median(self.runs)

    @property
    def ratio(self) -> float | None:
        """The median of run ÷ its own ceiling: what slows a machine for a while slows both."""
        if not self.ceilings:
            return None
        pairs = zip(self.runs, self.ceilings, strict=True)
        return median(ceiling / run if self.inverse else run / ceiling for run, ceiling in pairs)

    @property
    def passed(self) -> bool | None:
        """Whether the row reaches its *must*; None: it has none."""
        figure = self.value if self.ratio is None else self.ratio
        return None if self.must is None else self.must.holds(figure)

    @property
    def summary(self) -> str:
        """The row in one line."""
        ratio = "" if self.ratio is None else f", ratio {self.ratio:.2f}"
        return f"{self.name}: {_number(self.value)} {self.unit}{ratio}"

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.value,
            "runs": self.runs,
            "ceiling_median": median(self.ceilings) if self.ceilings else None,
            "ceilings": self.ceilings,
            "ratio": self.ratio,
            "must": None if self.must is None else str(self.must),
            "aim": None if self.aim is None else str(self.aim),
            "passed": self.passed,
            "cpu_microseconds_an_event": dict(self.cpu),
            "note": self.note,
        }


def rows_table(rows: Sequence[Row]) -> Table:
    """The rows as people read them."""
    table = Table(title="Usameter on this machine", show_lines=True)
    for heading in ("what", "median", "lowest – highest", "ceiling", "ratio", "must", "aim", ""):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        table.add_row(
            f"{row.name}\n[dim]{row.note}[/dim]" if row.note else row.name,
            f"{_number(row.value)} {row.unit}",
            f"{_number(min(row.runs))} – {_number(max(row.runs))}",
            _number(median(row.ceilings)) if row.ceilings else "",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.must is None else str(row.must),
            "" if row.aim is None else str(row.aim),
            {None: "", True: "[green]pass[/green]", False: "[red]FAIL[/red]"}[row.passed],
        )
    return table


def cpu_table(rows: Sequence[Row]) -> Table:
    """Microseconds of CPU an event, by process, of the rows that have them."""
    measured = [row for row in rows if row.cpu]
    processes = list(dict.fromkeys(name for row in measured for name in row.cpu))
    table = Table("what", *processes, "all", title="CPU, µs an event")
    for row in measured:
        figures = [f"{row.cpu.get(name, 0.0):.1f}" for name in processes]
        table.add_row(row.name, *figures, f"{sum(row.cpu.values()):.1f}")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
