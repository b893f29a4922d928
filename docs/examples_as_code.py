"""A Griffe extension: examples of docstrings, `>>> ...`, are code, not quotations."""

import re

import griffe

# Lines that begin a statement, go on with it, or are what it prints.
EXAMPLE = re.compile(r"^>>> .*\n(?:.+\n)*", re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = fence(obj.docstring.value)


def fence(docstring: str) -> str:
    """Puts fences around the examples of a docstring."""
    return EXAMPLE.sub(r"```pycon\n\g<0>```\n", docstring + "\n").rstrip("\n")
