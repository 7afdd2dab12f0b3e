"""Figures over several rounds: median, smallest and largest, and the ratio to the reference of the same round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def as_json(self) -> dict[str, float]:
        """The JSON object of the report."""
        return {"median": self.median, "min": self.low, "max": self.high}


@dataclass(slots=True)
class Figure:
    """One line of the report: a value a round; `reference` is the figure that it is divided by, round by round."""

    name: str
    what: str
    unit: str
    values: list[float] = field(default_factory=list)
    reference: Figure | None = None

    @property
    def spread(self) -> Spread:
        """Of the values."""
        return Spread.of(self.values)

    @property
    def ratio(self) -> Spread | None:
        """To the reference, each round to its own; None without a reference."""
        if self.reference is None:
            return None
        pairs = zip(self.values, self.reference.values, strict=True)
        return Spread.of([value / reference for value, reference in pairs])

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the report."""
        ratio = self.ratio
        return {
            "name": self.name, "what": self.what, "unit": self.unit, "values": self.values, **self.spread.as_json(),
            "reference": self.reference.name if self.reference else None, "ratio": ratio.as_json() if ratio else None,
        }  # fmt: skip


def best_of(name: str, figures: Sequence[Figure]) -> Figure:
    """The one with the largest median, under another name. (The best of each round would be luck, added up.)"""
    best = max(figures, key=lambda figure: figure.spread.median)
    return Figure(name, f"the better one: {best.name}", best.unit, best.values, best.reference)
