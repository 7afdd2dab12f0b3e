"""What a broker's answer to CreateTopics means: something for people to mend, or something that passes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from aiokafka.errors import KafkaError

from orderflow.engine.kafka import refuse_failed_creation
from orderflow.engine.patience import Misconfigured

# As Apache Kafka 4.3 words them.
TOO_FEW = (
    "Unable to replicate the partition 3 time(s): The target replication factor of 3 cannot be reached because only 1 "
    "broker(s) are registered."
)
FENCED = (
    "Unable to replicate the partition 1 time(s): All brokers are currently fenced, or have all their log directories cordoned."
)


def answer(code: int, reason: str | None) -> SimpleNamespace:
    return SimpleNamespace(topic_errors=[("order-events", code, reason)])


@pytest.mark.parametrize("code", [0, 36])
def test_a_topic_that_is_made_or_was_there_is_there(code: int) -> None:
    refuse_failed_creation(answer(code, None))


@pytest.mark.parametrize(
    ("code", "reason"),
    [(38, TOO_FEW), (37, "Number of partitions must be larger than 0."), (29, None), (40, None), (44, "policy")],
)
def test_what_the_settings_ask_for_in_vain_ends_the_program(code: int, reason: str | None) -> None:
    with pytest.raises(
        Misconfigured, match=r"Kafka refuses to create topic 'order-events': .*; create it, or change ORDERFLOW_TOPIC_"
    ):
        refuse_failed_creation(answer(code, reason))


@pytest.mark.parametrize(("code", "reason"), [(38, FENCED), (41, "not the controller"), (7, None), (-1, None), (89, None)])
def test_what_passes_is_waited_for(code: int, reason: str | None) -> None:
    with pytest.raises(KafkaError):
        refuse_failed_creation(answer(code, reason))
