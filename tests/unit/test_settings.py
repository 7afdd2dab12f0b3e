"""Settings: precedence, what is refused and how it is said, and the pages that list them all."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from dotenv import dotenv_values

from orderflow.commands import environment
from orderflow.commands.checks import configuration
from orderflow.commands.settings import effective, env_example, markdown, public_fields, settings, text_of
from orderflow.settings import Settings, SettingsError, environment_name, load, masked

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting in the environment, and no `.env` in the working directory."""
    for name in environment.given():
        if name in environment.names().values() or name.startswith(environment.PREFIX):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_readme_has_every_setting() -> None:
    assert markdown().strip() in (ROOT / "README.md").read_text("utf-8"), "write it again: orderflow settings --markdown"


def test_the_defaults_are_those_of_the_contract() -> None:
    found = load()
    assert found.http_port == 3000
    assert found.database_url == "postgresql://app_user:app_password@localhost:5432/app_db"
    assert found.kafka_bootstrap_servers == "localhost:9092"
    assert (found.topic, found.consumer_group, found.worker_id) == ("order-events", "payment-worker", "payment-worker-1")
    assert (found.gateway_delay_ms, found.gateway_success_rate) == (500, 0.7)
    assert (found.max_attempts, found.metrics_interval_seconds, found.grace_seconds) == (3, 10.0, 10.0)


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("HTTP_PORT=3001\nORDERFLOW_GATEWAY_DELAY_MS=1\nORDERFLOW_TOPIC=from-file\n")
    monkeypatch.setenv("HTTP_PORT", "3002")
    monkeypatch.setenv("ORDERFLOW_GATEWAY_DELAY_MS", "2")
    found = load(http_port=3003, topic=None)
    assert (found.http_port, found.gateway_delay_ms, found.topic) == (3003, 2, "from-file")


@pytest.mark.parametrize("name", ["database_url", "kafka_bootstrap_servers", "http_port", "log_format"])
def test_every_shared_flag_wins_over_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "database_url": ("postgresql://a@env/x", "postgresql://a@flag/x"),
        "kafka_bootstrap_servers": ("env:1", "flag:2"),
        "http_port": ("1", 2),
        "log_format": ("json", "console"),
    }
    from_environment, flag = values[name]
    monkeypatch.setenv(environment_name(name), str(from_environment))
    assert getattr(load(**{name: flag}), name) == flag


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://root:hunter2@db/x"),
        ("DATABASE_URL", ""),
        ("ORDERFLOW_DATABASE_DIRECT_URL", "db:5432"),
        ("KAFKA_BOOTSTRAP_SERVERS", "broker"),
        ("KAFKA_BOOTSTRAP_SERVERS", "broker:9092,other:0"),
        ("KAFKA_BOOTSTRAP_SERVERS", "broker:99999"),
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "-1"),
        ("HTTP_PORT", "3000x"),
        ("ORDERFLOW_GATEWAY_SUCCESS_RATE", "1.1"),
        ("ORDERFLOW_GATEWAY_SUCCESS_RATE", "nan"),
        ("ORDERFLOW_GATEWAY_DELAY_MS", "-1"),
        ("ORDERFLOW_MAX_ATTEMPTS", "0"),
        ("ORDERFLOW_LOG_FORMAT", "xml"),
        ("ORDERFLOW_TOPIC", "no blanks"),
        ("ORDERFLOW_WORKER_ID", ""),
        ("ORDERFLOW_GRACE_SECONDS", "0"),
        ("ORDERFLOW_RELAY_POLL_MS", "1001"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        load()
    assert str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)
    assert "hunter2" not in str(error.value)


def test_every_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "x")
    monkeypatch.setenv("ORDERFLOW_TOPIC", "?")
    with pytest.raises(SettingsError, match=r"(?=.*HTTP_PORT: )(?=.*ORDERFLOW_TOPIC: )"):
        load()


def test_a_password_is_masked_and_a_url_without_one_stays() -> None:
    assert masked("postgresql://u:pa:ss@h:1/d") == "postgresql://u:***@h:1/d"
    assert masked("postgresql://u@h/d") == "postgresql://u@h/d"


def test_the_example_file_is_what_the_settings_say() -> None:
    assert (ROOT / ".env.example").read_text("utf-8") == env_example(), (
        "write it again: python -m orderflow settings --env > .env.example"
    )


def test_the_example_file_changes_nothing_when_it_is_copied() -> None:
    Path(".env").write_text(env_example())
    assert load() == Settings()
    assert {name: field.default for name, field in public_fields()} == {
        name: getattr(load(), name) for name, _ in public_fields()
    }


def test_the_example_file_names_every_setting_with_default_and_description() -> None:
    text = env_example()
    found = dotenv_values(stream=StringIO(text.replace("\n#ORDERFLOW", "\nORDERFLOW")))
    for name, field in public_fields():
        assert found[environment_name(name)] == text_of(field.default)
        assert field.description
        assert field.description in text
        assert f"| `{environment_name(name)}` |" in markdown()


def test_units_stand_beside_the_values() -> None:
    assert "# [ms] how long the simulated gateway takes\nORDERFLOW_GATEWAY_DELAY_MS=500\n" in env_example()
    assert "| `ORDERFLOW_GRACE_SECONDS` | `10` | s |" in markdown()


def test_what_is_in_force_and_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("ORDERFLOW_TOPIC=from-file\n")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@db/x")
    monkeypatch.setenv("ORDERFLOW_KAFKA_PASSWORD", "hunter2")
    found = {setting.name: setting for setting in effective(load())}
    assert (found["ORDERFLOW_TOPIC"].value, found["ORDERFLOW_TOPIC"].source) == ("from-file", ".env")
    assert found["DATABASE_URL"].value == "postgresql://me:***@db/x"
    assert found["DATABASE_URL"].source == "environment"
    assert found["HTTP_PORT"].source == "default"
    result = CliRunner().invoke(settings, ["--json"])
    assert result.exit_code == 0
    assert "hunter2" not in result.output
    assert "hunter2" not in CliRunner().invoke(settings).output


def test_a_slip_in_a_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("ORDERFLOW_GATEWAY_DELAY=1\n")
    monkeypatch.setenv("ORDERFLOW_XYZZY", "1")
    monkeypatch.setenv("ORDERFLOW_HTTP_PORT", "3001")
    monkeypatch.setenv("orderflow_topic", "t")
    assert environment.unknown(environment.given()) == {
        "ORDERFLOW_GATEWAY_DELAY": "ORDERFLOW_GATEWAY_DELAY_MS",
        "ORDERFLOW_HTTP_PORT": "HTTP_PORT",
        "ORDERFLOW_XYZZY": "",
    }
    warnings = [check for check in configuration.check(load()) if check.level == "warning"]
    assert warnings[0].advice == "did you mean ORDERFLOW_GATEWAY_DELAY_MS?"
    assert len(warnings) == 3


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "ok"),
        ({"gateway_delay_ms": 5000}, "problem"),
        ({"kafka_security_protocol": "SASL_SSL"}, "problem"),
        ({"kafka_security_protocol": "SASL_SSL", "kafka_username": "u", "kafka_password": "p"}, "ok"),
        ({"kafka_username": "u"}, "warning"),
        ({"backoff_base_ms": 60_000}, "warning"),
        ({"http_host": "0.0.0.0"}, "problem"),
        ({"http_host": "0.0.0.0", "allow_anonymous": True}, "warning"),
        ({"http_host": "0.0.0.0", "api_keys": "a:" + "0" * 64}, "warning"),
        ({"api_keys": "a:" + "0" * 64}, "ok"),
        ({"api_keys": "a"}, "problem"),
        ({"http_key_file": "key.pem"}, "problem"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, object], level: str) -> None:
    assert configuration.check(load(**changes))[-1].level == level


def test_a_process_of_ours_inherits_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://other/x")
    monkeypatch.setenv("ORDERFLOW_XYZZY", "1")
    monkeypatch.setenv("LANG", "C.UTF-8")
    found = environment.child_environment({"HTTP_PORT": "0"})
    assert "DATABASE_URL" not in found
    assert "ORDERFLOW_XYZZY" not in found
    assert (found["HTTP_PORT"], found["LANG"]) == ("0", "C.UTF-8")


def test_the_settings_command_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from orderflow.cli import cli

    monkeypatch.setenv("HTTP_PORT", "x")
    result = CliRunner().invoke(cli, ["settings"])
    assert result.exit_code == 2
    assert result.stderr.startswith("orderflow: HTTP_PORT: ")
    assert result.stderr.count("\n") == 1
    assert isinstance(cli, click.Group)
