"""`make mutants` in its short form: a few safeguards, other ones each time, and each is missed by a test."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import servers
from tests.programs import ROOT


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_few_safeguards_are_missed_when_they_are_off() -> None:
    choice = servers.choose_broker()
    if choice.kind != "kafka":
        pytest.skip(f"needs Apache Kafka: {choice.warning}")
    command = (sys.executable, "-m", "tests.mutants", "--quick")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout
    assert " 6 of 6 caught in " in f" {result.stdout.splitlines()[-1]}"
