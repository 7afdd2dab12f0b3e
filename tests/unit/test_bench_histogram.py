"""The histogram of latencies: its precision, its percentiles, and its form as JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.bench.histogram import PERCENTILES, Histogram

LATENCIES = st.lists(st.floats(min_value=2e-6, max_value=1e5), min_size=1, max_size=200)


def of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(LATENCIES, st.sampled_from(sorted(PERCENTILES.values())))
def test_a_percentile_is_within_one_percent_of_the_value_that_it_names(values: list[float], share: float) -> None:
    ordered = sorted(values)
    exact = ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]
    assert of(values).percentile(share) == pytest.approx(exact, rel=0.01)


@given(LATENCIES, LATENCIES)
def test_merged_histograms_are_that_of_all_values(some: list[float], others: list[float]) -> None:
    merged = of(some)
    merged.merge(of(others))
    assert merged.as_json() == of(some + others).as_json()
    assert merged.count == len(some) + len(others)


@given(LATENCIES)
def test_its_json_brings_it_back(values: list[float]) -> None:
    document = of(values).as_json()
    assert Histogram.of_json(json.loads(json.dumps(document))).as_json() == document
    assert document["max"] == max(values) * 1000
    assert document["p50"] <= document["p90"] <= document["p99"] <= document["p99.9"] <= document["max"]


def test_nothing_is_zero_and_no_time_at_all_is_a_microsecond() -> None:
    assert Histogram().percentile(0.99) == 0.0
    assert Histogram().as_json()["buckets"] == []
    assert of([0.0, -0.001]).count == 2
