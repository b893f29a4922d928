"""A Griffe extension that shows the examples of docstrings, `>>> ...`, as code."""

import re

import griffe

# A line that begins a statement, and the lines that continue it or that it prints.
EXAMPLE = re.compile(r"^>>> .*\n(?:.+\n)*", re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    """Puts fences around the examples of every docstring."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = fence(obj.docstring.value)


def fence(docstring: str) -> str:
    """Puts fences around the examples of a docstring."""
    return EXAMPLE.sub(r"```pycon\n\g<0>```\n", docstring + "\n").rstrip("\n")
