"""How much is measured: in full, and in the short form that only shows that it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """Times in seconds. Those that take long have an extent of their own, and T10 rounds of its own."""

    rounds: int = 5
    seconds: float = 15.0
    warm_up: float = 2.0
    connections: int = 256
    # T5, T6 and C; T7; each rate of LOAD; T13 and T15.
    events_seconds: float = 20.0
    paced_seconds: float = 30.0
    load_rates: tuple[float, ...] = (100.0, 500.0, 1000.0, 2000.0, 3000.0)
    load_seconds: float = 5.0
    idle_seconds: float = 30.0
    # T8.
    drain_rows: int = 1_000_000
    drain_publishers: tuple[int, ...] = (1, 2, 4)
    # T9.
    growth_orders: int = 10_000_000
    # T10: how long the transaction is open, and the load before and after it.
    pinned_seconds: float = 900.0
    pinned_before: float = 30.0
    pinned_after: float = 60.0
    pinned_rounds: int = 1
    # T11's open loop, orders a second: some quarter of what the cores can do.
    retries_rate: float = 1_000.0
    # T16.
    scaling_seconds: float = 10.0
    scaling_workers: tuple[int, ...] = (1, 2, 4, 8)
    scaling_publishers: tuple[int, ...] = (1, 2, 4)

    def rounds_of(self, name: str) -> int:
        """How many rounds measure that benchmark."""
        return min(self.rounds, self.pinned_rounds) if name == "T10" else self.rounds


QUICK = Extent(
    rounds=1, seconds=1.0, warm_up=0.3, connections=64, events_seconds=1.0, paced_seconds=1.5, load_rates=(50.0, 200.0),
    load_seconds=1.0, idle_seconds=2.0, drain_rows=20_000, drain_publishers=(1, 2), growth_orders=20_000, pinned_seconds=4.0,
    pinned_before=1.0, pinned_after=1.0, retries_rate=100.0, scaling_seconds=2.0, scaling_workers=(1, 2), scaling_publishers=(),
)  # fmt: skip
