"""What the rounds came to: figures, everything behind them, and the audits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orderflow.bench.cost import Cost
from orderflow.bench.figures import Figure
from orderflow.bench.throughput import ONE_PROCESS, Audited
from orderflow.bench.usage import Usage


@dataclass(frozen=True, slots=True)
class Reference:
    """One run of a reference for throughput: what it did in how many seconds, and what that took."""

    orders: float
    seconds: float
    usage: list[Usage]
    detail: Any = None
    cost: Cost | None = None

    @property
    def orders_per_second(self) -> float:
        """The figure."""
        return self.orders / self.seconds


@dataclass(slots=True)
class Results:
    """`figures` by name, also those without a value; `details` by benchmark: what each round measured, as it was returned.

    `failures` says what could not be measured; `split` is the one in which T1, and what follows it, was measured.
    """

    figures: dict[str, Figure]
    details: dict[str, list[Any]] = field(default_factory=dict)
    audits: list[Audited] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    split: str = ONE_PROCESS

    @property
    def measured(self) -> list[Figure]:
        """Those with a value."""
        return [figure for figure in self.figures.values() if figure.values]

    @property
    def problems(self) -> list[str]:
        """Everything that makes the figures worthless, and every benchmark that came to none."""
        violated = [f"{audited.run}: {problem}" for audited in self.audits for problem in audited.problems]
        return violated + self.failures

    def keep(self, benchmark: str, detail: Any, audits: Sequence[Audited]) -> None:
        """One round's detail, and the audits of its runs."""
        self.details.setdefault(benchmark, []).append(detail)
        self.audits += audits
