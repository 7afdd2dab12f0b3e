"""The composition root: from settings and roles to running services. The only place that sees everything."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from orderflow import listening, logs, metrics, migrations
from orderflow.audit_result import LatestAudit
from orderflow.auditor import Auditor
from orderflow.engine import consumed, seams, telemetry
from orderflow.engine.circuit import Circuit
from orderflow.engine.handling import Handler
from orderflow.engine.handoff import Handoff
from orderflow.engine.janitor import Janitor
from orderflow.engine.kafka import Kafka
from orderflow.engine.postgres import Database
from orderflow.engine.relay import Relay
from orderflow.engine.retry import RetryPolicy
from orderflow.engine.worker import Worker
from orderflow.health import Health
from orderflow.loop_watchdog import loop_watched
from orderflow.operations import Operations
from orderflow.orders.http import Api
from orderflow.parent import tell_parent, watch_parent
from orderflow.payments.handlers import SUBJECTS, ChargeHandler, FailOrder
from orderflow.payments.simulated import SimulatedGateway
from orderflow.probes import Probes
from orderflow.processes import run_processes
from orderflow.retention import Retention
from orderflow.settings import Role, Settings, SettingsError
from orderflow.supervisor import Service, supervise
from orderflow.totals import Totals, metrics_line

# Upkeep looks through more rows at once than any statement of the hot path.
UPKEEP_TIMEOUT_SECONDS = 60.0
# Calls of the gateway that one delivery may wait for: find, charge, find again.
GATEWAY_CALLS = 3
# Of the grace period, what is left after the drain for the last commits and for closing connections.
CLOSING_SECONDS = 2.0


def run_main(main: Coroutine[Any, Any, int]) -> int:
    """Run to the end on uvloop where the platform has it; returns the exit code."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def run_roles(settings: Settings, roles: Sequence[Role]) -> int:
    """Run the roles in this process until it is told to stop; returns the exit code."""
    if settings.dev_children:
        watch_parent(settings.grace_seconds)
    # Thousands of short-lived tasks and futures a second: at the default threshold the collector walks all that lives on tens
    # of times a second, and finds nothing.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    log = logs.install(settings)
    if settings.failpoints:
        _arm(settings)
    counts = metrics.install(settings)
    totals = Totals()
    telemetry.subscribe(totals.take)
    health = Health(roles, lambda: tell_parent(settings.ready_descriptor))
    try:
        # Both around the drain too: what it settles is shown while it lasts, and what blocks it would hold it for ever.
        with loop_watched(stall_of(settings), log.flush):
            async with counts.flushing():
                return await supervise(
                    services(settings, roles, health, totals),
                    grace=settings.grace_seconds,
                    crash_budget=settings.crash_budget,
                    crash_window=settings.crash_window_seconds,
                    on_drain=lambda: setattr(health, "draining", True),
                    child=settings.dev_children,
                )
    finally:
        log.close()


def _arm(settings: Settings) -> None:
    try:
        plan = settings.failpoints
        if plan.startswith("@"):
            plan = Path(plan[1:]).read_text(encoding="utf-8")
        seams.arm(plan, seed=settings.failpoint_seed)
    except (seams.BadPlan, OSError) as error:
        raise SettingsError(f"ORDERFLOW_FAILPOINTS: {error}") from None
    telemetry.emit(telemetry.PROCESS, "FAILPOINTS_ARMED", plan=plan, seed=settings.failpoint_seed)


async def run_parent(settings: Settings, counts: Mapping[Role, int]) -> int:
    """Run processes of these roles, and tell in the log what becomes of them; returns the exit code."""
    if counts.get("api"):
        listening.api_keys(settings)
    listening.tls(settings)
    log = logs.install(settings)
    try:
        return await run_processes(settings, counts)
    finally:
        log.close()


def services(settings: Settings, roles: Sequence[Role], health: Health, totals: Totals) -> list[Service]:
    """Every service that these roles need in this process."""
    # From the API after its commits, and from the LISTEN connection: one event for the relay, wherever the row came from.
    handoff = Handoff()
    kafka = kafka_of(settings)
    chosen: list[Service] = []
    tls = listening.tls(settings)
    refresh = LatestAudit(settings.direct_url, health).refresh
    if "api" in roles:
        chosen.append(Api(
            settings, opener(settings, "api"), health, metrics.render, handoff, count=metrics.count_request,
            keys=listening.api_keys(settings), tls=tls, refresh=refresh,
        ))  # fmt: skip
    elif settings.metrics_port:
        chosen.append(Operations(
            settings.http_host, settings.metrics_port, health, metrics.render, reuse_port=settings.http_reuse_port, tls=tls,
            refresh=refresh,
        ))  # fmt: skip
    if "publisher" in roles:
        chosen.append(relay_of(settings, kafka, handoff, health))
        open_janitor = opener(settings, "janitor", timeout=UPKEEP_TIMEOUT_SECONDS)
        chosen.append(Janitor(open_janitor, lambda: consumed.consumed_until(kafka), horizon=settings.reconcile_seconds))
        open_retention = opener(settings, "retention", timeout=UPKEEP_TIMEOUT_SECONDS)
        chosen.append(Retention(open_retention, kafka, days=settings.retention_days))
        chosen.append(Auditor(settings.direct_url, health))
    if "worker" in roles:
        chosen.append(_MeasuredWorker(worker_of(settings, kafka, health), settings, totals))
    chosen.append(Probes(health, settings.kafka_bootstrap_servers, None if "api" in roles else settings.database_url))
    return chosen


def relay_of(settings: Settings, kafka: Kafka, handoff: Handoff, health: Health) -> Relay:
    """The publisher role."""
    open_database = opener(settings, "publisher")
    return Relay(
        open_database, settings.direct_url, kafka, handoff,
        burials={"OrderCreated": FailOrder()}, batch=settings.relay_batch, poll=settings.relay_poll_ms / 1000,
        heartbeat=settings.wake_heartbeat_seconds, stall=stall_of(settings), started=lambda: health.started("publisher"),
    )  # fmt: skip


def worker_of(settings: Settings, kafka: Kafka, health: Health) -> Worker:
    """The worker role, with the simulated gateway. A gateway of your own takes its place here."""
    open_gateway_database = opener(settings, "gateway")

    async def handlers(database: Database, stack: AsyncExitStack) -> Mapping[str, Handler]:
        ledger = await open_gateway_database()
        stack.push_async_callback(ledger.close)
        gateway = SimulatedGateway(
            ledger,
            delay=settings.gateway_delay_ms / 1000,
            success_rate=settings.gateway_success_rate,
            error_rate=settings.gateway_error_rate,
            seed=settings.gateway_seed,
        )
        stack.push_async_callback(gateway.close)
        circuit = Circuit(
            database, "gateway", worker_id=settings.worker_id, failures=settings.circuit_failures,
            claim=GATEWAY_CALLS * settings.gateway_timeout_ms / 1000,
        )  # fmt: skip
        await circuit.look()
        stack.push_async_callback(circuit.close)
        charge = ChargeHandler(
            database, gateway, circuit, worker_id=settings.worker_id, timeout=settings.gateway_timeout_ms / 1000,
            batch=settings.batch_size, in_flight=settings.batches_in_flight,
        )  # fmt: skip
        stack.push_async_callback(charge.close)
        return {"OrderCreated": charge}

    policy = RetryPolicy(settings.max_attempts, settings.backoff_base_ms / 1000, settings.backoff_cap_ms / 1000)
    return Worker(
        opener(settings, "worker"), kafka, handlers, policy, worker_id=settings.worker_id, subjects=SUBJECTS,
        max_in_flight=settings.max_in_flight, commit_interval=settings.commit_interval_ms / 1000,
        drain_timeout=max(0.1, settings.grace_seconds - CLOSING_SECONDS),
        batch=settings.batch_size, in_flight=settings.batches_in_flight,
        delivery_limit=GATEWAY_CALLS * settings.gateway_timeout_ms / 1000, stall=stall_of(settings),
        started=lambda: health.started("worker"),
    )  # fmt: skip


def stall_of(settings: Settings) -> float:
    """Seconds without progress after which a role is restarted: never fewer than a server that is away takes for its error."""
    return max(settings.stall_seconds, 2 * settings.kafka_timeout_seconds + 2 * settings.database_timeout_seconds)


def kafka_of(settings: Settings) -> Kafka:
    """Where Kafka is, from the settings."""
    return Kafka(
        bootstrap=settings.kafka_bootstrap_servers, topic=settings.topic, group=settings.consumer_group,
        timeout=settings.kafka_timeout_seconds, partitions=settings.topic_partitions, replication=settings.topic_replication,
        embedded=settings.kafka_embedded, security_protocol=settings.kafka_security_protocol,
        sasl_mechanism=settings.kafka_sasl_mechanism, username=settings.kafka_username, password=settings.kafka_password,
        ca_file=settings.kafka_ca_file,
    )  # fmt: skip


def opener(settings: Settings, role: str, *, timeout: float | None = None) -> Callable[[], Awaitable[Database]]:
    """Opens a role's own pool, and refuses a schema that this program was not written for."""

    async def open_database() -> Database:
        database = await Database.open(
            settings.database_url, size=settings.database_pool_size, timeout=timeout or settings.database_timeout_seconds,
            application=f"orderflow {role}", statement_cache=settings.database_statement_cache, by_index=True,
        )  # fmt: skip
        try:
            async with database.acquire() as connection:
                await migrations.check(connection)
        except BaseException:
            await database.close()
            raise
        return database

    return open_database


class _MeasuredWorker:
    """The worker role and its METRICS line, whose last one comes after the drain."""

    name = "worker"

    def __init__(self, worker: Worker, settings: Settings, totals: Totals) -> None:
        self._worker = worker
        self._settings = settings
        self._totals = totals

    async def run(self, stopping: asyncio.Event) -> None:
        line = asyncio.create_task(metrics_line(self._settings, self._totals, asyncio.Event()))
        try:
            await self._worker.run(stopping)
        finally:
            line.cancel()
            await asyncio.gather(line, return_exceptions=True)


if sys.platform == "win32":  # pragma: no cover
    raise SystemExit("orderflow runs on Linux and macOS: signals, SO_REUSEPORT and process groups are missing here")
