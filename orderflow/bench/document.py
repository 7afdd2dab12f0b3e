"""The report as JSON: everything, so that whoever doubts a figure can count again."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

import orjson

from orderflow.bench.extent import Extent
from orderflow.bench.results import Reference, Results
from orderflow.bench.throughput import Throughput

MICROSECONDS = 1e6


def as_json(head: dict[str, Any], results: Results, extent: Extent) -> str:
    """The head, each figure with every round's value, each round's details as they were measured, and the audits."""
    document = {
        **head,
        "extent": extent,
        "split": results.split,
        "figures": [figure.as_json() for figure in results.measured],
        "costs": costs(results),
        "details": results.details,
        "audits": [
            {"run": a.run, "findings": [{**asdict(f), "verdict": f.verdict} for f in a.findings], "problems": a.problems}
            for a in results.audits
        ],
        "sound": not results.problems,
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode() + "\n"


def costs(results: Results) -> dict[str, dict[str, Any]]:
    """By benchmark: `cpu` microseconds an order and `peak` bytes by process, and `cost`, what PostgreSQL counted.

    Medians of the rounds, the largest of the peaks. Processes of one name are one: their CPU time together.
    """
    found = {}
    for name, runs in results.details.items():
        measured = [run for run in runs if isinstance(run, Throughput | Reference) and run.orders]
        if not measured:
            continue
        processes = dict.fromkeys(usage.name for run in measured for usage in run.usage)
        found[name] = {
            "cpu": {process: median(_cpu(run, process) for run in measured) for process in processes},
            "peak": {process: max(_peaks(measured, process)) for process in processes},
            "cost": _median_cost(measured),
        }
    return found


def _cpu(run: Throughput | Reference, process: str) -> float:
    return sum(usage.cpu_seconds for usage in run.usage if usage.name == process) / run.orders * MICROSECONDS


def _peaks(runs: list[Throughput | Reference], process: str) -> list[int]:
    return [usage.peak_bytes for run in runs for usage in run.usage if usage.name == process]


def _median_cost(runs: list[Throughput | Reference]) -> dict[str, float]:
    costs = [asdict(run.cost) for run in runs if run.cost is not None]
    return {
        name: median(cost[name] for cost in costs) for name in (costs[0] if costs else ()) if costs[0][name] is not None
    }  # fmt: skip
