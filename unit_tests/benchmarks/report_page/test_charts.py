"""Pictures are well-formed, their numbers are at their places, and texts are escaped."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks.report_page.charts import Chart, Scale, Series, draw, format_number


def shapes(chart: Chart, tag: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(draw(chart)).iter() if element.tag == tag]


def test_bars_are_as_high_as_their_values_and_stand_side_by_side() -> None:
    series = [Series("a", [("1", 10.0), ("4", 20.0)]), Series("b", [("4", 5.0)])]
    bars = shapes(Chart("bars", "batch", "tok/s", series), "rect")
    heights = [float(bar.get("height", 0)) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.01) and heights[0] == pytest.approx(
        2 * heights[2], rel=0.01
    )
    assert [bar.get("class") for bar in bars] == ["fill0", "fill0", "fill1"]
    first, second, third = (float(bar.get("x", 0)) for bar in bars)
    assert first < second < third and [bar[0].text for bar in bars] == ["a, 1: 10", "a, 4: 20", "b, 4: 5"]


def test_lines_run_from_left_to_right_with_a_point_at_each_number() -> None:
    chart = Chart("lines", "context", "ms", [Series("a", [(4096, 4.0), (1024, 1.0), (16384, 16.0)])], is_log=True)
    (line,) = shapes(chart, "polyline")
    points = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
    assert len(shapes(chart, "circle")) == 3 and points == sorted(points)
    # A power law is a straight line between logarithmic axes.
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (y1 - y0) / (x1 - x0) == pytest.approx((y2 - y1) / (x2 - x1), rel=0.01)


def test_a_mark_is_drawn_across_and_texts_are_escaped() -> None:
    chart = Chart("bars", "<x>", "a & b", [Series("<script>", [("<i>", 0.5)])], mark=1.0)
    assert len([line for line in shapes(chart, "line") if line.get("class") == "mark"]) == 1
    texts = [element.text for element in shapes(chart, "text")]
    assert {"<x>", "a & b", "<i>"} <= set(texts) and "<script>" not in draw(chart)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [0.001, 0.0042], [3.0, 12345.0], [-2.0, 7.0]])
def test_ticks_are_round_few_and_inside(values: list[float]) -> None:
    scale = Scale(values, 100, 0, is_log=False)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 7 and all(scale.low <= tick <= scale.high * (1 + 1e-9) for tick in ticks)
    assert scale.place(scale.low) == 100 and scale.place(scale.high) == 0


@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0, 64.0], [0.3, 4000.0], [6.0, 7.0]])
def test_logarithmic_ticks_are_few_and_inside(values: list[float]) -> None:
    scale = Scale(values, 0, 100, is_log=True)
    assert 1 <= len(scale.ticks()) <= 9 and all(scale.low <= tick <= scale.high for tick in scale.ticks())


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.4, "1,234"), (0.12345, "0.123"), (99.95, "100"), (2e9, "2e+09")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert format_number(value) == text
