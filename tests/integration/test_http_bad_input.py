"""What comes out for bad input: one table a test, and after each no order."""

from __future__ import annotations

import json
from typing import Any

import asyncpg

from orderflow.orders.idempotency import WRONG_KEY
from tests.serving import USER, Answer, Served, serving

NOT_JSON = "the body is not JSON"
NO_FIELD = "is not a field of this request"
NOT_TWO_DECIMALS = "amount: must have at most two decimals"
OUT_OF_RANGE = "amount: must be from 0.01 to 9999999999.99"
NOT_A_DECIMAL = "amount: must be digits with at most two decimals, such as 299.99"
NOT_AN_AMOUNT = 'amount: must be a number, or a string such as "299.99"'
NOT_A_UUID = "userId: must be a UUID such as 3f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b61"
NOT_AN_OBJECT = "body: must be a JSON object with userId and amount"
NOT_A_KEY = f"Idempotency-Key: {WRONG_KEY}"


def amount(text: str) -> str:
    return f'{{"userId": "{USER}", "amount": {text}}}'


def user(text: str) -> str:
    return f'{{"userId": {text}, "amount": 10}}'


BODIES: dict[str, tuple[str | bytes, int, str]] = {
    "no body": (b"", 400, f"{NOT_JSON}: Expecting value (line 1, column 1)"),
    "not JSON": ("userId=1", 400, f"{NOT_JSON}: Expecting value (line 1, column 1)"),
    "deep nesting": ("[" * 60_000, 400, "the body is nested too deeply"),
    "deep nesting of objects": ('{"a":' * 10_000, 400, "the body is nested too deeply"),
    "duplicate key": (f'{{"userId": "{USER}", "amount": 1, "amount": 2}}', 400, "the body gives 'amount' twice"),
    "NaN": (amount("NaN"), 400, f"{NOT_JSON}: NaN is not a JSON number"),
    "Infinity": (amount("Infinity"), 400, f"{NOT_JSON}: Infinity is not a JSON number"),
    "-Infinity": (amount("-Infinity"), 400, f"{NOT_JSON}: -Infinity is not a JSON number"),
    "raw NUL in a text": (user('"\x00"'), 400, f"{NOT_JSON}: Invalid control character at (line 1, column 13)"),
    "NUL after the body": (amount("1") + "\x00", 400, f"{NOT_JSON}: Extra data (line 1, column 64)"),
    "invalid UTF-8": (user('"\xff"').encode("latin-1"), 400, "the body is not UTF-8 (byte 12)"),
    "UTF-16": (amount("1").encode("utf-16"), 400, "the body is not UTF-8 (byte 0)"),
    "byte order mark": (b"\xef\xbb\xbf", 400, f"{NOT_JSON}: Unexpected UTF-8 BOM (decode using utf-8-sig) (line 1, column 1)"),
    "array": ("[]", 422, NOT_AN_OBJECT),
    "null": ("null", 422, NOT_AN_OBJECT),
    "text": ('"x"', 422, NOT_AN_OBJECT),
    "number": ("1", 422, NOT_AN_OBJECT),
    "empty object": ("{}", 422, "userId: is required; amount: is required"),
    "amount 0": (amount("0"), 422, OUT_OF_RANGE),
    "amount -0": (amount("-0"), 422, OUT_OF_RANGE),
    "amount -1": (amount("-1"), 422, OUT_OF_RANGE),
    "amount 0.001": (amount("0.001"), 422, NOT_TWO_DECIMALS),
    "amount 10.005": (amount("10.005"), 422, NOT_TWO_DECIMALS),
    "amount 10000000000": (amount("10000000000"), 422, OUT_OF_RANGE),
    "amount 9999999999.995": (amount("9999999999.995"), 422, NOT_TWO_DECIMALS),
    "amount 1e400": (amount("1e400"), 422, OUT_OF_RANGE),
    "amount 1e999999999999": (amount("1e999999999999"), 422, OUT_OF_RANGE),
    "amount of 60,000 digits": (amount("9" * 60_000), 422, OUT_OF_RANGE),
    "amount true": (amount("true"), 422, NOT_AN_AMOUNT),
    "amount null": (amount("null"), 422, NOT_AN_AMOUNT),
    "amount []": (amount("[]"), 422, NOT_AN_AMOUNT),
    "amount {}": (amount("{}"), 422, NOT_AN_AMOUNT),
    "amount in Arabic digits": (amount('"١٢"'), 422, NOT_A_DECIMAL),
    'amount ""': (amount('""'), 422, NOT_A_DECIMAL),
    'amount "1e1"': (amount('"1e1"'), 422, NOT_A_DECIMAL),
    'amount "10.001"': (amount('"10.001"'), 422, NOT_A_DECIMAL),
    'amount "NaN"': (amount('"NaN"'), 422, NOT_A_DECIMAL),
    'amount "10\\u0000"': (amount('"10\\u0000"'), 422, NOT_A_DECIMAL),
    'amount "0.00"': (amount('"0.00"'), 422, OUT_OF_RANGE),
    "no amount": (f'{{"userId": "{USER}"}}', 422, "amount: is required"),
    "no userId": ('{"amount": 10}', 422, "userId: is required"),
    "userId not a UUID": (user('"me"'), 422, NOT_A_UUID),
    "userId an object": (user('{"id": 1}'), 422, NOT_A_UUID),
    "userId a number": (user("1"), 422, NOT_A_UUID),
    "userId null": (user("null"), 422, NOT_A_UUID),
    "userId without hyphens": (user(f'"{USER.hex}"'), 422, NOT_A_UUID),
    "userId in braces": (user(f'"{{{USER}}}"'), 422, NOT_A_UUID),
    "userId with an escaped NUL": (user('"\\u0000"'), 422, NOT_A_UUID),
    "extra field": (f'{{"userId": "{USER}", "amount": 1, "coupon": "x"}}', 422, "coupon: is not a field of this request"),
    "the name in Python's style": (f'{{"user_id": "{USER}", "amount": 1}}', 422, f"userId: is required; user_id: {NO_FIELD}"),
    "extra field with a lone surrogate": (amount('1, "\\ud800": 1'), 422, "body: has a name that is not Unicode"),
    "two wrong fields": ('{"userId": 1, "amount": 0}', 422, f"{NOT_A_UUID}; {OUT_OF_RANGE}"),
}  # fmt: skip

KEYS: dict[str, tuple[list[str], str]] = {
    "300 characters": (["k" * 300], NOT_A_KEY),
    "300 characters quoted": (['"' + "k" * 300 + '"'], NOT_A_KEY),
    "empty": ([""], NOT_A_KEY),
    "empty in quotes": (['""'], NOT_A_KEY),
    "quote not closed": (['"abc'], NOT_A_KEY),
    "a space": (["a b"], NOT_A_KEY),
    "not ASCII": (["schlüssel"], NOT_A_KEY),
    "given twice": (["a", "b"], "Idempotency-Key: may be given once"),
}

TYPES: dict[str, dict[str, str]] = {
    "none": {"Content-Type": ""},
    "text": {"Content-Type": "text/plain"},
    "form": {"Content-Type": "application/x-www-form-urlencoded"},
    "JSON in name only": {"Content-Type": "application/jsonx"},
    "problem": {"Content-Type": "application/problem+json"},
    "compressed": {"Content-Type": "application/json", "Content-Encoding": "gzip"},
}


ADDRESSES = [
    ("GET", "/", 404, "There is nothing at this address."),
    ("GET", "/orders/", 404, "There is nothing at this address."),
    ("POST", "/order", 404, "There is nothing at this address."),
    ("GET", "/orders/x/y", 404, "There is nothing at this address."),
    ("GET", "/orders/not-a-uuid", 404, "There is no order with this id."),
    ("GET", "/orders/%00", 404, "There is no order with this id."),
    ("GET", "/orders/%FF", 404, "There is no order with this id."),
    ("GET", "/orders/..%2f..%2fetc%2fpasswd", 404, "There is no order with this id."),
    ("GET", f"/orders/{USER.hex}", 404, "There is no order with this id."),
    ("GET", f"/orders/{USER}", 404, f"There is no order {USER}."),
    ("GET", f"/orders/{USER}/events", 404, f"There is no order {USER}."),
    ("GET", "/orders/x/events", 404, "There is no order with this id."),
    ("DELETE", "/orders", 405, "This address takes GET, HEAD, OPTIONS, POST."),
    ("PUT", f"/orders/{USER}", 405, "This address takes GET, HEAD, OPTIONS."),
    ("POST", "/readyz", 405, "This address takes GET, HEAD, OPTIONS."),
    ("PATCH", "/metrics", 405, "This address takes GET, HEAD, OPTIONS."),
    ("GET", "/orders?limit=0", 422, "limit: must be a whole number from 1 to 500"),
    ("GET", "/orders?limit=501", 422, "limit: must be a whole number from 1 to 500"),
    ("GET", "/orders?limit=ten", 422, "limit: must be a whole number from 1 to 500"),
    ("GET", "/orders?state=LOST", 422, "state: must be one of CREATED, PAYMENT_PENDING, PAID, FAILED"),
    ("GET", "/orders?state=%00", 422, "state: must be one of CREATED, PAYMENT_PENDING, PAID, FAILED"),
    ("GET", "/orders?after=yesterday", 422, "after: must be the `next` of an earlier answer"),
    ("GET", "/orders?limit=1&limit=2", 422, "limit: may be given once"),
]  # fmt: skip

MALFORMED = [
    (b"garbage\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 400),
    (b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
    (b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: wonders\r\n\r\n", 417),
    (b"POST /orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: wonders\r\n\r\n", 417),
]  # fmt: skip


def told(answer: Answer) -> tuple[int, str]:
    """Status and detail of a problem document, after checking its form."""
    problem = answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert problem["status"] == answer.status
    assert problem["type"]
    assert problem["title"]
    if answer.status == 422:
        assert "; ".join(f"{error['field']}: {error['message']}" for error in problem["errors"]) == problem["detail"]
    if answer.status in (409, 429, 503):
        assert int(answer.headers["Retry-After"]) >= 1
    return answer.status, problem["detail"]


async def orders(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval(
        "SELECT (SELECT count(*) FROM orders) + (SELECT count(*) FROM outbox) + (SELECT count(*) FROM idempotency_keys)"
    ))  # fmt: skip


async def post(api: Served, body: str | bytes, **headers: str) -> Answer:
    data = body.encode() if isinstance(body, str) else body
    return await api.ask("POST", "/orders", data=data, headers={"Content-Type": "application/json", **headers})


async def test_bodies(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        came_out = {name: told(await post(api, body, **{"Idempotency-Key": f"key-{number}"}))
                    for number, (name, (body, _, _)) in enumerate(BODIES.items())}  # fmt: skip
        assert came_out == {name: (status, detail) for name, (_, status, detail) in BODIES.items()}
        assert await orders(connection) == 0
        assert [fact for fact in api.facts if fact[1] != "STARTUP"] == []


async def test_many_wrong_fields_are_not_all_listed(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        answer = await post(api, json.dumps({f"field-{number}": number for number in range(3000)}))
        assert told(answer)[0] == 422
        assert len(answer.body["errors"]) == 10
        long_name = await post(api, json.dumps({"userId": str(USER), "amount": 1, "x" * 50_000: 1}))
        assert len(long_name.raw) < 1000
        assert await orders(connection) == 0


async def test_keys(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        came_out = {}
        for name, (keys, _) in KEYS.items():
            headers = [("Content-Type", "application/json"), *(("Idempotency-Key", key) for key in keys)]
            came_out[name] = told(await api.ask("POST", "/orders", data=amount("1"), headers=headers))
        assert came_out == {name: (422, detail) for name, (_, detail) in KEYS.items()}
        assert await orders(connection) == 0


async def test_types(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        for name, headers in TYPES.items():
            answer = await api.ask("POST", "/orders", data=amount("1").encode(), headers=headers)
            status, detail = told(answer)
            assert (status, detail.split(":")[0]) == (415, "Content-Encoding" if name == "compressed" else "Content-Type"), name
        missing = await api.send(b"POST /orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        assert missing.startswith(b"HTTP/1.1 415 ")
        assert await orders(connection) == 0
        for taken in ("application/json; charset=utf-8", "Application/JSON", "application/json ;charset=UTF-8"):
            answer = await api.ask("POST", "/orders", data=amount("1").encode(), headers={"Content-Type": taken})
            assert answer.status == 201, taken


async def test_64_kib_and_one_byte_more(database_url: str, connection: asyncpg.Connection) -> None:
    fits = amount("10").ljust(65_536)

    async def in_chunks(body: str) -> Any:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000].encode()

    async with serving(database_url) as api:
        headers = {"Content-Type": "application/json"}
        too_large = (413, "The body may have 65536 bytes at the most.")
        assert told(await post(api, fits + " ")) == too_large
        assert told(await post(api, " " * 1_000_000)) == too_large
        assert told(await api.ask("POST", "/orders", data=in_chunks(fits + " "), headers=headers)) == too_large
        assert told(await api.ask("POST", "/orders", data=in_chunks(fits * 50), headers=headers)) == too_large
        announced = await api.send(
            b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert announced.startswith(b"HTTP/1.1 413 ")
        assert await orders(connection) == 0
        assert (await post(api, fits)).status == 201
        assert (await api.ask("POST", "/orders", data=in_chunks(fits), headers=headers)).status == 201


async def test_addresses(database_url: str) -> None:
    async with serving(database_url) as api:
        for method, path, status, detail in ADDRESSES:
            answer = await api.ask(method, path)
            assert told(answer) == (status, detail), (method, path)
            if status == 405:
                assert f"This address takes {answer.headers['Allow']}." == detail


async def test_malformed_http_gets_a_problem_document(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        for sent, status in MALFORMED:
            head, _, body = (await api.send(sent)).partition(b"\r\n\r\n")
            assert head.split()[1] == str(status).encode(), sent[:80]
            assert b"Content-Type: application/problem+json" in head
            assert json.loads(body)["status"] == status
            assert b"aiohttp" not in head + body
        assert (await api.ask("GET", "/livez")).status == 200
        assert await orders(connection) == 0
