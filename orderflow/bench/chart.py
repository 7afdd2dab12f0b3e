"""Line charts as SVG: panels with axes, ticks, a legend; legible on light and on dark ground."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Protocol

# Two lines of a panel differ in colour and in dashes. Every colour in full, and no CSS variables: not every viewer knows them.
STYLE = """
svg { font: 12px system-ui, sans-serif; } .title { font-weight: 600; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .line.second { stroke-dasharray: 6 3; }
"""
LIGHT = {"ground": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "faint": "#d8dee4", "first": "#0969da", "second": "#bc4c00"}
DARK = {"ground": "#0d1117", "ink": "#e6edf3", "soft": "#9198a1", "faint": "#30363d", "first": "#58a6ff", "second": "#f0883e"}
KINDS = ("first", "second")
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 50, 46
MOST_TICKS = 6


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name in the legend, and its points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, with a label that names the unit; `decades`: logarithmic, both ends above 0."""

    label: str
    low: float
    high: float
    decades: bool = False

    def at(self, value: float) -> float:
        """Where a value stands: 0 at the low end, 1 at the high one."""
        if self.decades:
            return log10(max(value, self.low) / self.low) / log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.decades:
            exponents = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            found = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
        else:
            step = _round_step((self.high - self.low) / MOST_TICKS)
            found = [step * number for number in range(ceil(self.low / step), floor(self.high / step) + 1)]
        return [value for value in found if self.low * 0.9999 <= value <= self.high * 1.0001]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, 50 ... (or 0.1, 0.2 ...) that is not below `least`."""
    power = 10.0 ** floor(log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * 0.9999)


def scale(label: str, values: Iterable[float]) -> Axis:
    """An axis from 0 to a little above the largest value."""
    return Axis(label, 0.0, max([*values, 1e-9]) * 1.05)


def decades(label: str, values: Iterable[float]) -> Axis:
    """A logarithmic axis around the values that are above 0."""
    positive = [value for value in values if value > 0] or [1.0]
    return Axis(label, min(positive) * 0.8, max(positive) * 1.25, decades=True)


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart, at a place and of a size in pixels, with at most two series."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    left: float
    top: float
    width: float
    height: float

    def svg(self) -> str:
        """A group of SVG elements."""
        parts = [_text(self.left + LEFT, self.top + 18, self.title, "title"), *self._grid(), *self._legend()]
        parts.append(
            _text(self.left + LEFT + self._inner_width / 2, self.top + self.height - 8, self.x.label, "soft", "middle")
        )
        up_x, up_y = self.left + 14, self.top + TOP + self._inner_height / 2
        parts.append(
            f'<text class="soft" text-anchor="middle" transform="translate({up_x:.1f} {up_y:.1f}) rotate(-90)">'
            f"{escape(self.y.label)}</text>"
        )
        for kind, series in zip(KINDS, self.series, strict=False):
            places = [self._place(x, y) for x, y in series.points]
            parts.append(f'<polyline class="line {kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
            if len(places) < 20:
                parts += [f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places]
        return "<g>" + "".join(parts) + "</g>"

    @property
    def _inner_width(self) -> float:
        return self.width - LEFT - RIGHT

    @property
    def _inner_height(self) -> float:
        return self.height - TOP - BOTTOM

    def _place(self, x: float, y: float) -> tuple[float, float]:
        return (
            self.left + LEFT + self.x.at(x) * self._inner_width, self.top + TOP + (1 - self.y.at(y)) * self._inner_height,
        )  # fmt: skip

    def _grid(self) -> Iterable[str]:
        right, bottom = self._place(self.x.high, self.y.low)
        for tick in self.y.ticks():
            _, y = self._place(self.x.low, tick)
            yield f'<path class="grid" d="M{self.left + LEFT:.1f} {y:.1f}H{right:.1f}"/>'
            yield _text(self.left + LEFT - 6, y + 4, _number(tick), "soft", "end")
        for tick in self.x.ticks():
            x, _ = self._place(tick, self.y.low)
            yield f'<path class="grid" d="M{x:.1f} {bottom:.1f}v5"/>'
            yield _text(x, bottom + 18, _number(tick), "soft", "middle")
        yield f'<path class="grid" d="M{self.left + LEFT:.1f} {bottom:.1f}H{right:.1f}"/>'

    def _legend(self) -> Iterable[str]:
        x, y = self.left + LEFT, self.top + 36
        for kind, series in zip(KINDS, self.series, strict=False):
            yield f'<path class="line {kind}" d="M{x:.1f} {y - 4:.1f}h24"/>'
            yield _text(x + 30, y, series.name)
            x += 46 + 7 * len(series.name)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"


def _colours(of: dict[str, str]) -> str:
    lines = "".join(f".line.{kind} {{ stroke: {of[kind]}; }} .dot.{kind} {{ fill: {of[kind]}; }} " for kind in KINDS)
    return (
        f".ground {{ fill: {of['ground']}; }} text {{ fill: {of['ink']}; }} .soft {{ fill: {of['soft']}; }} "
        f".grid {{ stroke: {of['faint']}; }} {lines}"
    )


class Drawn(Protocol):
    """What stands somewhere in a picture."""

    def svg(self) -> str:
        """A group of SVG elements."""


def document(panels: Sequence[Drawn], note: str, *, width: float, height: float) -> str:
    """A whole SVG file with the panels and a line of text at its foot."""
    style = f"{STYLE}{_colours(LIGHT)}@media (prefers-color-scheme: dark) {{ {_colours(DARK)} }}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
        f'<style>{style}</style><rect class="ground" width="100%" height="100%"/>'
        f"{''.join(panel.svg() for panel in panels)}{_text(16, height - 12, note, 'soft')}</svg>\n"
    )
