"""Every setting of the program, validated once, from flags, environment and `.env`, in that order.

Nothing else in the program reads the environment. A setting's environment name is `ORDERFLOW_` and its name in capitals;
`DATABASE_URL`, `KAFKA_BOOTSTRAP_SERVERS` and `HTTP_PORT` are what the outside knows by those names already.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Role = Literal["api", "publisher", "worker"]
ROLES: tuple[Role, ...] = ("api", "publisher", "worker")
LogFormat = Literal["json", "console", "auto", "off"]

Positive = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class SettingsError(Exception):
    """A setting is wrong; the text names it and says what it may be."""


class Settings(BaseSettings):
    """The program's settings. Units stand in the names (`_ms`, `_seconds`) or in the description."""

    model_config = SettingsConfigDict(
        env_prefix="ORDERFLOW_", env_file=".env", extra="ignore", frozen=True, populate_by_name=True
    )

    # What the outside connects to.
    database_url: str = Field(
        "postgresql://app_user:app_password@localhost:5432/app_db",
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="PostgreSQL 15 or later",
    )
    database_direct_url: str | None = Field(
        None,
        description="where LISTEN and advisory locks go, when DATABASE_URL is a PgBouncer in transaction mode",
    )
    database_pool_size: Positive = Field(8, description="connections a process opens at the most")
    database_timeout_seconds: Seconds = Field(
        5.0, description="limit for connecting, for acquiring a connection and for one statement"
    )
    database_statement_cache: int = Field(
        256, ge=0, description="prepared statements a connection keeps; 0 for PgBouncer in transaction mode"
    )
    kafka_bootstrap_servers: str = Field(
        "localhost:9092",
        validation_alias=AliasChoices("KAFKA_BOOTSTRAP_SERVERS", "kafka_bootstrap_servers"),
        description="host:port, several separated by commas",
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to speak to Kafka"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="used with SASL_* only"
    )
    kafka_username: str | None = Field(None, description="SASL user")
    kafka_password: str | None = Field(None, description="SASL password", repr=False)
    kafka_ca_file: str | None = Field(None, description="PEM file of the authority that signed the brokers' certificates")
    kafka_timeout_seconds: Seconds = Field(10.0, description="limit for one request or one send")
    kafka_embedded: bool = Field(False, description="internal: the broker is the embedded one of `dev`")
    topic: str = Field("order-events", pattern=r"^[A-Za-z0-9._-]{1,249}$", description="the topic of all events")
    topic_partitions: Positive = Field(12, description="partitions of the topic when orderflow has to create it")
    topic_replication: Annotated[int, Field(ge=-1)] = Field(
        -1, description="replicas of the topic when orderflow has to create it; -1: the broker's default"
    )
    consumer_group: str = Field("payment-worker", min_length=1, description="Kafka consumer group of the workers")

    # HTTP.
    http_host: str = Field("127.0.0.1", description="address the API listens on")
    http_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        3000, validation_alias=AliasChoices("HTTP_PORT", "http_port"), description="port the API listens on; 0: any free one"
    )
    http_reuse_port: bool = Field(False, description="share the port with other processes (set by `run --api N`)")
    http_request_timeout_seconds: Seconds = Field(10.0, description="limit for one request, body included")
    http_queue: Positive = Field(4096, description="orders that may wait for their commit; beyond it the answer is 429")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port for /livez, /readyz and /metrics in a process without the API; 0: none"
    )

    # Group commit.
    batch_size: Positive = Field(500, description="rows in one grouped statement at the most")
    batches_in_flight: Positive = Field(2, description="grouped statements of one kind that run at the same time")

    # Relay.
    relay_batch: Positive = Field(1000, description="events fetched and published in one round")
    relay_poll_ms: Annotated[int, Field(ge=10, le=1000)] = Field(1000, description="how long a lost wake-up can go unnoticed")
    wake_heartbeat_seconds: Seconds = Field(
        2.0, description="how often the LISTEN connection is probed, and how long the probe may take"
    )

    # Worker.
    worker_id: str = Field(
        "payment-worker-1", min_length=1, description="name of this worker in processed_events and in the log"
    )
    max_in_flight: Positive = Field(5000, description="deliveries a worker holds at the same time before it pauses partitions")
    commit_interval_ms: Annotated[int, Field(ge=10)] = Field(500, description="how often finished offsets are committed")
    max_attempts: Positive = Field(3, description="failed attempts after which an event is dead-lettered")
    backoff_base_ms: Milliseconds = Field(
        200, description="upper limit of the first retry's delay; doubles with each attempt, full jitter"
    )
    backoff_cap_ms: Milliseconds = Field(30_000, description="upper limit of any retry's delay")
    reconcile_seconds: Seconds = Field(
        60.0, description="an event published this long ago and neither processed nor buried is published again"
    )

    # Gateway.
    gateway_delay_ms: Milliseconds = Field(500, description="how long the simulated gateway takes")
    gateway_success_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7, description="share of orders that the simulated gateway charges in mode random"
    )
    gateway_error_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of orders whose first charge fails with an error at the simulated gateway"
    )
    gateway_seed: int = Field(1, description="seed of the simulated gateway's outcomes")
    gateway_timeout_ms: Annotated[int, Field(ge=1)] = Field(
        5000, description="limit for one call of the gateway; past it the outcome is unknown"
    )

    # Life of the process.
    grace_seconds: Seconds = Field(10.0, description="time from SIGTERM to the end of the process at the most")
    crash_budget: Annotated[int, Field(ge=0)] = Field(
        5, description="crashes of one role within crash_window_seconds that are answered by a restart"
    )
    crash_window_seconds: Seconds = Field(60.0, description="see crash_budget")
    log_format: LogFormat = Field("auto", description="json, console, off, or auto: console on a terminal")
    metrics_interval_seconds: Seconds = Field(10.0, description="time between two METRICS lines")
    data_dir: str = Field(".orderflow", description="where `dev` keeps its data")
    dev_children: bool = Field(False, description="internal: end with the parent process")

    @field_validator("database_url", "database_direct_url")
    @classmethod
    def _is_postgres(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("postgresql", "postgres"):
            raise ValueError("must look like postgresql://user:password@host:5432/database")
        return value

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _is_host_list(cls, value: str) -> str:
        for server in value.split(","):
            host, _, port = server.strip().rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"{server.strip()!r} is not host:port")
        return value

    @property
    def direct_url(self) -> str:
        """Where session-bound features (LISTEN, advisory locks) connect to."""
        return self.database_direct_url or self.database_url


def environment_name(field: str) -> str:
    """The environment variable of a setting, by the setting's name."""
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"ORDERFLOW_{field.upper()}"


def load(**flags: Any) -> Settings:
    """Read the settings; flags that are None are as if not given.

    Raises SettingsError with one line that names each wrong setting by its environment variable.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        wrong = []
        for detail in error.errors():
            name = str(detail["loc"][0]) if detail["loc"] else "?"
            shown = environment_name(name) if name in Settings.model_fields else name
            wrong.append(f"{shown}: {detail['msg'].removeprefix('Value error, ')}")
        raise SettingsError("; ".join(wrong)) from None


def masked(url: str) -> str:
    """The URL without its password, fit for a person's eyes or a log."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@", 1)))
