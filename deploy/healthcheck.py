"""The image's health check: exit code 0 when this container's process answers that it is ready for work."""

import os
import ssl
import sys
import urllib.error
import urllib.request

# A process without the API answers on its metrics port.
port = os.environ.get("ORDERFLOW_METRICS_PORT") or os.environ.get("HTTP_PORT") or "3000"
scheme = "https" if os.environ.get("ORDERFLOW_HTTP_CERTIFICATE_FILE") else "http"
# The certificate names the service, not this container's loopback address, and nobody else can answer there.
unchecked = ssl.create_default_context()
unchecked.check_hostname = False
unchecked.verify_mode = ssl.CERT_NONE

try:
    urllib.request.urlopen(f"{scheme}://127.0.0.1:{port}/readyz", timeout=2, context=unchecked).close()
except (urllib.error.URLError, TimeoutError) as error:
    sys.exit(f"not ready: {error}")
