"""Writes the bill of materials of the locked packages: CycloneDX 1.6, as JSON.

Usage: python3 scripts/sbom.py [FILE]     (standard library only; without a file it goes to stdout)

From requirements/*.txt alone, so the same locks give the same bytes. A component is `required` where it is part of the
service, `optional` where only `orderflow dev` installs it, and `excluded` where it builds, tests or locks.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# In this order: the first file that has a package decides its scope.
SCOPES = {
    "service.txt": "required",
    "dev.txt": "optional",
    "build.txt": "excluded",
    "test.txt": "excluded",
    "lock.txt": "excluded",
}
PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?: ; (?P<marker>.+?))?(?= --hash)")
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


class Pin(NamedTuple):
    """One locked package; `hashes` are the SHA-256 of the files that may be installed for it."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


def pins(file: Path) -> Iterator[Pin]:
    """The packages of one lock file. Raises ValueError for a line that is no hashed pin."""
    for line in re.sub(r" *\\\n *", " ", file.read_text(encoding="utf-8")).splitlines():
        if line.strip() and not line.startswith("#"):
            match = PIN.match(line)
            if match is None:
                raise ValueError(f"{file.name}: not a pin with hashes: {line[:80]}")
            yield Pin(match["name"], match["version"], match["marker"] or "", tuple(HASH.findall(line)))


def component(pin: Pin, scope: str, files: list[str]) -> dict[str, Any]:
    """A package as CycloneDX has it."""
    purl = f"pkg:pypi/{pin.name}@{pin.version}"
    properties = [{"name": "orderflow:lock", "value": f"requirements/{name}"} for name in files]
    if pin.marker:
        properties.append({"name": "orderflow:marker", "value": pin.marker})
    return {
        "type": "library",
        "bom-ref": purl,
        "name": pin.name,
        "version": pin.version,
        "scope": scope,
        "purl": purl,
        # Of the files that the lock allows, one of which is installed: not hashes of the component itself.
        "externalReferences": [
            {"type": "distribution", "url": purl, "hashes": [{"alg": "SHA-256", "content": text} for text in pin.hashes]}
        ],
        "properties": properties,
    }


def bill(root: Path = ROOT) -> dict[str, Any]:
    """The whole document."""
    found: dict[str, tuple[Pin, str, list[str]]] = {}
    for name, scope in SCOPES.items():
        for pin in pins(root / "requirements" / name):
            found.setdefault(f"{pin.name}@{pin.version}", (pin, scope, []))[2].append(name)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(r'__version__ = "(.+?)"', (root / "orderflow/__init__.py").read_text(encoding="utf-8"))
    assert version is not None
    product = f"pkg:pypi/{project['name']}@{version[1]}"
    components = [component(*found[key]) for key in sorted(found)]
    wanted = {re.split(r"[\[<>=;~! ]", text, maxsplit=1)[0] for text in project["dependencies"]}
    direct = [entry["bom-ref"] for entry in components if entry["scope"] == "required" and entry["name"] in wanted]
    content = json.dumps(components, sort_keys=True).encode()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=hashlib.sha256(content).digest()[:16], version=4)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application", "bom-ref": product, "name": project["name"], "version": version[1], "purl": product,
                "licenses": [{"license": {"id": project["license"]}}],
            },
            "tools": {"components": [{"type": "application", "name": "scripts/sbom.py"}]},
        },
        "components": components,
        "dependencies": [{"ref": product, "dependsOn": direct}],
        # The locks name packages and not which of them wants which.
        "compositions": [{"aggregate": "incomplete", "dependencies": [product]}],
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Writes the document; answers the exit code."""
    text = json.dumps(bill(), indent=2) + "\n"
    if not arguments:
        sys.stdout.write(text)
        return 0
    file = Path(arguments[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
