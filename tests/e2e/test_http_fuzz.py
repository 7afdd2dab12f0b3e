"""Bytes of every kind at the listening program: each gets an answer or a hang-up, none an order, a 5xx or a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import uuid
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fleet import Fleet, Process, api_of
from tests.rows import insert_event
from tests.servers import Broker
from tests.waiting import eventually

PATIENCE = 20.0
FORGED = '{"service":"payment-worker","type":"FORGED","timestamp":"2026-05-01T12:00:00.000Z"}'
ANSI = "\x1b[2J\x1b[31m\x9b0m\x07"
INJECTIONS = [
    *(f"{start}{FORGED}".encode() for start in ("\n", "\r\n", "\r", "\u2028", "%0a", "\x85")),
    b"\r\nX-Forged: 1", b"%0d%0aX-Forged: 1", ANSI.encode(), f"12:00:00.000 payment-worker FORGED {ANSI}".encode(),
    b"\\n\\u000a", b"\0", b'"', b"'; DROP TABLE orders; --", b"%s%n", b"\xff\xfe", b"\x80" * 30, "é".encode(),
]  # fmt: skip

BODY = json.dumps({"userId": str(uuid.UUID(int=7)), "amount": "1.00"}).encode()
piece = st.sampled_from(INJECTIONS) | st.binary(max_size=30)
names = st.sampled_from(
    [b"Host", b"User-Agent", b"Idempotency-Key", b"traceparent", b"Authorization", b"Content-Type", b"Content-Length",
     b"Transfer-Encoding", b"Connection", b"Expect", b"Upgrade", b"X-Forwarded-For", b"Cookie", b"Content-Encoding", b"X"]
) | piece  # fmt: skip
values = (
    st.sampled_from(
        [b"application/json", b"chunked", b"identity, chunked", b"close", b"keep-alive", b"0", b"-1", b"5", b"70000", b"1e3",
         b"99999999999999999999", b"100-continue", b"websocket", b"gzip", b"k" * 300, b"x" * 9000, b"Bearer ofk_x"]
    )
    | piece
    | st.tuples(st.just(b"k"), piece).map(b"".join)
)  # fmt: skip
floods = st.integers(1, 300).map(lambda count: [(b"X-%d" % number, b"v" * 50) for number in range(count)])
heads = st.lists(st.tuples(names, values), max_size=8) | floods
methods = st.sampled_from([b"GET", b"POST", b"PUT", b"OPTIONS", b"HEAD", b"TRACE", b"CONNECT", b"get", b"PRI"]) | piece
targets = st.sampled_from(
    [b"/orders", b"/orders/", b"/orders?limit=1", b"/livez", b"/orders/%00", b"*", b"http://[/", b"//", b"/" + b"a" * 9000]
) | piece.map(lambda text: b"/orders/" + text)  # fmt: skip
versions = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.1 x", b"", b"ICY"])
chunks = st.sampled_from(
    [b"5\r\nhello\r\n0\r\n\r\n", b"5\r\nhel", b"zz\r\nx\r\n", b"-1\r\n\r\n", b"F" * 17 + b"\r\n", b"0\r\nX: y"]
)
bodies = st.binary(max_size=60) | st.just(BODY[:30]) | chunks | piece
ends = st.sampled_from([b"\r\n", b"\n", b"\r"])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request that is wrong somewhere, or all over; never a whole order."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=300))
    end = draw(ends) if draw(st.integers(0, 3)) == 0 else b"\r\n"
    lines = [b" ".join((draw(methods), draw(targets), draw(versions)))]
    lines += [name + b": " + value for name, value in draw(heads)]
    return end.join(lines) + end * 2 + draw(bodies)


def answer_to(port: int, raw: bytes, silence: float = PATIENCE) -> bytes:
    """What comes back until the server hangs up, or says nothing for so long."""
    received = b""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    # That the server hangs up, before it has everything or after, is an answer too.
    with connection, contextlib.suppress(ConnectionError, TimeoutError):
        connection.sendall(raw)
        connection.settimeout(silence)
        while part := connection.recv(65536):
            received += part
    return received


def alive(port: int) -> bool:
    answer = answer_to(port, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return answer.startswith(b"HTTP/1.1 200 ")


def throw(port: int, examples: int) -> None:
    """Send that many requests, each on a connection of its own, and judge each answer."""

    answered: list[bool] = []

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(requests())
    def judged(raw: bytes) -> None:
        # What is not whole waits for its rest: that much silence is enough, as nothing follows from it.
        answer = answer_to(port, raw, 0.1)
        answered.append(bool(answer))
        if answer:
            assert re.match(rb"HTTP/\d\.\d [1-4]\d\d ", answer), answer[:500]
        head = answer.partition(b"\r\n\r\n")[0]
        assert b"X-Forged" not in head
        assert b"\x1b" not in head

    judged()
    assert any(answered)


async def port_of(process: Process) -> int:
    """The port of the API in that process."""
    return urlsplit(await api_of(process)).port or 0


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_no_bytes_get_an_order_a_5xx_or_a_line(database_url: str, connection: asyncpg.Connection) -> None:
    async with Fleet(database_url, None, "unused", ORDERFLOW_HTTP_REQUEST_TIMEOUT_SECONDS="2") as fleet:
        process = await fleet.run("--role", "api")
        port = await port_of(process)
        await asyncio.to_thread(throw, port, 400)
        assert await asyncio.to_thread(alive, port)
        process.stop()
        assert await process.end() == 0
        assert (process.said, process.errors) == ([], [])
        assert {fact.event for fact in process.facts.seen} <= {"STARTUP", "DRAINING", "STOPPED"}
    assert await connection.fetchval("SELECT count(*) FROM orders") == 0


LOUD = (
    b"User-Agent: curl \x9b2J" + FORGED.encode() + b"\r\n",
    b"X-Forwarded-For: 1.2.3.4 " + FORGED.encode() + b"\r\ntraceparent: 00-" + FORGED.encode() + b"\r\n",
    b"Idempotency-Key: " + FORGED.replace(" ", "").encode() + b"\r\n",
)
PLACE = b"POST /orders HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(BODY)
LOOK = (b"GET /orders HTTP/1.1\r\n", b"GET /orders?x=%0a" + quote(FORGED).encode() + b"%1b[2J HTTP/1.1\r\n")


@pytest.mark.parametrize("form", ["json", "console"])
async def test_an_error_that_is_logged_quotes_nobody(form: str, database_url: str, connection: asyncpg.Connection) -> None:
    # Every request that reaches the database is an error of ours, and those are logged.
    await connection.execute("ALTER TABLE orders RENAME TO elsewhere")
    async with Fleet(database_url, None, "unused", ORDERFLOW_LOG_FORMAT=form) as fleet:
        process = await fleet.run("--role", "api")
        port = await (port_of(process) if form == "json" else _port_in(process))
        for start in (PLACE, *LOOK):
            for loud in LOUD:
                raw = start + b"Host: x\r\nConnection: close\r\n" + loud + b"\r\n" + (BODY if start is PLACE else b"")
                assert (await asyncio.to_thread(answer_to, port, raw)).startswith(b"HTTP/1.1 500 ")
        process.stop()
        assert await process.end() == 0
        _nothing_is_forged(process, form)
        errors = [line for line in process.said if "REQUEST_ERROR" in line] or process.facts.of("REQUEST_ERROR")
        assert len(errors) == 3 * len(LOUD)


@pytest.mark.parametrize("form", ["json", "console"])
async def test_an_event_s_own_words_stay_in_their_field(
    form: str, database_url: str, connection: asyncpg.Connection, kafka: Broker, topic: str
) -> None:
    kind = f"Shipped\n{FORGED}\r\n{ANSI}\u2028\u202e"
    event_id = await insert_event(connection, kind=kind)
    async with Fleet(database_url, kafka, topic, ORDERFLOW_LOG_FORMAT=form) as fleet:
        process = await fleet.run("--role", "publisher", "--role", "worker")
        if form == "json":
            published = await process.facts.until("EVENT_PUBLISHED", eventId=str(event_id))
            assert published["eventType"] == kind
            await process.facts.until("EVENT_RECEIVED", eventId=str(event_id))
        else:
            await eventually(lambda: sum(str(event_id) in line for line in process.said) > 1, what="it is received")
        process.stop()
        assert await process.end() == 0
        _nothing_is_forged(process, form)


async def _port_in(process: Process) -> int:
    line = await eventually(lambda: next((line for line in process.said if "listening on" in line), ""), PATIENCE)
    return int(line.rpartition(":")[2])


def _nothing_is_forged(process: Process, form: str) -> None:
    assert not process.facts.of("FORGED")
    assert not process.errors
    if form == "json":
        # Whatever is no JSON object is among these.
        assert process.said == []
        return
    assert not process.facts.seen
    for line in process.said:
        assert line.isprintable(), repr(line)
        time, service, event, *_ = line.split()
        assert len(time) == len("12:00:00.000")
        assert service in ("orderflow", "order-api", "outbox-publisher", "payment-worker")
        assert event != "FORGED"
