"""No password or key is ever shown: the whole output of commands that fail, in each way that they can, is searched for them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.orders.api_keys import new_key
from orderflow.settings import Settings, SettingsError, load, masked, masks_for, without_secrets
from tests.fleet import Process
from tests.forked import forked
from tests.servers import Broker

DATABASE = "db-s3cret/w?rd"
WRITTEN = "db-s3cret%2Fw%3Frd"
KAFKA = "kafka-s3cret"
KEY, ENTRY = new_key("alice")
TELLING = ("s3cret", KEY, ENTRY.partition(":")[2])
COMMANDS = [
    ("doctor",), ("doctor", "--json"), ("settings",), ("settings", "--json"), ("migrate",), ("migrate", "--roles"), ("audit",),
    ("orders", "list"), ("explain", "0198f3a2-7c41-7b6e-9d0f-3a5c8e1b2d47"), ("gateway", "mode"), ("dead-letters", "list"),
    ("events", "replay", "--since", "1h"), ("run",), ("run", "--role", "api"), ("run", "--api", "1", "--worker", "1"),
]  # fmt: skip
# What they cannot work with, at a server that is there.
ADDRESSES = {
    "a wrong password": f"postgresql://app_user:{WRITTEN}@{{}}/{{}}",
    "a wrong user": f"postgresql://nobody:{WRITTEN}@{{}}/{{}}",
    "no such database": f"postgresql://app_user:{WRITTEN}@{{}}/s3condary",
    "the password in the query": f"postgresql://{{}}/{{}}?user=app_user&password={WRITTEN}",
    "a mode that is none": f"postgresql://app_user:{WRITTEN}@{{}}/{{}}?sslmode=always",
    "an unescaped slash": f"postgresql://app_user:{DATABASE}@{{}}/{{}}",
    "an unescaped hash": "postgresql://app_user:db-s3cret#word@{}/{}",
    "digits and a slash": "postgresql://app_user:1/db-s3cret@{}/{}",
    "another scheme": f"mysql://app_user:{WRITTEN}@{{}}/{{}}",
    "no port": f"postgresql://app_user:{WRITTEN}@127.0.0.1:{DATABASE}/",
}
EVERY_COMMAND = "a wrong password"
SOME = [("doctor",), ("orders", "list"), ("run", "--role", "api")]


async def searched(wanted: list[tuple[tuple[str, ...], dict[str, str]]]) -> None:
    """Run these commands, each with its settings, with their tracebacks; fails for the first that tells."""
    ended = await forked([(("--debug", *command), environment) for command, environment in wanted])
    for (command, environment), (_, *outputs) in zip(wanted, ended, strict=True):
        said = "\n".join(outputs)
        assert said, (command, environment)
        found = [line for line in said.splitlines() if any(telling in line for telling in TELLING)]
        assert not found, (command, environment, found)


def given_to_them(url: str, **changes: str) -> dict[str, str]:
    return {
        "DATABASE_URL": url, "ORDERFLOW_DATABASE_DIRECT_URL": url, "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "ORDERFLOW_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "ORDERFLOW_KAFKA_USERNAME": "me",
        "ORDERFLOW_KAFKA_PASSWORD": KAFKA, "ORDERFLOW_API_KEYS": ENTRY, "HTTP_PORT": "0", "ORDERFLOW_LOG_FORMAT": "json",
        "ORDERFLOW_KAFKA_TIMEOUT_SECONDS": "2", **changes,
    }  # fmt: skip


@pytest.mark.parametrize("commands", [SOME, COMMANDS], ids=["some", "every command"])
async def test_what_cannot_be_used_is_told_without_its_secret(commands: list[tuple[str, ...]], database_url: str) -> None:
    server, _, database = database_url.partition("@")[2].partition("/")
    addresses = [address for wrong, address in ADDRESSES.items() if (commands is COMMANDS) == (wrong == EVERY_COMMAND)]
    environments = [given_to_them(address.format(server, database)) for address in addresses]
    await searched([(command, environment) for environment in environments for command in commands])


async def test_where_nobody_answers(unused_tcp_port: int) -> None:
    environment = given_to_them(f"postgresql://app_user:{WRITTEN}@127.0.0.1:{unused_tcp_port}/app_db")
    await searched([(command, environment) for command in COMMANDS if command[0] != "run"])


async def test_where_kafka_refuses_the_password(kafka: Broker, database_url: str) -> None:
    environment = given_to_them(database_url, KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap)
    await searched([(("doctor",), environment), (("doctor", "--json"), environment)])
    process = await Process.start("run", "--role", "publisher", environment=environment)
    try:
        await process.facts.until("ROLE_WAITING")
        assert not any(telling in str(process.facts.seen) + str(process.errors) for telling in TELLING)
    finally:
        await process.close()


async def test_a_key_where_its_entry_belongs(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    wrong = (KEY, f"alice:{KEY}", f"{ENTRY},{KEY}", f"@{tmp_path / 'keys'}", ENTRY.upper())
    await searched([(("run", "--role", "api"), given_to_them(database_url, ORDERFLOW_API_KEYS=keys)) for keys in wrong])


def test_neither_the_settings_nor_an_error_about_them_show_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given_to_them(f"postgresql://u:{WRITTEN}@h/d").items():
        monkeypatch.setenv(name, value)
    settings = load()
    assert not any(telling in repr(settings) + str(settings) for telling in TELLING)
    monkeypatch.setenv("DATABASE_URL", f"mysql://u:{WRITTEN}@h/d")
    monkeypatch.setenv("ORDERFLOW_KAFKA_SECURITY_PROTOCOL", KAFKA)
    with pytest.raises(SettingsError) as error:
        load()
    assert not any(telling in str(error.value) for telling in TELLING)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p/w@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u:p@w@h/d", "postgresql://u:***@h/d"),
        ("postgresql://:pw@h/d", "postgresql://:***@h/d"),
        ("postgresql://h/d?user=u&password=pw", "postgresql://h/d?user=u&password=***"),
        ("postgresql://h/d?password=pw&sslpassword=q&x=1", "postgresql://h/d?password=***&sslpassword=***&x=1"),
        ("postgresql://u@h:5432/d", "postgresql://u@h:5432/d"),
        ("see http://127.0.0.1:3000/orders", "see http://127.0.0.1:3000/orders"),
    ],
)
def test_a_url_in_any_text(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert masked(f"what ({url}) is") == f"what ({shown}) is" or "password=" in url


passwords = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=6, max_size=20)


@given(passwords, passwords)
def test_a_password_is_hidden_as_it_is_written_and_as_it_is_meant(password: str, kafka: str) -> None:
    written = quote(password, safe="")
    url = f"postgresql://u:{written}@h/d"
    settings = Settings(_env_file=None, database_url=url, kafka_password=kafka)  # type: ignore[call-arg]
    assert set(masks_for(settings)) >= {password, written, kafka}
    for text in (url, f"({password})", f"x{kafka}x", f"{written} {password}"):
        hidden = without_secrets(text, settings)
        assert "***" in hidden
        assert set(hidden) <= set("postgresql://u:***@h/d ()x")


@pytest.mark.parametrize(
    "url",
    ["postgresql://h", "postgresql://u@h", "postgres://u:p%2F@h:1/d", "postgresql:///d?host=/tmp", "postgresql://u:p:q@h/d",
     "postgresql://u:p@h1:1,h2:2/d?target_session_attrs=primary", "postgresql://u:p@[::1]:5432/d", "postgresql://u:p@q@h/d",
     "postgresql://u:p@h/d?sslmode=verify-full&sslrootcert=/etc/ssl/ca.pem"],
)  # fmt: skip
def test_addresses_that_are_meant_stay_good(url: str) -> None:
    assert load(database_url=url).database_url == url
