"""The references, and what each of T1 to T7 and LOAD measures in a round: one function each, STEPS has them by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from orderflow.bench import bare, latency, pipeline, reference, throughput, trickle
from orderflow.bench.context import Bench
from orderflow.bench.delivery import Delivered
from orderflow.bench.extent import Extent
from orderflow.bench.results import Reference
from orderflow.bench.throughput import ONE_PROCESS, SPLITS
from orderflow.bench.trickle import Trickle
from orderflow.bench.usage import Meter, Usage, server_roots

DEFAULT_DELAY_MS = 500


async def _a(bench: Bench) -> None:
    bench.say("A, bare aiohttp")
    answered = await bare.measure(bench.directory, **bench.under_load())
    bench.results.keep("A", answered, [])
    bench.take("A", answered.orders_per_second)


async def _b(bench: Bench) -> None:
    bench.say("B, pgbench")
    seconds = bench.extent.seconds
    async with bench.servers.fresh() as target:
        meter = Meter(server_roots(bench.servers))
        meter.start()
        rate = await reference.measure(bench.servers, target, bench.directory, seconds=seconds)
        usage = await meter.stop()
    bench.results.keep("B", Reference(rate * seconds, seconds, usage), [])
    bench.take("B", rate)


def _trickles(extent: Extent) -> tuple[Trickle, Trickle]:
    return (
        Trickle(50.0, 1, extent.events_seconds, extent.warm_up), Trickle(500.0, 8, extent.events_seconds, extent.warm_up),
    )  # fmt: skip


def _take_delivered(bench: Bench, figure: str, delivered: Delivered) -> None:
    for name, document in ((figure, delivered.from_commit), (f"{figure} due", delivered.from_due)):
        for share in ("p50", "p99"):
            bench.take(f"{name} {share}", document[share])


async def _c(bench: Bench) -> None:
    for trickle_ in _trickles(bench.extent):
        figure = f"C {trickle_.rate:g}/s"
        bench.say(figure)
        delivered, audited = await trickle.measure_reference(bench.servers, trickle_)
        bench.results.keep(figure, delivered, [audited])
        _take_delivered(bench, figure, delivered)


async def _events(bench: Bench, figure: str, trickle_: Trickle) -> None:
    bench.say(f"{figure}, {trickle_.rate:g} events/s")
    delivered, audited = await trickle.measure(bench.servers, bench.directory, trickle_)
    bench.results.keep(figure, delivered, [audited])
    _take_delivered(bench, figure, delivered)


async def _t5(bench: Bench) -> None:
    await _events(bench, "T5", _trickles(bench.extent)[0])


async def _t6(bench: Bench) -> None:
    await _events(bench, "T6", _trickles(bench.extent)[1])


async def _d(bench: Bench) -> None:
    bench.say("D, SQL in groups")
    async with bench.servers.fresh() as target:
        meter = Meter(server_roots(bench.servers))
        meter.start()
        settled = await pipeline.measure(target, seconds=bench.extent.seconds, warm_up=bench.extent.warm_up)
        usage = [*await meter.stop(), Usage("client", 0, settled.cpu_seconds, 0)]
    # What was used was used for the warm-up's orders too.
    took = settled.in_all / settled.orders_per_second
    bench.results.keep("D", Reference(settled.in_all, took, usage, settled), [])
    bench.take("D", settled.orders_per_second)


async def _t1(bench: Bench) -> None:
    if bench.split is None:
        rates = {ONE_PROCESS: bench.value("T2")}
        for split in SPLITS:
            if split != ONE_PROCESS:
                rates[split] = (await bench.throughput(f"T1 {split}", split)).orders_per_second
                bench.take(f"T1 {split}", rates[split])
        bench.split = bench.results.split = max(rates, key=lambda split: rates[split])
        bench.take("T1", rates[bench.split])
        return
    if bench.split == ONE_PROCESS:
        bench.take("T1", bench.value("T2"))
        return
    rate = (await bench.throughput(f"T1 {bench.split}", bench.split)).orders_per_second
    bench.take(f"T1 {bench.split}", rate)
    bench.take("T1", rate)


async def _t2(bench: Bench) -> None:
    bench.take("T2", (await bench.throughput("T2", ONE_PROCESS)).orders_per_second)


async def _t3(bench: Bench) -> None:
    bench.say("T3, POST accepted")
    run = await throughput.measure_accepting(bench.servers, bench.directory, **bench.under_load())
    bench.results.keep("T3", run, [run.audited])
    bench.take("T3", run.orders_per_second)


async def _t4(bench: Bench) -> None:
    bench.take("T4", (await bench.throughput("T4", bench.best_split, delay_ms=DEFAULT_DELAY_MS)).orders_per_second)


async def _t7(bench: Bench) -> None:
    bench.say("T7, 20 orders/s")
    found = await latency.measure(
        bench.servers, bench.directory, split=ONE_PROCESS, rates=(20.0,), seconds=bench.extent.paced_seconds,
        warm_up=bench.extent.warm_up,
    )  # fmt: skip
    bench.results.keep("T7", found.paced[0], [found.audited])
    for share in ("p50", "p99"):
        bench.take(f"T7 {share}", found.paced[0].paid[share])


async def _load(bench: Bench) -> None:
    bench.say("LOAD, latency by rate")
    found = await latency.measure(
        bench.servers, bench.directory, split=ONE_PROCESS, rates=bench.extent.load_rates, seconds=bench.extent.load_seconds,
        warm_up=bench.extent.warm_up,
    )  # fmt: skip
    bench.results.keep("LOAD", found.paced, [found.audited])
    for paced in found.paced:
        for share in ("p50", "p99"):
            bench.take(f"LOAD {paced.rate:g}/s {share}", paced.paid[share])


STEPS: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "A": _a, "B": _b, "C": _c, "D": _d, "T1": _t1, "T2": _t2, "T3": _t3, "T4": _t4, "T5": _t5, "T6": _t6, "T7": _t7,
    "LOAD": _load,
}  # fmt: skip
