"""Figures as tables: drawn and colored on a terminal, plain aligned columns when piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print one table. right: indices of the columns that are aligned to the right (figures)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from andromeda.utils.untrusted import printable

    title, terminal = printable(title), sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    table.show_header = any(columns)
    for index, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if terminal:
        Console().print(Text(title, "bold"), table)
        return
    # A pipe has no width to fit into: nothing is wrapped, and no line ends in blanks.
    console = Console(width=10_000)
    with console.capture() as captured:
        console.print(Text(title), table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), end="\n\n")
