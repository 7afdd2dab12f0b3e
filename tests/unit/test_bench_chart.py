"""The plot: well-formed, labelled, and on the same axes for what is to be compared."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from orderflow.bench.chart import Axis, Panel, Series, decades, document, scale
from orderflow.bench.paced import Paced
from orderflow.bench.plot import plot
from orderflow.bench.results import Results

HEAD = {"orderflow": "1", "commit": None, "postgresql": "18", "broker": "Kafka <4>", "cpus": 2, "python": "CPython"}
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def run(*paid: int) -> Any:
    return SimpleNamespace(load=SimpleNamespace(accepted_over_time=[1000, 500]), paid_over_time=list(paid))


def paced(rate: float, p50: float) -> Paced:
    return Paced(rate, 0.0, {"201": 1}, 0, {}, {"p50": p50, "p99": p50 * 3}, 0, 1)


def test_everything_measured_is_drawn_with_labels_and_units() -> None:
    details = {
        "T2": [run(1), run(100, 200)], "T1 three processes": [run(300, 400)], "T4": [run(0, 0, 800)],
        "LOAD": [[paced(100.0, 5.0), paced(1000.0, 9.0)], [paced(100.0, 7.0), paced(1000.0, 11.0)]],
    }  # fmt: skip
    drawn = plot(Results({}, details, split="three processes"), HEAD)
    assert drawn is not None
    found = texts(drawn)
    assert {"T1, three processes, gateway 0 ms", "T2, one process, gateway 0 ms", "T4, three processes, gateway 500 ms"} <= set(
        found
    )
    assert found.count("seconds since the first POST") == found.count("accepted") == found.count("PAID") == 3
    assert {"orders/s", "ms from due to PAID", "offered orders/s, at fixed arrival times", "p50", "p99"} <= set(found)
    assert any("Kafka <4>" in text for text in found)
    assert len(ElementTree.fromstring(drawn).findall(f".//{SVG}polyline")) == 8
    assert "prefers-color-scheme: dark" in drawn


def test_one_process_may_be_the_best_split() -> None:
    drawn = plot(Results({}, {"T2": [run(100, 200)]}), HEAD)
    assert drawn is not None
    assert {"T1, one process, gateway 0 ms", "T2, one process, gateway 0 ms"} <= set(texts(drawn))


def test_nothing_measured_is_nothing_drawn() -> None:
    assert plot(Results({}), HEAD) is None


def test_every_point_lies_within_its_panel() -> None:
    points = [(1.0, 0.0), (10.0, 3.0), (1000.0, 7777.0)]
    panel = Panel("a & b", decades("x", [1.0, 1000.0]), scale("y", [7777.0]), [Series("s", points)], 10.0, 20.0, 400.0, 300.0)
    svg = document([panel], "note", width=420.0, height=340.0)
    line = ElementTree.fromstring(svg).find(f".//{SVG}polyline")
    assert line is not None
    places = [tuple(map(float, place.split(","))) for place in re.findall(r"\S+", line.attrib["points"])]
    assert len(places) == 3
    assert all(10.0 <= x <= 410.0 and 20.0 <= y <= 320.0 for x, y in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis("", 0.0, 15.75), [0.0, 5.0, 10.0, 15.0]), (Axis("", 0.0, 4200.0), [0.0, 1000.0, 2000.0, 3000.0, 4000.0]),
        (Axis("", 0.0, 0.9), [0.0, 0.2, 0.4, 0.6, 0.8]), (Axis("", 4.0, 60.0, decades=True), [5.0, 10.0, 20.0, 50.0]),
    ],
)  # fmt: skip
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


def test_no_values_make_an_axis_all_the_same() -> None:
    assert scale("", []).high > 0
    assert decades("", [0.0]).low > 0
