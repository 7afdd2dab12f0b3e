"""The process that `broker.py` starts: librdkafka's mock cluster with one broker, until it is told to end.

Prints the broker's address as its first line. Run by path, so it imports nothing of orderflow.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

START_TIMEOUT = 10.0
# The mock waits 3 s before a new group may begin, which would be 3 s from `dev` to the first payment.
REBALANCE_DELAY_MS = 100
PRODUCER = 0  # enum rd_kafka_type_t
ERROR_BYTES = 512


def start_through_the_library(package: Path) -> str | None:
    """Start the broker through librdkafka itself, which alone can shorten the delay; returns its address.

    None when this wheel keeps the library elsewhere, or the library has no such functions.
    """
    found = [*package.parent.glob("confluent_kafka.libs/librdkafka*"), *package.glob(".dylibs/librdkafka*")]
    if not found:
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        delay = library.rd_kafka_mock_group_initial_rebalance_delay_ms
        for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_handle_mock_cluster"):
            getattr(library, name).restype = ctypes.c_void_p
        library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    error = ctypes.create_string_buffer(ERROR_BYTES)
    configuration = ctypes.c_void_p(library.rd_kafka_conf_new())
    for setting, value in ((b"test.mock.num.brokers", b"1"), (b"log_level", b"4")):
        library.rd_kafka_conf_set(configuration, setting, value, error, ctypes.c_size_t(ERROR_BYTES))
    owner = library.rd_kafka_new(PRODUCER, configuration, error, ctypes.c_size_t(ERROR_BYTES))
    if owner is None:
        return None
    cluster = ctypes.c_void_p(library.rd_kafka_handle_mock_cluster(ctypes.c_void_p(owner)))
    delay(cluster, ctypes.c_int32(REBALANCE_DELAY_MS))
    address: bytes = library.rd_kafka_mock_cluster_bootstraps(cluster)
    return address.decode()


def main() -> int:
    try:
        import confluent_kafka
    except ImportError:
        print("the embedded broker is missing: `pip install confluent-kafka`, or `make run` in a checkout", file=sys.stderr)
        return 1
    address = start_through_the_library(Path(confluent_kafka.__file__).parent)
    if address is None:
        # The cluster lives as long as this client, which produces nothing itself.
        owner = confluent_kafka.Producer({"test.mock.num.brokers": 1, "log_level": 4})
        broker = next(iter(owner.list_topics(timeout=START_TIMEOUT).brokers.values()))
        address = f"{broker.host}:{broker.port}"
    print(address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    return 0


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    sys.exit(main())
