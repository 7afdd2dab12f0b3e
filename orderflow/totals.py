"""The METRICS line: what a worker has done since it started, counted from the facts that telemetry tells of."""

from __future__ import annotations

import asyncio
import contextlib

from orderflow.engine.patience import within
from orderflow.engine.telemetry import WORKER, Facts, emit
from orderflow.settings import Settings


class Totals:
    """What the METRICS line says: counts since the start of this process."""

    def __init__(self) -> None:
        self.events_processed = 0
        self.duplicates_skipped = 0
        self.payments_success = 0
        self.payments_failed = 0
        self.retried_events = 0
        self.dlq_events = 0
        # None: the auditor has not looked, or is another process's.
        self.audit_violations: int | None = None
        self.said: dict[str, int] = {}

    def take(self, _service: str, event: str, facts: Facts) -> None:
        """Count these facts; a telemetry subscriber."""
        match event:
            case "EVENT_PROCESSED":
                self.events_processed += len(facts)
            case "PAYMENT_RESULT":
                paid = sum(fields.get("status") == "SUCCESS" for fields in facts)
                self.payments_success += paid
                self.payments_failed += len(facts) - paid
            case "PAYMENT_GIVEN_UP":
                self.payments_failed += len(facts)
            case "DUPLICATE_EVENT":
                self.duplicates_skipped += len(facts)
            case "RETRY_SCHEDULED":
                self.retried_events += len(facts)
            case "DLQ_EVENT":
                self.dlq_events += len(facts)
            case "AUDITED":
                self.audit_violations = sum(facts[-1]["violations"].values())

    def fields(self) -> dict[str, int]:
        """The counts by the names of the METRICS line."""
        return {
            "eventsProcessed": self.events_processed,
            "duplicatesSkipped": self.duplicates_skipped,
            "paymentsSuccess": self.payments_success,
            "paymentsFailed": self.payments_failed,
            "retriedEvents": self.retried_events,
            "dlqEvents": self.dlq_events,
            **({} if self.audit_violations is None else {"auditViolations": self.audit_violations}),
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
