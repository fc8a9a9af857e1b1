"""Tables on the terminal."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 1000  # columns of a file or a pipe, which cut nothing off


def print_numbers(title: str, numbers: Mapping[str, float | None]) -> None:
    """Print numbers by their names below a title; what was not measured is None."""
    table = Table("quantity", "value", title=title, title_justify="left")
    for name, number in numbers.items():
        table.add_row(name, "–" if number is None else f"{number:.5g}")
    print_table(table)


def print_table(table: Table) -> None:
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    # Not rich's own display in a notebook: whoever catches the standard output gets the table.
    Console(markup=False, highlight=False, width=width, force_jupyter=False).print(table)
