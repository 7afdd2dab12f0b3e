"""Apache Kafka without Docker: fetched once through Maven into a cache, ready to be run with Java."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orderflow.embedded.access import clean_environment
from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.lock import InstanceLock
from orderflow.embedded.process import GuardedChild, require_posix

VERSION = "4.3.1"
LOG4J_VERSION = "2.25.4"  # the log4j-core that this Kafka depends on; without the binding Kafka logs nothing
OLDEST_JAVA = 17
JAVA_TIMEOUT = 20.0
MAVEN_TIMEOUT = 600.0
FORMAT_TIMEOUT = 60.0
# What Maven fetches for this version, its own plugins included: for a progress bar, nothing depends on it.
REPOSITORY_BYTES = 53_000_000
TICK = 0.5
FORMATTED = "formatted"
CLASS_PATH = "libs"

POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>orderflow</groupId>
  <artifactId>kafka</artifactId>
  <version>{VERSION}</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId>
      <artifactId>log4j-slf4j-impl</artifactId>
      <version>{LOG4J_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""


@dataclass(frozen=True)
class KafkaInstall:
    """An installation: `directory` holds the jars and freshly formatted metadata, `java` runs them."""

    directory: Path
    java: Path

    def command(self, main: str, *arguments: str | Path, options: tuple[str, ...] = ()) -> list[str | Path]:
        """The command line of one of Kafka's main classes."""
        return [
            self.java,
            *options,
            "-Dlog4j2.level=WARN",
            "-cp",
            f"{self.directory / CLASS_PATH}/*",
            main,
            *arguments,
        ]


def java_environment() -> dict[str, str]:
    """For Java children: in the plain C locale Java cannot open a path that is not ASCII."""
    return clean_environment({"LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"})


def default_cache_dir() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/orderflow`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "orderflow"


def available(cache_dir: Path | None = None) -> str | None:
    """None when Apache Kafka can be run here, else the reason why not and what would help.

    Needs Java 17 or later; Maven only until Kafka is in the cache.
    """
    try:
        require_posix()
        _java()
        if not _is_complete(_installed(cache_dir)):
            _maven()
    except EmbeddedError as reason:
        return str(reason)
    return None


def _installed(cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / f"kafka-{VERSION}" / "install"


def _is_complete(installed: Path) -> bool:
    return (installed / FORMATTED / "bootstrap.checkpoint").is_file()


def _java() -> Path:
    home = os.environ.get("JAVA_HOME")
    of_home = Path(home) / "bin" / "java" if home else None
    found = str(of_home) if of_home and of_home.exists() else shutil.which("java")
    wanted = f"Apache Kafka needs Java {OLDEST_JAVA} or later"
    if found is None:
        raise EmbeddedError(f"{wanted}, and there is no java on PATH: install a JDK or JRE")
    try:
        said = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=JAVA_TIMEOUT).stderr
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(f"{wanted}, and {found} does not run: {error}") from None
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if version is None:  # macOS carries a stub that only says where to get Java
        raise EmbeddedError(f"{wanted}, and {found} -version names no version: install a JDK or JRE")
    if int(version[1]) < OLDEST_JAVA:
        raise EmbeddedError(f"{wanted}; {found} is Java {version[1]}: install a newer one or set JAVA_HOME")
    return Path(found)


def _maven() -> Path:
    found = shutil.which("mvn")
    if found is None:
        raise EmbeddedError("Apache Kafka is fetched with Maven, and there is no mvn on PATH: install maven")
    return Path(found)


async def install(cache_dir: Path | None = None, tell: Callable[[float, str], None] = lambda done, text: None) -> KafkaInstall:
    """Fetch Apache Kafka into the cache unless it is there; safe from many processes and after interruption.

    `tell` hears, while Maven works, about how much there is (0 to 1), and what. Maven checks every file's checksum.
    Raises EmbeddedError (no Java, no Maven, no network, ...).
    """
    require_posix()
    java = await asyncio.to_thread(_java)
    done = _installed(cache_dir)
    ready = KafkaInstall(done, java)
    if _is_complete(done):
        return ready
    maven = _maven()
    try:
        done.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EmbeddedError(f"{done.parent} cannot be created: {error.strerror}: set XDG_CACHE_HOME") from None
    async with await InstanceLock.acquire(done.parent, MAVEN_TIMEOUT) as lock:
        if not _is_complete(done):
            await _fetch(maven, java, done, lock, tell)
    return ready


async def _fetch(maven: Path, java: Path, done: Path, lock: InstanceLock, tell: Callable[[float, str], None]) -> None:
    # Made under another name and renamed: what was interrupted half-way is never taken for an installation.
    # The repository outlives an interruption, so that the second attempt goes on instead of beginning anew.
    partial, repository, log = (done.parent / name for name in ("partial", "repository", "install.log"))
    for leftover in (partial, done):
        await asyncio.to_thread(shutil.rmtree, leftover, ignore_errors=True)
    partial.mkdir()
    (partial / "pom.xml").write_text(POM)
    command: list[str | Path] = [maven, "-q", "-B", "--strict-checksums", "-f", partial / "pom.xml"]
    # Below the cache and not in ~/.m2: Java takes the home from the user database, where it may not exist.
    command += [f"-Dmaven.repo.local={repository}", "dependency:copy-dependencies", "-DincludeScope=runtime"]
    command += [f"-DoutputDirectory={partial / CLASS_PATH}"]
    watching = asyncio.create_task(_watch(repository, tell))
    try:
        await _run(command, "Maven", log, partial, lock, MAVEN_TIMEOUT)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    await _format(KafkaInstall(partial, java), log, lock)
    partial.rename(done)
    await asyncio.to_thread(shutil.rmtree, repository, ignore_errors=True)


async def _watch(repository: Path, tell: Callable[[float, str], None]) -> None:
    while True:
        there = await asyncio.to_thread(_bytes_below, repository)
        tell(min(1.0, there / REPOSITORY_BYTES), f"{there / 1e6:.1f} of about {REPOSITORY_BYTES / 1e6:.0f} MB")
        await asyncio.sleep(TICK)


def _bytes_below(directory: Path) -> int:
    found = 0
    for place, _, names in os.walk(directory):
        for name in names:
            # Maven renames each file when it is whole.
            with contextlib.suppress(FileNotFoundError):
                found += os.lstat(os.path.join(place, name)).st_size
    return found


async def _format(install: KafkaInstall, log: Path, lock: InstanceLock) -> None:
    # Once, to be copied: it costs a second of Java for each new data directory.
    formatted = install.directory / FORMATTED
    properties = install.directory / "format.properties"
    properties.write_text(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:1\n"
        "listeners=PLAINTEXT://127.0.0.1:2,CONTROLLER://127.0.0.1:1\ncontroller.listener.names=CONTROLLER\n"
        f"log.dirs={formatted}\n"
    )
    command = install.command("kafka.tools.StorageTool", "format", "-t", "T3JkZXJmbG93T3JkZXJmbA", "-c", properties)
    await _run(command, "Kafka's format tool", log, install.directory, lock, FORMAT_TIMEOUT)


async def _run(command: list[str | Path], name: str, log: Path, cwd: Path, lock: InstanceLock, timeout: float) -> None:
    child = await GuardedChild.spawn(command, name=name, log=log, cwd=cwd, env=java_environment(), keep_fds=[lock.fd])
    try:
        ended = await child.ended_within(timeout)
    finally:
        if child.returncode is None:
            await child.kill()
    if not ended or child.returncode != 0:
        why = "failed" if ended else f"did not end within {timeout:.0f} s"
        raise EmbeddedError(f"{name} {why}: Apache Kafka {VERSION} is not installed. See {log}:\n{child.log_tail()}")
