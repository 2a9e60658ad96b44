"""Pages that are one file: text, tables and charts that need no network, no library and no fonts of their own.

Charts are SVG written here rather than by a plotting library: they take the page's colours in light and in dark, their text
stays text that can be read aloud and searched, and a script of a few lines tells the figures under the pointer.
"""

from andromeda.study.page.bars import Bar, bars
from andromeda.study.page.heat import heat
from andromeda.study.page.lines import Axis, Rule, Series, lines
from andromeda.study.page.markup import Child, Html, el, join
from andromeda.study.page.shell import Section, page
from andromeda.study.page.tables import details, facts, grid, table, tiles

__all__ = [
    "Axis",
    "Bar",
    "Child",
    "Html",
    "Rule",
    "Section",
    "Series",
    "bars",
    "details",
    "el",
    "facts",
    "grid",
    "heat",
    "join",
    "lines",
    "page",
    "table",
    "tiles",
]
