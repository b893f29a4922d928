import pathlib
import re
import runpy

import pytest

import keras_bilinear

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def documented():
    pages = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    return re.findall(r"^::: keras_bilinear\.(\S+)$", pages, re.MULTILINE)


def test_every_public_name_is_documented_once():
    names = [name.rpartition(".")[2] for name in documented()]
    assert len({*names}) == len(names)
    assert not {*keras_bilinear.__all__} - {*names}


def test_every_tutorial_is_linked():
    for page in (DOCS / "tutorials.md", DOCS.parent / "README.md"):
        linked = re.findall(r"tutorials/(\w+)\.ipynb", page.read_text())
        assert linked
        assert {*linked} == {path.stem for path in (DOCS.parent / "tutorials").glob("*.ipynb")}


@pytest.mark.parametrize("folder", [".", "benchmarks", "tutorials"])
def test_links_of_the_readmes_lead_somewhere(folder):
    page = DOCS.parent / folder / "README.md"
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    assert links
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings]
            assert anchor in anchors, anchor


def test_the_picture_is_what_its_script_draws(tmp_path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "draw_idea.py"))["draw"](tmp_path / "idea.svg")
    assert (tmp_path / "idea.svg").read_text() == (DOCS / "idea.svg").read_text()
