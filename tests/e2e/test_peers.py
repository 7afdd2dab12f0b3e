"""The order flow on other stacks: each small enough to read, locked, and started the way the runner says.

The whole comparison installs four environments and takes minutes, so the campaign runs one peer beside ours; the
rest is `make bench-peers`. No figure is judged.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers import environments
from bench.peers.measure import percentile
from bench.peers.stacks import HERE, STACKS
from orderflow.embedded.errors import EmbeddedError
from tests import servers
from tests.programs import ROOT

TIMEOUT = 170.0
LONGEST_FLOW = 100
FLOWS = sorted(
    {part for stack in STACKS.values() for args in stack.processes.values() for part in args if part.endswith(".py")}
)
PEERS = sorted({stack.peer for stack in STACKS.values() if stack.peer})


@pytest.mark.campaign
@pytest.mark.timeout(180)
def test_a_peer_and_ours_are_measured_in_one_run(tmp_path: Path) -> None:
    if servers.choose_broker().kind != "kafka":
        pytest.skip("needs Apache Kafka")
    written = tmp_path / "peers.json"
    command = (sys.executable, "-m", "bench.peers.measure", "--quick", "--json", str(written), "orderflow", "procrastinate")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr
    runs = json.loads(written.read_text())["runs"]
    assert set(runs) == {"orderflow", "procrastinate"}
    for name, (run,) in runs.items():
        assert run["orders_per_second"] > 0
        assert 0 < run["paid_p50"] <= run["paid_p99"]
        assert (run["lost"], run["violations"]) == (0, [])
        assert STACKS[name].name in result.stdout


@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_fits_on_a_page(flow: str) -> None:
    text = (HERE / flow).read_text(encoding="utf-8")
    compile(text, flow, "exec")
    assert len(text.splitlines()) <= LONGEST_FLOW


@pytest.mark.parametrize("peer", PEERS)
def test_an_environment_is_locked_and_names_no_index(peer: str) -> None:
    text = (environments.REQUIREMENTS / f"{peer}.txt").read_text(encoding="ascii")
    blocks = [block for block in re.split(r"\n(?=\S)", text) if not block.startswith("#")]
    assert blocks
    assert all("==" in block and "--hash=sha256:" in block for block in blocks)
    assert "http" not in re.sub(r"(?m)^(aio)?http\S*==", "", text)
    assert set(environments.MAIN[peer]) <= {block.split("==")[0] for block in blocks}


def test_without_redis_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with pytest.raises(EmbeddedError, match="apt install redis-server"):
        environments.redis_server(tmp_path / "bin" / "python")


@pytest.mark.parametrize(("percent", "expected"), [(50, 2.0), (75, 3.0), (99, 4.0)])
def test_percentiles_are_values_that_occurred(percent: int, expected: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], percent) == expected
