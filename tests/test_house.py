"""Each part of the package imports only from the parts below it."""

import ast
import graphlib
import pathlib

import pytest

import keras_bilinear

ROOT = pathlib.Path(keras_bilinear.__file__).parent
GROUND_FLOOR = {
    "data",
    "datasets",
    "files",
    "messages",
    "progress",
    "progress_display",
    "tables",
    "version",
}
LIBRARY = {"kronecker", "keras_private", "layers", "rewriting", "reports", "litert"}
COMMANDS = {"cli", "demo", "benchmark"}
# What each part may import, besides itself.
ALLOWED = {
    "kronecker": {"progress"},
    "keras_private": {"kronecker"},
    "layers": {"kronecker", "keras_private", "data"},
    "rewriting": {"kronecker", "keras_private", "layers", *GROUND_FLOOR},
    "reports": {"kronecker", "keras_private", "layers", "rewriting", *GROUND_FLOOR},
    "litert": {*LIBRARY, *GROUND_FLOOR},
    **{part: {*LIBRARY, *COMMANDS, *GROUND_FLOOR, "__init__"} for part in COMMANDS},
    **{part: {"messages"} for part in GROUND_FLOOR},
    "data": {"messages", "keras_private"},
    "progress": {"messages", "progress_display"},
    "__main__": set(),
    "__init__": {*LIBRARY, *GROUND_FLOOR},
}


def find_sources():
    """The path of each module, by the module's name."""
    sources = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path
    return sources


SOURCES = find_sources()


def imports_of(name):
    """The modules of the package that a module imports, at once or in a function."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports by a relative name"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in SOURCES else node.module)
    return {module for module in found if module.partition(".")[0] == "keras_bilinear"}


def part_of(name):
    """The subpackage of a module, or the module on the ground floor."""
    return name.split(".")[1] if "." in name else "__init__"


def test_every_part_has_its_rule():
    assert {part_of(name) for name in SOURCES} == {*ALLOWED}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_from_those_below_it(part):
    wrong = [
        f"{name} imports {imported}"
        for name in SOURCES
        if part_of(name) == part
        for imported in imports_of(name)
        if part_of(imported) not in {part, *ALLOWED[part]}
    ]
    assert not wrong


def test_imports_are_found():
    assert "keras_bilinear.cli.saved" in imports_of("keras_bilinear.cli.plan")
    assert "keras_bilinear.kronecker.nearest" in imports_of("keras_bilinear.kronecker.fit")
    assert imports_of("keras_bilinear.version") == set()


def test_no_modules_import_each_other():
    imports = {name: imports_of(name) for name in SOURCES}
    graphlib.TopologicalSorter(imports).prepare()  # Raises a `CycleError` that names the circle.


def test_dir_shows_the_public_names():
    assert dir(keras_bilinear) == sorted(keras_bilinear.__all__)
