"""What is counted: Prometheus names and labels, alone and over several processes, and the METRICS line."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from orderflow.engine import telemetry
from orderflow.engine.telemetry import PROCESS, PUBLISHER, WORKER, emit, observe
from orderflow.metrics import BUCKETS, MOST_LABELS, STAGES, Metrics
from orderflow.settings import load
from orderflow.totals import Totals, metrics_line
from tests.programs import Program, holds

LIMIT = 10.0


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metrics]:
    made = Metrics()
    monkeypatch.setattr(telemetry, "_observers", [made.observe])
    with telemetry.subscribed(made.take):
        yield made


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    metrics.flush()
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize(
    ("event", "fields", "name", "labels"),
    [
        ("EVENT_PUBLISHED", {"eventType": "OrderPaid"}, "orderflow_events_published_total", {"event_type": "OrderPaid"}),
        ("EVENT_RECEIVED", {"eventType": "OrderPaid"}, "orderflow_events_received_total", {}),
        ("EVENT_PROCESSED", {}, "orderflow_events_processed_total", {}),
        ("DUPLICATE_EVENT", {}, "orderflow_duplicates_skipped_total", {}),
        ("PAYMENT_RESULT", {"status": "SUCCESS"}, "orderflow_payments_total", {"status": "SUCCESS"}),
        ("PAYMENT_RESULT", {"status": "DECLINED"}, "orderflow_payments_total", {"status": "DECLINED"}),
        ("PAYMENT_GIVEN_UP", {}, "orderflow_payments_total", {"status": "GIVEN_UP"}),
        ("RETRY_SCHEDULED", {}, "orderflow_retries_total", {}),
        ("DLQ_EVENT", {}, "orderflow_dead_letters_total", {}),
        ("EVENT_POSTPONED", {}, "orderflow_postponed_total", {}),
        ("GATEWAY_UNANSWERED", {}, "orderflow_gateway_unanswered_total", {}),
        ("ROLE_CRASHED", {"role": "worker"}, "orderflow_role_crashes_total", {"role": "worker"}),
        ("STALLED", {"role": "worker"}, "orderflow_stalls_total", {"role": "worker"}),
    ],
)
def test_a_fact_is_counted(metrics: Metrics, event: str, fields: dict[str, Any], name: str, labels: dict[str, str]) -> None:
    for _ in range(3):
        emit(WORKER, event, **fields)
    assert value(metrics, name, **labels) == 3


def test_the_last_audit_is_shown_and_in_the_metrics_line_where_there_was_one(metrics: Metrics) -> None:
    totals = Totals()
    assert "auditViolations" not in totals.fields()
    with telemetry.subscribed(totals.take):
        for violations in ({"I1": 2, "I3": 1}, {"I1": 0, "I3": 1}):
            emit(PROCESS, "AUDITED", orders=9, violations=violations)
    assert totals.fields()["auditViolations"] == 1
    assert value(metrics, "orderflow_audit_violations", invariant="I1") == 0
    assert value(metrics, "orderflow_audit_violations", invariant="I3") == 1
    assert (value(metrics, "orderflow_audit_last_run_timestamp_seconds") or 0) > 0


def test_a_circuit_is_open_or_not(metrics: Metrics) -> None:
    for is_open in (True, False):
        emit(WORKER, "CIRCUIT_SEEN", circuit="gateway", open=is_open)
        assert value(metrics, "orderflow_circuit_open") == is_open


def test_dropped_lines_are_added_up(metrics: Metrics) -> None:
    emit(PROCESS, "LOG_LINES_DROPPED", lines=40)
    emit(PROCESS, "LOG_LINES_DROPPED", lines=2)
    assert value(metrics, "orderflow_log_lines_dropped_total") == 42


def test_dropped_lines_told_by_the_log_writers_thread_do_not_wait_for_a_flush(metrics: Metrics) -> None:
    thread = Thread(target=emit, args=(PROCESS, "LOG_LINES_DROPPED"), kwargs={"lines": 40})
    thread.start()
    thread.join(LIMIT)
    assert metrics.registry.get_sample_value("orderflow_log_lines_dropped_total") == 40


def test_facts_that_nobody_counts_pass(metrics: Metrics) -> None:
    emit(WORKER, "STATE_CHANGE", oldState="CREATED")


def test_foreign_event_types_do_not_make_endless_series(metrics: Metrics) -> None:
    for number in range(MOST_LABELS * 3):
        emit(PUBLISHER, "EVENT_PUBLISHED", eventType=f"Foreign{number}")
    emit(PUBLISHER, "EVENT_PUBLISHED", eventType="Foreign0")
    assert value(metrics, "orderflow_events_published_total", event_type="Foreign0") == 2
    assert value(metrics, "orderflow_events_published_total", event_type="other") == MOST_LABELS * 2


def test_stages_are_histograms_in_seconds(metrics: Metrics) -> None:
    for seconds in (0.0004, 0.003, 0.003, 120.0, -0.5):
        observe("charged", seconds)
    observe("unheard of", 1.0)
    assert value(metrics, "orderflow_stage_seconds_count", stage="charged") == 5
    assert value(metrics, "orderflow_stage_seconds_sum", stage="charged") == pytest.approx(120.0064)
    assert value(metrics, "orderflow_stage_seconds_bucket", stage="charged", le="0.001") == 2
    assert value(metrics, "orderflow_stage_seconds_bucket", stage="charged", le="0.005") == 4
    assert value(metrics, "orderflow_stage_seconds_bucket", stage="charged", le="60.0") == 4
    assert value(metrics, "orderflow_stage_seconds_count", stage="accepted") == 0


def test_a_stage_shows_what_the_librarys_own_observe_would(metrics: Metrics) -> None:
    registry = CollectorRegistry()
    theirs = Histogram("orderflow_stage_seconds", "The model.", ("stage",), buckets=BUCKETS, registry=registry)
    for stage in STAGES:
        theirs.labels(stage)
    # On each bound, a little to both its sides, beyond the last one, and in several flushes.
    for bound in BUCKETS:
        for seconds in (bound * 0.99, bound, bound * 1.01, 0.0, 1e9):
            theirs.labels("charged").observe(seconds)
            observe("charged", seconds)
        metrics.flush()
    shown = next(family for family in metrics.registry.collect() if family.name == "orderflow_stage_seconds").samples
    model = next(iter(registry.collect())).samples
    counted = [sample[:3] for sample in model if not sample.name.endswith(("_sum", "_created"))]
    assert [sample[:3] for sample in shown if not sample.name.endswith(("_sum", "_created"))] == counted
    sums = [sample.value for sample in model if sample.name.endswith("_sum")]
    assert [sample.value for sample in shown if sample.name.endswith("_sum")] == pytest.approx(sums)


@pytest.mark.parametrize("seconds", [float("nan"), -float("inf"), -0.0])
def test_a_duration_that_cannot_be_counts_as_0(metrics: Metrics, seconds: float) -> None:
    observe("charged", seconds)
    assert value(metrics, "orderflow_stage_seconds_bucket", stage="charged", le="0.001") == 1
    assert value(metrics, "orderflow_stage_seconds_sum", stage="charged") == 0


def test_what_was_flushed_is_not_counted_again(metrics: Metrics) -> None:
    for _ in range(3):
        emit(WORKER, "EVENT_PROCESSED")
        metrics.count_request("GET", "/orders", 200)
        observe("settled", 0.1)
        metrics.flush()
        metrics.flush()
    assert value(metrics, "orderflow_events_processed_total") == 3
    assert value(metrics, "orderflow_http_requests_total", method="GET", route="/orders", status="200") == 3
    assert value(metrics, "orderflow_stage_seconds_sum", stage="settled") == pytest.approx(0.3)


def test_the_supervisors_last_word_flushes(metrics: Metrics) -> None:
    emit(WORKER, "EVENT_PROCESSED")
    emit(PROCESS, "STOPPED", exitCode=0)
    assert metrics.registry.get_sample_value("orderflow_events_processed_total") == 1


async def test_counts_are_flushed_regularly_without_being_asked_for(metrics: Metrics) -> None:
    async with metrics.flushing(0.001):
        for number in (1, 2):
            emit(WORKER, "EVENT_PROCESSED")
            async with asyncio.timeout(LIMIT):
                while metrics.registry.get_sample_value("orderflow_events_processed_total") != number:
                    await asyncio.sleep(0)


@pytest.mark.parametrize("error", [None, RuntimeError, asyncio.CancelledError])
async def test_the_last_counts_are_flushed_however_it_ends(metrics: Metrics, error: type[BaseException] | None) -> None:
    before = asyncio.all_tasks()
    with contextlib.suppress(RuntimeError, asyncio.CancelledError):
        async with metrics.flushing(3600.0):
            emit(WORKER, "EVENT_PROCESSED")
            if error is not None:
                raise error
    assert metrics.registry.get_sample_value("orderflow_events_processed_total") == 1
    assert asyncio.all_tasks() == before


def test_requests_are_counted_by_route(metrics: Metrics) -> None:
    for status in (201, 201, 422):
        metrics.count_request("POST", "/orders", status)
    metrics.count_request("BREW", "/orders", 405)
    name = "orderflow_http_requests_total"
    assert value(metrics, name, method="POST", route="/orders", status="201") == 2
    assert value(metrics, name, method="POST", route="/orders", status="422") == 1
    assert value(metrics, name, method="other", route="/orders", status="405") == 1


async def test_the_metrics_line_comes_regularly_and_at_the_end() -> None:
    lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    totals = Totals()
    stopping = asyncio.Event()

    def collect(service: str, event: str, facts: telemetry.Facts) -> None:
        if event == "METRICS":
            assert service == WORKER
            lines.put_nowait(facts[0])

    with telemetry.subscribed(totals.take), telemetry.subscribed(collect):
        line = asyncio.create_task(metrics_line(load(metrics_interval_seconds=0.01, worker_id="w"), totals, stopping))
        first = await asyncio.wait_for(lines.get(), LIMIT)
        assert first == {
            "workerId": "w", "eventsProcessed": 0, "duplicatesSkipped": 0, "paymentsSuccess": 0, "paymentsFailed": 0,
            "retriedEvents": 0, "dlqEvents": 0,
        }  # fmt: skip
        for _ in range(7):
            emit(WORKER, "EVENT_PROCESSED")
        for status in ("SUCCESS", "SUCCESS", "SUCCESS", "DECLINED"):
            emit(WORKER, "PAYMENT_RESULT", status=status)
        emit(WORKER, "PAYMENT_GIVEN_UP")
        emit(WORKER, "DUPLICATE_EVENT")
        emit(WORKER, "RETRY_SCHEDULED")
        emit(WORKER, "RETRY_SCHEDULED")
        emit(WORKER, "DLQ_EVENT")
        stopping.set()
        await asyncio.wait_for(line, LIMIT)
    while not lines.empty():
        last = lines.get_nowait()
    assert last == {
        "workerId": "w", "eventsProcessed": 7, "duplicatesSkipped": 1, "paymentsSuccess": 3, "paymentsFailed": 2,
        "retriedEvents": 2, "dlqEvents": 1,
    }  # fmt: skip


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_last_metrics_line_comes_whatever_the_interval(cancelled: bool) -> None:
    seen = []
    stopping = asyncio.Event()
    with telemetry.subscribed(lambda _service, event, _fields: seen.append(event)):
        line = asyncio.create_task(metrics_line(load(metrics_interval_seconds=3600.0), Totals(), stopping))
        await asyncio.sleep(0)
        if cancelled:
            line.cancel()
        else:
            stopping.set()
        await asyncio.wait({line}, timeout=LIMIT)
    assert line.done()
    assert seen == ["METRICS"]


async def test_a_worker_that_begins_again_and_again_does_not_repeat_itself() -> None:
    seen = []
    totals = Totals()
    ended = asyncio.Event()
    ended.set()
    with telemetry.subscribed(lambda _service, event, _fields: seen.append(event)):
        for _ in range(5):
            await metrics_line(load(metrics_interval_seconds=3600.0), totals, ended)
    assert seen == ["METRICS"]


SCRAPED = """
from orderflow import metrics
assert "prometheus_client" not in sys.modules
from orderflow.engine.telemetry import PUBLISHER, emit, observe
from orderflow.settings import load
metrics.count_request("GET", "/livez", 200)
installed = metrics.install(load())
metrics.count_request("GET", "/livez", 200)
async def main():
    async with installed.flushing():
        for number in range(int(sys.argv[1])):
            emit(PUBLISHER, "EVENT_PUBLISHED", eventType="OrderPaid")
            observe("published", 0.02)
        tell("COUNTED")
        # Each line that comes is a scrape.
        while await asyncio.to_thread(sys.stdin.readline):
            text, kind = metrics.render()
            tell("RENDERED", text=text.decode(), kind=kind)

asyncio.run(main())
"""


def scrape(program: Program) -> dict[str, Any]:
    assert program.process.stdin is not None
    program.process.stdin.write(b"\n")
    program.process.stdin.flush()
    return program.until("RENDERED")


def samples(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(number) for name, number in pairs}


def test_one_process_shows_its_own_counts_and_itself() -> None:
    with Program(SCRAPED, "3", stdin=subprocess.PIPE) as program:
        rendered = scrape(program)
    assert rendered["kind"].startswith("text/plain")
    found = samples(rendered["text"])
    assert found['orderflow_events_published_total{event_type="OrderPaid"}'] == 3
    assert found['orderflow_http_requests_total{method="GET",route="/livez",status="200"}'] == 1
    assert found['orderflow_stage_seconds_bucket{le="0.025",stage="published"}'] == 3
    assert found["process_resident_memory_bytes"] > 0
    assert any(name.startswith("orderflow_build_info{") for name in found)


def test_any_process_of_several_shows_the_counts_of_all(tmp_path: Path) -> None:
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    published = 'orderflow_events_published_total{event_type="OrderPaid"}'
    with (
        Program(SCRAPED, "3", environment=shared) as gone,
        Program(SCRAPED, "4", environment=shared, stdin=subprocess.PIPE) as asked,
        Program(SCRAPED, "5", environment=shared, stdin=subprocess.PIPE) as other,
    ):
        assert gone.end() == 0
        asked.until("COUNTED")
        other.until("COUNTED")
        # Nobody asks the other process: it shows its counts by itself.
        assert holds(lambda: samples(scrape(asked)["text"])[published] == 12)
        found = samples(scrape(asked)["text"])
    # A process that has ended took part, and a counter must not go back.
    assert found[published] == 12
    assert found['orderflow_stage_seconds_count{stage="published"}'] == 12
    assert [number for name, number in found.items() if name.startswith("orderflow_build_info{")] == [1.0]
