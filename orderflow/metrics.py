"""Counters and histograms for Prometheus, and the METRICS line: both count the facts that telemetry tells of.

prometheus_client is imported by `install` only. It decides at its import whether the processes of one parent share
their counts: the parent sets PROMETHEUS_MULTIPROC_DIR for them (`processes`).
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from orderflow import __version__
from orderflow.engine import telemetry
from orderflow.engine.patience import within
from orderflow.engine.telemetry import WORKER, emit

if TYPE_CHECKING:
    from prometheus_client import Counter

    from orderflow.settings import Settings

STAGES: Final = ("accepted", "published", "received", "charged", "settled")
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
# Other programs may write any event type to the outbox; each value of a label is a time series for ever.
MOST_LABELS: Final = 50
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

Count = Callable[[dict[str, Any]], None]


class Metrics:
    """The program's metrics; `take` and `observe` are its telemetry subscribers."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        from prometheus_client.gc_collector import GCCollector
        from prometheus_client.platform_collector import PlatformCollector
        from prometheus_client.process_collector import ProcessCollector

        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        published = counter("orderflow_events_published_total", "Events that Kafka has acknowledged.", "event_type")
        payments = counter("orderflow_payments_total", "Payments by how they ended.", "status")
        crashes = counter("orderflow_role_crashes_total", "Crashes of a role that were not a server's absence.", "role")
        self._requests = counter(
            "orderflow_http_requests_total", "HTTP requests that were answered.", "method", "route", "status"
        )
        dropped = counter("orderflow_log_lines_dropped_total", "Log lines let go because nobody read them in time.")
        self._request_counts: dict[tuple[str, str, int], Callable[[], None]] = {}
        self._counts: dict[str, Count] = {
            "EVENT_PUBLISHED": _by_label(published, "eventType"),
            "EVENT_RECEIVED": _each(counter("orderflow_events_received_total", "Deliveries taken from Kafka.")),
            "EVENT_PROCESSED": _each(counter("orderflow_events_processed_total", "Events processed, each once.")),
            "DUPLICATE_EVENT": _each(counter("orderflow_duplicates_skipped_total", "Deliveries decided before.")),
            "PAYMENT_RESULT": _by_label(payments, "status"),
            "PAYMENT_GIVEN_UP": _constant(payments, "GIVEN_UP"),
            "RETRY_SCHEDULED": _each(counter("orderflow_retries_total", "Failed attempts that will be repeated.")),
            "DLQ_EVENT": _each(counter("orderflow_dead_letters_total", "Events buried as dead letters.")),
            "ROLE_CRASHED": _by_label(crashes, "role"),
            "LOG_LINES_DROPPED": lambda fields: dropped.inc(fields["lines"]),
        }
        stages = Histogram(
            "orderflow_stage_seconds", "Time that a stage of an order's way took.", ("stage",),
            buckets=BUCKETS, registry=registry,
        )  # fmt: skip
        self._stages = {stage: stages.labels(stage).observe for stage in STAGES}
        build = Gauge(
            "orderflow_build_info", "Always 1; its labels tell what runs.", ("version", "python"),
            registry=registry, multiprocess_mode="max",
        )  # fmt: skip
        # Of this process; where several share their counts, theirs cannot be added up and are not shown (`render`).
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        build.labels(__version__, platform.python_version()).set(1)

    def take(self, _service: str, event: str, fields: dict[str, Any]) -> None:
        """Count one fact."""
        count = self._counts.get(event)
        if count is not None:
            count(fields)

    def observe(self, stage: str, seconds: float) -> None:
        """Note how long a stage took, in seconds; two machines' clocks may make it negative."""
        observe = self._stages.get(stage)
        if observe is not None:
            observe(seconds if seconds > 0.0 else 0.0)

    def count_request(self, method: str, route: str, status: int) -> None:
        """Count one HTTP request; `route` is its pattern, never the path itself."""
        key = (method if method in METHODS else "other", route, status)
        count = self._request_counts.get(key)
        if count is None:
            count = self._request_counts[key] = self._requests.labels(key[0], route, str(status)).inc
        count()


def _each(counter: Counter) -> Count:
    inc = counter.inc
    return lambda fields: inc()


def _constant(counter: Counter, label: str) -> Count:
    inc = counter.labels(label).inc
    return lambda fields: inc()


def _by_label(counter: Counter, field: str) -> Count:
    """Count by the text of one field; its label is looked up once, since a look-up costs more than the count."""
    children: dict[Any, Callable[[], None]] = {}

    def count(fields: dict[str, Any]) -> None:
        value = fields.get(field)
        child = children.get(value)
        if child is None:
            label = str(value) if len(children) < MOST_LABELS else "other"
            child = counter.labels(label).inc
            if label != "other":
                children[value] = child
        child()

    return count


_installed: Metrics | None = None


def install(settings: Settings) -> Metrics:
    """Count every fact from now on. `settings` decide nothing yet; the registry is this call's own."""
    global _installed
    _installed = Metrics()
    telemetry.subscribe(_installed.take, _installed.observe)
    return _installed


def count_request(method: str, route: str, status: int) -> None:
    """Count one HTTP request by its route's pattern; does nothing before `install`."""
    if _installed is not None:
        _installed.count_request(method, route, status)


def render() -> tuple[bytes, str]:
    """The exposition text and its content type: of this process, or of all its siblings where they share their counts."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess, values

    if values.ValueClass._multiprocess:
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared), CONTENT_TYPE_LATEST
    registry = _installed.registry if _installed is not None else CollectorRegistry()
    return generate_latest(registry), CONTENT_TYPE_LATEST


class Totals:
    """What the METRICS line says: counts since the start of this process."""

    def __init__(self) -> None:
        self.events_processed = 0
        self.duplicates_skipped = 0
        self.payments_success = 0
        self.payments_failed = 0
        self.retried_events = 0
        self.dlq_events = 0
        self.said: dict[str, int] = {}

    def take(self, _service: str, event: str, fields: dict[str, Any]) -> None:
        """Count one fact; a telemetry subscriber."""
        match event:
            case "EVENT_PROCESSED":
                self.events_processed += 1
            case "PAYMENT_RESULT" if fields.get("status") == "SUCCESS":
                self.payments_success += 1
            case "PAYMENT_RESULT" | "PAYMENT_GIVEN_UP":
                self.payments_failed += 1
            case "DUPLICATE_EVENT":
                self.duplicates_skipped += 1
            case "RETRY_SCHEDULED":
                self.retried_events += 1
            case "DLQ_EVENT":
                self.dlq_events += 1

    def fields(self) -> dict[str, int]:
        """The counts by the names of the METRICS line."""
        return {
            "eventsProcessed": self.events_processed,
            "duplicatesSkipped": self.duplicates_skipped,
            "paymentsSuccess": self.payments_success,
            "paymentsFailed": self.payments_failed,
            "retriedEvents": self.retried_events,
            "dlqEvents": self.dlq_events,
        }


async def metrics_line(settings: Settings, totals: Totals, stopping: asyncio.Event) -> None:
    """Emit METRICS every `metrics_interval_seconds`, and once more when `stopping` is set or the task is cancelled.

    The last line is left out when it would repeat the one before: a worker that waits for its servers ends often.
    """

    def say() -> None:
        totals.said = totals.fields()
        emit(WORKER, "METRICS", workerId=settings.worker_id, **totals.said)

    try:
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await within(stopping.wait(), settings.metrics_interval_seconds)
            if not stopping.is_set():
                say()
    finally:
        if totals.fields() != totals.said:
            say()
