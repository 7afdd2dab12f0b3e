"""What leaves the checkout and what sets it up: the wheel, the locked requirements, `make`'s list, the interpreter it picks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import uuid
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orderflow.embedded.postgres import EmbeddedPostgres

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = ("build.txt", "dev.txt", "lock.txt", "service.txt", "test.txt")
PIN = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.]+)(?: ; (?P<marker>[^-]+?))?(?P<hashes>(?: --hash=sha256:[0-9a-f]{64})+)"
)


def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end with nothing of this process's environment but what pip needs to reach an index."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "HTTP", "NO_PROXY"))}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, "PATH": os.defpath, "HOME": str(cwd), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def must(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the locked build tools and without the network."""
    place = tmp_path_factory.mktemp("wheel")
    must(run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", place))
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `orderflow` of an environment with the locked service requirements and the wheel, and nothing else."""
    place = tmp_path_factory.mktemp("installed")
    must(run(sys.executable, "-m", "venv", "--without-pip", place))
    pip = (sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--quiet")
    must(run(*pip, "--only-binary=:all:", "--require-hashes", "--requirement", ROOT / "requirements" / "service.txt"))
    must(run(*pip, "--no-deps", "--no-index", wheel))
    return place / "bin" / "orderflow"


@pytest_asyncio.fixture
async def empty_database(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The address of a database without the schema."""
    name = f"packaging_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(postgres.admin_url, timeout=10)
    try:
        await admin.execute(f"CREATE DATABASE {name} OWNER app_user")
        yield postgres.url_of(name)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


def test_the_wheel_holds_all_that_the_program_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        schema = archive.read("orderflow/schema.sql")
    files = (path for path in (ROOT / "orderflow").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert schema == (ROOT / "schema.sql").read_bytes()
    assert {name.split("/")[0] for name in names} == {"orderflow", "orderflow-0.1.0.dist-info"}


@pytest.mark.slow
def test_the_installed_program_shows_its_help(installed: Path, tmp_path: Path) -> None:
    assert "Usage: orderflow" in must(run(installed, "--help", cwd=tmp_path))


@pytest.mark.slow
def test_the_installed_program_imports_without_the_development_set(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib, pkgutil, orderflow\n"
        "skip = ('orderflow.__main__', 'orderflow.embedded', 'orderflow.bench')\n"
        "names = [m.name for m in pkgutil.walk_packages(orderflow.__path__, 'orderflow.', onerror=print)]\n"
        "for name in names:\n"
        "    if not name.startswith(skip):\n        importlib.import_module(name)\n"
        "print(orderflow.__file__)\n"
    )
    where = must(run(installed.with_name("python"), "-W", "error", "-c", program, cwd=tmp_path))
    assert where.startswith(str(installed.parent.parent))


@pytest.mark.slow
async def test_the_installed_program_migrates(installed: Path, tmp_path: Path, empty_database: str) -> None:
    for _ in range(2):
        must(run(installed, "migrate", cwd=tmp_path, DATABASE_URL=empty_database))
    connection = await asyncpg.connect(empty_database, timeout=10)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    finally:
        await connection.close()
    assert {"orders", "outbox", "processed_events", "dead_letter_events"} <= {row["tablename"] for row in rows}


def pins(name: str) -> dict[str, str]:
    """The packages of a requirement file with their versions; fails on a line that is anything but a hashed pin."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    joined = re.sub(r" *\\\n *", " ", text)
    found: dict[str, str] = {}
    for line in joined.splitlines():
        if line.startswith("#"):
            continue
        match = PIN.fullmatch(line.strip())
        assert match, f"{name}: not a pin with hashes: {line[:80]}"
        assert match["name"] not in found, f"{name}: {match['name']} is there twice"
        found[match["name"]] = match["version"]
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_with_hashes_and_no_address(name: str) -> None:
    assert pins(name)
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--extra-index|--find-links|--trusted-host| @ |/home|/tmp", text)


def test_no_other_requirement_file_goes_unchecked() -> None:
    assert {path.name for path in (ROOT / "requirements").glob("*.txt")} == set(LOCKS)


def test_the_sets_contain_each_other() -> None:
    assert pins("service.txt").items() <= pins("dev.txt").items() <= pins("test.txt").items()
    assert pins("build.txt").items() <= pins("dev.txt").items()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("service.txt", PROJECT["project"]["dependencies"]),
        ("dev.txt", PROJECT["project"]["optional-dependencies"]["dev"]),
        ("build.txt", PROJECT["dependency-groups"]["build"]),
        ("test.txt", PROJECT["dependency-groups"]["test"] + PROJECT["dependency-groups"]["lint"]),
        ("lock.txt", PROJECT["dependency-groups"]["lock"]),
    ],
)
def test_the_locks_answer_what_the_project_asks_for(name: str, wanted: list[str]) -> None:
    locked = pins(name)
    for requirement in map(Requirement, wanted):
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not in requirements/{name}: make lock"
        assert requirement.specifier.contains(version), f"requirements/{name} has {version} for {requirement}: make lock"


def test_bare_make_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    listed = dict(re.findall(r"^  make ([a-z-]+) +(\S.*)$", must(run("make", "--no-print-directory")), flags=re.MULTILINE))
    assert set(listed) == targets == set(re.findall(r"^\.PHONY: ([a-z-]+)$", makefile, flags=re.MULTILINE))
    assert {"run", "test", "lint", "fix", "check", "bench", "kafka", "clean", "setup", "demo", "torture"} <= targets


@pytest.fixture
def path_of(tmp_path: Path) -> Path:
    """A folder for PATH: `python3` is too old, `python3.12` is a good one, and there is nothing else of that name."""
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    (tmp_path / "python3.12").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for stub in tmp_path.iterdir():
        stub.chmod(0o755)
    return tmp_path


def test_an_old_python3_is_passed_over(path_of: Path) -> None:
    assert must(run("/bin/sh", ROOT / "scripts/find-python", PATH=str(path_of))) == "python3.12\n"


def test_no_python_that_will_do_is_said_with_what_helps(path_of: Path) -> None:
    (path_of / "python3.12").unlink()
    result = run("/bin/sh", ROOT / "scripts/find-python", PATH=str(path_of))
    assert result.returncode == 1
    assert "needs Python 3.11 or later" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert "apt-get install" in result.stderr


def test_the_python_that_was_asked_for_is_taken_or_refused(path_of: Path) -> None:
    script = ROOT / "scripts/find-python"
    assert must(run("/bin/sh", script, PATH=str(path_of), PYTHON=sys.executable)) == f"{sys.executable}\n"
    refused = run("/bin/sh", script, PATH=str(path_of), PYTHON="python3")
    assert refused.returncode == 1
    assert "PYTHON=python3 is not" in refused.stderr
