import pathlib
import re
import runpy

import pytest

import keras_bilinear

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def documented():
    pages = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
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


def test_the_paper_is_cited_as_it_was_published():
    _, reference = (DOCS.parent / "README.md").read_text().split("\n## Reference\n")
    text, entry = reference.split("```bibtex\n")
    fields = dict(re.findall(r"^  (\w+) = \{(.+)\},$", entry, re.MULTILINE))
    assert fields["author"] == "Yu, L. and Gao, Y. and Zhou, J. and Zhang, J."
    assert (fields["volume"], fields["number"], fields["year"]) == ("32", "9", "2021")
    assert fields["pages"] == "4075--4085"
    assert text.strip().startswith("L. Yu, Y. Gao, J. Zhou, J. Zhang, ")
    assert "32(9), pp. 4075-4085, 2021" in text
    for name in ("title", "journal", "eprint"):
        assert fields[name] in " ".join(text.split())


def test_the_picture_is_what_its_script_draws(tmp_path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "draw_idea.py"))["draw"](tmp_path / "idea.svg")
    assert (tmp_path / "idea.svg").read_text() == (DOCS / "idea.svg").read_text()
