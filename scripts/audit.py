"""Holds the locked packages against the database of known vulnerabilities.

Usage: .venv/bin/python scripts/audit.py [--unreachable-is-a-note]

Exit codes: 0 none known, 1 at least one known vulnerability, 3 the database's service did not answer. With
--unreachable-is-a-note the last one is said loudly and counts as 0: for machines that reach no more than a
package index.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# test.txt holds every pin of service.txt, dev.txt and build.txt: a test makes sure of that.
FILES = ("requirements/test.txt", "requirements/lock.txt")
NO_ANSWER = (
    "Dependency not found on PyPI",  # the index answers for packages, and 404 for their vulnerabilities
    "ConnectionError",
    "Max retries exceeded",
    "Could not connect to PyPI's vulnerability feed",
    "ReadTimeout",
)


def audit(name: str) -> subprocess.CompletedProcess[str]:
    """Runs pip-audit over one locked file, without installing or resolving anything."""
    flags = ("--strict", "--disable-pip", "--require-hashes", "--progress-spinner", "off")
    command = (sys.executable, "-m", "pip_audit", *flags, "--requirement", name)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def main(lenient: bool) -> int:
    """Audits every file; answers the exit code."""
    for name in FILES:
        result = audit(name)
        said = (result.stdout + result.stderr).strip()
        if result.returncode == 0:
            print(f"{name}: {said}")
            continue
        if any(sign in said for sign in NO_ANSWER):
            print(f"{name}: NOT AUDITED: the vulnerability service did not answer ({said.splitlines()[-1]})")
            return 0 if lenient else 3
        print(f"{name}:\n{said}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(lenient="--unreachable-is-a-note" in sys.argv[1:]))
