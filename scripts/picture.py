"""Make docs/order.svg: a real `orderflow dev` in a real terminal, one order posted, its log lines, and its story."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 150
ORDER = {"userId": "7b0a6f2e-6f0e-4c8b-9c53-0d5f1c9a4a11", "amount": 299.99}
TARGET = Path(__file__).parent.parent / "docs" / "order.svg"


class Terminal:
    """A program on a pseudo-terminal, read until a text appears."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._read, write = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orderflow", *command],
            stdin=subprocess.DEVNULL, stdout=write, stderr=write,
            env={**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        os.close(write)
        self.text = ""

    def until(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        """Wait until the output matches; TimeoutError after that many seconds."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{pattern!r} did not appear in:\n{self.text}")
            self._take()
        return found

    def rest(self) -> str:
        """Everything until the program ends."""
        try:
            while self._take():
                continue
        except OSError:
            self.process.wait(10)
        return self.text

    def _take(self) -> bool:
        chunk = os.read(self._read, 65536)
        self.text += chunk.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(chunk)


def main() -> int:
    """Run, record, write the picture."""
    with tempfile.TemporaryDirectory() as directory:
        # PostgreSQL runs as another user when we are root.
        Path(directory).chmod(0o755)
        dev = Terminal("dev", "--data-dir", directory, ORDERFLOW_GATEWAY_SUCCESS_RATE="1")
        try:
            address = dev.until(r"API\s+(http://\S+)")[1]
            database = dev.until(r"PostgreSQL\s+(postgresql://\S+)")[1]
            dev.until(r"consuming order-events")
            begun = len(dev.text)
            request = urllib.request.Request(
                f"{address}/orders", json.dumps(ORDER).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                order = json.load(answer)["orderId"]
            dev.until(r"EVENT_RECEIVED.*OrderPaid\n")
            lines = dev.text[begun:].strip("\n")
            story = Terminal("explain", order, DATABASE_URL=database).rest()
        finally:
            dev.process.send_signal(signal.SIGINT)
            dev.rest()
    picture = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    picture.print(Text.from_ansi(f"$ curl localhost:3000/orders -H 'Content-Type: application/json' -d '{json.dumps(ORDER)}'"))
    picture.print(Text.from_ansi(lines), no_wrap=True, overflow="ellipsis")
    picture.print(Text.from_ansi(f"\n$ orderflow explain {order}\n{story.strip()}"), no_wrap=True, overflow="ellipsis")
    svg = picture.export_svg(title="orderflow")
    # Fonts from elsewhere would be asked for by every reader's browser.
    svg = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", svg, flags=re.DOTALL)
    TARGET.write_text(svg, "utf-8")
    print(f"{TARGET.name}: order {order}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
