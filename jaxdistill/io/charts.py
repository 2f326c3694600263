"""Curves as drawings that a page of HTML holds itself: lines over steps, on plain or log axes."""

import math
from collections.abc import Mapping
from typing import NamedTuple
from xml.etree import ElementTree as Tree

import numpy as np
from jaxtyping import Float, Int

WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 24
_COLORS = 8  # of the style sheet
_STRETCHES = 140  # more points than this stand no longer apart
_DOTTED = 30  # fewer points than this are seen one by one
_DECADES = 1.5  # of values above zero, from which their axis is logarithmic


class Curve(NamedTuple):
    """A quantity over the steps of a run.

    Attributes:
        steps: Where it was measured, in rising order.
        values: What it was there; finite.
    """

    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


def is_logarithmic(curves: Mapping[str, Curve]) -> bool:
    """Whether the values are wanted on a logarithmic axis: all above zero, and decades apart."""
    values = np.concatenate([curve.values for curve in curves.values()])
    least, most = values.min(), values.max()
    return bool(least > 0) and math.log10(most) - math.log10(least) >= _DECADES


def chart(curves: Mapping[str, Curve], title: str, colors: Mapping[str, int]) -> Tree.Element:
    """Draws curves over each other, as an `svg` whose colours a style sheet gives.

    Of a long curve the means of stretches are drawn, over a band from the least to the most of
    each. What belongs to a curve has the class of its colour, a band also `band`, and the lines
    behind have `grid`.

    Args:
        curves: Name -> a curve of two points at least.
        title: What is drawn, for those who cannot see it.
        colors: Name -> a number, whose colour is that of the class `color` says.
    """
    logarithmic = is_logarithmic(curves)
    scale = np.log10 if logarithmic else np.asarray
    steps = np.concatenate([curve.steps for curve in curves.values()])
    drawn = scale(np.concatenate([curve.values for curve in curves.values()]))
    marks = decades(drawn) if logarithmic else ticks(drawn.min(), drawn.max())
    low, high = min(drawn.min(), *marks), max(drawn.max(), *marks)
    first, last = steps.min(), max(steps.max(), steps.min() + 1)

    def x(step):
        return _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y(value):
        part = (scale(value) - low) / (high - low or 1)
        return HEIGHT - _BOTTOM - part * (HEIGHT - _TOP - _BOTTOM)

    svg = Tree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img"})
    Tree.SubElement(svg, "title").text = title
    for mark in marks:
        value = 10.0**mark if logarithmic else mark
        _line(svg, [(_LEFT, y(value)), (WIDTH - _RIGHT, y(value))], "grid")
        _text(svg, _LEFT - 6, y(value) + 4, f"{value:.4g}", "end")
    for step, anchor in ((first, "start"), (last, "end")):
        _text(svg, x(step), HEIGHT - 6, f"{step:,}", anchor)
    for name, curve in curves.items():
        shown, kind = condensed(curve), color(colors[name])
        if len(shown.steps) < len(curve.steps):
            there = [*zip(shown.steps, shown.most, strict=True)]
            back = [*zip(shown.steps, shown.least, strict=True)][::-1]
            points = _points((x(step), y(value)) for step, value in there + back)
            Tree.SubElement(svg, "polygon", {"points": points, "class": f"band {kind}"})
        along = zip(shown.steps, shown.mean, strict=True)
        places = [(x(step), y(value)) for step, value in along]
        _line(svg, places, kind)
        if len(places) <= _DOTTED:
            for at, height in places:
                place = {"cx": f"{at:.1f}", "cy": f"{height:.1f}", "r": "2.5", "class": kind}
                Tree.SubElement(svg, "circle", place)
    return svg


def color(number: int) -> str:
    """The class of a colour, `s0` to `s7`, for what belongs to a curve."""
    return f"s{number % _COLORS}"


class Condensed(NamedTuple):
    """A curve in stretches: where each is, its mean, its least and its most."""

    steps: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    least: Float[np.ndarray, " n"]
    most: Float[np.ndarray, " n"]


def condensed(curve: Curve, most: int = _STRETCHES) -> Condensed:
    """A curve in at most so many stretches of as many points as can be; none is left out.

    The first and the last keep the ends of the curve.
    """
    parts = np.array_split(np.arange(len(curve.steps)), min(most, len(curve.steps)))
    at = np.array([curve.steps[part].mean() for part in parts])
    at[0], at[-1] = curve.steps[0], curve.steps[-1]
    values = [curve.values[part] for part in parts]
    least, greatest = (np.array([pick(v) for v in values]) for pick in (np.min, np.max))
    return Condensed(at, np.array([v.mean() for v in values]), least, greatest)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers around a range, one before it and one behind it, `most` + 2 at most."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-290):  # too near to be told apart
        return [float(low)]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    begin, end = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(begin, end + 1)]


def decades(logarithms: Float[np.ndarray, " n"]) -> list[float]:
    """Whole logarithms around a range, every n-th if there are many."""
    begin, end = math.floor(logarithms.min()), math.ceil(logarithms.max())
    return [float(mark) for mark in range(begin, end + 1, max(1, math.ceil((end - begin) / 6)))]


def _points(places) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _line(svg: Tree.Element, places, kind: str) -> None:
    Tree.SubElement(svg, "polyline", {"points": _points(places), "class": kind})


def _text(svg: Tree.Element, x: float | int, y: float | int, text: str, anchor: str) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    Tree.SubElement(svg, "text", place).text = text
