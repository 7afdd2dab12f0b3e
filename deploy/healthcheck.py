"""The image's health check: exit code 0 when this container's process answers that it is ready for work."""

import os
import sys
import urllib.error
import urllib.request

# A process without the API answers on its metrics port.
port = os.environ.get("ORDERFLOW_METRICS_PORT") or os.environ.get("HTTP_PORT") or "3000"

try:
    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2).close()
except (urllib.error.URLError, TimeoutError) as error:
    sys.exit(f"not ready: {error}")
