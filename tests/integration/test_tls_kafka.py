"""Apache Kafka over TLS, with and without a SCRAM user: an order's whole way; a wrong authority or password is refused."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest
import pytest_asyncio

from orderflow.embedded import ports
from orderflow.embedded.kafka import install
from orderflow.embedded.kafka_install import KafkaInstall, java_environment
from tests import servers
from tests.certificates import Authority, two_authorities
from tests.fleet import Client, Fleet, api_of
from tests.rows import settled, states

USER, PASSWORD = "orderflow", "correct-horse-battery"
PROTOCOLS = {"SSL": "SSL", "SASL_SSL": "SASL_SSL", "PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}


class Secured(NamedTuple):
    """A Kafka with a listener for each way in; `trusted` has signed its certificate, `foreign` has not."""

    listeners: dict[str, str]
    trusted: Authority
    foreign: Authority

    def environment(self, protocol: str, **changes: str) -> dict[str, str]:
        settings = {
            "KAFKA_BOOTSTRAP_SERVERS": self.listeners[protocol],
            "ORDERFLOW_KAFKA_SECURITY_PROTOCOL": protocol,
            "ORDERFLOW_KAFKA_CA_FILE": str(self.trusted.file),
            "ORDERFLOW_KAFKA_TIMEOUT_SECONDS": "5",
        }
        if protocol == "SASL_SSL":
            settings |= {"ORDERFLOW_KAFKA_USERNAME": USER, "ORDERFLOW_KAFKA_PASSWORD": PASSWORD}
        return settings | changes


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def secured() -> AsyncIterator[Secured]:
    choice = servers.choose_broker()
    if choice.kind != "kafka":
        pytest.skip(f"needs Apache Kafka: {choice.warning}")
    with two_authorities() as (ours, theirs), servers.scratch_directory() as directory:
        async with running(directory, ours.issue("kafka").both) as listeners:
            yield Secured(listeners, ours, theirs)


@asynccontextmanager
async def running(directory: Path, keystore: Path) -> AsyncIterator[dict[str, str]]:
    """A Kafka whose storage knows the SCRAM user from the beginning."""
    addresses = {name: f"{ports.HOST}:{ports.free_port()}" for name in PROTOCOLS}
    plain = int(addresses["PLAINTEXT"].rpartition(":")[2])
    properties: dict[str, str | int] = {
        "controller.quorum.voters": f"1@{addresses['CONTROLLER']}",
        "listeners": ",".join(f"{name}://{address}" for name, address in addresses.items()),
        "advertised.listeners": ",".join(f"{name}://{addresses[name]}" for name in PROTOCOLS if name != "CONTROLLER"),
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in PROTOCOLS.items()),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(keystore),
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
    }
    home = directory / "kafka"
    home.mkdir()
    await asyncio.to_thread(format_with_user, home, await install(), addresses)
    server = servers.make_kafka(home, port=plain, properties=properties)
    try:
        await server.start()
        yield addresses
    finally:
        await server.kill()


def format_with_user(home: Path, installed: KafkaInstall, addresses: dict[str, str]) -> None:
    written = home / "format.properties"
    written.write_text(
        "process.roles=broker,controller\nnode.id=1\ncontroller.listener.names=CONTROLLER\n"
        f"controller.quorum.voters=1@{addresses['CONTROLLER']}\nlog.dirs={home / 'data'}\n"
        f"listeners=PLAINTEXT://{addresses['PLAINTEXT']},CONTROLLER://{addresses['CONTROLLER']}\n"
    )
    user = f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"
    command = installed.command(
        "kafka.tools.StorageTool", "format", "-t", "T3JkZXJmbG93T3JkZXJmbA", "-c", written, "--add-scram", user
    )
    done = subprocess.run(command, env=java_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL"])
async def test_an_order_s_whole_way(protocol: str, secured: Secured, database_url: str, connection: asyncpg.Connection) -> None:
    topic = f"orders-{protocol.lower()}"
    async with Fleet(database_url, None, topic, **secured.environment(protocol)) as fleet:
        process = await fleet.run()
        client = Client()
        await client.place_many(await api_of(process), 3)
        await settled(connection)
        assert sum((await states(connection)).values()) == 3
        assert not process.facts.of("ROLE_CRASHED")
        doctor = await fleet.start("doctor")
        assert await doctor.end() == 0, doctor.said
        process.stop()
        assert await process.end() == 0


@pytest.mark.parametrize("wrong", ["authority", "password", "no TLS"])
async def test_what_is_wrong_is_refused_and_told_without_the_password(wrong: str, secured: Secured, database_url: str) -> None:
    changes = {
        "authority": {"ORDERFLOW_KAFKA_CA_FILE": str(secured.foreign.file)},
        "password": {"ORDERFLOW_KAFKA_PASSWORD": "wrong-horse-battery"},
        "no TLS": {"ORDERFLOW_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"},
    }[wrong]
    async with Fleet(database_url, None, "refused", **secured.environment("SASL_SSL", **changes)) as fleet:
        process = await fleet.run("--role", "publisher")
        waiting = await process.facts.until("ROLE_WAITING", role="publisher")
        assert "cannot be reached over SASL_" in str(waiting["reason"])
        told = await process.facts.until("LIBRARY_WARNING")
        doctor = await fleet.start("doctor")
        assert await doctor.end() == 1
        process.stop()
        assert await process.end() == 0
        everything = "\n".join([*doctor.said, *doctor.errors, *process.said, *process.errors, str(process.facts.seen)])
        assert "horse" not in everything
        assert "cannot be reached" in "\n".join(doctor.said)
        assert told["logger"].startswith("aiokafka")


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_an_authority_that_cannot_be_read_names_its_setting(
    content: str | None, secured: Secured, database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    environment = secured.environment("SSL", ORDERFLOW_KAFKA_CA_FILE=str(file))
    async with Fleet(database_url, None, "unused", **environment) as fleet:
        process = await fleet.run("--role", "worker")
        assert await process.end() == 1
        assert process.errors[0].startswith(f"orderflow: ORDERFLOW_KAFKA_CA_FILE: {file} is not a PEM file to be read")
        doctor = await fleet.start("doctor")
        assert await doctor.end() == 1
        assert any("ORDERFLOW_KAFKA_CA_FILE" in line for line in doctor.said)
