"""The bill of materials: valid CycloneDX 1.6, everything that the locks have and nothing else, the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.test_packaging import LOCKS, PROJECT, ROOT, pins

SCRIPT = ROOT / "scripts" / "sbom.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The document, as the command writes it."""
    file = tmp_path_factory.mktemp("sbom") / "deep" / "sbom.cdx.json"
    # -I and -S: nothing but the standard library.
    done = subprocess.run((sys.executable, "-I", "-S", SCRIPT, file), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(written: str) -> Any:
    return json.loads(written)


def test_it_is_valid(written: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(written) is None


def test_the_validator_finds_a_mistake(document: Any) -> None:
    wrong = {**document, "components": [{"type": "library"}]}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(wrong)) is not None


def test_it_has_what_every_reader_needs(document: Any) -> None:
    assert (document["bomFormat"], document["specVersion"], document["version"]) == ("CycloneDX", "1.6", 1)
    assert document["serialNumber"].startswith("urn:uuid:")
    assert document["metadata"]["component"]["name"] == PROJECT["project"]["name"]
    for component in document["components"]:
        assert component["purl"] == component["bom-ref"] == f"pkg:pypi/{component['name']}@{component['version']}"
        (reference,) = component["externalReferences"]
        assert reference["hashes"]


def test_it_has_what_the_locks_have_and_nothing_else(document: Any) -> None:
    locked = {name: pins(name) for name in LOCKS}
    by_file = {
        name: {
            component["name"]: component["version"]
            for component in document["components"]
            if {"name": "orderflow:lock", "value": f"requirements/{name}"} in component["properties"]
        }
        for name in LOCKS
    }
    assert by_file == locked
    required = {component["name"] for component in document["components"] if component["scope"] == "required"}
    assert required == set(locked["service.txt"])


def test_every_hash_of_the_locks_is_in_it(document: Any) -> None:
    text = "".join((ROOT / "requirements" / name).read_text(encoding="utf-8") for name in LOCKS)
    shown = {
        digest["content"] for component in document["components"] for digest in component["externalReferences"][0]["hashes"]
    }
    assert shown == {word.partition(":")[2] for word in text.split() if word.startswith("--hash=sha256:")}


def test_what_the_project_asks_for_is_what_it_depends_on(document: Any) -> None:
    (root,) = document["dependencies"]
    names = {reference.removeprefix("pkg:pypi/").partition("@")[0] for reference in root["dependsOn"]}
    assert {name for name in names if not any(text.startswith(name) for text in PROJECT["project"]["dependencies"])} == set()
    assert len(names) == len(PROJECT["project"]["dependencies"])


def test_the_same_locks_give_the_same_bytes(written: str, tmp_path: Path) -> None:
    again = subprocess.run((sys.executable, SCRIPT), capture_output=True, text=True, timeout=60, check=True)
    assert again.stdout == written
