"""Tables on the terminal."""

import sys

from rich.console import Console
from rich.table import Column, Table

WIDE = 1000  # columns of a file or a pipe, which cut nothing off


def quantities(title: str) -> Table:
    """Return an empty table of quantities and their values."""
    value = Column("value", justify="right")
    return Table("quantity", value, title=title, title_justify="left")


def print_table(table: Table) -> str:
    """Print a table, and return its text."""
    width = None if sys.stdout.isatty() else WIDE
    console = Console(record=True, markup=False, highlight=False, width=width)
    console.print(table)
    return console.export_text()
