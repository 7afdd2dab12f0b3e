"""Figures over several rounds: median, smallest and largest, the ratio to a reference of the same round, and the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached, in words; `reached` judges the median of a figure, or of a ratio."""

    text: str
    reached: Callable[[float], bool]

    def verdict(self, spread: Spread) -> str:
        """`met` or `missed`."""
        return "met" if self.reached(spread.median) else "missed"


def at_least(bound: float, text: str) -> Target:
    """The larger the better."""
    return Target(text, lambda value: value >= bound)


def at_most(bound: float, text: str) -> Target:
    """The smaller the better."""
    return Target(text, lambda value: value <= bound)


@dataclass(slots=True)
class Figure:
    """One thing that is measured: a value for each round, by the round's number. `beside`: what it is set beside."""

    name: str
    what: str
    unit: str
    target: Target | None = None
    values: dict[int, float] = field(default_factory=dict)
    beside: list[Comparison] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        """Of the values."""
        return Spread.of(list(self.values.values()))

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the report."""
        return {
            "name": self.name, "what": self.what, "unit": self.unit, "values": list(self.values.values()),
            "rounds": list(self.values), **self.spread.as_json(), **_judged(self.target, self.spread),
            "beside": [comparison.as_json(self) for comparison in self.beside if comparison.ratio(self)],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """A reference, and what the ratio to it is to be."""

    reference: Figure
    target: Target | None

    def rounds(self, figure: Figure) -> list[int]:
        """Those in which both were measured, and the reference is not 0: a ratio is worth something only within a round."""
        return [number for number in figure.values if self.reference.values.get(number)]

    def ratio(self, figure: Figure) -> Spread | None:
        """The figure divided by the reference, each round by itself; None where no round has both."""
        rounds = self.rounds(figure)
        return Spread.of([figure.values[n] / self.reference.values[n] for n in rounds]) if rounds else None

    def reference_median(self, figure: Figure) -> float:
        """The reference's in the same rounds."""
        return median(self.reference.values[number] for number in self.rounds(figure))

    def as_json(self, figure: Figure) -> dict[str, Any]:
        """The JSON object of the report, of a comparison that has a ratio."""
        ratio = self.ratio(figure)
        assert ratio is not None
        return {
            "reference": self.reference.name, "referenceMedian": self.reference_median(figure), "ratio": ratio.as_json(),
            **_judged(self.target, ratio),
        }  # fmt: skip


def _judged(target: Target | None, spread: Spread) -> dict[str, str | None]:
    return {"target": target.text if target else None, "verdict": target.verdict(spread) if target else None}
