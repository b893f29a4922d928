"""Results as tables, and numbers as short texts."""

import io

import rich.console
import rich.table


class Tabular:
    """A result that prints as a table, on a console and in a notebook."""

    def table(self) -> rich.table.Table:
        """The result as a table."""
        raise NotImplementedError

    def __str__(self) -> str:
        text = io.StringIO()
        console = rich.console.Console(file=text, width=120)
        console.print(self.table())
        return text.getvalue()

    def _repr_html_(self) -> str:
        console = rich.console.Console(file=io.StringIO(), record=True, width=120)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def right(*names: str) -> list[rich.table.Column]:
    """Columns of numbers, aligned to the right, with these names."""
    return [rich.table.Column(name, justify="right") for name in names]


def count_text(value: float) -> str:
    """A count with three significant digits and a unit, such as `1.86 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value}"


def bytes_text(value: float) -> str:
    """A number of bytes with three significant digits and a unit, such as `7.46 MB`."""
    return f"{count_text(value)}B" if value >= 1000 else f"{value} B"


def milliseconds_text(value: float) -> str:
    """A number of milliseconds with three significant digits, such as `1.25 ms`."""
    return f"{value:.3g} ms"
