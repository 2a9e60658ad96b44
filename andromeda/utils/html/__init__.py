"""Pages that are one file: text, tables and charts that need no network, no library and no fonts of their own.

Charts are SVG written here rather than by a plotting library: they take the page's colors in light and in dark, their text
stays text that can be read aloud and searched, and a script of a few lines tells the figures under the pointer.
"""

from markupsafe import Markup

from andromeda.utils.html.elements import Bar, Child, bar_chart, definition_list, details, el, grid, heat_map, join, table, tiles
from andromeda.utils.html.line_chart import Axis, ReferenceLine, Series, line_chart
from andromeda.utils.html.page import Section, page

__all__ = [
    "Axis",
    "Bar",
    "Child",
    "Markup",
    "ReferenceLine",
    "Section",
    "Series",
    "bar_chart",
    "definition_list",
    "details",
    "el",
    "grid",
    "heat_map",
    "join",
    "line_chart",
    "page",
    "table",
    "tiles",
]
