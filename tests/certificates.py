"""Certificates that a test makes for its servers, with the openssl command: an authority, and what it signs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.servers import scratch_directory, under_ci

DAYS = "2"
CONFIGURATION = """\
[req]
distinguished_name = name
prompt = no
x509_extensions = authority
[name]
CN = {name}
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = {names}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
HERE = "IP:127.0.0.1, DNS:localhost"
ELSEWHERE = "DNS:elsewhere.example"


class Issued(NamedTuple):
    """A certificate and its key as PEM files; `both` has one behind the other."""

    certificate: Path
    key: Path
    both: Path


class Authority:
    """A certificate authority of a test's own; its certificate is `file`."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.file = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        configuration = self._configuration(name, HERE)
        _openssl("req", "-x509", *_new_key(self._key), "-days", DAYS, "-config", configuration, "-out", self.file)

    def issue(self, name: str, names: str = HERE) -> Issued:
        """A server's certificate for these names."""
        start = self.directory / f"{self.name}-{name}"
        issued = Issued(start.with_suffix(".crt"), start.with_suffix(".key"), start.with_suffix(".both"))
        configuration, request = self._configuration(name, names), start.with_suffix(".csr")
        _openssl("req", "-new", *_new_key(issued.key), "-config", configuration, "-out", request)
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.file, "-CAkey", self._key, "-CAcreateserial", "-days", DAYS,
            "-extfile", configuration, "-extensions", "server", "-out", issued.certificate,
        )  # fmt: skip
        issued.both.write_text(issued.key.read_text() + issued.certificate.read_text())
        return issued

    def _configuration(self, name: str, names: str) -> Path:
        file = self.directory / f"{self.name}-{name}.cnf"
        file.write_text(CONFIGURATION.format(name=name, names=names))
        return file


@contextmanager
def two_authorities() -> Iterator[tuple[Authority, Authority]]:
    """One that the servers' certificates come from, and one that has nothing to do with them."""
    if shutil.which("openssl") is None:
        if under_ci():
            pytest.fail("the openssl command is missing: apt install openssl")
        pytest.skip("needs the openssl command")
    with scratch_directory() as directory:
        yield Authority(directory, "ours"), Authority(directory, "theirs")


def _new_key(file: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", file)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(("openssl", *arguments), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
