"""Tables on the terminal."""

from rich.console import Console
from rich.table import Table

WIDE = 1000  # columns of a file or a pipe, which cut nothing off


def quantities(title: str) -> Table:
    """Return an empty table of quantities and their values."""
    table = Table("quantity", title=title, title_justify="left")
    table.add_column("value", justify="right")
    return table


def print_table(table: Table) -> str:
    """Print a table, and return its text."""
    console = Console(record=True, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    return console.export_text()
