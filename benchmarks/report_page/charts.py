"""Bars and lines as SVG. Colours are classes, which the page's style gives a value, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

NUM_COLOURS = 8
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 14, 44
_INNER_WIDTH, _INNER_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM


@dataclass(frozen=True)
class Series:
    """Values by place: bars have names there, lines numbers."""

    name: str
    points: Sequence[tuple[float | str, float]]


@dataclass(frozen=True)
class Chart:
    """`kind` is "bars" or "lines"; lines may have both axes logarithmic. `mark`: a value that is drawn across."""

    kind: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    is_log: bool = False
    mark: float | None = None


class Scale:
    """Numbers -> pixels between two ends, from 0 or, logarithmic, from the smallest."""

    def __init__(self, values: Sequence[float], start: float, end: float, is_log: bool, from_zero: bool = True):
        assert not is_log or min(values) > 0, "a logarithmic axis has positive numbers alone"
        self.is_log = is_log
        low, high = min(values), max(values)
        self.low = low if is_log or not from_zero else min(0.0, low)
        self.high = high if high > self.low else self.low + 1
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self._start + (self._end - self._start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers, a handful."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
            found = [one for one in found if self.low <= one <= self.high]
            return found[:: -(-len(found) // 8)] if found else [self.low, self.high]
        size = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(factor * size for factor in (1, 2, 5, 10) if (self.high - self.low) / (factor * size) <= 6)
        first = math.ceil(self.low / step)
        return [step * index for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def draw(chart: Chart) -> str:
    """The chart as an SVG element."""
    values = [value for series in chart.series for _, value in series.points]
    values += [] if chart.mark is None else [chart.mark]
    top = 1.0 if chart.is_log else 1.08  # room for the numbers on bars
    scale = Scale([*values, max(values) * top], _HEIGHT - _BOTTOM, _TOP, chart.is_log)
    parts = [_axes(chart, scale), (_bars if chart.kind == "bars" else _lines)(chart, scale)]
    if chart.mark is not None:
        y = scale.place(chart.mark)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def format_number(value: float) -> str:
    """Three digits, or all of a larger number's."""
    if value == 0 or 100 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _axes(chart: Chart, scale: Scale) -> str:
    parts = []
    for tick in scale.ticks():
        y = scale.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, format_number(tick), "end"))
    middle = _LEFT + _INNER_WIDTH / 2
    parts.append(_text(middle, _HEIGHT - 6, chart.x_label, "middle"))
    parts.append(
        f'<text transform="translate(13 {_TOP + _INNER_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>"
    )
    return "".join(parts)


def _bars(chart: Chart, scale: Scale) -> str:
    places = list(dict.fromkeys(str(x) for series in chart.series for x, _ in series.points))
    slot = _INNER_WIDTH / len(places)
    width = min(46.0, 0.84 * slot / len(chart.series))
    parts, bottom = [], scale.place(max(0.0, scale.low))
    for number, series in enumerate(chart.series):
        for x, value in series.points:
            middle = _LEFT + slot * (places.index(str(x)) + 0.5)
            left, top = middle + width * (number - len(chart.series) / 2), scale.place(value)
            parts.append(
                f'<rect class="fill{number % NUM_COLOURS}" x="{left:.1f}" y="{min(top, bottom):.1f}" '
                f'width="{width - 1:.1f}" height="{abs(bottom - top):.1f}">{_title(series, x, value)}</rect>'
            )
            if width >= 22:
                parts.append(_text(left + width / 2, top - 3, format_number(value), "middle", "small"))
    for index, place in enumerate(places):
        parts.append(_text(_LEFT + slot * (index + 0.5), _HEIGHT - _BOTTOM + 16, place, "middle"))
    return "".join(parts)


def _lines(chart: Chart, scale: Scale) -> str:
    xs = sorted({float(x) for series in chart.series for x, _ in series.points})
    across = Scale(xs, _LEFT + 10, _WIDTH - _RIGHT - 10, chart.is_log, from_zero=False)
    parts = []
    for number, series in enumerate(chart.series):
        points = sorted((float(x), value) for x, value in series.points)
        path = " ".join(f"{across.place(x):.1f},{scale.place(value):.1f}" for x, value in points)
        colour = number % NUM_COLOURS
        parts.append(f'<polyline class="line{colour}" points="{path}"/>')
        parts += [
            f'<circle class="fill{colour}" cx="{across.place(x):.1f}" cy="{scale.place(value):.1f}" r="3.5">'
            f"{_title(series, x, value)}</circle>"
            for x, value in points
        ]
    are_places = chart.is_log or (len(xs) <= 10 and all(x.is_integer() for x in xs))
    for x in xs if are_places else across.ticks():
        parts.append(_text(across.place(x), _HEIGHT - _BOTTOM + 16, format_number(x), "middle"))
    return "".join(parts)


def _title(series: Series, x: float | str, value: float) -> str:
    at = x if isinstance(x, str) else format_number(x)
    return f"<title>{escape(f'{series.name}, {at}: {format_number(value)}')}</title>"


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    attribute = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attribute}>{escape(text)}</text>'
