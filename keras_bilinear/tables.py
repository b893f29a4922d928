"""Results as tables, and numbers as short texts."""

import html
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
        console = rich.console.Console(
            file=text,
            width=120,
            force_jupyter=False,  # It would show the table in a notebook and write nothing.
            markup=False,
            emoji=False,
            highlight=False,
        )
        console.print(self.table())
        return text.getvalue()

    def _repr_html_(self) -> str:
        return to_html(self.table())


def to_html(table: rich.table.Table) -> str:
    """A table of texts as an HTML table, which a notebook shows in its own style."""

    def row(tag, cells):
        styled = [
            f'<{tag} style="text-align: {column.justify}">{html.escape(str(cell))}</{tag}>'
            for column, cell in zip(table.columns, cells, strict=True)
        ]
        return f"<tr>{''.join(styled)}</tr>"

    head = row("th", [column.header for column in table.columns])
    body = [
        row("td", cells) for cells in zip(*(column.cells for column in table.columns), strict=True)
    ]
    lines = ["<div>", "<table>"]
    if table.title:
        lines.append(f"<caption><strong>{html.escape(str(table.title))}</strong></caption>")
    lines += [f"<thead>{head}</thead>", "<tbody>", *body, "</tbody>"]
    if table.show_footer:
        lines.append(f"<tfoot>{row('th', [column.footer for column in table.columns])}</tfoot>")
    lines.append("</table>")
    if table.caption:
        lines.append(f"<p><small>{html.escape(str(table.caption))}</small></p>")
    return "\n".join([*lines, "</div>"])


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
