"""Tables on the terminal."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

WIDE = 1000  # columns of a file or a pipe, which cut nothing off


def print_numbers(title: str, numbers: Mapping[str, float]) -> str:
    """Print numbers by their names below a title, and return what was printed."""
    table = Table("quantity", "value", title=title, title_justify="left")
    for name, number in numbers.items():
        table.add_row(name, f"{number:.5g}")
    return print_table(table)


def print_table(table: Table) -> str:
    """Print a table, and return its text."""
    width = None if sys.stdout.isatty() else WIDE
    console = Console(record=True, markup=False, highlight=False, width=width)
    console.print(table)
    return console.export_text()
