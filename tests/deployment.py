"""docker-compose.yml and Dockerfile as the tests read them: services, instructions, and what a container would start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_FILE = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions in order: (name, the rest, continuation lines joined)."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    rows = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in rows]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
FINAL_STAGE = DOCKERFILE[max(i for i, (name, _) in enumerate(DOCKERFILE) if name == "FROM") :]


def final(name: str) -> str:
    """The last value of an instruction in the image's final stage."""
    return [rest for instruction, rest in FINAL_STAGE if instruction == name][-1]


def command_of(service: str) -> list[str]:
    """What a container of that service starts: the image's entry point and command where the service has none of its own."""
    given = SERVICES[service]
    entrypoint = given.get("entrypoint", json.loads(final("ENTRYPOINT")))
    # As in Compose: an entry point of the service's own leaves the image's command out.
    command = given.get("command", [] if "entrypoint" in given else json.loads(final("CMD")))
    return [word.replace("$$", "$") for word in (*entrypoint, *command)]


def environment_of(service: str) -> dict[str, str]:
    """The variables of such a container: the image's, then the service's."""
    image = dict(pair.split("=", 1) for rest in (rest for name, rest in FINAL_STAGE if name == "ENV") for pair in rest.split())
    return image | {name: str(value) for name, value in SERVICES[service].get("environment", {}).items()}


def health_check_of(service: str) -> list[str]:
    """The command of such a container's health check."""
    if "healthcheck" in SERVICES[service]:
        kind, *command = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
    else:
        command = json.loads(final("HEALTHCHECK").partition(" CMD ")[2])
    return [word.replace("$$", "$") for word in command]


def copied_files() -> dict[str, Path]:
    """Where the files that the image takes from the tree lie in it, and where they come from."""
    pairs = [rest.split() for name, rest in FINAL_STAGE if name == "COPY" and not rest.startswith("--from")]
    return {target: ROOT / source for source, target in pairs}
