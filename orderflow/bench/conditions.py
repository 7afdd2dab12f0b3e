"""What each of T8 to T17 measures in a round: with a backlog, a full database, retries, or nothing to do. STEPS names them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from orderflow.bench import drain, growth, hot_key, idle, pinned, retries, scaling, startup
from orderflow.bench.context import Bench
from orderflow.bench.targets import processes

MEGABYTE = 1_000_000


async def _t8(bench: Bench) -> None:
    extent = bench.extent
    counts = extent.drain_publishers if bench.publishers is None else sorted({1, bench.publishers})
    runs = {}
    for count in counts:
        name = f"T8 {processes(count, 'publisher')}"
        bench.say(name)
        run = runs[count] = await drain.measure(bench.servers, bench.directory, rows=extent.drain_rows, publishers=count)
        bench.results.keep(name, run, [run.audited])
        bench.take(name, run.events_per_second)
    if bench.publishers is None:
        bench.publishers = max(runs, key=lambda count: runs[count].events_per_second)
    best = runs[bench.publishers]
    bench.take("T8 best", best.events_per_second)
    bench.take("T8 last tenth", best.last_rate / best.first_rate)
    if peaks := [peak for run in runs.values() for peak in run.peak_bytes]:
        bench.take("T8 memory", max(peaks) / MEGABYTE)


async def _t9(bench: Bench) -> None:
    if bench.filled is None:
        bench.say(f"T9, filling in {bench.extent.growth_orders:,} orders")
        bench.filled = await bench.stack.enter_async_context(growth.filled(bench.servers, bench.extent.growth_orders))
    bench.take("T9", (await bench.throughput("T9", bench.best_split, target=bench.filled)).orders_per_second)


async def _t10(bench: Bench) -> None:
    extent = bench.extent
    bench.say("T10, pinned xmin")
    run = await pinned.measure(
        bench.servers, bench.directory, split=bench.best_split, seconds=extent.pinned_seconds, connections=extent.connections,
        warm_up=extent.warm_up, before=extent.pinned_before, after=extent.pinned_after,
    )  # fmt: skip
    bench.results.keep("T10", run, [run.audited])
    for figure, value in (("T10 before", run.before), ("T10", run.during_rate), ("T10 after", run.after_rate)):
        bench.take(figure, value)


async def _t11(bench: Bench) -> None:
    bench.say("T11, retries")
    run = await retries.measure(
        bench.servers, bench.directory, split=bench.best_split, rate=bench.extent.retries_rate, **bench.under_load()
    )
    bench.results.keep("T11", run, run.audits)
    for figure, value in (
        ("T11 plain", run.plain.orders_per_second), ("T11", run.failing.orders_per_second),
        ("T11 plain p99", run.plain.untouched_p99), ("T11 p99", run.failing.untouched_p99),
    ):  # fmt: skip
        bench.take(figure, value)


async def _t12(bench: Bench) -> None:
    bench.say("T12, one hot key")
    run = await hot_key.measure(bench.servers, bench.directory, split=bench.best_split, **bench.under_load())
    bench.results.keep("T12", run, run.audits)
    for figure, one in (("T12 alone", run.alone), ("T12 spread", run.spread), ("T12", run.hot)):
        bench.take(figure, one.orders_per_second)


async def _t13(bench: Bench) -> None:
    bench.say("T13 and T15, idle")
    run = await idle.measure(bench.servers, bench.directory, seconds=bench.extent.idle_seconds, warm_up=bench.extent.warm_up)
    bench.results.keep("T13", run, [run.audited])
    bench.take("T13 CPU", run.cpu_share * 100)
    bench.take("T13 statements", run.statements_per_second)


async def _t15(bench: Bench) -> None:
    # The very process that T13 has watched.
    bench.take("T15", bench.results.details["T13"][-1].resident_bytes / MEGABYTE)


async def _t14(bench: Bench) -> None:
    bench.say("T14, start")
    bench.take("T14 ready", await startup.seconds_to_ready(bench.servers, bench.directory))
    bench.take("T14 help", await startup.seconds_to_help())


async def _t16(bench: Bench) -> None:
    extent = bench.extent
    bench.say("T16, more processes")
    run = await scaling.measure(
        bench.servers, bench.directory, seconds=extent.scaling_seconds, connections=extent.connections, warm_up=extent.warm_up,
        workers=extent.scaling_workers, publishers=extent.scaling_publishers,
    )  # fmt: skip
    bench.results.keep("T16", run, run.audits)
    for role, rates in (("worker", run.workers), ("publisher", run.publishers)):
        for count, rate in rates.items():
            bench.take(f"T16 {processes(count, role)}", rate.orders_per_second)
    bench.take("T16 rebalance", run.rebalance.stalled_seconds)


async def _t17(bench: Bench) -> None:
    off = await bench.throughput("T17 off", bench.best_split, settings={"ORDERFLOW_LOG_FORMAT": "off"})
    bench.take("T17 off", off.orders_per_second)
    # T1's own run of this round: its log is JSON to a file.
    bench.take("T17", bench.value("T1"))


STEPS: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "T8": _t8, "T9": _t9, "T10": _t10, "T11": _t11, "T12": _t12, "T13": _t13, "T14": _t14, "T15": _t15, "T16": _t16,
    "T17": _t17,
}  # fmt: skip
