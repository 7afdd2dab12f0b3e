"""The process that `broker.py` starts: librdkafka's mock cluster with one broker, until it is told to end.

Prints the broker's address as its first line. Run by path, so it imports nothing of orderflow.
"""

from __future__ import annotations

import signal
import sys

START_TIMEOUT = 10.0


def main() -> int:
    try:
        from confluent_kafka import Producer
    except ImportError:
        print('the embedded broker is not installed: pip install "orderflow[dev]"', file=sys.stderr)
        return 1
    # The cluster lives as long as this client, which produces nothing itself.
    owner = Producer({"test.mock.num.brokers": 1, "log_level": 4})
    brokers = owner.list_topics(timeout=START_TIMEOUT).brokers
    broker = next(iter(brokers.values()))
    print(f"{broker.host}:{broker.port}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    return 0


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    sys.exit(main())
