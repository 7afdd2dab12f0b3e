"""`orderflow run`: roles in this process, or a parent process with many of each."""

from __future__ import annotations

import click

from orderflow.commands.parameters import server_options
from orderflow.settings import ROLES, LogFormat, Role, Settings, SettingsError, load

COUNT = click.IntRange(min=0)
PORT = click.IntRange(0, 65535)


@click.command()
@click.option("--role", "roles", type=click.Choice(ROLES), multiple=True, help="Only this role; may be given again.")
@click.option("--api", type=COUNT, metavar="N", help="Processes of the API; they share one port.")
@click.option("--publisher", type=COUNT, metavar="N", help="Processes of the publisher.")
@click.option("--worker", type=COUNT, metavar="N", help="Processes of the worker.")
@click.option("--port", "http_port", type=PORT, help="The API's port; 0: any free one [HTTP_PORT].")
@click.option("--host", "http_host", metavar="ADDRESS", help="The API's address [ORDERFLOW_HTTP_HOST].")
@click.option("--worker-id", metavar="NAME", help="This worker's name [ORDERFLOW_WORKER_ID].")
@server_options
def run(
    roles: tuple[Role, ...],
    api: int | None,
    publisher: int | None,
    worker: int | None,
    http_port: int | None,
    http_host: str | None,
    worker_id: str | None,
    database_url: str | None,
    kafka_bootstrap_servers: str | None,
    log_format: LogFormat | None,
) -> int:
    """Run against your own PostgreSQL and Kafka.

    Without options: all three roles in this process. With --role: these roles in this process. With --api,
    --publisher or --worker: a parent process that starts that many processes of each, watches them and starts
    them again.

    SIGTERM or Ctrl-C finishes what is in flight; a second one ends at once.
    """
    counts = chosen_counts(roles, {"api": api, "publisher": publisher, "worker": worker})
    settings = load(
        http_port=http_port,
        http_host=http_host,
        worker_id=worker_id,
        database_url=database_url,
        kafka_bootstrap_servers=kafka_bootstrap_servers,
        log_format=log_format,
    )
    refuse_shared_port(settings, set(counts or roles or ROLES))

    from orderflow.app import run_main, run_parent, run_roles

    if counts:
        return run_main(run_parent(settings, counts))
    return run_main(run_roles(settings, [role for role in ROLES if role in (roles or ROLES)]))


def chosen_counts(roles: tuple[Role, ...], given: dict[Role, int | None]) -> dict[Role, int]:
    """Processes to start by role; empty when no count was given.

    Usage error for counts beside --role, and for counts that are all zero.
    """
    counts = {role: count for role, count in given.items() if count is not None}
    if not counts:
        return {}
    if roles:
        raise click.UsageError(
            "--role is for this process, --api, --publisher and --worker start processes: give one or the other",
            click.get_current_context(silent=True),
        )
    wanted = {role: count for role, count in counts.items() if count}
    if not wanted:
        named = ", ".join(f"--{role} 0" for role in counts)
        raise click.UsageError(
            f"{named} leaves nothing to run: give one of --api, --publisher, --worker a number above 0",
            click.get_current_context(silent=True),
        )
    return wanted


def refuse_shared_port(settings: Settings, roles: set[Role]) -> None:
    """Raise SettingsError where the API and the metrics of the other roles would want the same port."""
    port = settings.metrics_port
    if "api" in roles and len(roles) > 1 and port and port == settings.http_port:
        raise SettingsError(
            f"HTTP_PORT and ORDERFLOW_METRICS_PORT are both {port}: give each its own, or ORDERFLOW_METRICS_PORT=0"
        )
