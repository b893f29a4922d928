"""Where tables are printed."""

import os

import rich.console
import rich.table

# Characters of a line in a file or a pipe, as in `print(table)`.
_WIDTH = 120


def stdout() -> rich.console.Console:
    """A console for tables on stdout.

    Lines are as wide as the terminal, or as `COLUMNS` says. There are colours on a terminal only,
    and none if `NO_COLOR` is set.
    """
    console = rich.console.Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _WIDTH
    return console


def print_table(table: rich.table.Table) -> None:
    """Prints a table on stdout. Where it is too narrow, words break, and nothing is left out."""
    for column in table.columns:
        column.overflow = "fold"
    stdout().print(table)
