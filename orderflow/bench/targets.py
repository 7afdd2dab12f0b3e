"""The figures of the report as data: what each is, what it is set beside, and what it is to reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from orderflow.bench.extent import Extent
from orderflow.bench.figures import Comparison, Figure, Target, at_least, at_most
from orderflow.bench.throughput import ONE_PROCESS, SPLITS

ORDERS: Final = "orders/s"
EVENTS: Final = "events/s"
FROM_COMMIT: Final = "commit returned to record received"
FROM_DUE: Final = "due to record received"
END_TO_END: Final = "HTTP POST to PAID, gateway 0 ms"


@dataclass(frozen=True, slots=True)
class Line:
    """A figure as it is declared; `beside` are references by name, each with the target for the ratio to it."""

    name: str
    what: str
    unit: str
    target: Target | None = None
    beside: tuple[tuple[str, Target | None], ...] = ()


def lines(extent: Extent) -> Iterator[Line]:
    """Every line of the report, in its order."""
    yield Line("A", "bare aiohttp answers the same POST and stores nothing", "requests/s")
    yield Line("B", "pgbench -c 8, one order's five transactions step by step", ORDERS)
    yield from _of_events("C 50/s", "a producer right after the commit, 1 connection", (), ())
    yield from _of_events("C 500/s", "a producer right after the commit, 8 connections", (), ())
    yield Line("D", "SQL by hand in groups of 500, no HTTP, no Kafka", ORDERS)
    yield Line("T1", f"{END_TO_END}, best split", ORDERS, None, (
        ("B", at_least(5, ">= 5 x B")), ("D", at_least(0.4, ">= 40 % of D")),
    ))  # fmt: skip
    for split in SPLITS:
        if split != ONE_PROCESS:
            yield Line(f"T1 {split}", f"{END_TO_END}, `run {' '.join(SPLITS[split])}`", ORDERS, None, (("B", None),))
    yield Line("T2", f"{END_TO_END}, one process", ORDERS, None, (("B", at_least(3, ">= 3 x B")),))
    yield Line("T3", "POST accepted durably, one API process", ORDERS, None, (("A", at_least(0.5, ">= 50 % of A")),))
    yield Line("T4", "T1 with the gateway at 500 ms", ORDERS, None, (("T1", at_least(0.9, ">= 90 % of T1")),))
    yield from _of_events(
        "T5", "50 events/s, 1 connection",
        (("C 50/s p50", at_most(2, "<= 2 x C's p50")),), (("C 50/s p99", at_most(2.5, "<= 2.5 x C's p99")),),
    )  # fmt: skip
    yield from _of_events(
        "T6", "500 events/s, 8 connections",
        (("C 500/s p50", at_most(3, "<= 3 x C's p50")),), (("C 500/s p99", at_most(2, "<= 2 x C's p99")),),
    )  # fmt: skip
    yield Line("T7 p50", f"{END_TO_END}, 20/s", "ms", at_most(9, "<= 9 ms"))
    yield Line("T7 p99", f"{END_TO_END}, 20/s", "ms", at_most(30, "<= 30 ms"))
    yield from _of_drain(extent)
    yield Line("T9", f"T1 with {extent.growth_orders:,} settled orders there", ORDERS, None, (
        ("T1", at_least(0.9, ">= 90 % of T1")),
    ))  # fmt: skip
    yield Line("T10 before", f"{END_TO_END}, before a transaction pins xmin", ORDERS)
    yield Line("T10", f"the same while it does, {extent.pinned_seconds:g} s", ORDERS, None, (
        ("T10 before", at_least(0.7, ">= 70 %")),
    ))  # fmt: skip
    yield Line(
        "T10 after", "the same within a minute of its end", ORDERS, None, (("T10 before", at_least(0.9, "back (>= 90 %)")),)
    )
    yield Line("T11 plain", "T1 by what is PAID while the load lasts", ORDERS)
    yield Line("T11", "the same, 20 % of charges fail once", ORDERS, None, (("T11 plain", at_least(0.8, ">= 80 %")),))
    at = f"at {extent.retries_rate:g}/s"
    yield Line("T11 plain p99", f"created to PAID {at}, no charge fails", "ms")
    yield Line("T11 p99", f"created to PAID {at} of orders without a retry", "ms", None, (
        ("T11 plain p99", at_most(1.5, "none waits for another's (<= 1.5 x)")),
    ))  # fmt: skip
    yield from _of_the_rest(extent)


def _of_events(
    name: str, what: str, p50: tuple[tuple[str, Target], ...], p99: tuple[tuple[str, Target], ...]
) -> Iterator[Line]:
    yield Line(f"{name} p50", f"{FROM_COMMIT}, {what}", "ms", None, p50)
    yield Line(f"{name} p99", f"{FROM_COMMIT}, {what}", "ms", None, p99)
    yield Line(f"{name} due p50", f"{FROM_DUE}, {what}", "ms")
    yield Line(f"{name} due p99", f"{FROM_DUE}, {what}", "ms")


def _of_drain(extent: Extent) -> Iterator[Line]:
    for count in extent.drain_publishers:
        target = at_least(20_000, ">= 20,000") if count == 1 else None
        yield Line(f"T8 {processes(count, 'publisher')}", f"the relay drains {extent.drain_rows:,} rows", EVENTS, target)
    yield Line("T8 best", "the number of publishers that won the first round", EVENTS, at_least(40_000, ">= 40,000"))
    yield Line("T8 last tenth", "its rate, divided by that of the first tenth", "x", at_least(0.9, ">= 90 %"))
    yield Line("T8 memory", "the largest peak of a publisher", "MB", at_most(150, "<= 150 MB"))


def _of_the_rest(extent: Extent) -> Iterator[Line]:
    yield Line("T12 alone", "T1 by what is PAID while the load lasts", ORDERS)
    yield Line("T12 spread", "the same beside as many other events, a key each", ORDERS, None, (("T12 alone", None),))
    yield Line("T12", "the same beside as many events of one key", ORDERS, None, (
        ("T12 spread", at_least(0.8, ">= 80 %")), ("T12 alone", None),
    ))  # fmt: skip
    yield Line("T13 CPU", "idle, all roles: of one core", "%", at_most(1, "<= 1 %"))
    yield Line("T13 statements", "idle, all roles", "1/s", at_most(5, "<= 5 a second"))
    yield Line("T14 ready", "`orderflow run` to 200 on /readyz, servers up", "s", at_most(1.5, "<= 1.5 s"))
    yield Line("T14 help", "`orderflow --help`", "s", at_most(0.2, "<= 0.2 s"))
    yield Line("T15", "resident memory of an idle process with all roles", "MB", at_most(90, "<= 90 MB"))
    falls = at_least(0.95, "never falls (>= 0.95 of the one before)")
    for role, counts in (("worker", extent.scaling_workers), ("publisher", extent.scaling_publishers)):
        for before, count in zip((None, *counts), counts, strict=False):
            beside = ((f"T16 {processes(before, role)}", falls),) if before else ()
            yield Line(f"T16 {processes(count, role)}", "T1 with the gateway at 500 ms", ORDERS, None, beside)
    yield Line("T16 rebalance", "longest stall after one more worker process", "s", at_most(2.99, "< 3 s"))
    yield Line("T17 off", "T1 without a log", ORDERS)
    yield Line("T17", "T1, its log as JSON to a file", ORDERS, None, (("T17 off", at_least(0.9, ">= 90 %")),))
    for rate in extent.load_rates:
        for share in ("p50", "p99"):
            yield Line(f"LOAD {rate:g}/s {share}", END_TO_END, "ms")


def processes(count: int, role: str) -> str:
    """For people: `1 publisher`, `2 publishers`."""
    return f"{count} {role}{'s' * (count != 1)}"


def figures(extent: Extent) -> dict[str, Figure]:
    """A figure without values for each line, by name, set beside each other as declared."""
    declared = list(lines(extent))
    found = {line.name: Figure(line.name, line.what, line.unit, line.target) for line in declared}
    for line in declared:
        found[line.name].beside = [Comparison(found[name], target) for name, target in line.beside]
    return found
