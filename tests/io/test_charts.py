"""Curves as drawings: where points lie, what is left out, and the marks of axes."""

import numpy as np
import pytest

from jaxdistill.io import charts
from jaxdistill.io.charts import Curve


def lines(svg):
    """Class -> the points of the lines that have it."""
    found = {}
    for line in svg.iter("polyline"):
        points = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
        found.setdefault(line.get("class"), []).append(points)
    return found


def marks(svg):
    """Height of a line behind -> the value that it is marked with."""
    heights = [points[0][1] for points in lines(svg)["grid"]]
    texts = [t.text for t in svg.iter("text") if t.get("text-anchor") == "end"]
    return dict(zip(heights, map(float, texts[: len(heights)]), strict=True))


@pytest.mark.parametrize("values", [[1.0, 3.5, 2.0], [-2e-9, 0.0, 5e-9], [1e-3, 20.0, 0.5]])
def test_points_lie_where_the_marks_say(values):
    curve = Curve(np.array([10, 20, 40]), np.array(values))
    svg = charts.chart({"loss": curve}, "loss", {"loss": 9})
    marked = sorted(marks(svg).items())
    scale = np.log10 if charts.is_logarithmic({"loss": curve}) else np.asarray
    assert scale is (np.log10 if values == [1e-3, 20.0, 0.5] else np.asarray)
    (drawn,) = lines(svg)["s1"]
    heights, known = np.array([h for h, _ in marked]), scale(np.array([v for _, v in marked]))
    per_pixel = abs((known[-1] - known[0]) / (heights[-1] - heights[0]))
    read = np.interp([y for _, y in drawn], heights, known)
    np.testing.assert_allclose(read, scale(np.array(values)), atol=0.06 * per_pixel, rtol=1e-3)
    x = [x for x, _ in drawn]
    assert (x[1] - x[0]) * 2 == pytest.approx(x[2] - x[1], abs=0.2)


def test_nothing_of_a_long_curve_is_left_out():
    values = np.random.default_rng(0).normal(size=9_973)
    values[5_000] = 40.0
    curve = Curve(np.arange(9_973) * 10, values)
    shown = charts.condensed(curve, 100)
    assert shown.most.max() == 40.0 and shown.least.min() == values.min()
    ends = np.cumsum([0, *(len(p) for p in np.array_split(values, 100))])
    sums = np.add.reduceat(values, ends[:-1])
    np.testing.assert_allclose(shown.mean * np.diff(ends), sums, rtol=1e-9)
    assert (shown.steps[0], shown.steps[-1]) == (0, 99_720) and (np.diff(shown.steps) > 0).all()
    svg = charts.chart({"a": curve}, "a", {"a": 0})
    assert len(list(svg.iter("polygon"))) == 1 and not list(svg.iter("circle"))
    few = charts.chart({"a": Curve(curve.steps[:5], values[:5])}, "a", {"a": 0})
    assert len(list(few.iter("circle"))) == 5 and not list(few.iter("polygon"))


def test_marks_are_round_and_around_the_range():
    rng = np.random.default_rng(1)
    for _ in range(200):
        low, high = np.sort(rng.normal(size=2) * 10.0 ** rng.integers(-12, 12))
        found = charts.ticks(low, high)
        assert found[0] <= low and high <= found[-1] and 2 <= len(found) <= 7
        step = (found[-1] - found[0]) / (len(found) - 1)
        assert f"{step:.0e}"[0] in "125" and step == pytest.approx(float(f"{step:.0e}"))
    for low, high in ((3.0, 3.0), (1.0, 1.0 + 4e-16), (0.0, 5e-324), (-2e-308, -2e-308)):
        assert charts.ticks(low, high) == [low]
    assert charts.decades(np.array([-3.2, 1.5])) == [-4, -3, -2, -1, 0, 1, 2]
    assert len(charts.decades(np.array([-30.0, 8.0]))) <= 8


@pytest.mark.parametrize(("values", "wanted"), [([1, 100], True), ([0, 100], False), ([1, 9], 0)])
def test_an_axis_is_logarithmic_for_values_decades_apart(values, wanted):
    curve = Curve(np.arange(2), np.array(values, float))
    assert charts.is_logarithmic({"a": curve}) == wanted
