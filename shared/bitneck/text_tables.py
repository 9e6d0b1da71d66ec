"""Tables for people: within 80 columns on a terminal, whole where they go to a file or another program."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["make_table", "print_table", "write_rows"]

_WIDE, _HIGH = 1_000_000, 100
"""Rich takes a width only with a height, where the terminal is a dumb one."""
_TEXT_LEAST = 6


def make_table(*columns: str, text: Sequence[str] = (), title: str = "") -> Table:
    """An empty table. Numbers are to the right and never cut; only texts give way on a narrow terminal.

    Args:
        columns: their names.
        text: those that hold texts.
        title: above it; empty for none.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.title, table.title_justify = title or None, "left"
    for name in columns:
        left: Literal["left", "right"] = "left" if name in text else "right"
        table.add_column(name, justify=left, no_wrap=True, overflow="ellipsis")
    return table


def print_table(table: Table) -> None:
    """Print a table on stdout: as wide as the terminal, or as it needs where there is none."""
    console, wide = Console(), Console(width=_WIDE, height=_HIGH)
    needed = Measurement.get(wide, wide.options, table).maximum
    if console.is_terminal:
        _narrow([column for column in table.columns if column.justify == "left"], needed - console.width)
        if Measurement.get(wide, wide.options, table).maximum > console.width:  # headings and intervals take two lines
            for column in table.columns:
                column.no_wrap = column.justify == "left"
    else:
        console = Console(width=max(1, needed), height=_HIGH)
    console.print(table)
    sys.stdout.flush()  # an output that takes nothing is noticed here, before anything else is said


def _narrow(columns: Sequence[Column], excess: int) -> None:
    """Take so many characters from columns, always from the widest one, and leave it some."""
    widths = [max(cell_len(str(cell)) for cell in (column.header, *column.cells)) for column in columns]
    for _ in range(excess):
        widest = widths.index(max(widths))
        widths[widest] = max(_TEXT_LEAST, widths[widest] - 1)
    if excess > 0:
        for column, width in zip(columns, widths, strict=True):
            column.width = width


def write_rows(rows: Iterable[Mapping[str, Any]], names: Sequence[str], *, header: bool = True) -> None:
    """Print rows as comma-separated values, each line at once.

    Args:
        rows: values by name; what is missing or None stays empty.
        names: of the columns.
        header: whether a line with the names comes first.
    """
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow(row)
    sys.stdout.flush()
