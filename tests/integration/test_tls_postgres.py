"""PostgreSQL over verified TLS: every session of every role, LISTEN included; a wrong authority or name is refused."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
import pytest_asyncio

from orderflow.embedded.access import server_account
from orderflow.embedded.binaries import system_binaries
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine.patience import is_transient
from orderflow.migrations import migrate
from tests import servers
from tests.certificates import ELSEWHERE, Authority, Issued, two_authorities
from tests.fleet import Client, Fleet, api_of
from tests.rows import settled
from tests.waiting import eventually

# The wheel's own are built without OpenSSL.
MAJOR = 15
SESSIONS = {"api", "publisher", "worker", "gateway", "wake", "shards", "janitor"}


@asynccontextmanager
async def speaking_tls(issued: Issued) -> AsyncIterator[EmbeddedPostgres]:
    if system_binaries(MAJOR) is None:
        if servers.under_ci():
            pytest.fail(f"PostgreSQL {MAJOR} is missing: apt install postgresql-{MAJOR}")
        pytest.skip(f"needs the system's PostgreSQL {MAJOR}, which is built with OpenSSL")
    # PostgreSQL takes a key only from a file that is its own user's alone.
    issued.key.chmod(0o600)
    if (account := server_account()) is not None:
        os.chown(issued.key, account.uid, account.gid)
    settings = {"ssl": "on", "ssl_cert_file": issued.certificate, "ssl_key_file": issued.key}
    with servers.scratch_directory() as directory:
        server = servers.make_postgres(directory / "postgres", MAJOR, settings=settings)
        try:
            await server.start()
            yield server
        finally:
            await server.wipe()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served() -> AsyncIterator[tuple[EmbeddedPostgres, Authority, Authority]]:
    with two_authorities() as (ours, theirs):
        async with speaking_tls(ours.issue("postgres")) as server:
            yield server, ours, theirs


def verified(url: str, authority: Authority) -> str:
    return f"{url}?sslmode=verify-full&sslrootcert={authority.file}"


async def test_every_session_of_every_role_is_verified(
    served: tuple[EmbeddedPostgres, Authority, Authority], kafka: servers.Broker, topic: str
) -> None:
    server, ours, _ = served
    url = verified(server.url, ours)
    await migrate(url)
    async with Fleet(url, kafka, topic) as fleet:
        process = await fleet.run()
        client = Client()
        await client.place_many(await api_of(process), 3)
        admin = await server.connect("app_db")
        try:
            await settled(admin)
            seen = await eventually(lambda: _sessions_when_all_are_there(admin), what="every part has a session")
            assert all(seen.values()), f"in plain text: {[name for name, encrypted in seen.items() if not encrypted]}"
        finally:
            await admin.close()
        doctor = await fleet.start("doctor")
        assert await doctor.end() == 0, doctor.said
        assert not [line for line in doctor.said if " problem " in line]


async def _sessions_when_all_are_there(admin: asyncpg.Connection) -> dict[str, bool]:
    rows = await admin.fetch(
        "SELECT application_name, bool_and(ssl) AS ssl FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)"
        " WHERE usename = 'app_user' GROUP BY 1"
    )
    seen = {row["application_name"]: row["ssl"] for row in rows}
    return seen if {f"orderflow {name}" for name in SESSIONS} - {"orderflow janitor"} <= set(seen) else {}


async def test_a_wrong_authority_is_refused_before_the_password_is_sent(
    served: tuple[EmbeddedPostgres, Authority, Authority],
) -> None:
    server, _, theirs = served
    async with Fleet(verified(server.url, theirs), None, "unused") as fleet:
        for command in ("migrate", "audit"):
            process = await fleet.start(command)
            assert await process.end() == 1
            (line,) = process.errors
            assert f"PostgreSQL at 127.0.0.1:{server.port} does not get through TLS" in line
            assert "sslrootcert" in line
            assert "app_password" not in line


async def test_a_name_that_is_not_the_certificate_s_is_refused() -> None:
    with two_authorities() as (ours, _):
        async with speaking_tls(ours.issue("postgres", ELSEWHERE)) as server:
            async with Fleet(verified(server.url, ours), None, "unused") as fleet:
                process = await fleet.start("migrate")
                assert await process.end() == 1
                assert "does not get through TLS" in process.errors[0]
            # verify-ca asks for the authority and not for the name.
            await migrate(verified(server.url, ours).replace("verify-full", "verify-ca"))


async def test_a_server_without_tls_is_refused(database_url: str, connection: asyncpg.Connection) -> None:
    if await connection.fetchval("SHOW ssl") == "on":
        pytest.skip("this server speaks TLS")
    async with Fleet(f"{database_url}?sslmode=require", None, "unused") as fleet:
        process = await fleet.start("orders", "list")
        assert await process.end() == 1
        assert "rejected SSL upgrade" in process.errors[0]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("sslmode=verify-full&sslrootcert=/nowhere/root.pem", "DATABASE_URL: there is no file where sslrootcert points to"),
        ("sslmode=always", "DATABASE_URL: `sslmode` parameter must be one of"),
    ],
)
async def test_what_cannot_work_names_the_setting(query: str, said: str, database_url: str) -> None:
    async with Fleet(f"{database_url}?{query}", None, "unused") as fleet:
        process = await fleet.start("orders", "list")
        assert await process.end() == 1
        assert said in process.errors[0]


def test_a_certificate_that_does_not_verify_may_be_renewed() -> None:
    assert is_transient(ssl.SSLCertVerificationError(1, "certificate has expired"))
