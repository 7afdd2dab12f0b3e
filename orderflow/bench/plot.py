"""The report's plot: accepted and paid over time in T1, T2 and T4, and the latency of T7 by offered load."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from orderflow.bench.chart import Axis, Panel, Series, decades, document, scale
from orderflow.bench.load import SLOT
from orderflow.bench.paced import Paced
from orderflow.bench.results import Results
from orderflow.bench.throughput import ONE_PROCESS, Throughput

WIDTH, PANEL_HEIGHT, FOOT = 1080.0, 290.0, 30.0


def plot(results: Results, head: dict[str, Any]) -> str | None:
    """The SVG of the last round's runs; None when nothing of it was measured."""
    one, best = "T2", f"T1 {results.split}"
    titled = {
        "T1": (best if results.split != ONE_PROCESS else one, f"T1, {results.split}, gateway 0 ms"),
        "T2": (one, "T2, one process, gateway 0 ms"),
        "T4": ("T4", f"T4, {results.split}, gateway 500 ms"),
    }
    runs = [(title, results.details[name][-1]) for name, title in titled.values() if name in results.details]
    panels = _over_time(runs)
    if "LOAD" in results.details:
        top = PANEL_HEIGHT if panels else 0.0
        panels.append(_by_load(results.details["LOAD"], top))
    if not panels:
        return None
    note = (
        f"orderflow {head['orderflow']} ({head['commit'] or 'no checkout'}), PostgreSQL {head['postgresql']}, "
        f"broker: {head['broker']}, {head['cpus']} CPUs, {head['python']}"
    )
    height = panels[-1].top + PANEL_HEIGHT + FOOT
    return document(panels, note, width=WIDTH, height=height)


def _over_time(runs: Sequence[tuple[str, Throughput]]) -> list[Panel]:
    if not runs:
        return []
    drawn = []
    for title, run in runs:
        drawn.append((title, _series("accepted", run.load.accepted_over_time), _series("PAID", run.paid_over_time)))
    every = [point for _, *both in drawn for series in both for point in series.points]
    # The same axes on all of them: what is to be compared must not need arithmetic.
    x = scale("seconds since the first POST", (x for x, _ in every))
    y = scale("orders/s", (y for _, y in every))
    width = WIDTH / len(drawn)
    return [
        Panel(title, x, y, both, number * width, 0.0, width, PANEL_HEIGHT) for number, (title, *both) in enumerate(drawn)
    ]  # fmt: skip


def _series(name: str, slots: Sequence[int]) -> Series:
    return Series(name, [((at + 0.5) * SLOT, count / SLOT) for at, count in enumerate(slots)])


def _by_load(rounds: Sequence[Sequence[Paced]], top: float) -> Panel:
    """Medians over the rounds."""
    series = [
        Series(share, [(same[0].rate, median(paced.paid[share] for paced in same)) for same in zip(*rounds, strict=True)])
        for share in ("p50", "p99")
    ]
    points = [point for one in series for point in one.points]
    x = decades("offered orders/s, at fixed arrival times", (x for x, _ in points))
    y: Axis = decades("ms from due to PAID", (y for _, y in points))
    return Panel("Latency by load, one process, gateway 0 ms", x, y, series, 0.0, top, WIDTH, PANEL_HEIGHT)
