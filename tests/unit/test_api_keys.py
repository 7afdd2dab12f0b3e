"""API keys: what an entry is, what is refused without showing it, who is admitted, and each key's rate."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from orderflow import listening
from orderflow.commands.keys import keys as keys_command
from orderflow.orders import api_keys
from orderflow.orders.api_keys import ApiKeys, WrongKeys, new_key
from orderflow.orders.problems import Problem
from orderflow.settings import Settings, SettingsError

# Not drawn at random: they name the cases, and every process of a test run must find the same ones.
KEY, OTHER = f"ofk_{'k' * 43}", f"ofk_{'o' * 43}"
ENTRY, OTHER_ENTRY = (f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in (("alice", KEY), ("bob", OTHER)))


def settings(**given: object) -> Settings:
    return Settings(_env_file=None, **given)  # type: ignore[arg-type]


def status_of(keys: ApiKeys, authorization: str | None) -> int:
    try:
        return 200 if keys.admit(authorization) is None else 429
    except Problem as problem:
        return problem.status


def test_a_key_has_256_bits_and_its_entry_holds_nothing_but_its_digest() -> None:
    key, entry = new_key("alice")
    assert key.startswith("ofk_")
    assert len(key) == len("ofk_") + 43
    assert f"alice:{hashlib.sha256(key.encode()).hexdigest()}" == entry
    assert new_key("alice") != new_key("alice")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a,b", "ü", "a\n", "x" * 65])
def test_a_name_that_no_entry_can_have(name: str) -> None:
    with pytest.raises(WrongKeys, match="a name is"):
        new_key(name)


@pytest.mark.parametrize(
    "entries", [f"{ENTRY},{OTHER_ENTRY}", f" {ENTRY} ,, {OTHER_ENTRY},", f"# ours\n{ENTRY} # hers\n\n{OTHER_ENTRY}"]
)
def test_several_keys_are_good_at_once(entries: str) -> None:
    keys = ApiKeys(entries)
    assert keys.names == ["alice", "bob"]
    assert [status_of(keys, f"Bearer {key}") for key in (KEY, OTHER)] == [200, 200]


def test_a_name_may_have_two_keys_while_one_takes_the_other_s_place() -> None:
    key, entry = new_key("alice")
    assert [status_of(ApiKeys(f"{ENTRY},{entry}"), f"Bearer {good}") for good in (KEY, key)] == [200, 200]


@pytest.mark.parametrize(
    "wrong", [KEY, f"alice:{KEY}", "alice:", ENTRY[:-1], ENTRY.upper(), f"{ENTRY}0", f"{ENTRY}:admin", f"{OTHER_ENTRY} {ENTRY}"]
)
def test_what_is_no_entry_is_refused_by_its_number_and_never_shown(wrong: str) -> None:
    with pytest.raises(WrongKeys) as error:
        ApiKeys(f"{OTHER_ENTRY},{wrong}")
    assert str(error.value).startswith("entry 2 is ")
    assert KEY not in str(error.value)


def test_an_entry_that_is_there_twice_is_refused() -> None:
    with pytest.raises(WrongKeys, match="entry 2 is there twice"):
        ApiKeys(f"{ENTRY},carol:{ENTRY.partition(':')[2]}")


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}",
     f"Bearer {ENTRY.partition(':')[2]}", f"Bearer{KEY}", "Bearer \udcff\ud800", f"Bearer {KEY}, Bearer {KEY}"],
)  # fmt: skip
def test_everything_but_the_key_is_refused(authorization: str | None) -> None:
    assert status_of(ApiKeys(ENTRY), authorization) == 401


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} "])
def test_the_scheme_is_read_in_any_case(authorization: str) -> None:
    assert status_of(ApiKeys(ENTRY), authorization) == 200


@given(st.text() | st.text().map("Bearer {}".format))
def test_any_header_is_refused_and_nothing_worse(authorization: str) -> None:
    assert status_of(ApiKeys(ENTRY), authorization) == 401


def test_digests_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return False

    monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
    assert status_of(ApiKeys(ENTRY), f"Bearer {KEY}") == 401
    assert compared == [(hashlib.sha256(KEY.encode()).digest(),) * 2]


def test_a_key_has_its_own_rate_and_gets_it_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(api_keys.time, "monotonic", lambda: now[0])
    keys = ApiKeys(f"{ENTRY},{OTHER_ENTRY}", rate=2.0)
    alice, bob = f"Bearer {KEY}", f"Bearer {OTHER}"
    assert [status_of(keys, alice) for _ in range(3)] == [200, 200, 429]
    assert status_of(keys, bob) == 200
    assert keys.admit(alice) == 0.5
    now[0] += 0.5
    assert [status_of(keys, alice) for _ in range(2)] == [200, 429]
    now[0] += 3600.0
    assert [status_of(keys, alice) for _ in range(3)] == [200, 200, 429]


def test_a_rate_below_one_lets_one_request_through_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(api_keys.time, "monotonic", lambda: now[0])
    keys = ApiKeys(ENTRY, rate=0.1)
    assert keys.admit(f"Bearer {KEY}") is None
    assert keys.admit(f"Bearer {KEY}") == pytest.approx(10.0)
    now[0] = 10.5
    assert keys.admit(f"Bearer {KEY}") is None


def test_no_rate_is_no_limit() -> None:
    keys = ApiKeys(ENTRY, rate=0.0)
    assert {status_of(keys, f"Bearer {KEY}") for _ in range(2000)} == {200}


def test_without_keys_a_handler_is_itself() -> None:
    async def handler(request: object) -> None: ...

    assert ApiKeys("").guard(handler) is handler  # type: ignore[arg-type]


# What a process asks of its settings before it listens.


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert not listening.api_keys(settings(http_host=host))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.7", "192.168.1.4", "api.example.com", "localhost.example.com", "0"]
)
def test_beyond_loopback_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(SettingsError, match=r"^ORDERFLOW_HTTP_HOST: .*ORDERFLOW_API_KEYS.*ORDERFLOW_ALLOW_ANONYMOUS=true"):
        listening.api_keys(settings(http_host=host))
    assert not listening.api_keys(settings(http_host=host, allow_anonymous=True))
    assert listening.api_keys(settings(http_host=host, api_keys=ENTRY))
    # The word takes no key away.
    assert listening.api_keys(settings(http_host=host, api_keys=ENTRY, allow_anonymous=True))


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# rotated in May\n{ENTRY}\n{OTHER_ENTRY}\n")
    assert listening.api_keys(settings(api_keys=f"@{file}")).names == ["alice", "bob"]


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", KEY.encode(), b"\xff\xfe"])
def test_a_file_without_usable_keys_is_named_and_never_means_no_keys(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"^ORDERFLOW_API_KEYS: ") as error:
        listening.api_keys(settings(api_keys=f"@{file}"))
    assert KEY not in str(error.value)


# The command.


def test_the_command_prints_a_key_that_its_entry_lets_in() -> None:
    shown = CliRunner().invoke(keys_command, ["new", "alice"])
    assert shown.exit_code == 0
    key, entry = (line.strip() for line in shown.output.splitlines() if line.startswith("    ") and "Bearer" not in line)
    assert status_of(ApiKeys(entry), f"Bearer {key}") == 200


def test_the_command_refuses_a_name_with_2() -> None:
    refused = CliRunner().invoke(keys_command, ["new", "a b"])
    assert refused.exit_code == 2
    assert "letters, digits" in refused.output
