"""Counters and histograms for Prometheus, which count the facts that telemetry tells of.

prometheus_client is imported by `install` only. It decides at its import whether the processes of one parent share
their counts: the parent sets PROMETHEUS_MULTIPROC_DIR for them (`processes`). Each count of its own costs microseconds then, a
tenth of a busy worker; so facts are added up here, and `flush` hands over the sums.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

from orderflow import __version__
from orderflow.engine import telemetry
from orderflow.engine.telemetry import Facts

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

    from orderflow.settings import Settings

STAGES: Final = ("accepted", "published", "received", "charged", "settled")
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
# Other programs may write any event type to the outbox; each value of a label is a time series for ever.
MOST_LABELS: Final = 50
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# So much later than its own process does a sibling show a count; a process that is killed takes as much with it.
FLUSH_SECONDS: Final = 1.0

Count = Callable[[Facts], None]


class Metrics:
    """The program's metrics; `take` and `observe` are its telemetry subscribers.

    All but LOG_LINES_DROPPED comes from the event loop's thread, where `flush` belongs too: nothing here is locked.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        from prometheus_client.gc_collector import GCCollector
        from prometheus_client.platform_collector import PlatformCollector
        from prometheus_client.process_collector import ProcessCollector

        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, mode: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]

        published = counter("orderflow_events_published_total", "Events that Kafka has acknowledged.", "event_type")
        payments = counter("orderflow_payments_total", "Payments by how they ended.", "status")
        crashes = counter("orderflow_role_crashes_total", "Crashes of a role that were not a server's absence.", "role")
        self._requests = counter(
            "orderflow_http_requests_total", "HTTP requests that were answered.", "method", "route", "status"
        )
        self._violations = gauge(
            "orderflow_audit_violations", "Orders that the continuous auditor knows to be wrong.", "livemostrecent", "invariant"
        )
        self._audited = gauge(
            "orderflow_audit_last_run_timestamp_seconds", "When the continuous auditor has looked last.", "livemostrecent"
        )
        dropped = counter("orderflow_log_lines_dropped_total", "Log lines let go because nobody read them in time.")
        self._request_counters: dict[tuple[str, str, int], Counter] = {}
        self._pending: defaultdict[Counter, int] = defaultdict(int)
        self._counts: dict[str, Count] = {
            "EVENT_PUBLISHED": self._by_label(published, "eventType"),
            "EVENT_RECEIVED": self._each(counter("orderflow_events_received_total", "Deliveries taken from Kafka.")),
            "EVENT_PROCESSED": self._each(counter("orderflow_events_processed_total", "Events processed, each once.")),
            "DUPLICATE_EVENT": self._each(counter("orderflow_duplicates_skipped_total", "Deliveries decided before.")),
            "PAYMENT_RESULT": self._by_label(payments, "status"),
            "PAYMENT_GIVEN_UP": self._each(payments.labels("GIVEN_UP")),
            "RETRY_SCHEDULED": self._each(counter("orderflow_retries_total", "Failed attempts that will be repeated.")),
            "DLQ_EVENT": self._each(counter("orderflow_dead_letters_total", "Events buried as dead letters.")),
            "EVENT_POSTPONED": self._each(counter("orderflow_postponed_total", "Deliveries put off; no attempt was used up.")),
            "GATEWAY_UNANSWERED": self._each(counter("orderflow_gateway_unanswered_total", "Calls without an answer.")),
            "ROLE_CRASHED": self._by_label(crashes, "role"),
            "STALLED": self._by_label(counter("orderflow_stalls_total", "Restarts of roles that stood still.", "role"), "role"),
            "AUDITED": self._show_audit,
            # From the log writer's thread: the library has a lock.
            "LOG_LINES_DROPPED": lambda facts: dropped.inc(facts[0]["lines"]),
            # The supervisor's last word: it may end the process before anything else is called.
            "STOPPED": lambda facts: self.flush(),
        }
        stages = Histogram(
            "orderflow_stage_seconds", "Time that a stage of an order's way took.", ("stage",),
            buckets=BUCKETS, registry=registry,
        )  # fmt: skip
        self._stages = {stage: _Durations(stages.labels(stage)) for stage in STAGES}
        build = gauge("orderflow_build_info", "Always 1; its labels tell what runs.", "max", "version", "python")
        self._gauge("CIRCUIT_SEEN", "open", gauge(
            "orderflow_circuit_open", "1 while a circuit breaker keeps the workers from the gateway.", "mostrecent"
        ))  # fmt: skip
        self._gauge("BACKLOG_SEEN", "seconds", gauge(
            "orderflow_backlog_age_seconds", "How long the oldest CREATED order has waited.", "mostrecent"
        ))  # fmt: skip
        # Of this process; where several share their counts, theirs cannot be added up and are not shown (`render`).
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        build.labels(__version__, platform.python_version()).set(1)

    def take(self, _service: str, event: str, facts: Facts) -> None:
        """Count these facts."""
        count = self._counts.get(event)
        if count is not None:
            count(facts)

    def observe(self, stage: str, seconds: float) -> None:
        """Note how long a stage took, in seconds; two machines' clocks may make it negative, which counts as 0."""
        durations = self._stages.get(stage)
        if durations is not None:
            durations.counts[bisect_left(BUCKETS, seconds)] += 1
            if seconds > 0.0:
                durations.total += seconds

    def count_request(self, method: str, route: str, status: int) -> None:
        """Count one HTTP request; `route` is its pattern, never the path itself."""
        key = (method if method in METHODS else "other", route, status)
        counter = self._request_counters.get(key)
        if counter is None:
            counter = self._request_counters[key] = self._requests.labels(key[0], route, str(status))
        self._pending[counter] += 1

    def flush(self) -> None:
        """Hand over to the registry, and to our siblings, what was counted since the last time."""
        for counter, number in self._pending.items():
            counter.inc(number)
        self._pending.clear()
        for durations in self._stages.values():
            durations.flush()

    @contextlib.asynccontextmanager
    async def flushing(self, interval: float = FLUSH_SECONDS) -> AsyncIterator[None]:
        """Flush every `interval` seconds for the length of a `with` block, and at its end."""

        async def flush_regularly() -> None:
            while True:
                await asyncio.sleep(interval)
                self.flush()

        task = asyncio.create_task(flush_regularly(), name="metrics")
        try:
            yield
        finally:
            task.cancel()
            self.flush()
            await asyncio.gather(task, return_exceptions=True)

    def _show_audit(self, facts: Facts) -> None:
        for invariant, count in facts[-1]["violations"].items():
            self._violations.labels(invariant).set(count)
        self._audited.set_to_current_time()

    def _each(self, counter: Counter) -> Count:
        pending = self._pending

        def count(facts: Facts) -> None:
            pending[counter] += len(facts)

        return count

    def _gauge(self, event: str, field: str, gauge: Gauge) -> None:
        self._counts[event] = lambda facts: gauge.set(float(facts[-1][field]))

    def _by_label(self, counter: Counter, field: str) -> Count:
        """Count by the text of one field; its label is looked up once, since a look-up costs more than the count."""
        pending = self._pending
        children: dict[Any, Counter] = {}

        def count(facts: Facts) -> None:
            for fields in facts:
                value = fields.get(field)
                child = children.get(value)
                if child is None:
                    label = str(value) if len(children) < MOST_LABELS else "other"
                    child = counter.labels(label)
                    if label != "other":
                        children[value] = child
                pending[child] += 1

        return count


class _Durations:
    """What a histogram has not been told yet: how many durations by bucket, and their sum."""

    __slots__ = ("_histogram", "counts", "total")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def flush(self) -> None:
        # The library has no public call for many durations: this is what its `observe` does for each, done once a bucket.
        # Should a later version do it otherwise, a test that compares the two fails.
        for bucket, number in enumerate(self.counts):
            if number:
                self._histogram._buckets[bucket].inc(number)
                self.counts[bucket] = 0
        if self.total:
            self._histogram._sum.inc(self.total)
            self.total = 0.0


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

    if _installed is not None:
        _installed.flush()
    if values.ValueClass._multiprocess:
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared), CONTENT_TYPE_LATEST
    registry = _installed.registry if _installed is not None else CollectorRegistry()
    return generate_latest(registry), CONTENT_TYPE_LATEST
