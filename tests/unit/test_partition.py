"""The partition of a key agrees with aiokafka's, which agrees with the Java client's."""

from __future__ import annotations

from aiokafka.partitioner import murmur2 as of_aiokafka
from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.partition import murmur2, partition_of


@given(st.binary(max_size=80))
def test_the_hash_is_that_of_the_java_client(key: bytes) -> None:
    assert murmur2(key) == of_aiokafka(key) & 0xFFFFFFFF


@given(st.uuids(), st.integers(1, 64))
def test_every_key_has_a_partition(aggregate_id: object, partitions: int) -> None:
    assert 0 <= partition_of(str(aggregate_id).encode(), partitions) < partitions
