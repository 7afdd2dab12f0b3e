"""docker-compose.yml, Dockerfile and deploy/: checked by schema and by reading; no container is started here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orderflow.settings import ROLES, Settings
from tests.deployment import COMPOSE, COMPOSE_FILE, DOCKERFILE, FINAL_STAGE, ROOT, SERVICES, environment_of, final

OURS = [name for name, service in SERVICES.items() if str(service.get("image", "")).startswith("orderflow")]
GRACE = Settings.model_fields["grace_seconds"].default

PINNED = re.compile(r"[a-z0-9./-]+:\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")


def settings_by_environment_name() -> set[str]:
    """Every environment variable that the settings know."""
    known = {f"ORDERFLOW_{name.upper()}" for name in Settings.model_fields}
    return known | {"DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS", "HTTP_PORT"}


def test_it_is_a_compose_file() -> None:
    command = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE))
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_check_finds_a_mistake(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(yaml.safe_dump({"services": {"app": {"image": "a:1", "porst": ["80:80"]}}}), encoding="utf-8")
    command = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong))
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    image = SERVICES[name]["image"]
    assert PINNED.fullmatch(image), f"{image} is not pinned to a release"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check_or_ends(name: str) -> None:
    service = SERVICES[name]
    if name == "migrate":
        assert service["restart"] == "no"
    else:
        assert "healthcheck" in service or any(instruction == "HEALTHCHECK" for instruction, _ in FINAL_STAGE)


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_waits_for_exists_and_can_happen(name: str) -> None:
    for target, wait in SERVICES[name].get("depends_on", {}).items():
        assert "profiles" not in SERVICES[target], f"{name} waits for {target}, which plain `up` does not start"
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[target]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert SERVICES[target]["restart"] == "no"


def test_the_start_is_ordered() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in set(OURS) - {"migrate"}:
        assert SERVICES[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "kafka": {"condition": "service_healthy"},
        }


@pytest.mark.parametrize("name", SERVICES)
def test_volumes_are_named_and_mounts_exist(name: str) -> None:
    for mount in SERVICES[name].get("volumes", []):
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (ROOT / source).exists(), f"{name} mounts {source}, which is not in the tree"
        else:
            assert source in COMPOSE["volumes"], f"{name} uses the volume {source}, which is not declared"


@pytest.mark.parametrize("profile", [None, "split"])
def test_ports_are_on_the_loopback_address_and_have_one_owner(profile: str | None) -> None:
    # `--scale app=0` goes with the profile: the file's own comment says so.
    running = {
        name: service
        for name, service in SERVICES.items()
        if (profile in service["profiles"] if "profiles" in service else not (profile and name == "app"))
    }
    published = [port for service in running.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published), published
    outside = [port.split(":")[1] for port in published]
    assert sorted(outside) == ["3000", "5050", "5432", "9092"]


@pytest.mark.parametrize("name", OURS)
def test_every_setting_exists(name: str) -> None:
    environment = SERVICES[name].get("environment", {})
    assert set(environment) <= settings_by_environment_name()
    assert environment["DATABASE_URL"] == "postgresql://app_user:app_password@postgres:5432/app_db"
    if name != "migrate":
        assert environment["KAFKA_BOOTSTRAP_SERVERS"] == "kafka:19092"


@pytest.mark.parametrize("name", OURS)
def test_an_api_without_keys_is_meant_and_published_on_loopback_only(name: str) -> None:
    environment = environment_of(name)
    if "ORDERFLOW_API_KEYS" not in environment and name != "migrate":
        assert environment["ORDERFLOW_ALLOW_ANONYMOUS"] == "true"
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))
    # The image alone makes no such promise.
    assert "ANONYMOUS" not in " ".join(rest for instruction, rest in FINAL_STAGE if instruction == "ENV")


@pytest.mark.parametrize("name", OURS)
def test_the_grace_period_is_longer_than_the_programs(name: str) -> None:
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > GRACE


def test_the_profile_splits_every_role() -> None:
    split = {name: service for name, service in SERVICES.items() if service.get("profiles") == ["split"]}
    started = " ".join(str(service.get("command", "")) + str(service.get("entrypoint", "")) for service in split.values())
    assert len(split) == len(ROLES)
    for role in ROLES:
        assert re.search(rf"--role\W+{role}\b", started), role
    assert SERVICES["app"]["command"] == ["run"]
    assert "profiles" not in SERVICES["app"]


@pytest.mark.parametrize("name", ["publisher", "worker"])
def test_a_role_without_the_api_answers_the_health_check(name: str) -> None:
    assert SERVICES[name]["environment"]["ORDERFLOW_METRICS_PORT"] > 0


def test_kafka_is_reachable_from_both_sides() -> None:
    kafka = SERVICES["kafka"]["environment"]
    listeners = dict(row.split("://") for row in kafka["KAFKA_LISTENERS"].split(","))
    advertised = dict(row.split("://") for row in kafka["KAFKA_ADVERTISED_LISTENERS"].split(","))
    protocols = dict(row.split(":") for row in kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    assert set(listeners) == set(protocols) == {*advertised, kafka["KAFKA_CONTROLLER_LISTENER_NAMES"]}
    assert kafka["KAFKA_INTER_BROKER_LISTENER_NAME"] in advertised
    assert set(advertised.values()) == {"kafka:19092", "localhost:9092"}
    for name, address in advertised.items():
        assert listeners[name].rpartition(":")[2] == address.rpartition(":")[2]
    assert SERVICES["kafka"]["volumes"] == [f"kafka-data:{kafka['KAFKA_LOG_DIRS']}"]


def test_pgadmin_knows_the_database() -> None:
    servers = json.loads((ROOT / "deploy/pgadmin/servers.json").read_text(encoding="utf-8"))["Servers"]
    host, port, _, user, password = (ROOT / "deploy/pgadmin/pgpass").read_text(encoding="utf-8").strip().split(":")
    postgres = SERVICES["postgres"]["environment"]
    (server,) = servers.values()
    assert (server["Host"], server["Port"], server["Username"]) == (host, int(port), user)
    assert host in SERVICES
    assert (server["MaintenanceDB"], user, password) == (
        postgres["POSTGRES_DB"],
        postgres["POSTGRES_USER"],
        postgres["POSTGRES_PASSWORD"],
    )
    assert server["PassFile"] in " ".join(SERVICES["pgadmin"]["entrypoint"])


def test_the_image_is_built_from_locked_packages_on_pinned_images() -> None:
    bases = [rest.split()[0] for name, rest in DOCKERFILE if name == "FROM"]
    assert len(bases) == 2
    assert all(PINNED.fullmatch(base) for base in bases), bases
    installs = [
        part for name, rest in DOCKERFILE if name == "RUN" for part in rest.split("&&") if re.search(r"pip\b.* install", part)
    ]
    assert installs
    for part in installs:
        assert "--require-hashes" in part or "--no-index" in part, part


def test_the_image_takes_only_what_is_there_and_let_in() -> None:
    let_in = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    for name, rest in DOCKERFILE:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == entry or source.startswith(f"{entry}/") for entry in let_in), source


def test_the_image_is_not_root_and_ends_on_sigterm() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", final("USER"))
    assert final("STOPSIGNAL") == "SIGTERM"
    assert final("EXPOSE") == "3000"
    # As JSON lists: a shell in between would keep the signal for itself.
    assert json.loads(final("ENTRYPOINT")) == ["orderflow"]
    assert json.loads(final("CMD")) == ["run"]
    assert "ORDERFLOW_HTTP_HOST=0.0.0.0" in final("ENV")


def test_the_health_check_asks_for_readiness() -> None:
    assert final("HEALTHCHECK").endswith('CMD ["python", "/opt/orderflow/healthcheck.py"]')
    assert "/readyz" in (ROOT / "deploy/healthcheck.py").read_text(encoding="utf-8")
