"""Charts and markup of the pages."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.utils.formatting import format_number, format_percent, format_si
from andromeda.utils.html import Axis, ReferenceLine, Series, el, heat_map, join, line_chart
from andromeda.utils.html.line_chart import BOTTOM, LEFT, MOST, RIGHT, TOP, Scale, spread, thinned

NUMBERS = st.one_of(st.floats(-1e15, 1e15), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.text())
def test_text_and_attributes_are_escaped(text: str) -> None:
    made = el("p", text, title=text)
    parsed = ElementTree.fromstring(made)
    clean = [
        c for c in text if ord(c) >= 32 and not 127 <= ord(c) < 160 and not 0xD800 <= ord(c) < 0xE000 and ord(c) not in (0xFFFE, 0xFFFF)
    ]
    assert [c for c in parsed.text or "" if c in clean] == [c for c in clean if c in (parsed.text or "")]
    assert list(parsed) == []


def test_markup_is_kept_once() -> None:
    assert join(el("b", "<"), "<", None, ["a", el("i")]) == "<b>&lt;</b>&lt;a<i></i>"


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), st.booleans(), st.booleans())
def test_any_figures_make_a_whole_drawing(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    drawn = line_chart("t", [Series("s", points)], Axis("x", log=log_x), Axis("y", log=log_y), rules=[ReferenceLine("r", 1.0)])
    text = str(drawn)
    ElementTree.fromstring(text)
    assert "nan" not in text.lower().replace("nano", "")
    assert "inf" not in text.replace("inset", "")


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e9), st.integers(2, 12))
def test_ticks_are_round_within_and_not_too_many(low: float, width: float, count: int) -> None:
    scale = Scale(low, low + width, 0, 100)
    if low + width == low or width / max(abs(low), 1) < 1e-9:
        return
    ticks = scale.ticks(count)
    assert 1 <= len(ticks) <= 2 * count + 1
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in ticks)


@given(st.floats(1e-6, 1e9), st.floats(1.25, 1e12), st.integers(3, 12))
def test_logarithmic_ticks(low: float, factor: float, count: int) -> None:
    """Within the ends, never one alone, and not too many."""
    ticks = Scale(low, low * factor, 0, 100, log=True).ticks(count)
    assert 2 <= len(ticks) <= (count + 1 if factor >= 10 else 2 * count + 1)
    assert all(low * (1 - 1e-9) <= t <= low * factor * (1 + 1e-9) for t in ticks)


def test_a_scale_is_linear_in_the_figure_or_its_logarithm() -> None:
    assert Scale(2, 6, 10, 110)(3) == pytest.approx(35)
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    low, high = spread([3.0, 3.0])
    assert low < 3 < high


def test_thinning_keeps_means_and_extremes() -> None:
    points = [(float(i), math.sin(i)) for i in range(10 * MOST)]
    thin = thinned(Series("s", points))
    assert len(thin.points) == MOST
    assert sum(y for _, y in thin.points) / MOST == pytest.approx(sum(y for _, y in points) / len(points))
    assert min(low for _, low, _ in thin.band) == min(y for _, y in points)
    assert max(high for _, _, high in thin.band) == max(y for _, y in points)


def test_figures_as_text() -> None:
    assert [format_number(x) for x in (1234.5, 0.025, 3.1e-7, 0.0, None, -2.0)] == ["1,234", "0.02500", "3.100e-7", "0", "–", "−2.000"]  # noqa: RUF001
    assert [format_si(x) for x in (2_048_000, 400, 0.3, 1e9)] == ["2.05 M", "400", "0.3", "1 B"]
    assert [format_percent(x) for x in (0.27, 0.004, 1.0, None)] == ["27 %", "0.4 %", "100 %", "–"]  # noqa: RUF001


def test_a_heat_map_is_a_table_of_its_figures() -> None:
    parsed = ElementTree.fromstring(heat_map("t", ["a", "b"], ["x", "y"], [[0.0, 1.0], [None, -0.5]]))
    cells = [cell.text for cell in parsed.iter("td")]
    assert cells == ["0 %", "100 %", "–", "−50 %"]  # noqa: RUF001


def test_nothing_leaves_the_frame_downwards_or_sideways() -> None:
    """A long, noisy curve with a steep beginning: only the line may leave, at the top, where it is cut off."""
    points = [(float(i), 3 + 50 / i + math.sin(i) * (i % 7)) for i in range(1, 5000)]
    drawn = ElementTree.fromstring(line_chart("t", [Series("s", points)], Axis("x"), Axis("y")))
    for path in drawn.iter("path"):
        places = [
            tuple(map(float, place.split(",")))
            for place in path.attrib["d"].strip("MZ").split("L")
            if "V" not in place and "H" not in place
        ]
        for x, y in places:
            assert LEFT <= x <= 380 - RIGHT
            assert y <= 232 - BOTTOM
            if "band" in path.attrib["class"]:
                assert y >= TOP
