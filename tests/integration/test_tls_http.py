"""HTTPS: spoken with the certificate of the settings, refused by who trusts others; a wrong file names its setting."""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from orderflow.listening import tls
from orderflow.settings import Settings, SettingsError
from tests.certificates import ELSEWHERE, Authority, two_authorities
from tests.deployment import ROOT
from tests.fleet import Fleet, Process, api_of
from tests.serving import USER, serving

Authorities = tuple[Authority, Authority]


@pytest.fixture(scope="module")
def authorities() -> Iterator[Authorities]:
    with two_authorities() as made:
        yield made


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.file))


@pytest.mark.parametrize("apart", [True, False], ids=["a file each", "one file"])
async def test_an_order_over_https(apart: bool, authorities: Authorities, database_url: str) -> None:
    ours, _ = authorities
    issued = ours.issue("api")
    files = {"http_certificate_file": str(issued.certificate), "http_key_file": str(issued.key)}
    async with serving(database_url, **(files if apart else {"http_certificate_file": str(issued.both)})) as api:
        order = {"userId": str(USER), "amount": "10.00"}
        assert (await api.ask("POST", "/orders", json=order, ssl=trusting(ours))).status == 201
        assert (await api.ask("GET", "/readyz", ssl=trusting(ours))).status == 200
        assert any(str(fields.get("message")).startswith("listening on https://") for _, _, fields in api.facts)


async def test_a_client_of_another_authority_or_name_refuses_the_server(authorities: Authorities, database_url: str) -> None:
    ours, theirs = authorities
    for authority, trusted, names in ((ours, theirs, None), (ours, ours, ELSEWHERE)):
        issued = authority.issue("refused", *([names] if names else []))
        async with serving(database_url, http_certificate_file=str(issued.both)) as api:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await api.ask("GET", "/livez", ssl=trusting(trusted))


async def test_strangers_at_the_tls_port_are_hung_up_on_and_fill_no_log(authorities: Authorities, database_url: str) -> None:
    ours, _ = authorities
    async with serving(database_url, http_certificate_file=str(ours.issue("api").both)) as api:
        for raw in (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 400, b"\x00" * 1000):
            assert b"HTTP/1.1 200" not in await api.send(raw)
        assert (await api.ask("GET", "/livez", ssl=trusting(ours))).status == 200
        assert {event for _, event, _ in api.facts} == {"STARTUP"}


async def test_an_old_protocol_is_not_spoken(authorities: Authorities, database_url: str) -> None:
    issued = authorities[0].issue("api")
    context = tls(Settings(_env_file=None, http_certificate_file=str(issued.both)))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


async def test_every_process_speaks_it_on_every_port_and_the_health_check_with_them(
    authorities: Authorities, database_url: str, unused_tcp_port: int
) -> None:
    ours, _ = authorities
    tls_settings = {"ORDERFLOW_HTTP_CERTIFICATE_FILE": str(ours.issue("api").both)}
    async with Fleet(database_url, None, "unused", **tls_settings) as fleet, aiohttp.ClientSession() as session:
        parent = await fleet.run("--api", "2")
        address = await api_of(parent)
        assert address.startswith("https://127.0.0.1:")
        alone = await fleet.run("--role", "publisher", ORDERFLOW_METRICS_PORT=str(unused_tcp_port))
        await alone.facts.until("STARTUP", service="orderflow")
        for url in (f"{address}/metrics", f"https://127.0.0.1:{unused_tcp_port}/metrics"):
            async with session.get(url, ssl=trusting(ours)) as answer:
                assert answer.status == 200
        environment = {**os.environ, **tls_settings, "HTTP_PORT": address.rpartition(":")[2]}
        command = (sys.executable, str(ROOT / "deploy/healthcheck.py"))
        check = await Process.spawn(*command, environment=environment)
        assert await check.end() == 0, check.errors
        plain = await Process.spawn(*command, environment=environment | {"ORDERFLOW_HTTP_CERTIFICATE_FILE": ""})
        assert await plain.end() == 1


async def test_wrong_files_are_named_by_their_setting(authorities: Authorities, tmp_path: Path) -> None:
    ours, theirs = authorities
    issued, other = ours.issue("api"), theirs.issue("api")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for settings, named in (
        ({"http_certificate_file": str(tmp_path / "none")}, "ORDERFLOW_HTTP_CERTIFICATE_FILE: "),
        ({"http_certificate_file": str(issued.both), "http_key_file": str(tmp_path / "none")}, "ORDERFLOW_HTTP_KEY_FILE: "),
        ({"http_certificate_file": str(nonsense)}, "ORDERFLOW_HTTP_CERTIFICATE_FILE: "),
        ({"http_certificate_file": str(issued.certificate)}, "ORDERFLOW_HTTP_CERTIFICATE_FILE: "),
        (
            {"http_certificate_file": str(issued.certificate), "http_key_file": str(other.key)},
            "ORDERFLOW_HTTP_KEY_FILE: is not",
        ),
        ({"http_key_file": str(issued.key)}, "ORDERFLOW_HTTP_KEY_FILE: is of no use"),
    ):
        with pytest.raises(SettingsError) as error:
            tls(Settings(_env_file=None, **settings))  # type: ignore[arg-type]
        assert str(error.value).startswith(named)


@pytest.mark.parametrize("arguments", [("--role", "api"), ("--api", "1")], ids=" ".join)
async def test_a_wrong_file_is_wrong_usage(arguments: tuple[str, ...], database_url: str) -> None:
    async with Fleet(database_url, None, "unused", ORDERFLOW_HTTP_CERTIFICATE_FILE="/nowhere/cert.pem") as fleet:
        process = await fleet.run(*arguments)
        assert await process.end() == 2
        line = "orderflow: ORDERFLOW_HTTP_CERTIFICATE_FILE: /nowhere/cert.pem cannot be read: No such file or directory"
        assert process.errors == [line]
