"""The report of a torture: what people read, and its picture."""

from __future__ import annotations

from xml.etree import ElementTree

from orderflow.audit import Finding
from orderflow.bench.load import Summary
from orderflow.torture.faults import Injected
from orderflow.torture.plan import Fault, Kind
from orderflow.torture.report import Report


def report(**given: object) -> Report:
    plan = [Fault(2.0, Kind.KAFKA_WIPED), Fault(3.0, Kind.PAUSE_WORKER, 1, 4.0), Fault(8.0, Kind.KAFKA_WIPED)]
    found = Report(7, plan, load=Summary(accepted=1_500))
    found.injected = [Injected(fault, fault.at, fault.at + 1.5 + fault.lasts, "a | b") for fault in plan]
    found.accepted_besides = 20
    found.states = {"FAILED": 500, "PAID": 1_020}
    found.killed_at = {"store.place.before": 2, "store.place.after": 1}
    found.over_time = [(0, 100, 90), (1, 120, 0), (2, 0, 130)]
    found.findings = [Finding("I1", "every order has exactly one OrderCreated event", 1520, 0)]
    found.settled_after = 2.5
    for name, value in given.items():
        setattr(found, name, value)
    return found


def test_a_sound_run_says_so_and_how_to_repeat_it() -> None:
    text = report().markdown("orderflow torture --seed 7", "x.svg")
    assert text.startswith("# Torture, seed 7: sound\n\n    orderflow torture --seed 7\n")
    assert "1,520 orders accepted (500 FAILED, 1,020 PAID), 220 of them ended among the faults." in text
    assert "3 faults, 3 processes killed at 1 seams. Settled 2.5 s after the load." in text
    assert "| Kafka's data wiped | 2 | 3.0 |" in text
    assert "| 3.0 | 3.0 | 8.5 | SIGSTOP of a worker, then SIGCONT | a / b |" in text
    assert "| I1 | every order has exactly one OrderCreated event | 1,520 | 0 | ok |" in text


def test_what_ended_after_the_last_fault_is_not_counted_as_ended_among_them() -> None:
    assert report(over_time=[(0, 9, 5), (9, 0, 3), (10, 0, 1)]).ended_meanwhile == 8


def test_a_violation_is_in_the_title_and_in_full() -> None:
    text = report(problems=["I3 violated 1 times, first: order 1"], settled_after=None).markdown("again", "x.svg")
    assert text.startswith("# Torture, seed 7: VIOLATED\n")
    assert "- I3 violated 1 times, first: order 1\n" in text
    assert "Settled" not in text


def test_the_picture_has_a_bar_for_each_fault_and_a_row_for_each_kind() -> None:
    root = ElementTree.fromstring(report().picture())
    names = {"svg": "http://www.w3.org/2000/svg"}
    texts = [element.text for element in root.iterfind(".//svg:text", names)]
    assert texts.count(str(Kind.KAFKA_WIPED)) == texts.count(str(Kind.PAUSE_WORKER)) == 1
    bars = [element for element in root.iterfind(".//svg:rect", names) if element.get("opacity")]
    assert len(bars) == 3
    width = float(root.get("width") or 0)
    assert all(0 <= float(bar.get("x") or -1) < width for bar in bars)


def test_a_run_without_faults_and_orders_has_a_picture_too() -> None:
    ElementTree.fromstring(report(injected=[], over_time=[]).picture())
