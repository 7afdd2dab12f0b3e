"""`orderflow dev`: everything on this machine, with a real PostgreSQL and a Kafka-protocol broker as child processes."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orderflow.settings import ROLES, LogFormat, Settings, load

if TYPE_CHECKING:
    from orderflow.embedded.broker import EmbeddedBroker
    from orderflow.embedded.postgres import EmbeddedPostgres

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@click.command()
@click.option("--data-dir", metavar="DIR", help="Where the data lies; it survives a restart [ORDERFLOW_DATA_DIR].")
@click.option("--port", "http_port", type=click.IntRange(0, 65535), help="The API's port, if it is free [HTTP_PORT].")
@click.option("--log-format", type=click.Choice(["json", "console", "auto", "off"]), help="How the log looks.")
def dev(data_dir: str | None, http_port: int | None, log_format: LogFormat | None) -> int:
    """Run everything on this machine: PostgreSQL, a broker, and all roles.

    Needs nothing but this program. PostgreSQL listens on 5432 and the API on 3000 where those are free, else on free ports
    that are printed. The broker forgets everything when it stops; the outbox does not, so every order in flight still ends.
    """
    settings = load(data_dir=data_dir, http_port=http_port, log_format=log_format)

    from orderflow import listening
    from orderflow.app import run_main
    from orderflow.embedded.errors import EmbeddedError

    # Said before the servers start, which takes seconds.
    listening.api_keys(settings)
    listening.tls(settings)
    try:
        return run_main(run_dev(settings))
    except EmbeddedError as error:
        raise click.ClickException(str(error)) from error


async def run_dev(settings: Settings) -> int:
    """Start the servers, run all roles until told to stop, stop the servers; returns the exit code."""
    from orderflow.app import run_roles
    from orderflow.embedded import ports
    from orderflow.embedded.broker import EmbeddedBroker
    from orderflow.embedded.postgres import EmbeddedPostgres
    from orderflow.engine import telemetry

    directory = Path(settings.data_dir)
    async with AsyncExitStack() as stack:
        # A signal while the servers start ends the start, not the process: what has been started is stopped in order.
        stack.enter_context(_interruptible())
        postgres = EmbeddedPostgres(directory / "postgresql")
        stack.push_async_callback(postgres.stop)
        broker = EmbeddedBroker(directory / "broker")
        stack.push_async_callback(broker.stop)
        try:
            await asyncio.gather(postgres.start(), broker.start())
            await _prepare(postgres.url)
        except asyncio.CancelledError:
            return 0
        port, claimed = ports.claim(settings.http_port or None)
        stack.callback(claimed.close)
        chosen = settings.model_copy(
            update={
                "database_url": postgres.url,
                "database_direct_url": None,
                "kafka_bootstrap_servers": broker.bootstrap,
                "kafka_embedded": True,
                "http_port": port,
            }
        )

        def greet(service: str, event: str, _facts: telemetry.Facts) -> None:
            if service == telemetry.API and event == "STARTUP":
                _welcome(chosen, postgres, broker)

        with telemetry.subscribed(greet):
            return await run_roles(chosen, ROLES)


async def _prepare(url: str) -> None:
    """The schema, and every event that the broker of the last run took with it made due again."""
    from orderflow.engine import outbox
    from orderflow.engine.postgres import close_connection, connect
    from orderflow.migrations import migrate

    await migrate(url)
    connection = await connect(url, timeout=60.0, application="orderflow dev")
    try:
        await outbox.republish_unsettled(connection, since=EPOCH, published_before=timedelta(0), limit=2**31)
    finally:
        await close_connection(connection)


class _interruptible:
    """SIGINT and SIGTERM cancel the task that entered, until the supervisor takes them over."""

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)


def _welcome(settings: Settings, postgres: EmbeddedPostgres, broker: EmbeddedBroker) -> None:
    address = f"{'https' if settings.http_certificate_file else 'http'}://localhost:{settings.http_port}"
    order = '{"userId": "7b0a6f2e-6f0e-4c8b-9c53-0d5f1c9a4a11", "amount": 299.99}'
    lines = [
        "",
        "  orderflow is up. Place an order and watch it become PAID (or FAILED: 3 in 10 are declined):",
        "",
        f"    curl -i {address}/orders -H 'Content-Type: application/json' -d '{order}'",
        "",
        f"  API         {address}  (/orders, /readyz, /metrics, /openapi.json)",
        f"  PostgreSQL  {postgres.url}",
        f"  Kafka       {broker.bootstrap}  (in memory, for trying things: see the README for a real one)",
        f"  Data        {postgres.data_dir}",
        "",
    ]
    exports = f"KAFKA_BOOTSTRAP_SERVERS={broker.bootstrap}"
    if postgres.port != 5432:
        exports += f" DATABASE_URL={postgres.url}"
    lines += ["  For `orderflow doctor`, `explain` and the others, in another terminal:", f"    export {exports}", ""]
    print("\n".join(lines), file=sys.stderr, flush=True)
