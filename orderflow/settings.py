"""Every setting of the program, validated once, from flags, environment and `.env`, in that order.

Nothing else in the program reads the environment. A setting's environment name is `ORDERFLOW_` and its name in capitals;
`DATABASE_URL`, `KAFKA_BOOTSTRAP_SERVERS` and `HTTP_PORT` are what the outside knows by those names already.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Role = Literal["api", "publisher", "worker"]
ROLES: tuple[Role, ...] = ("api", "publisher", "worker")
LogFormat = Literal["json", "console", "auto", "off"]

Positive = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


SHORTEST_SECRET = 6

_HOST = r"(?:\[[0-9a-fA-F:.]+\]|[^\s/?#@:,\[\]]*)(?::\d+)?"
_POSTGRES = re.compile(rf"postgres(?:ql)?://(?:[^\s/?#]*@)?{_HOST}(?:,{_HOST})*(?:/[^\s?#@]*)?(?:\?[^\s#@]*)?")
# To the last @ of the word: a password that should have been escaped may hold one, and a slash.
_IN_ADDRESS = re.compile(r"(?<=://)([^\s:/@]*):\S*@")
_IN_QUERY = re.compile(r"(?<=[?&]password=)[^&\s]*|(?<=[?&]sslpassword=)[^&\s]*")


class SettingsError(Exception):
    """A setting is wrong; the text names it and says what it may be."""


class Settings(BaseSettings):
    """The program's settings. Units stand in the names (`_ms`, `_seconds`) or in the description."""

    model_config = SettingsConfigDict(
        env_prefix="ORDERFLOW_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    # What the outside connects to.
    database_url: str = Field(
        "postgresql://app_user:app_password@localhost:5432/app_db",
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="PostgreSQL 15 or later",
        repr=False,
    )
    database_direct_url: str | None = Field(
        None,
        description="where LISTEN and advisory locks go, when DATABASE_URL is a PgBouncer in transaction mode",
        repr=False,
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
    http_certificate_file: str | None = Field(
        None, description="PEM file with the certificate chain for HTTPS, on the metrics port too; without it plain HTTP"
    )
    http_key_file: str | None = Field(None, description="PEM file with the certificate's key, where that is a file of its own")
    api_keys: str = Field(
        "", description="name:sha256 of each API key, separated by commas; @FILE: as it says there, one a line", repr=False
    )
    api_key_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1000.0, description="requests a second that one API key may send to one process; 0: no limit"
    )
    allow_anonymous: bool = Field(
        False, description="let the API listen beyond loopback without API keys: something else keeps strangers out"
    )
    http_reuse_port: bool = Field(False, description="share the port with other processes (set by `run --api N`)")
    http_request_timeout_seconds: Seconds = Field(10.0, description="limit for one request, body included")
    http_queue: Positive = Field(4096, description="orders that may wait for their commit; beyond it the answer is 429")
    max_backlog_age_seconds: Annotated[float, Field(ge=0)] = Field(
        300.0, description="429 to new orders while the oldest CREATED one has waited longer for its payment to begin; 0: never"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port for /livez, /readyz and /metrics in a process without the API; 0: none"
    )

    # Group commit.
    batch_size: Positive = Field(500, description="rows in one grouped statement at the most")
    batches_in_flight: Positive = Field(2, description="grouped statements of one kind that run at the same time")

    # Relay.
    relay_batch: Positive = Field(1000, description="events fetched and published in one round")
    relay_poll_ms: Annotated[int, Field(ge=10, le=1000)] = Field(800, description="how long a lost wake-up can go unnoticed")
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
        45.0, description="an event published this long ago and neither processed nor buried is published again"
    )

    # Upkeep.
    retention_days: Annotated[int, Field(ge=0, le=36_500)] = Field(
        30,
        description="age at which a finished order's events and charges are deleted, and the order is kept; must be more than "
        "Kafka keeps a record, else nothing is deleted; 0: never",
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

    circuit_failures: Annotated[int, Field(ge=0)] = Field(
        20,
        description="calls of the gateway in a row without an answer after which no worker calls it, but for a probe; 0: never",
    )

    # Life of the process.
    grace_seconds: Seconds = Field(10.0, description="time from SIGTERM to the end of the process at the most")
    crash_budget: Annotated[int, Field(ge=0)] = Field(
        5, description="crashes of one role within crash_window_seconds that are answered by a restart"
    )
    crash_window_seconds: Seconds = Field(60.0, description="see crash_budget")
    stall_seconds: Seconds = Field(
        30.0,
        description="a publisher or worker that has work to do and gets nothing done for so long is restarted, and a process "
        "whose event loop is blocked for so long ends; at least twice the time limits of Kafka and PostgreSQL together",
    )
    log_format: LogFormat = Field("auto", description="json, console, off, or auto: console on a terminal")
    metrics_interval_seconds: Seconds = Field(10.0, description="time between two METRICS lines")
    failpoints: str = Field(
        "",
        description="for tests: what goes wrong where, as in store.place.before=crash@9; @FILE: as it says there",
    )
    failpoint_seed: int = Field(1, description="seed of the failpoints' chances")
    data_dir: str = Field(".orderflow", description="where `dev` keeps its data")
    dev_children: bool = Field(False, description="internal: end with the parent process")
    http_sockets: str = Field("", description="internal: descriptors of sockets that listen already")
    ready_descriptor: int | None = Field(None, description="internal: where to tell the parent process that all roles are up")

    @field_validator("database_url", "database_direct_url")
    @classmethod
    def _is_postgres(cls, value: str | None) -> str | None:
        # Of a password that is not escaped, a part would be taken for host, port or database, and be shown as such.
        if value is not None and not _POSTGRES.fullmatch(value):
            raise ValueError(
                "must look like postgresql://user:password@host:5432/database, with %2F for / in the password, %3F for ?, "
                "%23 for # and %40 for @"
            )
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
    def listening(self) -> list[int]:
        """Descriptors of sockets that the parent process listens on for us."""
        return [int(text) for text in self.http_sockets.split(",") if text]

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


def masked(text: str) -> str:
    """The text, or URL, without the passwords of the URLs in it, fit for a person's eyes or a log."""
    return _IN_QUERY.sub("***", _IN_ADDRESS.sub(r"\1:***@", text))


def masks_for(settings: Settings) -> dict[str, str]:
    """What to show for what: every password in the settings, as written there and decoded; a short one only in a URL."""
    found = {settings.kafka_password or ""}
    for url in (settings.database_url, settings.database_direct_url):
        parts = urlsplit(url or "")
        for password in (parts.password or "", *_IN_QUERY.findall(f"?{parts.query}")):
            found |= {password, unquote(password)}
    # Masked everywhere, the password "b" would make riddles of all texts, and be told by what is missing from them.
    masks = {f":{secret}@": ":***@" for secret in found if secret}
    return masks | {secret: "***" for secret in sorted(found, key=len, reverse=True) if len(secret) >= SHORTEST_SECRET}


def without_secrets(text: str, settings: Settings) -> str:
    """The text without any password of the settings, or of a URL in it."""
    for secret, mask in masks_for(settings).items():
        text = text.replace(secret, mask)
    return masked(text)
